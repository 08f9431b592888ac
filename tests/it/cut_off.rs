//! One process that alone cannot reach another: it does not hold up what the others can do.

use std::time::Duration;

use sanjay_client::protocol::Payload;
use sanjay_testkit::{Cluster, Peer, Role, Wire, backend, eventually, proxy::Proxy, within};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(20);

/// Two seconds until a message is due, five until another node takes it over, and some for the machine.
const TAKEN_OVER: Duration = Duration::from_secs(20);

fn text(text: impl Into<String>) -> Payload {
    Payload::Text(text.into())
}

async fn metric(cluster: &Cluster, node: (Role, usize), name: &str) -> u64 {
    let page = Wire::get(&format!("{}/metrics", cluster.admin(node))).await.body;
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {page}")).parse().expect("a number")
}

/// Sends to users who are online through one delivery node, and waits until all have it.
async fn delivered(cluster: &Cluster, delivery: usize, users: usize) {
    let url = cluster.url();
    let mut peers = Vec::new();
    for user in 0..users {
        peers.push(Peer::with_inbox(&url, &format!("user {user}"), 8).await);
    }
    let api = backend(&cluster.servers()[delivery]).await;
    for user in 0..users {
        let sent = api.send(&[&format!("user {user}")], text("hi"), "").await.unwrap();
        assert!(sent[0].result.is_ok(), "{sent:?}");
    }
    let all = async {
        for peer in &mut peers {
            assert_eq!(peer.event("inbox").await["payload"]["text"], "hi");
        }
    };
    tokio::time::timeout(TAKEN_OVER, all).await.expect("every user has the message");
}

#[tokio::test]
async fn a_delivery_node_without_a_router_leaves_its_messages_to_another() {
    within(120, "a delivery node that reaches no router", async {
        let nowhere = "http://127.0.0.1:1";
        let cut_off = (Role::Delivery, 1);
        let builder =
            Cluster::builder().deliveries(2).mongo().env(cut_off, "SANJAY_DELIVERY__ROUTER", nowhere);
        let cluster = builder.start().await;
        delivered(&cluster, 1, 12).await;
    })
    .await;
}

#[tokio::test]
async fn a_router_without_redis_is_left_for_one_that_has_it() {
    within(120, "a router that reaches no Redis", async {
        let redis = sanjay_testkit::servers::Redis::start().await;
        let proxy = Proxy::to_port(redis.port()).await;
        let (direct, cut) = (redis.port(), proxy.port());
        let at = |port| format!("redis://127.0.0.1:{port}");
        let mut cluster = Cluster::builder()
            .routers(2)
            .redis_at(&at(direct))
            .env((Role::Router, 1), "SANJAY_ROUTER__REGISTRY", at(cut))
            .start()
            .await;
        // The edge is to be at the router that will be cut off.
        eventually("the edge is at router 1", Duration::from_secs(60), async || {
            if cluster.router_of(0) == 0 {
                cluster.restart(Role::Edge).await;
                return None;
            }
            Some(())
        })
        .await;
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 8).await;
        ann.subscribe("news").await;
        let api = backend(&cluster.server()).await;
        api.publish("news", text("before"), "").await.unwrap();
        assert_eq!(ann.event("message").await["payload"]["text"], "before");

        proxy.cut();
        eventually("the edge is at router 0", PATIENCE, async || (cluster.router_of(0) == 0).then_some(()))
            .await;
        let alone = "sanjay_delivery_peers_healthy{peer=\"router\"}";
        let left_out = async || (metric(&cluster, (Role::Delivery, 0), alone).await == 1).then_some(());
        eventually("delivery leaves it out", PATIENCE, left_out).await;
        for n in 0..10 {
            api.publish("news", text(format!("back end {n}")), "").await.unwrap();
            let published =
                ann.call(json!({ "publish": { "channel": "news", "payload": { "text": "ann" } } })).await;
            assert!(published["published"].is_object(), "{published}");
        }
        assert!(api.send(&["ann"], text("inbox"), "").await.unwrap()[0].result.is_ok());
        assert_eq!(ann.event("inbox").await["payload"]["text"], "inbox");

        proxy.pass();
        let back = async || (metric(&cluster, (Role::Delivery, 0), alone).await == 2).then_some(());
        eventually("it is back", PATIENCE, back).await;
    })
    .await;
}

#[tokio::test]
async fn a_node_with_another_cluster_key_is_left_out() {
    within(120, "a delivery node and a router of another cluster", async {
        let (other, key) = ("the key of another cluster", "SANJAY_CLUSTER__KEY");
        let builder = Cluster::builder().routers(2).deliveries(2).redis().mongo();
        let builder = builder.env((Role::Delivery, 1), key, other).env((Role::Router, 1), key, other);
        let cluster = builder.start().await;
        let edge = (Role::Edge, 0);
        for peer in ["router", "delivery node"] {
            let name = format!("sanjay_edge_peers_healthy{{peer=\"{peer}\"}}");
            let one = async || (metric(&cluster, edge, &name).await == 1).then_some(());
            eventually("one of two is used", PATIENCE, one).await;
        }
        assert!(cluster.log(edge).contains("the cluster key is wrong"), "{}", cluster.log(edge));
        let mut ann = Peer::connect(&cluster.url(), "ann").await;
        ann.subscribe("news").await;
        let api = backend(&cluster.server()).await;
        for n in 0..20 {
            api.publish("news", text(n.to_string()), "").await.unwrap();
            assert_eq!(ann.event("message").await["payload"]["text"], n.to_string());
        }
        // What its own back end sends it is stored, and delivered by the one that can.
        delivered(&cluster, 1, 6).await;
    })
    .await;
}
