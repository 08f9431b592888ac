//! What every adapter must do with messages that end without an ack: fixed cases.

use super::{
    failing::{NAK, failure},
    *,
};
use crate::store::FailureKind;

mod quotas;
mod without_room;

/// What a case goes by.
struct Case<H> {
    harness: H,
    store: Arc<dyn InboxStore>,
    clock: Arc<ManualClock>,
    heard: Arc<Heard>,
}

impl<H: Harness> Case<H> {
    async fn new(mut harness: H, limits: Limits) -> Self {
        let heard = Arc::new(Heard::default());
        harness.set(Limits { on_commit: heard.clone(), ..limits });
        let store = harness.reopen().await;
        let clock = harness.clock().clone();
        Self { harness, store, clock, heard }
    }

    /// Closes the store and opens it again.
    async fn reopen(self) -> Self {
        let Self { mut harness, store, clock, heard } = self;
        drop(store);
        let store = harness.reopen().await;
        Self { harness, store, clock, heard }
    }

    /// A message that expires so many seconds from now, unless that is 0, and has a collapse key.
    fn message(&self, id: u128, seconds: u64, collapse: &str) -> NewMessage {
        let expires_us = if seconds == 0 { 0 } else { self.clock.now_us() + seconds * 1_000_000 };
        NewMessage {
            expires_us,
            collapse_key: collapse.to_owned(),
            ..message("bob", id, &format!("body-{id}"), "", &self.clock)
        }
    }

    async fn append(&self, messages: Vec<NewMessage>) -> Vec<Result<Appended, AppendError>> {
        let results = self.store.append(messages).await;
        self.ack(&[], 0).await;
        results
    }

    /// Appends messages that must be taken; returns their seqs.
    async fn send(&self, messages: Vec<NewMessage>) -> Vec<u64> {
        self.append(messages).await.into_iter().map(|result| result.unwrap().seq).collect()
    }

    async fn epoch(&self) -> u64 {
        read_all(&*self.store, "bob").await.epoch
    }

    async fn ack(&self, ranges: &[(u64, u64)], written: u64) -> Acked {
        let settle = settle("bob", self.epoch().await, ranges, written);
        self.store.ack(vec![settle]).await.remove(0).unwrap()
    }

    /// What a reader gets.
    async fn seqs(&self) -> Vec<u64> {
        seqs(&read_all(&*self.store, "bob").await)
    }

    async fn receipt(&self, id: u128) -> (u64, State, u64) {
        let found = self.store.lookup("bob".to_owned(), Uuid::from_u128(id)).await.unwrap().unwrap();
        (found.seq, found.state, found.settled_us)
    }

    /// Settles everything that has expired; returns how much that was.
    async fn expire(&self, limit: usize) -> usize {
        let mut settled = 0;
        loop {
            let expired = self.store.expire(self.clock.now_us(), limit).await.unwrap();
            settled += expired.settled;
            if !expired.more {
                return settled;
            }
        }
    }

    /// What the sink heard, as (seq, id, state).
    fn heard(&self) -> Vec<(u64, u128, State)> {
        let mut heard = self.heard.take();
        heard.sort_unstable_by_key(|(_, message, _)| message.seq);
        heard
            .into_iter()
            .map(|(_, message, state)| (message.seq, message.message_id.as_u128(), state))
            .collect()
    }

    /// Dead letters, the newest first, as (seq, reason).
    async fn letters(&self) -> Vec<(u64, DeadReason)> {
        let page = self.store.dead_letters(DeadFilter::default(), None, 100).await.unwrap();
        page.letters.iter().map(|letter| (letter.seq, letter.reason)).collect()
    }

    async fn whole(&self) {
        assert_eq!(audit::audit_all(&*self.store).await.1, []);
    }
}

/// Runs every case, each on a store of its own.
pub(super) async fn fixed_cases<H: Harness>(make: impl Fn() -> H) {
    what_expired_is_hidden_then_settled(make()).await;
    everything_expires_however_small_the_steps(make()).await;
    what_expires_forgets_its_attempts(make()).await;
    expired_messages_can_be_kept(make()).await;
    a_newer_message_replaces_one_of_its_key(make()).await;
    a_key_belongs_to_a_caller_and_an_inbox(make()).await;
    collapse_keys_are_bounded(make()).await;
    quotas::fixed_cases(&make).await;
    without_room::fixed_cases(make).await;
}

async fn what_expired_is_hidden_then_settled<H: Harness>(harness: H) {
    let case = Case::new(harness, Limits::default()).await;
    let mut first = case.message(1, 5, "");
    first.dedupe_key = "k".to_owned();
    let batch = vec![first, case.message(2, 0, ""), case.message(3, 5, ""), case.message(4, 10, "")];
    assert_eq!(case.send(batch).await, [1, 2, 3, 4]);
    case.clock.advance(Duration::from_secs(5) - Duration::from_micros(1));
    assert_eq!(case.seqs().await, [1, 2, 3, 4]);
    assert_eq!(case.expire(10).await, 0);
    case.clock.advance(Duration::from_micros(1));
    // Nobody gets it any more; it is not settled.
    let page = read_all(&*case.store, "bob").await;
    assert_eq!((seqs(&page), page.mark, page.head, page.covers), (vec![2, 4], 0, 4, 4));
    let only = InboxQuery { only: vec![1, 2, 3, 4], ..query("bob", None, 0) };
    assert_eq!(seqs(&case.store.read(vec![only]).await.remove(0).unwrap()), [2, 4]);
    assert_eq!(case.receipt(1).await, (1, State::Accepted, 0));
    // An ack still counts.
    assert_eq!(case.ack(&[(3, 3)], 0).await.messages.len(), 1);
    let case = case.reopen().await;
    let settled_us = case.clock.now_us();
    assert_eq!(case.store.expire(settled_us, 10).await.unwrap().settled, 1);
    assert_eq!(case.expire(10).await, 0);
    assert_eq!(case.heard(), [(1, 1, State::Expired)]);
    assert_eq!(case.receipt(1).await, (1, State::Expired, settled_us));
    assert_eq!(case.receipt(3).await, (3, State::Acked, settled_us));
    let page = read_all(&*case.store, "bob").await;
    assert_eq!((seqs(&page), page.mark), (vec![2, 4], 1));
    assert_eq!(case.store.stats().await.unwrap().unsettled, 2);
    assert_eq!(case.ack(&[(1, 1)], 0).await.messages, []);
    // Its dedupe key is still known.
    let again = NewMessage { dedupe_key: "k".to_owned(), ..case.message(1, 5, "") };
    let again = NewMessage { message_id: Uuid::from_u128(9), ..again };
    let again = case.store.append(vec![again]).await.remove(0).unwrap();
    assert_eq!((again.seq, again.duplicate), (1, true));
    case.clock.advance(Duration::from_secs(5));
    let case = case.reopen().await;
    assert_eq!((case.expire(1).await, case.seqs().await), (1, vec![2]));
    assert_eq!(case.heard(), [(4, 4, State::Expired)]);
    assert_eq!(case.letters().await, []);
    case.whole().await;
}

async fn everything_expires_however_small_the_steps<H: Harness>(harness: H) {
    let case = Case::new(harness, Limits::default()).await;
    let users = ["ann", "bob", "cat"];
    for user in users {
        let batch = (1..=6).map(|id| {
            // Every third lives on.
            let message = case.message(id, if id % 3 == 0 { 0 } else { 100 - id as u64 }, "");
            NewMessage { user: user.to_owned(), ..message }
        });
        case.store.append(batch.collect()).await.into_iter().for_each(|result| assert!(result.is_ok()));
    }
    case.clock.advance(Duration::from_secs(96));
    let first = case.store.expire(case.clock.now_us(), 1).await.unwrap();
    assert!(first.more && (1..6).contains(&first.settled), "{first:?}");
    // 4 and 5 of each have expired by now.
    assert_eq!(first.settled + case.expire(1).await, 6);
    case.clock.advance(Duration::from_secs(10));
    assert_eq!(case.expire(2).await, 6);
    assert_eq!(case.heard().len(), 12);
    for user in users {
        let page = read_all(&*case.store, user).await;
        assert_eq!((seqs(&page), page.mark), (vec![3, 6], 2));
    }
    case.whole().await;
}

async fn what_expires_forgets_its_attempts<H: Harness>(harness: H) {
    let case = Case::new(harness, Limits::default()).await;
    case.send(vec![case.message(1, 60, ""), case.message(2, 0, "k"), case.message(3, 0, "")]).await;
    let failed = [1, 2, 3].map(|seq| failure(seq, 1, NAK, &case.clock)).to_vec();
    let report = Settle { failed, ..settle("bob", case.epoch().await, &[], 3) };
    assert_eq!(case.store.ack(vec![report]).await.remove(0).unwrap().failed.len(), 3);
    case.send(vec![case.message(4, 0, "k")]).await;
    case.ack(&[], 4).await;
    case.clock.advance(Duration::from_secs(60));
    assert_eq!(case.expire(10).await, 1);
    assert_eq!(case.heard(), [(1, 1, State::Expired), (2, 2, State::Superseded)]);
    let now_us = case.clock.now_us();
    let claimed = case.store.claim_due(now_us, now_us + 1, 10).await.unwrap();
    assert_eq!(claimed.iter().map(|inbox| &inbox.retries[..]).collect::<Vec<_>>(), [&[(3, 2)][..]]);
    assert_eq!(case.seqs().await, [3, 4]);
}

async fn expired_messages_can_be_kept<H: Harness>(harness: H) {
    let limits = Limits { keep_expired: true, ..Limits::default() };
    let case = Case::new(harness, limits).await;
    case.send(vec![case.message(1, 60, ""), case.message(2, 60, ""), case.message(3, 0, "")]).await;
    let failed = vec![failure(2, 1, NAK, &case.clock)];
    let report = Settle { failed: failed.clone(), ..settle("bob", case.epoch().await, &[], 3) };
    case.store.ack(vec![report]).await.remove(0).unwrap();
    case.clock.advance(Duration::from_secs(60));
    let case = case.reopen().await;
    assert_eq!(case.expire(1).await, 2);
    assert_eq!(case.letters().await, [(2, DeadReason::Expired), (1, DeadReason::Expired)]);
    let died_us = case.clock.now_us();
    assert_eq!(case.receipt(2).await, (2, State::Dead, died_us));
    let letter = case.store.dead_letter("bob".to_owned(), Uuid::from_u128(2)).await.unwrap().unwrap();
    assert_eq!((letter.died_us, letter.failures, letter.payload), (died_us, failed, Some(text("body-2"))));
    assert_eq!((case.heard(), case.seqs().await), (vec![], vec![3]));
    assert_eq!(read_all(&*case.store, "bob").await.mark, 2);
    case.whole().await;
}

async fn a_newer_message_replaces_one_of_its_key<H: Harness>(harness: H) {
    let case = Case::new(harness, Limits::default()).await;
    let batch = vec![case.message(1, 0, "k"), case.message(2, 0, ""), case.message(3, 0, "other")];
    case.send(batch).await;
    assert_eq!(case.heard(), []);
    let case = case.reopen().await;
    case.clock.advance(Duration::from_secs(1));
    let settled_us = case.clock.now_us();
    assert_eq!(case.send(vec![case.message(4, 0, "k")]).await, [4]);
    assert_eq!(case.heard(), [(1, 1, State::Superseded)]);
    assert_eq!(case.receipt(1).await, (1, State::Superseded, settled_us));
    assert_eq!(case.receipt(4).await, (4, State::Accepted, 0));
    let page = read_all(&*case.store, "bob").await;
    assert_eq!((seqs(&page), page.mark), (vec![2, 3, 4], 1));
    // In one call: the last one stays.
    let case = case.reopen().await;
    let three = (5..8).map(|id| case.message(id, 0, "k")).collect();
    assert_eq!(case.send(three).await, [5, 6, 7]);
    let superseded = |n: u64| (n, u128::from(n), State::Superseded);
    assert_eq!(case.heard(), [4, 5, 6].map(superseded));
    assert_eq!(case.seqs().await, [2, 3, 7]);
    // What is settled is not replaced, and one that has expired is while it is not.
    case.ack(&[(7, 7)], 0).await;
    case.send(vec![case.message(8, 1, "k")]).await;
    case.clock.advance(Duration::from_secs(1));
    let retried = NewMessage { dedupe_key: "d".to_owned(), ..case.message(9, 0, "k") };
    case.send(vec![retried.clone()]).await;
    assert_eq!(case.heard(), [superseded(8)]);
    // A retry replaces nothing, whatever came meanwhile.
    case.send(vec![case.message(10, 0, "k")]).await;
    let again = NewMessage { message_id: Uuid::from_u128(11), ..retried };
    assert_eq!(case.send(vec![again]).await, [9]);
    assert_eq!((case.heard(), case.seqs().await), (vec![superseded(9)], vec![2, 3, 10]));
    assert_eq!(case.ack(&[(1, 10)], 0).await.messages.len(), 3);
    assert_eq!(case.store.stats().await.unwrap().unsettled, 0);
    case.whole().await;
}

async fn a_key_belongs_to_a_caller_and_an_inbox<H: Harness>(harness: H) {
    let case = Case::new(harness, Limits::default()).await;
    let mail = NewMessage { caller: "mail".to_owned(), ..case.message(2, 0, "k") };
    let ann = NewMessage { user: "ann".to_owned(), ..case.message(3, 0, "k") };
    case.send(vec![case.message(1, 0, "k"), mail.clone(), ann]).await;
    assert_eq!((case.heard(), case.seqs().await), (vec![], vec![1, 2]));
    case.send(vec![NewMessage { message_id: Uuid::from_u128(4), ..mail }]).await;
    assert_eq!((case.heard(), case.seqs().await), (vec![(2, 2, State::Superseded)], vec![1, 3]));
    assert_eq!(seqs(&read_all(&*case.store, "ann").await), [1]);
}

async fn collapse_keys_are_bounded<H: Harness>(harness: H) {
    let limits = Limits { max_unsettled: 1_000, ..Limits::default() };
    let case = Case::new(harness, limits).await;
    let most = MAX_COLLAPSE_KEYS as u64;
    let batch = (1..=most).map(|id| case.message(u128::from(id), 0, &format!("key-{id}"))).collect();
    case.send(batch).await;
    let case = case.reopen().await;
    let full = Err(AppendError::QueueFull { quota: Quota::CollapseKeys, held: most });
    assert_eq!(case.append(vec![case.message(500, 0, "more")]).await, [full]);
    // Without a key there is room, and for one that replaces another.
    let seqs = case.send(vec![case.message(501, 0, ""), case.message(502, 0, "key-7")]).await;
    assert_eq!((seqs, case.heard()), (vec![most + 1, most + 2], vec![(7, 7, State::Superseded)]));
    case.ack(&[(9, 9)], 0).await;
    assert_eq!(case.send(vec![case.message(503, 0, "more")]).await, [most + 3]);
    let full = case.append(vec![case.message(504, 0, "and more")]).await;
    assert!(matches!(full[0], Err(AppendError::QueueFull { quota: Quota::CollapseKeys, .. })), "{full:?}");
    case.whole().await;
}
