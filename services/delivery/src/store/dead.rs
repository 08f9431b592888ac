//! Dead letters: messages that ended without being acknowledged, kept with everything that is known of them until
//! somebody sends them again or purges them.

use std::sync::Arc;

use sanjay_proto::client::v1::Payload;
use uuid::Uuid;

use super::Failure;

/// Why a message became a dead letter. The numbers are those of stored records and of the back ends' API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DeadReason {
    /// As many attempts failed as it may have.
    MaxAttempts = 1,
    /// A client said that no delivery will help.
    Terminated = 2,
    /// Newer messages needed its place in a full inbox.
    QueueFull = 3,
    /// Its time to live passed.
    Expired = 4,
}

impl DeadReason {
    /// Every reason.
    pub const ALL: [DeadReason; 4] =
        [DeadReason::MaxAttempts, DeadReason::Terminated, DeadReason::QueueFull, DeadReason::Expired];

    /// The number that stands for it.
    #[must_use]
    pub fn number(self) -> i32 {
        self as i32
    }

    /// The reason with this number, or `None` for a number that this build does not know.
    #[must_use]
    pub fn from_number(number: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.number() == number)
    }

    /// Its name in metrics and logs.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            DeadReason::MaxAttempts => "max_attempts",
            DeadReason::Terminated => "terminated",
            DeadReason::QueueFull => "queue_full",
            DeadReason::Expired => "expired",
        }
    }
}

/// A message that ended without being acknowledged.
#[derive(Debug, Clone, PartialEq)]
pub struct DeadLetter {
    /// Whose inbox it was in.
    pub user: String,
    /// Its id.
    pub message_id: Uuid,
    /// Its position in the inbox.
    pub seq: u64,
    /// The inbox's epoch.
    pub epoch: u64,
    /// The back end that sent it.
    pub caller: String,
    /// Why it is here.
    pub reason: DeadReason,
    /// When it was accepted, Unix time in microseconds.
    pub accepted_us: u64,
    /// When it became a dead letter, Unix time in microseconds.
    pub died_us: u64,
    /// Every attempt that failed, in ascending time.
    pub failures: Vec<Failure>,
    /// W3C `traceparent` that it was stored with, or empty.
    pub trace: String,
    /// The body; `None` in lists.
    pub payload: Option<Arc<Payload>>,
    /// Length of the encoded body.
    pub payload_bytes: u64,
    /// The message that it was sent again as.
    pub redriven_as: Option<Uuid>,
}

impl DeadLetter {
    /// Where it stands among all.
    #[must_use]
    pub fn position(&self) -> DeadPosition {
        DeadPosition { died_us: self.died_us, message_id: self.message_id }
    }
}

/// Which dead letters; everything that is set must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeadFilter {
    /// Of this user.
    pub user: Option<String>,
    /// For this reason.
    pub reason: Option<DeadReason>,
    /// That died at this time or later, Unix time in microseconds.
    pub from_us: Option<u64>,
    /// That died before this time, Unix time in microseconds.
    pub to_us: Option<u64>,
    /// Those that were sent again, too.
    pub redriven: bool,
}

impl DeadFilter {
    /// Whether a dead letter passes.
    #[must_use]
    pub fn matches(&self, letter: &DeadLetter) -> bool {
        self.user.as_ref().is_none_or(|user| *user == letter.user)
            && self.reason.is_none_or(|reason| reason == letter.reason)
            && self.from_us.is_none_or(|from| letter.died_us >= from)
            && self.to_us.is_none_or(|to| letter.died_us < to)
            && (self.redriven || letter.redriven_as.is_none())
    }
}

/// Where a dead letter stands among all: the newest come first, and of one time those with the higher id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeadPosition {
    /// When it died, Unix time in microseconds.
    pub died_us: u64,
    /// Its id.
    pub message_id: Uuid,
}

/// Part of a list of dead letters.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeadPage {
    /// Without payloads, the newest first.
    pub letters: Vec<DeadLetter>,
    /// What the next page begins after; `None` when there is none.
    pub next: Option<DeadPosition>,
}
