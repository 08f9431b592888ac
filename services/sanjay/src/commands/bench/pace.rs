//! The schedule of an open loop: when each operation is due, whatever became of the ones before it.
//!
//! A thread of its own tells the time, because a runtime's timers are a millisecond wide and run late when the
//! runtime is busy, which is when it matters.

use std::{
    thread::{self, Thread},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::sync::watch;

/// Highest rate that can be asked for, per second.
pub(super) const MAX_RATE: f64 = 1_000_000.0;

/// Most operations of a schedule: what is remembered of each of them stays within a few hundred megabytes.
pub(super) const MAX_OPERATIONS: u64 = 10_000_000;

/// The thread wakes up no more often than this, and hands out what became due in between together.
const STEP: Duration = Duration::from_micros(100);

/// Operation `n` of `total` is due `n / rate` seconds after the start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Schedule {
    start: Instant,
    rate: f64,
    total: u64,
}

impl Schedule {
    /// As many operations as fit `length` at `rate` per second.
    ///
    /// # Errors
    /// When they are more than [`MAX_OPERATIONS`], or none.
    pub(super) fn new(start: Instant, rate: f64, length: Duration) -> anyhow::Result<Self> {
        let total = operations(rate, length);
        anyhow::ensure!(total > 0, "{rate} per second for {length:?} is not even one; give more --duration");
        anyhow::ensure!(
            total <= MAX_OPERATIONS,
            "{rate} per second for {length:?} would be {total}, and at most {MAX_OPERATIONS} are allowed; give less \
             --rate or --duration"
        );
        Ok(Self { start, rate, total })
    }

    /// `total` operations at `rate` per second.
    pub(super) fn of(start: Instant, rate: f64, total: u64) -> Self {
        Self { start, rate, total }
    }

    /// When the first operation is due.
    pub(super) fn start(&self) -> Instant {
        self.start
    }

    /// How many operations there are.
    pub(super) fn total(&self) -> u64 {
        self.total
    }

    /// When operation `n` is due.
    pub(super) fn at(&self, n: u64) -> Instant {
        self.start + Duration::from_secs_f64(n as f64 / self.rate)
    }

    /// How many operations are due at `now`.
    fn due(&self, now: Instant) -> u64 {
        let Some(elapsed) = now.checked_duration_since(self.start) else { return 0 };
        let due = (elapsed.as_secs_f64() * self.rate) as u64 + 1;
        due.min(self.total)
    }
}

/// How many operations `length` holds at `rate` per second.
pub(super) fn operations(rate: f64, length: Duration) -> u64 {
    (rate * length.as_secs_f64()).round() as u64
}

/// Tells when operations become due.
#[derive(Debug)]
pub(super) struct Pacer {
    due: watch::Receiver<u64>,
    thread: Thread,
}

impl Pacer {
    /// Starts to tell.
    ///
    /// # Errors
    /// When the system has no room for another thread.
    pub(super) fn start(schedule: Schedule) -> anyhow::Result<Self> {
        let (sender, due) = watch::channel(0);
        let tell = move || {
            while !sender.is_closed() {
                let now = Instant::now();
                let due = schedule.due(now);
                if due > *sender.borrow() {
                    sender.send_replace(due);
                }
                if due == schedule.total {
                    return;
                }
                let next = schedule.at(due).saturating_duration_since(now).max(STEP);
                thread::park_timeout(next);
            }
        };
        let thread = thread::Builder::new().name("bench-pace".to_owned()).spawn(tell);
        let thread = thread.context("cannot start a thread for the schedule")?.thread().clone();
        Ok(Self { due, thread })
    }

    /// Waits until more than `taken` operations are due; gives how many are. `None` when `taken` are all.
    pub(super) async fn beyond(&mut self, taken: u64) -> Option<u64> {
        // The thread ends with its last word, which stays readable.
        let known = self.due.wait_for(|due| *due > taken).await.map(|due| *due);
        known.ok().or_else(|| Some(*self.due.borrow()).filter(|due| *due > taken))
    }

    /// How many operations are due now.
    pub(super) fn due(&self) -> u64 {
        *self.due.borrow()
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        // Closed first, so that the thread sees it when it wakes up.
        self.due = watch::channel(0).1;
        self.thread.unpark();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schedule_holds_its_rate() {
        let start = Instant::now();
        let schedule = Schedule::new(start, 250.0, Duration::from_secs(2)).unwrap();
        assert_eq!(schedule.total(), 500);
        assert_eq!(schedule.at(25), start + Duration::from_millis(100));
        assert_eq!(schedule.due(start), 1);
        assert_eq!(schedule.due(start + Duration::from_millis(101)), 26);
        assert_eq!(schedule.due(start + Duration::from_secs(60)), 500);
        assert!(Schedule::new(start, 0.1, Duration::from_secs(1)).is_err());
        let many = Schedule::new(start, MAX_RATE, Duration::from_secs(60)).unwrap_err().to_string();
        assert!(many.contains("60000000") && many.contains("--rate"), "{many}");
    }

    #[tokio::test]
    async fn a_pacer_hands_out_all_of_them_and_none_early() {
        let schedule = Schedule::new(Instant::now(), 2_000.0, Duration::from_millis(100)).unwrap();
        let mut pacer = Pacer::start(schedule).unwrap();
        let mut taken = 0;
        while let Some(due) = pacer.beyond(taken).await {
            assert!(due > taken);
            assert!(Instant::now() >= schedule.at(due - 1));
            taken = due;
        }
        assert_eq!(taken, 200);
    }
}
