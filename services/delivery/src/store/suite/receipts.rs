//! What every adapter must do with the log of receipts: fixed cases.

use super::{failing::failure, model::read_log, *};
use crate::store::{FailureKind, Overflow};

fn bodies(receipts: &[LoggedReceipt]) -> Vec<(u128, State)> {
    receipts.iter().map(|receipt| (receipt.message_id.as_u128(), receipt.receipt.state)).collect()
}

async fn append(store: &dyn InboxStore, messages: Vec<NewMessage>) -> u64 {
    let mut epoch = 0;
    for result in store.append(messages).await {
        epoch = result.unwrap().epoch;
    }
    epoch
}

/// What was settled at this moment is in the log from now on, on every adapter.
fn let_pass(clock: &ManualClock) {
    clock.advance(Duration::from_micros(1));
}

/// Runs every case, each on a store of its own.
pub(super) async fn fixed_cases<H: Harness>(make: impl Fn() -> H) {
    every_end_is_logged_once(make()).await;
    a_reader_goes_on_from_any_place(make()).await;
    places_of_others_and_old_ones_are_refused(make()).await;
    whoever_waits_is_told(make()).await;
    many_that_are_settled_at_once_are_read_in_pages(make()).await;
    watchers_hear_of_ends_and_full_inboxes(make()).await;
}

async fn every_end_is_logged_once<H: Harness>(mut harness: H) {
    harness.set(Limits { max_unsettled: 3, overflow: Overflow::DeadLetterOldest, ..Limits::default() });
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let began_us = clock.now_us();
    let with = |id: u128, collapse: &str, expires_us: u64| NewMessage {
        collapse_key: collapse.to_owned(),
        expires_us,
        ..message("bob", id, "x", "", &clock)
    };
    let epoch = append(&*store, vec![with(1, "k", 0)]).await;
    append(&*store, vec![with(2, "k", 0)]).await;
    let_pass(&clock);
    append(&*store, vec![with(3, "", began_us + 5), with(4, "", 0)]).await;
    clock.advance(Duration::from_secs(1));
    store.expire(clock.now_us(), 10).await.unwrap();
    let_pass(&clock);
    let failed = vec![failure(4, 1, FailureKind::Term, &clock)];
    store.ack(vec![Settle { failed, ..settle("bob", epoch, &[], 0) }]).await.remove(0).unwrap();
    let_pass(&clock);
    // The fourth is one more than there is room for.
    append(&*store, (5..=7).map(|id| with(id, "", 0)).collect()).await;
    store.ack(vec![settle("bob", epoch, &[], 0)]).await.remove(0).unwrap();
    let_pass(&clock);
    store.ack(vec![settle("bob", epoch, &[(5, 5)], 0)]).await.remove(0).unwrap();
    // Twice is no second time.
    store.ack(vec![settle("bob", epoch, &[(1, 5)], 0)]).await.remove(0).unwrap();
    let_pass(&clock);
    let (all, _) = read_log(&*store, LogStart::Oldest, 100).await;
    use State::{Acked, Dead, Expired, Superseded};
    assert_eq!(bodies(&all), [(1, Superseded), (3, Expired), (4, Dead), (2, Dead), (5, Acked)]);
    let reasons: Vec<_> = all.iter().map(|receipt| receipt.reason).collect();
    let (terminated, full) = (Some(DeadReason::Terminated), Some(DeadReason::QueueFull));
    assert_eq!(reasons, [None, None, terminated, full, None]);
    for logged in &all {
        assert_eq!((logged.user.as_str(), logged.caller.as_str()), ("bob", "shop"));
        let found = store.lookup("bob".to_owned(), logged.message_id).await.unwrap();
        assert_eq!(found.as_ref(), Some(&logged.receipt));
    }
}

/// Sends and settles; some users settle much, and one of them out of order.
async fn settle_some(store: &dyn InboxStore, clock: &ManualClock, first: u128) {
    for n in 0..4 {
        let mut batch = Vec::new();
        for user in 0..5_u128 {
            let id = first + n * 10 + user;
            batch.push(message(&format!("user-{}", user % 3), id, "x", "", clock));
        }
        append(store, batch).await;
        for user in ["user-0", "user-1", "user-2"] {
            let page = read_all(store, user).await;
            let newest = page.head;
            let acked = if n % 2 == 0 { (newest, newest) } else { (1, newest) };
            store.ack(vec![settle(user, page.epoch, &[acked], 0)]).await.remove(0).unwrap();
        }
        let_pass(clock);
    }
}

async fn a_reader_goes_on_from_any_place<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    settle_some(&*store, &clock, 100).await;
    let (all, end) = read_log(&*store, LogStart::Oldest, 1_000).await;
    assert_eq!(all.len(), 20);
    let ids: HashSet<Uuid> = all.iter().map(|receipt| receipt.message_id).collect();
    assert_eq!(ids.len(), 20, "each once");
    let mut places = vec![LogStart::Oldest];
    for index in 0..all.len() {
        let page = store.receipts(places[index].clone(), 1).await.unwrap();
        assert_eq!(page.receipts, all[index..=index], "page {index}");
        places.push(LogStart::After(page.next));
    }
    settle_some(&*store, &clock, 200).await;
    drop(store);
    let store = harness.reopen().await;
    let (more, _) = read_log(&*store, LogStart::After(end), 7).await;
    assert_eq!(more.len(), 20);
    let whole: Vec<LoggedReceipt> = all.into_iter().chain(more).collect();
    for (index, place) in places.into_iter().enumerate() {
        for limit in [1, 3, 100] {
            let (rest, _) = read_log(&*store, place.clone(), limit).await;
            assert_eq!(rest, whole[index..], "from {index}, {limit} a page");
        }
    }
    // From now on is from now on.
    let page = store.receipts(LogStart::Now, 10).await.unwrap();
    assert_eq!((page.receipts.len(), page.tail), (0, true));
    settle_some(&*store, &clock, 300).await;
    let (rest, _) = read_log(&*store, LogStart::After(page.next), 100).await;
    assert_eq!(rest.len(), 20);
    assert!(rest.iter().all(|receipt| receipt.message_id.as_u128() >= 300));
}

async fn places_of_others_and_old_ones_are_refused<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    settle_some(&*store, &clock, 100).await;
    let first = store.receipts(LogStart::Oldest, 1).await.unwrap().next;
    let (_, end) = read_log(&*store, LogStart::Oldest, 100).await;
    let other = LogPosition { store_id: first.store_id ^ 1, ..first.clone() };
    let ahead = LogPosition { at: end.at + 48 * 3_600_000_000, ..end.clone() };
    for place in [other, ahead] {
        assert_eq!(store.receipts(LogStart::After(place), 1).await, Err(LogError::Foreign));
    }
    clock.advance(RECEIPT_RETENTION + Duration::from_secs(120));
    store.sweep(clock.now_us(), 1_000).await.unwrap();
    let gone = store.receipts(LogStart::After(first), 1).await;
    assert_eq!(gone, Err(LogError::Gone));
    let (none, _) = read_log(&*store, LogStart::Oldest, 100).await;
    assert_eq!(none, []);
    drop(store);
    // What follows has places of its own.
    let store = harness.reopen().await;
    let now = store.receipts(LogStart::Now, 1).await.unwrap().next;
    assert!(now.at >= end.at);
    settle_some(&*store, &clock, 200).await;
    let (rest, _) = read_log(&*store, LogStart::After(now), 100).await;
    assert_eq!(rest.len(), 20);
    assert_eq!(read_log(&*store, LogStart::Oldest, 100).await.0, rest);
}

async fn whoever_waits_is_told<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let end = store.receipts(LogStart::Now, 1).await.unwrap().next;
    let mut waiting = [store.receipts_after(end.clone()), store.receipts_after(end.clone())];
    for waiting in &mut waiting {
        assert!(futures::FutureExt::now_or_never(waiting).is_none(), "there is nothing");
    }
    settle_some(&*store, &clock, 100).await;
    let told = futures::future::join_all(waiting);
    tokio::time::timeout(Duration::from_secs(20), told).await.expect("they are told");
    let (all, end) = read_log(&*store, LogStart::After(end), 100).await;
    assert_eq!(all.len(), 20);
    let mut waiting = store.receipts_after(end);
    assert!(futures::FutureExt::now_or_never(&mut waiting).is_none(), "there is nothing more");
}

async fn many_that_are_settled_at_once_are_read_in_pages<H: Harness>(mut harness: H) {
    const USERS: u128 = 600;
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let batch = (0..USERS).map(|id| message(&format!("user-{id}"), id, "x", "", &clock)).collect();
    let appended = store.append(batch).await;
    let settles = appended.into_iter().enumerate();
    let settles = settles.map(|(id, one)| settle(&format!("user-{id}"), one.unwrap().epoch, &[(1, 1)], 0));
    store.ack(settles.collect()).await.into_iter().for_each(|acked| assert_eq!(acked.unwrap().mark, 1));
    let_pass(&clock);
    for limit in [1_000, 99] {
        let (all, _) = read_log(&*store, LogStart::Oldest, limit).await;
        let ids: HashSet<Uuid> = all.iter().map(|receipt| receipt.message_id).collect();
        assert_eq!((all.len(), ids.len()), (USERS as usize, USERS as usize));
    }
}

/// A sink that watches.
#[derive(Default)]
struct Watching {
    settled: Mutex<Vec<LoggedReceipt>>,
    filling: Mutex<Vec<(String, u64)>>,
}

impl CommitSink for Watching {
    fn committed(&self, _: &NewMessage, _: &Appended) {}

    fn ended(&self, _: &str, _: &SettledMessage, _: State) {}

    fn died(&self, _: DeadReason, _: usize) {}

    fn watches(&self) -> bool {
        true
    }

    fn settled(&self, receipt: &LoggedReceipt) {
        self.settled.lock().push(receipt.clone());
    }

    fn filling(&self, user: &str, messages: u64, _: u64) {
        self.filling.lock().push((user.to_owned(), messages));
    }
}

async fn watchers_hear_of_ends_and_full_inboxes<H: Harness>(mut harness: H) {
    let heard = Arc::new(Watching::default());
    harness.set(Limits { max_unsettled: 10, on_commit: heard.clone(), ..Limits::default() });
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let mut epoch = 0;
    for id in 1..=9_u128 {
        let collapse_key = if id < 3 { "k".to_owned() } else { String::new() };
        epoch =
            append(&*store, vec![NewMessage { collapse_key, ..message("bob", id, "x", "", &clock) }]).await;
    }
    assert_eq!(*heard.filling.lock(), [("bob".to_owned(), 8)], "at four fifths");
    append(&*store, vec![message("bob", 10, "x", "", &clock)]).await;
    assert_eq!(heard.filling.lock().len(), 1, "once");
    store.ack(vec![settle("bob", epoch, &[(1, 8)], 0)]).await.remove(0).unwrap();
    append(&*store, (11..=20).take(6).map(|id| message("bob", id, "x", "", &clock)).collect()).await;
    assert_eq!(heard.filling.lock().len(), 2, "and again after it was below");
    let failed = vec![failure(9, 1, FailureKind::Term, &clock)];
    store.ack(vec![Settle { failed, ..settle("bob", epoch, &[], 0) }]).await.remove(0).unwrap();
    let_pass(&clock);
    let (all, _) = read_log(&*store, LogStart::Oldest, 100).await;
    assert_eq!(all.len(), 9);
    let mut settled = std::mem::take(&mut *heard.settled.lock());
    settled.sort_unstable_by_key(|receipt| (receipt.receipt.settled_us, receipt.message_id));
    let mut all = all;
    all.sort_unstable_by_key(|receipt| (receipt.receipt.settled_us, receipt.message_id));
    assert_eq!(settled, all);
}
