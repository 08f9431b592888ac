//! What every registry and its bus must do, whichever adapter they are.

pub(crate) mod history;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use proptest::prelude::*;
use sanjay_proto::{client::v1::Publication, edge::v1::InboxHint, router::v1::NewPublication};
use tokio::time::sleep;

use super::{Assigned, Attachment, EdgeRef, Registry, RegistryError, Top, UserSession};
use crate::bus::{Bus, EdgeHint, Missed, Sink};

/// An empty registry and the bus that it publishes on, for a router of that name.
pub(crate) type Pair = (Arc<dyn Registry>, Arc<dyn Bus>);

/// Keeps what the bus delivers.
#[derive(Default)]
pub(crate) struct Recorder {
    publications: Mutex<Vec<Arc<Publication>>>,
    hints: Mutex<Vec<EdgeHint>>,
}

impl Recorder {
    pub(crate) fn publications(&self) -> Vec<Arc<Publication>> {
        self.publications.lock().clone()
    }
}

impl Sink for Recorder {
    fn publication(&self, publication: &Arc<Publication>) {
        self.publications.lock().push(Arc::clone(publication));
    }

    fn hint(&self, hint: EdgeHint) {
        self.hints.lock().push(hint);
    }

    fn missed(&self, what: Missed<'_>) {
        panic!("the bus missed something: {what:?}");
    }
}

/// Runs everything. `make` gives an empty pair for the router named.
pub(crate) async fn run(make: impl Fn(&str) -> Pair, cases: Vec<Vec<Op>>) {
    order_holds_under_concurrency(make("r1")).await;
    hints_reach_the_router_named(make("r1")).await;
    for ops in cases {
        Model::new(make("r1")).await.run(&ops).await;
    }
}

/// Sequences of operations, the same ones in every run with the same configuration.
pub(crate) fn cases(count: u32, length: usize) -> Vec<Vec<Op>> {
    use proptest::{
        strategy::{Strategy, ValueTree},
        test_runner::TestRunner,
    };
    let mut runner = TestRunner::deterministic();
    let strategy = prop::collection::vec(op(), length);
    (0..count).map(|_| strategy.new_tree(&mut runner).expect("no filters").current()).collect()
}

/// Several tasks publish to the same channels at once: offsets have no hole and no repeat, each task's own
/// grow, and the bus delivers in offset order.
async fn order_holds_under_concurrency((registry, bus): Pair) {
    let sink = Arc::new(Recorder::default());
    bus.listen(Arc::clone(&sink) as Arc<dyn Sink>).await.unwrap();
    let channels = [Arc::from("a"), Arc::from("b")];
    assert!(bus.subscribe(&channels).await.iter().all(Result::is_ok));
    let publish = |task: usize| {
        let registry = Arc::clone(&registry);
        async move {
            let mut last = BTreeMap::new();
            for at in 0..100 {
                let channel = ["a", "b"][(at + task) % 2];
                let [answer] = registry.publish(vec![publication(channel, "")]).await.try_into().unwrap();
                let offset = answer.unwrap().at.offset;
                assert!(last.insert(channel, offset).is_none_or(|before| before < offset));
            }
        }
    };
    let tasks: Vec<_> = (0..4).map(|task| tokio::spawn(publish(task))).collect();
    for task in tasks {
        task.await.unwrap();
    }
    eventually(|| sink.publications.lock().len() >= 400).await;
    for channel in ["a", "b"] {
        let got = sink.publications.lock();
        let offsets: Vec<_> = got.iter().filter(|p| p.channel == channel).map(|p| p.offset).collect();
        assert_eq!(offsets, (1..=200).collect::<Vec<_>>());
    }
}

async fn hints_reach_the_router_named((_, bus): Pair) {
    let sink = Arc::new(Recorder::default());
    bus.listen(Arc::clone(&sink) as Arc<dyn Sink>).await.unwrap();
    let edge = EdgeRef { id: "e1".into(), incarnation: 7 };
    let hint = |user: &str| EdgeHint {
        edge: edge.clone(),
        hint: Arc::new(InboxHint { user: user.into(), ..InboxHint::default() }),
    };
    assert_eq!(bus.relay("r1", vec![hint("bob"), hint("eve")]).await, Ok(true));
    assert_eq!(bus.relay("nobody", vec![hint("bob")]).await, Ok(false));
    eventually(|| sink.hints.lock().len() >= 2).await;
    assert_eq!(*sink.hints.lock(), [hint("bob"), hint("eve")]);
}

/// One step of a random run. Numbers name channels, keys, edges, users and sessions.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    Publish { channel: u8, keys: Vec<Option<u8>> },
    Top { channel: u8 },
    Subscribe { channel: u8 },
    Unsubscribe { channel: u8 },
    Attach { edge: u8, incarnation: u8 },
    Detach { edge: u8, older: bool },
    Sweep { edge: u8, older: bool },
    Open { edge: u8, older: bool, user: u8, session: u8, inbox: bool },
    Close { edge: u8, older: bool, user: u8, session: u8 },
    Maintain,
}

fn op() -> impl Strategy<Value = Op> {
    let older = || prop::bool::weighted(0.2);
    prop_oneof![
        4 => (0..3_u8, prop::collection::vec(prop::option::of(0..3_u8), 1..4))
            .prop_map(|(channel, keys)| Op::Publish { channel, keys }),
        1 => (0..3_u8).prop_map(|channel| Op::Top { channel }),
        1 => (0..3_u8).prop_map(|channel| Op::Subscribe { channel }),
        1 => (0..3_u8).prop_map(|channel| Op::Unsubscribe { channel }),
        2 => (0..2_u8, 0..2_u8).prop_map(|(edge, incarnation)| Op::Attach { edge, incarnation }),
        1 => (0..2_u8, older()).prop_map(|(edge, older)| Op::Detach { edge, older }),
        1 => (0..2_u8, older()).prop_map(|(edge, older)| Op::Sweep { edge, older }),
        6 => (0..2_u8, older(), 0..3_u8, 0..4_u8, any::<bool>())
            .prop_map(|(edge, older, user, session, inbox)| Op::Open { edge, older, user, session, inbox }),
        2 => (0..2_u8, older(), 0..3_u8, 0..4_u8)
            .prop_map(|(edge, older, user, session)| Op::Close { edge, older, user, session }),
        1 => Just(Op::Maintain),
    ]
}

/// What the adapter should answer, in the plainest terms.
struct Model {
    registry: Arc<dyn Registry>,
    bus: Arc<dyn Bus>,
    sink: Arc<Recorder>,
    channels: HashMap<u8, Channel>,
    edges: HashMap<u8, Edge>,
    /// What the sink must have, per channel.
    expected: BTreeMap<u8, Vec<u64>>,
}

#[derive(Default)]
struct Channel {
    epoch: Option<Arc<str>>,
    top: u64,
    answers: HashMap<u8, Assigned>,
    subscribed: bool,
}

#[derive(Default)]
struct Edge {
    attachments: Vec<Attachment>,
    attached: bool,
    /// Session → user, attachment under which it was announced last, whether it has an inbox.
    sessions: BTreeMap<u8, (u8, u64, bool)>,
}

impl Edge {
    fn attachment(&self, older: bool) -> Option<&Attachment> {
        self.attachments.iter().rev().nth(usize::from(older))
    }
}

impl Model {
    async fn new((registry, bus): Pair) -> Self {
        let sink = Arc::new(Recorder::default());
        bus.listen(Arc::clone(&sink) as Arc<dyn Sink>).await.unwrap();
        let (channels, edges, expected) = Default::default();
        Self { registry, bus, sink, channels, edges, expected }
    }

    async fn run(mut self, ops: &[Op]) {
        for op in ops {
            self.step(op).await;
            self.check_locations().await;
        }
        self.check_delivered().await;
    }

    async fn step(&mut self, op: &Op) {
        match *op {
            Op::Publish { channel, ref keys } => self.publish(channel, keys).await,
            Op::Top { channel } => {
                let [top] = self.registry.tops(&[name(channel)]).await.try_into().unwrap();
                self.channels.entry(channel).or_default().check(&top.unwrap());
            }
            Op::Subscribe { channel } => {
                assert_eq!(self.bus.subscribe(&[name(channel)]).await, [Ok(())]);
                self.channels.entry(channel).or_default().subscribed = true;
            }
            Op::Unsubscribe { channel } => {
                self.bus.unsubscribe(&[name(channel)]).await.unwrap();
                self.channels.entry(channel).or_default().subscribed = false;
            }
            Op::Attach { edge, incarnation } => self.attach(edge, incarnation).await,
            Op::Detach { edge, older } => self.detach(edge, older).await,
            Op::Sweep { edge, older } => self.sweep(edge, older).await,
            Op::Open { edge, older, user, session, inbox } => {
                self.open(edge, older, user_session(user, session, inbox), (user, session)).await
            }
            Op::Close { edge, older, user, session } => self.close(edge, older, user, session).await,
            Op::Maintain => self.registry.maintain().await.unwrap(),
        }
    }

    async fn publish(&mut self, number: u8, keys: &[Option<u8>]) {
        let key = |key: &Option<u8>| key.map(|key| format!("k{key}")).unwrap_or_default();
        let batch: Vec<_> = keys.iter().map(|k| publication(&name(number), &key(k))).collect();
        let ids: Vec<_> = batch.iter().map(|new| new.message_id.clone()).collect();
        let answers = self.registry.publish(batch).await;
        assert_eq!(answers.len(), keys.len());
        let channel = self.channels.entry(number).or_default();
        for ((key, id), answer) in keys.iter().zip(ids).zip(answers) {
            let answer = answer.unwrap();
            if let Some(first) = key.and_then(|key| channel.answers.get(&key)) {
                assert_eq!(answer, Assigned { repeated: true, ..first.clone() });
                continue;
            }
            channel.top += 1;
            channel.check(&answer.at);
            assert_eq!((&answer.message_id, answer.repeated), (&id, false));
            if channel.subscribed {
                self.expected.entry(number).or_default().push(channel.top);
            }
            if let Some(key) = key {
                channel.answers.insert(*key, answer);
            }
        }
    }

    async fn attach(&mut self, number: u8, incarnation: u8) {
        let edge = EdgeRef { id: name(number), incarnation: incarnation.into() };
        let attachment = self.registry.attach(&edge, &"r1".into()).await.unwrap();
        let held = self.edges.entry(number).or_default();
        if let Some(before) = held.attachments.last() {
            assert!(attachment.number > before.number);
            if before.edge != edge {
                held.sessions.clear();
            }
        }
        held.attached = true;
        held.attachments.push(attachment);
    }

    async fn detach(&mut self, edge: u8, older: bool) {
        let Some(edge) = self.edges.get_mut(&edge) else { return };
        let Some(attachment) = edge.attachment(older) else { return };
        self.registry.detach(attachment).await.unwrap();
        edge.attached &= older;
    }

    async fn sweep(&mut self, edge: u8, older: bool) {
        let Some(edge) = self.edges.get_mut(&edge) else { return };
        let Some(attachment) = edge.attachment(older) else { return };
        let before = edge.sessions.len();
        let removed = self.registry.sweep(attachment).await.unwrap();
        let (current, number) = (edge.attached, attachment.number);
        if !older {
            edge.sessions.retain(|_, (_, announced, _)| current && *announced == number);
        }
        assert_eq!(removed, before - edge.sessions.len());
    }

    async fn open(&mut self, number: u8, older: bool, new: UserSession, (user, session): (u8, u8)) {
        let Some(edge) = self.edges.get_mut(&number) else { return };
        let Some(attachment) = edge.attachment(older) else { return };
        let inbox = new.inbox;
        let [answer] = self.registry.open_sessions(attachment, &[new]).await.try_into().unwrap();
        if older || !edge.attached {
            assert_eq!(answer, Err(RegistryError::Superseded { edge: name(number) }));
        } else {
            assert_eq!(answer, Ok(()));
            let announced = attachment.number;
            edge.sessions.insert(session, (user, announced, inbox));
        }
    }

    async fn close(&mut self, edge: u8, older: bool, user: u8, session: u8) {
        let Some(edge) = self.edges.get_mut(&edge) else { return };
        let Some(attachment) = edge.attachment(older) else { return };
        self.registry.close_sessions(attachment, &[user_session(user, session, false)]).await.unwrap();
        if !older && edge.attached {
            edge.sessions.remove(&session);
        }
    }

    async fn check_locations(&self) {
        let users: Vec<Arc<str>> = (0..3).map(name).collect();
        let found = self.registry.locate(&users).await.unwrap();
        assert_eq!(found.len(), users.len());
        for (user, found) in (0..3).zip(found) {
            let found: BTreeSet<_> = found
                .into_iter()
                .map(|place| {
                    (
                        place.edge.id.to_string(),
                        place.edge.incarnation,
                        place.session,
                        place.attached,
                        place.inbox,
                    )
                })
                .collect();
            let mut expected = BTreeSet::new();
            for edge in self.edges.values() {
                let Some(latest) = edge.attachment(false) else { continue };
                let of_user = edge.sessions.iter().filter(|(_, (held, ..))| *held == user);
                expected.extend(of_user.map(|(session, (.., inbox))| {
                    (
                        latest.edge.id.to_string(),
                        latest.edge.incarnation,
                        [*session; 16],
                        edge.attached,
                        *inbox,
                    )
                }));
            }
            assert_eq!(found, expected, "sessions of user {user}");
        }
    }

    /// All that had to come came, in order. An adapter may deliver more around an unsubscribe.
    async fn check_delivered(&self) {
        for (channel, expected) in &self.expected {
            let matching = || {
                let got = self.sink.publications.lock();
                let of_channel = got.iter().filter(|got| *got.channel == *name(*channel));
                of_channel
                    .map(|got| got.offset)
                    .filter(|offset| expected.contains(offset))
                    .collect::<Vec<_>>()
            };
            eventually(|| matching().len() >= expected.len()).await;
            assert_eq!(matching(), *expected);
        }
    }
}

impl Channel {
    fn check(&mut self, top: &Top) {
        assert!(!top.epoch.is_empty() && top.epoch.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
        let epoch = self.epoch.get_or_insert_with(|| Arc::clone(&top.epoch));
        assert_eq!((epoch, self.top), (&mut Arc::clone(&top.epoch), top.offset));
    }
}

fn name(number: u8) -> Arc<str> {
    format!("n{number}").into()
}

fn user_session(user: u8, session: u8, inbox: bool) -> UserSession {
    UserSession { user: name(user), session: [session; 16], inbox }
}

pub(crate) fn publication(channel: &str, dedupe_key: &str) -> NewPublication {
    NewPublication {
        channel: channel.into(),
        dedupe_key: dedupe_key.into(),
        message_id: uuid::Uuid::new_v4().into_bytes().to_vec().into(),
        ..NewPublication::default()
    }
}

/// Waits, at most a few seconds, for what another task brings about.
pub(crate) async fn eventually(mut holds: impl FnMut() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("it did not come about within 5 s");
}
