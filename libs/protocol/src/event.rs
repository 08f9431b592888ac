//! What an edge says to a client: replies to commands, and pushes.

use serde::{Deserialize, Serialize};

use crate::{ErrorBody, ErrorCode, Payload, recovery::History};

/// A reply (with the command's id) or a push (without).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventEnvelope {
    /// The command that this answers.
    pub id: Option<u64>,
    /// What happened.
    pub event: Event,
}

/// What an edge can say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The empty envelope: a ping, or the answer to one.
    Ping,
    /// Answers `hello`.
    Welcome(Box<Welcome>),
    /// Answers `subscribe`.
    Subscribed(Subscribed),
    /// Answers what has no answer of its own.
    Ok(Empty),
    /// Answers `publish`.
    Published(Published),
    /// A command failed.
    Error(ErrorBody),
    /// A channel message.
    Message(Box<Message>),
    /// An inbox message.
    Inbox(Box<Inbox>),
    /// Inbox messages that this client has were settled elsewhere.
    Settled(Settled),
    /// Channel messages were dropped on the way to this client.
    Gap(Gap),
    /// What is reduced now.
    Degraded(Degraded),
    /// The connection will close soon.
    Goaway(Goaway),
    /// Answers `history`.
    History(Box<History>),
    /// The edge or a back end ended a subscription.
    Unsubscribed(Unsubscribed),
    /// A back end has something to say to every client.
    Broadcast(Box<Broadcast>),
    /// Answers `refresh`.
    Refreshed(Refreshed),
    /// The connection's token has ended.
    TokenExpired(TokenExpired),
    /// An event that this build does not know.
    Unknown(String),
}

/// An object without fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Empty {}

/// `welcome`: the connection is ready.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Id of this session (UUID).
    pub session: String,
    /// The user of the token.
    pub user: String,
    /// Where the inbox stands. Absent without credit, or while the inbox is away (see `features`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbox: Option<InboxState>,
    /// The edge pings after so many milliseconds of silence.
    pub heartbeat_ms: u64,
    /// Seconds until the token ends.
    pub token_ttl_s: u64,
    /// Bounds of this connection.
    pub limits: Limits,
    /// First delay after an unexpected close is random up to this, in milliseconds.
    pub reconnect_spread_ms: u64,
    /// What is reduced now: `inbox`, `channels`.
    #[serde(default)]
    pub features: Vec<String>,
}

/// Where an inbox stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InboxState {
    /// Names the sequence: another epoch is another inbox.
    pub epoch: String,
    /// Everything up to it is settled.
    pub mark: u64,
    /// The newest seq.
    pub head: u64,
}

/// Bounds of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Largest WebSocket message to the edge.
    pub message_bytes: u64,
    /// Largest payload.
    pub payload_bytes: u64,
    /// Most channels.
    pub subscriptions: u64,
    /// Largest credit.
    pub credit: u32,
}

/// `subscribed`: every message above `offset` follows, or a `gap`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscribed {
    /// The channel.
    pub channel: String,
    /// Names the sequence.
    pub epoch: String,
    /// The newest offset before this subscription.
    pub offset: u64,
    /// Whether everything that was missed since the position that was asked for is in `messages`; absent when none was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovered: Option<bool>,
    /// What was missed, in order; the last one has `offset`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<Message>,
}

/// `published`: an offset was assigned. Not a promise that anyone received it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Published {
    /// UUID.
    pub message_id: String,
    /// Names the sequence.
    pub epoch: String,
    /// Position in it.
    pub offset: u64,
}

/// `message`: a channel message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The channel.
    pub channel: String,
    /// Position in the sequence, without gaps.
    pub offset: u64,
    /// Names the sequence.
    pub epoch: String,
    /// UUID.
    pub message_id: String,
    /// The body.
    pub payload: Payload,
    /// The user that published; empty for a back end.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub publisher: String,
    /// When the offset was assigned, in Unix microseconds.
    pub time_us: u64,
    /// W3C `traceparent`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub trace: String,
}

/// `inbox`: a message of the user's inbox, to be acked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inbox {
    /// Position in the inbox, without gaps.
    pub seq: u64,
    /// UUID.
    pub message_id: String,
    /// The body.
    pub payload: Payload,
    /// When the message was accepted, in Unix microseconds.
    pub time_us: u64,
    /// 1 for the first delivery; a lower bound of how often it was sent.
    pub delivery: u32,
    /// W3C `traceparent`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub trace: String,
}

/// `settled`: inbox messages that were sent here and not answered need no answer any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// Epoch of the inbox.
    pub epoch: String,
    /// Inclusive ranges of inbox seq, ascending, `[from, to]` each.
    pub ranges: Vec<(u64, u64)>,
}

/// `gap`: messages of a channel were dropped for this client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// The channel.
    pub channel: String,
    /// Names the sequence after the gap.
    pub epoch: String,
    /// First offset that is missing; 0 when the epoch changed, so that it cannot be told.
    pub from: u64,
    /// Last offset that is missing.
    pub to: u64,
}

/// `degraded`: what is reduced now; an empty list says that all is well again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Degraded {
    /// `inbox`, `channels`.
    pub features: Vec<String>,
    /// Where the inbox stands, once it is known, when `welcome` could not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbox: Option<InboxState>,
}

/// `goaway`: the connection closes soon; open the next one first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goaway {
    /// The close code that will follow.
    pub code: u16,
    /// Why.
    pub reason: String,
    /// Reconnect after so many milliseconds,
    pub reconnect_after_ms: u64,
    /// plus a random part of these.
    pub spread_ms: u64,
}

/// `refreshed`: the new token is in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refreshed {
    /// Seconds until it ends.
    pub token_ttl_s: u64,
    /// The channel, when it was a subscription's token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
}

/// `token_expired`: until a `refresh`, nothing new is subscribed or published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenExpired {
    /// Without a `refresh` the connection is closed after so many milliseconds.
    pub close_in_ms: u64,
}

/// `unsubscribed`: the edge or a back end ended the subscription of a channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsubscribed {
    /// The channel.
    pub channel: String,
    /// A code of docs/protocol.md, "Error codes".
    pub code: ErrorCode,
    /// Why, for a person.
    pub reason: String,
    /// Whether the client may subscribe again by itself.
    pub retryable: bool,
}

/// `broadcast`: a message for every client that is connected.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broadcast {
    /// UUID.
    pub message_id: String,
    /// The body.
    pub payload: Payload,
    /// When the message was accepted, in Unix microseconds.
    pub time_us: u64,
}
