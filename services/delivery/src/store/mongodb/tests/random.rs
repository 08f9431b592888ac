//! Random operations on two nodes, whose knowledge of an inbox is mostly old, beside a model of how messages end.

use std::{collections::BTreeMap, time::Duration};

use super::{
    ending::{Ended, told},
    faults::all,
    shapes::{inbox_of, look},
    *,
};
use crate::{
    message::State,
    store::{
        FailureKind, Overflow, Quota,
        suite::{
            audit::audit_all,
            failing::{NAK, failure},
            query, settle,
        },
    },
};

/// Bytes of text that an inbox holds in its payloads, with the two that each has beside.
const MAX_BYTES: u64 = 200;

/// A message to send: length of its text, collapse key and life in seconds, 0 for none.
type Sent = (usize, u8, u64);

#[derive(Debug, Clone)]
enum Operation {
    Append(Vec<Sent>),
    Ack(u64, u64),
    /// A failure of a message, for good or not.
    Fail(u64, bool),
    Expire(usize),
    Read(Option<u64>, usize),
    Advance(u64),
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    let sent = (1..40_usize, 0..4_u8, prop_oneof![3 => Just(0), 3 => 1..6_u64, 1 => Just(1_000)]);
    let large = (190..220_usize, 0..4_u8, Just(0));
    let sent = prop_oneof![20 => sent, 1 => large];
    prop_oneof![
        8 => prop::collection::vec(sent, 1..6).prop_map(Operation::Append),
        4 => (0..40_u64, 0..4_u64).prop_map(|(below, length)| Operation::Ack(below, length)),
        2 => (0..20_u64, any::<bool>()).prop_map(|(below, last)| Operation::Fail(below, last)),
        3 => (1..9_usize).prop_map(Operation::Expire),
        2 => (prop::option::of(0..40_u64), 1..12_usize).prop_map(|(after, limit)| Operation::Read(after, limit)),
        3 => (1..5_u64).prop_map(Operation::Advance),
        1 => Just(Operation::Reopen),
    ]
}

/// A message that was accepted; its seq is its place.
#[derive(Debug)]
struct Message {
    id: u128,
    bytes: u64,
    key: u8,
    expires_us: u64,
    waits: bool,
    state: State,
}

#[derive(Default)]
struct Model {
    messages: Vec<Message>,
    ended: BTreeMap<u128, Vec<State>>,
}

impl Model {
    fn open(&mut self) -> impl Iterator<Item = &mut Message> {
        self.messages.iter_mut().filter(|message| message.state == State::Accepted)
    }

    fn bytes(&mut self) -> u64 {
        self.open().map(|message| message.bytes).sum()
    }

    fn count(&self, state: State) -> i64 {
        self.messages.iter().filter(|message| message.state == state).count() as i64
    }

    /// What a reader gets above a seq.
    fn deliverable(&mut self, after: u64, now_us: u64) -> Vec<u64> {
        let hidden = |message: &Message| {
            message.state != State::Accepted || message.waits || (1..=now_us).contains(&message.expires_us)
        };
        let seqs = (1..).zip(&self.messages).filter(|(seq, message)| *seq > after && !hidden(message));
        seqs.map(|(seq, _)| seq).collect()
    }

    /// Puts a message in, or says which quota refuses it.
    fn append(&mut self, message: Message, overflow: Overflow) -> Result<(), Quota> {
        let key = message.key;
        let old = self.open().find(|old| key != 0 && old.key == key).map(|old| (old.id, old.bytes));
        let (old_count, old_bytes) = old.map_or((0, 0), |(_, bytes)| (1, bytes));
        if message.bytes > MAX_BYTES {
            return Err(Quota::Bytes);
        }
        loop {
            let full = if self.count(State::Accepted) as u64 - old_count >= MAX_UNSETTLED {
                Quota::Messages
            } else if self.bytes() - old_bytes + message.bytes > MAX_BYTES {
                Quota::Bytes
            } else {
                break;
            };
            if overflow == Overflow::Reject {
                return Err(full);
            }
            let oldest = self.open().find(|message| old.is_none_or(|(id, _)| id != message.id));
            oldest.expect("something takes the room").state = State::Dead;
        }
        if let Some((id, _)) = old {
            self.open().find(|old| old.id == id).unwrap().state = State::Superseded;
            self.ended.entry(id).or_default().push(State::Superseded);
        }
        self.messages.push(message);
        Ok(())
    }
}

struct Pair {
    case: Case,
    ended: Arc<Ended>,
    nodes: [MongoStore; 2],
    epoch: u64,
    model: Model,
}

impl Pair {
    async fn apply(&mut self, node: usize, operation: Operation) {
        match operation {
            Operation::Append(sent) => self.append(node, sent).await,
            Operation::Ack(below, length) => self.ack(node, below, length).await,
            Operation::Fail(below, last) => self.fail(node, below, last).await,
            Operation::Expire(limit) => self.expire(node, limit).await,
            Operation::Read(after, limit) => self.read(node, after, limit).await,
            Operation::Advance(seconds) => self.case.clock.advance(Duration::from_secs(seconds)),
            Operation::Reopen => self.nodes[node] = self.case.open().await,
        }
        self.check(1 - node).await;
    }

    async fn append(&mut self, node: usize, sent: Vec<Sent>) {
        let (mut messages, now_us) = (Vec::new(), self.case.clock.now_us());
        let first = messages.len() as u128 + 1 + self.model.messages.len() as u128 * 1_000;
        for (id, (length, key, life)) in (first..).zip(&sent) {
            let sent = message("bob", id, &"x".repeat(*length), "", &self.case.clock);
            let collapse_key = if *key == 0 { String::new() } else { format!("key-{key}") };
            let expires_us = if *life == 0 { 0 } else { now_us + life * 1_000_000 };
            messages.push(NewMessage { collapse_key, expires_us, ..sent });
        }
        let answers = self.nodes[node].append(messages.clone()).await;
        // What died for room is settled before what follows.
        self.nodes[node].ack(vec![settle("bob", self.epoch, &[], 0)]).await.remove(0).unwrap();
        for ((message, (_, key, _)), answer) in messages.into_iter().zip(sent).zip(answers) {
            let message = Message {
                id: message.message_id.as_u128(),
                bytes: message.payload.encoded_len() as u64,
                key,
                expires_us: message.expires_us,
                waits: false,
                state: State::Accepted,
            };
            match (answer, self.model.append(message, self.case.overflow)) {
                (Ok(appended), Ok(())) => assert_eq!(appended.seq, self.model.messages.len() as u64),
                (Err(AppendError::QueueFull { quota, .. }), Err(expected)) => assert_eq!(quota, expected),
                (answer, expected) => panic!("{answer:?}, and not {expected:?}"),
            }
        }
    }

    /// A seq that is so far below the head.
    fn seq(&self, below: u64) -> u64 {
        (self.model.messages.len() as u64).saturating_sub(below).max(1)
    }

    async fn ack(&mut self, node: usize, below: u64, length: u64) {
        let (from, to) = (self.seq(below), self.seq(below) + length);
        let ack = settle("bob", self.epoch, &[(from, to)], 0);
        let acked = self.nodes[node].ack(vec![ack]).await.remove(0).unwrap();
        let mut expected = Vec::new();
        for (seq, message) in (1..).zip(&mut self.model.messages) {
            if (from..=to).contains(&seq) && message.state == State::Accepted {
                message.state = State::Acked;
                expected.push(seq);
            }
        }
        assert_eq!(acked.messages.iter().map(|message| message.seq).collect::<Vec<_>>(), expected);
    }

    async fn fail(&mut self, node: usize, below: u64, last: bool) {
        let seq = self.seq(below);
        let kind = if last { FailureKind::Term } else { NAK };
        let failed = vec![failure(seq, 1, kind, &self.case.clock)];
        let report = Settle { failed, ..settle("bob", self.epoch, &[], 0) };
        let taken = self.nodes[node].ack(vec![report]).await.remove(0).unwrap().failed.len();
        let message = self.model.messages.get_mut(seq as usize - 1);
        let message = message.filter(|message| message.state == State::Accepted && !message.waits);
        assert_eq!(taken, usize::from(message.is_some()));
        if let Some(message) = message {
            (message.waits, message.state) = (true, if last { State::Dead } else { State::Accepted });
        }
    }

    async fn expire(&mut self, node: usize, limit: usize) {
        let now_us = self.case.clock.now_us();
        let (mut settled, mut more) = (0, true);
        while more {
            let expired = self.nodes[node].expire(now_us, limit).await.unwrap();
            assert!(expired.settled <= limit);
            (settled, more) = (settled + expired.settled, expired.more);
        }
        let keep = self.case.keep_expired;
        let mut ended = Vec::new();
        for message in self.model.open().filter(|message| (1..=now_us).contains(&message.expires_us)) {
            message.state = if keep { State::Dead } else { State::Expired };
            ended.push(message.id);
        }
        assert_eq!(settled, ended.len());
        for id in ended.into_iter().filter(|_| !keep) {
            self.model.ended.entry(id).or_default().push(State::Expired);
        }
    }

    async fn read(&mut self, node: usize, after: Option<u64>, limit: usize) {
        let page = self.nodes[node].read(vec![query("bob", after, limit)]).await.remove(0).unwrap();
        let after = after.unwrap_or(page.mark);
        let deliverable = self.model.deliverable(after, self.case.clock.now_us());
        let expected = &deliverable[..deliverable.len().min(limit)];
        assert_eq!(page.messages.iter().map(|message| message.seq).collect::<Vec<_>>(), expected);
        let whole = expected.len() == deliverable.len();
        assert_eq!(page.covers, if whole { page.head } else { expected[expected.len() - 1] });
    }

    /// Compares everything.
    async fn check(&mut self, node: usize) {
        let store = &self.nodes[node];
        for (seq, message) in (1..).zip(&self.model.messages) {
            let found = store.lookup("bob".to_owned(), Uuid::from_u128(message.id)).await.unwrap().unwrap();
            assert_eq!((found.seq, found.state), (seq, message.state), "{message:?}");
        }
        assert_eq!(*self.ended.0.lock(), self.model.ended);
        let deliverable = self.model.deliverable(0, self.case.clock.now_us());
        assert!(all(store, "bob").await.into_iter().map(|(seq, _)| seq).eq(deliverable));
        let stats = store.stats().await.unwrap();
        let expected = [State::Accepted, State::Dead].map(|state| self.model.count(state) as u64);
        assert_eq!([stats.unsettled, stats.dead_letters], expected);
        if self.model.messages.is_empty() {
            return;
        }
        let inbox = inbox_of(&look(&self.case, "inbox").await, "bob").await;
        let counted = ["acked", "expired", "superseded", "dead", "bytes"];
        let counted = counted.map(|name| inbox.get_i64(name).unwrap_or_default());
        let states = [State::Acked, State::Expired, State::Superseded, State::Dead];
        let mut expected = states.map(|state| self.model.count(state)).to_vec();
        expected.push(self.model.bytes() as i64);
        assert_eq!(counted[..], expected[..]);
        let keyed = (1..).zip(&self.model.messages).filter(|(_, m)| m.key != 0 && m.state == State::Accepted);
        let keyed: Vec<i64> = keyed.map(|(seq, _)| seq).collect();
        let found = inbox.get_array("collapse").cloned().unwrap_or_default();
        let found = found.iter().map(|entry| entry.as_document().unwrap().get_i64("n").unwrap());
        assert!(found.eq(keyed), "{inbox}");
        assert_eq!(audit_all(store).await, (1, vec![]));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 64, ..ProptestConfig::default() })]

    #[test]
    fn messages_end_as_the_model_says(
        operations in prop::collection::vec((0..2_usize, operation()), 1..50),
        small: bool,
        reject: bool,
        keep: bool,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut case, ended) = told(Case::on(Mongo::shared().await));
            case.overflow = if reject { Overflow::Reject } else { Overflow::DeadLetterOldest };
            (case.max_unsettled_bytes, case.keep_expired) = (MAX_BYTES, keep);
            let case = if small { case.small() } else { case };
            let nodes = [case.open().await, case.open().await];
            let epoch = nodes[0].read(vec![query("bob", None, 0)]).await.remove(0).unwrap().epoch;
            let mut pair = Pair { case, ended, nodes, epoch, model: Model::default() };
            for (node, operation) in operations {
                pair.apply(node, operation).await;
            }
        });
    }
}
