//! Why a store did not do what it was asked to, and the quotas that are a reason.

use std::time::Duration;

/// Why one message was not appended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The dedupe key was used for another payload.
    #[error(
        "dedupe_key {key:?} was used for another payload to this user within 24 hours; use a new key for a new message"
    )]
    AlreadyExists {
        /// The key.
        key: String,
    },
    /// The inbox holds as much as it may.
    #[error("the user's inbox holds {held} {quota}, which is its limit; send again when some are {}", .quota.leaves())]
    QueueFull {
        /// Which limit.
        quota: Quota,
        /// How much it holds.
        held: u64,
    },
    /// The store could not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What an inbox may hold a limited number of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Quota {
    /// Unsettled messages: [`StoreOptions::max_unsettled`](super::StoreOptions::max_unsettled).
    Messages,
    /// Bytes of their encoded payloads: [`StoreOptions::max_unsettled_bytes`](super::StoreOptions::max_unsettled_bytes).
    Bytes,
    /// Unsettled messages with a collapse key: [`MAX_COLLAPSE_KEYS`](super::MAX_COLLAPSE_KEYS).
    CollapseKeys,
    /// Settled ranges above the mark, of which a superseded message may need one: [`MAX_SETTLED_RANGES`](super::MAX_SETTLED_RANGES).
    SettledRanges,
    /// Messages that wait for their time: [`MAX_SCHEDULED`](super::MAX_SCHEDULED).
    Scheduled,
}

impl Quota {
    /// What makes room.
    fn leaves(self) -> &'static str {
        if self == Quota::Scheduled { "in the inbox, as their time comes" } else { "acked" }
    }
}

impl std::fmt::Display for Quota {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Quota::Messages => "unsettled messages",
            Quota::Bytes => "bytes of unsettled messages",
            Quota::CollapseKeys => "unsettled messages with a collapse key",
            Quota::SettledRanges => "gaps between unsettled messages",
            Quota::Scheduled => "scheduled messages",
        })
    }
}

/// What becomes of a message that finds its inbox at [`Quota::Messages`] or [`Quota::Bytes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overflow {
    /// It is refused.
    #[default]
    Reject,
    /// The oldest unsettled messages become dead letters, as many as it takes; a message that is larger than the whole
    /// quota is refused.
    DeadLetterOldest,
}

/// Why the store did not do something. All are worth trying again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Too much is waiting; nothing was done.
    #[error("the inbox store has too much to do; nothing was stored, try again in a moment")]
    Busy,
    /// It is known to be away; nothing was done.
    #[error("the inbox store does not answer at present; nothing was stored, try again in {} ms", .retry_after.as_millis())]
    Away {
        /// After how long another try may be of use.
        retry_after: Duration,
    },
    /// The store failed or is away; whether something was done is unknown.
    #[error("the inbox store is not available: {0}")]
    Unavailable(String),
}
