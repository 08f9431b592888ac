//! The services over loopback, with a router that only remembers what it was asked.

mod control;
mod dead;
mod devices;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    time::Duration,
};

use futures::{Stream, StreamExt, stream};
use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use sanjay_proto::{
    client::v1::{Payload, SeqRange, payload::Kind},
    delivery::v1::{
        delivery_client::DeliveryClient, publish_stream_response, send_result, send_stream_response, *,
    },
    edge::v1::{
        AckRequest, ConnectionEvents, FailedAttempt, FailureKind, InboxHint, InboxPage, InboxQuery,
        LinkError, Milestone, ReadInboxRequest, UserAck, UserAckResult, inbox_client::InboxClient,
    },
    router::v1::{
        self as router,
        router_server::{Router, RouterServer},
    },
};
use sanjay_runtime::{
    Context, Lifecycle, ManualClock, Readiness, Secret, SeededRandom,
    grpc::{PeerChannel, connect_lazy},
};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{
    Code, Request, Response, Status,
    metadata::MetadataValue,
    service::interceptor::InterceptedService,
    transport::{Channel, Server},
};

use crate::{ApiKey, Config, config::Devices, hash_api_key, start};

const KEY: &str = "key of the shop";
const CLUSTER_KEY: &str = "key of the cluster";

/// Remembers what it was asked.
#[derive(Clone, Default)]
struct FakeRouter(Arc<FakeState>);

#[derive(Default)]
struct FakeState {
    hints: Mutex<Vec<InboxHint>>,
    publications: Mutex<Vec<router::NewPublication>>,
    outcome: AtomicI32,
    questions: Mutex<Vec<router::AskRequest>>,
    answer: Mutex<Option<router::AskResponse>>,
}

#[tonic::async_trait]
impl Router for FakeRouter {
    type WatchConnectionsStream = tokio_stream::Empty<Result<ConnectionEvents, Status>>;

    async fn watch_connections(
        &self,
        _: Request<router::WatchConnectionsRequest>,
    ) -> Result<Response<Self::WatchConnectionsStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn publish(
        &self,
        request: Request<router::PublishRequest>,
    ) -> Result<Response<router::PublishResponse>, Status> {
        let mut publications = self.0.publications.lock();
        let mut results = Vec::new();
        for publication in request.into_inner().publications {
            let error = (publication.channel == "closed").then(|| LinkError {
                code: "rate_limited".into(),
                message: "slower".into(),
                retryable: true,
            });
            publications.push(publication.clone());
            let (offset, message_id) = (publications.len() as u64, publication.message_id);
            results.push(router::PublishResult { epoch: "e".into(), offset, message_id, time_us: 1, error });
        }
        Ok(Response::new(router::PublishResponse { results }))
    }

    async fn relay(
        &self,
        request: Request<router::RelayRequest>,
    ) -> Result<Response<router::RelayResponse>, Status> {
        let hints = request.into_inner().hints;
        let outcomes = vec![self.0.outcome.load(Ordering::Relaxed); hints.len()];
        self.0.hints.lock().extend(hints);
        Ok(Response::new(router::RelayResponse { outcomes }))
    }

    async fn ask(
        &self,
        request: Request<router::AskRequest>,
    ) -> Result<Response<router::AskResponse>, Status> {
        self.0.questions.lock().push(request.into_inner());
        let answer = self.0.answer.lock().clone();
        answer.map(Response::new).ok_or_else(|| Status::unavailable("told to"))
    }

    async fn locate(
        &self,
        _: Request<router::LocateRequest>,
    ) -> Result<Response<router::LocateResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn history(
        &self,
        _: Request<router::HistoryRequest>,
    ) -> Result<Response<router::HistoryResponse>, Status> {
        Err(Status::unimplemented("no test reads histories"))
    }

    async fn trace(
        &self,
        request: Request<router::TraceRequest>,
    ) -> Result<Response<router::TraceResponse>, Status> {
        let milestone = Milestone {
            message_id: request.into_inner().message_id,
            time_us: u64::MAX,
            service: "router".into(),
            stage: "relayed".into(),
            detail: String::new(),
        };
        Ok(Response::new(router::TraceResponse { milestones: vec![milestone] }))
    }
}

impl FakeRouter {
    fn serve(&self, listener: TcpListener, lifecycle: &Lifecycle) {
        let server = Server::builder().add_service(RouterServer::new(self.clone()));
        let soft = lifecycle.soft();
        lifecycle.spawn("fake router", async move {
            let _ =
                soft.run_until_cancelled(server.serve_with_incoming(TcpListenerStream::new(listener))).await;
        });
    }

    fn seqs(&self, user: &str) -> Vec<u64> {
        let hints = self.0.hints.lock();
        let of_user = hints.iter().filter(|hint| hint.user == user);
        of_user.filter_map(|hint| Some(hint.message.as_ref()?.seq)).collect()
    }
}

type Api = DeliveryClient<InterceptedService<Channel, fn(Request<()>) -> Result<Request<()>, Status>>>;

/// A delivery node with a router.
struct Node {
    directory: TempDir,
    clock: Arc<ManualClock>,
    router: FakeRouter,
    router_address: SocketAddr,
    lifecycle: Lifecycle,
    address: SocketAddr,
    devices: Devices,
}

fn with_key(mut request: Request<()>) -> Result<Request<()>, Status> {
    let value = MetadataValue::try_from(format!("Bearer {KEY}")).unwrap();
    request.metadata_mut().insert("authorization", value);
    Ok(request)
}

impl Node {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut node = Self::without_router(listener.local_addr().unwrap()).await;
        node.router.serve(listener, &node.lifecycle);
        node.router.0.outcome.store(router::RelayOutcome::Relayed as i32, Ordering::Relaxed);
        node.restart().await;
        node
    }

    async fn without_router(router_address: SocketAddr) -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            clock: Arc::new(ManualClock::new(1_700_000_000_000_000)),
            router: FakeRouter::default(),
            router_address,
            lifecycle: Lifecycle::new(),
            address: router_address,
            devices: Devices::Any,
        }
    }

    /// Starts the node, on the file of the one before.
    async fn restart(&mut self) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.address = listener.local_addr().unwrap();
        let config = Config {
            router: format!("http://{}", self.router_address).into(),
            store: format!("redb:{}", self.directory.path().join("inbox.redb").display()),
            api_keys: vec![ApiKey { name: "shop".into(), sha256: hash_api_key(KEY) }],
            max_unsettled: 2_000,
            devices: self.devices,
            ..Config::default()
        };
        let context = Context {
            clock: self.clock.clone(),
            random: Arc::new(SeededRandom::new(1)),
            lifecycle: self.lifecycle.clone(),
            readiness: Readiness::new(),
            namespaces: sanjay_runtime::SharedNamespaces::default(),
            cluster_key: Secret::new(CLUSTER_KEY),
        };
        start(config, listener, context.clone(), &mut Registry::default()).await.unwrap();
        assert!(context.readiness.is_ready());
    }

    async fn stop(&mut self) {
        assert_eq!(self.lifecycle.shutdown(Duration::from_secs(10)).await, [""; 0]);
        self.lifecycle = Lifecycle::new();
    }

    fn channel(&self) -> Channel {
        Channel::from_shared(format!("http://{}", self.address)).unwrap().connect_lazy()
    }

    fn api(&self) -> Api {
        DeliveryClient::with_interceptor(self.channel(), with_key)
    }

    fn inbox(&self) -> InboxClient<PeerChannel> {
        let endpoint = format!("http://{}", self.address);
        InboxClient::new(connect_lazy(&endpoint, &Secret::new(CLUSTER_KEY), Duration::from_secs(1)).unwrap())
    }

    async fn read(&self, user: &str) -> InboxPage {
        let query = InboxQuery { user: user.into(), device: "d".into(), after: None, limit: 256 };
        let response = self.inbox().read_inbox(ReadInboxRequest { queries: vec![query] }).await.unwrap();
        response.into_inner().pages.remove(0)
    }

    async fn ack(&self, user: &str, epoch: u64, ranges: &[(u64, u64)], written: u64) -> UserAckResult {
        let acked = ranges.iter().map(|&(from, to)| SeqRange { from, to }).collect();
        let ack = UserAck { user: user.into(), epoch, acked, written, ..UserAck::default() };
        self.inbox()
            .ack(AckRequest { acks: vec![ack], edge: String::new() })
            .await
            .unwrap()
            .into_inner()
            .results
            .remove(0)
    }
}

fn text(text: impl Into<String>) -> Option<Payload> {
    Some(Payload { kind: Some(Kind::Text(text.into())) })
}

fn send(users: &[&str], body: &str, key: &str) -> SendRequest {
    let users = users.iter().map(|user| (*user).to_owned()).collect();
    SendRequest { users, payload: text(body), dedupe_key: key.into(), ..SendRequest::default() }
}

fn publish(channel: &str, body: &str) -> PublishRequest {
    PublishRequest { channel: channel.into(), payload: text(body), ..PublishRequest::default() }
}

fn accepted(result: &SendResult) -> &Accepted {
    match &result.result {
        Some(send_result::Result::Accepted(accepted)) => accepted,
        other => panic!("{other:?}"),
    }
}

/// Polls until `condition` holds.
async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    let polling = async {
        while !condition() {
            tick.tick().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), polling).await.unwrap_or_else(|_| panic!("never: {what}"));
}

#[tokio::test]
async fn sessions_are_told_of_what_ended_without_them() {
    let mut node = Node::start().await;
    let notices = |router: &FakeRouter| -> Vec<(Vec<(u64, u64)>, bool)> {
        let hints = router.0.hints.lock();
        let others = hints.iter().filter(|hint| hint.message.is_none());
        let ranges = |hint: &InboxHint| hint.settled.iter().map(|range| (range.from, range.to)).collect();
        others.map(|hint| (ranges(hint), hint.newcomer)).collect()
    };
    let mut expected = Vec::new();
    for _ in 1..=5 {
        node.api().send(send(&["bob"], "hi", "")).await.unwrap();
    }
    // One that begins with unsettled messages may share them with others.
    let epoch = node.read("bob").await.epoch;
    expected.push((vec![], true));
    eventually("a newcomer", || notices(&node.router) == expected).await;
    // Nobody else has what an only session acks.
    node.ack("bob", epoch, &[(1, 1)], 0).await;
    let acked = [(1, 3), (5, 5)].map(|(from, to)| SeqRange { from, to }).to_vec();
    let ack = UserAck { user: "bob".into(), epoch, acked, shared: true, ..UserAck::default() };
    let request = || AckRequest { acks: vec![ack.clone()], edge: String::new() };
    node.inbox().ack(request()).await.unwrap();
    expected.push((vec![(2, 3), (5, 5)], false));
    eventually("an ack", || notices(&node.router) == expected).await;
    // Again it settles nothing. What dies is told whoever is there.
    node.inbox().ack(request()).await.unwrap();
    let term =
        FailedAttempt { seq: 4, delivery: 1, kind: FailureKind::Term.into(), ..FailedAttempt::default() };
    let term = UserAck { user: "bob".into(), epoch, failed: vec![term], ..UserAck::default() };
    node.inbox().ack(AckRequest { acks: vec![term], edge: String::new() }).await.unwrap();
    expected.push((vec![(4, 4)], false));
    eventually("a death", || notices(&node.router) == expected).await;
    // So is what is replaced.
    let keyed = || SendRequest { collapse_key: "k".into(), ..send(&["bob"], "hi", "") };
    node.api().send(keyed()).await.unwrap();
    node.api().send(keyed()).await.unwrap();
    expected.push((vec![(6, 6)], false));
    eventually("one that is superseded", || notices(&node.router) == expected).await;
    node.stop().await;
}

#[tokio::test]
async fn a_send_is_stored_relayed_read_and_acked() {
    let mut node = Node::start().await;
    let mut api = node.api();
    let request = send(&["bob", "eve"], "hi", "k");
    let results = api.send(request.clone()).await.unwrap().into_inner().results;
    let (bob, eve) = (accepted(&results[0]), accepted(&results[1]));
    assert_eq!((bob.seq, eve.seq, bob.duplicate), (1, 1, false));
    assert_ne!(bob.message_id, eve.message_id);
    let again = api.send(request).await.unwrap().into_inner().results;
    assert_eq!(accepted(&again[0]), &Accepted { duplicate: true, ..bob.clone() });
    let other = api.send(send(&["bob", "joe"], "other", "k")).await.unwrap().into_inner().results;
    let Some(send_result::Result::Error(error)) = &other[0].result else { panic!("{other:?}") };
    assert_eq!((error.code.as_str(), error.retryable), ("already_exists", false));
    assert_eq!(accepted(&other[1]).seq, 1);
    let router = node.router.clone();
    eventually("relayed", || router.seqs("bob") == [1] && router.seqs("joe") == [1]).await;

    let page = node.read("bob").await;
    assert_eq!((page.mark, page.head, page.covers, page.messages.len()), (0, 1, 1, 1));
    assert_eq!(page.messages[0].payload, text("hi"));
    assert_eq!(node.router.0.hints.lock()[0].inbox_epoch, page.epoch);
    let delivery = |api: &Api, id: &str| {
        let (mut api, request) =
            (api.clone(), GetDeliveryRequest { user: "bob".into(), message_id: id.into() });
        async move { api.get_delivery(request).await }
    };
    let state = delivery(&api, &bob.message_id).await.unwrap().into_inner();
    assert_eq!((state.state(), state.seq, state.settled_us), (DeliveryState::Accepted, 1, 0));
    assert_eq!(node.ack("bob", page.epoch ^ 1, &[(1, 1)], 0).await.mark, 0);
    assert_eq!(node.ack("bob", page.epoch, &[(1, 1)], 1).await, UserAckResult { mark: 1, error: None });

    // The record outlives the process, and so does the trace's beginning once somebody names the user.
    let stages = |response: Response<GetTraceResponse>| {
        let milestones = response.into_inner().milestones;
        milestones.into_iter().map(|m| format!("{} {}", m.service, m.stage)).collect::<Vec<_>>()
    };
    let ask = GetTraceRequest { message_id: bob.message_id.clone() };
    let before = stages(api.get_trace(ask.clone()).await.unwrap());
    for stage in ["accepted", "committed", "relayed", "read", "acked"] {
        assert!(before.contains(&format!("delivery {stage}")), "{stage} of {before:?}");
    }
    assert_eq!(before.last().unwrap(), "router relayed");
    node.stop().await;
    node.restart().await;
    let state = delivery(&node.api(), &bob.message_id).await.unwrap().into_inner();
    assert_eq!(state.state(), DeliveryState::Acked);
    assert!(state.settled_us > 0);
    let missing = delivery(&node.api(), &eve.message_id).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    node.read("eve").await;
    let response =
        node.api().get_trace(GetTraceRequest { message_id: eve.message_id.clone() }).await.unwrap();
    assert_eq!(response.get_ref().missing, ["router"]);
    assert_eq!(stages(response), ["delivery accepted", "delivery read"]);
    node.stop().await;
}

#[tokio::test]
async fn what_was_not_relayed_is_relayed_when_the_router_is_back() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let mut node = Node::without_router(address).await;
    node.restart().await;
    let results = node.api().send(send(&["bob"], "hi", "")).await.unwrap().into_inner().results;
    assert_eq!(accepted(&results[0]).seq, 1);
    let refused = node.api().publish(publish("news", "hi")).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    node.stop().await;

    // Being due survives a restart.
    node.restart().await;
    node.router.serve(TcpListener::bind(address).await.unwrap(), &node.lifecycle);
    node.clock.advance(Duration::from_secs(3));
    let (router, clock) = (node.router.clone(), node.clock.clone());
    // The router does not know where bob is: that is no reason to stop.
    eventually("relayed three times", || {
        clock.advance(Duration::from_millis(300));
        router.seqs("bob").len() >= 3
    })
    .await;
    // Known to be offline: one more, and no further.
    node.router.0.outcome.store(router::RelayOutcome::Offline as i32, Ordering::Relaxed);
    let before = node.router.seqs("bob").len();
    eventually("told that bob is offline", || {
        clock.advance(Duration::from_millis(300));
        router.seqs("bob").len() > before
    })
    .await;
    // A newer message is the fence: when it was relayed for redelivery too, the scan has passed bob once more.
    node.api().send(send(&["eve"], "hi", "")).await.unwrap();
    eventually("eve's hint", || router.seqs("eve").len() == 1).await;
    node.clock.advance(Duration::from_secs(100));
    eventually("eve's hint again", || router.seqs("eve").len() == 2).await;
    assert_eq!(router.seqs("bob").len(), before + 1);
    // Reading arms the inbox again, and what is written ends it.
    let page = node.read("bob").await;
    node.router.0.outcome.store(router::RelayOutcome::Relayed as i32, Ordering::Relaxed);
    eventually("relayed after the read", || {
        clock.advance(Duration::from_millis(300));
        router.seqs("bob").len() > before + 1
    })
    .await;
    node.ack("bob", page.epoch, &[], 1).await;
    let written = router.seqs("bob").len();
    node.api().send(send(&["joe"], "hi", "")).await.unwrap();
    eventually("joe's hint", || router.seqs("joe").len() == 1).await;
    node.clock.advance(Duration::from_secs(100));
    eventually("joe's hint again", || router.seqs("joe").len() == 2).await;
    assert!(router.seqs("bob").len() <= written + 1);
    node.stop().await;
}

fn requests<T>(items: Vec<T>) -> impl Stream<Item = T> {
    stream::iter(items)
}

#[tokio::test]
async fn streams_answer_in_order_with_errors_in_their_place() {
    let mut node = Node::start().await;
    let sends: Vec<SendRequest> = (0..1_000)
        .map(|n| if n % 100 == 7 { send(&[], "x", "") } else { send(&["bob"], &n.to_string(), "") })
        .collect();
    let answers: Vec<_> = node.api().send_stream(requests(sends)).await.unwrap().into_inner().collect().await;
    assert_eq!(answers.len(), 1_000);
    let mut seq = 0;
    for (n, answer) in answers.into_iter().enumerate() {
        match answer.unwrap().result.unwrap() {
            send_stream_response::Result::Sent(sent) => {
                seq += 1;
                assert_eq!(accepted(&sent.results[0]).seq, seq);
            }
            send_stream_response::Result::Error(error) => {
                assert_eq!((n % 100, error.code.as_str()), (7, "bad_request"));
            }
        }
    }
    assert_eq!(seq, 990);
    let router = node.router.clone();
    eventually("all relayed", || router.seqs("bob").len() == 990).await;
    assert!(router.seqs("bob").into_iter().eq(1..=990));

    let publishes: Vec<PublishRequest> = (0..1_000)
        .map(|n| {
            publish(
                ["news", "", "closed"][usize::from(n % 100 == 3) + 2 * usize::from(n % 100 == 5)],
                &n.to_string(),
            )
        })
        .collect();
    let answers: Vec<_> =
        node.api().publish_stream(requests(publishes)).await.unwrap().into_inner().collect().await;
    let mut offset = 0;
    for (n, answer) in answers.into_iter().enumerate() {
        match answer.unwrap().result.unwrap() {
            publish_stream_response::Result::Published(published) => {
                assert!(published.offset > offset);
                offset = published.offset;
            }
            publish_stream_response::Result::Error(error) if n % 100 == 3 => {
                assert_eq!(error.code, "bad_request")
            }
            publish_stream_response::Result::Error(error) => {
                assert_eq!((n % 100, error.code.as_str(), error.retryable), (5, "rate_limited", true));
            }
        }
    }
    let bodies: Vec<_> = node.router.0.publications.lock().iter().map(|p| p.payload.clone()).collect();
    assert_eq!(bodies, (0..1_000).filter(|n| n % 100 != 3).map(|n| text(n.to_string())).collect::<Vec<_>>());
    node.stop().await;
}

#[tokio::test]
async fn wrong_keys_are_told_what_to_do() {
    let mut node = Node::start().await;
    let cases = [
        (None, "carries no API key"),
        (Some("Basic abc"), "must have the form `Bearer <API key>`"),
        (Some("Bearer wrong"), "is not known here"),
        // The cluster's key is not a back end's.
        (Some("Bearer key of the cluster"), "is not known here"),
    ];
    for (header, expected) in cases {
        let mut request = Request::new(send(&["bob"], "hi", ""));
        if let Some(header) = header {
            request.metadata_mut().insert("authorization", header.parse().unwrap());
        }
        let status = DeliveryClient::new(node.channel()).send(request).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
        assert!(status.message().contains(expected), "{}", status.message());
    }
    let status =
        InboxClient::with_interceptor(node.channel(), with_key).ack(AckRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    assert_eq!(node.read("bob").await.head, 0);
    node.stop().await;
}

#[tokio::test]
async fn each_bad_field_is_named() {
    let mut node = Node::start().await;
    let many: Vec<String> = (0..1_001).map(|n| n.to_string()).collect();
    let payload = |kind| SendRequest {
        users: vec!["bob".into()],
        payload: Some(Payload { kind }),
        ..SendRequest::default()
    };
    let cases = [
        (send(&[], "x", ""), "users has 0 entries; it needs 1 to 1000"),
        (SendRequest { users: many, ..send(&[], "x", "") }, "users has 1001 entries"),
        (send(&["a", ""], "x", ""), "users[1]: user is empty"),
        (send(&["a\tb"], "x", ""), "users[0]: user contains the control character U+0009"),
        (send(&[&"a".repeat(201)], "x", ""), "user has 201 bytes; at most 200"),
        (send(&["a", "b", "a"], "x", ""), "users[2]: \"a\" is named twice"),
        (send(&["a"], "x", &"k".repeat(201)), "dedupe_key has 201 bytes"),
        (send(&["a"], &"x".repeat(65_537), ""), "payload has 65537 bytes"),
        (SendRequest { payload: None, ..send(&["a"], "x", "") }, "payload is missing"),
        (payload(None), "payload is missing"),
        (payload(Some(Kind::Json("{".into()))), "payload.json is not a JSON value"),
    ];
    for (request, expected) in cases {
        let status = node.api().send(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(expected), "{}", status.message());
    }
    for (request, expected) in [
        (publish("", "x"), "channel is empty"),
        (publish("news", &"x".repeat(65_537)), "payload has 65537 bytes"),
        (
            PublishRequest { dedupe_key: "\u{7f}".into(), ..publish("news", "x") },
            "dedupe_key contains the control",
        ),
    ] {
        let status = node.api().publish(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().contains(expected), "{}", status.message());
    }
    let ask = GetDeliveryRequest { user: "bob".into(), message_id: "7".into() };
    assert!(
        node.api().get_delivery(ask).await.unwrap_err().message().contains("message_id \"7\" is not a UUID")
    );
    bad_edge_calls_are_refused(&node).await;
    node.stop().await;
}

async fn bad_edge_calls_are_refused(node: &Node) {
    let query = |user: &str| InboxQuery { user: user.into(), ..InboxQuery::default() };
    for queries in [vec![query("bob"); 501], vec![query("")]] {
        let status = node.inbox().read_inbox(ReadInboxRequest { queries }).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
    let ack =
        |from, to| UserAck { user: "bob".into(), acked: vec![SeqRange { from, to }], ..UserAck::default() };
    for acks in [vec![ack(1, 1); 501], vec![ack(0, 1)], vec![ack(2, 1)], vec![UserAck::default()]] {
        let status = node.inbox().ack(AckRequest { acks, edge: String::new() }).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
    }
}
