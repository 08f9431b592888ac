//! What one connection was sent of its user's inbox and has not answered: which delivery, and until when an answer may
//! take.
//!
//! Pure. Deliveries that were made together are one entry, so that a busy inbox takes a few of them.

use smallvec::SmallVec;

use crate::shard::wheel::Tick;

/// Most failed messages of a connection that are remembered; a connection has no more than that in flight. Of one that
/// is forgotten, a hint that comes twice is delivered twice.
const MAX_FAILED: usize = 256;

/// Whether a delivery has reached the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It was not handed to the socket yet.
    Not,
    /// The socket has taken it when it takes so many more bytes.
    After(u32),
    /// The socket has taken its last byte: the answer may take until then.
    Until(Tick),
}

/// Deliveries that were made one after the other: of consecutive seqs, with the same number, and written together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    from: u64,
    to: u64,
    delivery: u32,
    written: Written,
    /// Whether delivery was told that it was written, which matters of a redelivery.
    reported: bool,
}

impl Run {
    fn holds(&self, seq: u64) -> bool {
        self.from <= seq && seq <= self.to
    }

    fn count(&self) -> u64 {
        self.to - self.from + 1
    }

    fn continues(&self, before: &Run) -> bool {
        let Run { to, delivery, written, reported, .. } = *before;
        self.from == to + 1 && (self.delivery, self.written, self.reported) == (delivery, written, reported)
    }
}

/// The deliveries of one connection.
#[derive(Debug, Default)]
pub struct InFlight {
    /// In the order in which they were made.
    runs: SmallVec<[Run; 2]>,
    /// Messages that failed here, with the newest delivery, the latest last.
    failed: Vec<(u64, u32)>,
    /// Messages that were acked after they had been sent more than once, or had failed, the latest last: further
    /// deliveries of them are late.
    acked: Vec<u64>,
}

impl InFlight {
    /// Whether there is nothing to remember.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.failed.is_empty() && self.acked.is_empty()
    }

    /// How many messages are in flight.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.runs.iter().map(Run::count).sum()
    }

    /// Which delivery of a message is in flight.
    #[must_use]
    pub fn delivery(&self, seq: u64) -> Option<u32> {
        self.runs.iter().find(|run| run.holds(seq)).map(|run| run.delivery)
    }

    /// Which delivery of a message was the last that failed here.
    #[must_use]
    pub fn failed(&self, seq: u64) -> Option<u32> {
        self.failed.iter().find(|(failed, _)| *failed == seq).map(|(_, delivery)| *delivery)
    }

    /// Whether a message is acked, as far as that is remembered.
    #[must_use]
    pub fn was_acked(&self, seq: u64) -> bool {
        self.acked.contains(&seq)
    }

    /// A delivery begins; the one before of the same message is over.
    pub fn push(&mut self, seq: u64, delivery: u32) {
        if delivery > 1 {
            self.settle(seq, seq);
        }
        if let Some(last) = self.runs.last_mut()
            && (last.to + 1, last.delivery) == (seq, delivery)
            && matches!(last.written, Written::Not)
        {
            last.to = seq;
            return;
        }
        let written = Written::Not;
        self.runs.push(Run { from: seq, to: seq, delivery, written, reported: delivery == 1 });
    }

    /// The `count` deliveries that were made first and not handed to the socket yet have been handed to it.
    pub fn handed(&mut self, mut count: u64, written: Written) {
        // What waits is at the end: each turn hands over everything that it has pushed. Mostly that is one run.
        if let [before @ .., last] = &mut self.runs[..]
            && matches!(last.written, Written::Not)
            && last.count() == count
            && before.last().is_none_or(|before| !matches!(before.written, Written::Not))
        {
            last.written = written;
            if let Some(before) = before.last_mut()
                && last.continues(before)
            {
                before.to = last.to;
                self.runs.pop();
            }
            return;
        }
        let Some(mut at) = self.runs.iter().position(|run| run.written == Written::Not) else { return };
        while count > 0 && at < self.runs.len() {
            if self.runs[at].count() > count {
                self.split(at, self.runs[at].from + count);
            }
            let run = &mut self.runs[at];
            run.written = written;
            count -= run.count();
            at += 1;
            self.join(at - 1, &mut at);
        }
    }

    /// The socket has taken so many bytes; the answer to what it has taken with them may take until `until`. Whether
    /// there was anything.
    pub fn taken(&mut self, bytes: u32, until: Tick) -> bool {
        let mut any = false;
        for run in &mut self.runs {
            if let Written::After(left) = run.written {
                let taken = left <= bytes;
                run.written = if taken { Written::Until(until) } else { Written::After(left - bytes) };
                any |= taken;
            }
        }
        any
    }

    /// When the first answer is due.
    #[must_use]
    pub fn next_due(&self) -> Option<Tick> {
        self.runs.iter().filter_map(due).min()
    }

    /// The answer to a delivery that is in flight, and that the socket has taken, may take until `until`.
    pub fn extend(&mut self, seq: u64, until: Tick) {
        let Some(mut at) = self.runs.iter().position(|run| run.holds(seq)) else { return };
        if due(&self.runs[at]).is_none() {
            return;
        }
        if self.runs[at].from < seq {
            self.split(at, seq);
            at += 1;
        }
        if self.runs[at].to > seq {
            self.split(at, seq + 1);
        }
        self.runs[at].written = Written::Until(until);
    }

    /// Appends what of `from..=to` is in flight to ranges that lie below it.
    pub fn held(&self, from: u64, to: u64, held: &mut Vec<(u64, u64)>) {
        let mut runs: SmallVec<[(u64, u64); 2]> = self
            .runs
            .iter()
            .map(|run| (run.from.max(from), run.to.min(to)))
            .filter(|(from, to)| from <= to)
            .collect();
        runs.sort_unstable();
        for (from, to) in runs {
            match held.last_mut() {
                Some(last) if last.1 + 1 == from => last.1 = to,
                _ => held.push((from, to)),
            }
        }
    }

    /// The client acked these messages: they are in flight no more. The next delivery of one that had failed may be on its
    /// way.
    pub fn ack(&mut self, from: u64, to: u64) {
        if !self.failed.is_empty() || self.runs.iter().any(|run| run.delivery > 1) {
            let again = self.runs.iter().filter(|run| run.delivery > 1);
            let again = again.flat_map(|run| run.from.max(from)..=run.to.min(to));
            let failed = self.failed.iter().map(|(seq, _)| *seq).filter(|seq| (from..=to).contains(seq));
            let late: Vec<u64> = again.chain(failed).collect();
            self.acked.extend(late);
            let beyond = self.acked.len().saturating_sub(MAX_FAILED);
            self.acked.drain(..beyond);
        }
        self.settle(from, to);
    }

    /// These messages are in flight no more, and nothing of them is remembered.
    fn settle(&mut self, from: u64, to: u64) {
        self.remove(from, to);
        if !self.failed.is_empty() {
            self.failed.retain(|(seq, _)| *seq < from || *seq > to);
        }
    }

    /// A delivery in flight has failed.
    pub fn fail(&mut self, seq: u64, delivery: u32) {
        self.settle(seq, seq);
        if self.failed.len() >= MAX_FAILED {
            self.failed.remove(0);
        }
        self.failed.push((seq, delivery));
    }

    /// The deliveries whose answer was due at `now`, as (seq, delivery).
    #[must_use]
    pub fn overdue(&self, now: Tick) -> Vec<(u64, u32)> {
        let overdue = self.runs.iter().filter(|run| due(run).is_some_and(|due| due <= now));
        overdue.flat_map(|run| (run.from..=run.to).map(|seq| (seq, run.delivery))).collect()
    }

    /// The redeliveries that the socket has taken since the last call, as (seq, delivery).
    pub fn rewritten(&mut self) -> Vec<(u64, u32)> {
        let mut rewritten = Vec::new();
        for run in self.runs.iter_mut().filter(|run| !run.reported && due(run).is_some()) {
            run.reported = true;
            rewritten.extend((run.from..=run.to).map(|seq| (seq, run.delivery)));
        }
        rewritten
    }

    fn remove(&mut self, first: u64, last: u64) {
        let mut at = 0;
        while at < self.runs.len() {
            let run = self.runs[at];
            let (before, behind) = (run.from < first, run.to > last);
            if run.to < first || run.from > last {
                at += 1;
            } else if before && behind {
                self.split(at, first);
                at += 1;
            } else if before {
                self.runs[at].to = first - 1;
                at += 1;
            } else if behind {
                self.runs[at].from = last + 1;
                at += 1;
            } else {
                self.runs.remove(at);
            }
        }
    }

    /// Makes two of a run: the second begins with `seq`.
    fn split(&mut self, at: usize, seq: u64) {
        let run = self.runs[at];
        self.runs[at].to = seq - 1;
        self.runs.insert(at + 1, Run { from: seq, ..run });
    }

    /// Makes a run part of the one before it, when they belong together; `next` moves with what follows.
    fn join(&mut self, at: usize, next: &mut usize) {
        if at > 0 && self.runs[at].continues(&self.runs[at - 1]) {
            self.runs[at - 1].to = self.runs[at].to;
            self.runs.remove(at);
            *next -= 1;
        }
    }
}

fn due(run: &Run) -> Option<Tick> {
    match run.written {
        Written::Until(due) => Some(due),
        Written::Not | Written::After(_) => None,
    }
}

#[cfg(test)]
#[path = "in_flight_tests.rs"]
mod tests;
