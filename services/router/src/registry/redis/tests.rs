//! The shared suite over Redis, and what only Redis can do to a registry. Every test has a server of its own, or
//! names of its own on one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use sanjay_runtime::{Lifecycle, ManualClock, Namespace, Namespaces, SeededRandom, SharedNamespaces};
use sanjay_testkit::servers::{Redis, RedisOptions};
use tokio::time::{Instant, interval, timeout};

use super::{Limits, RedisRegistry};
use crate::{
    bus::{
        Bus, Sink,
        redis::{RedisBus, metrics::BusMetrics},
    },
    redis::{RedisConfig, keys::Keys, metrics::RedisMetrics},
    registry::{
        Assigned, Attachment, EdgeRef, HistoryPage, HistoryQuery, Location, Registry, RegistryError, Top,
        UserSession,
        suite::{self, Pair, Recorder, eventually, publication},
    },
};

/// Longer than any test.
const LONG: Duration = Duration::from_secs(600);

struct Setup {
    config: RedisConfig,
    keys: Keys,
    limits: Limits,
    lease: Duration,
    seed: AtomicU32,
    namespaces: SharedNamespaces,
}

impl Setup {
    fn new(redis: &Redis) -> Self {
        let config = RedisConfig::parse(&redis.url()).unwrap();
        // A loaded machine must not turn slowness into failures.
        let config = RedisConfig { timeout: Duration::from_secs(5), ..config };
        Self {
            keys: config.keys(),
            config,
            limits: Limits::default(),
            lease: LONG,
            seed: AtomicU32::new(1),
            namespaces: SharedNamespaces::default(),
        }
    }

    /// One more router.
    fn registry(&self) -> RedisRegistry {
        let seed = self.seed.fetch_add(1, Ordering::Relaxed);
        let sources = (
            Arc::new(ManualClock::new(1_000_000)) as _,
            Arc::new(SeededRandom::new(seed.into())) as _,
            self.namespaces.clone(),
        );
        let (config, keys) = (self.config.clone(), self.keys.clone());
        RedisRegistry::with(config, keys, self.limits, self.lease, sources, RedisMetrics::default()).unwrap()
    }

    fn bus(&self, router: &str) -> RedisBus {
        let (config, keys, random) = (self.config.clone(), self.keys.clone(), SeededRandom::new(1));
        RedisBus::with_keys(config, keys, router, Lifecycle::new(), Arc::new(random), BusMetrics::default())
            .unwrap()
    }
}

async fn publish(registry: &RedisRegistry, channel: &str, key: &str) -> Result<Assigned, RegistryError> {
    registry.publish(vec![publication(channel, key)]).await.remove(0)
}

async fn offset(registry: &RedisRegistry, channel: &str) -> (Arc<str>, u64) {
    let at = publish(registry, channel, "").await.unwrap().at;
    (at.epoch, at.offset)
}

async fn top(registry: &RedisRegistry, channel: &str) -> (Arc<str>, u64) {
    let top = registry.tops(&[channel.into()]).await.remove(0).unwrap();
    (top.epoch, top.offset)
}

fn edge(incarnation: u64) -> EdgeRef {
    EdgeRef { id: "e1".into(), incarnation }
}

async fn attach(registry: &RedisRegistry, incarnation: u64) -> Attachment {
    registry.attach(&edge(incarnation), &"r1".into()).await.unwrap()
}

fn session(at: u32, user: &str) -> UserSession {
    let mut session = [0; 16];
    session[..4].copy_from_slice(&at.to_le_bytes());
    UserSession { user: user.into(), session, inbox: true }
}

async fn open(registry: &RedisRegistry, attachment: &Attachment, sessions: &[UserSession]) {
    let answers = registry.open_sessions(attachment, sessions).await;
    assert_eq!(answers.len(), sessions.len());
    answers.into_iter().for_each(|answer| answer.unwrap());
}

async fn locate(registry: &RedisRegistry, user: &str) -> Vec<Location> {
    registry.locate(&[user.into()]).await.unwrap().remove(0)
}

fn is_unavailable<T>(answer: &Result<T, RegistryError>) -> bool {
    matches!(answer, Err(RegistryError::Unavailable(_)))
}

/// Asks again and again until the answer is right.
async fn until<T>(mut ask: impl AsyncFnMut() -> T, right: impl Fn(&T) -> bool) -> T {
    let mut ticks = interval(Duration::from_millis(20));
    let asking = async {
        loop {
            ticks.tick().await;
            let answer = ask().await;
            if right(&answer) {
                return answer;
            }
        }
    };
    timeout(Duration::from_secs(20), asking).await.expect("it comes about within 20 s")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_passes_the_suite() {
    let redis = Redis::start().await;
    let names = AtomicU32::new(0);
    let make = |router: &str| -> Pair {
        let name = names.fetch_add(1, Ordering::Relaxed);
        let setup = Setup { keys: Keys::with_prefix(&format!("t{name}")), ..Setup::new(&redis) };
        (Arc::new(setup.registry()), Arc::new(setup.bus(router)))
    };
    suite::run(make, suite::cases(60, 60)).await;
}

#[tokio::test]
async fn what_the_bus_carries_is_what_was_answered() {
    let redis = Redis::start().await;
    let setup = Setup::new(&redis);
    let (registry, bus) = (setup.registry(), setup.bus("r1"));
    let sink = Arc::new(Recorder::default());
    bus.listen(Arc::clone(&sink) as Arc<dyn Sink>).await.unwrap();
    assert_eq!(bus.subscribe(&["news".into()]).await, [Ok(())]);
    let new = publication("news", "k");
    let assigned = registry.publish(vec![new.clone()]).await.remove(0).unwrap();
    eventually(|| !sink.publications().is_empty()).await;
    let got = sink.publications().remove(0);
    assert_eq!((&*got.epoch, got.offset, got.time_us), (&*assigned.at.epoch, 1, 1_000_000));
    assert_eq!((&got.message_id, &got.payload), (&new.message_id, &new.payload));
    // Offsets of every length in bytes.
    redis.command(&["HSET", &setup.keys.channel("news"), "top", "4503599627370494"]).await;
    for expected in [4_503_599_627_370_495, 4_503_599_627_370_496] {
        assert_eq!(offset(&registry, "news").await.1, expected);
        eventually(|| sink.publications().last().is_some_and(|got| got.offset == expected)).await;
    }
}

#[tokio::test]
async fn routers_share_one_sequence_and_its_keys() {
    let redis = Redis::start().await;
    let setup = Setup::new(&redis);
    let (a, b) = (setup.registry(), setup.registry());
    let first = publish(&a, "news", "k").await.unwrap();
    assert_eq!(publish(&b, "news", "k").await, Ok(Assigned { repeated: true, ..first.clone() }));
    assert!(!publish(&b, "other", "k").await.unwrap().repeated, "keys belong to a channel");
    let (epoch, second) = offset(&b, "news").await;
    assert_eq!((&epoch, second), (&first.at.epoch, 2));
    assert_eq!(offset(&a, "news").await, (Arc::clone(&epoch), 3));
    assert_eq!(top(&b, "news").await, (epoch, 3));
    assert_eq!((a.known.metrics.epochs.get(), b.known.metrics.epochs.get()), (1, 1));
}

#[tokio::test]
async fn keys_go_when_they_are_too_old_or_too_many() {
    let redis = Redis::start().await;
    let mut setup = Setup::new(&redis);
    setup.limits.dedupe_keys = 2;
    let registry = setup.registry();
    for key in ["a", "b", "c"] {
        publish(&registry, "news", key).await.unwrap();
    }
    assert!(publish(&registry, "news", "b").await.unwrap().repeated);
    assert!(publish(&registry, "news", "c").await.unwrap().repeated);
    assert!(!publish(&registry, "news", "a").await.unwrap().repeated, "the oldest went first");
    let fields = redis.command(&["HLEN", &setup.keys.dedupe("news")]).await.integer();
    assert_eq!(fields, 2 + 2 * 2, "nothing is left of those that went");

    setup.limits = Limits { dedupe_window: Duration::from_millis(300), ..Limits::default() };
    let registry = setup.registry();
    let first = publish(&registry, "brief", "k").await.unwrap();
    assert!(publish(&registry, "brief", "k").await.unwrap().repeated);
    // Others keep the hash alive, so it is the key's own time that ends.
    let mut other = 0;
    let again = async || {
        other += 1;
        publish(&registry, "brief", &format!("o{other}")).await.unwrap();
        publish(&registry, "brief", "k").await.unwrap()
    };
    let second = until(again, |answer| !answer.repeated).await;
    assert_eq!(second.at.epoch, first.at.epoch);
    assert!(second.at.offset > first.at.offset);
    // Its number is 1, and what expired makes room without being asked for.
    let name = setup.keys.dedupe("brief");
    let forgotten = async || {
        other += 1;
        publish(&registry, "brief", &format!("o{other}")).await.unwrap();
        redis.command(&["HEXISTS", &name, "ko1"]).await.integer()
    };
    until(forgotten, |there| *there == 0).await;
    assert_eq!(redis.command(&["HEXISTS", &name, "n1"]).await.integer(), 0);
    assert_eq!(redis.command(&["HEXISTS", &name, &format!("ko{other}")]).await.integer(), 1);
}

#[tokio::test]
async fn an_idle_channel_begins_a_new_epoch_and_one_that_is_looked_at_does_not() {
    let redis = Redis::start().await;
    let mut setup = Setup::new(&redis);
    setup.limits.idle = Duration::from_millis(400);
    let registry = setup.registry();
    let (epoch, _) = offset(&registry, "news").await;
    let began = Instant::now();
    let looked = until(
        async || (top(&registry, "news").await, began.elapsed()),
        |(_, waited)| *waited > Duration::from_millis(1_200),
    );
    assert_eq!(looked.await.0, (Arc::clone(&epoch), 1));
    let state = setup.keys.channel("news");
    until(async || redis.command(&["EXISTS", &state]).await.integer(), |there| *there == 0).await;
    let (other, first) = offset(&registry, "news").await;
    assert_eq!(first, 1);
    assert_ne!(other, epoch);
}

#[tokio::test]
async fn a_server_that_lost_everything_begins_new_epochs() {
    let mut redis = Redis::start().await;
    let registry = Setup::new(&redis).registry();
    publish(&registry, "news", "k").await.unwrap();
    let (epoch, _) = offset(&registry, "news").await;
    let attachment = attach(&registry, 1).await;
    open(&registry, &attachment, &[session(1, "bob")]).await;
    assert!(registry.is_settled());

    redis.restart_empty().await;
    // A connection breaks when it is used next, and then the outcome is unknown.
    until(async || registry.maintain().await, Result::is_ok).await.unwrap();
    let after = until(async || publish(&registry, "news", "k").await, Result::is_ok).await.unwrap();
    assert_ne!(after.at.epoch, epoch);
    assert_eq!((after.at.offset, after.repeated), (1, false), "its keys went with the epoch");
    assert!(locate(&registry, "bob").await.is_empty());
    assert!(!registry.is_settled(), "bob may be online");
    assert_eq!(
        registry.renew(std::slice::from_ref(&attachment)).await,
        [Err(RegistryError::Superseded { edge: "e1".into() })]
    );
    assert!(attach(&registry, 1).await.number > attachment.number);
}

#[tokio::test]
async fn a_server_that_forgot_the_latest_offsets_gives_out_none_twice() {
    let mut redis = Redis::start().await;
    let setup = Setup::new(&redis);
    let (registry, other) = (setup.registry(), setup.registry());
    for expected in 1..=3 {
        assert_eq!(offset(&registry, "news").await.1, expected);
    }
    offset(&registry, "quiet").await;
    let attachment = attach(&registry, 1).await;
    let snapshot = redis.snapshot().await;
    let (epoch, last) = offset(&registry, "news").await;
    assert_eq!(last, 4);
    assert_eq!(offset(&other, "news").await, (Arc::clone(&epoch), 5));
    open(&registry, &attachment, &[session(1, "bob")]).await;
    let later = other.attach(&EdgeRef { id: "e2".into(), incarnation: 1 }, &"r2".into()).await.unwrap();

    redis.restart_from(&snapshot).await;
    let text = redis.command(&["HGET", &setup.keys.channel("news"), "top"]).await;
    assert_eq!(text.text(), "3", "the snapshot is older");
    let (new, first) = until(async || publish(&registry, "news", "").await, Result::is_ok)
        .await
        .map(|assigned| (assigned.at.epoch, assigned.at.offset))
        .unwrap();
    assert_ne!(new, epoch);
    assert_eq!(first, 1);
    until(async || publish(&other, "other", "").await, Result::is_ok).await.unwrap();
    assert_eq!(offset(&other, "news").await, (Arc::clone(&new), 2), "one new epoch for all routers");
    assert_eq!(top(&other, "quiet").await.1, 0, "channels that nobody published to since, too");

    let renewed = registry.renew(std::slice::from_ref(&attachment)).await;
    let superseded = RegistryError::Superseded { edge: "e1".into() };
    assert_eq!(renewed, [Err(superseded)], "it is in the snapshot, but not what was announced on it since");
    let newest = until(async || registry.attach(&edge(1), &"r1".into()).await, Result::is_ok).await.unwrap();
    assert!(later.number > attachment.number && newest.number > later.number);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scripts_that_are_flushed_cost_neither_the_epoch_nor_the_order() {
    let redis = Redis::start().await;
    let setup = Arc::new(Setup::new(&redis));
    let (epoch, _) = offset(&setup.registry(), "news").await;
    let routers: Vec<_> = (0..2).map(|_| Arc::new(setup.registry())).collect();
    let publishers = routers.into_iter().map(|registry| {
        tokio::spawn(async move {
            let (mut assigned, mut last) = (0, 0);
            for _ in 0..100 {
                let batch = (0..20).map(|_| publication("news", "")).collect();
                for answer in registry.publish(batch).await {
                    // A publication that another router's load would have put in the wrong place is refused.
                    let Ok(answer) = answer else { continue };
                    assert!(answer.at.offset > last, "{} after {last}", answer.at.offset);
                    (assigned, last) = (assigned + 1, answer.at.offset);
                }
            }
            assigned
        })
    });
    let publishers: Vec<_> = publishers.collect();
    let (mut flushed, mut ticks) = (0, interval(Duration::from_millis(5)));
    while publishers.iter().any(|publisher| !publisher.is_finished()) {
        ticks.tick().await;
        redis.command(&["SCRIPT", "FLUSH"]).await;
        flushed += 1;
    }
    let mut assigned = 0;
    for publisher in publishers {
        assigned += publisher.await.unwrap();
    }
    assert!(flushed > 3, "the scripts were flushed while routers published");
    assert!(assigned > 3_000, "only {assigned} of 4,000 were published");
    assert_eq!(top(&setup.registry(), "news").await, (epoch, assigned + 1), "each offset was answered once");
}

#[tokio::test]
async fn an_edge_whose_router_is_gone_counts_as_away_and_then_loses_its_sessions() {
    let redis = Redis::start().await;
    let mut setup = Setup::new(&redis);
    setup.lease = Duration::from_millis(900);
    let (dead, alive) = (setup.registry(), setup.registry());
    let attachment = attach(&dead, 1).await;
    open(&dead, &attachment, &[session(1, "bob"), session(2, "eve")]).await;
    let other = EdgeRef { id: "e2".into(), incarnation: 7 };
    let kept = alive.attach(&other, &"r2".into()).await.unwrap();
    open(&alive, &kept, &[session(3, "bob")]).await;

    let began = Instant::now();
    let look = async || {
        alive.maintain().await.unwrap();
        alive.renew(std::slice::from_ref(&kept)).await.remove(0).unwrap();
        locate(&alive, "bob").await
    };
    let away = until(look, |found| found.iter().any(|place| !place.attached)).await;
    assert!(began.elapsed() >= setup.lease);
    let of = |found: &[Location]| -> Vec<_> {
        found.iter().map(|place| (place.edge.id.to_string(), place.attached)).collect()
    };
    assert_eq!(of(&away), [("e1".to_owned(), false), ("e2".to_owned(), true)]);
    let left = until(look, |found| found.len() == 1).await;
    assert!(began.elapsed() >= setup.lease * 2);
    assert_eq!(of(&left), [("e2".to_owned(), true)]);
    assert!(locate(&alive, "eve").await.is_empty());
    let superseded = Err(RegistryError::Superseded { edge: "e1".into() });
    assert_eq!(dead.renew(std::slice::from_ref(&attachment)).await, std::slice::from_ref(&superseded));
    assert_eq!(dead.open_sessions(&attachment, &[session(4, "bob")]).await, [superseded]);
}

#[tokio::test]
async fn an_edge_that_is_renewed_keeps_its_sessions() {
    let redis = Redis::start().await;
    let mut setup = Setup::new(&redis);
    setup.lease = Duration::from_millis(400);
    let (one, other) = (setup.registry(), setup.registry());
    let attachment = attach(&one, 1).await;
    open(&one, &attachment, &[session(1, "bob")]).await;
    let began = Instant::now();
    let look = async || {
        one.renew(std::slice::from_ref(&attachment)).await.remove(0).unwrap();
        other.maintain().await.unwrap();
        assert!(locate(&other, "bob").await[0].attached);
        began.elapsed()
    };
    until(look, |waited| *waited > setup.lease * 5).await;
}

#[tokio::test]
async fn a_router_takes_an_edge_over_from_another() {
    let redis = Redis::start().await;
    let setup = Setup::new(&redis);
    let (a, b) = (setup.registry(), setup.registry());
    let older = attach(&a, 1).await;
    open(&a, &older, &[session(1, "bob"), session(2, "eve")]).await;
    let newer = b.attach(&edge(1), &"r2".into()).await.unwrap();
    assert_eq!(&*locate(&a, "bob").await[0].router, "r2", "sessions are kept");
    open(&b, &newer, &[session(1, "bob")]).await;
    a.detach(&older).await.unwrap();
    assert_eq!(a.sweep(&older).await, Ok(0));
    a.close_sessions(&older, &[session(1, "bob")]).await.unwrap();
    assert!(locate(&a, "bob").await[0].attached, "the older attachment has no say");
    assert_eq!(b.sweep(&newer).await, Ok(1), "eve was not announced again");
    assert!(locate(&a, "eve").await.is_empty());
}

#[tokio::test]
async fn a_session_moves_and_the_last_of_a_batch_counts() {
    let redis = Redis::start().await;
    let registry = Setup::new(&redis).registry();
    let attachment = attach(&registry, 1).await;
    open(&registry, &attachment, &[session(1, "bob")]).await;
    open(&registry, &attachment, &[session(1, "eve"), session(1, "bob"), session(2, "bob")]).await;
    assert_eq!(locate(&registry, "bob").await.len(), 2);
    open(&registry, &attachment, &[session(1, "bob"), session(1, "eve")]).await;
    assert_eq!((locate(&registry, "bob").await.len(), locate(&registry, "eve").await.len()), (1, 1));
    // The user in a request to close is only a hint.
    registry.close_sessions(&attachment, &[session(1, "bob")]).await.unwrap();
    assert!(locate(&registry, "eve").await.is_empty());
    let places: Vec<_> = (10..20).rev().map(|at| session(at, "bob")).collect();
    open(&registry, &attachment, &places).await;
    open(&registry, &attachment, &places[5..]).await;
    let found: Vec<_> = locate(&registry, "bob").await.into_iter().skip(1).map(|at| at.session[0]).collect();
    assert_eq!(found, (10..20).rev().collect::<Vec<_>>(), "in the order in which they were opened");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_sessions_go_in_steps_and_leave_nothing_behind() {
    let redis = Redis::start().await;
    let registry = Setup::new(&redis).registry();
    let sessions: Vec<_> = (0..3_000).map(|at| session(at, &format!("u{}", at % 100))).collect();
    let users: Vec<Arc<str>> = (0..700).map(|at| format!("u{at}").into()).collect();
    let first = attach(&registry, 1).await;
    open(&registry, &first, &sessions).await;
    let found = registry.locate(&users).await.unwrap();
    assert_eq!(found.len(), 700);
    assert!(found.iter().enumerate().all(|(at, found)| found.len() == if at < 100 { 30 } else { 0 }));

    // Those of another incarnation are gone at once, and removed by and by; one is announced anew meanwhile.
    let second = attach(&registry, 2).await;
    assert!(registry.locate(&users).await.unwrap().iter().all(Vec::is_empty));
    open(&registry, &second, &sessions[..1]).await;
    let keys = async || redis.command(&["DBSIZE"]).await.integer();
    assert!(keys().await > 100);
    let collected = async || {
        registry.maintain().await.unwrap();
        keys().await
    };
    // The number of attachments, of sessions, the edges, its one session and that of its user.
    until(collected, |keys| *keys == 5).await;
    assert_eq!(locate(&registry, "u0").await.len(), 1);

    open(&registry, &second, &sessions).await;
    registry.detach(&second).await.unwrap();
    assert_eq!(registry.sweep(&second).await, Ok(3_000));
    assert_eq!(keys().await, 2, "the number of attachments and of sessions");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_server_costs_time_outs_and_nobody_a_session() {
    let mut redis = Redis::start().await;
    let mut setup = Setup::new(&redis);
    setup.config.timeout = Duration::from_millis(500);
    setup.lease = Duration::from_millis(1_500);
    let (registry, other) = (setup.registry(), setup.registry());
    let attachment = attach(&registry, 1).await;
    open(&registry, &attachment, &[session(1, "bob")]).await;
    let (epoch, _) = offset(&registry, "news").await;
    assert_eq!(registry.renew(std::slice::from_ref(&attachment)).await, [Ok(())]);
    other.maintain().await.unwrap();

    redis.stop();
    let (stopped, news, bob) = (Instant::now(), [Arc::from("news")], [Arc::from("bob")]);
    while stopped.elapsed() < setup.lease * 3 {
        let began = Instant::now();
        let (published, tops, located, maintained, renewed) = tokio::join!(
            publish(&registry, "news", ""),
            registry.tops(&news),
            registry.locate(&bob),
            other.maintain(),
            registry.renew(std::slice::from_ref(&attachment)),
        );
        assert!(began.elapsed() < setup.config.timeout + Duration::from_millis(400), "{:?}", began.elapsed());
        assert!(is_unavailable(&published) && is_unavailable(&tops[0]) && is_unavailable(&located));
        assert!(is_unavailable(&maintained) && is_unavailable(&renewed[0]));
    }
    redis.cont();
    let look = async || {
        let maintained = other.maintain().await;
        if maintained.is_ok() {
            assert_eq!(locate(&registry, "bob").await.len(), 1, "nothing is swept");
        }
        maintained
    };
    until(look, Result::is_ok).await.unwrap();
    let after = until(async || publish(&registry, "news", "").await, Result::is_ok).await.unwrap();
    assert_eq!(after.at.epoch, epoch, "the same process goes on");
    let late = registry.renew(std::slice::from_ref(&attachment)).await;
    assert_eq!(
        late,
        [Err(RegistryError::Superseded { edge: "e1".into() })],
        "others counted the edge as away"
    );
    assert!(is_unavailable(&other.sweep(&attachment).await), "not within a lease");
    let again = attach(&registry, 1).await;
    open(&registry, &again, &[session(1, "bob")]).await;
    assert!(locate(&other, "bob").await[0].attached);
}

#[tokio::test]
async fn nobody_waits_longer_than_the_time_out_however_many_ask() {
    let mut redis = Redis::start().await;
    let mut setup = Setup::new(&redis);
    setup.config.timeout = Duration::from_millis(500);
    let registry = Arc::new(setup.registry());
    offset(&registry, "c0").await;
    redis.stop();
    let began = Instant::now();
    let publishers: Vec<_> = (0..100)
        .map(|at| {
            let registry = Arc::clone(&registry);
            tokio::spawn(async move {
                let batch = (0..100).map(|_| publication(&format!("c{at}"), "")).collect();
                registry.publish(batch).await
            })
        })
        .collect();
    for publisher in publishers {
        assert!(publisher.await.unwrap().iter().all(is_unavailable));
    }
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    redis.cont();
    until(async || publish(&registry, "c0", "").await, Result::is_ok).await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_and_found_when_it_comes() {
    let mut redis = Redis::start_with(RedisOptions::default().user("router", "right")).await;
    let mut setup = Setup::new(&redis);
    redis.kill();
    setup.config.username = "router".into();
    setup.config.password = "wrong".into();
    let registry = setup.registry();
    for answer in [publish(&registry, "news", "").await.map(drop), registry.maintain().await] {
        let error = answer.expect_err("nobody listens").to_string();
        assert!(error.contains(&format!("127.0.0.1:{}", redis.port())), "{error}");
        assert!(error.contains("router.registry"), "{error}");
    }
    redis.restart().await;
    let refused = until(
        async || publish(&registry, "news", "").await.expect_err("a wrong password").to_string(),
        |error| error.contains("router.redis_password"),
    );
    assert!(!refused.await.contains("wrong"));
    assert!(registry.maintain().await.unwrap_err().to_string().contains("router.redis_password"));
    setup.config.password = "right".into();
    assert_eq!(offset(&setup.registry(), "news").await.1, 1);
}

/// Channels of the namespace `log` keep so many, each for so long.
fn keeping(history_size: u32, history_ttl_s: u32) -> SharedNamespaces {
    let settings = Namespace { history_size, history_ttl_s, ..Namespace::default() };
    SharedNamespaces::new([("log".to_owned(), settings)].into_iter().collect::<Namespaces>())
}

async fn read(registry: &RedisRegistry, since: Option<(&str, u64)>) -> HistoryPage {
    let since = since.map(|(epoch, offset)| Top { epoch: epoch.into(), offset });
    let query = HistoryQuery { channel: "log:1".into(), since, limit: 100, bytes: 1 << 20 };
    until(async || registry.history(&query).await, Result::is_ok).await.unwrap()
}

fn offsets(page: &HistoryPage) -> Vec<u64> {
    page.publications.iter().map(|publication| publication.offset).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_are_what_the_model_says() {
    let redis = Arc::new(Redis::start().await);
    let names = AtomicU32::new(0);
    let make = |namespaces| -> suite::history::Subject {
        let keys = Keys::with_prefix(&format!("h{}", names.fetch_add(1, Ordering::Relaxed)));
        let setup = Setup { keys: keys.clone(), namespaces, ..Setup::new(&redis) };
        let redis = Arc::clone(&redis);
        let lose = move |channel: Arc<str>, epoch: bool| {
            let (redis, keys) = (Arc::clone(&redis), keys.clone());
            Box::pin(async move {
                let (state, log) = (keys.channel(&channel), keys.history(&channel));
                let exists = redis.command(&["EXISTS", &state]).await.integer() == 1;
                if epoch && exists {
                    // As if another process had touched the channel last.
                    redis.command(&["HSET", &state, "run_id", "another"]).await;
                } else {
                    redis.command(&["DEL", &log]).await;
                }
            }) as _
        };
        (Arc::new(setup.registry()), Box::new(lose))
    };
    suite::history::run(make, suite::history::cases(60, 60)).await;
}

#[tokio::test]
async fn a_publication_is_kept_for_its_time_and_a_channel_as_long_as_its_history() {
    let redis = Redis::start().await;
    let mut setup = Setup::new(&redis);
    setup.limits.idle = Duration::from_millis(300);
    setup.namespaces = keeping(10, 2);
    let registry = setup.registry();
    let epoch = publish(&registry, "log:1", "").await.unwrap().at.epoch;
    let began = Instant::now();
    let waited = until(async || began.elapsed(), |waited| *waited > Duration::from_millis(1_000)).await;
    assert!(waited < Duration::from_millis(1_900), "the machine is too slow for this test");
    assert_eq!(
        offset(&registry, "log:1").await,
        (Arc::clone(&epoch), 2),
        "it was idle for longer than others may be"
    );
    assert_eq!(offsets(&read(&registry, Some((&epoch, 0))).await), [1, 2]);
    // The first is too old now, and the second is not.
    let page = until(async || read(&registry, Some((&epoch, 0))).await, |page| page.lost).await;
    assert!(page.publications.is_empty(), "not a part of it");
    assert_eq!(offsets(&read(&registry, Some((&epoch, 1))).await), [2]);
    let keys = [setup.keys.channel("log:1"), setup.keys.history("log:1")];
    let left = async || redis.command(&["EXISTS", &keys[0], &keys[1]]).await.integer();
    until(left, |left| *left == 0).await;
    assert_ne!(read(&registry, None).await.top.epoch, epoch, "nothing is left of it");
}

#[tokio::test]
async fn what_another_process_kept_is_lost_with_its_epoch() {
    let mut redis = Redis::start().await;
    let setup = Setup { namespaces: keeping(10, 300), ..Setup::new(&redis) };
    let registry = setup.registry();
    for _ in 0..3 {
        publish(&registry, "log:1", "").await.unwrap();
    }
    let epoch = read(&registry, None).await.top.epoch;
    let snapshot = redis.snapshot().await;
    publish(&registry, "log:1", "").await.unwrap();
    assert_eq!(offsets(&read(&registry, Some((&epoch, 2))).await), [3, 4]);
    redis.restart_from(&snapshot).await;
    let page = read(&registry, Some((&epoch, 2))).await;
    assert!(page.lost && page.publications.is_empty() && page.top.epoch != epoch, "{page:?}");
    assert!(read(&registry, None).await.publications.is_empty(), "and nothing of it is the new epoch's");
    let new = until(async || publish(&registry, "log:1", "").await, Result::is_ok).await.unwrap();
    assert_eq!(offsets(&read(&registry, Some((&new.at.epoch, 0))).await), [1]);
}

#[tokio::test]
async fn scripts_that_are_flushed_cost_no_history() {
    let redis = Redis::start().await;
    let setup = Setup { namespaces: keeping(10, 300), ..Setup::new(&redis) };
    let registry = setup.registry();
    let epoch = publish(&registry, "log:1", "").await.unwrap().at.epoch;
    redis.command(&["SCRIPT", "FLUSH"]).await;
    let query = HistoryQuery { channel: "log:1".into(), since: None, limit: 1, bytes: 1 };
    let page = registry.history(&query).await.unwrap();
    assert_eq!((page.top.epoch, page.publications.len()), (epoch, 1));
}

/// How much publishing costs, and how much of it is the server's; run it with `--ignored --nocapture`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it measures"]
async fn measure_publishing() {
    let redis = Redis::start().await;
    let setup = Setup::new(&redis);
    for (tasks, keyed) in [(1, false), (32, false), (32, true), (256, false)] {
        let registry = Arc::new(setup.registry());
        let total = 20_000;
        redis.command(&["CONFIG", "RESETSTAT"]).await;
        let began = Instant::now();
        let running: Vec<_> = (0..tasks)
            .map(|task| {
                let registry = Arc::clone(&registry);
                tokio::spawn(async move {
                    for at in 0..total / tasks {
                        let key = if keyed { format!("{task}-{at}") } else { String::new() };
                        publish(&registry, &format!("c{task}"), &key).await.unwrap();
                    }
                })
            })
            .collect();
        for task in running {
            task.await.unwrap();
        }
        let took = began.elapsed();
        let rate = f64::from(total) / took.as_secs_f64();
        let stats = redis.command(&["INFO", "commandstats"]).await;
        let script = stats.text().lines().find(|line| line.starts_with("cmdstat_evalsha:")).unwrap();
        println!("depth {tasks}, keys {keyed}: {rate:.0} publications a second; {script}");
    }
}
