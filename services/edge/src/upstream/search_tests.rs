use std::{future::pending, net::SocketAddr, pin::Pin};

use prometheus_client::registry::Registry;
use sanjay_proto::edge::v1::router_link_server::{RouterLink, RouterLinkServer};
use sanjay_runtime::{
    Context, Lifecycle, Secret, SeededRandom,
    grpc::{Endpoints, PeerMetrics, PoolOptions, cluster_auth, serve},
};
use tokio::net::TcpListener;
use tokio_stream::Stream;
use tonic::{Request, Response, service::Routes};

use super::*;

const SERVICE: &str = "sanjay.edge.v1.RouterLink";
const LONG: Duration = Duration::from_secs(60);

/// A router that never says hello.
struct Mute;

#[tonic::async_trait]
impl RouterLink for Mute {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<AttachResponse, Status>> + Send>>;

    async fn attach(
        &self,
        _: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        pending().await
    }
}

struct Routers {
    addresses: Vec<SocketAddr>,
    lives: Vec<Lifecycle>,
    pool: PeerPool,
    context: Context,
}

impl Routers {
    async fn start(count: usize) -> Self {
        let context = Context {
            random: Arc::new(SeededRandom::new(5)),
            ..Context::system(Secret::new("cluster key of the tests"))
        };
        let (mut addresses, mut lives) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            addresses.push(listener.local_addr().unwrap());
            let life = Lifecycle::new();
            let auth = cluster_auth(&context.cluster_key);
            let routes = Routes::new(RouterLinkServer::with_interceptor(Mute, auth));
            serve("mute router", listener, routes, &[SERVICE], &life).await.unwrap();
            lives.push(life);
        }
        let endpoints: Endpoints = addresses.iter().map(|address| format!("http://{address}")).collect();
        let options = PoolOptions {
            peer: "router",
            setting: "edge.router",
            endpoints: &endpoints,
            service: SERVICE,
            lanes: 1,
            connect_timeout: Duration::from_secs(1),
            ready: None,
            up: None,
            breaker: None,
            metrics: &PeerMetrics::register(&mut Registry::default(), "edge", &["router"]),
        };
        let pool = PeerPool::start(options, &context).unwrap();
        Self { addresses, lives, pool, context }
    }

    fn search(&self) -> Search {
        Search::new(self.pool.clone(), Arc::clone(&self.context.random))
    }

    fn index(&self, peer: &Peer) -> usize {
        let shown = |address: &SocketAddr| peer.to_string() == format!("http://{address}");
        self.addresses.iter().position(shown).expect("it is one of them")
    }
}

fn ended(again: bool) -> Ended {
    Ended { why: "a test ends it".into(), again, broken: false }
}

#[tokio::test]
async fn everybody_is_tried_before_a_pause_and_pauses_grow() {
    let routers = Routers::start(3).await;
    let mut search = routers.search();
    let mut longest = Vec::new();
    for round in 1..=5 {
        let mut tried = Vec::new();
        for _ in 0..3 {
            let router = search.next().ok().expect("somebody is left");
            tried.push(routers.index(&router));
            search.refused(router, "it is busy");
        }
        tried.sort_unstable();
        assert_eq!(tried, [0, 1, 2]);
        let fruitless = search.next().expect_err("nobody is left");
        assert_eq!(fruitless.attempt, round);
        let why = fruitless.why.expect("everybody was asked");
        assert_eq!(why.matches("it is busy").count(), 3, "{why}");
        assert!(fruitless.pause <= MAX_PAUSE.min(FIRST_PAUSE * (1 << round)));
        longest.push(fruitless.pause);
    }
    assert!(longest.iter().max() > longest.first(), "{longest:?}");
}

#[tokio::test]
async fn after_a_stream_another_router_comes_first_and_at_once() {
    let routers = Routers::start(2).await;
    let mut search = routers.search();
    let first = search.next().ok().unwrap();
    search.attached(&first);
    search.ended(Arc::clone(&first), &ended(false), LONG);
    let second = search.next().ok().expect("without a pause");
    assert!(!Arc::ptr_eq(&first, &second));
    // Both end their streams at once: neither is tried again without a pause, and clients are told nothing yet.
    search.ended(second, &ended(false), Duration::ZERO);
    let fruitless = search.next().expect_err("both were tried");
    assert_eq!(fruitless.why, None);
    assert!(search.next().is_ok(), "the round after leaves nobody out");
}

#[tokio::test]
async fn who_refused_before_a_stream_is_tried_after_it_without_a_pause() {
    let routers = Routers::start(2).await;
    let mut search = routers.search();
    let first = search.next().ok().unwrap();
    search.refused(Arc::clone(&first), "it starts");
    let second = search.next().ok().unwrap();
    search.attached(&second);
    search.ended(second, &ended(false), Duration::ZERO);
    assert!(Arc::ptr_eq(&search.next().ok().expect("without a pause"), &first));
}

#[tokio::test]
async fn a_router_that_wants_everything_announced_again_is_attached_to_at_once() {
    let routers = Routers::start(2).await;
    let mut search = routers.search();
    let first = search.next().ok().unwrap();
    search.ended(Arc::clone(&first), &ended(true), LONG);
    assert!(Arc::ptr_eq(&search.next().ok().unwrap(), &first));
    search.ended(Arc::clone(&first), &ended(true), Duration::ZERO);
    assert!(!Arc::ptr_eq(&search.next().ok().unwrap(), &first), "unless it says so again and again");
}

#[tokio::test]
async fn an_attach_without_an_answer_ends() {
    let routers = Routers::start(1).await;
    let router = routers.search().next().ok().unwrap();
    let began = tokio::time::Instant::now();
    let why = attach(router.channel(0), EdgeHello::default()).await.expect_err("nobody says hello");
    assert!(why.contains("no answer within 2s") && began.elapsed() < ATTACH_TIMEOUT * 2, "{why}");
    for life in &routers.lives {
        life.hard().cancel();
    }
    let why = attach(router.channel(0), EdgeHello::default()).await.expect_err("nobody listens");
    assert!(why.starts_with("Unavailable: ") || why.starts_with("Unknown: "), "{why}");
}
