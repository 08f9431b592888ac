//! Prints how many sends per second the store takes, by itself and through the gRPC API, at several concurrencies.
//! Everything runs in this process, on a file in the directory of temporary files, fsync included.
//!
//! `cargo run --release -p sanjay-delivery --example sends`
#![expect(clippy::print_stdout, reason = "it is what the example is for")]

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use prometheus_client::registry::Registry;
use sanjay_delivery::{
    ApiKey, Config, hash_api_key,
    metrics::Metrics,
    store::{self, InboxStore, NewMessage, StoreOptions},
};
use sanjay_proto::{
    client::v1::{Payload, payload::Kind},
    delivery::v1::{SendRequest, delivery_client::DeliveryClient},
};
use sanjay_runtime::{Clock, Context, OsRandom, Secret, SystemClock, random::uuid_v7};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{Request, transport::Channel};

const RUN: Duration = Duration::from_secs(4);
const USERS: u64 = 1_000;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let directory = tempfile::tempdir()?;
    let options = StoreOptions {
        on_commit: Arc::new(()),
        max_unsettled: 10_000_000,
        clock: Arc::new(SystemClock),
        random: Arc::new(OsRandom),
        metrics: Metrics::register(&mut Registry::default()),
    };
    let location = format!("redb:{}", directory.path().join("store.redb").display());
    let store = store::open(&location.parse()?, options).await?;
    for concurrency in [1, 16, 256] {
        let store = store.clone();
        measure("store", concurrency, move |n| {
            let store = store.clone();
            async move { append(&*store, n).await }
        })
        .await?;
    }
    drop(store);

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    let config = Config {
        store: format!("redb:{}", directory.path().join("node.redb").display()),
        api_keys: vec![ApiKey { name: "bench".into(), sha256: hash_api_key("bench") }],
        max_unsettled: 10_000_000,
        // Nobody listens there: hints are dropped, which costs little beside the commits.
        router: "http://127.0.0.1:1".into(),
        ..Config::default()
    };
    let context = Context::system(Secret::new("cluster"));
    sanjay_delivery::start(config, listener, context.clone(), &mut Registry::default()).await?;
    let channel = Channel::from_shared(url)?.connect().await?;
    for concurrency in [1, 16, 256] {
        let channel = channel.clone();
        measure("grpc", concurrency, move |n| send(channel.clone(), n)).await?;
    }
    context.lifecycle.shutdown(Duration::from_secs(5)).await;
    Ok(())
}

fn payload() -> Payload {
    Payload { kind: Some(Kind::Text("x".repeat(128))) }
}

fn user(n: u64) -> String {
    format!("user-{}", n % USERS)
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

/// Runs `operation` in a closed loop and prints its rate and percentiles.
async fn measure<F>(
    what: &str,
    concurrency: u64,
    operation: impl Fn(u64) -> F + Clone + Send + 'static,
) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>> + Send,
{
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for task in 0..concurrency {
        let operation = operation.clone();
        tasks.spawn(async move {
            let mut took = Vec::new();
            let mut n = task;
            while started.elapsed() < RUN {
                let began = Instant::now();
                operation(n).await?;
                took.push(began.elapsed());
                n += concurrency;
            }
            anyhow::Ok(took)
        });
    }
    let mut took: Vec<Duration> = Vec::new();
    while let Some(task) = tasks.join_next().await {
        took.append(&mut task??);
    }
    let rate = took.len() as f64 / started.elapsed().as_secs_f64();
    took.sort_unstable();
    let percentile = |p: usize| took.get(took.len() * p / 100).copied().unwrap_or_default();
    println!(
        "{what:5} concurrency {concurrency:3}: {rate:6.0}/s, p50 {:?}, p99 {:?}",
        percentile(50),
        percentile(99)
    );
    Ok(())
}
