use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use prometheus_client::registry::Registry;
use sanjay_proto::edge::v1::ConnectionEvents;
use sanjay_proto::router::v1::{
    AskRequest, AskResponse, LocateRequest, LocateResponse, PublishResponse, RelayResponse, TraceResponse,
    WatchConnectionsRequest,
    router_server::{Router as RouterService, RouterServer},
};
use sanjay_runtime::{
    Context, Lifecycle, Secret,
    grpc::{Endpoints, PeerMetrics, PoolOptions, serve},
};
use tokio::{net::TcpListener, time::Instant};
use tonic::{Request, Response, Status, service::Routes};

use super::*;

const SERVICE: &str = "sanjay.router.v1.Router";

/// Remembers what it was asked. One that hangs takes every call, does it, and never answers.
#[derive(Clone, Default)]
struct Recording(Arc<Recorded>);

#[derive(Default)]
struct Recorded {
    hangs: AtomicBool,
    channels: Mutex<Vec<String>>,
    hints: Mutex<Vec<String>>,
}

impl Recording {
    async fn answer<T>(&self, answer: T) -> Result<Response<T>, Status> {
        if self.0.hangs.load(Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(answer))
    }

    fn channels(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.channels.lock())
    }
}

#[tonic::async_trait]
impl RouterService for Recording {
    type WatchConnectionsStream = tokio_stream::Empty<Result<ConnectionEvents, Status>>;

    async fn watch_connections(
        &self,
        _: Request<WatchConnectionsRequest>,
    ) -> Result<Response<Self::WatchConnectionsStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        let publications = request.into_inner().publications;
        let results = publications.iter().map(|_| PublishResult::default()).collect();
        self.0.channels.lock().extend(publications.into_iter().map(|publication| publication.channel));
        self.answer(PublishResponse { results }).await
    }

    async fn ask(&self, _: Request<AskRequest>) -> Result<Response<AskResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn relay(&self, request: Request<RelayRequest>) -> Result<Response<RelayResponse>, Status> {
        let hints = request.into_inner().hints;
        let outcomes = vec![1; hints.len()];
        self.0.hints.lock().extend(hints.into_iter().map(|hint| hint.user));
        self.answer(RelayResponse { outcomes }).await
    }

    async fn locate(&self, _: Request<LocateRequest>) -> Result<Response<LocateResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn history(&self, request: Request<HistoryRequest>) -> Result<Response<HistoryResponse>, Status> {
        let epoch = request.into_inner().epoch;
        self.answer(HistoryResponse { epoch, ..HistoryResponse::default() }).await
    }

    async fn trace(&self, request: Request<TraceRequest>) -> Result<Response<TraceResponse>, Status> {
        let milestone = Milestone { message_id: request.into_inner().message_id, ..Milestone::default() };
        self.answer(TraceResponse { milestones: vec![milestone] }).await
    }
}

/// Two routers that serve, and the client of both.
struct Two {
    routers: [Recording; 2],
    router: Router,
    _lifecycles: [Lifecycle; 2],
    _context: Context,
}

impl Two {
    async fn start() -> Self {
        let context = Context::system(Secret::new("cluster key of the tests"));
        let routers = [Recording::default(), Recording::default()];
        let lifecycles = [Lifecycle::new(), Lifecycle::new()];
        let mut endpoints = Vec::new();
        for (router, lifecycle) in routers.iter().zip(&lifecycles) {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            endpoints.push(format!("http://{}", listener.local_addr().unwrap()));
            let routes = Routes::new(RouterServer::new(router.clone()));
            serve("fake router", listener, routes, &[SERVICE], lifecycle).await.unwrap();
        }
        let endpoints: Endpoints = endpoints.into_iter().collect();
        let options = PoolOptions {
            peer: "router",
            setting: "delivery.router",
            endpoints: &endpoints,
            service: SERVICE,
            lanes: 1,
            connect_timeout: TIMEOUT,
            ready: None,
            up: None,
            breaker: None,
            metrics: &PeerMetrics::register(&mut Registry::default(), "delivery", &["router"]),
        };
        let router = Router::new(PeerPool::start(options, &context).unwrap());
        Self { routers, router, _lifecycles: lifecycles, _context: context }
    }

    /// The first of the two takes calls and never answers.
    fn hang_one(&self) {
        self.routers[0].0.hangs.store(true, Ordering::Relaxed);
    }
}

fn publication(channel: &str, dedupe_key: &str) -> NewPublication {
    NewPublication { channel: channel.into(), dedupe_key: dedupe_key.into(), ..NewPublication::default() }
}

#[tokio::test]
async fn only_what_has_a_key_is_published_again_elsewhere() {
    let two = Two::start().await;
    two.hang_one();
    let batch = || vec![publication("a", "key a"), publication("b", ""), publication("c", "key c")];
    // The routers are asked in turn, so that one of two batches at least meets the one that hangs.
    let mut met = 0;
    for _ in 0..2 {
        let began = Instant::now();
        let results = two.router.publish(batch()).await;
        assert!(began.elapsed() < TIMEOUT * 3 / 2, "{:?}", began.elapsed());
        let [first, second] = [0, 1].map(|index| two.routers[index].channels());
        assert!(results[0].is_ok() && results[2].is_ok(), "{results:?}");
        if results[1].is_ok() {
            assert_eq!((first.len(), second), (0, vec!["a".into(), "b".into(), "c".into()]));
            continue;
        }
        met += 1;
        let Err(RouterError::Call(error)) = &results[1] else { panic!("{results:?}") };
        assert!(!error.is_not_sent() && error.to_string().contains("no answer within 1.0 s"), "{error}");
        assert_eq!(first[..3], ["a", "b", "c"]);
        assert_eq!(second, ["a", "c"], "in their order, and without the one that may have been published");
    }
    assert!(met >= 1);
}

#[tokio::test]
async fn hints_are_relayed_by_another_router_and_traces_come_from_all() {
    let two = Two::start().await;
    assert_eq!(two.router.trace(&[7; 16]).await.0.len(), 2);
    two.hang_one();
    for _ in 0..2 {
        let hint = InboxHint { user: "bob".into(), ..InboxHint::default() };
        assert_eq!(two.router.relay(vec![hint]).await, Ok(vec![1]));
    }
    assert_eq!(*two.routers[1].0.hints.lock(), ["bob", "bob"]);
    let (milestones, complete) = two.router.trace(&[7; 16]).await;
    assert_eq!((milestones.len(), complete), (1, false));
}
