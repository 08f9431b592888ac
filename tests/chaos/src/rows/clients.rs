//! Clients that give messages back, for a while or for good, and clients whose network is gone.

use std::{collections::BTreeMap, time::Duration};

use sanjay_client::{DeadLetterFilter, DeliveryState, RedriveDeadLettersRequest};
use sanjay_testkit::{Role, proxy::Proxy};

use crate::{
    history::Event,
    rows::stores::accepts_again,
    run::{Faulty, until},
    senders,
    storm::{Context, Expect, Outcome, SOON, Storm},
};

/// How long messages may take to die, and letters to be sent again.
const PATIENCE: Duration = Duration::from_secs(60);

/// Clients that never take some messages: those die, the others do not notice, and what is sent again is taken.
pub(crate) async fn poison(context: Context) -> anyhow::Result<Outcome> {
    let cluster = context.cluster().set("delivery.max_attempts", context.pick(2, 3)).start().await;
    let mut load = context.load();
    (load.every, load.faulty) = (20, Faulty::Poison);
    let mut storm = Storm::begin(&context, cluster, load).await?;
    let given_back = async || storm.sum(Role::Edge, "sanjay_edge_naks_total").await > 0;
    anyhow::ensure!(until(PATIENCE, given_back).await, "no client gave anything back");
    storm.fault();
    let expect = Expect { accepted: 0.4, faults: 1 };
    storm.calm(expect).await;
    let all_dead = async || {
        let owed = storm.run.history().poisoned().len();
        storm.dead_letters(&DeadLetterFilter::default()).await.len() >= owed
    };
    if !until(PATIENCE, all_dead).await {
        let owed = storm.run.history().poisoned().len();
        storm.run.complain(format!("not all of {owed} poison messages became dead letters"));
    }
    let died = storm.sum(Role::Delivery, "sanjay_delivery_dead_letters_total{reason=\"max_attempts\"}").await;
    anyhow::ensure!(died > 0, "no message died of its attempts");
    storm.record_dead().await;
    storm.run.cure();
    redrive(&storm).await?;
    Ok(storm.finish(expect).await)
}

/// Sends all dead letters again, and waits until each was taken.
async fn redrive(storm: &Storm) -> anyhow::Result<()> {
    let api = senders::connect(&storm.cluster.servers(), 0).await?;
    let request = RedriveDeadLettersRequest {
        filter: Some(DeadLetterFilter::default()),
        rate: 1_000,
        ..RedriveDeadLettersRequest::default()
    };
    let mut redrive = api.redrive_dead_letters(request).await?;
    while let Some(far) = redrive.next().await {
        let far = far?;
        anyhow::ensure!(far.failed == 0, "letters were not sent again: {}", far.problem);
    }
    let letters =
        storm.dead_letters(&DeadLetterFilter { redriven: true, ..DeadLetterFilter::default() }).await;
    anyhow::ensure!(!letters.is_empty(), "there are no dead letters");
    for letter in letters {
        let Some((number, _)) = storm.number_of(&letter).await else {
            anyhow::bail!("the letter {} of {} cannot be read", letter.message_id, letter.user);
        };
        anyhow::ensure!(!letter.redriven_as.is_empty(), "{} was not sent again", letter.message_id);
        let (user, id) = (letter.user, letter.redriven_as);
        let state = async || api.get_delivery(&user, &id).await.ok().flatten();
        let acked = async || state().await.is_some_and(|found| found.state() == DeliveryState::Acked);
        if !until(PATIENCE, acked).await {
            storm.run.complain(format!("{id} of {user}, a letter that was sent again, is not acked"));
        }
        let seq = state().await.map_or(0, |found| found.seq);
        storm.run.record(&user, Event::Redriven { number, seq, id });
    }
    Ok(())
}

/// Two nodes on a backlog of messages that are due again, of which one is killed in the middle.
pub(crate) async fn two_nodes_one_backlog(context: Context) -> anyhow::Result<Outcome> {
    let cluster = context.cluster().set("delivery.max_attempts", 100).start().await;
    let mut load = context.load();
    (load.every, load.faulty) = (6, Faulty::Twice);
    let mut storm = Storm::begin(&context, cluster, load).await?;
    let times = context.pick(1, 4);
    for time in 1..=times {
        storm.at(f64::from(time) / f64::from(times + 1)).await;
        for index in 0..2 {
            let node = (Role::Delivery, index);
            let claims = async || storm.metric(node, "sanjay_delivery_redeliveries_total").await > 0;
            anyhow::ensure!(until(SOON, claims).await, "delivery-{index} won no lease");
        }
        one_winner(&storm).await?;
        let node = (Role::Delivery, time as usize % 2);
        storm.cluster.kill(node);
        storm.fault();
        accepts_again(&storm).await;
        storm.cluster.restart(node).await;
    }
    Ok(storm.finish(Expect { accepted: 0.3, faults: times as usize }).await)
}

/// Messages whose way is looked at, and the time within which nobody relays one again for a good reason.
const LOOKED_AT: usize = 100;
const TWICE_US: u64 = 300_000;

/// Checks that no due message was relayed by both nodes at once.
async fn one_winner(storm: &Storm) -> anyhow::Result<()> {
    let api = senders::connect(&storm.cluster.servers(), 0).await?;
    let messages = storm.run.history().given_back(LOOKED_AT);
    let (mut relayed, mut doubled) = (0, BTreeMap::new());
    for id in messages {
        let Ok(trace) = api.get_trace(&id).await else { continue };
        let again = trace
            .milestones
            .iter()
            .filter(|step| step.stage == "relayed" && step.detail.starts_with("again"));
        let mut times: Vec<u64> = again.map(|step| step.time_us).collect();
        times.sort_unstable();
        relayed += times.len();
        let pairs = times.windows(2).filter(|pair| pair[1] - pair[0] < TWICE_US).count();
        if pairs > 0 {
            doubled.insert(id, times);
        }
    }
    anyhow::ensure!(relayed > 0, "no message that was given back was seen to be relayed again");
    if !doubled.is_empty() {
        storm.run.complain(format!("{} due messages were relayed twice at once: {doubled:?}", doubled.len()));
    }
    Ok(())
}

/// Clients whose bytes go nowhere any more, in both directions, with connections that look open.
pub(crate) async fn half_open(context: Context) -> anyhow::Result<Outcome> {
    // The ack deadline passes while a connection is half-open, and must not count then. It is longer than a client may
    // take to close, in which it is alive and answers nothing.
    let builder = context.cluster().set("edge.heartbeat_grace_ms", 9_000).set("edge.ack_deadline_ms", 10_000);
    let cluster = builder.start().await;
    let edge = (Role::Edge, 1);
    let proxy = Proxy::to_port(cluster.port(edge)).await;
    let urls = vec![cluster.url(), format!("ws://{}/v1/ws", proxy.address())];
    let storm = Storm::begin_at(&context, cluster, context.load(), urls).await?;
    let times = context.pick(1, 4);
    for time in 1..=times {
        storm.at(f64::from(time) / f64::from(times + 1)).await;
        let connections = async || storm.metric(edge, "sanjay_edge_connections").await;
        anyhow::ensure!(until(SOON, async || connections().await > 4).await, "nobody came through the proxy");
        let before = storm.metric(edge, DEAD_CLIENTS).await;
        proxy.black_hole();
        if !until(CLOSED, async || connections().await == 0).await {
            let left = connections().await;
            storm.run.complain(format!("{left} half-open clients were not closed within {CLOSED:?}"));
        }
        anyhow::ensure!(storm.metric(edge, DEAD_CLIENTS).await > before, "no client was found dead");
        storm.fault();
        proxy.reset();
        proxy.pass();
    }
    for index in 0..2 {
        let burnt = storm.metric((Role::Edge, index), "sanjay_edge_ack_deadlines_total").await;
        if burnt > 0 {
            storm.run.complain(format!("{burnt} attempts were burnt at edge-{index}"));
        }
    }
    Ok(storm.finish(Expect { accepted: 0.4, faults: times as usize }).await)
}

const DEAD_CLIENTS: &str = "sanjay_edge_closed_total{code=\"4408\"}";

/// A heartbeat and its grace, and the look for it on a busy machine.
const CLOSED: Duration = Duration::from_secs(3 + 9 + 4);
