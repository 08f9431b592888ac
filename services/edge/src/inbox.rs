//! Where one connection stands in its user's inbox: what was pushed, what may be pushed now, what to read.
//!
//! Pure: each call takes what happened and appends what to do. Correctness comes from the log that delivery
//! keeps; a relayed hint only saves the read. The relay may drop, repeat or reorder hints.

use std::time::Duration;

use sanjay_proto::{client::v1::InboxMessage, edge::v1::InboxPage};
use smallvec::SmallVec;

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
    /// `None` until the first page.
    epoch: Option<u64>,
    /// Everything up to it was pushed here or is settled.
    last: u64,
    /// The newest seq that is said to exist.
    want: u64,
    /// What `want` was when the read under way began: its page tells whether that is so.
    asked: u64,
    /// How many messages may be unacked.
    credit: u32,
    /// Pushed and not acked, in ascending order.
    in_flight: Ranges,
    reading: bool,
    /// Something was lost while a read was under way: read once more.
    stale: bool,
    armed: bool,
}

impl Cursor {
    /// A cursor that may have `credit` messages in flight (at least 1).
    #[must_use]
    pub fn new(credit: u32) -> Self {
        let in_flight = Ranges::default();
        Self {
            epoch: None,
            last: 0,
            want: 0,
            asked: 0,
            credit,
            in_flight,
            reading: false,
            stale: false,
            armed: false,
        }
    }

    /// The inbox's epoch, once it is known.
    #[must_use]
    pub fn epoch(&self) -> Option<u64> {
        self.epoch
    }

    /// Everything up to it was pushed on this connection or is settled.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Whether something that was pushed is not acked.
    #[must_use]
    pub fn has_in_flight(&self) -> bool {
        !self.in_flight.is_empty()
    }

    /// Reads what may have been missed: at the start, and whenever hints may have been lost.
    pub fn resync(&mut self, steps: &mut Vec<Step>) {
        if self.reading {
            self.stale = true;
        } else if self.epoch.is_none() {
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
        match self.epoch {
            Some(epoch) if epoch != page.epoch => {
                // Another inbox: nothing that was counted here holds for it.
                *self = Cursor { epoch: Some(page.epoch), last: page.mark, ..Cursor::new(self.credit) };
                self.want = page.head;
                steps.push(Step::Known(position));
                return self.read_on(1, steps);
            }
            Some(_) => {}
            None => {
                self.epoch = Some(page.epoch);
                self.last = page.mark;
                steps.push(Step::Known(position));
            }
        }
        let before = self.last;
        for message in page.messages {
            if message.seq > self.last {
                self.push(message, steps);
            }
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

    /// A message was committed to the inbox with this epoch.
    pub fn on_hint(&mut self, epoch: u64, message: InboxMessage, steps: &mut Vec<Step>) {
        let seq = message.seq;
        match self.epoch {
            Some(known) if known == epoch => {}
            Some(_) => return self.resync(steps),
            // The first page may have been taken before this message was committed.
            None => return self.want = self.want.max(seq),
        }
        if seq <= self.last {
            if message.delivery > 1 && self.in_flight.contains(seq) {
                steps.push(Step::Push(message));
            }
        } else if seq == self.last + 1 && !self.reading && self.room() > 0 {
            self.push(message, steps);
        } else {
            self.want = self.want.max(seq);
            if !self.reading && self.room() > 0 {
                self.arm(REORDER_WAIT, steps);
            }
        }
    }

    /// The client acked `ranges`. Returns what of it was pushed, which is what delivery may settle.
    pub fn on_ack(&mut self, ranges: &[(u64, u64)], steps: &mut Vec<Step>) -> Vec<(u64, u64)> {
        let mut pushed = Vec::with_capacity(ranges.len());
        for &(from, to) in ranges {
            let to = to.min(self.last);
            if from <= to {
                self.in_flight.remove(from, to);
                pushed.push((from, to));
            }
        }
        // Half of the credit at a time, so that a busy inbox is not read message by message. What a client leaves
        // free while it holds on to the rest is used after a moment.
        self.read_on((self.credit / 2).max(1), steps);
        if !self.reading && self.want > self.last && self.room() > 0 {
            self.arm(REORDER_WAIT, steps);
        }
        pushed
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

    fn push(&mut self, message: InboxMessage, steps: &mut Vec<Step>) {
        self.last = message.seq;
        self.want = self.want.max(message.seq);
        self.in_flight.push(message.seq);
        steps.push(Step::Push(message));
    }

    fn room(&self) -> u32 {
        self.credit.saturating_sub(u32::try_from(self.in_flight.count()).unwrap_or(u32::MAX))
    }

    /// Reads on when there is more and room for at least `least` messages.
    fn read_on(&mut self, least: u32, steps: &mut Vec<Step>) {
        if self.epoch.is_some() && !self.reading && self.want > self.last && self.room() >= least {
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

/// A set of seqs as ascending, disjoint, inclusive ranges. Messages are acked nearly in order, so it stays short.
#[derive(Debug, Default)]
struct Ranges(SmallVec<[(u64, u64); 1]>);

impl Ranges {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn count(&self) -> u64 {
        self.0.iter().map(|(from, to)| to - from + 1).sum()
    }

    fn contains(&self, seq: u64) -> bool {
        self.0.iter().any(|&(from, to)| from <= seq && seq <= to)
    }

    /// Adds a seq above all others.
    fn push(&mut self, seq: u64) {
        match self.0.last_mut() {
            Some((_, to)) if *to + 1 == seq => *to = seq,
            _ => self.0.push((seq, seq)),
        }
    }

    fn remove(&mut self, first: u64, last: u64) {
        let mut kept = SmallVec::new();
        for &(from, to) in &self.0 {
            if from < first {
                kept.push((from, to.min(first - 1)));
            }
            if to > last {
                kept.push((from.max(last + 1), to));
            }
        }
        self.0 = kept;
    }
}

#[cfg(test)]
#[path = "inbox_tests.rs"]
mod tests;
