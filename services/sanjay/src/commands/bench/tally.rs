//! A count that many tasks raise, and that one waits for.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::{sync::Notify, time::sleep};

/// Counts up to a target that may be known late.
#[derive(Debug)]
pub(super) struct Tally {
    count: AtomicU64,
    target: AtomicU64,
    reached: Notify,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self { count: AtomicU64::new(0), target: AtomicU64::new(u64::MAX), reached: Notify::new() }
    }

    /// One more.
    pub(super) fn add(&self) {
        // Sequentially consistent with `expect`: one of the two sees the other.
        if self.count.fetch_add(1, Ordering::SeqCst) + 1 >= self.target.load(Ordering::SeqCst) {
            self.reached.notify_one();
        }
    }

    /// How many so far.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Waits until there are `target`, or none was added for `quiet`.
    pub(super) async fn expect(&self, target: u64, quiet: Duration) {
        self.target.store(target, Ordering::SeqCst);
        loop {
            let before = self.count();
            if before >= target {
                return;
            }
            tokio::select! {
                () = self.reached.notified() => {}
                () = sleep(quiet) => {
                    if self.count() == before {
                        return;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn the_target_ends_the_wait_and_so_does_silence() {
        let tally = Arc::new(Tally::new());
        let adding = Arc::clone(&tally);
        let adder = tokio::spawn(async move {
            for _ in 0..100 {
                adding.add();
                tokio::task::yield_now().await;
            }
        });
        tally.expect(100, Duration::from_secs(60)).await;
        assert_eq!(tally.count(), 100);
        adder.await.unwrap();
        tally.expect(101, Duration::from_millis(10)).await;
        assert_eq!(tally.count(), 100);
    }
}
