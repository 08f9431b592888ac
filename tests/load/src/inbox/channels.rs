//! Channels while MongoDB is stopped and back ends go on sending to inboxes: beside the same load with MongoDB there, in
//! turns.

use std::sync::Arc;

use sanjay_client::protocol::Payload;
use sanjay_testkit::{Cluster, backend};
use serde_json::Value;
use tokio::sync::watch;

use super::{Options, Store, bench, number};
use crate::report::line;

/// Back ends that send to inboxes all the while, each as soon as it has its answer or its refusal.
const SENDERS: usize = 16;

/// There, stopped, stopped, there: what else the machine does hits both alike.
const TURNS: [bool; 4] = [true, false, false, true];

pub(super) async fn measure(options: &Options) -> anyhow::Result<()> {
    let mut cluster = Store::Mongo.cluster(1).start().await;
    let (mut there, mut stopped) = (Vec::new(), Vec::new());
    for is_there in TURNS {
        if !is_there {
            cluster.mongo().stop();
        }
        let result = turn(&cluster, options).await;
        if !is_there {
            cluster.mongo().cont();
        }
        let result = result?;
        let p99 = number(&result, "latency_us.p99") / 1e3;
        line(&format!(
            "channels, MongoDB {}: {:.0} deliveries, p50 {:.2} ms, p99 {p99:.2} ms",
            if is_there { "there   " } else { "stopped " },
            number(&result, "delivered"),
            number(&result, "latency_us.p50") / 1e3,
        ))?;
        if is_there { &mut there } else { &mut stopped }.push(p99);
    }
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len() as f64;
    let noise = spread(&there).max(spread(&stopped));
    line(&format!(
        "channels: p99 stopped / there = {:.2}, noise between turns of one kind {noise:.2}",
        mean(&stopped) / mean(&there)
    ))
}

/// The largest over the smallest.
fn spread(of: &[f64]) -> f64 {
    let (least, most) = of.iter().fold((f64::MAX, 0.0_f64), |(a, b), x| (a.min(*x), b.max(*x)));
    most / least
}

/// A fan-out beside sends.
async fn turn(cluster: &Cluster, options: &Options) -> anyhow::Result<Value> {
    let (over, ended) = watch::channel(false);
    let api = Arc::new(backend(&cluster.server()).await);
    let senders: Vec<_> = (0..SENDERS)
        .map(|sender| {
            let (api, ended) = (api.clone(), ended.clone());
            tokio::spawn(async move {
                let user = format!("beside-{sender}");
                while !*ended.borrow() {
                    // Refused or accepted: it is a load either way. A refusal says when to come again; this one does not
                    // listen.
                    let _ = api.send(&[&user], Payload::Text("x".repeat(128)), "").await;
                }
            })
        })
        .collect();
    let seconds = format!("{}s", options.seconds);
    let arguments = [
        "fanout",
        "--subscribers",
        "16",
        "--rate",
        "200",
        "--size",
        "128",
        "--warm-up",
        "6s",
        "--duration",
        &seconds,
    ];
    let result = bench(cluster, &cluster.server(), &arguments).await;
    over.send_replace(true);
    for sender in senders {
        sender.await?;
    }
    result
}
