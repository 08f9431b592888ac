//! What inboxes take: sends whose clients acknowledge, a backlog for users who are away, and channels while the database
//! is stopped. Each is measured beside a limit or against itself in the same run. `sanjay bench` is the load; processes
//! and servers are the test kit's.

mod acks;
mod backlog;
mod channels;
mod limit;

use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use sanjay_testkit::{
    API_KEY, Cluster, ClusterBuilder, Node, Role, Sanjay, TOKEN_SECRET, servers::MongoOptions,
};
use serde_json::Value;

use crate::{measure, report::progress};

/// How long a run of `sanjay bench` may take, its longest measurement included.
const BENCH: Duration = Duration::from_secs(900);

/// What to measure, and with how much.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Only these parts; may be given several times.
    #[arg(long, value_enum)]
    part: Vec<Part>,
    /// Only this store.
    #[arg(long, value_enum)]
    store: Option<Store>,
    /// Seconds of each measurement of sends and of channels.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Users who are away.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1_000..=1_000_000))]
    users: u32,
    /// Messages of each of them.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=64))]
    messages: u32,
    /// How many of them come back.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=19_000))]
    returning: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Sends and their acks at several concurrencies, with one and two nodes.
    Acks,
    /// Messages for users who are away, of whom some come back.
    Backlog,
    /// Channels while MongoDB is stopped.
    Channels,
}

/// Where inboxes are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Store {
    /// A file, each commit synced.
    Redb,
    /// A server of MongoDB's protocol, each commit synced.
    Mongo,
}

impl Store {
    fn name(self) -> &'static str {
        match self {
            Store::Redb => "redb",
            Store::Mongo => "mongo",
        }
    }

    /// A cluster on this store, with so many delivery nodes.
    fn cluster(self, deliveries: usize) -> ClusterBuilder {
        self.cluster_with(deliveries, MongoOptions::default().sync_on_commit())
    }

    /// Likewise, with other options for its server.
    fn cluster_with(self, deliveries: usize, options: MongoOptions) -> ClusterBuilder {
        match self {
            Store::Redb => Cluster::builder(),
            Store::Mongo => Cluster::builder().deliveries(deliveries).mongo_with(options),
        }
    }
}

/// Measures the `sanjay` beside this binary, or that of `SANJAY_BIN`, and prints a line for each result.
///
/// # Errors
/// When something does not start, or a run lost something.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(measure_all(options))
}

async fn measure_all(options: &Options) -> anyhow::Result<()> {
    let wanted = |part| options.part.is_empty() || options.part.contains(&part);
    for store in [Store::Redb, Store::Mongo] {
        if options.store.is_some_and(|only| only != store) {
            continue;
        }
        if wanted(Part::Acks) {
            progress(&format!("sends with acks, {}", store.name()));
            acks::measure(options, store).await.context("sends with acks")?;
        }
        if wanted(Part::Backlog) {
            progress(&format!("a backlog, {}", store.name()));
            backlog::measure(options, store).await.context("a backlog")?;
        }
        if wanted(Part::Channels) && store == Store::Mongo {
            progress("channels without MongoDB");
            channels::measure(options).await.context("channels without MongoDB")?;
        }
    }
    Ok(())
}

/// Runs `sanjay bench` against a cluster, with sends to `server`, and gives its result.
async fn bench(cluster: &Cluster, server: &str, arguments: &[&str]) -> anyhow::Result<Value> {
    let arguments = [&["bench"], arguments, &["--json"]].concat();
    let command = Sanjay::new(arguments)
        .env("SANJAY_URL", cluster.url())
        .env("SANJAY_SERVER", server)
        .env("SANJAY_API_KEY", API_KEY)
        .env("SANJAY_EDGE__TOKEN_SECRET", TOKEN_SECRET);
    let mut process = command.spawn();
    let status = process.wait(BENCH).await;
    anyhow::ensure!(
        status.success(),
        "sanjay bench ended with {status}: {}{}",
        process.stdout(),
        process.stderr()
    );
    serde_json::from_str(process.stdout().trim()).context("the result of sanjay bench")
}

/// Processor time that the nodes of a role have taken so far, in seconds.
fn cpu_s(cluster: &mut Cluster, role: Role) -> anyhow::Result<f64> {
    let nodes: Vec<Node> = cluster.nodes().into_iter().filter(|node| node.role == role).collect();
    let mut sum = 0.0;
    for node in nodes {
        sum += measure::cpu(cluster.process(node).id())?.as_secs_f64();
    }
    Ok(sum)
}

/// A number of a result, such as `send_us.p99`; 0 when it is not there.
fn number(result: &Value, path: &str) -> f64 {
    path.split('.').try_fold(result, |value, name| value.get(name)).and_then(Value::as_f64).unwrap_or(0.0)
}
