//! The sweep over a store that only counts what is left to remove.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures::{FutureExt, future::BoxFuture};
use sanjay_runtime::clock::{ManualClock, SharedClock};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::*;
use crate::store::{
    Acked, AppendError, Appended, AuditPage, DeadFilter, DeadLetter, DeadPage, DeadPosition, DueInbox,
    InboxQuery, NewMessage, Page, Rearm, Receipt, Settle, Stats, StoreError,
};

#[derive(Default)]
struct Expired {
    left: AtomicUsize,
    steps: AtomicUsize,
    busy: AtomicBool,
}

impl InboxStore for Expired {
    fn sweep(&self, _: u64, limit: usize) -> BoxFuture<'static, Result<usize, StoreError>> {
        self.steps.fetch_add(1, Ordering::Relaxed);
        let result = if self.busy.load(Ordering::Relaxed) {
            Err(StoreError::Busy)
        } else {
            let removed = self.left.load(Ordering::Relaxed).min(limit);
            self.left.fetch_sub(removed, Ordering::Relaxed);
            Ok(removed)
        };
        async move { result }.boxed()
    }

    fn append(&self, _: Vec<NewMessage>) -> BoxFuture<'static, Vec<Result<Appended, AppendError>>> {
        unreachable!("the sweep sends nothing")
    }

    fn read(&self, _: Vec<InboxQuery>) -> BoxFuture<'static, Vec<Result<Page, StoreError>>> {
        unreachable!("the sweep reads nothing")
    }

    fn ack(&self, _: Vec<Settle>) -> BoxFuture<'static, Vec<Result<Acked, StoreError>>> {
        unreachable!("the sweep settles nothing")
    }

    fn lookup(&self, _: String, _: Uuid) -> BoxFuture<'static, Result<Option<Receipt>, StoreError>> {
        unreachable!("the sweep looks nothing up")
    }

    fn arm(&self, _: Vec<String>) {}

    fn claim_due(&self, _: u64, _: u64, _: usize) -> BoxFuture<'static, Result<Vec<DueInbox>, StoreError>> {
        unreachable!("the sweep claims nothing")
    }

    fn rearm(&self, _: Vec<Rearm>) -> BoxFuture<'static, Result<(), StoreError>> {
        unreachable!("the sweep claims nothing")
    }

    fn dead_letters(
        &self,
        _: DeadFilter,
        _: Option<DeadPosition>,
        _: usize,
    ) -> BoxFuture<'static, Result<DeadPage, StoreError>> {
        unreachable!("the sweep lists nothing")
    }

    fn dead_letter(&self, _: String, _: Uuid) -> BoxFuture<'static, Result<Option<DeadLetter>, StoreError>> {
        unreachable!("the sweep looks nothing up")
    }

    fn redriven(&self, _: String, _: Uuid, _: Uuid) -> BoxFuture<'static, Result<bool, StoreError>> {
        unreachable!("the sweep sends nothing")
    }

    fn purge(&self, _: Vec<(String, Uuid)>) -> BoxFuture<'static, Result<u64, StoreError>> {
        unreachable!("the sweep purges no dead letters")
    }

    fn stats(&self) -> BoxFuture<'static, Result<Stats, StoreError>> {
        unreachable!("the sweep measures nothing")
    }

    fn oldest_undelivered(&self, _: usize) -> BoxFuture<'static, Result<Option<u64>, StoreError>> {
        unreachable!("the sweep measures nothing")
    }

    fn audit(&self, _: String, _: usize) -> BoxFuture<'static, Result<AuditPage, StoreError>> {
        unreachable!("the sweep audits nothing")
    }

    fn clock(&self) -> SharedClock {
        unreachable!("the sweep brings its own")
    }
}

fn start(store: &Arc<Expired>) -> (CancellationToken, tokio::task::JoinHandle<()>) {
    let stop = CancellationToken::new();
    let sweep = Sweep { store: store.clone(), clock: Arc::new(ManualClock::new(1)) };
    let task = tokio::spawn(sweep.run(stop.clone()));
    (stop, task)
}

#[tokio::test(start_paused = true)]
async fn one_sweep_removes_whatever_there_is_and_lets_others_run_between_steps() {
    let store = Arc::new(Expired::default());
    store.left.store(1_000 * STEP + 1, Ordering::Relaxed);
    let began = Instant::now();
    let (stop, task) = start(&store);
    let mut turns = 0;
    while store.left.load(Ordering::Relaxed) > 0 {
        turns += 1;
        tokio::task::yield_now().await;
    }
    assert!(turns >= 1_000, "others ran {turns} times during 1,000 steps");
    assert_eq!(began.elapsed(), Duration::ZERO, "it was one sweep");
    sleep(EVERY - Duration::from_millis(1)).await;
    assert_eq!(store.steps.load(Ordering::Relaxed), 1_001, "a step that is not full is the last");
    store.left.store(1, Ordering::Relaxed);
    sleep(Duration::from_millis(2)).await;
    assert_eq!(store.left.load(Ordering::Relaxed), 0);
    stop.cancel();
    task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_store_that_refuses_is_asked_again_soon() {
    let store = Arc::new(Expired::default());
    store.left.store(STEP, Ordering::Relaxed);
    store.busy.store(true, Ordering::Relaxed);
    let (stop, task) = start(&store);
    sleep(REST * 5 / 2).await;
    assert_eq!(store.steps.load(Ordering::Relaxed), 3);
    store.busy.store(false, Ordering::Relaxed);
    sleep(REST).await;
    assert_eq!(store.left.load(Ordering::Relaxed), 0);
    stop.cancel();
    task.await.unwrap();
}
