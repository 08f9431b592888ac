//! Delivery nodes that die at a place of the code, or at any.

use std::{os::unix::process::ExitStatusExt as _, time::Duration};

use sanjay_testkit::{Node, Role};
use tokio::time::{Instant, sleep};

use crate::storm::{Context, Expect, Outcome, SOON, Store, Storm};

/// The variable that names a place at which a process ends.
const FAILPOINT: &str = "SANJAY_FAILPOINT";

/// How long a node may take to get to the place, on a machine with other things to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// Between two looks whether a node has ended.
const LOOK: Duration = Duration::from_millis(10);

/// Committed, and nobody was told.
pub(crate) async fn killed_before_relay(context: Context) -> anyhow::Result<Outcome> {
    let hits = context.pick(100, 1_000);
    killed_at(context, &format!("delivery.before_relay=abort@{hits}")).await
}

/// Relayed and acknowledged by the client, and the ack is not stored.
pub(crate) async fn killed_before_ack(context: Context) -> anyhow::Result<Outcome> {
    let hits = context.pick(8, 60);
    killed_at(context, &format!("delivery.before_ack=abort@{hits}")).await
}

async fn killed_at(context: Context, point: &str) -> anyhow::Result<Outcome> {
    let mut builder = context.cluster();
    let nodes: Vec<Node> = (0..context.deliveries()).map(|index| (Role::Delivery, index).into()).collect();
    for node in &nodes {
        builder = builder.env(*node, FAILPOINT, point);
    }
    let mut storm = Storm::begin(&context, builder.start().await, context.load()).await?;
    let times = context.pick(2, 6);
    for _ in 0..times {
        let node = ended(&mut storm, &nodes).await?;
        storm.fault();
        if context.store == Store::Mongo {
            goes_on(&mut storm, &nodes, node).await;
        }
        storm.cluster.restart(node).await;
    }
    for node in nodes {
        storm.cluster.forget_environment(node);
        storm.cluster.restart(node).await;
    }
    Ok(storm.finish(Expect { accepted: 0.4, faults: times }).await)
}

/// Waits until one of the nodes has ended as the fail point ends it.
async fn ended(storm: &mut Storm, nodes: &[Node]) -> anyhow::Result<Node> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for node in nodes {
            let Some(status) = storm.cluster.process(*node).ended() else { continue };
            anyhow::ensure!(status.signal() == Some(libc::SIGABRT), "{node} ended with {status}");
            return Ok(*node);
        }
        anyhow::ensure!(Instant::now() < deadline, "no node got to its fail point");
        sleep(LOOK).await;
    }
}

/// Waits until the other node has accepted more, unless it ends as well. It delivers what this one had begun.
async fn goes_on(storm: &mut Storm, nodes: &[Node], dead: Node) {
    let (before, deadline) = (storm.run.history().accepted(), Instant::now() + SOON);
    while storm.run.history().accepted() == before {
        let mut others = nodes.iter().filter(|node| **node != dead);
        if others.all(|node| storm.cluster.process(*node).ended().is_some()) {
            return;
        }
        if Instant::now() >= deadline {
            return storm.run.complain(format!("nothing is accepted without {dead}"));
        }
        sleep(LOOK).await;
    }
}
