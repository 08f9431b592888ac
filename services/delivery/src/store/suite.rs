//! What every adapter of the store must do: fixed cases, and random operations against a model.

pub(crate) mod audit;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use proptest::prelude::*;
use sanjay_proto::client::v1::{Payload, SeqRange, payload::Kind};
use sanjay_runtime::clock::{Clock, ManualClock};
use uuid::Uuid;

use super::*;

/// Most unsettled messages of an inbox in the suite.
pub(crate) const MAX_UNSETTLED: u64 = 20;

/// Opens a store, and the same store again.
pub(crate) trait Harness {
    /// Whether the database removes by itself what is past its time.
    const SWEPT_BY_DATABASE: bool = false;

    fn clock(&self) -> &Arc<ManualClock>;
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
    }
}

pub(crate) fn settle(user: &str, epoch: u64, ranges: &[(u64, u64)], written: u64) -> Settle {
    let ranges = ranges.iter().map(|&(from, to)| SeqRange { from, to }).collect();
    Settle { user: user.to_owned(), epoch, ranges, written }
}

pub(crate) async fn read_all(store: &dyn InboxStore, user: &str) -> Page {
    let query = InboxQuery { user: user.to_owned(), after: None, limit: MAX_PAGE_MESSAGES };
    store.read(vec![query]).await.remove(0).unwrap()
}

fn seqs(page: &Page) -> Vec<u64> {
    page.messages.iter().map(|message| message.seq).collect()
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
    audit::cases(make).await;
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
    assert_eq!(full, Err(AppendError::QueueFull { unsettled: MAX_UNSETTLED }));
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
    let query = |user: &str, after, limit| InboxQuery { user: user.to_owned(), after, limit };
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
    assert_eq!(acked, Acked { mark: 1, messages: vec![named], refused: 0 });
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
    assert_eq!(store.stats().await, Ok(Stats { inboxes: 1, unsettled: 2, armed: 1 }));
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
    assert_eq!(store.stats().await, Ok(Stats { inboxes: 1, unsettled: 2, armed: 0 }));
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

/// A random operation.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    /// (user, payload, dedupe key; 0 for none) of each message.
    Append(Vec<(u8, u8, u8)>),
    /// User, ranges as (from, length), written, right epoch.
    Ack(u8, Vec<(u64, u64)>, u64, bool),
    Read(u8, Option<u64>, usize),
    Arm(u8),
    /// Claims, and parks or re-arms what it gets.
    Claim(bool),
    Advance(u64),
    Sweep,
    Reopen,
}

pub(crate) fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        6 => prop::collection::vec((0..3u8, 0..2u8, 0..4u8), 1..6).prop_map(Operation::Append),
        5 => (0..3u8, prop::collection::vec((1..40u64, 0..6u64), 0..4), 0..40u64, prop::bool::weighted(0.9))
            .prop_map(|(user, ranges, written, right)| Operation::Ack(user, ranges, written, right)),
        4 => (0..3u8, prop::option::of(0..40u64), 0..12usize)
            .prop_map(|(user, after, limit)| Operation::Read(user, after, limit)),
        1 => (0..3u8).prop_map(Operation::Arm),
        2 => any::<bool>().prop_map(Operation::Claim),
        2 => (0..200_000u64).prop_map(Operation::Advance),
        1 => Just(Operation::Sweep),
        1 => Just(Operation::Reopen),
    ];
    prop::collection::vec(operation, 1..60)
}

/// What an inbox should be.
#[derive(Default)]
struct ModelInbox {
    /// Payload and id by seq − 1.
    messages: Vec<(u8, Uuid)>,
    settled: BTreeSet<u64>,
    written: u64,
    /// Key → (payload, seq, accepted_us).
    keys: HashMap<u8, (u8, u64, u64)>,
}

impl ModelInbox {
    fn head(&self) -> u64 {
        self.messages.len() as u64
    }

    fn mark(&self) -> u64 {
        (1..=self.head()).take_while(|seq| self.settled.contains(seq)).count() as u64
    }

    fn unsettled(&self) -> Vec<u64> {
        (1..=self.head()).filter(|seq| !self.settled.contains(seq)).collect()
    }

    fn has_unwritten(&self) -> bool {
        self.written.max(self.mark()) < self.head()
    }
}

/// The store beside its model.
struct Pair<H> {
    harness: H,
    store: Option<Arc<dyn InboxStore>>,
    model: BTreeMap<u8, ModelInbox>,
    next_id: u128,
}

fn name(user: u8) -> String {
    format!("user-{user}")
}

/// Runs random operations on a store and on the model, comparing every answer.
pub(crate) async fn agrees_with_the_model<H: Harness>(mut harness: H, operations: Vec<Operation>) {
    let store = Some(harness.reopen().await);
    let mut pair = Pair { harness, store, model: BTreeMap::new(), next_id: 0 };
    for operation in operations {
        pair.apply(operation).await;
        pair.audit().await;
    }
}

impl<H: Harness> Pair<H> {
    fn store(&self) -> &Arc<dyn InboxStore> {
        self.store.as_ref().expect("it is open between operations")
    }

    async fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Append(items) => self.append(items).await,
            Operation::Ack(user, ranges, written, right) => self.ack(user, &ranges, written, right).await,
            Operation::Read(user, after, limit) => self.read(user, after, limit).await,
            Operation::Arm(user) => self.store().arm(vec![name(user)]),
            Operation::Claim(park) => self.claim(park).await,
            Operation::Advance(seconds) => self.harness.clock().advance(Duration::from_secs(seconds)),
            Operation::Sweep => {
                self.store().sweep(self.harness.clock().now_us(), 3).await.unwrap();
            }
            Operation::Reopen => {
                self.store = None;
                self.store = Some(self.harness.reopen().await);
            }
        }
    }

    async fn append(&mut self, items: Vec<(u8, u8, u8)>) {
        let clock = self.harness.clock().clone();
        let mut messages = Vec::new();
        for (user, body, key) in &items {
            self.next_id += 1;
            let key = if *key == 0 { String::new() } else { format!("key-{key}") };
            messages.push(message(&name(*user), self.next_id, &format!("body-{body}"), &key, &clock));
        }
        let results = self.store().append(messages.clone()).await;
        for (((user, body, key), message), result) in items.into_iter().zip(messages).zip(results) {
            let inbox = self.model.entry(user).or_default();
            let window = DEDUPE_WINDOW.as_micros() as u64;
            match inbox.keys.get(&key).filter(|(.., at)| at + window >= clock.now_us()) {
                Some((first, seq, _)) if *first == body => {
                    let appended = result.unwrap();
                    assert_eq!((appended.seq, appended.duplicate), (*seq, true));
                    assert_eq!(appended.message_id, inbox.messages[*seq as usize - 1].1);
                }
                Some(_) => assert!(matches!(result, Err(AppendError::AlreadyExists { .. }))),
                None if inbox.unsettled().len() as u64 >= MAX_UNSETTLED => {
                    assert!(matches!(result, Err(AppendError::QueueFull { .. })));
                }
                None => {
                    inbox.messages.push((body, message.message_id));
                    let appended = result.unwrap();
                    assert_eq!((appended.seq, appended.duplicate), (inbox.head(), false));
                    if key != 0 {
                        inbox.keys.insert(key, (body, inbox.head(), clock.now_us()));
                    }
                }
            }
        }
    }

    async fn ack(&mut self, user: u8, ranges: &[(u64, u64)], written: u64, right: bool) {
        let ranges: Vec<_> = ranges.iter().map(|&(from, length)| (from, from + length)).collect();
        let epoch = read_all(&**self.store(), &name(user)).await.epoch;
        let epoch = if right { epoch } else { epoch.wrapping_add(1) };
        let acked =
            self.store().ack(vec![settle(&name(user), epoch, &ranges, written)]).await.remove(0).unwrap();
        let inbox = self.model.entry(user).or_default();
        let mut expected = BTreeSet::new();
        if right {
            inbox.written = inbox.written.max(written.min(inbox.head()));
            let head = inbox.head();
            for seq in ranges.into_iter().flat_map(|(from, to)| from..=to).filter(|seq| *seq <= head) {
                if inbox.settled.insert(seq) {
                    expected.insert(seq);
                }
            }
        }
        assert_eq!((acked.mark, acked.refused), (inbox.mark(), 0));
        assert_eq!(acked.messages.iter().map(|message| message.seq).collect::<BTreeSet<_>>(), expected);
    }

    async fn read(&mut self, user: u8, after: Option<u64>, limit: usize) {
        let query = InboxQuery { user: name(user), after, limit };
        let page = self.store().read(vec![query]).await.remove(0).unwrap();
        let inbox = self.model.entry(user).or_default();
        let after = after.unwrap_or(inbox.mark());
        let above: Vec<u64> = inbox.unsettled().into_iter().filter(|seq| *seq > after).collect();
        let expected: Vec<u64> = above.iter().copied().take(limit).collect();
        assert_eq!(seqs(&page), expected);
        let covers = if expected.len() == above.len() {
            inbox.head()
        } else {
            expected.last().copied().unwrap_or(after)
        };
        assert_eq!((page.mark, page.head, page.covers), (inbox.mark(), inbox.head(), covers));
        for message in page.messages {
            let (body, id) = inbox.messages[message.seq as usize - 1];
            assert_eq!(message.payload, Some((*text(format!("body-{body}"))).clone()));
            assert_eq!(message.message_id[..], id.as_bytes()[..]);
        }
    }

    async fn claim(&mut self, park: bool) {
        let now_us = self.harness.clock().now_us();
        let claimed = self.store().claim_due(now_us, now_us + 30_000_000, 2).await.unwrap();
        let mut rearms = Vec::new();
        for inbox in claimed {
            let user =
                self.model.keys().copied().find(|user| name(*user) == inbox.user).expect("it has messages");
            let model = &self.model[&user];
            assert!(model.has_unwritten());
            assert_eq!(inbox.after, model.written.max(model.mark()));
            let next =
                if park { Next::Parked } else { Next::At { due_us: now_us + 1, attempt: inbox.attempt + 1 } };
            rearms.push(Rearm { user: inbox.user, armed: inbox.armed, next });
        }
        self.store().rearm(rearms).await.unwrap();
    }

    /// Accepted minus settled is what the inbox holds, and every receipt agrees.
    async fn audit(&self) {
        let mut unsettled = 0;
        for (user, inbox) in &self.model {
            let page = read_all(&**self.store(), &name(*user)).await;
            assert_eq!(seqs(&page), inbox.unsettled());
            unsettled += inbox.unsettled().len() as u64;
            if let Some((_, id)) = inbox.messages.last() {
                let receipt = self.store().lookup(name(*user), *id).await.unwrap();
                let settled = inbox.settled.contains(&inbox.head());
                match receipt {
                    Some(receipt) => assert_eq!(receipt.state.is_terminal(), settled),
                    // Its receipt may have been swept.
                    None => assert!(settled),
                }
            }
        }
        assert_eq!(self.store().stats().await.unwrap().unsettled, unsettled);
        let inboxes = self.model.values().filter(|inbox| inbox.head() > 0).count();
        assert_eq!(audit::audit_all(&**self.store()).await, (inboxes, vec![]));
    }
}
