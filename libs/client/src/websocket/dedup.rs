//! Which inbox messages the application has processed on this device.

use sanjay_protocol::event::InboxState;
use serde::{Deserialize, Serialize};

use super::ranges::Ranges;

/// Most ranges above the floor. A server keeps at most a few hundred messages open, so that more of them can
/// only come from a fault; the oldest are then forgotten, which may repeat an effect but loses none.
const MAX_RANGES: usize = 1_024;

/// What was processed: a floor, everything up to which is done, and ranges above it. Stored by a
/// [`Checkpoint`](super::Checkpoint) before the acks that it stands for are sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processed {
    epoch: String,
    floor: u64,
    ranges: Ranges,
}

/// Why an application has to reload what it derived from the inbox.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Discontinuity {
    /// The inbox was made anew.
    #[error("the inbox is another one: epoch {now} instead of {before}")]
    Epoch {
        /// The epoch that this device knew.
        before: String,
        /// The inbox's epoch.
        now: String,
    },
    /// The inbox lost messages that this device had processed, as after a restored backup.
    #[error("the inbox went back: its newest seq is {head}, but {processed} was processed here")]
    WentBack {
        /// The newest seq that was processed here.
        processed: u64,
        /// The inbox's newest seq.
        head: u64,
    },
}

impl Processed {
    /// A device that meets the inbox for the first time: what is settled is done.
    #[must_use]
    pub fn begin(inbox: &InboxState) -> Self {
        Self { epoch: inbox.epoch.clone(), floor: inbox.mark, ranges: Ranges::default() }
    }

    /// The inbox's epoch.
    #[must_use]
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Everything up to it is done.
    #[must_use]
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// Whether the message was processed.
    #[must_use]
    pub fn contains(&self, seq: u64) -> bool {
        seq <= self.floor || self.ranges.contains(seq)
    }

    /// Records that the message was processed.
    pub fn insert(&mut self, seq: u64) {
        if seq > self.floor {
            self.ranges.insert(seq, seq);
            self.compact();
        }
    }

    /// Takes the inbox's state after a connect. Says so when the inbox is not the one that this device
    /// knew; what was processed is then forgotten, as its numbers mean other messages.
    pub fn observe(&mut self, inbox: &InboxState) -> Option<Discontinuity> {
        let newest = self.ranges.last().unwrap_or(self.floor);
        let discontinuity = if self.epoch != inbox.epoch {
            Discontinuity::Epoch { before: self.epoch.clone(), now: inbox.epoch.clone() }
        } else if inbox.head < newest {
            Discontinuity::WentBack { processed: newest, head: inbox.head }
        } else {
            // What is settled is not delivered again, whoever settled it.
            self.floor = self.floor.max(inbox.mark);
            self.ranges.remove_up_to(self.floor);
            self.compact();
            return None;
        };
        *self = Self::begin(inbox);
        Some(discontinuity)
    }

    fn compact(&mut self) {
        if let Some(&(from, to)) = self.ranges.as_slice().first()
            && from == self.floor + 1
        {
            self.floor = to;
            self.ranges.take(1);
        }
        if self.ranges.len() > MAX_RANGES {
            self.ranges.take(self.ranges.len() - MAX_RANGES);
        }
    }

    pub(crate) fn is_valid(&self) -> bool {
        let above = self.ranges.as_slice().first().is_none_or(|&(from, _)| from > self.floor + 1);
        self.floor < u64::MAX && self.ranges.is_valid() && above
    }
}

#[cfg(test)]
#[path = "dedup_tests.rs"]
mod tests;
