//! What ends messages without an ack, and the keys by which such messages are found.

use redb::ReadableTable;

use super::{
    tables::BodyExtra,
    transaction::{Ended, Tables},
};
use crate::{
    message::State,
    store::{DeadReason, Expired, NewMessage},
};

/// How long an expired message waits that could not be settled, in microseconds.
const LATER_US: u64 = 60_000_000;

impl Tables<'_> {
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
    pub(super) fn end(&mut self, user: &str, seqs: &[u64], how: State) -> Result<Vec<u64>, redb::Error> {
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

    /// Settles what has expired, the earliest first; at least one.
    pub(super) fn expire(&mut self, now_us: u64, limit: usize) -> Result<Expired, redb::Error> {
        let limit = limit.max(1);
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
        let (mut left, mut died) = (Vec::new(), 0);
        for &seq in seqs.iter().filter(|seq| !settled.holds(**seq)) {
            if attempts.death(seq).is_some() {
                continue;
            }
            if attempts.kill(seq, DeadReason::Expired, now_us) {
                died += 1;
            } else {
                left.push(seq);
            }
        }
        inbox.record.set_attempts(&attempts);
        inbox.changed = true;
        self.told.died.push((DeadReason::Expired, died));
        self.must_sync = true;
        self.bury(user)?;
        self.inbox(user)?.record.disarm_when_done()?;
        Ok(left)
    }
}
