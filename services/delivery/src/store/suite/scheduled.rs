//! What every adapter must do with messages that wait for their time: fixed cases.

use super::{model::assert_same, *};

const HOLD_US: u64 = 30_000_000;

/// A message that is due so many seconds from now.
fn scheduled(user: &str, id: u128, key: &str, seconds: u64, clock: &ManualClock) -> Scheduled {
    let deliver_us = clock.now_us() + seconds * 1_000_000;
    let message = NewMessage {
        trace: "00-trace".to_owned(),
        expires_us: deliver_us + 9,
        collapse_key: "collapse".to_owned(),
        ..message(user, id, "x", key, clock)
    };
    Scheduled { message, deliver_us }
}

async fn schedule(store: &dyn InboxStore, messages: Vec<Scheduled>) -> Vec<Result<ScheduledAt, AppendError>> {
    store.schedule(messages).await
}

/// What is due now.
async fn claim(store: &dyn InboxStore, clock: &ManualClock, limit: usize) -> Vec<Scheduled> {
    store.claim_scheduled(clock.now_us(), clock.now_us() + HOLD_US, limit).await.unwrap()
}

fn ids(claimed: &[Scheduled]) -> Vec<u128> {
    claimed.iter().map(|scheduled| scheduled.message.message_id.as_u128()).collect()
}

async fn receipt(store: &dyn InboxStore, id: u128) -> Option<Receipt> {
    store.lookup("bob".to_owned(), Uuid::from_u128(id)).await.unwrap()
}

fn bob(id: u128) -> (String, Uuid) {
    ("bob".to_owned(), Uuid::from_u128(id))
}

/// Runs every case, each on a store of its own.
pub(super) async fn fixed_cases<H: Harness>(make: impl Fn() -> H) {
    a_message_waits_for_its_time(make()).await;
    claims_take_the_earliest(make()).await;
    scheduling_and_sending_share_dedupe_keys(make()).await;
    a_scheduled_message_can_be_forgotten(make()).await;
    what_is_postponed_comes_then_and_not_before(make()).await;
    so_many_wait_at_most(make()).await;
}

async fn a_message_waits_for_its_time<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let accepted_us = clock.now_us();
    let kept = scheduled("bob", 1, "k", 10, &clock);
    let answer = ScheduledAt {
        message_id: Uuid::from_u128(1),
        deliver_us: kept.deliver_us,
        duplicate: false,
        time_us: accepted_us,
    };
    assert_eq!(schedule(&*store, vec![kept.clone()]).await, [Ok(answer)]);
    let waits = Receipt { seq: 0, state: State::Scheduled, accepted_us, settled_us: 0 };
    assert_eq!(receipt(&*store, 1).await, Some(waits.clone()));
    assert_eq!(store.lookup("eve".to_owned(), Uuid::from_u128(1)).await, Ok(None));
    // It is in no inbox.
    assert_eq!((read_all(&*store, "bob").await.head, claim(&*store, &clock, 9).await.len()), (0, 0));
    let stats = store.stats().await.unwrap();
    assert_eq!((stats.scheduled, stats.unsettled, stats.armed), (1, 0, 0));
    drop(store);
    let store = harness.reopen().await;
    clock.advance(Duration::from_secs(10) - Duration::from_micros(1));
    assert_eq!(ids(&claim(&*store, &clock, 9).await), [0_u128; 0]);
    clock.advance(Duration::from_micros(1));
    let claimed = claim(&*store, &clock, 9).await;
    assert_eq!((ids(&claimed), claimed[0].deliver_us), (vec![1], kept.deliver_us));
    assert_same(&claimed[0].message, &kept.message);
    assert_eq!(ids(&claim(&*store, &clock, 9).await), [0_u128; 0], "the claim holds");
    assert_eq!(receipt(&*store, 1).await, Some(waits));
    // Whoever claimed it is gone.
    drop(store);
    let store = harness.reopen().await;
    clock.advance(Duration::from_micros(HOLD_US));
    let claimed = claim(&*store, &clock, 9).await;
    assert_eq!((ids(&claimed), claimed[0].deliver_us), (vec![1], kept.deliver_us));
    let time_us = clock.now_us();
    let message = NewMessage { time_us, expires_us: 0, ..claimed[0].message.clone() };
    assert_eq!(store.append(vec![message]).await.remove(0).unwrap().seq, 1);
    // It is in the inbox, and its record says so, before it is forgotten here and after that.
    let open = Receipt { seq: 1, state: State::Accepted, accepted_us: time_us, settled_us: 0 };
    assert_eq!(receipt(&*store, 1).await, Some(open.clone()));
    drop(store);
    let store = harness.reopen().await;
    assert_eq!(receipt(&*store, 1).await, Some(open.clone()));
    assert_eq!(store.unschedule(vec![bob(1), bob(2)]).await, Ok(1));
    assert_eq!(receipt(&*store, 1).await, Some(open));
    assert_eq!(seqs(&read_all(&*store, "bob").await), [1]);
    clock.advance(Duration::from_secs(3_600));
    assert_eq!(ids(&claim(&*store, &clock, 9).await), [0_u128; 0]);
    assert_eq!(store.stats().await.unwrap().scheduled, 0);
}

async fn what_is_postponed_comes_then_and_not_before<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let batch = [1, 2].map(|id| scheduled("bob", id, "", 1, &clock));
    assert!(schedule(&*store, batch.to_vec()).await.iter().all(Result::is_ok));
    clock.advance(Duration::from_secs(1));
    assert_eq!(claim(&*store, &clock, 9).await.len(), 2);
    let until_us = clock.now_us() + 2 * HOLD_US;
    assert_eq!(store.postpone(vec![bob(1), bob(9)], until_us).await, Ok(()));
    assert_eq!(store.postpone(Vec::new(), until_us).await, Ok(()));
    drop(store);
    let store = harness.reopen().await;
    clock.advance(Duration::from_micros(HOLD_US));
    assert_eq!(ids(&claim(&*store, &clock, 9).await), [2]);
    clock.advance(Duration::from_micros(HOLD_US - 1));
    assert_eq!(ids(&claim(&*store, &clock, 9).await), [0_u128; 0]);
    clock.advance(Duration::from_micros(1));
    assert_eq!(store.unschedule(vec![bob(2)]).await, Ok(1));
    assert_eq!(ids(&claim(&*store, &clock, 9).await), [1]);
    assert_eq!(store.stats().await.unwrap().scheduled, 1, "the one that was not there is not there now");
}

async fn claims_take_the_earliest<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let batch = [("bob", 1, 5), ("ann", 2, 1), ("bob", 3, 3), ("cat", 4, 100), ("ann", 5, 4)];
    let batch = batch.map(|(user, id, seconds)| scheduled(user, id, "", seconds, &clock));
    assert!(schedule(&*store, batch.to_vec()).await.iter().all(Result::is_ok));
    clock.advance(Duration::from_secs(10));
    assert_eq!(ids(&claim(&*store, &clock, 2).await), [2, 3]);
    clock.advance(Duration::from_secs(1));
    assert_eq!(ids(&claim(&*store, &clock, 1).await), [5]);
    assert_eq!(ids(&claim(&*store, &clock, 9).await), [1]);
    // The first claim ends before the others.
    clock.advance(Duration::from_micros(HOLD_US) - Duration::from_secs(1));
    let mut again = ids(&claim(&*store, &clock, 9).await);
    again.sort_unstable();
    assert_eq!(again, [2, 3]);
    assert_eq!(store.unschedule(vec![bob(3), bob(2), ("ann".to_owned(), Uuid::from_u128(2))]).await, Ok(2));
    clock.advance(Duration::from_secs(1));
    let mut rest = ids(&claim(&*store, &clock, 9).await);
    rest.sort_unstable();
    assert_eq!(rest, [1, 5]);
    assert_eq!(store.stats().await.unwrap().scheduled, 3);
}

async fn scheduling_and_sending_share_dedupe_keys<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let time_us = clock.now_us();
    let first = scheduled("bob", 1, "k", 10, &clock);
    let batch = vec![first.clone(), scheduled("bob", 2, "k", 20, &clock)];
    let answers = schedule(&*store, batch).await;
    let again = ScheduledAt {
        message_id: Uuid::from_u128(1),
        deliver_us: first.deliver_us,
        duplicate: true,
        time_us,
    };
    assert_eq!(answers[1], Ok(again.clone()));
    drop(store);
    let store = harness.reopen().await;
    clock.advance(Duration::from_secs(1));
    assert_eq!(schedule(&*store, vec![scheduled("bob", 3, "k", 20, &clock)]).await, [Ok(again.clone())]);
    let sent = store.append(vec![message("bob", 4, "x", "k", &clock)]).await.remove(0).unwrap();
    assert_eq!((sent.seq, sent.message_id, sent.duplicate), (0, Uuid::from_u128(1), true));
    assert_eq!((sent.time_us, sent.epoch), (time_us, read_all(&*store, "bob").await.epoch));
    let other = message("bob", 5, "y", "k", &clock);
    let exists = AppendError::AlreadyExists { key: "k".to_owned() };
    assert_eq!(store.append(vec![other.clone()]).await, [Err(exists.clone())]);
    let other = Scheduled { message: other, deliver_us: 5 };
    assert_eq!(schedule(&*store, vec![other]).await, [Err(exists)]);
    assert_eq!(store.stats().await.unwrap().scheduled, 1);
    // The other way round, and of another caller.
    store.append(vec![message("bob", 6, "x", "sent", &clock)]).await.remove(0).unwrap();
    let mut mail = scheduled("bob", 8, "sent", 20, &clock);
    mail.message.caller = "mail".to_owned();
    let answers = schedule(&*store, vec![scheduled("bob", 7, "sent", 20, &clock), mail]).await;
    let now_us = clock.now_us();
    let duplicate =
        ScheduledAt { message_id: Uuid::from_u128(6), deliver_us: 0, duplicate: true, time_us: now_us };
    assert_eq!(answers[0], Ok(duplicate));
    assert_eq!(answers[1].as_ref().map(|answer| answer.duplicate), Ok(false));
    // The key outlives the wait, not its window.
    assert_eq!(store.unschedule(vec![bob(1)]).await, Ok(1));
    let answers = schedule(&*store, vec![scheduled("bob", 9, "k", 20, &clock)]).await;
    assert_eq!(answers, [Ok(ScheduledAt { deliver_us: 0, ..again })]);
    clock.advance(DEDUPE_WINDOW);
    let answers = schedule(&*store, vec![scheduled("bob", 10, "k", 20, &clock)]).await;
    assert_eq!(answers[0].as_ref().map(|answer| answer.duplicate), Ok(false));
}

async fn a_scheduled_message_can_be_forgotten<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let batch = (1..=3).map(|id| scheduled("bob", id, "", 10, &clock)).collect();
    assert!(schedule(&*store, batch).await.iter().all(Result::is_ok));
    assert_eq!(store.unschedule(vec![bob(2), bob(2), bob(9)]).await, Ok(1));
    assert_eq!(store.unschedule(Vec::new()).await, Ok(0));
    assert_eq!(receipt(&*store, 2).await, None);
    drop(store);
    let store = harness.reopen().await;
    clock.advance(Duration::from_secs(10));
    let mut claimed = ids(&claim(&*store, &clock, 9).await);
    claimed.sort_unstable();
    assert_eq!(claimed, [1, 3]);
    // Also while it is claimed.
    assert_eq!(store.unschedule(vec![bob(1)]).await, Ok(1));
    clock.advance(Duration::from_micros(HOLD_US));
    assert_eq!(ids(&claim(&*store, &clock, 9).await), [3]);
}

async fn so_many_wait_at_most<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let most = MAX_SCHEDULED as u128;
    let batch = (1..=most).map(|id| scheduled("bob", id, "", 10, &clock)).collect();
    assert!(schedule(&*store, batch).await.iter().all(Result::is_ok));
    let keyed = scheduled("bob", most + 1, "k", 10, &clock);
    let plain = scheduled("bob", most + 2, "", 10, &clock);
    let answers = schedule(&*store, vec![keyed.clone(), plain, scheduled("eve", 1, "", 10, &clock)]).await;
    let full = Err(AppendError::QueueFull { quota: Quota::Scheduled, held: MAX_SCHEDULED as u64 });
    assert_eq!(answers[..2], [full.clone(), full]);
    assert!(answers[2].is_ok());
    assert_eq!(store.unschedule(vec![bob(7)]).await, Ok(1));
    // What was refused left no key.
    let answers = schedule(&*store, vec![keyed]).await;
    assert_eq!(answers[0].as_ref().map(|answer| answer.duplicate), Ok(false));
    assert_eq!(store.stats().await.unwrap().scheduled, MAX_SCHEDULED as u64 + 1);
}
