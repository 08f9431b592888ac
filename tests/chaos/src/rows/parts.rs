//! Edges, routers and Redis: nothing that they hold is what a message lasts on.

use std::time::Duration;

use rand::Rng as _;
use sanjay_testkit::Role;
use tokio::time::sleep;

use crate::{
    rows::stores::accepts_again,
    run::until,
    storm::{Context, Expect, Outcome, SOON, Storm},
};

/// How long an edge may be without a router whose process was killed, and the look for it on a busy machine.
const REATTACH: Duration = Duration::from_secs(4);

/// Three edges, one after the other killed: their users go on elsewhere.
pub(crate) async fn edge_killed(context: Context) -> anyhow::Result<Outcome> {
    let cluster = context.cluster().edges(3).start().await;
    let mut storm = Storm::begin(&context, cluster, context.load()).await?;
    let mut random = storm.run.random(2_000_000);
    let times = context.pick(3, 12);
    for time in 1..=times {
        storm.at(f64::from(time) / f64::from(times + 1)).await;
        let edge = (Role::Edge, random.random_range(0..3));
        let held = until(SOON, async || storm.metric(edge, "sanjay_edge_connections").await > 0).await;
        anyhow::ensure!(held, "nobody was connected to the edge");
        storm.cluster.kill(edge);
        storm.fault();
        // What its users had not acknowledged goes to the others meanwhile.
        accepts_again(&storm).await;
        storm.cluster.restart(edge).await;
    }
    Ok(storm.finish(Expect { accepted: 0.4, faults: times as usize }).await)
}

/// Of two routers the one that an edge is attached to.
pub(crate) async fn router_killed(context: Context) -> anyhow::Result<Outcome> {
    let cluster = context.cluster().routers(2).redis().start().await;
    let mut storm = Storm::begin(&context, cluster, context.load()).await?;
    let times = context.pick(2, 8);
    for time in 1..=times {
        storm.at(f64::from(time) / f64::from(times + 1)).await;
        let (router, attached) = (storm.cluster.router_of(0), storm.cluster.attachments(0).len());
        storm.cluster.kill((Role::Router, router));
        storm.fault();
        let again = async || storm.cluster.attachments(0).len() > attached;
        if !until(REATTACH, again).await {
            storm.run.complain(format!("the edge had no other router within {REATTACH:?}"));
        }
        storm.cluster.restart((Role::Router, router)).await;
    }
    Ok(storm.finish(Expect { accepted: 0.4, faults: times as usize }).await)
}

/// Redis killed, and another one without anything in its place.
pub(crate) async fn redis_killed_empty(context: Context) -> anyhow::Result<Outcome> {
    let cluster = context.cluster().routers(2).redis().start().await;
    let mut storm = Storm::begin(&context, cluster, context.load()).await?;
    let times = context.pick(1, 5);
    for time in 1..=times {
        storm.at(f64::from(time) / f64::from(times + 1)).await;
        storm.cluster.redis().kill();
        noticed(&storm).await?;
        storm.cluster.redis().restart_empty().await;
        back(&storm).await;
    }
    Ok(storm.finish(Expect { accepted: 0.4, faults: times as usize }).await)
}

/// Redis stopped with its connections open.
pub(crate) async fn redis_paused(context: Context) -> anyhow::Result<Outcome> {
    let cluster = context.cluster().routers(2).redis().start().await;
    let mut storm = Storm::begin(&context, cluster, context.load()).await?;
    let pauses: &[u64] = context.pick(&[4], &[5, 20]);
    for (time, pause) in (1..).zip(pauses) {
        storm.at(f64::from(time) / (pauses.len() + 1) as f64).await;
        storm.cluster.redis().stop();
        noticed(&storm).await?;
        // The pause is the fault, not a wait for something.
        sleep(Duration::from_secs(*pause)).await;
        storm.cluster.redis().cont();
        back(&storm).await;
    }
    Ok(storm.finish(Expect { accepted: 0.4, faults: pauses.len() }).await)
}

const REDIS_UP: &str = "sanjay_router_dependency_up{dependency=\"redis\"}";

/// Waits until both routers miss Redis. Sends do not.
async fn noticed(storm: &Storm) -> anyhow::Result<()> {
    let away = until(SOON, async || storm.sum(Role::Router, REDIS_UP).await == 0).await;
    anyhow::ensure!(away, "no router missed Redis");
    storm.fault();
    accepts_again(storm).await;
    Ok(())
}

async fn back(storm: &Storm) {
    if !until(SOON, async || storm.sum(Role::Router, REDIS_UP).await == 2).await {
        storm.run.complain("the routers did not find Redis again");
    }
}
