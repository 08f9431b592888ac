//! The audit over a store that answers what a test wants.

use futures::{FutureExt, future::BoxFuture};
use parking_lot::Mutex;
use sanjay_runtime::clock::SharedClock;
use tokio::time::sleep;
use uuid::Uuid;

use super::*;
use crate::{
    metrics,
    store::{
        Acked, AppendError, Appended, AuditPage, DeadFilter, DeadLetter, DeadPage, DeadPosition, DueInbox,
        InboxQuery, NewMessage, Page, Rearm, Receipt, Settle, Stats,
    },
};

/// Inboxes by name, all of them good but one.
struct Inboxes {
    count: usize,
    bad: Mutex<Option<usize>>,
    busy: Mutex<bool>,
    /// How many inboxes were asked for, and when.
    asked: Mutex<Vec<(Instant, usize)>>,
}

impl Inboxes {
    fn new(count: usize, bad: Option<usize>) -> Arc<Self> {
        let (bad, busy) = (Mutex::new(bad), Mutex::new(false));
        Arc::new(Self { count, bad, busy, asked: Mutex::default() })
    }
}

impl InboxStore for Inboxes {
    fn audit(&self, after: String, limit: usize) -> BoxFuture<'static, Result<AuditPage, StoreError>> {
        self.asked.lock().push((Instant::now(), limit));
        let from = if after.is_empty() { 0 } else { after.parse::<usize>().unwrap() + 1 };
        let to = (from + limit).min(self.count);
        let bad = self.bad.lock().filter(|bad| (from..to).contains(bad));
        let finding = |_| Finding { epoch: 7, head: 9, missing: 2, excess: 1, seqs: vec![3, 4, 10] };
        let page = AuditPage {
            inboxes: to - from,
            findings: bad.map(finding).into_iter().collect(),
            next: (to < self.count).then(|| (to - 1).to_string()),
        };
        let result = if *self.busy.lock() { Err(StoreError::Busy) } else { Ok(page) };
        async move { result }.boxed()
    }

    fn stats(&self) -> BoxFuture<'static, Result<Stats, StoreError>> {
        let stats = Stats { inboxes: self.count as u64, ..Stats::default() };
        async move { Ok(stats) }.boxed()
    }

    fn append(&self, _: Vec<NewMessage>) -> BoxFuture<'static, Vec<Result<Appended, AppendError>>> {
        unreachable!("the audit sends nothing")
    }

    fn read(&self, _: Vec<InboxQuery>) -> BoxFuture<'static, Vec<Result<Page, StoreError>>> {
        unreachable!("the audit reads no pages")
    }

    fn ack(&self, _: Vec<Settle>) -> BoxFuture<'static, Vec<Result<Acked, StoreError>>> {
        unreachable!("the audit settles nothing")
    }

    fn lookup(&self, _: String, _: Uuid) -> BoxFuture<'static, Result<Option<Receipt>, StoreError>> {
        unreachable!("the audit looks nothing up")
    }

    fn dead_letters(
        &self,
        _: DeadFilter,
        _: Option<DeadPosition>,
        _: usize,
    ) -> BoxFuture<'static, Result<DeadPage, StoreError>> {
        unreachable!("the audit looks at no dead letters")
    }

    fn dead_letter(&self, _: String, _: Uuid) -> BoxFuture<'static, Result<Option<DeadLetter>, StoreError>> {
        unreachable!("the audit looks at no dead letters")
    }

    fn redriven(&self, _: String, _: Uuid, _: Uuid) -> BoxFuture<'static, Result<bool, StoreError>> {
        unreachable!("the audit redrives nothing")
    }

    fn purge(&self, _: Vec<(String, Uuid)>) -> BoxFuture<'static, Result<u64, StoreError>> {
        unreachable!("the audit removes nothing")
    }

    fn arm(&self, _: Vec<String>) {}

    fn claim_due(&self, _: u64, _: u64, _: usize) -> BoxFuture<'static, Result<Vec<DueInbox>, StoreError>> {
        unreachable!("the audit claims nothing")
    }

    fn rearm(&self, _: Vec<Rearm>) -> BoxFuture<'static, Result<(), StoreError>> {
        unreachable!("the audit claims nothing")
    }

    crate::store::schedules_nothing!();
    crate::store::logs_nothing!();
    crate::store::revokes_nothing!();
    crate::store::fans_out_nothing!();
    crate::store::knows_no_devices!();

    fn sweep(&self, _: u64, _: usize) -> BoxFuture<'static, Result<usize, StoreError>> {
        unreachable!("the audit removes nothing")
    }

    fn oldest_undelivered(&self, _: usize) -> BoxFuture<'static, Result<Option<u64>, StoreError>> {
        unreachable!("the audit measures nothing else")
    }

    fn clock(&self) -> SharedClock {
        unreachable!("the audit needs no wall clock")
    }
}

fn start(store: &Arc<Inboxes>) -> (Metrics, CancellationToken) {
    let (metrics, stop) = (metrics::for_tests(), CancellationToken::new());
    let audit = Audit::new(Arc::clone(store) as Arc<dyn InboxStore>, metrics.clone());
    tokio::spawn(audit.run(stop.clone()));
    (metrics, stop)
}

#[tokio::test(start_paused = true)]
async fn a_round_looks_at_every_inbox_once_at_an_even_pace() {
    let store = Inboxes::new(1_000, None);
    let (metrics, _stop) = start(&store);
    // 16 pages of 64, one a second.
    sleep(Duration::from_millis(9_500)).await;
    assert_eq!(metrics.audit(), (0, 640));
    sleep(Duration::from_secs(20)).await;
    assert_eq!(metrics.audit(), (0, 1_000));
    sleep(Duration::from_secs(40)).await;
    assert!(metrics.audit().1 > 1_000, "the next round begins after a minute");
}

#[tokio::test(start_paused = true)]
async fn many_inboxes_take_an_hour_at_most() {
    let store = Inboxes::new(3_000_000, None);
    let (metrics, _stop) = start(&store);
    sleep(Duration::from_secs(3_600)).await;
    assert!(metrics.audit().1 >= 3_000_000, "{:?}", metrics.audit());
    let largest = store.asked.lock().iter().map(|(_, limit)| *limit).max();
    assert_eq!(largest, Some(1_000));
}

#[tokio::test(start_paused = true)]
async fn what_was_found_stays_until_a_round_finds_it_no_more() {
    let store = Inboxes::new(1_000, Some(500));
    let (metrics, _stop) = start(&store);
    sleep(Duration::from_millis(6_500)).await;
    assert_eq!(metrics.audit().0, 0, "not looked at yet");
    sleep(Duration::from_secs(2)).await;
    assert_eq!(metrics.audit().0, 3);
    sleep(Duration::from_secs(54)).await;
    let (difference, inboxes) = metrics.audit();
    assert!(inboxes > 1_000, "the second round has begun");
    assert_eq!(difference, 3, "the first round's finding counts until the second came by");
    *store.bad.lock() = None;
    sleep(Duration::from_secs(30)).await;
    assert_eq!(metrics.audit().0, 0);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_is_asked_again_where_it_stopped() {
    let store = Inboxes::new(200, None);
    let (metrics, stop) = start(&store);
    sleep(Duration::from_millis(500)).await;
    *store.busy.lock() = true;
    sleep(Duration::from_secs(10)).await;
    assert_eq!(metrics.audit(), (0, 64));
    *store.busy.lock() = false;
    sleep(Duration::from_secs(5)).await;
    assert_eq!(metrics.audit(), (0, 200));
    stop.cancel();
    let asked = store.asked.lock().len();
    sleep(Duration::from_secs(300)).await;
    assert_eq!(store.asked.lock().len(), asked);
}
