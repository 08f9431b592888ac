//! Pools over real servers on loopback: some that serve, one that dies, one that takes connections and says
//! nothing, and one that freezes as a stopped process does.

use std::{io, sync::atomic::AtomicBool};

use futures::{FutureExt, future::BoxFuture};
use sanjay_proto::edge::v1::{
    AckRequest, AckResponse, InboxPage, ReadInboxRequest, ReadInboxResponse,
    inbox_client::InboxClient,
    inbox_server::{Inbox, InboxServer},
};
use std::net::SocketAddr;
use tokio::{
    io::copy,
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};
use tonic::{Code, Request, Response, Status, service::Routes};

use super::*;
use crate::{
    clock::SystemClock,
    grpc::{ServeOptions, cluster_auth, serve_with},
    random::SeededRandom,
    readiness::Readiness,
    secret::Secret,
};

const SERVICE: &str = "sanjay.edge.v1.Inbox";
const LONG: Duration = Duration::from_secs(10);

/// Answers a read with its number; an ack is refused.
struct Numbered {
    number: u64,
    /// Breaks its connection under a read instead.
    breaks: Arc<AtomicBool>,
    lifecycle: Lifecycle,
}

#[tonic::async_trait]
impl Inbox for Numbered {
    async fn read_inbox(&self, _: Request<ReadInboxRequest>) -> Result<Response<ReadInboxResponse>, Status> {
        if self.breaks.load(Ordering::Relaxed) {
            self.lifecycle.hard().cancel();
            sleep(LONG).await;
        }
        let page = InboxPage { head: self.number, ..InboxPage::default() };
        Ok(Response::new(ReadInboxResponse { pages: vec![page] }))
    }

    async fn ack(&self, _: Request<AckRequest>) -> Result<Response<AckResponse>, Status> {
        Err(Status::invalid_argument(format!("server {} takes no acks", self.number)))
    }
}

struct Server {
    address: SocketAddr,
    lifecycle: Lifecycle,
    breaks: Arc<AtomicBool>,
}

impl Server {
    async fn start(number: u64) -> Self {
        Self::start_at(number, "127.0.0.1:0".parse().unwrap()).await
    }

    async fn start_at(number: u64, address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (lifecycle, breaks) = (Lifecycle::new(), Arc::new(AtomicBool::new(false)));
        let inbox = Numbered { number, breaks: Arc::clone(&breaks), lifecycle: lifecycle.clone() };
        let routes = Routes::new(InboxServer::with_interceptor(inbox, cluster_auth(&key())));
        let (name, health, key) = ("test server", &[SERVICE], Some(cluster_auth(&key())));
        let options = ServeOptions { name, routes, key, health, reflection: false, serving: None };
        serve_with(listener, options, &lifecycle).await.unwrap();
        Self { address, lifecycle, breaks }
    }

    /// Cuts everything at once.
    async fn kill(&self) {
        self.lifecycle.hard().cancel();
        self.lifecycle.shutdown(Duration::ZERO).await;
    }
}

/// Forwards to a server until it freezes: then it keeps its connections and moves no byte.
async fn freezable(to: SocketAddr) -> (SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let frozen = CancellationToken::new();
    let freeze = frozen.clone();
    tokio::spawn(async move {
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            let freeze = freeze.clone();
            tokio::spawn(async move {
                let mut far = TcpStream::connect(to).await.unwrap();
                {
                    let (mut from_near, mut to_near) = near.split();
                    let (mut from_far, mut to_far) = far.split();
                    let there = copy(&mut from_near, &mut to_far);
                    let back = copy(&mut from_far, &mut to_near);
                    let forward = async { tokio::join!(there, back) };
                    if freeze.run_until_cancelled(forward).await.is_some() {
                        return;
                    }
                }
                std::future::pending::<()>().await;
            });
        }
    });
    (address, frozen)
}

/// Takes connections and never says anything.
async fn mute() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    });
    address
}

/// An address at which nobody listens.
async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

fn key() -> Secret {
    Secret::new("cluster key of the tests")
}

fn context() -> Context {
    Context {
        clock: Arc::new(SystemClock),
        random: Arc::new(SeededRandom::new(7)),
        lifecycle: Lifecycle::new(),
        readiness: Readiness::new(),
        namespaces: crate::SharedNamespaces::default(),
        cluster_key: key(),
    }
}

fn options<'a>(endpoints: &'a Endpoints, metrics: &'a PeerMetrics) -> PoolOptions<'a> {
    PoolOptions {
        peer: "delivery node",
        setting: "edge.delivery",
        endpoints,
        service: SERVICE,
        lanes: 1,
        connect_timeout: Duration::from_secs(1),
        ready: None,
        up: None,
        breaker: None,
        metrics,
    }
}

fn pool(addresses: &[SocketAddr], context: &Context) -> PeerPool {
    let endpoints: Endpoints = addresses.iter().map(|address| format!("http://{address}")).collect();
    PeerPool::start(options(&endpoints, &PeerMetrics::default()), context).unwrap()
}

async fn read(pool: &PeerPool, call: Call) -> Result<u64, PeerError> {
    let read = async |channel, request| InboxClient::new(channel).read_inbox(request).await;
    Ok(pool.call(call, ReadInboxRequest::default(), read).await?.pages[0].head)
}

/// Waits until the peers have these ranks, in the order of their endpoints.
async fn ranks(pool: &PeerPool, expected: &[Rank]) {
    let mut changes = pool.shared.changes.subscribe();
    let waiting = async {
        loop {
            changes.mark_unchanged();
            if pool.peers().iter().map(|peer| peer.rank()).collect::<Vec<_>>() == expected {
                return;
            }
            changes.changed().await.unwrap();
        }
    };
    timeout(LONG, waiting).await.unwrap_or_else(|_| panic!("never {expected:?}: {pool:?}"));
}

#[tokio::test]
async fn calls_go_to_those_that_serve_and_to_others_again_when_they_are_back() {
    let context = context();
    let (one, two) = (Server::start(1).await, Server::start(2).await);
    let pool = pool(&[one.address, two.address], &context);
    ranks(&pool, &[Rank::Serving, Rank::Serving]).await;
    let mut answers = Vec::new();
    for _ in 0..4 {
        answers.push(read(&pool, Call::once(LONG)).await.unwrap());
    }
    answers.sort_unstable();
    assert_eq!(answers, [1, 1, 2, 2], "in turn");

    // One that says that it shuts down is left out before its connections end.
    one.lifecycle.begin_shutdown();
    ranks(&pool, &[Rank::Down, Rank::Serving]).await;
    for _ in 0..4 {
        assert_eq!(read(&pool, Call::once(LONG)).await.unwrap(), 2);
    }
    one.kill().await;
    let one = Server::start_at(1, one.address).await;
    ranks(&pool, &[Rank::Serving, Rank::Serving]).await;
    two.kill().await;
    ranks(&pool, &[Rank::Serving, Rank::Down]).await;
    assert_eq!(read(&pool, Call::once(LONG)).await.unwrap(), 1);
    let metrics = &pool.shared.metrics;
    assert_eq!((metrics.known.get(), metrics.healthy.get()), (2, 1));
    drop(one);
}

#[tokio::test]
async fn who_freezes_is_left_out_within_three_seconds_and_its_calls_are_made_elsewhere() {
    let context = context();
    let (one, two) = (Server::start(1).await, Server::start(2).await);
    let (address, freeze) = freezable(one.address).await;
    let pool = pool(&[address, two.address], &context);
    ranks(&pool, &[Rank::Serving, Rank::Serving]).await;
    let held = Arc::clone(&pool.peers()[0]);
    freeze.cancel();
    let frozen = Instant::now();
    // Nobody knows yet: whatever is asked first gets half of the time, and the rest goes elsewhere.
    for _ in 0..2 {
        assert_eq!(read(&pool, Call::idempotent(Duration::from_millis(600))).await.unwrap(), 2);
    }
    assert_eq!(pool.shared.metrics.answered.get(), 1);
    let why = timeout(LONG, pool.until_lost(&held)).await.unwrap();
    assert!(frozen.elapsed() < Duration::from_secs(3), "{:?}: {why}", frozen.elapsed());
    for _ in 0..4 {
        assert_eq!(read(&pool, Call::once(LONG)).await.unwrap(), 2);
    }
}

#[tokio::test]
async fn who_takes_connections_and_says_nothing_is_left_out() {
    let context = context();
    let (mute, two) = (mute().await, Server::start(2).await);
    let both = pool(&[mute, two.address], &context);
    ranks(&both, &[Rank::Down, Rank::Serving]).await;
    assert_eq!(read(&both, Call::once(LONG)).await.unwrap(), 2);
    // Alone it is asked all the same; what became of the call is unknown.
    let alone = pool(&[mute], &context);
    let error = read(&alone, Call::idempotent(Duration::from_millis(200))).await.unwrap_err();
    assert!(matches!(error, PeerError::Unknown { .. }), "{error}");
    assert_eq!(error.to_string(), format!("no delivery node answers: http://{mute}: no answer within 0.2 s"));
}

#[tokio::test]
async fn what_was_not_sent_goes_elsewhere_and_what_may_have_been_done_does_not() {
    let context = context();
    let (gone, two) = (nobody().await, Server::start(2).await);
    // Not asked yet: the first call finds out.
    let first = pool(&[gone, two.address], &context);
    for _ in 0..4 {
        assert_eq!(read(&first, Call::once(LONG)).await.unwrap(), 2);
    }
    let one = Server::start(1).await;
    let both = pool(&[one.address, two.address], &context);
    ranks(&both, &[Rank::Serving, Rank::Serving]).await;
    one.breaks.store(true, Ordering::Relaxed);
    let mut unknown = 0;
    for _ in 0..2 {
        match read(&both, Call::once(LONG)).await {
            Ok(number) => assert_eq!(number, 2),
            Err(error) => {
                assert!(matches!(error, PeerError::Unknown { .. }), "{error}");
                unknown += 1;
            }
        }
    }
    assert_eq!(unknown, 1, "the call under which the connection broke is not made again");
    assert_eq!(both.peers()[0].rank(), Rank::Down, "and nobody else calls that peer");

    let one = Server::start(1).await;
    let both = pool(&[one.address, two.address], &context);
    ranks(&both, &[Rank::Serving, Rank::Serving]).await;
    one.breaks.store(true, Ordering::Relaxed);
    for _ in 0..2 {
        assert_eq!(read(&both, Call::idempotent(LONG)).await.unwrap(), 2);
    }
    assert_eq!((both.shared.metrics.answered.get(), both.shared.metrics.failovers.get()), (1, 1));
}

#[tokio::test]
async fn a_refusal_is_final() {
    let context = context();
    let (one, two) = (Server::start(1).await, Server::start(2).await);
    let pool = pool(&[one.address, two.address], &context);
    let ack = async |channel, request| InboxClient::new(channel).ack(request).await;
    let refused = pool.call(Call::idempotent(LONG), AckRequest::default(), ack).await.unwrap_err();
    let PeerError::Refused { code: Code::InvalidArgument, message, .. } = &refused else {
        panic!("{refused}")
    };
    assert!(message.contains("takes no acks"), "{message}");
    assert_eq!(pool.shared.metrics.failovers.get(), 0);
}

#[tokio::test]
async fn when_nobody_can_be_reached_all_are_named_at_once() {
    let context = context();
    let gone = [nobody().await, nobody().await];
    let pool = pool(&gone, &context);
    ranks(&pool, &[Rank::Down, Rank::Down]).await;
    let started = Instant::now();
    let error = read(&pool, Call::once(LONG)).await.unwrap_err();
    assert!(error.is_not_sent() && started.elapsed() < Duration::from_secs(1), "{error}");
    let text = error.to_string();
    assert!(text.starts_with("no delivery node can be reached: "), "{text}");
    for address in gone {
        assert!(text.contains(&format!("http://{address}: ")), "{text}");
    }
    assert_eq!(text.matches("refused").count(), 2, "{text}");
}

#[tokio::test]
async fn retries_end_with_the_budget() {
    let context = context();
    let (mute, two) = (mute().await, Server::start(2).await);
    let pool = pool(&[two.address, mute], &context);
    ranks(&pool, &[Rank::Serving, Rank::Down]).await;
    while pool.shared.budget.spend() {}
    // As if its watch had seen nothing yet.
    pool.peers()[1].set(Rank::Serving, "");
    pool.peers()[0].set(Rank::Unknown, "");
    let call = Call::idempotent(Duration::from_millis(100));
    let error = read(&pool, call).await.unwrap_err();
    assert!(matches!(error, PeerError::Unknown { .. }), "{error}");
    assert_eq!((pool.shared.metrics.refused.get(), pool.shared.metrics.failovers.get()), (1, 0));
    (0..5).for_each(|_| pool.shared.budget.earn());
    pool.peers()[1].set(Rank::Serving, "");
    assert_eq!(read(&pool, call).await.unwrap(), 2);
}

#[tokio::test]
async fn another_role_behind_an_address_is_named() {
    let context = context();
    let one = Server::start(1).await;
    let endpoints = Endpoints::from(format!("http://{}", one.address));
    let metrics = PeerMetrics::default();
    let options = PoolOptions { service: "sanjay.router.v1.Router", ..options(&endpoints, &metrics) };
    let pool = PeerPool::start(options, &context).unwrap();
    ranks(&pool, &[Rank::Down]).await;
    let problem = pool.peers()[0].problem();
    assert!(problem.contains("does not serve sanjay.router.v1.Router"), "{problem}");
}

#[tokio::test]
async fn a_peer_of_another_cluster_is_left_out_and_named() {
    let context = Context { cluster_key: Secret::new("the key of another cluster"), ..context() };
    let one = Server::start(1).await;
    let pool = pool(&[one.address], &context);
    ranks(&pool, &[Rank::Down]).await;
    let problem = pool.peers()[0].problem();
    assert!(problem.contains("cluster key is wrong") && problem.contains("cluster.key"), "{problem}");
    assert!(!problem.contains("of another cluster"), "{problem}");
    // It is asked again each second, and each problem is told once.
    let peer = &pool.peers()[0];
    let told = |problems: &[&str]| problems.iter().filter(|problem| peer.is_news(problem)).count();
    assert_eq!(told(&["closed", "reset", "closed", "reset", &problem]), 2);
    assert_eq!(told(&["late", "refused", "gone"]), 1, "no more than four");
}

#[tokio::test]
async fn who_stays_with_a_peer_is_spread_and_leaves_only_for_another_that_serves() {
    let context = context();
    let (one, two) = (Server::start(1).await, Server::start(2).await);
    let gone = nobody().await;
    let pool = pool(&[one.address, two.address, gone], &context);
    ranks(&pool, &[Rank::Serving, Rank::Serving, Rank::Down]).await;
    let all = pool.peers();
    let chosen: Vec<_> = (0..100).map(|_| pool.choose(&[]).unwrap()).collect();
    let of = |peer| chosen.iter().filter(|chosen| Arc::ptr_eq(chosen, peer)).count();
    assert!(of(&all[0]) > 20 && of(&all[1]) > 20 && of(&all[2]) == 0, "{}, {}", of(&all[0]), of(&all[1]));
    let mut tried = vec![Arc::clone(&all[0])];
    for expected in [&all[1], &all[2]] {
        let next = pool.choose(&tried).unwrap();
        assert!(Arc::ptr_eq(&next, expected));
        tried.push(next);
    }
    assert!(pool.choose(&tried).is_none());

    two.kill().await;
    ranks(&pool, &[Rank::Serving, Rank::Down, Rank::Down]).await;
    timeout(LONG, pool.until_lost(&all[1])).await.unwrap();
    pool.suspect(&all[0], "a test says so");
    // Nobody else serves, so that there is no reason to leave; its watch finds that it serves well.
    assert!(pool.until_lost(&all[0]).now_or_never().is_none());
    ranks(&pool, &[Rank::Serving, Rank::Down, Rank::Down]).await;
}

/// A resolver whose answers a test sets.
#[derive(Default)]
struct Told(Mutex<Option<Vec<SocketAddr>>>);

impl Resolve for Told {
    fn resolve<'a>(&'a self, host: &'a str, _: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        let found = self.0.lock().clone();
        async move { found.ok_or_else(|| io::Error::other(format!("nobody knows {host}"))) }.boxed()
    }
}

/// Waits until the pool has so many addresses.
async fn known(pool: &PeerPool, count: usize) {
    pool.shared.resolve.notify_one();
    let mut peers = pool.shared.peers.subscribe();
    timeout(LONG, peers.wait_for(|peers| peers.len() == count)).await.expect("in time").unwrap();
}

#[tokio::test]
async fn names_are_resolved_again_and_each_address_is_a_peer() {
    let context = context();
    let (one, two) = (Server::start(1).await, Server::start(2).await);
    let resolver = Arc::new(Told::default());
    let (endpoints, metrics) = (Endpoints::from("http://delivery.example:1"), PeerMetrics::default());
    let ready = context.readiness.register("delivery");
    let options = PoolOptions { ready: Some(ready), ..options(&endpoints, &metrics) };
    let pool = PeerPool::start_with(options, &context, Arc::clone(&resolver) as Arc<dyn Resolve>).unwrap();
    let error = read(&pool, Call::once(LONG)).await.unwrap_err().to_string();
    assert!(error.contains("edge.delivery: delivery.example cannot be resolved: nobody knows"), "{error}");
    assert!(!context.readiness.is_ready());

    *resolver.0.lock() = Some(vec![one.address]);
    known(&pool, 1).await;
    ranks(&pool, &[Rank::Serving]).await;
    assert!(context.readiness.is_ready());
    let first = Arc::clone(&pool.peers()[0]);
    assert_eq!(first.to_string(), format!("http://delivery.example:1 ({})", one.address));

    let both =
        if one.address < two.address { [one.address, two.address] } else { [two.address, one.address] };
    *resolver.0.lock() = Some(both.iter().rev().copied().collect());
    known(&pool, 2).await;
    ranks(&pool, &[Rank::Serving, Rank::Serving]).await;
    assert!(pool.peers().iter().any(|peer| Arc::ptr_eq(peer, &first)), "who stays is not made anew");

    // An answer that says nothing changes nothing.
    *resolver.0.lock() = Some(Vec::new());
    pool.shared.resolve.notify_one();
    let unresolved = async {
        while pool.unresolved().is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, unresolved).await.unwrap();
    assert_eq!(pool.peers().len(), 2);

    *resolver.0.lock() = Some(vec![two.address]);
    known(&pool, 1).await;
    assert_eq!(read(&pool, Call::once(LONG)).await.unwrap(), 2);
    // Whoever stays with an address that is gone still learns of its health.
    one.kill().await;
    timeout(LONG, pool.until_lost(&first)).await.unwrap();
    assert!(pool.unresolved().is_empty());
}

#[tokio::test]
async fn everybody_is_asked_for_what_each_knows_alone() {
    let context = context();
    let (one, two) = (Server::start(1).await, Server::start(2).await);
    let gone = nobody().await;
    let pool = pool(&[one.address, two.address, gone], &context);
    ranks(&pool, &[Rank::Serving, Rank::Serving, Rank::Down]).await;
    let read = async |channel, request| InboxClient::new(channel).read_inbox(request).await;
    let answers = pool.call_all(LONG, ReadInboxRequest::default(), read).await;
    let heads: Vec<_> =
        answers.iter().filter_map(|answer| Some(answer.as_ref().ok()?.pages[0].head)).collect();
    assert_eq!(heads, [1, 2]);
    let missing = answers[2].as_ref().unwrap_err().to_string();
    assert!(missing.contains(&gone.to_string()) && missing.contains("refused"), "{missing}");
}

#[tokio::test]
async fn the_watches_end_with_the_pool_and_with_shutdown() {
    let context = context();
    let one = Server::start(1).await;
    let first = pool(&[one.address], &context);
    let second = pool(&[one.address], &context);
    ranks(&second, &[Rank::Serving]).await;
    drop(first);
    drop(second);
    let ended = async {
        while !context.lifecycle.running().is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(LONG, ended).await.expect("nobody holds the pools");
    let third = pool(&[one.address], &context);
    ranks(&third, &[Rank::Serving]).await;
    assert!(context.lifecycle.shutdown(LONG).await.is_empty());
    assert_eq!(read(&third, Call::once(LONG)).await.unwrap(), 1, "calls go on");
}

/// Once a peer changed its rank between two looks of one choice, and nobody was left to choose from.
#[tokio::test]
async fn somebody_is_chosen_while_ranks_change() {
    let pool = pool(&[mute().await], &context());
    let peer = Arc::clone(&pool.peers()[0]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                peer.set(Rank::Unknown, "");
                peer.set(Rank::Serving, "");
            }
        });
        let chosen = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..200_000).all(|_| pool.choose(&[]).is_some())
        }));
        stop.store(true, Ordering::Relaxed);
        assert!(chosen.is_ok_and(|chosen| chosen), "a peer whose rank changes can be chosen");
    });
}
