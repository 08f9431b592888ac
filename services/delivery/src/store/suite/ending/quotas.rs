//! What an inbox may hold, and what becomes of what is beyond.

use super::*;

/// How many bytes a payload of the cases takes.
const SIZE: u64 = 100;

impl<H: Harness> Case<H> {
    /// A message of [`SIZE`] bytes, or of so many times that.
    fn sized(&self, id: u128, times: u64) -> NewMessage {
        // The encoding needs two bytes for a text and its length up to 127, three above.
        let overhead = if times * SIZE < 130 { 2 } else { 3 };
        let payload = text("x".repeat((times * SIZE - overhead) as usize));
        assert_eq!(prost::Message::encoded_len(&*payload) as u64, times * SIZE);
        NewMessage { payload, ..self.message(id, 0, "") }
    }
}

fn full(quota: Quota, held: u64) -> Result<Appended, AppendError> {
    Err(AppendError::QueueFull { quota, held })
}

pub(super) async fn fixed_cases<H: Harness>(make: impl Fn() -> H) {
    beyond_its_bytes_an_inbox_refuses(make()).await;
    a_replacing_message_does_not_count_twice(make()).await;
    the_oldest_make_room(make()).await;
    as_many_go_as_the_bytes_need(make()).await;
    keys_come_before_quotas(make()).await;
}

async fn beyond_its_bytes_an_inbox_refuses<H: Harness>(harness: H) {
    let limits = Limits { max_unsettled_bytes: 5 * SIZE, ..Limits::default() };
    let case = Case::new(harness, limits).await;
    let results = case.append(vec![case.sized(1, 2), case.sized(2, 2), case.sized(3, 2)]).await;
    assert_eq!(results[2], full(Quota::Bytes, 4 * SIZE));
    assert_eq!(case.append(vec![case.sized(4, 6)]).await, [full(Quota::Bytes, 4 * SIZE)]);
    assert_eq!(case.send(vec![case.sized(5, 1)]).await, [3]);
    let case = case.reopen().await;
    assert_eq!(case.append(vec![case.sized(6, 1)]).await, [full(Quota::Bytes, 5 * SIZE)]);
    // Whatever settles a message makes room.
    case.ack(&[(1, 1)], 0).await;
    assert_eq!(case.send(vec![case.sized(7, 1)]).await, [4]);
    let term = vec![failure(2, 1, FailureKind::Term, &case.clock)];
    let report = Settle { failed: term, ..settle("bob", case.epoch().await, &[], 0) };
    case.store.ack(vec![report]).await.remove(0).unwrap();
    let expiring = NewMessage { expires_us: case.clock.now_us() + 1, ..case.sized(8, 3) };
    assert_eq!(case.send(vec![expiring]).await, [5]);
    case.clock.advance(Duration::from_micros(1));
    assert_eq!(case.append(vec![case.sized(9, 1)]).await, [full(Quota::Bytes, 5 * SIZE)]);
    assert_eq!(case.expire(1).await, 1);
    assert_eq!(case.append(vec![case.sized(9, 4)]).await, [full(Quota::Bytes, 2 * SIZE)]);
    assert_eq!(case.send(vec![case.sized(9, 3)]).await, [6]);
    case.whole().await;
}

async fn a_replacing_message_does_not_count_twice<H: Harness>(harness: H) {
    let limits = Limits { max_unsettled: 2, max_unsettled_bytes: 4 * SIZE, ..Limits::default() };
    let case = Case::new(harness, limits).await;
    let keyed = |id, times| NewMessage { collapse_key: "k".to_owned(), ..case.sized(id, times) };
    case.send(vec![keyed(1, 2), case.sized(2, 2)]).await;
    assert_eq!(case.append(vec![case.sized(3, 1)]).await, [full(Quota::Messages, 2)]);
    assert_eq!(case.send(vec![keyed(4, 2)]).await, [3]);
    assert_eq!(case.append(vec![keyed(5, 3)]).await, [full(Quota::Bytes, 2 * SIZE)]);
    // What was refused has replaced nothing.
    assert_eq!((case.heard(), case.seqs().await), (vec![(1, 1, State::Superseded)], vec![2, 3]));
    assert_eq!(case.send(vec![keyed(6, 1)]).await, [4]);
    case.ack(&[(2, 2)], 0).await;
    assert_eq!(case.send(vec![case.sized(7, 3)]).await, [5]);
    case.whole().await;
}

async fn the_oldest_make_room<H: Harness>(harness: H) {
    let limits = Limits { max_unsettled: 3, overflow: Overflow::DeadLetterOldest, ..Limits::default() };
    let case = Case::new(harness, limits).await;
    case.send(vec![case.message(1, 0, ""), case.message(2, 0, ""), case.message(3, 0, "")]).await;
    case.ack(&[(2, 2)], 0).await;
    let failed = vec![failure(3, 1, NAK, &case.clock)];
    let report = Settle { failed: failed.clone(), ..settle("bob", case.epoch().await, &[], 3) };
    case.store.ack(vec![report]).await.remove(0).unwrap();
    let case = case.reopen().await;
    case.clock.advance(Duration::from_secs(1));
    let died_us = case.clock.now_us();
    assert_eq!(case.send((4..8).map(|id| case.message(id, 0, "")).collect()).await, [4, 5, 6, 7]);
    assert_eq!(case.seqs().await, [5, 6, 7]);
    let dead = |seq| (seq, DeadReason::QueueFull);
    assert_eq!(case.letters().await, [4, 3, 1].map(dead));
    let letter = case.store.dead_letter("bob".to_owned(), Uuid::from_u128(3)).await.unwrap().unwrap();
    assert_eq!((letter.died_us, letter.failures, letter.payload), (died_us, failed, Some(text("body-3"))));
    assert_eq!(case.receipt(4).await, (4, State::Dead, died_us));
    assert_eq!((case.heard(), read_all(&*case.store, "bob").await.mark), (vec![], 4));
    assert_eq!(case.store.stats().await.unwrap().unsettled, 3);
    case.whole().await;
}

async fn as_many_go_as_the_bytes_need<H: Harness>(harness: H) {
    let limits = Limits {
        max_unsettled: 4,
        max_unsettled_bytes: 6 * SIZE,
        overflow: Overflow::DeadLetterOldest,
        ..Limits::default()
    };
    let case = Case::new(harness, limits).await;
    let keyed = |id, times| NewMessage { collapse_key: "k".to_owned(), ..case.sized(id, times) };
    case.send(vec![case.sized(1, 1), keyed(2, 2), case.sized(3, 2)]).await;
    // Nothing helps one that is larger than the whole.
    assert_eq!(case.append(vec![case.sized(4, 7)]).await, [full(Quota::Bytes, 5 * SIZE)]);
    assert_eq!((case.seqs().await, case.letters().await), (vec![1, 2, 3], vec![]));
    // What it replaces goes first, then the oldest, as many as it takes.
    assert_eq!(case.send(vec![keyed(5, 3)]).await, [4]);
    assert_eq!((case.seqs().await, case.letters().await), (vec![1, 3, 4], vec![]));
    assert_eq!(case.send(vec![case.sized(6, 3)]).await, [5]);
    let dead = |seq| (seq, DeadReason::QueueFull);
    assert_eq!((case.seqs().await, case.letters().await), (vec![4, 5], [3, 1].map(dead).to_vec()));
    assert_eq!(case.heard(), [(2, 2, State::Superseded)]);
    // The largest one needs it all. A key whose message died replaces nothing.
    let case = case.reopen().await;
    let keyed = |id, times| NewMessage { collapse_key: "k".to_owned(), ..case.sized(id, times) };
    assert_eq!(case.send(vec![case.sized(7, 6)]).await, [6]);
    assert_eq!(case.send(vec![keyed(8, 1)]).await, [7]);
    assert_eq!((case.seqs().await, case.heard()), (vec![7], vec![]));
    assert_eq!(case.letters().await.len(), 5);
    case.whole().await;
}

async fn keys_come_before_quotas<H: Harness>(harness: H) {
    let limits = Limits { max_unsettled: 1, max_unsettled_bytes: SIZE, ..Limits::default() };
    let case = Case::new(harness, limits).await;
    let keyed = |id, times| NewMessage { dedupe_key: "d".to_owned(), ..case.sized(id, times) };
    case.send(vec![keyed(1, 1)]).await;
    let results = case.append(vec![keyed(2, 1), keyed(3, 2), case.sized(4, 1)]).await;
    assert!(matches!(results[0], Ok(Appended { seq: 1, duplicate: true, .. })), "{results:?}");
    assert_eq!(results[1], Err(AppendError::AlreadyExists { key: "d".to_owned() }));
    assert_eq!(results[2], full(Quota::Messages, 1));
}
