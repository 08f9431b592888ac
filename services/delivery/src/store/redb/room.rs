//! Room for a message: what its collapse key replaces, and what becomes of one that finds its inbox full.

use redb::ReadableTable;

use super::{
    tables::{self, BodyExtra},
    transaction::Tables,
};
use crate::{
    message::State,
    store::{
        AppendError, DeadReason, MAX_COLLAPSE_KEYS, NewMessage, Overflow, Quota, Settled, StoreOptions,
        filling,
    },
};

/// How much an inbox may hold, and what happens beyond that.
#[derive(Debug, Clone, Copy)]
pub(super) struct Quotas {
    messages: u64,
    bytes: u64,
    overflow: Overflow,
}

impl Quotas {
    pub(super) fn new(options: &StoreOptions) -> Self {
        let StoreOptions { max_unsettled, max_unsettled_bytes, overflow, .. } = *options;
        Self { messages: max_unsettled, bytes: max_unsettled_bytes, overflow }
    }
}

/// What of an inbox counts for its quotas.
#[derive(Clone, Copy)]
struct Held {
    messages: u64,
    bytes: u64,
}

impl Held {
    /// Which quota one more message of `size` bytes would exceed.
    fn exceeded(self, quotas: Quotas, size: u64) -> Option<AppendError> {
        if self.messages >= quotas.messages {
            return Some(full(Quota::Messages, self.messages));
        }
        (self.bytes.saturating_add(size) > quotas.bytes).then(|| full(Quota::Bytes, self.bytes))
    }

    fn leaves(&mut self, bytes: u64) {
        self.messages = self.messages.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

fn full(quota: Quota, held: u64) -> AppendError {
    AppendError::QueueFull { quota, held }
}

impl Quotas {
    /// Whether an inbox that holds so much is filling: four fifths of what it may hold.
    fn filling(&self, messages: u64, bytes: u64) -> bool {
        filling(messages, self.messages) || filling(bytes, self.bytes)
    }
}

impl Tables<'_> {
    /// Notes that a message of `size` bytes, which was just put into an inbox, brought it near its quotas.
    pub(super) fn note_filling(&mut self, user: &str, size: u64) -> Result<(), redb::Error> {
        if !self.rules.watched {
            return Ok(());
        }
        let quotas = self.rules.quotas;
        let record = &self.inbox(user)?.record;
        let (messages, bytes) = (record.unsettled(), record.bytes);
        if quotas.filling(messages, bytes)
            && !quotas.filling(messages.saturating_sub(1), bytes.saturating_sub(size))
        {
            self.told.filling.push((user.to_owned(), messages, bytes));
        }
        Ok(())
    }

    /// Makes room for a message of `size` bytes: what its collapse key replaces is settled, and where the configuration
    /// says so the oldest messages become dead letters. When there is none, nothing was changed.
    pub(super) fn make_room(
        &mut self,
        message: &NewMessage,
        size: u64,
    ) -> Result<Result<(), AppendError>, redb::Error> {
        let (user, quotas) = (message.user.as_str(), self.rules.quotas);
        let replaced = match self.replaced(message)? {
            Ok(replaced) => replaced,
            Err(error) => return Ok(Err(error)),
        };
        let record = &self.inbox(user)?.record;
        let mut held = Held { messages: record.unsettled(), bytes: record.bytes };
        if let Some(seq) = replaced {
            held.leaves(self.payload_bytes(user, seq)?);
        }
        if size > quotas.bytes {
            return Ok(Err(full(Quota::Bytes, held.bytes)));
        }
        let mut leave = Vec::new();
        if held.exceeded(quotas, size).is_some() {
            leave = match self.oldest(user, held, size, replaced)? {
                Ok(leave) => leave,
                Err(error) => return Ok(Err(error)),
            };
        }
        if let Some(seq) = replaced {
            self.end(user, &[seq], State::Superseded)?;
        }
        let left = leave.len();
        if left > 0 {
            let now_us = self.rules.now_us;
            let inbox = self.inbox(user)?;
            let mut attempts = inbox.record.attempts()?;
            for seq in leave {
                attempts.kill(seq, DeadReason::QueueFull, now_us);
            }
            inbox.record.set_attempts(&attempts);
            self.told.died.push((DeadReason::QueueFull, left));
            // They settle up to the mark, which needs no further range.
            self.bury(user)?;
        }
        Ok(Ok(()))
    }

    /// The unsettled message whose place a message takes; not one that is dying.
    fn replaced(&mut self, message: &NewMessage) -> Result<Result<Option<u64>, AppendError>, redb::Error> {
        if message.collapse_key.is_empty() {
            return Ok(Ok(None));
        }
        let key = (message.user.as_str(), message.caller.as_str(), message.collapse_key.as_str());
        let newest = self.collapse.get(key)?.map(|seq| seq.value());
        let record = &self.inbox(&message.user)?.record;
        let Some(seq) = newest else {
            let keys = record.collapsing;
            let refused = keys >= MAX_COLLAPSE_KEYS as u64;
            return Ok(if refused { Err(full(Quota::CollapseKeys, keys)) } else { Ok(None) });
        };
        if record.attempts()?.death(seq).is_some() {
            return Ok(Ok(None));
        }
        let mut settled: Settled = record.settled();
        if settled.settle(seq, seq).is_err() {
            return Ok(Err(full(Quota::SettledRanges, settled.ranges().len() as u64)));
        }
        Ok(Ok(Some(seq)))
    }

    /// Which messages become dead letters for one that is beyond a quota, or why that one is refused. What is dying
    /// already counts no more.
    fn oldest(
        &mut self,
        user: &str,
        mut held: Held,
        size: u64,
        replaced: Option<u64>,
    ) -> Result<Result<Vec<u64>, AppendError>, redb::Error> {
        let (quotas, now_us) = (self.rules.quotas, self.rules.now_us);
        let record = &self.inbox(user)?.record;
        let (mark, mut attempts) = (record.mark, record.attempts()?);
        for seq in attempts.dying() {
            held.leaves(self.payload_bytes(user, seq)?);
        }
        if let Some(seq) = replaced {
            attempts.settle(seq, seq);
        }
        let mut leave = Vec::new();
        let mut oldest = self.bodies.range((user, mark + 1)..=(user, u64::MAX))?;
        while let Some(error) = held.exceeded(quotas, size) {
            let next = if quotas.overflow == Overflow::Reject { None } else { oldest.next() };
            let Some(next) = next else { return Ok(Err(error)) };
            let (key, body) = next?;
            let seq = key.value().1;
            if Some(seq) == replaced || attempts.death(seq).is_some() {
                continue;
            }
            if !attempts.kill(seq, DeadReason::QueueFull, now_us) {
                return Ok(Err(error));
            }
            held.leaves(tables::decode::<BodyExtra>("bodies", body.value())?.payload_bytes);
            leave.push(seq);
        }
        Ok(Ok(leave))
    }

    fn payload_bytes(&self, user: &str, seq: u64) -> Result<u64, redb::Error> {
        let Some(bytes) = self.bodies.get((user, seq))? else { return Ok(0) };
        Ok(tables::decode::<BodyExtra>("bodies", bytes.value())?.payload_bytes)
    }
}
