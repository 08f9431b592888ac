//! A router without sockets: streams are driven by hand, and time is paused.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::{FutureExt, StreamExt};
use prometheus_client::registry::Registry as MetricsRegistry;
use sanjay_proto::{
    LINK_VERSION,
    client::v1::{InboxMessage, Payload, SeqRange, payload::Kind},
    edge::v1::{
        AttachRequest, CloseSession, EdgeEvent, EdgeHello, InboxHint, OpenSession, Publish, RouterEvent,
        Subscribe, Unsubscribe, edge_event, router_event::Event,
    },
    router::v1::{NewPublication, RelayOutcome},
};
use sanjay_runtime::{Lifecycle, ManualClock, MilestoneRing, SeededRandom};
use tokio::{
    sync::mpsc,
    task::yield_now,
    time::{advance, timeout},
};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    asks::Asks,
    bus::{Bus, BusError, EdgeHint, Sink},
    downlink::End,
    fanout::Fanout,
    link::{AttachError, LinkLimits, Links},
    metrics::Metrics,
    outage::Outage,
    publish::Publisher,
    registry::{
        Registry,
        memory::{Limits, Memory, MemoryRegistry},
        suite::publication,
    },
    relay::Relay,
    subscriptions::Subscriptions,
    watchers::Watchers,
    writer::Writer,
};

#[path = "asks_tests.rs"]
mod asks;

const LEASE: Duration = Duration::from_secs(10);

/// A bus that can be told to refuse.
struct Fragile {
    bus: Arc<dyn Bus>,
    refuses: AtomicBool,
}

#[async_trait]
impl Bus for Fragile {
    async fn listen(&self, sink: Arc<dyn Sink>) -> Result<(), BusError> {
        self.bus.listen(sink).await
    }

    async fn subscribe(&self, channels: &[Arc<str>]) -> Vec<Result<(), BusError>> {
        if self.refuses.load(Ordering::Relaxed) {
            return channels.iter().map(|_| Err(BusError::Unavailable("told to".into()))).collect();
        }
        self.bus.subscribe(channels).await
    }

    async fn unsubscribe(&self, channels: &[Arc<str>]) -> Result<(), BusError> {
        self.bus.unsubscribe(channels).await
    }

    async fn relay(&self, router: &str, hints: Vec<EdgeHint>) -> Result<bool, BusError> {
        self.bus.relay(router, hints).await
    }
}

struct Router {
    links: Arc<Links>,
    relay: Relay,
    registry: Arc<MemoryRegistry>,
    bus: Arc<Fragile>,
    metrics: Metrics,
    lifecycle: Lifecycle,
}

fn memory() -> Arc<Memory> {
    Memory::new(Limits::default(), Arc::new(ManualClock::new(1)), Arc::new(SeededRandom::new(1)))
}

async fn router(memory: &Arc<Memory>, name: &str, mailbox: usize) -> Router {
    let registry = Arc::new(memory.registry());
    let bus = Arc::new(Fragile { bus: Arc::new(memory.bus(name.into())), refuses: AtomicBool::new(false) });
    let metrics = Metrics::register(&mut MetricsRegistry::default());
    let milestones = Arc::new(MilestoneRing::new(1_000, "router", Arc::new(ManualClock::new(1))));
    let fanout = Arc::new(Fanout::new(Arc::clone(&milestones), metrics.clone()));
    bus.listen(Arc::clone(&fanout) as Arc<dyn Sink>).await.unwrap();
    let (dyn_registry, dyn_bus): (Arc<dyn Registry>, Arc<dyn Bus>) =
        (Arc::clone(&registry) as _, Arc::clone(&bus) as _);
    let publisher = Publisher::new(Arc::clone(&dyn_registry), Arc::clone(&milestones), metrics.clone());
    let relay = Relay::new(
        Arc::clone(&dyn_registry),
        Arc::clone(&dyn_bus),
        Arc::clone(&fanout),
        Arc::clone(&milestones),
        metrics.clone(),
        name.into(),
        LEASE,
    );
    let lifecycle = Lifecycle::new();
    let links = Arc::new(Links {
        fanout: Arc::clone(&fanout),
        asks: Arc::new(Asks::new(Arc::clone(&fanout), 1, LEASE)),
        watchers: Arc::new(Watchers::new(Arc::clone(&fanout), Arc::new(ManualClock::new(1)))),
        subscriptions: Subscriptions::new(fanout, dyn_bus, Arc::clone(&dyn_registry)),
        registry: dyn_registry,
        publisher: Arc::new(publisher),
        milestones,
        metrics: metrics.clone(),
        lifecycle: lifecycle.clone(),
        router: name.into(),
        incarnation: 1,
        limits: LinkLimits { mailbox, channels: 3, sessions: 3, lease: LEASE },
        closing: Outage::default(),
    });
    Router { links, relay, registry, bus, metrics, lifecycle }
}

struct Edge {
    requests: mpsc::Sender<Result<AttachRequest, Infallible>>,
    writer: Writer,
}

impl Router {
    async fn attach(&self, edge_id: &str, incarnation: u64) -> Edge {
        let hello =
            EdgeHello { version: LINK_VERSION, build: "test".into(), edge_id: edge_id.into(), incarnation };
        let (link, mut writer) = self.links.open(hello).await.unwrap();
        let (requests, stream) = mpsc::channel(100);
        self.lifecycle.spawn("edge link", link.run(Vec::new(), ReceiverStream::new(stream)));
        assert!(writer.next().await.unwrap().hello.is_some());
        Edge { requests, writer }
    }

    async fn relay(&self, user: &str) -> RelayOutcome {
        let message = Some(InboxMessage { seq: 1, ..InboxMessage::default() });
        let hint = InboxHint { user: user.into(), message, inbox_epoch: 1, ..InboxHint::default() };
        self.relay.relay(vec![hint]).await[0]
    }

    async fn publish(&self, channel: &str) -> u64 {
        let answers = self.registry.publish(vec![publication(channel, "")]).await;
        answers[0].as_ref().unwrap().at.offset
    }

    async fn is_complete(&self, user: &str) -> bool {
        self.relay.locate(&[user.into()]).await.unwrap()[0].complete
    }
}

impl Edge {
    async fn send(&self, events: Vec<edge_event::Event>) {
        let events = events.into_iter().map(|event| EdgeEvent { event: Some(event) }).collect();
        self.requests.send(Ok(AttachRequest { hello: None, events })).await.unwrap();
    }

    async fn next(&mut self) -> Vec<String> {
        let message = timeout(Duration::from_millis(1), self.writer.next()).await.expect("something comes");
        message.map(|message| message.events.iter().map(text).collect()).unwrap_or_default()
    }

    /// The next events, all of them, until there are `count`.
    async fn take(&mut self, count: usize) -> Vec<String> {
        let mut taken = Vec::new();
        while taken.len() < count {
            taken.extend(self.next().await);
        }
        taken
    }

    async fn open(&mut self, user: &str, session: u8) {
        self.send(vec![open(user, session)]).await;
        assert_eq!(self.next().await, [format!("opened {session}")]);
    }

    /// Ends the stream and waits until the router has noticed.
    async fn leave(self) {
        drop(self);
        settle().await;
    }
}

/// Lets every task run until it waits; time stands still.
async fn settle() {
    for _ in 0..100 {
        yield_now().await;
    }
}

fn text(event: &RouterEvent) -> String {
    let error = |error: &Option<sanjay_proto::edge::v1::LinkError>| {
        error.as_ref().map(|error| format!(" {}", error.code)).unwrap_or_default()
    };
    match event.event.as_ref().unwrap() {
        Event::Subscribed(event) => {
            format!("subscribed {} {}{}", event.channel, event.offset, error(&event.error))
        }
        Event::SessionOpened(event) => format!("opened {}{}", event.session[0], error(&event.error)),
        Event::Published(event) => {
            format!("published {} {}{}", event.request, event.offset, error(&event.error))
        }
        Event::Publication(event) => format!("{} {}", event.channel, event.offset),
        Event::Inbox(event) => format!("inbox {}", event.user),
        Event::Gap(event) => format!("gap {} {}", event.channel, event.top),
        Event::Resync(_) => "resync".into(),
        Event::Ask(event) => format!("ask {}", event.request),
        Event::WatchConnections(event) => format!("watch {}", event.on),
    }
}

fn subscribe(channel: &str) -> edge_event::Event {
    edge_event::Event::Subscribe(Subscribe { channel: channel.into() })
}

fn unsubscribe(channel: &str) -> edge_event::Event {
    edge_event::Event::Unsubscribe(Unsubscribe { channel: channel.into() })
}

fn open(user: &str, session: u8) -> edge_event::Event {
    edge_event::Event::OpenSession(OpenSession {
        user: user.into(),
        session: vec![session; 16].into(),
        inbox: true,
    })
}

fn close(user: &str, session: u8) -> edge_event::Event {
    edge_event::Event::CloseSession(CloseSession { user: user.into(), session: vec![session; 16].into() })
}

fn publish(request: u64, channel: &str, dedupe_key: &str) -> edge_event::Event {
    let NewPublication { message_id, .. } = publication(channel, "");
    edge_event::Event::Publish(Publish {
        request,
        channel: channel.into(),
        payload: Some(Payload { kind: Some(Kind::Text("hi".into())) }),
        dedupe_key: dedupe_key.into(),
        message_id,
        ..Publish::default()
    })
}

#[tokio::test(start_paused = true)]
async fn events_are_answered_in_order_within_a_kind() {
    let router = router(&memory(), "r1", 100).await;
    let mut edge = router.attach("e1", 1).await;
    edge.send(vec![
        subscribe("a"),
        subscribe("b"),
        publish(7, "a", "k"),
        publish(8, "a", "k"),
        publish(9, "", ""),
        open("bob", 1),
        subscribe("a"),
        unsubscribe("b"),
        publish(10, "b", ""),
    ])
    .await;
    let expected = [
        "subscribed a 0",
        "subscribed b 0",
        "a 1",
        "published 7 1",
        "published 8 1",
        "published 9 0 bad_request",
        "opened 1",
        "subscribed a 1",
        "published 10 1",
    ];
    assert_eq!(edge.take(expected.len()).await, expected);
    assert_eq!(router.metrics.publications.get(), 2);
    assert_eq!(router.metrics.repeats.get(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_channel_twice_in_a_message_gets_two_answers() {
    let router = router(&memory(), "r1", 100).await;
    let mut edge = router.attach("e1", 1).await;
    edge.send(vec![subscribe("a"), subscribe("a"), subscribe("b")]).await;
    assert_eq!(edge.take(3).await, ["subscribed a 0", "subscribed a 0", "subscribed b 0"]);
}

#[tokio::test(start_paused = true)]
async fn bad_names_and_bounds_are_refused_one_by_one() {
    let router = router(&memory(), "r1", 100).await;
    let mut edge = router.attach("e1", 1).await;
    edge.send(vec![subscribe("\n"), subscribe("a"), subscribe("b"), subscribe("c"), subscribe("d")]).await;
    let mut got = edge.take(5).await;
    got.sort();
    let expected = [
        "subscribed \n 0 bad_request",
        "subscribed a 0",
        "subscribed b 0",
        "subscribed c 0",
        "subscribed d 0 limit_exceeded",
    ];
    assert_eq!(got, expected);
    edge.send(vec![unsubscribe("a"), subscribe("d")]).await;
    assert_eq!(edge.next().await, ["subscribed d 0"]);
    for session in 1..=3 {
        edge.open("bob", session).await;
    }
    edge.send(vec![open("bob", 4)]).await;
    assert_eq!(edge.next().await, ["opened 4 limit_exceeded"]);
    edge.send(vec![close("bob", 1), open("bob", 4), open("", 5)]).await;
    let mut got = edge.take(2).await;
    got.sort();
    assert_eq!(got, ["opened 4", "opened 5 bad_request"]);
}

#[tokio::test(start_paused = true)]
async fn a_slow_edge_gets_a_gap_and_a_resync_and_others_get_everything() {
    let router = router(&memory(), "r1", 16).await;
    let mut slow = router.attach("slow", 1).await;
    let mut quick = router.attach("quick", 1).await;
    for edge in [&mut slow, &mut quick] {
        edge.send(vec![subscribe("a"), subscribe("b")]).await;
        edge.take(2).await;
        edge.open("bob", 1).await;
    }
    for offset in 1..=20 {
        assert_eq!(router.publish("a").await, offset);
        assert_eq!(quick.next().await, [format!("a {offset}")]);
    }
    router.publish("b").await;
    assert_eq!(quick.next().await, ["b 1"]);
    assert_eq!(router.relay("bob").await, RelayOutcome::Relayed, "the quick edge took it");
    let taken: Vec<_> = (1..=16).map(|offset| format!("a {offset}")).collect();
    assert_eq!(slow.take(16).await, taken);
    assert_eq!(slow.take(3).await, ["resync", "gap a 20", "gap b 1"]);
    router.publish("a").await;
    assert_eq!(slow.next().await, ["a 21"]);
    assert_eq!((router.metrics.gaps.get(), router.metrics.resyncs.get()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn sessions_outlive_their_stream_by_the_lease() {
    let router = router(&memory(), "r1", 100).await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Unspecified, "edges may not have announced yet");
    assert!(!router.is_complete("bob").await);
    advance(LEASE).await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Offline);
    assert!(router.is_complete("bob").await);

    let mut edge = router.attach("e1", 1).await;
    edge.send(vec![open("bob", 1), open("bob", 2)]).await;
    edge.take(2).await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Relayed);
    assert_eq!(edge.next().await, ["inbox bob"], "one hint for an edge, not for a session");

    edge.leave().await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Unspecified);
    assert!(!router.is_complete("bob").await);
    advance(LEASE - Duration::from_millis(1)).await;
    settle().await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Unspecified);
    advance(Duration::from_millis(2)).await;
    settle().await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Offline);
}

#[tokio::test(start_paused = true)]
async fn what_was_settled_reaches_each_edge_with_the_number_of_sessions() {
    let router = router(&memory(), "r1", 100).await;
    let (mut one, mut other) = (router.attach("e1", 1).await, router.attach("e2", 2).await);
    one.open("bob", 1).await;
    let settled = || InboxHint {
        user: "bob".into(),
        inbox_epoch: 1,
        settled: vec![SeqRange { from: 2, to: 4 }],
        ..InboxHint::default()
    };
    let hint = async |edge: &mut Edge| match edge.writer.next().await.unwrap().events.remove(0).event {
        Some(Event::Inbox(hint)) => hint,
        other => panic!("{other:?}"),
    };
    assert_eq!(router.relay.relay(vec![settled()]).await, [RelayOutcome::Relayed]);
    assert_eq!(hint(&mut one).await, InboxHint { sessions: 1, ..settled() });
    other.open("bob", 2).await;
    other.open("bob", 3).await;
    assert_eq!(router.relay.relay(vec![settled()]).await, [RelayOutcome::Relayed]);
    for edge in [&mut one, &mut other] {
        assert_eq!(hint(edge).await, InboxHint { sessions: 3, ..settled() });
    }
}

#[tokio::test(start_paused = true)]
async fn a_session_without_inbox_gets_no_hint() {
    let router = router(&memory(), "r1", 100).await;
    advance(LEASE).await;
    let mut edge = router.attach("e1", 1).await;
    let session = vec![9; 16].into();
    edge.send(vec![edge_event::Event::OpenSession(OpenSession {
        user: "bob".into(),
        session,
        inbox: false,
    })])
    .await;
    edge.take(1).await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Offline);
    assert_eq!(router.relay.locate(&["bob".into()]).await.unwrap()[0].sessions.len(), 1);
    edge.open("bob", 9).await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Relayed, "it may take part later");
}

#[tokio::test(start_paused = true)]
async fn an_edge_that_comes_back_in_time_keeps_its_sessions() {
    let router = router(&memory(), "r1", 100).await;
    advance(LEASE).await;
    let mut edge = router.attach("e1", 1).await;
    edge.open("bob", 1).await;
    edge.open("eve", 2).await;
    edge.leave().await;
    advance(LEASE / 2).await;
    let mut edge = router.attach("e1", 1).await;
    advance(LEASE).await;
    settle().await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Relayed);
    assert_eq!(edge.next().await, ["inbox bob"]);
    edge.open("bob", 1).await;
    // eve left while the edge was away; she is dropped when the edge had time to announce her.
    for _ in 0..6 {
        advance(LEASE).await;
        settle().await;
    }
    assert_eq!(router.relay("eve").await, RelayOutcome::Offline);
    assert_eq!(router.relay("bob").await, RelayOutcome::Relayed);
}

#[tokio::test(start_paused = true)]
async fn a_new_incarnation_drops_the_sessions_of_the_older_and_ends_its_stream() {
    let router = router(&memory(), "r1", 100).await;
    advance(LEASE).await;
    let mut older = router.attach("e1", 1).await;
    older.open("bob", 1).await;
    let mut newer = router.attach("e1", 2).await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Offline);
    assert!(older.writer.next().await.is_none());
    assert_eq!(older.writer.reason(), Some(&End::Replaced));
    newer.open("bob", 1).await;
    older.leave().await;
    advance(LEASE * 2).await;
    settle().await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Relayed);
    assert_eq!(newer.next().await, ["inbox bob"]);
}

#[tokio::test(start_paused = true)]
async fn a_newer_stream_takes_the_channels_over() {
    let router = router(&memory(), "r1", 100).await;
    let mut older = router.attach("e1", 1).await;
    older.send(vec![subscribe("a")]).await;
    older.take(1).await;
    router.publish("a").await;
    let mut newer = router.attach("e1", 1).await;
    newer.send(vec![subscribe("a")]).await;
    assert_eq!(newer.next().await, ["subscribed a 1"]);
    older.leave().await;
    router.publish("a").await;
    assert_eq!(newer.next().await, ["a 2"]);
    assert_eq!(router.metrics.edges.get(), 1);
    assert_eq!(router.metrics.channels.get(), 1);
    newer.leave().await;
    assert_eq!((router.metrics.edges.get(), router.metrics.channels.get()), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_refused_subscription_leaves_nothing_behind_and_can_be_repeated() {
    let router = router(&memory(), "r1", 100).await;
    let mut edge = router.attach("e1", 1).await;
    router.bus.refuses.store(true, Ordering::Relaxed);
    edge.send(vec![subscribe("a")]).await;
    assert_eq!(edge.next().await, ["subscribed a 0 unavailable"]);
    assert_eq!(router.metrics.channels.get(), 0);
    router.bus.refuses.store(false, Ordering::Relaxed);
    edge.send(vec![subscribe("a")]).await;
    assert_eq!(edge.next().await, ["subscribed a 0"]);
    router.publish("a").await;
    assert_eq!(edge.next().await, ["a 1"]);
}

#[tokio::test(start_paused = true)]
async fn two_routers_share_channels_and_users() {
    let memory = memory();
    let (one, two) = (router(&memory, "r1", 100).await, router(&memory, "r2", 100).await);
    let (mut a, mut b) = (one.attach("a", 1).await, two.attach("b", 1).await);
    for edge in [&mut a, &mut b] {
        edge.send(vec![subscribe("news"), open("bob", 1)]).await;
        edge.take(2).await;
    }
    assert_eq!(one.publish("news").await, 1);
    assert_eq!(one.relay("bob").await, RelayOutcome::Relayed);
    for edge in [&mut a, &mut b] {
        assert_eq!(edge.take(2).await, ["news 1", "inbox bob"]);
    }
}

#[tokio::test(start_paused = true)]
async fn an_edge_that_does_not_read_is_not_read_either() {
    let router = router(&memory(), "r1", 16).await;
    let mut edge = router.attach("e1", 1).await;
    let mut sent: u64 = 0;
    let requests = edge.requests.clone();
    let send = |from: u64| {
        let event = |request| EdgeEvent { event: Some(publish(request, "a", "")) };
        requests.send(Ok(AttachRequest { hello: None, events: (from..from + 100).map(event).collect() }))
    };
    while timeout(Duration::from_secs(1), send(sent)).await.is_ok() {
        sent += 100;
        assert!(sent < 50_000, "the router takes whatever comes");
    }
    assert!(edge.writer.next().now_or_never().is_some());
    let before = router.metrics.publications.get();
    assert!(before <= crate::downlink::MAX_WAITING_REPLIES as u64);
    while edge.writer.next().now_or_never().is_some() {
        settle().await;
    }
    assert!(router.metrics.publications.get() > before);

    while timeout(Duration::from_secs(1), send(0)).await.is_ok() {}
    assert!(router.lifecycle.shutdown(LEASE).await.is_empty(), "nor does it hold up the router's end");
}

#[tokio::test(start_paused = true)]
async fn shutdown_and_protocol_faults_end_a_stream_with_their_reason() {
    let router = router(&memory(), "r1", 16).await;
    let mut edge = router.attach("e1", 1).await;
    let hello = Some(EdgeHello::default());
    edge.requests.send(Ok(AttachRequest { hello, events: Vec::new() })).await.unwrap();
    assert!(edge.writer.next().await.is_none());
    assert!(matches!(edge.writer.reason(), Some(End::Protocol(_))));

    let mut edge = router.attach("e1", 1).await;
    router.lifecycle.begin_shutdown();
    assert!(edge.writer.next().await.is_none());
    assert_eq!(edge.writer.reason(), Some(&End::Shutdown));
    let hello = EdgeHello { version: LINK_VERSION, edge_id: "e1".into(), ..EdgeHello::default() };
    assert!(matches!(router.links.open(hello).await, Err(AttachError::Shutdown)));
}
