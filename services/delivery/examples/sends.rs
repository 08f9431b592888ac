//! Prints how many sends per second the store takes, by itself and through the gRPC API, at several concurrencies.
//!
//! - `cargo run --release -p sanjay-delivery --example sends`: on a file in the directory of temporary files, fsync
//!   included.
//! - `… --example sends -- --store mongodb://127.0.0.1:27017/bench?directConnection=true`: on databases, beside what a
//!   bare driver does in the same run: `insert_one` of as many bytes, with the same durability and no order, seq or
//!   dedupe key. The two take turns (bare, store, store, bare), so that what else the machine does hits both. A node on
//!   a file is measured beside the same loop last.
//!
//! `--seconds N` sets how long each turn takes.
#![expect(clippy::print_stdout, reason = "it is what the example is for")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use mongodb::{
    Client, Collection,
    bson::{Binary, Document, doc, spec::BinarySubtype},
    options::{ClientOptions, ReadConcern, WriteConcern},
};
use prometheus_client::registry::Registry;
use sanjay_delivery::{
    ApiKey, Config, hash_api_key,
    metrics::Metrics,
    store::{self, InboxStore, Location, NewMessage, StoreOptions},
};
use sanjay_proto::{
    client::v1::{Payload, payload::Kind},
    delivery::v1::{SendRequest, delivery_client::DeliveryClient},
};
use sanjay_runtime::{Clock, Context, OsRandom, Secret, SystemClock, random::uuid_v7};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{Request, transport::Channel};

const USERS: u64 = 1_000;
const CONCURRENCIES: [u64; 3] = [1, 16, 256];

struct Arguments {
    store: Option<String>,
    turn: Duration,
}

impl Arguments {
    fn read() -> anyhow::Result<Self> {
        let mut this = Self { store: None, turn: Duration::from_secs(4) };
        let mut arguments = std::env::args().skip(1);
        while let Some(name) = arguments.next() {
            let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
            match name.as_str() {
                "--store" => this.store = Some(value),
                "--seconds" => this.turn = Duration::from_secs(value.parse()?),
                _ => bail!("{name} is not known; use --store LOCATION or --seconds N"),
            }
        }
        Ok(this)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::read()?;
    let directory = tempfile::tempdir()?;
    let file = |name: &str| format!("redb:{}", directory.path().join(name).display());
    let bare = match &arguments.store {
        Some(uri) => Some(bare_collection(uri).await?),
        None => None,
    };
    // Each in a database of its own, so that the second does not inherit the inboxes of the first.
    let place = |name: &str| match &arguments.store {
        Some(uri) => uri.replacen('?', &format!("_{name}?"), 1),
        None => file(name),
    };

    let store = open(&place("store")).await?;
    let append = move |n| {
        let store = store.clone();
        async move { append(&*store, n).await }
    };
    compare("store", arguments.turn, bare.as_ref(), append).await?;
    through_grpc("grpc", arguments.turn, bare.as_ref(), place("node")).await?;
    if bare.is_some() {
        through_grpc("redb", arguments.turn, bare.as_ref(), file("node")).await?;
    }
    Ok(())
}

/// Measures sends to a node of its own on `store`.
async fn through_grpc(
    what: &str,
    turn: Duration,
    bare: Option<&Collection<Document>>,
    store: String,
) -> anyhow::Result<()> {
    let context = Context::system(Secret::new("cluster"));
    let channel = serve(store, context.clone()).await?;
    compare(what, turn, bare, move |n| send(channel.clone(), n)).await?;
    context.lifecycle.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

async fn open(location: &str) -> anyhow::Result<Arc<dyn InboxStore>> {
    let options = StoreOptions {
        on_commit: Arc::new(()),
        max_unsettled: 10_000_000,
        max_unsettled_bytes: u64::MAX,
        overflow: store::Overflow::Reject,
        keep_expired: false,
        max_attempts: 8,
        clock: Arc::new(SystemClock),
        random: Arc::new(OsRandom),
        metrics: Metrics::register(&mut Registry::default()),
    };
    Ok(store::open(&location.parse()?, options).await?)
}

async fn serve(store: String, context: Context) -> anyhow::Result<Channel> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let config = Config {
        store,
        api_keys: vec![ApiKey { name: "bench".into(), sha256: hash_api_key("bench") }],
        max_unsettled: 10_000_000,
        max_attempts: 8,
        // Nobody listens there: hints are dropped, which costs little beside the commits.
        router: "http://127.0.0.1:1".into(),
        ..Config::default()
    };
    sanjay_delivery::start(config, listener, context, &mut Registry::default()).await?;
    Ok(Channel::from_shared(url)?.connect().await?)
}

/// A collection of the driver alone, as durable as inboxes are.
async fn bare_collection(uri: &str) -> anyhow::Result<Collection<Document>> {
    let Location::Mongodb(database) = uri.parse()? else { bail!("--store takes a mongodb:// URI") };
    let mut options = ClientOptions::parse(&database.uri).await?;
    let mut durable = WriteConcern::majority();
    durable.journal = Some(true);
    (options.write_concern, options.read_concern) = (Some(durable), Some(ReadConcern::majority()));
    options.max_pool_size = Some(32);
    Ok(Client::with_options(options)?.database(&database.name).collection("bare"))
}

/// Measures an operation at each concurrency, and the bare driver before and after it.
async fn compare<F>(
    what: &str,
    turn: Duration,
    bare: Option<&Collection<Document>>,
    operation: impl Fn(u64) -> F + Clone + Send + 'static,
) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>> + Send,
{
    for concurrency in CONCURRENCIES {
        let Some(collection) = bare else {
            println!("{what:5} {}", measure(concurrency, turn, operation.clone()).await?);
            continue;
        };
        let insert = |collection: Collection<Document>| {
            move |n| {
                let collection = collection.clone();
                async move { insert(&collection, n).await }
            }
        };
        let mut yardstick = measure(concurrency, turn, insert(collection.clone())).await?;
        let mut own = measure(concurrency, turn, operation.clone()).await?;
        own.add(measure(concurrency, turn, operation.clone()).await?);
        yardstick.add(measure(concurrency, turn, insert(collection.clone())).await?);
        println!("bare  {yardstick}");
        println!("{what:5} {own}");
        println!(
            "{what:5} concurrency {concurrency:3}: {:.2} x the rate, {:.2} x the p50",
            own.rate() / yardstick.rate(),
            own.percentile(50).as_secs_f64() / yardstick.percentile(50).as_secs_f64()
        );
    }
    Ok(())
}

fn payload() -> Payload {
    Payload { kind: Some(Kind::Text("x".repeat(128))) }
}

fn user(n: u64) -> String {
    format!("user-{}", n % USERS)
}

/// Users take turns over all runs.
fn next() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

async fn insert(collection: &Collection<Document>, n: u64) -> anyhow::Result<()> {
    let bytes = prost::Message::encode_to_vec(&payload());
    let body = Binary { subtype: BinarySubtype::Generic, bytes };
    let id = mongodb::bson::Uuid::from_bytes(*uuid_v7(&SystemClock, &OsRandom).as_bytes());
    let time_us = SystemClock.now_us().cast_signed();
    collection.insert_one(doc! { "_id": id, "u": user(n), "c": "bench", "t": time_us, "p": body }).await?;
    Ok(())
}

async fn append(store: &dyn InboxStore, n: u64) -> anyhow::Result<()> {
    let message = NewMessage {
        user: user(n),
        caller: "bench".into(),
        message_id: uuid_v7(&SystemClock, &OsRandom),
        payload: Arc::new(payload()),
        dedupe_key: String::new(),
        time_us: SystemClock.now_us(),
        trace: String::new(),
        ..NewMessage::default()
    };
    for result in store.append(vec![message]).await {
        result?;
    }
    Ok(())
}

async fn send(channel: Channel, n: u64) -> anyhow::Result<()> {
    let mut request =
        Request::new(SendRequest { users: vec![user(n)], payload: Some(payload()), ..Default::default() });
    request.metadata_mut().insert("authorization", "Bearer bench".parse()?);
    DeliveryClient::new(channel).send(request).await?;
    Ok(())
}

/// How long each operation of some turns took.
struct Measured {
    concurrency: u64,
    took: Vec<Duration>,
    over: Duration,
}

impl Measured {
    fn add(&mut self, other: Self) {
        self.took.extend(other.took);
        self.took.sort_unstable();
        self.over += other.over;
    }

    fn rate(&self) -> f64 {
        self.took.len() as f64 / self.over.as_secs_f64()
    }

    fn percentile(&self, p: usize) -> Duration {
        self.took.get(self.took.len() * p / 100).copied().unwrap_or_default()
    }
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (p50, p99) = (self.percentile(50), self.percentile(99));
        write!(f, "concurrency {:3}: {:6.0}/s, p50 {p50:?}, p99 {p99:?}", self.concurrency, self.rate())
    }
}

/// Runs `operation` in a closed loop.
async fn measure<F>(
    concurrency: u64,
    turn: Duration,
    operation: impl Fn(u64) -> F + Clone + Send + 'static,
) -> anyhow::Result<Measured>
where
    F: Future<Output = anyhow::Result<()>> + Send,
{
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..concurrency {
        let operation = operation.clone();
        tasks.spawn(async move {
            let mut took = Vec::new();
            while started.elapsed() < turn {
                let began = Instant::now();
                operation(next()).await?;
                took.push(began.elapsed());
            }
            anyhow::Ok(took)
        });
    }
    let mut took: Vec<Duration> = Vec::new();
    while let Some(task) = tasks.join_next().await {
        took.append(&mut task??);
    }
    took.sort_unstable();
    Ok(Measured { concurrency, took, over: started.elapsed() })
}
