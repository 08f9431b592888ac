//! What every adapter of the store must do: fixed cases, and random operations against a model.

pub(crate) mod audit;

use std::{collections::HashSet, sync::Arc, time::Duration};

use parking_lot::Mutex;
use sanjay_proto::client::v1::{Payload, SeqRange, payload::Kind};
use sanjay_runtime::{
    clock::{Clock, ManualClock},
    random::{OsRandom, Random},
};
use uuid::Uuid;

use super::*;

mod devices;
pub(crate) mod ending;
pub(crate) mod failing;
pub(crate) mod fanout;
mod model;
mod receipts;
pub(crate) mod revocations;
mod scheduled;

pub(crate) use model::{agrees_with_the_model, operations, read_log};

/// Most unsettled messages of an inbox in the suite.
pub(crate) const MAX_UNSETTLED: u64 = 20;

/// Opens a store, and the same store again.
pub(crate) trait Harness {
    /// Whether the database removes by itself what is past its time.
    const SWEPT_BY_DATABASE: bool = false;

    fn clock(&self) -> &Arc<ManualClock>;
    /// Sets what the store is opened with from now on.
    fn set(&mut self, limits: Limits);
    /// Closes the store, when it is open, and opens it.
    fn reopen(&mut self) -> impl Future<Output = Arc<dyn InboxStore>>;
    /// Removes a body behind the store's back.
    fn lose_body(
        &mut self,
        store: Arc<dyn InboxStore>,
        user: &str,
        seq: u64,
    ) -> impl Future<Output = Arc<dyn InboxStore>>;
}

/// What a case asks of its store.
#[derive(Clone)]
pub(crate) struct Limits {
    pub(crate) max_unsettled: u64,
    pub(crate) max_unsettled_bytes: u64,
    pub(crate) overflow: Overflow,
    pub(crate) keep_expired: bool,
    pub(crate) on_commit: Arc<dyn CommitSink>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_unsettled: MAX_UNSETTLED,
            max_unsettled_bytes: u64::MAX,
            overflow: Overflow::Reject,
            keep_expired: false,
            on_commit: Arc::new(()),
        }
    }
}

impl std::fmt::Debug for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { max_unsettled, max_unsettled_bytes, overflow, keep_expired, .. } = self;
        write!(
            f,
            "{max_unsettled} messages, {max_unsettled_bytes} bytes, {overflow:?}, keep expired: {keep_expired}"
        )
    }
}

/// A message that the sink was told of: whose, which, and what it ended as.
pub(crate) type EndedMessage = (String, SettledMessage, State);

/// A sink that remembers what ended.
#[derive(Default)]
pub(crate) struct Heard {
    committed: Mutex<HashSet<Uuid>>,
    ended: Mutex<Vec<EndedMessage>>,
    /// Those of which it had not heard before that they were committed.
    early: Mutex<Vec<Uuid>>,
}

impl Heard {
    /// What it heard since it was last asked.
    pub(crate) fn take(&self) -> Vec<EndedMessage> {
        assert_eq!(*self.early.lock(), Vec::<Uuid>::new(), "these ended before they were committed");
        std::mem::take(&mut self.ended.lock())
    }
}

impl CommitSink for Heard {
    fn committed(&self, message: &NewMessage, _: &Appended) {
        self.committed.lock().insert(message.message_id);
    }

    fn died(&self, _: DeadReason, _: usize) {}

    fn ended(&self, user: &str, message: &SettledMessage, state: State) {
        if !self.committed.lock().contains(&message.message_id) {
            self.early.lock().push(message.message_id);
        }
        self.ended.lock().push((user.to_owned(), message.clone(), state));
    }
}

pub(crate) fn text(text: impl Into<String>) -> Arc<Payload> {
    Arc::new(Payload { kind: Some(Kind::Text(text.into())) })
}

pub(crate) fn message(user: &str, id: u128, body: &str, key: &str, clock: &ManualClock) -> NewMessage {
    NewMessage {
        user: user.to_owned(),
        caller: "shop".to_owned(),
        message_id: Uuid::from_u128(id),
        payload: text(body),
        dedupe_key: key.to_owned(),
        time_us: clock.now_us(),
        trace: String::new(),
        ..NewMessage::default()
    }
}

pub(crate) fn settle(user: &str, epoch: u64, ranges: &[(u64, u64)], written: u64) -> Settle {
    let ranges = ranges.iter().map(|&(from, to)| SeqRange { from, to }).collect();
    Settle { user: user.to_owned(), epoch, ranges, written, ..Settle::default() }
}

pub(crate) fn query(user: &str, after: Option<u64>, limit: usize) -> InboxQuery {
    InboxQuery { user: user.to_owned(), after, limit, only: Vec::new(), device: None }
}

pub(crate) async fn read_all(store: &dyn InboxStore, user: &str) -> Page {
    store.read(vec![query(user, None, MAX_PAGE_MESSAGES)]).await.remove(0).unwrap()
}

fn seqs(page: &Page) -> Vec<u64> {
    page.messages.iter().map(|message| message.seq).collect()
}

/// What a page holds, as (seq, delivery).
fn deliveries(page: &Page) -> Vec<(u64, u32)> {
    page.messages.iter().map(|message| (message.seq, message.delivery)).collect()
}

/// Runs every fixed case, each on a store of its own.
pub(crate) async fn fixed_cases<H: Harness>(make: impl Fn() -> H) {
    pipelined_appends_keep_their_order(make()).await;
    epochs_are_there_before_the_first_message(make()).await;
    dedupe_keys_are_scoped_and_expire(make()).await;
    pages_are_bounded(make()).await;
    receipts_are_kept_for_their_time(make()).await;
    odd_acks_change_nothing(make()).await;
    what_is_unwritten_becomes_due(make()).await;
    parking_holds_until_something_arms(make()).await;
    audit::cases(&make).await;
    devices::fixed_cases(&make).await;
    failing::fixed_cases(&make).await;
    ending::fixed_cases(&make).await;
    fanout::fixed_cases(&make).await;
    scheduled::fixed_cases(&make).await;
    revocations::fixed_cases(&make).await;
    receipts::fixed_cases(make).await;
}

async fn pipelined_appends_keep_their_order<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let append = |id: u128| store.append(vec![message("bob", id, "x", "", harness.clock())]);
    // Submitted in order, awaited in the opposite one.
    let pending: Vec<_> = (1..=MAX_UNSETTLED as u128).map(append).collect();
    for (index, pending) in pending.into_iter().enumerate().rev() {
        assert_eq!(pending.await.remove(0).unwrap().seq, index as u64 + 1);
    }
    let full = append(99).await.remove(0);
    assert_eq!(full, Err(AppendError::QueueFull { quota: Quota::Messages, held: MAX_UNSETTLED }));
    let other = store.append(vec![message("eve", 1, "x", "", harness.clock())]).await.remove(0);
    assert_eq!(other.unwrap().seq, 1);
}

async fn epochs_are_there_before_the_first_message<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let before = read_all(&*store, "bob").await;
    assert_eq!((before.mark, before.head, before.covers), (0, 0, 0));
    let appended = store.append(vec![message("bob", 1, "x", "", harness.clock())]).await.remove(0).unwrap();
    assert_eq!(appended.epoch, before.epoch);
    assert_ne!(read_all(&*store, "eve").await.epoch, before.epoch);
    drop(store);
    assert_eq!(read_all(&*harness.reopen().await, "bob").await.epoch, before.epoch);
}

async fn dedupe_keys_are_scoped_and_expire<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let first = store.append(vec![message("bob", 1, "x", "k", &clock)]).await.remove(0).unwrap();
    clock.advance(Duration::from_secs(60));
    // In one call with the original of another user, and after a reopen.
    drop(store);
    let store = harness.reopen().await;
    let mut mail = message("bob", 2, "x", "k", &clock);
    mail.caller = "mail".to_owned();
    let batch = vec![
        message("bob", 3, "x", "k", &clock),
        message("bob", 4, "y", "k", &clock),
        mail,
        message("eve", 5, "y", "k", &clock),
        message("eve", 6, "y", "k", &clock),
    ];
    let results = store.append(batch).await;
    assert_eq!(results[0], Ok(Appended { duplicate: true, ..first.clone() }));
    assert_eq!(results[1], Err(AppendError::AlreadyExists { key: "k".to_owned() }));
    assert_eq!(results[2].as_ref().unwrap().seq, 2);
    assert_eq!((results[3].as_ref().unwrap().seq, results[3].as_ref().unwrap().duplicate), (1, false));
    assert_eq!((results[4].as_ref().unwrap().seq, results[4].as_ref().unwrap().duplicate), (1, true));
    clock.advance(DEDUPE_WINDOW);
    let again = store.append(vec![message("bob", 7, "z", "k", &clock)]).await.remove(0).unwrap();
    assert_eq!((again.seq, again.duplicate), (3, false));
    // The sweep removes the old entry and must keep the key's newer use.
    store.sweep(clock.now_us(), 100).await.unwrap();
    assert!(store.append(vec![message("bob", 8, "z", "k", &clock)]).await.remove(0).unwrap().duplicate);
}

async fn pages_are_bounded<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let body = "x".repeat(60_000);
    for id in 1..=MAX_UNSETTLED as u128 {
        let users = ["a", "b", "c", "d"].map(|user| message(user, id, &body, "", harness.clock()));
        store.append(users.to_vec()).await.into_iter().for_each(|result| assert!(result.is_ok()));
    }
    let all =
        vec![query("a", None, 500), query("b", None, 500), query("c", None, 500), query("d", None, 500)];
    let pages: Vec<Page> = store.read(all).await.into_iter().map(Result::unwrap).collect();
    let bytes: usize =
        pages.iter().map(|page| page.messages.iter().map(prost::Message::encoded_len).sum::<usize>()).sum();
    assert!(bytes <= MAX_READ_BYTES);
    for page in &pages {
        assert_eq!(page.covers, page.messages.len() as u64);
    }
    assert_eq!(pages[0].messages.len(), MAX_PAGE_BYTES / 60_030);
    let rest = store.read(vec![query("a", Some(pages[0].covers), 500)]).await.remove(0).unwrap();
    assert_eq!((rest.covers, rest.head), (MAX_UNSETTLED, MAX_UNSETTLED));
    let head = store.read(vec![query("a", None, 0), query("a", Some(500), 5)]).await;
    assert_eq!(head[0].as_ref().unwrap().covers, 0);
    assert_eq!(head[1].as_ref().unwrap().covers, MAX_UNSETTLED);
}

async fn receipts_are_kept_for_their_time<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let accepted_us = clock.now_us();
    let batch = vec![message("bob", 1, "x", "k", &clock), message("bob", 2, "x", "", &clock)];
    let epoch = store.append(batch).await.remove(0).unwrap().epoch;
    let look = |id| store.lookup("bob".to_owned(), Uuid::from_u128(id));
    let open = Receipt { seq: 1, state: State::Accepted, accepted_us, settled_us: 0 };
    assert_eq!(look(1).await, Ok(Some(open.clone())));
    clock.advance(Duration::from_secs(5));
    let acked = store.ack(vec![settle("bob", epoch, &[(1, 1)], 0)]).await.remove(0).unwrap();
    let named = SettledMessage { seq: 1, message_id: Uuid::from_u128(1), accepted_us, trace: String::new() };
    assert_eq!(acked, Acked { mark: 1, messages: vec![named], ..Acked::default() });
    let settled = Receipt { state: State::Acked, settled_us: clock.now_us(), ..open };
    assert_eq!(look(1).await, Ok(Some(settled)));
    assert_eq!(look(3).await, Ok(None));
    assert_eq!(store.lookup("eve".to_owned(), Uuid::from_u128(1)).await, Ok(None));
    assert_eq!(store.sweep(clock.now_us(), 100).await, Ok(0));
    clock.advance(RECEIPT_RETENTION + Duration::from_micros(1));
    if !H::SWEPT_BY_DATABASE {
        assert_eq!(store.sweep(clock.now_us(), 1).await, Ok(1));
        assert_eq!(store.sweep(clock.now_us(), 100).await, Ok(1));
    }
    assert_eq!(store.sweep(clock.now_us(), 100).await, Ok(0));
    assert_eq!(look(1).await, Ok(None));
    // What is not settled stays, however old it is.
    assert!(look(2).await.unwrap().is_some());
    assert_eq!(seqs(&read_all(&*store, "bob").await), [2]);
}

async fn odd_acks_change_nothing<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let mut epoch = 0;
    let mut seq = 0;
    // Every second message stays open, until the inbox is full.
    for _ in 0..MAX_UNSETTLED {
        let batch = vec![message("bob", seq + 1, "x", "", &clock), message("bob", seq + 2, "x", "", &clock)];
        let results = store.append(batch).await;
        let Ok(second) = &results[1] else { break };
        (epoch, seq) = (second.epoch, seq + 2);
        let acked =
            store.ack(vec![settle("bob", epoch, &[(seq as u64, seq as u64)], 0)]).await.remove(0).unwrap();
        assert_eq!((acked.mark, acked.refused), (0, 0));
    }
    // Acking what is above the head, or again, or under another epoch, changes nothing.
    let page = read_all(&*store, "bob").await;
    let odd = [
        settle("bob", epoch, &[(0, 0), (2, 2), (9, 8), (page.head + 1, u64::MAX)], 0),
        settle("bob", epoch ^ 1, &[(1, u64::MAX)], u64::MAX),
    ];
    for result in store.ack(odd.to_vec()).await {
        assert_eq!(result, Ok(Acked::default()));
    }
    assert_eq!(read_all(&*store, "bob").await, page);
    let acked = store.ack(vec![settle("bob", epoch, &[(1, u64::MAX)], 0)]).await.remove(0).unwrap();
    assert_eq!(acked.mark, page.head);
    assert_eq!(read_all(&*store, "bob").await.messages, []);
}

async fn what_is_unwritten_becomes_due<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let batch = vec![message("bob", 1, "x", "", &clock), message("bob", 2, "x", "", &clock)];
    let epoch = store.append(batch).await.remove(0).unwrap().epoch;
    let claim = |hold: Duration| {
        let now_us = clock.now_us();
        store.claim_due(now_us, now_us + hold.as_micros() as u64, 10)
    };
    let hold = Duration::from_secs(30);
    assert_eq!(claim(hold).await, Ok(vec![]));
    assert_eq!(
        store.stats().await,
        Ok(Stats { inboxes: 1, unsettled: 2, armed: 1, dead_letters: 0, scheduled: 0 })
    );
    clock.advance(FIRST_DUE);
    let claimed = claim(hold).await.unwrap();
    assert_eq!(claimed.len(), 1);
    assert_eq!(
        (claimed[0].user.as_str(), claimed[0].epoch, claimed[0].attempt, claimed[0].after),
        ("bob", epoch, 0, 0)
    );
    // Claimed once, until the claim ends or says when it is due again.
    assert_eq!(claim(hold).await, Ok(vec![]));
    clock.advance(hold);
    assert_eq!(claim(hold).await.unwrap(), claimed);
    let due_us = clock.now_us() + 5;
    let next = Next::At { due_us, attempt: 3 };
    store.rearm(vec![Rearm { user: "bob".to_owned(), armed: claimed[0].armed, next }]).await.unwrap();
    // An edge reports a part written.
    store.ack(vec![settle("bob", epoch, &[], 1)]).await.remove(0).unwrap();
    clock.advance(Duration::from_micros(5));
    drop(store);
    let store = harness.reopen().await;
    let again = store.claim_due(clock.now_us(), clock.now_us() + 1, 10).await.unwrap();
    assert_eq!((again[0].attempt, again[0].after), (3, 1));
    store.ack(vec![settle("bob", epoch, &[], 900)]).await.remove(0).unwrap();
    clock.advance(hold);
    assert_eq!(store.claim_due(clock.now_us(), clock.now_us() + 1, 10).await, Ok(vec![]));
    assert_eq!(
        store.stats().await,
        Ok(Stats { inboxes: 1, unsettled: 2, armed: 0, dead_letters: 0, scheduled: 0 })
    );
    store.arm(vec!["bob".to_owned()]);
    assert_eq!(seqs(&read_all(&*store, "bob").await), [1, 2]);
}

async fn parking_holds_until_something_arms<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    store.append(vec![message("bob", 1, "x", "", &clock)]).await.remove(0).unwrap();
    let claim = || store.claim_due(clock.now_us(), clock.now_us() + 30_000_000, 10);
    clock.advance(FIRST_DUE);
    let claimed = claim().await.unwrap().remove(0);
    let park = |armed| store.rearm(vec![Rearm { user: "bob".to_owned(), armed, next: Next::Parked }]);
    // A message that comes between claim and parking is not forgotten.
    store.append(vec![message("bob", 2, "x", "", &clock)]).await.remove(0).unwrap();
    park(claimed.armed).await.unwrap();
    clock.advance(FIRST_DUE);
    let claimed = claim().await.unwrap().remove(0);
    // Neither is a reader.
    store.arm(vec!["bob".to_owned(), "nobody".to_owned()]);
    // The hint is not awaited, but it is done before what is submitted for the user after it.
    store.ack(vec![settle("bob", claimed.epoch, &[], 0)]).await.remove(0).unwrap();
    park(claimed.armed).await.unwrap();
    clock.advance(FIRST_DUE);
    let claimed = claim().await.unwrap().remove(0);
    park(claimed.armed).await.unwrap();
    clock.advance(Duration::from_secs(3_600));
    assert_eq!(claim().await, Ok(vec![]));
    store.arm(vec!["bob".to_owned()]);
    store.ack(vec![settle("bob", claimed.epoch, &[], 0)]).await.remove(0).unwrap();
    clock.advance(FIRST_DUE);
    assert_eq!(claim().await.unwrap()[0].user, "bob");
}
