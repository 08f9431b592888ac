//! Sends to users whose clients acknowledge, at several concurrencies, beside what the disk alone allows.

use std::time::Duration;

use sanjay_testkit::Role;

use super::{Options, Store, bench, cpu_s, limit, number};
use crate::report::line;

/// Senders that each wait for their answer, of one node.
const CONCURRENCIES: [u32; 3] = [1, 16, 256];

/// Users, each with a client.
const USERS: &str = "1000";

pub(super) async fn measure(options: &Options, store: Store) -> anyhow::Result<()> {
    let nodes: &[usize] = if store == Store::Mongo { &[1, 2] } else { &[1] };
    for &nodes in nodes {
        let mut cluster = store.cluster(nodes).start().await;
        for concurrency in CONCURRENCIES {
            let syncs = limit::syncs_per_second(Duration::from_secs(1))?;
            let before = cpu_s(&mut cluster, Role::Delivery)?;
            let (seconds, senders) = (format!("{}s", options.seconds), concurrency.to_string());
            let arguments = [
                "inbox",
                "--users",
                USERS,
                "--concurrency",
                &senders,
                "--duration",
                &seconds,
                "--warm-up",
                "2s",
            ];
            // With two nodes each has its own senders, at once.
            let servers = cluster.servers();
            let runs = servers.iter().map(|server| bench(&cluster, server, &arguments));
            let results = futures::future::try_join_all(runs).await?;
            let taken = cpu_s(&mut cluster, Role::Delivery)? - before;
            let sum = |path: &str| results.iter().map(|result| number(result, path)).sum::<f64>();
            let most = |path: &str| results.iter().map(|result| number(result, path)).fold(0.0, f64::max);
            anyhow::ensure!(sum("lost") == 0.0, "messages were lost: {results:?}");
            let rate = sum("rate.reached");
            line(&format!(
                "acks {:<5} nodes={nodes} concurrency={concurrency:<3} each: {rate:>7.0} sends/s acked={:.0} \
                 send p50 {:.2} ms p99 {:.2} ms, received p50 {:.2} ms p99 {:.2} ms, {:.1} CPU-s of delivery per million, \
                 {:.2} sends per fdatasync of the same disk ({syncs:.0}/s)",
                store.name(),
                sum("acked"),
                most("send_us.p50") / 1e3,
                most("send_us.p99") / 1e3,
                most("receive_us.p50") / 1e3,
                most("receive_us.p99") / 1e3,
                taken / sum("accepted") * 1e6,
                rate / syncs,
            ))?;
        }
    }
    Ok(())
}
