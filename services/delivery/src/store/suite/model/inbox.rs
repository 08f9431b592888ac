//! What an inbox should be.

use std::collections::{BTreeSet, HashMap};

use super::{super::*, devices::ModelDevice, operations::Item};

/// A message that was accepted.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    pub(super) item: Item,
    pub(super) id: Uuid,
    pub(super) accepted_us: u64,
    /// 0 for never.
    pub(super) expires_us: u64,
    pub(super) state: State,
    pub(super) settled_us: u64,
}

impl Kept {
    pub(super) fn expired(&self, now_us: u64) -> bool {
        self.expires_us != 0 && self.expires_us <= now_us
    }

    fn bytes(&self) -> u64 {
        size(self.item.body)
    }
}

/// The first use of a dedupe key.
#[derive(Debug, Clone, Copy)]
pub(super) struct First {
    pub(super) body: u8,
    /// 0 when it was scheduled.
    pub(super) seq: u64,
    pub(super) id: Uuid,
    pub(super) time_us: u64,
}

#[derive(Default)]
pub(super) struct ModelInbox {
    /// By seq − 1.
    pub(super) messages: Vec<Kept>,
    pub(super) attempts: Attempts,
    /// Until when a claim holds that came to nothing.
    pub(super) held_us: u64,
    pub(super) written: u64,
    /// (caller, key) → its first use.
    pub(super) keys: HashMap<(u8, u8), First>,
    /// In the order in which they were registered; and whether there ever was one.
    pub(super) devices: Vec<ModelDevice>,
    pub(super) met: bool,
}

/// The payload that a number stands for: the larger, the longer.
pub(super) fn body(number: u8) -> Arc<Payload> {
    text(format!("body-{number}{}", "x".repeat(20 * usize::from(number))))
}

pub(super) fn size(number: u8) -> u64 {
    prost::Message::encoded_len(&*body(number)) as u64
}

impl ModelInbox {
    pub(super) fn head(&self) -> u64 {
        self.messages.len() as u64
    }

    pub(super) fn get(&self, seq: u64) -> &Kept {
        &self.messages[seq as usize - 1]
    }

    pub(super) fn is_settled(&self, seq: u64) -> bool {
        self.get(seq).state.is_terminal()
    }

    pub(super) fn mark(&self) -> u64 {
        (1..=self.head()).take_while(|seq| self.is_settled(*seq)).count() as u64
    }

    pub(super) fn unsettled(&self) -> Vec<u64> {
        (1..=self.head()).filter(|seq| !self.is_settled(*seq)).collect()
    }

    /// What of it is not settled and has not expired.
    pub(super) fn living(&self, now_us: u64) -> Vec<u64> {
        self.unsettled().into_iter().filter(|seq| !self.get(*seq).expired(now_us)).collect()
    }

    /// What a reader gets, as (seq, delivery).
    pub(super) fn deliverable(&self, now_us: u64) -> Vec<(u64, u32)> {
        let delivery = |seq| Some((seq, self.attempts.delivery(seq)?));
        self.living(now_us).into_iter().filter_map(delivery).collect()
    }

    /// Settles seqs; returns those that were not.
    pub(super) fn settle(&mut self, from: u64, to: u64, state: State, now_us: u64) -> BTreeSet<u64> {
        let to = to.min(self.head());
        self.attempts.settle(from, to);
        let fresh: BTreeSet<u64> = (from.max(1)..=to).filter(|seq| !self.is_settled(*seq)).collect();
        for seq in &fresh {
            let kept = &mut self.messages[*seq as usize - 1];
            (kept.state, kept.settled_us) = (state, now_us);
        }
        fresh
    }

    pub(super) fn has_unwritten(&self) -> bool {
        self.written.max(self.mark()) < self.head()
    }

    /// The unsettled message that one with the same collapse key replaces.
    pub(super) fn replaced_by(&self, item: Item) -> Option<u64> {
        let same = |seq: &u64| {
            let other = self.get(*seq).item;
            (other.caller, other.collapse) == (item.caller, item.collapse)
        };
        self.unsettled().into_iter().rev().find(same).filter(|_| item.collapse != 0)
    }

    /// Which of the unsettled messages must leave so that there is room for a body, beside `replaced`; or why there is
    /// none.
    pub(super) fn make_room(
        &self,
        limits: &Limits,
        size: u64,
        replaced: Option<u64>,
    ) -> Result<Vec<u64>, AppendError> {
        let mut stay = self.unsettled();
        stay.retain(|seq| Some(*seq) != replaced);
        let mut leave = Vec::new();
        loop {
            let (messages, bytes) = (stay.len() as u64, stay.iter().map(|seq| self.get(*seq).bytes()).sum());
            let over = if size > limits.max_unsettled_bytes {
                return Err(AppendError::QueueFull { quota: Quota::Bytes, held: bytes });
            } else if messages >= limits.max_unsettled {
                AppendError::QueueFull { quota: Quota::Messages, held: messages }
            } else if bytes + size > limits.max_unsettled_bytes {
                AppendError::QueueFull { quota: Quota::Bytes, held: bytes }
            } else {
                return Ok(leave);
            };
            if limits.overflow == Overflow::Reject {
                return Err(over);
            }
            leave.push(stay.remove(0));
        }
    }
}
