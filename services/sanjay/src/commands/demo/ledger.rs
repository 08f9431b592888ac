//! The books about inbox messages: each that was accepted is to be received by its user, however long the user was
//! away.

use std::{collections::BTreeMap, time::Duration};

use tokio::time::Instant;

/// How long an accepted message may take before it counts as lost; users are away for seconds only.
const OVERDUE: Duration = Duration::from_secs(60);

/// Messages that a demo waits for.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// By number: when it was accepted, and whether it was received.
    open: BTreeMap<u64, Entry>,
    pub(super) accepted: u64,
    pub(super) received: u64,
    /// Received more than once.
    pub(super) repeated: u64,
    /// Not accepted, or nobody knows.
    pub(super) failed: u64,
    /// Everything below it is done with.
    done_below: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Entry {
    accepted: Option<Instant>,
    received: bool,
}

impl Ledger {
    /// A message is being sent; numbers ascend.
    pub(super) fn begin(&mut self, n: u64) {
        self.open.insert(n, Entry::default());
        self.done_below = n + 1;
    }

    /// The server accepted it.
    pub(super) fn accept(&mut self, n: u64, now: Instant) {
        self.accepted += 1;
        if let Some(entry) = self.open.get_mut(&n) {
            entry.accepted = Some(now);
            self.close(n);
        }
    }

    /// It was refused, or it is unknown what became of it: nothing is owed.
    pub(super) fn fail(&mut self, n: u64) {
        self.failed += 1;
        self.open.remove(&n);
    }

    /// Its user has it. That can be heard before the answer to the send.
    pub(super) fn receive(&mut self, n: u64) {
        match self.open.get_mut(&n) {
            Some(entry) if !entry.received => {
                entry.received = true;
                self.received += 1;
                self.close(n);
            }
            _ if n < self.done_below => self.repeated += 1,
            _ => {}
        }
    }

    fn close(&mut self, n: u64) {
        if self.open.get(&n).is_some_and(|entry| entry.accepted.is_some() && entry.received) {
            self.open.remove(&n);
        }
    }

    /// How many were accepted and not received yet.
    pub(super) fn waiting(&self) -> u64 {
        self.open.values().filter(|entry| entry.accepted.is_some() && !entry.received).count() as u64
    }

    /// How many of them have been waited for so long that they count as lost; should one come yet, it is not any more.
    pub(super) fn lost(&self, now: Instant) -> u64 {
        let overdue = |entry: &&Entry| {
            !entry.received && entry.accepted.is_some_and(|at| now.duration_since(at) >= OVERDUE)
        };
        self.open.values().filter(overdue).count() as u64
    }

    /// Whether nothing is under way.
    pub(super) fn is_settled(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_accepted_is_waited_for_until_it_is_received() {
        let (mut ledger, now) = (Ledger::default(), Instant::now());
        (0..4).for_each(|n| ledger.begin(n));
        assert!(!ledger.is_settled());
        ledger.accept(0, now);
        ledger.receive(0);
        ledger.accept(2, now);
        ledger.fail(3);
        // Received before the answer to its send.
        ledger.receive(1);
        assert_eq!((ledger.waiting(), ledger.is_settled()), (1, false));
        ledger.accept(1, now);
        assert_eq!((ledger.waiting(), ledger.is_settled()), (1, false));
        assert_eq!((ledger.lost(now), ledger.lost(now + OVERDUE)), (0, 1));
        ledger.receive(2);
        assert_eq!((ledger.waiting(), ledger.is_settled()), (0, true));
        assert_eq!((ledger.accepted, ledger.received, ledger.failed, ledger.repeated), (3, 3, 1, 0));
        ledger.receive(2);
        assert_eq!((ledger.received, ledger.repeated), (3, 1));
        assert!(ledger.open.is_empty());
    }
}
