//! A router as its callers see it: a real server on a loopback port.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

#[path = "loopback/redis.rs"]
mod redis;

use std::{sync::Arc, time::Duration};

use prometheus_client::{encoding::text::encode, registry::Registry};
use sanjay_proto::{
    LINK_VERSION,
    client::v1::{InboxMessage, Payload, Publication, payload::Kind},
    edge::v1::{
        AttachRequest, AttachResponse, EdgeEvent, EdgeHello, InboxHint, Milestone, Milestones, OpenSession,
        Publish, RouterHello, Subscribe, edge_event, router_event::Event,
        router_link_client::RouterLinkClient,
    },
    router::v1::{
        LocateRequest, NewPublication, PublishRequest, RelayOutcome, RelayRequest, TraceRequest,
        router_client::RouterClient,
    },
};
use sanjay_router::{Config, start};
use sanjay_runtime::{
    Context, Lifecycle, OsRandom, Readiness, Secret, SystemClock,
    grpc::{PeerChannel, connect_lazy},
};
use tokio::{
    net::TcpListener,
    sync::mpsc,
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use uuid::Uuid;

const WAIT: Duration = Duration::from_secs(10);
const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

struct Router {
    endpoint: String,
    key: Secret,
    lifecycle: Lifecycle,
    metrics: Registry,
}

async fn router(config: Config) -> Router {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let key = Secret::new("a cluster key of this test");
    let lifecycle = Lifecycle::new();
    let context = Context {
        clock: Arc::new(SystemClock),
        random: Arc::new(OsRandom),
        lifecycle: lifecycle.clone(),
        readiness: Readiness::new(),
        namespaces: sanjay_runtime::SharedNamespaces::default(),
        cluster_key: key.clone(),
    };
    let mut metrics = Registry::with_prefix("sanjay");
    start(config, listener, context.clone(), &mut metrics).await.unwrap();
    assert!(context.readiness.is_ready());
    Router { endpoint, key, lifecycle, metrics }
}

/// A lease short enough to wait for.
fn config() -> Config {
    Config { node: "router-1".into(), lease_ms: 1_000, ..Config::default() }
}

impl Router {
    fn channel(&self) -> PeerChannel {
        connect_lazy(&self.endpoint, &self.key, WAIT).unwrap()
    }

    fn client(&self) -> RouterClient<PeerChannel> {
        RouterClient::new(self.channel())
    }

    async fn attach(&self, edge_id: &str, incarnation: u64) -> Edge {
        let hello =
            EdgeHello { version: LINK_VERSION, build: "test".into(), edge_id: edge_id.into(), incarnation };
        self.attach_with(AttachRequest { hello: Some(hello), events: Vec::new() }).await.unwrap()
    }

    async fn attach_with(&self, first: AttachRequest) -> Result<Edge, Status> {
        let (requests, stream) = mpsc::channel(64);
        requests.send(first).await.unwrap();
        let answer = RouterLinkClient::new(self.channel()).attach(ReceiverStream::new(stream)).await?;
        let mut edge = Edge {
            requests,
            answers: answer.into_inner(),
            hello: RouterHello::default(),
            events: Vec::new(),
        };
        let AttachResponse { hello, events } = edge.answers.message().await?.unwrap();
        assert!(events.is_empty());
        edge.hello = hello.unwrap();
        Ok(edge)
    }

    async fn publish(&self, publications: Vec<NewPublication>) -> Vec<u64> {
        let answer = self.client().publish(PublishRequest { publications }).await.unwrap().into_inner();
        let offset = |result: sanjay_proto::router::v1::PublishResult| {
            assert_eq!(result.error, None);
            result.offset
        };
        answer.results.into_iter().map(offset).collect()
    }

    async fn relay(&self, user: &str) -> RelayOutcome {
        let answer = self.client().relay(RelayRequest { hints: vec![hint(user)] }).await.unwrap();
        answer.into_inner().outcomes().next().unwrap()
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.metrics).unwrap();
        text
    }
}

struct Edge {
    requests: mpsc::Sender<AttachRequest>,
    answers: Streaming<AttachResponse>,
    hello: RouterHello,
    /// Received, not yet taken; newest first.
    events: Vec<Event>,
}

impl Edge {
    async fn send(&self, event: edge_event::Event) {
        let events = vec![EdgeEvent { event: Some(event) }];
        self.requests.send(AttachRequest { hello: None, events }).await.unwrap();
    }

    async fn next(&mut self) -> Result<Option<Event>, Status> {
        while self.events.is_empty() {
            let answer = timeout(WAIT, self.answers.message()).await.expect("something comes");
            let Some(message) = answer? else { return Ok(None) };
            assert!(message.events.len() <= 512);
            self.events.extend(message.events.into_iter().rev().filter_map(|event| event.event));
        }
        Ok(self.events.pop())
    }

    async fn expect(&mut self) -> Event {
        self.next().await.unwrap().expect("the stream goes on")
    }

    async fn subscribe(&mut self, channel: &str) -> u64 {
        self.send(edge_event::Event::Subscribe(Subscribe { channel: channel.into() })).await;
        let Event::Subscribed(answer) = self.expect().await else { panic!("no answer to subscribe") };
        assert_eq!((answer.channel.as_str(), answer.error), (channel, None));
        answer.offset
    }

    async fn open(&mut self, user: &str) {
        let session = Uuid::new_v4().into_bytes().to_vec();
        let event = OpenSession { user: user.into(), session: session.clone().into(), inbox: true };
        self.send(edge_event::Event::OpenSession(event)).await;
        let Event::SessionOpened(answer) = self.expect().await else { panic!("no answer to open") };
        assert_eq!((&answer.session[..], answer.error), (&session[..], None));
    }

    async fn publication(&mut self) -> Publication {
        match self.expect().await {
            Event::Publication(publication) => publication,
            other => panic!("no publication but {other:?}"),
        }
    }
}

fn payload(text: &str) -> Option<Payload> {
    Some(Payload { kind: Some(Kind::Text(text.into())) })
}

fn id() -> prost::bytes::Bytes {
    Uuid::now_v7().into_bytes().to_vec().into()
}

fn publication(channel: &str, text: &str) -> NewPublication {
    NewPublication {
        channel: channel.into(),
        payload: payload(text),
        message_id: id(),
        ..NewPublication::default()
    }
}

fn hint(user: &str) -> InboxHint {
    let message =
        Some(InboxMessage { seq: 1, message_id: id(), payload: payload("hi"), ..InboxMessage::default() });
    InboxHint { user: user.into(), message, inbox_epoch: 1, ..InboxHint::default() }
}

/// Asks again until it holds; at most ten seconds.
async fn eventually<F: Future<Output = bool>>(mut holds: impl FnMut() -> F) {
    let asked = async {
        while !holds().await {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(WAIT, asked).await.expect("it comes about");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_goes_from_edge_to_edge_and_can_be_traced() {
    let router = router(config()).await;
    let (mut alice, mut bob) = (router.attach("a", 1).await, router.attach("b", 1).await);
    assert_eq!((bob.hello.version, bob.hello.lease_ms), (LINK_VERSION, 1_000));
    assert_eq!(
        (alice.hello.router_id.as_str(), alice.hello.incarnation),
        ("router-1", bob.hello.incarnation)
    );
    assert_eq!(bob.subscribe("news").await, 0);
    let message_id = id();
    let publish = Publish {
        request: 5,
        channel: "news".into(),
        payload: payload("hi"),
        publisher: "alice".into(),
        message_id: message_id.clone(),
        trace: TRACE.into(),
        ..Publish::default()
    };
    alice.send(edge_event::Event::Publish(publish)).await;
    let Event::Published(published) = alice.expect().await else { panic!("no answer to publish") };
    assert_eq!((published.request, published.offset, published.error), (5, 1, None));
    let got = bob.publication().await;
    assert_eq!((&got.epoch, got.offset, &got.message_id), (&published.epoch, 1, &message_id));
    assert_eq!((got.payload, got.publisher.as_str()), (payload("hi"), "alice"));
    assert_eq!(got.trace, TRACE, "without an exporter the trace goes through as it is");

    let milestone = Milestone {
        message_id: message_id.clone(),
        time_us: u64::MAX,
        service: "edge".into(),
        stage: "written".into(),
        detail: "3 sockets".into(),
    };
    bob.send(edge_event::Event::Milestones(Milestones { milestones: vec![milestone] })).await;
    let expected = [("assigned", "offset 1"), ("fanned_out", "1 edge"), ("written", "3 sockets")];
    eventually(async || {
        let request = TraceRequest { message_id: message_id.clone() };
        let seen = router.client().trace(request).await.unwrap().into_inner().milestones;
        let mut stages: Vec<_> = seen.iter().map(|one| (one.stage.as_str(), one.detail.as_str())).collect();
        stages.sort_unstable();
        stages == expected
    })
    .await;
    let metrics = router.metrics();
    assert!(metrics.contains("sanjay_router_publications_total 1\n"), "{metrics}");
    assert!(metrics.contains("sanjay_router_attached_edges 2\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_publishers_at_once_are_seen_in_one_order() {
    const EACH: u64 = 250;
    let router = router(config()).await;
    let mut edges = [router.attach("a", 1).await, router.attach("b", 1).await];
    for edge in &mut edges {
        assert_eq!(edge.subscribe("news").await, 0);
    }
    let publishers: Vec<_> = (0..4)
        .map(|publisher| {
            let mut client = router.client();
            tokio::spawn(async move {
                for first in (0..EACH).step_by(10) {
                    let text = |at| format!("{publisher} {at}");
                    let publications = (first..first + 10).map(|at| publication("news", &text(at))).collect();
                    client.publish(PublishRequest { publications }).await.unwrap();
                }
            })
        })
        .collect();
    let mut orders = Vec::new();
    for edge in &mut edges {
        let mut order = Vec::new();
        let mut next = [0; 4];
        for offset in 1..=4 * EACH {
            let got = edge.publication().await;
            assert_eq!(got.offset, offset);
            let Some(Payload { kind: Some(Kind::Text(text)) }) = got.payload else { panic!("no text") };
            let (publisher, at) = text.split_once(' ').unwrap();
            let next = &mut next[publisher.parse::<usize>().unwrap()];
            assert_eq!(at.parse::<u64>().unwrap(), *next, "publications of one publisher keep their order");
            *next += 1;
            order.push(text);
        }
        orders.push(order);
    }
    assert_eq!(orders[0], orders[1]);
    for publisher in publishers {
        publisher.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_stalls_gets_a_gap_and_then_what_follows() {
    let router = router(Config { mailbox_capacity: 16, ..config() }).await;
    let mut edge = router.attach("a", 1).await;
    edge.subscribe("news").await;
    let large = "x".repeat(60_000);
    for _ in 0..20 {
        // Nobody reads meanwhile: windows fill, then the mailbox, then publications are dropped.
        router.publish((0..20).map(|_| publication("news", &large)).collect()).await;
    }
    let (mut last, mut gaps) = (0, 0);
    while last < 400 {
        match edge.expect().await {
            Event::Publication(got) => {
                assert_eq!(got.offset, last + 1, "a hole is signalled before what follows it");
                last = got.offset;
            }
            Event::Gap(gap) => {
                assert!(gap.top > last);
                last = gap.top;
                gaps += 1;
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert!(gaps > 0);
    assert_eq!(router.publish(vec![publication("news", "after")]).await, [401]);
    assert_eq!(edge.publication().await.offset, 401);
    let metrics = router.metrics();
    assert!(!metrics.contains("sanjay_router_dropped_total{reason=\"full\"} 0\n"), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn users_are_found_until_their_lease_ends() {
    let router = router(config()).await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Unspecified, "edges may not have announced yet");
    let mut edge = router.attach("a", 1).await;
    edge.open("bob").await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Relayed);
    let Event::Inbox(got) = edge.expect().await else { panic!("no hint") };
    assert_eq!((got.user.as_str(), got.message.unwrap().seq, got.inbox_epoch), ("bob", 1, 1));
    eventually(async || router.relay("eve").await == RelayOutcome::Offline).await;
    let locate = |users: Vec<String>| async { router.client().locate(LocateRequest { users }).await };
    let found = locate(vec!["eve".into(), "bob".into()]).await.unwrap().into_inner().locations;
    assert!(found[0].sessions.is_empty() && found[0].complete && found[1].complete);
    assert_eq!(
        (found[1].sessions[0].edge_id.as_str(), found[1].sessions[0].router_id.as_str()),
        ("a", "router-1")
    );

    drop(edge);
    eventually(async || router.relay("bob").await == RelayOutcome::Unspecified).await;
    let mut edge = router.attach("a", 1).await;
    assert_eq!(router.relay("bob").await, RelayOutcome::Relayed, "the same start of the edge still has bob");
    assert!(matches!(edge.expect().await, Event::Inbox(_)));
    drop(edge);
    eventually(async || router.relay("bob").await == RelayOutcome::Offline).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_newer_stream_replaces_the_older() {
    let router = router(config()).await;
    let mut older = router.attach("a", 1).await;
    older.open("bob").await;
    older.subscribe("news").await;
    let mut newer = router.attach("a", 2).await;
    assert_eq!(older.next().await.unwrap_err().code(), Code::Aborted);
    eventually(async || router.relay("bob").await == RelayOutcome::Offline).await;
    assert_eq!(newer.subscribe("news").await, 0);
    router.publish(vec![publication("news", "hi")]).await;
    assert_eq!(newer.publication().await.offset, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_requests_are_refused_with_what_would_be_right() {
    let router = router(config()).await;
    let refused = |first: AttachRequest| async { router.attach_with(first).await.map(|_| ()).unwrap_err() };
    let status = refused(AttachRequest::default()).await;
    assert_eq!(
        (status.code(), status.message()),
        (Code::InvalidArgument, "the first message must carry hello")
    );
    let hello = EdgeHello { version: LINK_VERSION + 1, edge_id: "a".into(), ..EdgeHello::default() };
    let status = refused(AttachRequest { hello: Some(hello), events: Vec::new() }).await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("version 2") && status.message().contains("version 1"), "{status}");
    let hello = EdgeHello { version: LINK_VERSION, ..EdgeHello::default() };
    let status = refused(AttachRequest { hello: Some(hello), events: Vec::new() }).await;
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("hello.edge_id is empty"), "{status}");

    let mut client = router.client();
    let publications = vec![NewPublication::default(); 1_001];
    let status = client.publish(PublishRequest { publications }).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("at most 1000"), "{status}");
    let status = client.relay(RelayRequest { hints: vec![hint("bob"); 1_001] }).await.unwrap_err();
    assert!(status.message().contains("at most 1000"), "{status}");
    let status = client.relay(RelayRequest { hints: vec![hint("bob"), hint("")] }).await.unwrap_err();
    assert!(status.message().starts_with("hints[1]: user is empty"), "{status}");
    let status = client.locate(LocateRequest { users: vec!["bob".into(); 501] }).await.unwrap_err();
    assert!(status.message().contains("at most 500"), "{status}");
    let status = client.trace(TraceRequest { message_id: vec![1; 15].into() }).await.unwrap_err();
    assert!(status.message().contains("16 bytes"), "{status}");

    let publications = vec![
        publication("a\n", "hi"),
        NewPublication { payload: None, ..publication("a", "") },
        publication("a", &"x".repeat(64 * 1024 + 1)),
        NewPublication { message_id: vec![1].into(), ..publication("a", "hi") },
        publication("a", "hi"),
    ];
    let answer = client.publish(PublishRequest { publications }).await.unwrap().into_inner();
    let codes: Vec<_> =
        answer.results.iter().map(|result| result.error.as_ref().map_or("", |e| &e.code)).collect();
    assert_eq!(codes, ["bad_request", "bad_request", "payload_too_large", "bad_request", ""]);
    assert_eq!(answer.results[4].offset, 1, "a refused one takes no offset");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_gets_in_without_the_cluster_key() {
    let router = router(config()).await;
    let wrong = connect_lazy(&router.endpoint, &Secret::new("another"), WAIT).unwrap();
    let status = RouterClient::new(wrong.clone()).locate(LocateRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let status = RouterLinkClient::new(wrong).attach(tokio_stream::empty()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_stops_sends_its_edges_away() {
    let router = router(config()).await;
    let mut edge = router.attach("a", 1).await;
    edge.subscribe("news").await;
    router.publish(vec![publication("news", "last")]).await;
    let late = router.lifecycle.shutdown(WAIT).await;
    assert!(late.is_empty(), "{late:?}");
    assert_eq!(edge.publication().await.offset, 1, "what was under way still comes");
    let status = edge.next().await.unwrap_err();
    assert_eq!((status.code(), status.message().contains("attach to another")), (Code::Unavailable, true));
}
