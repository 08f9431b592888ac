//! The bus against a real server: what it delivers, and what becomes of it when the server or the connection fails.

use std::collections::BTreeMap;

use parking_lot::Condvar;
use prost::Message as _;
use sanjay_proto::{
    client::v1::Publication,
    edge::v1::InboxHint,
    router::v1::{NewPublication, Stamp},
};
use sanjay_runtime::random::SeededRandom;
use sanjay_testkit::servers::{Redis, RedisOptions, Reply};
use tokio::time::Instant;

use super::{envelope::encode_publication, *};
use crate::registry::{EdgeRef, suite::eventually};

/// Longer than any heal may take, so that a test that fails does not hang.
const HEAL: Duration = Duration::from_secs(10);

#[derive(Default)]
struct Log {
    offsets: Mutex<BTreeMap<String, Vec<u64>>>,
    hints: Mutex<Vec<EdgeHint>>,
    missed: Mutex<Vec<String>>,
    /// Time of the last publication, and how long each was under way.
    latencies: Mutex<Vec<Duration>>,
    sent: Mutex<BTreeMap<u64, Instant>>,
}

impl Sink for Log {
    fn publication(&self, publication: &Arc<Publication>) {
        if let Some(sent) = self.sent.lock().remove(&publication.offset) {
            self.latencies.lock().push(sent.elapsed());
        }
        self.offsets.lock().entry(publication.channel.clone()).or_default().push(publication.offset);
    }

    fn hint(&self, hint: EdgeHint) {
        self.hints.lock().push(hint);
    }

    fn missed(&self, what: Missed<'_>) {
        self.missed.lock().push(match what {
            Missed::Channel(channel) => channel.to_owned(),
            Missed::Channels => "*".into(),
            Missed::Hints => "hints".into(),
        });
    }
}

impl Log {
    fn of(&self, channel: &str) -> Vec<u64> {
        self.offsets.lock().get(channel).cloned().unwrap_or_default()
    }

    /// What was told to be missed since the last look, sorted.
    fn take_missed(&self) -> Vec<String> {
        let mut missed = std::mem::take(&mut *self.missed.lock());
        missed.sort();
        missed
    }
}

struct Router {
    bus: RedisBus,
    log: Arc<Log>,
    metrics: BusMetrics,
    lifecycle: Lifecycle,
}

impl Router {
    fn new(redis: &Redis, name: &str) -> Self {
        let config = RedisConfig::parse(&redis.url()).unwrap();
        let (metrics, lifecycle) = (BusMetrics::default(), Lifecycle::new());
        let random = Arc::new(SeededRandom::new(7));
        let bus = RedisBus::new(config, name, lifecycle.clone(), random, metrics.clone()).unwrap();
        Self { bus, log: Arc::default(), metrics, lifecycle }
    }

    async fn start(redis: &Redis, name: &str) -> Self {
        let router = Self::new(redis, name);
        assert_eq!(router.listen().await, Ok(()));
        router
    }

    async fn listen(&self) -> Result<(), BusError> {
        self.bus.listen(Arc::clone(&self.log) as Arc<dyn Sink>).await
    }

    async fn subscribe(&self, channels: &[&str]) -> Vec<Result<(), BusError>> {
        let channels: Vec<_> = channels.iter().map(|channel| Arc::from(*channel)).collect();
        self.bus.subscribe(&channels).await
    }

    async fn subscribed(&self, channels: &[&str]) {
        assert!(self.subscribe(channels).await.iter().all(Result::is_ok));
    }

    fn connects(&self) -> u64 {
        self.metrics.connects.get()
    }
}

fn envelope(channel: &str, offset: u64) -> Vec<u8> {
    let new = NewPublication { channel: channel.into(), ..NewPublication::default() };
    let stamp = Stamp { epoch: "a".into(), offset, time_us: 1 }.encode_to_vec();
    let mut bytes = encode_publication(new);
    bytes.extend([0x2a, u8::try_from(stamp.len()).unwrap()]);
    bytes.extend(stamp);
    bytes
}

/// Publishes as the registry would; returns how many connections got it.
async fn publish(redis: &Redis, channel: &str, offset: u64) -> i64 {
    let name = Keys::new(0).publications(channel);
    match redis.command(&[b"SPUBLISH", name.as_bytes(), &envelope(channel, offset)]).await {
        Reply::Integer(receivers) => receivers,
        other => panic!("{other:?}"),
    }
}

fn hint(user: &str) -> EdgeHint {
    let edge = EdgeRef { id: "e1".into(), incarnation: 7 };
    EdgeHint { edge, hint: Arc::new(InboxHint { user: user.into(), ..InboxHint::default() }) }
}

/// Waits, and says how long it took.
async fn within(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) -> Duration {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < limit, "{what}: not within {limit:?}");
        sleep(Duration::from_millis(5)).await;
    }
    began.elapsed()
}

#[tokio::test]
async fn publications_reach_who_subscribed_and_hints_the_router_named() {
    let redis = Redis::start().await;
    let (one, two) = (Router::start(&redis, "r1").await, Router::start(&redis, "r2").await);
    one.subscribed(&["a", "b", "}:m:c"]).await;
    two.subscribed(&["b"]).await;
    assert_eq!(publish(&redis, "a", 1).await, 1);
    assert_eq!(publish(&redis, "b", 1).await, 2);
    assert_eq!(publish(&redis, "}:m:c", 1).await, 1);
    assert_eq!(publish(&redis, "nobody", 1).await, 0);
    eventually(|| one.log.of("b") == [1] && two.log.of("b") == [1] && one.log.of("}:m:c") == [1]).await;
    assert_eq!((one.log.of("a"), two.log.of("a")), (vec![1], vec![]));

    assert_eq!(one.bus.relay("r2", vec![hint("bob"), hint("eve")]).await, Ok(true));
    assert_eq!(one.bus.relay("r1", vec![hint("eve")]).await, Ok(true));
    assert_eq!(one.bus.relay("r3", vec![hint("bob")]).await, Ok(false));
    eventually(|| two.log.hints.lock().len() == 2 && one.log.hints.lock().len() == 1).await;
    assert_eq!(*two.log.hints.lock(), [hint("bob"), hint("eve")]);

    one.bus.unsubscribe(&["b".into()]).await.unwrap();
    let began = Instant::now();
    while publish(&redis, "b", 2).await == 2 {
        assert!(began.elapsed() < HEAL);
    }
    eventually(|| one.metrics.wanted.get() == 2).await;
    assert!(one.log.take_missed().is_empty() && two.log.take_missed().is_empty());
    assert_eq!(one.listen().await, Err(BusError::Listener));
}

#[tokio::test]
async fn a_router_that_goes_leaves_nothing_behind() {
    let redis = Redis::start().await;
    let (one, two) = (Router::start(&redis, "r1").await, Router::start(&redis, "r2").await);
    two.subscribed(&["a"]).await;
    let lifecycle = two.lifecycle.clone();
    drop(two);
    within(HEAL, "its tasks end", || lifecycle.running().is_empty()).await;
    let began = Instant::now();
    while one.bus.relay("r2", vec![hint("bob")]).await == Ok(true) {
        assert!(began.elapsed() < HEAL);
    }
    assert_eq!(publish(&redis, "a", 1).await, 0);
}

#[tokio::test]
async fn a_channel_keeps_its_order() {
    let redis = Redis::start().await;
    let router = Router::start(&redis, "r1").await;
    let channels: Vec<_> = (0..50).map(|at| format!("c{at}")).collect();
    router.subscribed(&channels.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let (mut connection, _) = router.bus.shared.publisher.lock().clone().unwrap();
    for round in 0..200 {
        let mut pipeline = Pipeline::with_capacity(channels.len());
        for channel in &channels {
            let name = router.bus.shared.keys.publications(channel);
            pipeline.cmd("SPUBLISH").arg(name).arg(envelope(channel, round + 1));
        }
        connection.req_packed_commands(&pipeline, 0, channels.len()).await.unwrap();
    }
    let expected: Vec<u64> = (1..=200).collect();
    within(HEAL, "all 10,000 arrive", || channels.iter().all(|channel| router.log.of(channel).len() == 200))
        .await;
    assert!(channels.iter().all(|channel| router.log.of(channel) == expected));
    assert!(router.log.take_missed().is_empty());
}

#[tokio::test]
async fn a_killed_subscriber_is_found_and_what_it_missed_is_told() {
    let redis = Redis::start().await;
    let router = Router::start(&redis, "r1").await;
    router.subscribed(&["a", "b"]).await;
    assert!(matches!(redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await, Reply::Integer(1)));
    let mut offset = 0;
    let took = within(HEAL, "it is told", || router.log.missed.lock().len() >= 3).await;
    println!("found and subscribed again after {took:?}");
    assert_eq!(router.log.take_missed(), ["a", "b", "hints"]);
    // What is published from now on arrives.
    for _ in 0..10 {
        offset += 1;
        assert_eq!(publish(&redis, "a", offset).await, 1);
    }
    eventually(|| router.log.of("a").len() == 10).await;
    assert_eq!((router.connects(), router.metrics.resubscriptions.get()), (2, 2));
}

#[tokio::test]
async fn a_server_that_was_away_is_waited_for() {
    let mut redis = Redis::start().await;
    let router = Router::start(&redis, "r1").await;
    router.subscribed(&["a"]).await;
    redis.kill();
    // At first a caller waits for the connection to come back, and once it was away for long, nobody does.
    let began = Instant::now();
    let down = within(HEAL, "it is noticed", || router.bus.shared.publisher.lock().is_none()).await;
    assert!(down < Duration::from_millis(500), "{down:?}");
    for at in 0..20 {
        let [answer] = router.subscribe(&[&format!("c{at}")]).await.try_into().unwrap();
        assert!(matches!(answer, Err(BusError::Unavailable(_))), "{answer:?}");
    }
    assert!(began.elapsed() < Duration::from_millis(2_500), "{:?}", began.elapsed());
    let began = Instant::now();
    let relayed = router.bus.relay("r1", vec![hint("bob")]).await;
    assert!(matches!(relayed, Err(BusError::Unavailable(_))), "{relayed:?}");
    assert!(began.elapsed() < Duration::from_millis(200));
    assert_eq!(router.bus.unsubscribe(&["c1".into()]).await, Ok(()));
    assert_eq!(router.metrics.wanted.get(), 1, "what failed is not wanted");

    redis.restart_empty().await;
    let took = within(HEAL, "it heals", || router.log.missed.lock().len() >= 2).await;
    println!("healed {took:?} after the restart");
    assert_eq!(router.log.take_missed(), ["a", "hints"]);
    assert_eq!(publish(&redis, "a", 1).await, 1);
    eventually(|| router.log.of("a") == [1]).await;
    router.subscribed(&["c1"]).await;
    assert_eq!(router.bus.relay("r1", vec![hint("bob")]).await, Ok(true));
}

#[tokio::test]
async fn a_router_may_start_before_its_server() {
    let mut redis = Redis::start().await;
    let router = Router::new(&redis, "r1");
    redis.kill();
    assert_eq!(router.subscribe(&["a"]).await, [Err(BusError::Listener)]);
    let began = Instant::now();
    assert!(matches!(router.listen().await, Err(BusError::Unavailable(_))));
    assert!(began.elapsed() < Duration::from_millis(1_500));
    redis.restart_empty().await;
    within(HEAL, "it connects", || router.connects() == 1).await;
    router.subscribed(&["a"]).await;
    assert!(router.log.take_missed().is_empty(), "nothing was there to miss");
}

#[tokio::test]
async fn a_server_that_stands_still_is_given_up_by_the_probe() {
    let mut redis = Redis::start().await;
    let router = Router::start(&redis, "r1").await;
    router.subscribed(&["a"]).await;
    redis.stop();
    let began = Instant::now();
    let [answer] = router.subscribe(&["b"]).await.try_into().unwrap();
    assert!(matches!(answer, Err(BusError::Unavailable(_))), "{answer:?}");
    assert!(began.elapsed() < Duration::from_millis(1_200), "{:?}", began.elapsed());
    let took = within(HEAL, "it is given up", || router.bus.shared.publisher.lock().is_none()).await;
    println!("given up {took:?} after the answer");
    assert!(began.elapsed() < Duration::from_millis(2_500), "{:?}", began.elapsed());
    sleep(Duration::from_secs(3)).await;
    redis.cont();
    let took = within(HEAL, "it heals", || router.log.missed.lock().len() >= 2).await;
    println!("healed {took:?} after it went on");
    assert_eq!(router.log.take_missed(), ["a", "hints"]);
    // The connections from before are closed by the server sooner or later; what comes now comes once.
    let began = Instant::now();
    while publish(&redis, "a", 1).await != 1 {
        assert!(began.elapsed() < HEAL);
    }
    eventually(|| !router.log.of("a").is_empty()).await;
}

/// Nothing but the probe can find a subscriber that is connected and gets nothing.
#[tokio::test]
async fn a_silent_connection_is_given_up_by_the_probe() {
    let mut redis = Redis::start().await;
    let router = Router::start(&redis, "r1").await;
    router.subscribed(&["a"]).await;
    redis.stop();
    let took = within(HEAL, "it is given up", || router.bus.shared.publisher.lock().is_none()).await;
    assert!(took < Duration::from_millis(2_500), "{took:?}");
    assert!(router.metrics.probe_failures.get() >= 1);
    redis.cont();
    within(HEAL, "it heals", || router.connects() >= 2 && !router.log.missed.lock().is_empty()).await;
}

/// Redis ends sharded subscriptions by itself when their slot goes; redis-rs forgets them silently.
#[tokio::test]
async fn an_unsolicited_end_of_a_subscription_is_undone() {
    let options = RedisOptions::default().config("cluster-enabled yes");
    let redis = Redis::start_with(options.config("cluster-require-full-coverage no")).await;
    redis.command(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]).await;
    let up = async || redis.command(&["CLUSTER", "INFO"]).await.text().contains("cluster_state:ok");
    let began = Instant::now();
    while !up().await {
        assert!(began.elapsed() < HEAL);
        sleep(Duration::from_millis(50)).await;
    }
    let router = Router::start(&redis, "r1").await;
    router.subscribed(&["a", "b"]).await;
    let name = Keys::new(0).publications("a");
    let Reply::Integer(slot) = redis.command(&["CLUSTER", "KEYSLOT", &name]).await else { panic!() };
    let slot = slot.to_string();
    let deleted = redis.command(&["CLUSTER", "DELSLOTS", &slot]).await;
    assert_eq!(deleted, Reply::Status("OK".into()));
    within(HEAL, "the end is noticed", || router.bus.shared.wanted.held() == 1).await;
    let added = redis.command(&["CLUSTER", "ADDSLOTS", &slot]).await;
    assert_eq!(added, Reply::Status("OK".into()));
    within(HEAL, "it is undone", || router.bus.shared.wanted.held() == 2).await;
    // The connection is made anew if a reply was under way, which the end of the subscription then pushed out of
    // its place; `b` is missed too in that case.
    eventually(|| router.log.missed.lock().iter().any(|name| name == "a")).await;
    assert_eq!(publish(&redis, "a", 1).await, 1);
    eventually(|| router.log.of("a") == [1]).await;
}

#[tokio::test]
async fn a_subscription_that_vanished_is_found() {
    let redis = Redis::start().await;
    let router = Router::start(&redis, "r1").await;
    router.subscribed(&["a", "b"]).await;
    // The bus believes that Redis has one more than it has.
    router.bus.shared.wanted.miscount();
    within(HEAL + HEAL, "it looks", || router.metrics.resubscriptions.get() == 2).await;
    assert_eq!(router.log.take_missed(), ["a", "b"]);
    assert_eq!(router.bus.shared.wanted.held(), 2);
}

#[tokio::test]
async fn many_channels_are_subscribed_again() {
    let redis = Redis::start().await;
    let router = Router::start(&redis, "r1").await;
    let channels: Vec<Arc<str>> = (0..20_000).map(|at| format!("c{at}").into()).collect();
    let began = Instant::now();
    for run in channels.chunks(512) {
        assert!(router.bus.subscribe(run).await.iter().all(Result::is_ok));
    }
    println!("20,000 subscribed in {:?}", began.elapsed());
    redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    let took = within(HEAL, "all are there again", || router.metrics.resubscriptions.get() == 20_000).await;
    println!("20,000 subscribed again in {took:?}");
    assert_eq!(router.log.missed.lock().len(), 20_001);
    assert_eq!(publish(&redis, "c19999", 1).await, 1);
}

/// A sink that stands still must not stop the reader, and what found no room is told once it goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_flood_is_dropped_and_told() {
    #[derive(Default)]
    struct Stuck {
        log: Log,
        open: Mutex<bool>,
        opened: Condvar,
    }
    impl Sink for Stuck {
        fn publication(&self, publication: &Arc<Publication>) {
            // The runtime's other tasks go on elsewhere.
            let wait = || self.opened.wait_while(&mut self.open.lock(), |open| !*open);
            tokio::task::block_in_place(wait);
            self.log.publication(publication);
        }
        fn hint(&self, _: EdgeHint) {}
        fn missed(&self, what: Missed<'_>) {
            self.log.missed(what);
        }
    }
    let redis = Redis::start().await;
    let mut router = Router::new(&redis, "r1");
    router.bus.lanes = LaneLimits { messages: 100, bytes: 1024 * 1024 };
    let sink = Arc::new(Stuck::default());
    assert_eq!(router.bus.listen(Arc::clone(&sink) as Arc<dyn Sink>).await, Ok(()));
    router.subscribed(&["a"]).await;
    let (mut connection, _) = router.bus.shared.publisher.lock().clone().unwrap();
    let name = router.bus.shared.keys.publications("a");
    let mut flood = async |offsets: std::ops::RangeInclusive<u64>| {
        let mut pipeline = Pipeline::new();
        offsets.clone().for_each(|offset| _ = pipeline.cmd("SPUBLISH").arg(&name).arg(envelope("a", offset)));
        connection.req_packed_commands(&pipeline, 0, offsets.count()).await.unwrap();
    };
    flood(1..=2_000).await;
    within(HEAL, "it overflows", || router.metrics.overflows.get() >= 1_000).await;
    assert!(sink.log.of("a").is_empty());
    *sink.open.lock() = true;
    sink.opened.notify_all();
    within(HEAL, "it is told", || sink.log.missed.lock().iter().any(|name| name == "a")).await;
    flood(2_001..=2_050).await;
    within(HEAL, "it flows again", || sink.log.of("a").last() == Some(&2_050)).await;
    let got = sink.log.of("a");
    assert!(got.is_sorted() && got.len() < 2_050);
    assert_eq!(router.connects(), 1, "the reader went on all the time");
}
