//! Routers that meet in a real Redis server.

use sanjay_testkit::servers::Redis;
use tokio::{
    runtime::{Builder, Runtime},
    time::Instant,
};

use super::*;

const LEASE: Duration = Duration::from_secs(1);

fn config(redis: &Redis, node: &str) -> Config {
    Config {
        node: node.into(),
        registry: redis.url(),
        redis_timeout_ms: 300,
        lease_ms: LEASE.as_millis().try_into().unwrap(),
        ..Config::default()
    }
}

/// A router that can be killed: nothing of it gets to say goodbye.
async fn mortal_router(config: Config) -> (Router, Runtime) {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let router = runtime.spawn(router(config)).await.unwrap();
    (router, runtime)
}

/// Reads until the stream ends.
async fn ending(edge: &mut Edge) -> Option<Status> {
    loop {
        match edge.next().await {
            Ok(Some(_)) => {}
            Ok(None) => return None,
            Err(status) => return Some(status),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_routers_share_channels_and_users() {
    let redis = Redis::start().await;
    let (one, two) = (router(config(&redis, "r1")).await, router(config(&redis, "r2")).await);
    let (mut alice, mut bob) = (one.attach("a", 1).await, two.attach("b", 1).await);
    assert_eq!((alice.subscribe("news").await, bob.subscribe("news").await), (0, 0));
    alice.open("alice").await;
    bob.open("bob").await;
    assert_eq!(one.publish(vec![publication("news", "1"), publication("news", "2")]).await, [1, 2]);
    assert_eq!(two.publish(vec![publication("news", "3")]).await, [3]);
    for edge in [&mut alice, &mut bob] {
        for offset in 1..=3 {
            assert_eq!(edge.publication().await.offset, offset);
        }
    }
    assert_eq!(one.relay("bob").await, RelayOutcome::Relayed);
    let Event::Inbox(hint) = bob.expect().await else { panic!("no hint") };
    assert_eq!(hint.user, "bob");
    eventually(async || two.relay("eve").await == RelayOutcome::Offline).await;
    let request = LocateRequest { users: vec!["alice".into(), "bob".into()] };
    let found = two.client().locate(request).await.unwrap().into_inner().locations;
    let routers: Vec<_> = found.iter().map(|user| user.sessions[0].router_id.as_str()).collect();
    assert_eq!(routers, ["r1", "r2"]);
    let metrics = two.metrics();
    for name in ["redis_calls_total{operation=\"publish\",result=\"ok\"}", "epochs_opened_total 0"] {
        assert!(metrics.contains(&format!("sanjay_router_{name}")), "{metrics}");
    }
    let none = "sanjay_router_redis_calls_total{operation=\"publish\",result=\"ok\"} 0\n";
    assert!(!metrics.contains(none), "{metrics}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_edges_of_a_killed_router_are_away_until_they_attach_to_another() {
    let redis = Redis::start().await;
    let (dead, runtime) = mortal_router(config(&redis, "r1")).await;
    let alive = router(config(&redis, "r2")).await;
    let (mut lost, mut moved) = (dead.attach("lost", 1).await, dead.attach("moved", 1).await);
    lost.open("bob").await;
    moved.open("eve").await;
    moved.subscribe("news").await;
    alive.publish(vec![publication("news", "1")]).await;
    assert_eq!(moved.publication().await.offset, 1);

    runtime.shutdown_background();
    let killed = Instant::now();
    assert!(ending(&mut moved).await.is_some());
    alive.publish(vec![publication("news", "2")]).await;
    let mut moved = alive.attach("moved", 1).await;
    assert_eq!(moved.subscribe("news").await, 2, "the sequence goes on; the edge sees what it missed");
    assert_eq!(alive.relay("eve").await, RelayOutcome::Relayed, "her session was kept");
    assert_eq!(alive.relay("bob").await, RelayOutcome::Unspecified, "his edge may come back");
    eventually(async || alive.relay("bob").await == RelayOutcome::Offline).await;
    assert!(killed.elapsed() >= LEASE * 2, "{:?}", killed.elapsed());
    assert_eq!(alive.relay("eve").await, RelayOutcome::Relayed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edges_announce_again_when_redis_lost_what_they_hold() {
    let mut redis = Redis::start().await;
    let router = router(config(&redis, "r1")).await;
    let mut edge = router.attach("a", 1).await;
    edge.open("bob").await;
    edge.subscribe("news").await;
    router.publish(vec![publication("news", "1")]).await;
    eventually(async || router.relay("eve").await == RelayOutcome::Offline).await;

    redis.restart_empty().await;
    let status = ending(&mut edge).await.expect("it is told why");
    assert_eq!(status.code(), Code::Aborted);
    assert!(status.message().contains("announce everything"), "{status}");
    assert_ne!(router.relay("bob").await, RelayOutcome::Offline, "he is online, and nobody said so yet");
    let mut edge = router.attach("a", 1).await;
    edge.open("bob").await;
    assert_eq!(edge.subscribe("news").await, 0, "a new epoch");
    eventually(async || router.relay("bob").await == RelayOutcome::Relayed).await;
    eventually(async || router.relay("eve").await == RelayOutcome::Offline).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_starts_without_redis_and_is_ready_when_it_comes() {
    let mut redis = Redis::start().await;
    redis.kill();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let context = Context {
        clock: Arc::new(SystemClock),
        random: Arc::new(OsRandom),
        lifecycle: Lifecycle::new(),
        readiness: Readiness::new(),
        namespaces: sanjay_runtime::SharedNamespaces::default(),
        cluster_key: Secret::new("a cluster key of this test"),
    };
    start(config(&redis, "r1"), listener, context.clone(), &mut Registry::default()).await.unwrap();
    assert!(!context.readiness.is_ready());
    redis.restart().await;
    timeout(WAIT, context.readiness.wait_ready()).await.expect("Redis is there");
    assert!(context.lifecycle.shutdown(WAIT).await.is_empty());
}
