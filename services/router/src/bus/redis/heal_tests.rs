//! Registry, bus, fan-out and reconciler on a real server: what a failure loses is told to the edges, also where
//! nothing is published afterwards. And how long a publication takes, when asked to measure.

use std::{fs, thread};

use prost::Message as _;
use sanjay_proto::{
    client::v1::{Payload, Publication, payload::Kind},
    edge::v1::router_event::Event,
    router::v1::{NewPublication, Stamp},
};
use sanjay_runtime::{
    MilestoneRing,
    clock::SystemClock,
    mailbox::Receiver,
    random::{OsRandom, SeededRandom},
};
use sanjay_testkit::servers::Redis;
use tokio::time::{Instant, interval, timeout};

use super::{envelope::encode_publication, *};
use crate::{
    downlink::{Down, Downlink},
    fanout::Fanout,
    metrics::Metrics,
    reconcile::Reconciler,
    redis::metrics::RedisMetrics,
    registry::{Attachment, EdgeRef, Registry, redis::RedisRegistry, suite},
    subscriptions::Subscriptions,
};

/// Longer than any heal may take, so that a test that fails does not hang.
const HEAL: Duration = Duration::from_secs(10);

/// A router with one edge.
struct Router {
    registry: Arc<dyn Registry>,
    bus_metrics: BusMetrics,
    metrics: Metrics,
    receiver: Receiver<Down>,
    _lifecycle: Lifecycle,
    _subscriptions: Subscriptions,
}

impl Router {
    async fn start(redis: &Redis, channels: &[&str]) -> Self {
        let config = RedisConfig::parse(&redis.url()).unwrap();
        let (metrics, bus_metrics, lifecycle) = (Metrics::default(), BusMetrics::default(), Lifecycle::new());
        let clock = Arc::new(SystemClock);
        let milestones = Arc::new(MilestoneRing::new(10, "router", clock.clone()));
        let fanout = Arc::new(Fanout::new(milestones, metrics.clone()));
        let lease = Duration::from_secs(10);
        let (random, redis_metrics) = (Arc::new(OsRandom), RedisMetrics::default());
        let registry = RedisRegistry::new(
            config.clone(),
            lease,
            clock,
            random.clone(),
            redis_metrics,
            Default::default(),
        )
        .unwrap();
        let registry: Arc<dyn Registry> = Arc::new(registry);
        let bus = RedisBus::new(config, "r1", lifecycle.clone(), random, bus_metrics.clone()).unwrap();
        bus.listen(Arc::clone(&fanout) as Arc<dyn Sink>).await.unwrap();
        let reconciler = Reconciler::new(Arc::clone(&fanout), Arc::clone(&registry), metrics.clone(), true);
        let soft = lifecycle.soft();
        lifecycle.spawn("reconciler", async move { _ = soft.run_until_cancelled(reconciler.run()).await });
        let edge = EdgeRef { id: "e1".into(), incarnation: 1 };
        let attachment = Attachment { edge, router: "r1".into(), number: 1 };
        let (link, receiver) = Downlink::new(attachment, 10_000, metrics.clone());
        fanout.attach(&link);
        let subscriptions = Subscriptions::new(fanout, Arc::new(bus), Arc::clone(&registry));
        let channels: Vec<Arc<str>> = channels.iter().map(|channel| Arc::from(*channel)).collect();
        assert!(subscriptions.subscribe(&link, channels).await.is_empty());
        Self {
            registry,
            bus_metrics,
            metrics,
            receiver,
            _lifecycle: lifecycle,
            _subscriptions: subscriptions,
        }
    }

    async fn publish(&self, channel: &str) -> u64 {
        let mut last = None;
        // The connection of the registry may have been lost, too.
        for _ in 0..50 {
            let [answer] =
                self.registry.publish(vec![suite::publication(channel, "")]).await.try_into().unwrap();
            match answer {
                Ok(assigned) => return assigned.at.offset,
                Err(error) => last = Some(error),
            }
            sleep(Duration::from_millis(100)).await;
        }
        panic!("{last:?}");
    }

    /// What the edge gets next, but for answers and repeated resyncs.
    async fn next(&mut self) -> String {
        loop {
            let mut taken = Vec::new();
            timeout(HEAL, self.receiver.recv_many(&mut taken, 1)).await.expect("nothing came");
            match taken.pop() {
                Some(Down::Publication(publication)) => {
                    return format!("{} {}", publication.channel, publication.offset);
                }
                Some(Down::Gap { channel, top }) => return format!("gap {channel} {}", top.offset),
                Some(Down::Reply(Event::Subscribed(_)) | Down::Resync) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn the_last_message_before_a_silence_is_told_as_lost() {
    let redis = Redis::start().await;
    let mut router = Router::start(&redis, &["a", "quiet"]).await;
    assert_eq!(router.publish("a").await, 1);
    assert_eq!(router.next().await, "a 1");
    for round in 2..=6 {
        let connects = router.bus_metrics.connects.get();
        redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
        // To connect anew takes several round trips, so this is nearly always lost.
        assert_eq!(router.publish("a").await, round);
        let began = Instant::now();
        let told = router.next().await;
        println!("{told} after {:?}", began.elapsed());
        assert!(told == format!("gap a {round}") || told == format!("a {round}"), "{told}");
        suite::eventually(|| router.bus_metrics.connects.get() > connects).await;
    }
    assert!(router.metrics.losses.get() >= 1, "none of the five was lost");
    assert_eq!(router.publish("quiet").await, 1);
    assert_eq!(router.next().await, "quiet 1", "what lost nothing is not called lost");
}

#[tokio::test]
async fn a_server_that_lost_everything_begins_a_new_epoch_and_that_is_told() {
    let mut redis = Redis::start().await;
    let mut router = Router::start(&redis, &["a", "b"]).await;
    for offset in 1..=3 {
        assert_eq!(router.publish("a").await, offset);
        assert_eq!(router.next().await, format!("a {offset}"));
    }
    redis.restart_empty().await;
    let mut told = vec![router.next().await, router.next().await];
    told.sort();
    assert_eq!(told, ["gap a 0", "gap b 0"], "nothing was published since");
    assert_eq!(router.publish("a").await, 1);
    assert_eq!(router.next().await, "a 1");
}

/// Takes the time of what arrives.
#[derive(Default)]
struct Arrivals {
    count: std::sync::atomic::AtomicU64,
    sent: Mutex<Option<Instant>>,
    took: Mutex<Vec<Duration>>,
}

impl Sink for Arrivals {
    fn publication(&self, _: &Arc<Publication>) {
        self.count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        if let Some(sent) = self.sent.lock().take() {
            self.took.lock().push(sent.elapsed());
        }
    }

    fn hint(&self, _: EdgeHint) {}

    fn missed(&self, what: Missed<'_>) {
        panic!("{what:?}");
    }
}

impl Arrivals {
    fn count(&self) -> u64 {
        self.count.load(std::sync::atomic::Ordering::Relaxed)
    }
}

async fn listening(redis: &Redis, sink: &Arc<Arrivals>, channels: &[Arc<str>]) -> RedisBus {
    let config = RedisConfig::parse(&redis.url()).unwrap();
    let random = Arc::new(SeededRandom::new(1));
    let bus = RedisBus::new(config, "r1", Lifecycle::new(), random, BusMetrics::default()).unwrap();
    bus.listen(Arc::clone(sink) as Arc<dyn Sink>).await.unwrap();
    assert!(bus.subscribe(channels).await.iter().all(Result::is_ok));
    bus
}

fn text(bytes: usize) -> Option<Payload> {
    Some(Payload { kind: Some(Kind::Text("x".repeat(bytes))) })
}

/// From the call of the registry to the sink, at 200 publications a second.
#[tokio::test]
#[ignore = "measures; run it alone, on an idle machine"]
async fn measure_latency() {
    let redis = Redis::start().await;
    let sink = Arc::new(Arrivals::default());
    let _bus = listening(&redis, &sink, &["a".into()]).await;
    let config = RedisConfig::parse(&redis.url()).unwrap();
    let (clock, random) = (Arc::new(SystemClock), Arc::new(OsRandom));
    let registry = RedisRegistry::new(
        config,
        Duration::from_secs(10),
        clock,
        random,
        RedisMetrics::default(),
        Default::default(),
    )
    .unwrap();
    let mut ticks = interval(Duration::from_millis(5));
    for _ in 0..2_000 {
        ticks.tick().await;
        *sink.sent.lock() = Some(Instant::now());
        let new = NewPublication { payload: text(128), ..suite::publication("a", "") };
        let [answer] = registry.publish(vec![new]).await.try_into().unwrap();
        assert!(answer.is_ok(), "{answer:?}");
    }
    suite::eventually(|| sink.count() == 2_000).await;
    let mut took = sink.took.lock().clone();
    took.sort();
    let at = |part: f64| took[(took.len() as f64 * part) as usize];
    println!("publish to sink: p50 {:?}, p99 {:?}, max {:?}", at(0.5), at(0.99), took.last().unwrap());
    assert!(at(0.5) < Duration::from_millis(20));
}

/// CPU of the thread that reads, decodes and hands on, at 20,000 publications a second on 50 channels.
#[tokio::test]
#[ignore = "measures; run it alone, on an idle machine"]
async fn measure_cpu() {
    const SECONDS: u64 = 5;
    const TICKS: u64 = SECONDS * 100;
    let redis = Arc::new(Redis::start().await);
    let sink = Arc::new(Arrivals::default());
    let channels: Vec<Arc<str>> = (0..50).map(|at| format!("c{at}").into()).collect();
    let (ready, is_ready) = tokio::sync::oneshot::channel();
    let (server, arrivals, subscribed) = (Arc::clone(&redis), Arc::clone(&sink), channels.clone());
    let reader = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let _bus = listening(&server, &arrivals, &subscribed).await;
            let before = thread_cpu();
            ready.send(()).unwrap();
            while arrivals.count() < TICKS * 200 {
                sleep(Duration::from_millis(10)).await;
            }
            thread_cpu() - before
        })
    });
    is_ready.await.unwrap();
    let config = RedisConfig::parse(&redis.url()).unwrap();
    let (mut connection, _) =
        crate::redis::connect(&config.client().unwrap(), &config.connection_config()).await.unwrap();
    let mut ticks = interval(Duration::from_millis(10));
    for tick in 0..TICKS {
        ticks.tick().await;
        let mut pipeline = Pipeline::with_capacity(200);
        for at in 0..200_u64 {
            let channel = &channels[at as usize % channels.len()];
            let new = NewPublication { payload: text(128), ..suite::publication(channel, "") };
            let stamp =
                Stamp { epoch: "0123456789abcdef".into(), offset: tick * 4 + at / 50 + 1, time_us: 1 };
            let stamp = stamp.encode_to_vec();
            let mut envelope = encode_publication(new);
            envelope.extend([0x2a, stamp.len() as u8]);
            envelope.extend(stamp);
            pipeline.cmd("SPUBLISH").arg(config.keys().publications(channel)).arg(envelope);
        }
        connection.req_packed_commands(&pipeline, 0, 200).await.unwrap();
    }
    let cpu = reader.join().unwrap();
    let messages = TICKS * 200;
    println!("{messages} messages took {cpu:?} of CPU: {:?} each", cpu / messages as u32);
    assert!(cpu < Duration::from_secs(SECONDS));
}

/// CPU time of the calling thread.
fn thread_cpu() -> Duration {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}
