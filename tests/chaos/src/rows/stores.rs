//! Databases that die, freeze, fail and lose their answers.

use std::time::Duration;

use sanjay_testkit::{
    Role,
    proxy::Proxy,
    servers::{
        Mongo, MongoOptions,
        bson::{Document, doc},
    },
};
use tokio::time::sleep;

use crate::{
    run::until,
    storm::{Context, Expect, Outcome, Storm},
};

/// How long the effect of a fault may take to show, on a machine with other things to do.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a delivery node writes with.
const WRITES: [&str; 5] = ["bulkWrite", "update", "insert", "delete", "findAndModify"];

/// Killed, and started again on its files.
pub(crate) async fn mongo_killed(context: Context) -> anyhow::Result<Outcome> {
    let options = MongoOptions::default().sync_on_commit();
    let cluster = context.base().deliveries(context.deliveries()).mongo_with(options).start().await;
    let mut storm = Storm::begin(&context, cluster, context.load()).await?;
    let times = context.pick(1, 5);
    for time in 1..=times {
        storm.at(f64::from(time) / f64::from(times + 1)).await;
        let before = storm.run.unknown();
        storm.cluster.mongo().kill();
        let noticed = until(PATIENCE, async || storm.run.unknown() > before).await;
        anyhow::ensure!(noticed, "sends were answered without a database");
        storm.fault();
        storm.cluster.mongo().restart().await;
    }
    accepts_again(&storm).await;
    Ok(storm.finish(Expect { accepted: 0.2, faults: times as usize }).await)
}

/// Stopped with its connections open, for longer than any call waits.
pub(crate) async fn mongo_paused(context: Context) -> anyhow::Result<Outcome> {
    let mut storm = Storm::begin(&context, context.cluster().start().await, context.load()).await?;
    let pauses: &[u64] = context.pick(&[5], &[5, 10, 20]);
    for (time, pause) in (1..).zip(pauses) {
        storm.at(f64::from(time) / (pauses.len() + 1) as f64).await;
        let before = storm.run.unknown();
        storm.cluster.mongo().stop();
        // The pause is the fault, not a wait for something.
        sleep(Duration::from_secs(*pause)).await;
        let noticed = until(PATIENCE, async || storm.run.unknown() > before).await;
        anyhow::ensure!(noticed, "nobody noticed that the database was stopped");
        storm.cluster.mongo().cont();
        storm.fault();
    }
    accepts_again(&storm).await;
    Ok(storm.finish(Expect { accepted: 0.2, faults: pauses.len() }).await)
}

/// Fails writes in the ways in which a replica set does, some after it has carried them out.
pub(crate) async fn mongo_failing(context: Context) -> anyhow::Result<Outcome> {
    let options = MongoOptions::default().test_commands();
    let cluster = context.base().deliveries(context.deliveries()).mongo_with(options).start().await;
    let mut storm = Storm::begin(&context, cluster, context.load()).await?;
    let concern = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    let ways = [
        doc! { "writeConcernError": concern },
        doc! { "closeConnection": true },
        doc! { "errorCode": 10107, "errorLabels": ["RetryableWriteError"] },
        doc! { "errorCode": 91 },
    ];
    let rounds = context.pick(1, 4);
    let faults = rounds * ways.len();
    for (fault, how) in (1..).zip(ways.iter().cycle().take(faults)) {
        storm.at(f64::from(fault) / (faults + 1) as f64).await;
        let before = troubles(&storm).await;
        // More often than the driver tries, in several calls.
        fail(&mut storm, doc! { "times": 12 }, how.clone()).await;
        let landed = until(PATIENCE, async || troubles(&storm).await > before).await;
        anyhow::ensure!(landed, "no write was seen to fail with {how}");
        storm.fault();
        storm
            .cluster
            .mongo()
            .command("admin", doc! { "configureFailPoint": "failCommand", "mode": "off" })
            .await;
    }
    accepts_again(&storm).await;
    Ok(storm.finish(Expect { accepted: 0.3, faults }).await)
}

async fn fail(storm: &mut Storm, mode: Document, how: Document) {
    let mut data = doc! { "failCommands": WRITES.to_vec() };
    data.extend(how);
    let command = doc! { "configureFailPoint": "failCommand", "mode": mode, "data": data };
    storm.cluster.mongo().command("admin", command).await;
}

/// Writes whose outcome had to be looked up, and calls that failed.
async fn troubles(storm: &Storm) -> u64 {
    let unknown = storm.sum(Role::Delivery, "sanjay_delivery_store_unknown_outcomes_total").await;
    let failed = "sanjay_delivery_store_call_failures_total{operation=\"write\"}";
    unknown + storm.sum(Role::Delivery, failed).await
}

/// Every connection is cut between a commit and its answer.
pub(crate) async fn mongo_reply_lost(context: Context) -> anyhow::Result<Outcome> {
    let mongo = Mongo::start().await;
    let proxy = Proxy::to_port(mongo.port()).await;
    let uri = format!("mongodb://127.0.0.1:{}/lost?directConnection=true", proxy.port());
    let cluster = context.base().deliveries(context.deliveries()).mongo_at(&uri).start().await;
    let storm = Storm::begin(&context, cluster, context.load()).await?;
    let times = context.pick(3, 20);
    for time in 1..=times {
        storm.at(f64::from(time) / f64::from(times + 1)).await;
        // The server has answered, so that the write is done, and nobody hears of it.
        let before = proxy.accepted();
        proxy.cut_after_request_holding(b"writeConcern", 3);
        tokio::time::timeout(PATIENCE, proxy.until_cut()).await?;
        proxy.pass();
        let back = until(PATIENCE, async || proxy.accepted() > before).await;
        anyhow::ensure!(back, "no node connected again");
        storm.fault();
    }
    accepts_again(&storm).await;
    Ok(storm.finish(Expect { accepted: 0.2, faults: times as usize }).await)
}

/// Waits until something is accepted again.
pub(crate) async fn accepts_again(storm: &Storm) {
    let before = storm.run.history().accepted();
    if !until(PATIENCE, async || storm.run.history().accepted() > before).await {
        storm.run.complain("nothing is accepted after the last fault");
    }
}
