//! Room for messages: what a message replaces by its collapse key, and what becomes of one that finds its inbox full.

use super::super::{
    documents::{CollapseDoc, binary},
    inbox::{Inbox, Open},
    plan::Rules,
    reader::unsettled,
    work::Append,
};
use crate::store::{AppendError, Attempts, DeadReason, MAX_COLLAPSE_KEYS, Overflow, Quota, Settled, filling};

/// How many bodies beside the inbox are looked at together when the oldest are to go.
const LOOK_AHEAD: u64 = 64;

/// What a write ends beside what it appends.
#[derive(Debug, Clone)]
pub(in super::super) struct Ending {
    /// Of the inbox, after it.
    pub(super) settled: Settled,
    pub(super) attempts: Attempts,
    /// Seqs that it settles as superseded, and what is known of them: nothing when a body is lost.
    pub(super) superseded: Vec<(u64, Option<Open>)>,
    /// How many it notes as dying.
    pub(super) killed: usize,
}

impl Ending {
    /// Notes it in what is known of the inbox, once it is durable.
    pub(super) fn apply(self, inbox: &mut Inbox) {
        inbox.settles += 1;
        inbox.terminal += self.superseded.len() as u64;
        inbox.receipts += self.superseded.len();
        inbox.open.retain(|open| self.superseded.iter().all(|(seq, _)| *seq != open.seq));
        (inbox.settled, inbox.attempts) = (self.settled, self.attempts);
        if !self.superseded.is_empty() {
            inbox.drop_collapse_keys();
        }
    }
}

/// What a run of messages makes of its inbox, as far as it is planned.
pub(super) struct Draft<'a> {
    inbox: &'a Inbox,
    /// Whether acks wait that came before any message of the run but its first.
    acks_wait: bool,
    /// What counts for the quotas after it: messages, and bytes of their payloads.
    held: u64,
    pub(super) held_bytes: i64,
    /// Of the messages in it that have a collapse key.
    pub(super) collapse: Vec<CollapseDoc>,
    pub(super) ending: Option<Box<Ending>>,
    /// Seqs of members' messages that die in it for lack of room.
    pub(super) refused: Vec<u64>,
}

/// Whether a message fits into a run.
pub(super) enum Fit {
    /// It is in.
    In,
    /// Not into this one; the next may take it.
    Later,
    /// The inbox must be read before it can be told.
    Read,
    /// Bodies beside the inbox must be read before.
    Beside(u64, u64),
    /// It is refused.
    Refused(AppendError),
}

/// What one message changes, until it is known that it fits.
struct Trial<'a> {
    inbox: &'a Inbox,
    before: Option<&'a Ending>,
    held: u64,
    held_bytes: i64,
    ending: Option<Box<Ending>>,
}

impl<'a> Draft<'a> {
    pub(super) fn new(inbox: &'a Inbox, acks_wait: bool) -> Self {
        let held = inbox.held();
        // An earlier build may have left another number.
        let held_bytes = if held == 0 { 0 } else { inbox.held_bytes };
        Self { inbox, acks_wait, held, held_bytes, collapse: Vec::new(), ending: None, refused: Vec::new() }
    }

    /// Whether it brings the inbox near its quotas.
    pub(super) fn is_filling(&self, rules: &Rules<'_>) -> bool {
        let bytes = self.held_bytes.max(0).cast_unsigned();
        filling(self.held, rules.max_unsettled) || filling(bytes, rules.max_unsettled_bytes)
    }

    /// What the inbox holds with it, messages and bytes.
    pub(super) fn filling(&self) -> Option<(u64, u64)> {
        Some((self.held, self.held_bytes.max(0).cast_unsigned()))
    }

    /// Puts a message at `seq`, the next of the run, when it fits.
    pub(super) fn put(&mut self, rules: &Rules<'_>, append: &Append, seq: u64) -> Fit {
        let mut trial = Trial {
            inbox: self.inbox,
            before: self.ending.as_deref(),
            held: self.held,
            held_bytes: self.held_bytes,
            ending: None,
        };
        let replaced = match &append.collapse {
            Some(digest) if self.collapse.iter().any(|entry| entry.k.bytes == *digest) => Err(Fit::Later),
            Some(digest) => trial.replace(digest, self.collapse.len()),
            None => Ok(()),
        };
        let size = append.bytes();
        match replaced.and_then(|()| trial.make_room(rules, size)) {
            Ok(()) => {}
            Err(Fit::Refused(_)) if append.message.shared.is_some() => {
                trial.ending = None;
                if trial.ending().attempts.kill(seq, DeadReason::QueueFull, rules.now_us) {
                    trial.ending().killed += 1;
                    // What is dying does not count.
                    self.ending = trial.ending;
                    self.refused.push(seq);
                    return Fit::In;
                }
                // With too many that failed already, it stays beyond the quota.
                (trial.held, trial.held_bytes, trial.ending) = (self.held, self.held_bytes, None);
            }
            Err(fit) => return fit,
        }
        if self.acks_wait && trial.ending.is_some() && seq > self.inbox.head + 1 {
            // What it would end may be acknowledged already.
            return Fit::Later;
        }
        let Trial { held, held_bytes, ending, .. } = trial;
        (self.held, self.held_bytes) = (held + 1, held_bytes.saturating_add_unsigned(size));
        self.ending = ending.or(self.ending.take());
        if let Some(digest) = &append.collapse {
            self.collapse.push(CollapseDoc { k: binary(digest.clone()), n: seq.cast_signed() });
        }
        Fit::In
    }
}

impl Trial<'_> {
    fn settled(&self) -> &Settled {
        self.ending.as_deref().or(self.before).map_or(&self.inbox.settled, |ending| &ending.settled)
    }

    fn attempts(&self) -> &Attempts {
        self.ending.as_deref().or(self.before).map_or(&self.inbox.attempts, |ending| &ending.attempts)
    }

    fn ending(&mut self) -> &mut Ending {
        self.ending.get_or_insert_with(|| {
            Box::new(self.before.cloned().unwrap_or_else(|| {
                let (settled, mut attempts) = (self.inbox.settled.clone(), self.inbox.attempts.clone());
                // A node that does not know of attempts leaves those of what it settles.
                attempts.settle_by(|seq| settled.holds(seq));
                Ending { settled, attempts, superseded: Vec::new(), killed: 0 }
            }))
        })
    }

    /// Refuses a message when that goes by what the database says now.
    fn refuse(&self, quota: Quota, held: u64) -> Fit {
        if self.inbox.fresh { Fit::Refused(AppendError::QueueFull { quota, held }) } else { Fit::Read }
    }

    /// Whether a message may be replaced or removed: it is not settled, and nothing else becomes of it already.
    fn lives(&self, seq: u64) -> bool {
        !self.settled().holds(seq) && self.attempts().death(seq).is_none()
    }

    /// An unsettled message; `None` when its body is lost.
    fn message(&self, seq: u64, ahead: u64) -> Result<Option<Open>, Fit> {
        match self.inbox.message(seq) {
            Some(open) => Ok(Some(open.clone())),
            None if !self.inbox.looked_for(seq) => {
                Err(Fit::Beside(seq, seq.saturating_add(ahead).min(self.inbox.head)))
            }
            None if !self.inbox.fresh => Err(Fit::Read),
            None => {
                tracing::error!(seq, "the body of an unsettled message is missing in the database");
                Ok(None)
            }
        }
    }

    /// Settles what a message with this collapse key replaces. `others` messages of the run have keys, too.
    fn replace(&mut self, digest: &[u8], others: usize) -> Result<(), Fit> {
        let inbox = self.inbox;
        let newest = inbox.collapse.iter().rev().find(|entry| entry.k.bytes == digest);
        let Some(seq) = newest.map(|entry| entry.n.cast_unsigned()).filter(|seq| self.lives(*seq)) else {
            if inbox.collapse.len() + others < MAX_COLLAPSE_KEYS {
                return Ok(());
            }
            let held = inbox.collapse.iter().filter(|entry| self.lives(entry.n.cast_unsigned()));
            let held = held.count() + others;
            let full = held >= MAX_COLLAPSE_KEYS;
            return if full { Err(self.refuse(Quota::CollapseKeys, held as u64)) } else { Ok(()) };
        };
        let open = self.message(seq, 0)?;
        let ending = self.ending();
        if ending.settled.settle(seq, seq).is_err() {
            let held = ending.settled.ranges().len() as u64;
            return Err(self.refuse(Quota::SettledRanges, held));
        }
        ending.attempts.settle(seq, seq);
        self.leave(open.as_ref());
        self.ending().superseded.push((seq, open));
        Ok(())
    }

    fn leave(&mut self, message: Option<&Open>) {
        self.held = self.held.saturating_sub(1);
        let bytes = message.map_or(0, |open| open.bytes as u64);
        self.held_bytes = self.held_bytes.saturating_sub_unsigned(bytes);
    }

    /// Makes room for a message of `size` bytes, or refuses it.
    fn make_room(&mut self, rules: &Rules<'_>, size: u64) -> Result<(), Fit> {
        let inbox = self.inbox;
        if size > rules.max_unsettled_bytes {
            return Err(self.refuse(Quota::Bytes, self.bytes()));
        }
        let mut oldest = None;
        while let Some((quota, held)) = self.over(rules, size) {
            if rules.overflow == Overflow::Reject {
                return Err(self.refuse(quota, held));
            }
            let oldest = oldest.get_or_insert_with(|| unsettled(self.settled().clone(), inbox.head, 0));
            // Those that came before it in the run go by themselves first.
            let Some(seq) = oldest.find(|seq| self.lives(*seq)) else { return Err(Fit::Later) };
            let open = self.message(seq, LOOK_AHEAD)?;
            if !self.ending().attempts.kill(seq, DeadReason::QueueFull, rules.now_us) {
                return Err(self.refuse(quota, held));
            }
            self.ending().killed += 1;
            self.leave(open.as_ref());
        }
        Ok(())
    }

    fn bytes(&self) -> u64 {
        self.held_bytes.max(0).cast_unsigned()
    }

    /// Which quota one more message of `size` bytes would exceed, and how much is held of it.
    fn over(&self, rules: &Rules<'_>, size: u64) -> Option<(Quota, u64)> {
        if self.held >= rules.max_unsettled {
            return Some((Quota::Messages, self.held));
        }
        let full = self.bytes().saturating_add(size) > rules.max_unsettled_bytes;
        full.then(|| (Quota::Bytes, self.bytes()))
    }
}
