//! Why connections, subscriptions and publishes fail, and what a client does next.

use std::{sync::Arc, time::Duration};

use sanjay_protocol::{CloseCode, ErrorBody, close::Reconnect};

use super::{checkpoint::CheckpointError, options::TokenError};

/// Why a connection was not made, or ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The address is none.
    #[error("{url:?} is no WebSocket address: {reason}; an address looks like ws://127.0.0.1:8080/v1/ws")]
    BadUrl {
        /// The address.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The address asks for TLS.
    #[error(
        "{url} asks for TLS, which this client does not speak yet; use a ws:// address, such as that of a local proxy which adds TLS"
    )]
    Tls {
        /// The address.
        url: String,
    },
    /// Nobody listens there.
    #[error("no server answers at {url}: {reason}")]
    Unreachable {
        /// The address.
        url: String,
        /// What the system said.
        reason: String,
    },
    /// The server answered the handshake with something else than an upgrade.
    #[error("{url} refused the WebSocket handshake with HTTP status {status}{}", hint(*.status))]
    Refused {
        /// The address.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The server's handshake was none.
    #[error("{url} did not complete the WebSocket handshake: {reason}")]
    Handshake {
        /// The address.
        url: String,
        /// What was wrong.
        reason: String,
    },
    /// A step of connecting took too long.
    #[error("no {what} from the server within {} s", .within.as_secs_f64())]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        within: Duration,
    },
    /// The server closed the connection.
    #[error("the server closed the connection with code {code}: {reason}")]
    Closed {
        /// A number of [`CloseCode`], or another one of RFC 6455.
        code: u16,
        /// The text beside it.
        reason: String,
    },
    /// The connection broke without a close.
    #[error("the connection broke: {reason}")]
    Lost {
        /// What the system said.
        reason: String,
    },
    /// Nothing came for longer than a heartbeat and its grace.
    #[error("the server was silent for {} s, longer than its heartbeat", .0.as_secs_f64())]
    Silent(Duration),
    /// The server sent what the protocol does not know.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
    /// The application gave no token.
    #[error("no token: {0}")]
    Token(TokenError),
}

fn hint(status: u16) -> &'static str {
    match status {
        401 | 403 => "; check the token and the server's allowed origins",
        404 => "; the path is /v1/ws, and the port is the edge's",
        429 | 503 => "; it has no room now",
        _ => "",
    }
}

impl ConnectionError {
    /// What a client does next.
    #[must_use]
    pub fn rule(&self) -> Reconnect {
        match self {
            Self::BadUrl { .. } | Self::Tls { .. } => Reconnect::Stop,
            Self::Refused { status: 401, .. } => Reconnect::NewToken,
            Self::Refused { status: 408 | 429, .. } => Reconnect::BackOff,
            Self::Refused { status: 400..500, .. } => Reconnect::Stop,
            // A code that this build does not know says nothing against trying again.
            Self::Closed { code, .. } => {
                CloseCode::from_code(*code).map_or(Reconnect::BackOff, CloseCode::reconnect)
            }
            _ => Reconnect::BackOff,
        }
    }
}

/// The client has stopped for good.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClosedError {
    /// The application closed it, or dropped the last handle.
    #[error("the client is closed")]
    ByApplication,
    /// The server said that trying again is of no use.
    #[error("{0}")]
    Stopped(Arc<ConnectionError>),
    /// The server refused the token, and the new one too, or there is no source of a new one.
    #[error("{0}; get a new token")]
    TokenRefused(Arc<ConnectionError>),
}

/// Why a client could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address is of no use.
    #[error(transparent)]
    Url(ConnectionError),
    /// An option is out of bounds.
    #[error("{}", .0.message)]
    Option(ErrorBody),
    /// What was processed before could not be loaded.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// Why a subscription was not made.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SubscribeError {
    /// The name is not one, or a limit is reached, or the channel has a subscription already.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
    /// The client has stopped.
    #[error(transparent)]
    Closed(#[from] ClosedError),
}

/// Why a publish failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PublishError {
    /// The edge refused it, or the client did, on the edge's behalf.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
    /// The connection ended before the answer.
    #[error(
        "the connection ended before the answer, so the outcome is unknown; publish again with the same dedupe key"
    )]
    Disconnected,
    /// There was no answer in time; the outcome is unknown.
    #[error("no answer within {} s, so the outcome is unknown; publish again with the same dedupe key", .0.as_secs_f64())]
    Timeout(Duration),
    /// The client has stopped.
    #[error(transparent)]
    Closed(#[from] ClosedError),
}
