//! Every limit of the client protocol, with its reason.

/// Largest payload in bytes, in its own kind (before base64). Larger bodies belong in an object store, with
/// a message that points at them; one of them must not hold a shard's socket for long.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024;

/// Largest WebSocket message from a client in bytes: one payload as base64 (4/3) with room for its envelope
/// and for a few small envelopes beside it.
pub const MAX_CLIENT_MESSAGE_BYTES: usize = 128 * 1024;

/// Longest channel, user, device, client or dedupe name in bytes: keys in a registry and an index stay short.
pub const MAX_NAME_BYTES: usize = 200;

/// Most channels of one connection: bounds the memory that one stranger's socket can claim.
pub const MAX_SUBSCRIPTIONS: usize = 256;

/// Inbox messages in flight (sent, not acked) of a connection, unless it asks for another number.
pub const DEFAULT_CREDIT: u32 = 64;

/// Most inbox messages in flight of a connection: with it the settled ranges above an inbox's mark stay few.
pub const MAX_CREDIT: u32 = 256;

/// Most ranges in one `ack`.
pub const MAX_ACK_RANGES: usize = 256;

/// Longest delay of a `nak` in milliseconds: a day. What should come later is better sent later.
pub const MAX_NAK_DELAY_MS: u32 = 24 * 60 * 60 * 1_000;

/// Longest reason of a `nak` or `term` in bytes: it is kept with each failed attempt of a message.
pub const MAX_REASON_BYTES: usize = 200;

/// Most commands of a connection that wait for an answer; further input is not read until one is answered.
pub const MAX_OUTSTANDING_COMMANDS: usize = 32;

/// Most messages in one answer with a channel's history, and most that a subscription recovers: beyond it a client is
/// better served by what its application keeps.
pub const MAX_HISTORY_LIMIT: usize = 1_000;

/// Messages in an answer with a channel's history unless another number is asked for.
pub const DEFAULT_HISTORY_LIMIT: u32 = 100;

/// Most bytes of such an answer: well below what may wait for a slow socket.
pub const MAX_HISTORY_BYTES: usize = 1024 * 1024;

/// Longest epoch of a channel that a client may give back; this version gives 16 digits.
pub const MAX_EPOCH_BYTES: usize = 64;

/// Most users in one `Send`.
pub const MAX_SEND_USERS: usize = 1_000;

/// Largest integer that every JSON implementation keeps exact (2⁵³ − 1).
pub const MAX_SAFE_INTEGER: u64 = (1 << 53) - 1;

/// Longest token in bytes; a token travels in a header too, where servers commonly stop at 8 KiB.
pub const MAX_TOKEN_BYTES: usize = 4 * 1024;
