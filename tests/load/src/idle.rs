//! The first phase: many connections that do nothing but answer heartbeats.

use std::time::{Duration, Instant};

use serde::Serialize;

use crate::{
    Options,
    cluster::Cluster,
    measure,
    orders::{FromClient, Hello, Open, Status, ToClient},
    process::{Core, Part},
    report,
};

/// How long memory may settle before it is read: the allocator gives dirty pages back after a second.
const SETTLE: Duration = Duration::from_secs(3);

/// The edge's heartbeat in this phase: memory is read when every connection has answered one.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// What a connection costs.
#[derive(Debug, Serialize)]
pub(crate) struct Idle {
    pub connections: u32,
    pub channels: u32,
    pub inbox: bool,
    /// Of the edge's process.
    pub rss_before_bytes: u64,
    pub rss_after_bytes: u64,
    pub rss_bytes_per_connection: f64,
    /// From the upgrade to the answered `subscribe`.
    pub cpu_us_per_connect: f64,
    pub connects_per_second: f64,
}

/// Opens the connections and reads the edge's memory before and after.
pub(crate) fn measure(options: &Options) -> anyhow::Result<Idle> {
    let limit = Duration::from_secs(options.step_seconds);
    report::progress("starting router, delivery and edge");
    let cluster = Cluster::start(options, HEARTBEAT)?;
    let mut client: Part<FromClient> =
        Part::start("client", &["client"], Core::Client, &cluster.log("client"))?;
    pause(SETTLE)?;
    let rss_before_bytes = measure::rss(cluster.edge_pid())?;
    let cpu_before = measure::cpu(cluster.edge_pid())?;
    report::progress(&format!("opening {} connections", options.connections));
    let elapsed =
        open(&mut client, &cluster, options.connections, options.per_channel, options.no_inbox, limit)?;
    let cpu = measure::cpu(cluster.edge_pid())? - cpu_before;
    report::progress("waiting until each answered a heartbeat");
    let status = heartbeats(&mut client, options.connections, limit)?;
    pause(SETTLE)?;
    let rss_after_bytes = measure::rss(cluster.edge_pid())?;
    anyhow::ensure!(status.surprises.is_empty(), "the edge said what it should not: {:?}", status.surprises);
    let connections = f64::from(options.connections);
    Ok(Idle {
        connections: options.connections,
        channels: options.connections.div_ceil(options.per_channel),
        inbox: !options.no_inbox,
        rss_before_bytes,
        rss_after_bytes,
        rss_bytes_per_connection: report::ratio(
            rss_after_bytes.saturating_sub(rss_before_bytes),
            connections,
        ),
        cpu_us_per_connect: cpu.as_secs_f64() * 1e6 / connections,
        connects_per_second: connections / elapsed.as_secs_f64(),
    })
}

/// Opens authenticated, subscribed connections to the cluster's edge.
pub(crate) fn open(
    client: &mut Part<FromClient>,
    cluster: &Cluster,
    connections: u32,
    per_channel: u32,
    no_inbox: bool,
    limit: Duration,
) -> anyhow::Result<Duration> {
    let hello = Hello { token_secret: cluster.token_secret(), per_channel, credit: no_inbox.then_some(0) };
    client.order(&ToClient::Open(Open { target: cluster.address(), connections, hello: Some(hello) }))?;
    match client.answer(limit)? {
        FromClient::Opened { elapsed } => Ok(elapsed),
        other => Err(unexpected(other)),
    }
}

/// What the client has received so far.
pub(crate) fn ask(client: &mut Part<FromClient>, limit: Duration) -> anyhow::Result<Status> {
    client.order(&ToClient::Ask)?;
    match client.answer(limit)? {
        FromClient::Status(status) => Ok(status),
        other => Err(unexpected(other)),
    }
}

/// The error for an answer that does not fit.
pub(crate) fn unexpected(answer: FromClient) -> anyhow::Error {
    match answer {
        FromClient::Failed(why) => anyhow::anyhow!("the load client failed: {why}"),
        other => anyhow::anyhow!("the load client answered {other:?}"),
    }
}

/// Waits until as many heartbeats were answered as there are connections.
fn heartbeats(client: &mut Part<FromClient>, connections: u32, limit: Duration) -> anyhow::Result<Status> {
    let deadline = Instant::now() + limit;
    loop {
        let status = ask(client, limit)?;
        if status.pings >= u64::from(connections) {
            return Ok(status);
        }
        anyhow::ensure!(Instant::now() < deadline, "{} heartbeats within {limit:?}", status.pings);
        pause(Duration::from_millis(200))?;
    }
}

fn pause(duration: Duration) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    runtime.block_on(async { tokio::time::sleep(duration).await });
    Ok(())
}
