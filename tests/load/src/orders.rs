//! What the bench tells its client and raw writer, and what they answer: one JSON value a line.

use std::{net::SocketAddr, time::Duration};

use serde::{Deserialize, Serialize};

/// An order to the load client.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToClient {
    /// Open connections; answered by `Opened`.
    Open(Open),
    /// Answered by `Reached` once so many messages came in since the start, or at once when they had.
    Expect {
        /// Over all connections.
        messages: u64,
    },
    /// Answered by `Status`.
    Ask,
}

/// Which connections to open.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Open {
    /// The server.
    pub target: SocketAddr,
    /// How many.
    pub connections: u32,
    /// What to say after the upgrade; nothing to the raw writer.
    pub hello: Option<Hello>,
}

/// How each connection introduces itself to an edge.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// What the edge checks tokens with.
    pub token_secret: String,
    /// Connections that share a channel.
    pub per_channel: u32,
    /// `credit`, when not the default.
    pub credit: Option<u32>,
}

/// What the load client answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromClient {
    /// Every connection is open, and subscribed where it was to be.
    Opened {
        /// How long that took.
        elapsed: Duration,
    },
    /// The number of `Expect` was reached.
    Reached,
    /// What came in since the start.
    Status(Status),
    /// It cannot go on.
    Failed(String),
}

/// What came in at the client since the start.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Status {
    /// Channel messages.
    pub messages: u64,
    /// WebSocket frames that carried them.
    pub frames: u64,
    /// Bytes of the newest such frame, with its header.
    pub frame_bytes: usize,
    /// Heartbeats that were answered.
    pub pings: u64,
    /// Events that should not come: gaps, degradations.
    pub surprises: Vec<String>,
}

/// An order to the raw writer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToRaw {
    /// Write one frame of so many bytes to every socket; answered by `Written`.
    Write {
        /// With the header.
        frame_bytes: usize,
    },
}

/// What the raw writer answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum FromRaw {
    /// It listens.
    Listening(SocketAddr),
    /// All sockets are there.
    Accepted,
    /// So many sockets took the whole frame.
    Written(u64),
    /// It cannot go on.
    Failed(String),
}
