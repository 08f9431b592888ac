//! What ends messages without an ack: a newer one with the same collapse key, a full inbox, their time.

use redb::ReadableTable;

use super::{
    tables::{self, BodyExtra},
    transaction::{Ended, Tables},
};
use crate::{
    message::State,
    store::{AppendError, DeadReason, Expired, MAX_COLLAPSE_KEYS, NewMessage, Overflow, Quota, StoreOptions},
};

/// How long an expired message waits that could not be settled, in microseconds.
const LATER_US: u64 = 60_000_000;

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

    /// Which of them a message exceeds in an inbox that holds so much without it.
    fn exceeded(&self, messages: u64, bytes: u64, size: u64) -> Option<AppendError> {
        let full = |quota, held| Some(AppendError::QueueFull { quota, held });
        if messages >= self.messages {
            return full(Quota::Messages, messages);
        }
        if bytes.saturating_add(size) > self.bytes { full(Quota::Bytes, bytes) } else { None }
    }
}

impl Tables<'_> {
    /// Makes room for a message: what its collapse key replaces is settled, and where the configuration says so the
    /// oldest messages become dead letters. When there is none, nothing was changed.
    pub(super) fn make_room(&mut self, message: &NewMessage) -> Result<Result<(), AppendError>, redb::Error> {
        let (user, quotas) = (message.user.as_str(), self.rules.quotas);
        let size = prost::Message::encoded_len(&*message.payload) as u64;
        let replaced = self.replaced(message)?;
        let (gone, gone_bytes) = match replaced {
            Some(seq) => (1, self.payload_bytes(user, seq)?),
            None => (0, 0),
        };
        let record = &self.inbox(user)?.record;
        if let Some(seq) = replaced
            && record.settled().settle(seq, seq).is_err()
        {
            let held = record.settled().ranges().len() as u64;
            return Ok(Err(AppendError::QueueFull { quota: Quota::SettledRanges, held }));
        }
        let (keys, known) = (record.collapsing, self.has_key(message)?);
        if !message.collapse_key.is_empty() && !known && keys >= MAX_COLLAPSE_KEYS as u64 {
            return Ok(Err(AppendError::QueueFull { quota: Quota::CollapseKeys, held: keys }));
        }
        loop {
            let record = &self.inbox(user)?.record;
            let (messages, bytes) = (record.unsettled() - gone, record.bytes.saturating_sub(gone_bytes));
            let Some(full) = quotas.exceeded(messages, bytes, size) else { break };
            let gives_up = quotas.overflow == Overflow::DeadLetterOldest && size <= quotas.bytes;
            if !gives_up || !self.give_up_oldest(user, replaced)? {
                return Ok(Err(full));
            }
        }
        if let Some(seq) = replaced {
            self.end(user, &[seq], State::Superseded)?;
        }
        Ok(Ok(()))
    }

    /// The unsettled message whose place a message takes.
    fn replaced(&mut self, message: &NewMessage) -> Result<Option<u64>, redb::Error> {
        if message.collapse_key.is_empty() {
            return Ok(None);
        }
        let key = (message.user.as_str(), message.caller.as_str(), message.collapse_key.as_str());
        let Some(seq) = self.collapse.get(key)?.map(|seq| seq.value()) else { return Ok(None) };
        let dying = self.inbox(&message.user)?.record.attempts()?.death(seq).is_some();
        Ok(Some(seq).filter(|_| !dying))
    }

    fn has_key(&self, message: &NewMessage) -> Result<bool, redb::Error> {
        let key = (message.user.as_str(), message.caller.as_str(), message.collapse_key.as_str());
        Ok(!message.collapse_key.is_empty() && self.collapse.get(key)?.is_some())
    }

    fn payload_bytes(&self, user: &str, seq: u64) -> Result<u64, redb::Error> {
        let Some(bytes) = self.bodies.get((user, seq))? else { return Ok(0) };
        let body: sanjay_proto::client::v1::InboxMessage = tables::decode("bodies", bytes.value())?;
        Ok(body.payload.as_ref().map_or(0, prost::Message::encoded_len) as u64)
    }

    /// The oldest message that is not dying becomes a dead letter, `except` one; false when there is none, or when it
    /// cannot be settled.
    fn give_up_oldest(&mut self, user: &str, except: Option<u64>) -> Result<bool, redb::Error> {
        let inbox = self.inbox(user)?;
        let mut attempts = inbox.record.attempts()?;
        let (unsettled, mark) = (inbox.record.unsettled(), inbox.record.mark);
        let mut oldest = None;
        for entry in self.bodies.range((user, mark + 1)..=(user, u64::MAX))? {
            let seq = entry?.0.value().1;
            if Some(seq) != except && attempts.death(seq).is_none() {
                oldest = Some(seq);
                break;
            }
        }
        let (Some(seq), now_us) = (oldest, self.rules.now_us) else { return Ok(false) };
        if !attempts.kill(seq, DeadReason::QueueFull, now_us) {
            return Ok(false);
        }
        let inbox = self.inbox(user)?;
        inbox.record.set_attempts(&attempts);
        inbox.changed = true;
        self.bury(user)?;
        Ok(self.inbox(user)?.record.unsettled() < unsettled)
    }

    /// Notes by which keys a message is found that was just put into its inbox.
    pub(super) fn note_keys(&mut self, message: &NewMessage, seq: u64) -> Result<(), redb::Error> {
        let user = message.user.as_str();
        if message.expires_us != 0 {
            self.expires.insert((message.expires_us, user, seq), ())?;
        }
        if !message.collapse_key.is_empty() {
            let key = (user, message.caller.as_str(), message.collapse_key.as_str());
            if self.collapse.insert(key, seq)?.is_none() {
                self.inbox(user)?.record.collapsing += 1;
            }
        }
        Ok(())
    }

    /// Forgets them when the message is settled; whether its collapse key has no message any more.
    pub(super) fn forget_keys(
        &mut self,
        user: &str,
        caller: &str,
        seq: u64,
        extra: &BodyExtra,
    ) -> Result<bool, redb::Error> {
        if extra.expires_us != 0 {
            // One that is looked at later goes when it is.
            self.expires.remove((extra.expires_us, user, seq))?;
        }
        if extra.collapse_key.is_empty() {
            return Ok(false);
        }
        let key = (user, caller, extra.collapse_key.as_str());
        let newest = self.collapse.get(key)?.is_some_and(|newest| newest.value() == seq);
        if newest {
            self.collapse.remove(key)?;
        }
        Ok(newest)
    }

    /// Settles messages of one inbox; returns those that its settled ranges have no room for.
    fn end(&mut self, user: &str, seqs: &[u64], how: State) -> Result<Vec<u64>, redb::Error> {
        let inbox = self.inbox(user)?;
        let attempts = inbox.record.attempts()?;
        let (mut settled, mut refused) = (inbox.record.settled(), Vec::new());
        let mut ended = Ended::new(how, attempts);
        for &seq in seqs {
            match settled.settle(seq, seq) {
                Ok(fresh) if fresh.is_empty() => {}
                Ok(_) => self.remove_bodies(user, seq, seq, &mut ended)?,
                Err(_) => refused.push(seq),
            }
        }
        if ended.count + ended.dead > 0 {
            let inbox = self.inbox(user)?;
            inbox.record.set_settled(&settled);
            ended.note(&mut inbox.record);
            inbox.record.attempts = ended.attempts.encode();
            inbox.record.disarm_when_done()?;
            inbox.changed = true;
            self.must_sync = true;
        }
        Ok(refused)
    }

    /// Settles what has expired, the earliest first.
    pub(super) fn expire(&mut self, now_us: u64, limit: usize) -> Result<Expired, redb::Error> {
        let (mut looked, mut due) = (0, std::collections::BTreeMap::<String, Vec<(u64, u64)>>::new());
        for entry in self.expires.range((0, "", 0)..(now_us.saturating_add(1), "", 0))?.take(limit) {
            let (key, _) = entry?;
            let (at, user, seq) = key.value();
            due.entry(user.to_owned()).or_default().push((seq, at));
            looked += 1;
        }
        let mut settled = 0;
        for (user, mut entries) in due {
            entries.sort_unstable();
            for &(seq, at) in &entries {
                self.expires.remove((at, user.as_str(), seq))?;
            }
            let seqs: Vec<u64> = entries.iter().map(|(seq, _)| *seq).collect();
            let before = self.inbox(&user)?.record.unsettled();
            let left = if self.rules.keep_expired {
                self.keep(&user, &seqs)?
            } else {
                self.expire_in(&user, &seqs)?
            };
            settled += before - self.inbox(&user)?.record.unsettled();
            for seq in left {
                self.expires.insert((now_us + LATER_US, user.as_str(), seq), ())?;
            }
        }
        Ok(Expired { settled: settled as usize, more: looked == limit })
    }

    /// Settles messages of one inbox as expired; returns those that could not be.
    fn expire_in(&mut self, user: &str, seqs: &[u64]) -> Result<Vec<u64>, redb::Error> {
        let attempts = self.inbox(user)?.record.attempts()?;
        // What is dying ends as that.
        let seqs: Vec<u64> = seqs.iter().copied().filter(|seq| attempts.death(*seq).is_none()).collect();
        self.end(user, &seqs, State::Expired)
    }

    /// Makes dead letters of expired messages of one inbox; returns those of which too many are known.
    fn keep(&mut self, user: &str, seqs: &[u64]) -> Result<Vec<u64>, redb::Error> {
        let now_us = self.rules.now_us;
        let inbox = self.inbox(user)?;
        let (mut attempts, settled) = (inbox.record.attempts()?, inbox.record.settled());
        let mut left = Vec::new();
        for &seq in seqs.iter().filter(|seq| !settled.holds(**seq)) {
            if attempts.death(seq).is_none() && !attempts.kill(seq, DeadReason::Expired, now_us) {
                left.push(seq);
            }
        }
        inbox.record.set_attempts(&attempts);
        inbox.changed = true;
        self.must_sync = true;
        self.bury(user)?;
        self.inbox(user)?.record.disarm_when_done()?;
        Ok(left)
    }
}
