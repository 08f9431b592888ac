//! What the shards ask of routers and delivery nodes, and what they are told; carried by tasks on the control
//! runtime, because shards own sockets and nothing else.
//!
//! Nobody waits on a queue toward a shard: publications and hints that find it full are dropped and marked
//! (`shards.rs`). Toward the control runtime a shard never waits either: what finds the lane full is kept by
//! the shard, and sockets are not read until there is room (`lane.rs`).

pub mod acks;
pub mod ask;
pub mod history;
pub mod inbox;
pub mod lane;
pub mod link;
pub mod revocations;
mod search;
pub mod shards;

use std::sync::Arc;

use sanjay_proto::{
    client::v1::{Payload, Publication},
    edge::v1::{Answer, ConnectionEvents, FailedAttempt, InboxHint, InboxPage, Milestone, Question},
};
use sanjay_protocol::{ErrorBody, event::Published, recovery::History};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::{
    shard::{hub::Top, recovery::Found},
    spans::ChannelPush,
};

/// A connection of a shard. The generation tells a connection apart from a later one at the same index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnKey {
    /// Which shard.
    pub shard: u16,
    /// Index in the shard.
    pub index: u32,
    /// Which of the connections that had this index.
    pub generation: u32,
}

/// What a shard asks of the router.
#[derive(Debug)]
pub enum LinkRequest {
    /// The shard got its first subscriber of a channel; answered by [`ShardEvent::Subscribed`].
    Subscribe(u16, Arc<str>),
    /// The shard lost its last subscriber of a channel.
    Unsubscribe(u16, Arc<str>),
    /// A client connected; answered by [`ShardEvent::SessionOpened`].
    OpenSession {
        /// Whose.
        conn: ConnKey,
        /// The user.
        user: String,
        /// The session.
        session: Uuid,
        /// Whether it takes part in the user's inbox.
        inbox: bool,
    },
    /// A client went.
    CloseSession {
        /// The user.
        user: String,
        /// The session.
        session: Uuid,
    },
    /// A client publishes; answered by [`ShardEvent::Published`].
    Publish(Box<ClientPublish>),
    /// What was seen of recent messages.
    Milestones(Vec<Milestone>),
    /// What happened to connections.
    Connections(ConnectionEvents),
}

/// A client's publish.
#[derive(Debug)]
pub struct ClientPublish {
    /// Who waits for the answer.
    pub conn: ConnKey,
    /// The command's id.
    pub id: Option<u64>,
    /// The channel.
    pub channel: String,
    /// The message.
    pub payload: Payload,
    /// The user.
    pub publisher: String,
    /// May be empty.
    pub dedupe_key: String,
    /// Made by the shard.
    pub message_id: Uuid,
    /// W3C `traceparent`.
    pub trace: String,
}

/// A shard reads an inbox; answered by [`ShardEvent::Page`].
#[derive(Debug)]
pub struct ReadRequest {
    /// Who waits for the answer.
    pub conn: ConnKey,
    /// The user.
    pub user: String,
    /// The device.
    pub device: String,
    /// Where to begin; `None`: from the mark.
    pub after: Option<u64>,
    /// Most messages.
    pub limit: u32,
}

/// A shard settles messages, or reports what was written and what failed.
#[derive(Debug)]
pub struct AckRequest {
    /// Who waits for the answer, with the command's id; nobody does for a report.
    pub waiter: Option<(ConnKey, Option<u64>)>,
    /// The user.
    pub user: String,
    /// The device.
    pub device: String,
    /// The inbox.
    pub epoch: u64,
    /// To settle.
    pub ranges: Vec<(u64, u64)>,
    /// Everything up to it was written to a socket.
    pub written: u64,
    /// Redeliveries that were written to a socket, as (seq, delivery).
    pub rewritten: Vec<(u64, u32)>,
    /// Deliveries that failed.
    pub failed: Vec<FailedAttempt>,
    /// The session that says so.
    pub session: Uuid,
    /// W3C `traceparent` of the push of the newest message in `ranges`, as the client returned it; or empty.
    pub trace: String,
    /// Whether other sessions of the user may have in flight what it settles.
    pub shared: bool,
}

/// What a shard is told.
#[derive(Debug)]
pub enum ShardEvent {
    /// A subscription was confirmed, with the epoch and the offset above which everything follows, or refused.
    Subscribed(Arc<str>, Result<(Arc<str>, u64), ErrorBody>),
    /// A session was registered, or could not be.
    SessionOpened(ConnKey, Result<(), ErrorBody>),
    /// A publish was answered.
    Published(ConnKey, Option<u64>, Result<Published, ErrorBody>),
    /// The history of a channel was read for those who go on from this place; the read began at the offset that follows.
    Found(Arc<str>, Top, u64, Result<Found, ErrorBody>),
    /// A client's read of a history was answered.
    History(ConnKey, u64, Result<History, ErrorBody>),
    /// A read was answered.
    Page(ConnKey, Result<InboxPage, ErrorBody>),
    /// Acks or failures are durable, or were not taken.
    Acked(ConnKey, Option<u64>, Result<(), ErrorBody>),
    /// A channel message, with its span when it is recorded. Droppable.
    Publication(Arc<Publication>, Option<Arc<ChannelPush>>),
    /// Channel messages up to this offset were dropped on the way.
    Gap(Arc<str>, Arc<str>, u64),
    /// A message was committed to a user's inbox, or settled. Droppable.
    Hint(Arc<InboxHint>),
    /// Hints were dropped on the way.
    Resync,
    /// No router can be attached to: clients are told what is reduced.
    Away,
    /// Another stream to a router began: sessions must be announced again.
    Attached,
    /// The edge shuts down: say so to every client and close.
    Drain,
    /// A back end asks; the sender takes the answer of each shard.
    Ask(Arc<Question>, mpsc::Sender<Answer>),
    /// Whether somebody watches connections.
    Watch(bool),
    /// Something was revoked: whoever it concerns is to be closed.
    Revoked,
    /// The keys of tokens were looked up: well or not, whoever waits for them is answered.
    KeysLookedUp,
}
