//! What every adapter must do with messages that fail: fixed cases.

use sanjay_runtime::SharedRandom;

use super::*;
use crate::store::{Failure, FailureKind, Verdict};

/// How many attempts of a message may fail in the suite.
pub(crate) const MAX_ATTEMPTS: u32 = 3;

/// The delay after a first failed attempt, with the suite's random numbers.
const FIRST_DELAY: Duration = Duration::from_millis(500);

const HOLD_US: u64 = 30_000_000;

pub(crate) const NAK: FailureKind = FailureKind::Nak(Duration::ZERO);

/// Random numbers that name a store or a node, and as fractions are next to 0: delays are known beforehand.
pub(crate) fn random() -> SharedRandom {
    struct Small;
    impl Random for Small {
        fn next_u64(&self) -> u64 {
            OsRandom.next_u64() >> 33
        }
    }
    Arc::new(Small)
}

pub(crate) fn failure(seq: u64, delivery: u32, kind: FailureKind, clock: &ManualClock) -> Failure {
    Failure {
        seq,
        delivery,
        kind,
        time_us: clock.now_us(),
        edge: "edge-1".to_owned(),
        session: Some(Uuid::from_u128(u128::from(delivery))),
        reason: format!("failure {delivery} of {seq}"),
    }
}

/// Reports failures of bob's messages; returns what follows.
async fn fail(store: &dyn InboxStore, epoch: u64, failed: Vec<Failure>) -> Vec<(u64, Verdict)> {
    let report = Settle { failed, ..settle("bob", epoch, &[], 0) };
    store.ack(vec![report]).await.remove(0).unwrap().failed
}

async fn rewritten(store: &dyn InboxStore, epoch: u64, rewritten: &[(u64, u32)]) {
    let report = Settle { rewritten: rewritten.to_vec(), ..settle("bob", epoch, &[], 0) };
    store.ack(vec![report]).await.remove(0).unwrap();
}

/// Sends bob so many messages and says that they were written; returns his epoch.
pub(crate) async fn send(store: &dyn InboxStore, clock: &ManualClock, count: u128) -> u64 {
    let batch = (1..=count).map(|id| message("bob", id, &format!("body-{id}"), "", clock)).collect();
    let epoch = store.append(batch).await.remove(0).unwrap().epoch;
    store.ack(vec![settle("bob", epoch, &[], count as u64)]).await.remove(0).unwrap();
    epoch
}

/// What is due now.
async fn claim(store: &dyn InboxStore, clock: &ManualClock) -> Vec<DueInbox> {
    store.claim_due(clock.now_us(), clock.now_us() + HOLD_US, 10).await.unwrap()
}

fn rearm(claimed: &DueInbox, next: Next) -> Vec<Rearm> {
    vec![Rearm { user: claimed.user.clone(), armed: claimed.armed, next }]
}

async fn only(store: &dyn InboxStore, seqs: &[u64]) -> Vec<(u64, u32)> {
    let query = InboxQuery { only: seqs.to_vec(), ..query("bob", None, 0) };
    deliveries(&store.read(vec![query]).await.remove(0).unwrap())
}

async fn letters(store: &dyn InboxStore, filter: DeadFilter) -> Vec<u64> {
    let page = store.dead_letters(filter, None, 100).await.unwrap();
    assert_eq!(page.next, None);
    page.letters.iter().map(|letter| letter.seq).collect()
}

/// Runs every case, each on a store of its own.
pub(crate) async fn fixed_cases<H: Harness>(make: impl Fn() -> H) {
    a_failed_message_comes_again_when_it_is_due(make()).await;
    what_was_written_meanwhile_keeps_its_time(make()).await;
    an_offline_user_gets_it_with_the_next_page(make()).await;
    what_is_written_or_acked_does_not_come_again(make()).await;
    a_message_that_fails_for_good_is_a_dead_letter(make()).await;
    dead_letters_are_listed_redriven_and_purged(make()).await;
}

async fn a_failed_message_comes_again_when_it_is_due<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let epoch = send(&*store, &clock, 3).await;
    assert_eq!(store.stats().await.unwrap().armed, 0);
    let due_us = clock.now_us() + FIRST_DELAY.as_micros() as u64;
    // What is settled, above the head, of another delivery or of another epoch is ignored.
    let mixed = [
        failure(2, 1, NAK, &clock),
        failure(3, 2, NAK, &clock),
        failure(9, 1, NAK, &clock),
        failure(1, 1, NAK, &clock),
    ];
    let report = Settle { failed: mixed.to_vec(), ..settle("bob", epoch, &[(1, 1)], 0) };
    let acked = store.ack(vec![report]).await.remove(0).unwrap();
    assert_eq!((acked.mark, acked.failed), (1, vec![(2, Verdict::Again(due_us))]));
    let foreign = Settle { failed: vec![failure(3, 1, NAK, &clock)], ..settle("bob", epoch ^ 1, &[], 0) };
    assert_eq!(store.ack(vec![foreign]).await.remove(0).unwrap().failed, []);
    assert_eq!(fail(&*store, epoch, vec![failure(2, 1, NAK, &clock)]).await, [], "reported before");
    // It waits: a page passes it by.
    let page = read_all(&*store, "bob").await;
    assert_eq!((deliveries(&page), page.covers, page.head), (vec![(3, 1)], 3, 3));
    assert_eq!(only(&*store, &[3, 2, 1, 2, 9]).await, [(2, 1), (3, 1)]);
    assert_eq!(store.stats().await.unwrap().armed, 1);
    drop(store);
    let store = harness.reopen().await;
    clock.advance(FIRST_DELAY - Duration::from_micros(1));
    assert_eq!(claim(&*store, &clock).await, []);
    clock.advance(Duration::from_micros(1));
    let claimed = claim(&*store, &clock).await;
    assert_eq!(claimed.len(), 1);
    assert_eq!((claimed[0].after, &claimed[0].retries), (3, &vec![(2, 2)]));
    assert_eq!(claim(&*store, &clock).await, [], "the claim holds");
    assert_eq!(only(&*store, &[2]).await, [(2, 2)]);
    assert_eq!(deliveries(&read_all(&*store, "bob").await), [(2, 2), (3, 1)]);
    // Relayed, and nobody says that it was written: it comes again with the same number.
    let later_us = clock.now_us() + 7;
    let at = Next::At { due_us: later_us, attempt: 4 };
    store.rearm(rearm(&claimed[0], at)).await.unwrap();
    clock.advance(Duration::from_micros(7));
    let again = claim(&*store, &clock).await;
    assert_eq!((again[0].attempt, &again[0].retries), (4, &vec![(2, 2)]));
    // Nor when the claim comes to nothing.
    clock.advance(Duration::from_micros(HOLD_US));
    assert_eq!(claim(&*store, &clock).await[0].retries, [(2, 2)]);
    // The second attempt fails before anybody says that it was written, and its client asks for a later one.
    let hour = FailureKind::Nak(Duration::from_secs(3_600));
    let due_us = clock.now_us() + 3_600_000_000;
    let again = Verdict::Again(due_us);
    assert_eq!(fail(&*store, epoch, vec![failure(2, 2, hour, &clock)]).await, [(2, again)]);
    clock.advance(Duration::from_secs(3_599));
    assert_eq!(claim(&*store, &clock).await, []);
    clock.advance(Duration::from_secs(1));
    assert_eq!(claim(&*store, &clock).await[0].retries, [(2, 3)]);
    // A message that comes is due by its own time.
    store.append(vec![message("bob", 9, "x", "", &clock)]).await.remove(0).unwrap();
    clock.advance(FIRST_DUE);
    let claimed = claim(&*store, &clock).await;
    assert_eq!((claimed[0].after, claimed[0].retries.len()), (3, 0));
}

async fn what_was_written_meanwhile_keeps_its_time<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let epoch = send(&*store, &clock, u128::from(MAX_UNSETTLED)).await;
    let all = (1..=MAX_UNSETTLED).map(|seq| failure(seq, 1, FailureKind::Deadline, &clock)).collect();
    assert_eq!(fail(&*store, epoch, all).await.len() as u64, MAX_UNSETTLED);
    clock.advance(FIRST_DELAY);
    let claimed = claim(&*store, &clock).await.remove(0);
    let all: Vec<(u64, u32)> = (1..=MAX_UNSETTLED).map(|seq| (seq, 2)).collect();
    assert_eq!(claimed.retries, all);
    let half: Vec<(u64, u32)> = (1..=MAX_UNSETTLED / 2).map(|seq| (seq, 2)).collect();
    rewritten(&*store, epoch, &half).await;
    let at = Next::At { due_us: clock.now_us() + 1, attempt: 1 };
    store.rearm(rearm(&claimed, at)).await.unwrap();
    clock.advance(Duration::from_micros(1));
    let rest: Vec<(u64, u32)> = (MAX_UNSETTLED / 2 + 1..=MAX_UNSETTLED).map(|seq| (seq, 2)).collect();
    assert_eq!(claim(&*store, &clock).await[0].retries, rest);
}

async fn an_offline_user_gets_it_with_the_next_page<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let epoch = send(&*store, &clock, 2).await;
    let hour = FailureKind::Nak(Duration::from_secs(3_600));
    fail(&*store, epoch, vec![failure(1, 1, NAK, &clock), failure(2, 1, hour, &clock)]).await;
    clock.advance(FIRST_DELAY);
    let claimed = claim(&*store, &clock).await.remove(0);
    assert_eq!(claimed.retries, [(1, 2)]);
    store.rearm(rearm(&claimed, Next::Parked)).await.unwrap();
    clock.advance(Duration::from_secs(3_000));
    assert_eq!(claim(&*store, &clock).await, []);
    assert_eq!(deliveries(&read_all(&*store, "bob").await), [(1, 2)]);
    // The reader's delivery fails like any other.
    let verdict = fail(&*store, epoch, vec![failure(1, 2, NAK, &clock)]).await;
    assert!(matches!(verdict[..], [(1, Verdict::Again(_))]), "{verdict:?}");
    clock.advance(Duration::from_secs(600));
    assert_eq!(claim(&*store, &clock).await[0].retries, [(1, 3), (2, 2)]);
}

async fn what_is_written_or_acked_does_not_come_again<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let epoch = send(&*store, &clock, 2).await;
    fail(&*store, epoch, vec![failure(1, 1, NAK, &clock), failure(2, 1, NAK, &clock)]).await;
    clock.advance(FIRST_DELAY);
    assert_eq!(claim(&*store, &clock).await[0].retries, [(1, 2), (2, 2)]);
    rewritten(&*store, epoch, &[(1, 2), (2, 1)]).await;
    store.ack(vec![settle("bob", epoch, &[(2, 2)], 0)]).await.remove(0).unwrap();
    clock.advance(Duration::from_secs(86_400));
    assert_eq!(claim(&*store, &clock).await, []);
    assert_eq!(
        store.stats().await,
        Ok(Stats { inboxes: 1, unsettled: 1, armed: 0, dead_letters: 0, scheduled: 0 })
    );
    assert_eq!(deliveries(&read_all(&*store, "bob").await), [(1, 2)]);
    store.ack(vec![settle("bob", epoch, &[(1, 1)], 0)]).await.remove(0).unwrap();
    assert_eq!(fail(&*store, epoch, vec![failure(1, 2, NAK, &clock)]).await, []);
    assert_eq!(letters(&*store, DeadFilter::default()).await, [0_u64; 0]);
}

async fn a_message_that_fails_for_good_is_a_dead_letter<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let accepted_us = clock.now_us();
    let epoch = send(&*store, &clock, 3).await;
    let mut expected = Vec::new();
    for delivery in 1..=MAX_ATTEMPTS {
        expected.push(failure(2, delivery, NAK, &clock));
        let verdict = fail(&*store, epoch, expected[expected.len() - 1..].to_vec()).await;
        if delivery == MAX_ATTEMPTS {
            assert_eq!(verdict, [(2, Verdict::Dead(DeadReason::MaxAttempts))]);
            break;
        }
        let [(2, Verdict::Again(due_us))] = verdict[..] else { panic!("{verdict:?}") };
        clock.advance(Duration::from_micros(due_us - clock.now_us()));
        assert_eq!(claim(&*store, &clock).await[0].retries, [(2, delivery + 1)]);
        rewritten(&*store, epoch, &[(2, delivery + 1)]).await;
    }
    let died_us = clock.now_us();
    drop(store);
    let store = harness.reopen().await;
    clock.advance(Duration::from_secs(60));
    let term = fail(&*store, epoch, vec![failure(3, 1, FailureKind::Term, &clock)]).await;
    assert_eq!(term, [(3, Verdict::Dead(DeadReason::Terminated))]);
    // It is settled: nobody gets it, and an ack comes too late.
    assert_eq!(deliveries(&read_all(&*store, "bob").await), [(1, 1)]);
    let acked = store.ack(vec![settle("bob", epoch, &[(1, 3)], 0)]).await.remove(0).unwrap();
    assert_eq!((acked.mark, acked.messages.len(), acked.messages[0].seq), (3, 1, 1));
    let receipt = store.lookup("bob".to_owned(), Uuid::from_u128(2)).await.unwrap().unwrap();
    assert_eq!(receipt, Receipt { seq: 2, state: State::Dead, accepted_us, settled_us: died_us });
    assert_eq!(
        store.stats().await,
        Ok(Stats { inboxes: 1, unsettled: 0, armed: 0, dead_letters: 2, scheduled: 0 })
    );
    assert_eq!(letters(&*store, DeadFilter::default()).await, [3, 2]);
    let letter = store.dead_letter("bob".to_owned(), Uuid::from_u128(2)).await.unwrap().unwrap();
    let payload = text("body-2");
    let whole = DeadLetter {
        user: "bob".to_owned(),
        message_id: Uuid::from_u128(2),
        seq: 2,
        epoch,
        caller: "shop".to_owned(),
        reason: DeadReason::MaxAttempts,
        accepted_us,
        died_us,
        failures: expected,
        trace: String::new(),
        payload_bytes: prost::Message::encoded_len(&*payload) as u64,
        payload: Some(payload),
        redriven_as: None,
    };
    assert_eq!(letter, whole);
    let listed = store.dead_letters(DeadFilter::default(), None, 9).await.unwrap().letters;
    assert_eq!(listed[1], DeadLetter { payload: None, ..whole });
    // The inbox goes on.
    let next = store.append(vec![message("bob", 4, "x", "", &clock)]).await.remove(0).unwrap();
    assert_eq!(next.seq, 4);
    assert_eq!(store.dead_letter("eve".to_owned(), Uuid::from_u128(2)).await, Ok(None));
}

async fn dead_letters_are_listed_redriven_and_purged<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let begin_us = clock.now_us();
    for (user, first) in [("a", 1), ("a/b", 11), ("b", 21)] {
        let batch = (first..first + 4).map(|id| message(user, id, "x", "", &clock)).collect();
        let epoch = store.append(batch).await.remove(0).unwrap().epoch;
        // Two die at one time, the others a second apart.
        for failed in [vec![1, 2], vec![3], vec![4]] {
            let failed = failed.into_iter().map(|seq| failure(seq, 1, FailureKind::Term, &clock)).collect();
            store.ack(vec![Settle { failed, ..settle(user, epoch, &[], 0) }]).await.remove(0).unwrap();
            clock.advance(Duration::from_secs(1));
        }
    }
    let ids = async |filter: DeadFilter, limit: usize| {
        let (mut ids, mut after, mut pages) = (Vec::new(), None, 0);
        loop {
            let page = store.dead_letters(filter.clone(), after, limit).await.unwrap();
            assert!(page.letters.len() <= limit.max(1) && page.letters.iter().all(|l| l.payload.is_none()));
            ids.extend(page.letters.iter().map(|letter| letter.message_id.as_u128()));
            pages += 1;
            after = page.next;
            if after.is_none() {
                return (ids, pages);
            }
        }
    };
    let all = vec![24, 23, 22, 21, 14, 13, 12, 11, 4, 3, 2, 1];
    let everything = DeadFilter::default();
    for (limit, pages) in [(0, 12), (1, 12), (5, 3), (12, 1), (50, 1)] {
        assert_eq!(ids(everything.clone(), limit).await, (all.clone(), pages));
    }
    let of = |user: &str| DeadFilter { user: Some(user.to_owned()), ..DeadFilter::default() };
    assert_eq!(ids(of("a"), 3).await, (vec![4, 3, 2, 1], 2));
    assert_eq!(ids(of("a/b"), 9).await.0, [14, 13, 12, 11]);
    assert_eq!(ids(of("c"), 9).await.0, [0_u128; 0]);
    let second = |n: u64| Some(begin_us + n * 1_000_000);
    let window = DeadFilter { from_us: second(1), to_us: second(4), ..DeadFilter::default() };
    assert_eq!(ids(window.clone(), 2).await.0, [12, 11, 4, 3]);
    assert_eq!(ids(DeadFilter { user: Some("a".to_owned()), ..window }, 2).await.0, [4, 3]);
    let nothing = DeadFilter { from_us: second(4), to_us: second(1), ..DeadFilter::default() };
    assert_eq!(ids(nothing, 2).await.0, [0_u128; 0]);
    let reason = |reason| DeadFilter { reason: Some(reason), ..DeadFilter::default() };
    assert_eq!(ids(reason(DeadReason::MaxAttempts), 9).await.0, [0_u128; 0]);
    assert_eq!(ids(reason(DeadReason::Terminated), 9).await.0, all);
    // Sent again: out of the usual list.
    let name = |user: &str, id: u128| (user.to_owned(), Uuid::from_u128(id));
    let redriven = |user: &str, id| store.redriven(user.to_owned(), Uuid::from_u128(id), Uuid::from_u128(99));
    assert_eq!(redriven("a/b", 13).await, Ok(true));
    assert_eq!(redriven("a/b", 13).await, Ok(true));
    assert_eq!(redriven("a", 13).await, Ok(false));
    assert_eq!(ids(of("a/b"), 9).await.0, [14, 12, 11]);
    assert_eq!(ids(DeadFilter { redriven: true, ..of("a/b") }, 9).await.0, [14, 13, 12, 11]);
    let letter = store.dead_letter("a/b".to_owned(), Uuid::from_u128(13)).await.unwrap().unwrap();
    assert_eq!(letter.redriven_as, Some(Uuid::from_u128(99)));
    let gone = vec![name("a", 1), name("a", 4), name("b", 4), name("a", 4), name("nobody", 1)];
    assert_eq!(store.purge(gone.clone()).await, Ok(2));
    assert_eq!(store.purge(gone).await, Ok(0));
    assert_eq!(store.purge(Vec::new()).await, Ok(0));
    assert_eq!(ids(of("a"), 9).await.0, [3, 2]);
    assert_eq!(store.dead_letter("a".to_owned(), Uuid::from_u128(4)).await, Ok(None));
    drop(store);
    let store = harness.reopen().await;
    assert_eq!(store.stats().await.unwrap().dead_letters, 10);
}

/// A message that fails for good while the inbox has no room for another settled range stays dying, and ends as dead
/// whatever settles it; for a store that takes some hundred messages.
pub(crate) async fn dying_without_room(store: &dyn InboxStore, clock: &ManualClock) {
    let count = 2 * MAX_SETTLED_RANGES as u64 + 4;
    let epoch = send(store, clock, u128::from(count)).await;
    let even: Vec<(u64, u64)> = (1..=MAX_SETTLED_RANGES as u64).map(|n| (n * 2, n * 2)).collect();
    let acked = store.ack(vec![settle("bob", epoch, &even, 0)]).await.remove(0).unwrap();
    assert_eq!((acked.mark, acked.refused), (0, 0));
    let last = count - 1;
    let term = vec![failure(last, 1, FailureKind::Term, clock)];
    let verdict = fail(store, epoch, term.clone()).await;
    assert_eq!(verdict, [(last, Verdict::Dead(DeadReason::Terminated))]);
    // Nobody gets it, and it is not settled.
    assert_eq!(letters(store, DeadFilter::default()).await, [0_u64; 0]);
    assert_eq!(only(store, &[1, last]).await, [(1, 1)]);
    assert_eq!(store.stats().await.unwrap().unsettled, count - MAX_SETTLED_RANGES as u64);
    assert_eq!(fail(store, epoch, term).await, [], "it has been noted");
    clock.advance(Duration::from_secs(60));
    assert_eq!(claim(store, clock).await, []);
    // The 1 makes room. An ack comes too late.
    let acked = store.ack(vec![settle("bob", epoch, &[(1, 1), (last, last)], 0)]).await.remove(0).unwrap();
    assert_eq!(acked.messages.iter().map(|message| message.seq).collect::<Vec<_>>(), [1]);
    assert_eq!((acked.mark, acked.refused), (2, 0));
    assert_eq!(letters(store, DeadFilter::default()).await, [last]);
    let state =
        store.lookup("bob".to_owned(), Uuid::from_u128(u128::from(last))).await.unwrap().unwrap().state;
    assert_eq!(state, State::Dead);
    assert_eq!(store.stats().await.unwrap().unsettled, count - MAX_SETTLED_RANGES as u64 - 2);
}
