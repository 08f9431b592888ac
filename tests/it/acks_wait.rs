//! Acks that wait for a delivery node that is away: nothing fails meanwhile that a client has acknowledged.

use std::time::Duration;

use sanjay_client::protocol::Payload;
use sanjay_testkit::{Cluster, Peer, Role, backend, eventually, within};
use serde_json::json;
use tokio::time::{Instant, timeout_at};

use crate::stores::metric;

/// Messages, as many as one connection may have in flight: more acks than may wait for an answer.
const MESSAGES: u64 = 256;

/// Shorter than delivery is away.
const DEADLINE: Duration = Duration::from_millis(600);

async fn cluster() -> Cluster {
    let builder = Cluster::builder().set("edge.ack_deadline_ms", DEADLINE.as_millis());
    let cluster = builder.set("edge.heartbeat_ms", 300).set("edge.heartbeat_grace_ms", 400).start().await;
    let backend = backend(&cluster.server()).await;
    for number in 0..MESSAGES {
        backend.send(&["bob"], Payload::Text(number.to_string()), "").await.unwrap();
    }
    cluster
}

/// Everything, none of it acknowledged.
async fn bob(cluster: &Cluster) -> Peer {
    let mut peer = Peer::with_inbox(&cluster.url(), "bob", 256).await;
    for seq in 1..=MESSAGES {
        assert_eq!(peer.event("inbox").await["seq"], seq);
    }
    peer
}

/// Answers heartbeats for a while, in which delivery is away.
async fn beat(peer: &mut Peer, time: Duration) {
    let end = Instant::now() + time;
    while let Ok(envelope) = timeout_at(end, peer.next()).await {
        envelope.expect("the connection stays");
    }
}

#[tokio::test]
async fn acks_that_wait_for_delivery_fail_nothing() {
    within(60, "acks that wait", async {
        let mut cluster = cluster().await;
        let mut peer = bob(&cluster).await;
        cluster.stop(Role::Delivery);
        let mut ids = Vec::new();
        for seq in 1..=MESSAGES {
            ids.push(peer.start(json!({ "ack": { "ranges": [[seq, seq]] } })).await);
        }
        // The time is what is tested.
        beat(&mut peer, DEADLINE * 6).await;
        cluster.cont(Role::Delivery);
        for id in ids {
            let answer = peer.answer(id).await.unwrap();
            assert!(answer["ok"].is_object(), "{answer}");
        }
        assert_eq!(metric(&cluster, Role::Edge, "sanjay_edge_ack_deadlines_total").await, 0);
    })
    .await;
}

#[tokio::test]
async fn a_client_that_left_meanwhile_has_failed_at_nothing() {
    within(60, "acks that wait", async {
        let mut cluster = cluster().await;
        let mut peer = bob(&cluster).await;
        cluster.stop(Role::Delivery);
        for seq in 1..=MESSAGES / 2 {
            peer.start(json!({ "ack": { "ranges": [[seq, seq]] } })).await;
        }
        beat(&mut peer, DEADLINE * 6).await;
        drop(peer);
        cluster.cont(Role::Delivery);
        eventually("the edge knows that it left", Duration::from_secs(20), async || {
            (metric(&cluster, Role::Edge, "sanjay_edge_connections").await == 0).then_some(())
        })
        .await;
        assert_eq!(metric(&cluster, Role::Edge, "sanjay_edge_ack_deadlines_total").await, 0);
        let mut peer = Peer::with_inbox(&cluster.url(), "bob", 256).await;
        let message = peer.event("inbox").await;
        assert_eq!(message["delivery"], 1, "{message}");
    })
    .await;
}
