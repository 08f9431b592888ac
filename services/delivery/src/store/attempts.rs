//! What is known of messages that did not go the usual way: which delivery is the newest, what failed, when the next
//! attempt is due.
//!
//! Pure: both adapters keep the encoded [`Attempts`] with the inbox, and change them in the step that changes the inbox.
//! A message without an entry is in its first delivery and has not failed. `docs/guarantees.md` says what an attempt is.

use std::time::Duration;

use prost::Message as _;
use sanjay_runtime::random::{Random, fraction};
use uuid::Uuid;

use super::{DeadReason, Settle, Settled};
use crate::retry;

/// Most messages of an inbox that can have failed and be neither settled nor dead. At the bound further failures are
/// not taken: those messages stay where they are, and come again when their client does.
pub const MAX_FAILED: usize = 1_024;

/// Most failures that are kept of one message, the newest: with [`MAX_FAILED`] they stay below what a database takes
/// as one document.
pub const MAX_FAILURES: usize = 16;

/// How long a message that failed for good may wait to be settled as dead before somebody else finishes it, in
/// microseconds: longer than it takes when nothing goes wrong.
const DYING_US: u64 = 5_000_000;

/// Why a delivery failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// The client asked for another delivery, not before so long.
    Nak(Duration),
    /// The client was alive and did not answer within the ack deadline.
    Deadline,
    /// The client said that no delivery will help.
    Term,
}

impl FailureKind {
    /// Its name in the back ends' API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            FailureKind::Nak(_) => "nak",
            FailureKind::Deadline => "deadline",
            FailureKind::Term => "term",
        }
    }
}

/// A delivery that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Of which message.
    pub seq: u64,
    /// Which delivery of it, from 1.
    pub delivery: u32,
    /// Why.
    pub kind: FailureKind,
    /// When it was reported, Unix time in microseconds.
    pub time_us: u64,
    /// Name of the edge that reported it.
    pub edge: String,
    /// The session that it failed in.
    pub session: Option<Uuid>,
    /// What the client said; at most 200 bytes.
    pub reason: String,
}

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The next attempt is due at this Unix time in microseconds.
    Again(u64),
    /// The message becomes a dead letter.
    Dead(DeadReason),
    /// The inbox knows of too many failed messages; nothing was noted.
    Full,
}

/// The messages of an inbox that failed or are delivered again, in ascending seq.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attempts(Vec<Entry>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    seq: u64,
    /// Number of the newest delivery that was handed out.
    delivery: u32,
    /// When the next attempt is due, Unix time in microseconds; 0 while one is under way.
    due_us: u64,
    /// Whether `delivery` was claimed and no edge reported it written: another claim hands out the same number.
    claimed: bool,
    /// It failed for good and is about to be settled as dead: nobody gets it any more, and no ack counts.
    dying: Option<DeadReason>,
    /// Since when, Unix time in microseconds.
    dying_us: u64,
    failures: Vec<Failure>,
}

impl Entry {
    fn new(seq: u64) -> Self {
        Self { seq, delivery: 1, due_us: 0, claimed: false, dying: None, dying_us: 0, failures: Vec::new() }
    }

    /// Whether it waits for its next attempt.
    fn waits(&self) -> bool {
        self.due_us != 0 && !self.claimed
    }

    fn fail(&mut self, failure: Failure, max_attempts: u32, fraction: f64) -> Verdict {
        let (kind, now_us, delivery) = (failure.kind, failure.time_us, failure.delivery);
        if self.failures.len() >= MAX_FAILURES {
            self.failures.drain(..=self.failures.len() - MAX_FAILURES);
        }
        self.failures.push(failure);
        self.claimed = false;
        // Each delivery but the newest has failed, and no delivery fails twice.
        let (asked, reason) = match kind {
            FailureKind::Term => (Duration::ZERO, Some(DeadReason::Terminated)),
            _ if delivery >= max_attempts => (Duration::ZERO, Some(DeadReason::MaxAttempts)),
            FailureKind::Nak(delay) => (delay, None),
            FailureKind::Deadline => (Duration::ZERO, None),
        };
        if let Some(reason) = reason {
            self.die(reason, now_us);
            return Verdict::Dead(reason);
        }
        let delay = retry::attempt_delay(delivery.saturating_sub(1), fraction).max(asked);
        self.due_us = now_us.saturating_add(delay.as_micros() as u64).max(1);
        Verdict::Again(self.due_us)
    }

    fn die(&mut self, reason: DeadReason, now_us: u64) {
        (self.dying, self.dying_us, self.claimed) = (Some(reason), now_us, false);
        self.due_us = now_us.saturating_add(DYING_US);
    }
}

impl Attempts {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes what an edge reports: redeliveries that it wrote, then deliveries that failed, of messages up to `head` that
    /// are not settled. Returns what follows from the failures that were taken.
    pub fn report(
        &mut self,
        settle: &Settle,
        head: u64,
        settled: &Settled,
        max_attempts: u32,
        random: &dyn Random,
    ) -> Vec<(u64, Verdict)> {
        for &(seq, delivery) in &settle.rewritten {
            self.rewritten(seq, delivery);
        }
        let mut taken = Vec::new();
        for failure in
            settle.failed.iter().filter(|failure| failure.seq <= head && !settled.holds(failure.seq))
        {
            let verdict = self.fail(failure.clone(), max_attempts, fraction(random));
            taken.extend(verdict.map(|verdict| (failure.seq, verdict)));
        }
        taken
    }

    /// Takes a failure of an unsettled message. `None`: it is stale, or was reported before. `fraction` is random in
    /// [0, 1).
    pub fn fail(&mut self, failure: Failure, max_attempts: u32, fraction: f64) -> Option<Verdict> {
        let index = match self.0.binary_search_by_key(&failure.seq, |entry| entry.seq) {
            Ok(index) => index,
            Err(_) if failure.delivery != 1 => return None,
            Err(_) if self.0.len() >= MAX_FAILED => return Some(Verdict::Full),
            Err(index) => {
                self.0.insert(index, Entry::new(failure.seq));
                index
            }
        };
        let entry = &mut self.0[index];
        if failure.delivery != entry.delivery || entry.waits() || entry.dying.is_some() {
            return None;
        }
        Some(entry.fail(failure, max_attempts, fraction))
    }

    /// Lets an unsettled message die that nothing failed of. `false` when it is dying already, or when too many messages
    /// are known of: at [`MAX_FAILED`] it stays as it is.
    pub fn kill(&mut self, seq: u64, reason: DeadReason, now_us: u64) -> bool {
        let index = match self.0.binary_search_by_key(&seq, |entry| entry.seq) {
            Ok(index) if self.0[index].dying.is_some() => return false,
            Ok(index) => index,
            Err(_) if self.0.len() >= MAX_FAILED => return false,
            Err(index) => {
                self.0.insert(index, Entry::new(seq));
                index
            }
        };
        self.0[index].die(reason, now_us);
        true
    }

    /// An edge wrote a redelivery to a socket. Whether that changed anything.
    pub fn rewritten(&mut self, seq: u64, delivery: u32) -> bool {
        let Ok(index) = self.0.binary_search_by_key(&seq, |entry| entry.seq) else { return false };
        let entry = &mut self.0[index];
        let written = entry.claimed && entry.delivery == delivery;
        if written {
            (entry.claimed, entry.due_us) = (false, 0);
        }
        written
    }

    /// Hands out up to `limit` attempts that are due at `now_us`, as (seq, delivery); they come again at `until_us`,
    /// with the same number, unless they are written, acked or fail before.
    pub fn claim(&mut self, now_us: u64, until_us: u64, limit: usize) -> Vec<(u64, u32)> {
        let due = self.0.iter_mut().filter(|entry| entry.due_us != 0 && entry.due_us <= now_us);
        let mut claimed = Vec::new();
        for entry in due {
            if entry.dying.is_some() {
                // Whoever claims finishes it; should that come to nothing, it is due again then.
                entry.due_us = until_us;
            } else if claimed.len() < limit {
                if !std::mem::replace(&mut entry.claimed, true) {
                    entry.delivery = entry.delivery.saturating_add(1);
                }
                entry.due_us = until_us;
                claimed.push((entry.seq, entry.delivery));
            }
        }
        claimed
    }

    /// Makes what was claimed, and nobody wrote yet, due at another time.
    pub fn reschedule(&mut self, due_us: u64) {
        for entry in self.0.iter_mut().filter(|entry| entry.claimed && entry.due_us != 0) {
            entry.due_us = due_us;
        }
    }

    /// Lets go of what was claimed: the user is offline, and the next reader gets it.
    pub fn park(&mut self) -> bool {
        let mut changed = false;
        for entry in self.0.iter_mut().filter(|entry| entry.claimed && entry.due_us != 0) {
            (entry.due_us, changed) = (0, true);
        }
        changed
    }

    /// When the earliest attempt is due, Unix time in microseconds.
    #[must_use]
    pub fn next_due_us(&self) -> Option<u64> {
        self.0.iter().map(|entry| entry.due_us).filter(|due| *due != 0).min()
    }

    fn entry(&self, seq: u64) -> Option<&Entry> {
        let index = self.0.binary_search_by_key(&seq, |entry| entry.seq).ok()?;
        Some(&self.0[index])
    }

    /// Number of the newest delivery of a message. `None`: it waits for its next attempt or is dying, and a reader does
    /// not get it.
    #[must_use]
    pub fn delivery(&self, seq: u64) -> Option<u32> {
        self.entry(seq).map_or(Some(1), |entry| Some(entry.delivery).filter(|_| !entry.waits()))
    }

    /// Number of the newest delivery of a message, also while it waits for its next attempt. `None`: it is dying.
    #[must_use]
    pub fn newest(&self, seq: u64) -> Option<u32> {
        self.entry(seq).map_or(Some(1), |entry| Some(entry.delivery).filter(|_| entry.dying.is_none()))
    }

    /// The messages that failed for good and are not settled yet, in ascending seq.
    pub fn dying(&self) -> impl Iterator<Item = u64> + '_ {
        self.0.iter().filter(|entry| entry.dying.is_some()).map(|entry| entry.seq)
    }

    /// Why a message is dying, and since when: Unix time in microseconds.
    #[must_use]
    pub fn death(&self, seq: u64) -> Option<(DeadReason, u64)> {
        let entry = self.entry(seq)?;
        Some((entry.dying?, entry.dying_us))
    }

    /// What failed of a message, in ascending time; the newest [`MAX_FAILURES`] of it.
    #[must_use]
    pub fn failures(&self, seq: u64) -> &[Failure] {
        self.entry(seq).map_or(&[], |entry| &entry.failures)
    }

    /// Forgets messages that are settled. Whether there were any.
    pub fn settle(&mut self, from: u64, to: u64) -> bool {
        let before = self.0.len();
        self.0.retain(|entry| entry.seq < from || entry.seq > to);
        self.0.len() != before
    }

    /// Forgets messages of which `settled` says that they are.
    pub fn settle_by(&mut self, settled: impl Fn(u64) -> bool) {
        self.0.retain(|entry| !settled(entry.seq));
    }

    /// As it is stored; empty when there are none.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let entries = self.0.iter().map(EntryRecord::from).collect();
        AttemptsRecord { entries }.encode_to_vec()
    }

    /// What [`Attempts::encode`] gave.
    ///
    /// # Errors
    /// When the bytes are something else.
    pub fn decode(bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        let record = AttemptsRecord::decode(bytes)?;
        Ok(Self(record.entries.into_iter().map(Entry::from).collect()))
    }
}

/// The failures of a dead letter, as they are stored.
#[must_use]
pub(super) fn encode_failures(failures: &[Failure]) -> Vec<u8> {
    let failures = failures.iter().map(FailureRecord::from).collect();
    FailuresRecord { failures }.encode_to_vec()
}

/// What [`encode_failures`] gave, of the message `seq`.
///
/// # Errors
/// When the bytes are something else.
pub(super) fn decode_failures(seq: u64, bytes: &[u8]) -> Result<Vec<Failure>, prost::DecodeError> {
    let record = FailuresRecord::decode(bytes)?;
    Ok(record.failures.into_iter().map(|failure| failure.failure(seq)).collect())
}

#[derive(Clone, PartialEq, prost::Message)]
struct AttemptsRecord {
    #[prost(message, repeated, tag = "1")]
    entries: Vec<EntryRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct FailuresRecord {
    #[prost(message, repeated, tag = "1")]
    failures: Vec<FailureRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct EntryRecord {
    #[prost(uint64, tag = "1")]
    seq: u64,
    #[prost(uint32, tag = "2")]
    delivery: u32,
    #[prost(uint64, tag = "3")]
    due_us: u64,
    #[prost(bool, tag = "4")]
    claimed: bool,
    #[prost(message, repeated, tag = "5")]
    failures: Vec<FailureRecord>,
    /// [`DeadReason::number`]; 0 while it is not dying.
    #[prost(int32, tag = "6")]
    dying: i32,
    #[prost(uint64, tag = "7")]
    dying_us: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct FailureRecord {
    #[prost(uint32, tag = "1")]
    delivery: u32,
    /// `sanjay.edge.v1.FailureKind`.
    #[prost(int32, tag = "2")]
    kind: i32,
    /// Of a nak.
    #[prost(uint64, tag = "3")]
    delay_us: u64,
    #[prost(uint64, tag = "4")]
    time_us: u64,
    #[prost(string, tag = "5")]
    edge: String,
    /// UUID, 16 bytes, or empty.
    #[prost(bytes = "vec", tag = "6")]
    session: Vec<u8>,
    #[prost(string, tag = "7")]
    reason: String,
}

impl From<&Entry> for EntryRecord {
    fn from(entry: &Entry) -> Self {
        let failures = entry.failures.iter().map(FailureRecord::from).collect();
        let Entry { seq, delivery, due_us, claimed, dying, dying_us, .. } = *entry;
        let dying = dying.map_or(0, DeadReason::number);
        Self { seq, delivery, due_us, claimed, failures, dying, dying_us }
    }
}

impl From<EntryRecord> for Entry {
    fn from(record: EntryRecord) -> Self {
        let EntryRecord { seq, delivery, due_us, claimed, failures, dying, dying_us } = record;
        let failures = failures.into_iter().map(|failure| failure.failure(seq)).collect();
        Self { seq, delivery, due_us, claimed, dying: DeadReason::from_number(dying), dying_us, failures }
    }
}

impl From<&Failure> for FailureRecord {
    fn from(failure: &Failure) -> Self {
        let (kind, delay) = match failure.kind {
            FailureKind::Nak(delay) => (1, delay),
            FailureKind::Deadline => (2, Duration::ZERO),
            FailureKind::Term => (3, Duration::ZERO),
        };
        Self {
            delivery: failure.delivery,
            kind,
            delay_us: delay.as_micros() as u64,
            time_us: failure.time_us,
            edge: failure.edge.clone(),
            session: failure.session.map(|session| session.as_bytes().to_vec()).unwrap_or_default(),
            reason: failure.reason.clone(),
        }
    }
}

impl FailureRecord {
    fn failure(self, seq: u64) -> Failure {
        let kind = match self.kind {
            3 => FailureKind::Term,
            2 => FailureKind::Deadline,
            _ => FailureKind::Nak(Duration::from_micros(self.delay_us)),
        };
        Failure {
            seq,
            delivery: self.delivery,
            kind,
            time_us: self.time_us,
            edge: self.edge,
            session: Uuid::from_slice(&self.session).ok(),
            reason: self.reason,
        }
    }
}

#[cfg(test)]
#[path = "attempts_tests.rs"]
mod tests;
