//! Where one connection stands in its user's inbox: what was pushed, what may be pushed now, what to read.
//!
//! Pure: each call takes what happened and appends what to do. Correctness comes from the log that delivery
//! keeps; a relayed hint only saves the read. The relay may drop, repeat or reorder hints.

use std::time::Duration;

use sanjay_proto::{client::v1::InboxMessage, edge::v1::InboxPage};

use crate::{
    in_flight::{InFlight, Written},
    shard::wheel::Tick,
};

/// How long a hint that skips a seq waits for the one before it, before the log is read.
const REORDER_WAIT: Duration = Duration::from_millis(20);

/// A failed read is tried again after this and a random part of [`RETRY_SPREAD`], so that the connections of
/// an edge do not come at once when delivery is back.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_SPREAD: Duration = Duration::from_secs(4);

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Push this message to the client.
    Push(InboxMessage),
    /// Read the inbox above `after` (`None`: from its mark), at most `limit` messages.
    Read {
        /// Where to begin.
        after: Option<u64>,
        /// How many messages the client's credit allows.
        limit: u32,
    },
    /// Call [`Cursor::on_timer`] after this.
    Arm(Duration),
    /// The inbox is known now, or is another one than before.
    Known(Position),
}

/// Why a command about one delivery changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stale {
    /// The message was not sent on this connection.
    NotSent,
    /// It is not in flight: it was acked, is settled, or failed and was not sent again here yet.
    NotInFlight,
    /// It is not in flight: the newest delivery that was sent on this connection, which is this one, failed already.
    Failed(u32),
    /// Another delivery of it is in flight.
    Other(u32),
}

/// Where an inbox stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Names the sequence.
    pub epoch: u64,
    /// Everything up to it is settled.
    pub mark: u64,
    /// The newest seq.
    pub head: u64,
}

/// The state of one connection's inbox.
#[derive(Debug)]
pub struct Cursor {
    /// Of no meaning until the first page.
    epoch: u64,
    /// Everything up to it was pushed here, is settled, or waits for its next attempt.
    last: u64,
    /// The newest seq that is said to exist.
    want: u64,
    /// What `want` was when the read under way began: its page tells whether that is so.
    asked: u64,
    /// A message whose next delivery found no room; 0 when none did.
    owed: u64,
    /// The newest seqs that were acked one behind the other: from, to. A hint of another delivery of these is late.
    acked: (u64, u64),
    /// Nothing while all that was pushed is acked, and nothing of it was sent more than once or failed.
    in_flight: Option<Box<InFlight>>,
    /// How many messages may be unacked.
    credit: u32,
    /// Whether a page has come.
    known: bool,
    reading: bool,
    /// Something was lost while a read was under way: read once more.
    stale: bool,
    armed: bool,
}

impl Cursor {
    /// A cursor that may have `credit` messages in flight (at least 1).
    #[must_use]
    pub fn new(credit: u32) -> Self {
        Self {
            epoch: 0,
            last: 0,
            want: 0,
            asked: 0,
            owed: 0,
            acked: (0, 0),
            in_flight: None,
            credit,
            known: false,
            reading: false,
            stale: false,
            armed: false,
        }
    }

    /// The inbox's epoch, once it is known.
    #[must_use]
    pub fn epoch(&self) -> Option<u64> {
        self.known.then_some(self.epoch)
    }

    /// Everything up to it was pushed on this connection, is settled, or waits for its next attempt.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Whether something that was pushed is not acked.
    #[must_use]
    pub fn has_in_flight(&self) -> bool {
        self.in_flight.as_ref().is_some_and(|in_flight| in_flight.count() > 0)
    }

    /// When the first answer to what is in flight is due.
    #[must_use]
    pub fn next_due(&self) -> Option<Tick> {
        self.in_flight.as_ref()?.next_due()
    }

    /// The `count` messages that were pushed first, and not handed to the socket yet, have been handed to it.
    pub fn on_handed(&mut self, count: u64, written: Written) {
        if let Some(in_flight) = &mut self.in_flight {
            in_flight.handed(count, written);
        }
    }

    /// The socket has taken bytes that waited; the answer to what it has taken with them may take until `until`.
    /// Whether there was anything.
    pub fn on_taken(&mut self, bytes: u32, until: Tick) -> bool {
        self.in_flight.as_mut().is_some_and(|in_flight| in_flight.taken(bytes, until))
    }

    /// The redeliveries that the socket has taken since the last call, as (seq, delivery).
    pub fn rewritten(&mut self) -> Vec<(u64, u32)> {
        self.in_flight.as_mut().map(|in_flight| in_flight.rewritten()).unwrap_or_default()
    }

    /// Reads what may have been missed: at the start, and whenever hints may have been lost.
    pub fn resync(&mut self, steps: &mut Vec<Step>) {
        if self.reading {
            self.stale = true;
        } else if !self.known {
            self.read(None, steps);
        } else {
            // Without room the head alone is read, so that `want` is right when credit comes back.
            self.read(Some(self.last), steps);
        }
    }

    /// A page arrived.
    pub fn on_page(&mut self, page: InboxPage, steps: &mut Vec<Step>) {
        self.reading = false;
        let position = Position { epoch: page.epoch, mark: page.mark, head: page.head };
        if self.known && self.epoch != page.epoch {
            // Another inbox: nothing that was counted here holds for it.
            *self = Cursor { epoch: page.epoch, known: true, last: page.mark, ..Cursor::new(self.credit) };
            self.want = page.head;
            steps.push(Step::Known(position));
            return self.read_on(1, steps);
        }
        if !self.known {
            (self.epoch, self.known, self.last) = (page.epoch, true, page.mark);
            steps.push(Step::Known(position));
        }
        let before = self.last;
        for message in page.messages {
            if message.seq > self.last {
                self.begins(message.seq, message.delivery);
            } else if !self.begins_again(message.seq, message.delivery) {
                continue;
            }
            steps.push(Step::Push(message));
        }
        self.last = self.last.max(page.covers);
        // A hint that came during the read may tell of more than the page; an older one cannot.
        self.want = if self.want <= self.asked { page.head } else { self.want.max(page.head) };
        if std::mem::take(&mut self.stale) {
            return self.read(Some(self.last), steps);
        }
        if self.last == before && page.covers < page.head && self.room() > 0 {
            // No progress although there is room: the answer that the page came in was full.
            return self.arm(REORDER_WAIT, steps);
        }
        self.read_on(1, steps);
    }

    /// A read failed. `fraction` is random in [0, 1).
    pub fn on_read_failed(&mut self, fraction: f64, steps: &mut Vec<Step>) {
        self.reading = false;
        self.stale = true;
        self.arm(RETRY_AFTER + RETRY_SPREAD.mul_f64(fraction), steps);
    }

    /// A message was committed to the inbox with this epoch, or the next attempt of one is due.
    pub fn on_hint(&mut self, epoch: u64, message: InboxMessage, steps: &mut Vec<Step>) {
        let seq = message.seq;
        if !self.known {
            // The first page may have been taken before this message was committed.
            return self.want = self.want.max(seq);
        }
        if self.epoch != epoch {
            return self.resync(steps);
        }
        if seq <= self.last {
            if self.begins_again(seq, message.delivery) {
                steps.push(Step::Push(message));
            }
        } else if seq == self.last + 1 && !self.reading && self.room() > 0 {
            self.begins(seq, message.delivery);
            steps.push(Step::Push(message));
        } else {
            self.want = self.want.max(seq);
            if !self.reading && self.room() > 0 {
                self.arm(REORDER_WAIT, steps);
            }
        }
    }

    /// Whether this delivery of a message up to `last` is to be pushed: one that this connection did not have.
    fn begins_again(&mut self, seq: u64, delivery: u32) -> bool {
        let (from, to) = self.acked;
        if delivery <= 1 || (from <= seq && seq <= to) {
            return false;
        }
        let here = self.in_flight.as_deref();
        if here.is_some_and(|here| here.was_acked(seq)) {
            return false;
        }
        let in_flight = here.and_then(|here| here.delivery(seq));
        let newest = in_flight.or_else(|| here.and_then(|here| here.failed(seq)));
        if newest.is_some_and(|newest| newest >= delivery) {
            return false;
        }
        // A page that is on its way will take the room that was free when it was asked for.
        let has_room = in_flight.is_some() || (!self.reading && self.room() > 0);
        if has_room {
            self.in_flight.get_or_insert_default().push(seq, delivery);
        } else if self.owed == 0 || seq < self.owed {
            self.owed = seq;
        }
        has_room
    }

    /// The client acked `ranges`. Returns what of it was pushed, which is what delivery may settle.
    pub fn on_ack(&mut self, ranges: &[(u64, u64)], steps: &mut Vec<Step>) -> Vec<(u64, u64)> {
        let mut pushed = Vec::with_capacity(ranges.len());
        for &(from, to) in ranges {
            let to = to.min(self.last);
            if from <= to {
                if let Some(in_flight) = &mut self.in_flight {
                    in_flight.ack(from, to);
                }
                self.note_acked(from, to);
                pushed.push((from, to));
            }
        }
        self.freed(steps);
        pushed
    }

    /// These messages were settled elsewhere. Returns what of them was in flight, ascending, which needs no answer any
    /// more.
    pub fn on_settled(
        &mut self,
        epoch: u64,
        ranges: &[(u64, u64)],
        steps: &mut Vec<Step>,
    ) -> Vec<(u64, u64)> {
        if self.epoch() != Some(epoch) {
            return Vec::new();
        }
        let Some(in_flight) = &mut self.in_flight else { return Vec::new() };
        let mut told: Vec<(u64, u64)> = Vec::new();
        for &(from, to) in ranges {
            in_flight.held(from, to, &mut told);
            // Another delivery of one that failed here may be on its way, and is late.
            in_flight.ack(from, to);
        }
        self.freed(steps);
        told
    }

    /// The client gave this delivery back: another follows later, or none.
    ///
    /// # Errors
    /// When it is not in flight; then nothing changes.
    pub fn on_failed(&mut self, seq: u64, delivery: u32, steps: &mut Vec<Step>) -> Result<(), Stale> {
        self.find(seq, delivery)?.fail(seq, delivery);
        self.freed(steps);
        Ok(())
    }

    /// The client works on this delivery: its answer may take until `until`.
    ///
    /// # Errors
    /// When it is not in flight; then nothing changes.
    pub fn on_working(&mut self, seq: u64, delivery: u32, until: Tick) -> Result<(), Stale> {
        self.find(seq, delivery)?.extend(seq, until);
        Ok(())
    }

    /// The client was alive at `now`: what it should have answered by then has failed. Returns that as
    /// (seq, delivery).
    pub fn on_overdue(&mut self, now: Tick, steps: &mut Vec<Step>) -> Vec<(u64, u32)> {
        let Some(in_flight) = &mut self.in_flight else { return Vec::new() };
        let overdue = in_flight.overdue(now);
        if overdue.is_empty() {
            return overdue;
        }
        overdue.iter().for_each(|&(seq, delivery)| in_flight.fail(seq, delivery));
        self.freed(steps);
        overdue
    }

    /// Where this delivery is in flight.
    fn find(&mut self, seq: u64, delivery: u32) -> Result<&mut InFlight, Stale> {
        if seq > self.last {
            return Err(Stale::NotSent);
        }
        let here = self.in_flight.as_deref_mut().ok_or(Stale::NotInFlight)?;
        match here.delivery(seq) {
            Some(newest) if newest == delivery => Ok(here),
            Some(newest) => Err(Stale::Other(newest)),
            None => Err(here.failed(seq).map_or(Stale::NotInFlight, Stale::Failed)),
        }
    }

    fn note_acked(&mut self, from: u64, to: u64) {
        let (first, last) = self.acked;
        if from <= last + 1 && to + 1 >= first {
            self.acked = (first.min(from), last.max(to));
        } else if from > last {
            self.acked = (from, to);
        }
    }

    /// There is room again.
    fn freed(&mut self, steps: &mut Vec<Step>) {
        if self.in_flight.as_ref().is_some_and(|in_flight| in_flight.is_empty()) {
            self.in_flight = None;
        }
        // Half of the credit at a time, so that a busy inbox is not read message by message. What a client leaves
        // free while it holds on to the rest is used after a moment.
        self.read_on((self.credit / 2).max(1), steps);
        if !self.reading && self.want > self.last && self.room() > 0 {
            self.arm(REORDER_WAIT, steps);
        }
    }

    /// The client changed its credit.
    pub fn on_credit(&mut self, credit: u32, steps: &mut Vec<Step>) {
        self.credit = credit;
        self.read_on(1, steps);
    }

    /// The time that [`Step::Arm`] asked for has passed.
    pub fn on_timer(&mut self, steps: &mut Vec<Step>) {
        self.armed = false;
        if std::mem::take(&mut self.stale) { self.resync(steps) } else { self.read_on(1, steps) }
    }

    /// A message above `last` is pushed.
    fn begins(&mut self, seq: u64, delivery: u32) {
        self.last = seq;
        self.want = self.want.max(seq);
        self.in_flight.get_or_insert_default().push(seq, delivery.max(1));
    }

    fn room(&self) -> u32 {
        let in_flight = self.in_flight.as_ref().map_or(0, |in_flight| in_flight.count());
        self.credit.saturating_sub(u32::try_from(in_flight).unwrap_or(u32::MAX))
    }

    /// Reads on when there is more and room for at least `least` messages. What is owed comes first, and needs room for
    /// itself alone: in a busy inbox there might never be more.
    fn read_on(&mut self, least: u32, steps: &mut Vec<Step>) {
        if !self.known || self.reading {
            return;
        }
        if self.owed > 0 && self.room() > 0 {
            let after = std::mem::take(&mut self.owed) - 1;
            self.read(Some(after), steps);
        } else if self.want > self.last && self.room() >= least {
            self.read(Some(self.last), steps);
        }
    }

    fn read(&mut self, after: Option<u64>, steps: &mut Vec<Step>) {
        self.reading = true;
        self.asked = self.want;
        steps.push(Step::Read { after, limit: self.room() });
    }

    fn arm(&mut self, after: Duration, steps: &mut Vec<Step>) {
        if !std::mem::replace(&mut self.armed, true) {
            steps.push(Step::Arm(after));
        }
    }
}

#[cfg(test)]
#[path = "inbox_tests.rs"]
mod tests;
