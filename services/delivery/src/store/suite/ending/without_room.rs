//! What ends in an inbox that has no room for another settled range.

use super::*;

/// How many messages the inbox is sent.
const COUNT: u64 = 2 * MAX_SETTLED_RANGES as u64 + 6;

/// Of which no neighbour is settled.
const LAST: u64 = COUNT - 1;

impl<H: Harness> Case<H> {
    /// An inbox in which every second message is settled, as far as it has room for that; `special` are those of its
    /// messages that are not plain.
    async fn crowded(harness: H, limits: Limits, special: &[(u64, u64, &str)]) -> Self {
        let case = Self::new(harness, limits).await;
        let batch = (1..=COUNT).map(|seq| {
            let special = special.iter().find(|(at, ..)| *at == seq);
            let (_, seconds, collapse) = special.copied().unwrap_or((seq, 0, ""));
            case.message(u128::from(seq), seconds, collapse)
        });
        assert_eq!(case.send(batch.collect()).await.last(), Some(&COUNT));
        let even: Vec<(u64, u64)> = (1..=MAX_SETTLED_RANGES as u64).map(|n| (n * 2, n * 2)).collect();
        let acked = case.ack(&even, COUNT).await;
        assert_eq!((acked.mark, acked.refused), (0, 0));
        case
    }

    /// Lets a message fail for good.
    async fn terminate(&self, seq: u64) {
        let failed = vec![failure(seq, 1, FailureKind::Term, &self.clock)];
        let report = Settle { failed, ..settle("bob", self.epoch().await, &[], 0) };
        assert_eq!(self.store.ack(vec![report]).await.remove(0).unwrap().failed.len(), 1);
    }

    async fn unsettled(&self) -> u64 {
        self.store.stats().await.unwrap().unsettled
    }
}

pub(super) async fn fixed_cases<H: Harness>(make: impl Fn() -> H) {
    what_cannot_expire_is_tried_again(make()).await;
    what_cannot_be_replaced_refuses(make()).await;
    a_dying_message_ends_as_dead(make()).await;
    the_oldest_always_have_room(make()).await;
}

fn roomy() -> Limits {
    Limits { max_unsettled: 10_000, ..Limits::default() }
}

async fn what_cannot_expire_is_tried_again<H: Harness>(harness: H) {
    let case = Case::crowded(harness, roomy(), &[(LAST, 10, "")]).await;
    let ann = |seconds| NewMessage { user: "ann".to_owned(), ..case.message(1, seconds, "") };
    let later = NewMessage { message_id: Uuid::from_u128(2), ..ann(30) };
    assert!(case.store.append(vec![ann(20), later]).await.iter().all(Result::is_ok));
    case.clock.advance(Duration::from_secs(10));
    assert_eq!(case.expire(1).await, 0);
    let only = InboxQuery { only: vec![1, LAST], ..query("bob", None, 0) };
    assert_eq!(seqs(&case.store.read(vec![only]).await.remove(0).unwrap()), [1], "nobody gets it");
    // It keeps no other from going, and goes when there is room and it is looked at again.
    case.clock.advance(Duration::from_secs(10));
    assert_eq!(case.expire(1).await, 1);
    let case = case.reopen().await;
    case.clock.advance(Duration::from_secs(60));
    assert_eq!(case.expire(1).await, 1);
    case.ack(&[(1, 1)], 0).await;
    assert_eq!(case.receipt(u128::from(LAST)).await.1, State::Accepted);
    case.clock.advance(Duration::from_secs(60));
    assert_eq!(case.expire(1).await, 1);
    assert_eq!(case.receipt(u128::from(LAST)).await.1, State::Expired);
    assert_eq!(case.heard.take().len(), 3);
    case.whole().await;
}

async fn what_cannot_be_replaced_refuses<H: Harness>(harness: H) {
    let case = Case::crowded(harness, roomy(), &[(3, 0, "three"), (LAST, 0, "last")]).await;
    let unsettled = case.unsettled().await;
    let full = AppendError::QueueFull { quota: Quota::SettledRanges, held: MAX_SETTLED_RANGES as u64 };
    assert_eq!(case.append(vec![case.message(1_001, 0, "last")]).await, [Err(full)]);
    assert_eq!((case.heard(), case.unsettled().await), (vec![], unsettled));
    // One between two that are settled needs no range, and makes room for another.
    assert_eq!(case.send(vec![case.message(1_002, 0, "three")]).await, [COUNT + 1]);
    assert_eq!(case.send(vec![case.message(1_003, 0, "last")]).await, [COUNT + 2]);
    let replaced = [3, LAST].map(|seq| (seq, u128::from(seq), State::Superseded));
    assert_eq!((case.heard(), case.unsettled().await), (replaced.to_vec(), unsettled));
    case.whole().await;
}

async fn a_dying_message_ends_as_dead<H: Harness>(harness: H) {
    let case = Case::crowded(harness, roomy(), &[(LAST, 10, "k")]).await;
    case.terminate(LAST).await;
    assert_eq!(case.letters().await, [], "there is no room to settle it");
    // Neither a newer message nor its time ends it otherwise.
    assert_eq!(case.send(vec![case.message(1_001, 0, "k")]).await, [COUNT + 1]);
    case.clock.advance(Duration::from_secs(10));
    assert_eq!((case.expire(10).await, case.heard()), (0, vec![]));
    let case = case.reopen().await;
    // The ack makes room, and the next one finishes what is dying.
    case.ack(&[(1, 1)], 0).await;
    case.ack(&[], 0).await;
    assert_eq!(case.letters().await, [(LAST, DeadReason::Terminated)]);
    assert_eq!(case.receipt(u128::from(LAST)).await.1, State::Dead);
    // The newer one is the one that the next replaces.
    case.ack(&[(3, 3)], 0).await;
    case.send(vec![case.message(1_002, 0, "k")]).await;
    assert_eq!(case.heard(), [(COUNT + 1, 1_001, State::Superseded)]);
    case.clock.advance(Duration::from_secs(60));
    assert_eq!((case.expire(10).await, case.heard()), (0, vec![]));
    case.whole().await;
}

async fn the_oldest_always_have_room<H: Harness>(harness: H) {
    let max_unsettled = COUNT - MAX_SETTLED_RANGES as u64;
    let limits = Limits { max_unsettled: COUNT, overflow: Overflow::DeadLetterOldest, ..Limits::default() };
    let mut case = Case::crowded(harness, limits.clone(), &[(1, 0, "k")]).await;
    case.harness.set(Limits { max_unsettled, on_commit: case.heard.clone(), ..limits });
    let case = case.reopen().await;
    assert_eq!(case.unsettled().await, max_unsettled);
    // What is dying counts no more, so this one takes its place.
    case.terminate(LAST).await;
    assert_eq!(case.send(vec![case.message(1_001, 0, "")]).await, [COUNT + 1]);
    assert_eq!(case.letters().await, []);
    // One that replaces the oldest needs no other to go.
    assert_eq!(case.send(vec![case.message(1_002, 0, "k")]).await, [COUNT + 2]);
    assert_eq!(case.heard(), [(1, 1, State::Superseded)]);
    case.send(vec![case.message(1_003, 0, ""), case.message(1_004, 0, "")]).await;
    let (mut letters, expected) = (
        case.letters().await,
        [(3, DeadReason::QueueFull), (5, DeadReason::QueueFull), (LAST, DeadReason::Terminated)],
    );
    letters.sort_unstable_by_key(|(seq, _)| *seq);
    assert_eq!(letters, expected);
    assert_eq!(case.unsettled().await, max_unsettled);
    case.whole().await;
}
