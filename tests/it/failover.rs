//! Routers and delivery nodes in twos: one dies, freezes or shuts down, and the other goes on with its work.

use std::time::{Duration, Instant};

use sanjay_client::{Backend, BackendOptions, DeliveryState, protocol::Payload};
use sanjay_testkit::{API_KEY, Cluster, Peer, Role, Wire, backend, eventually, within};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

/// How long an edge may be without a router whose process was killed.
const REATTACH: Duration = Duration::from_secs(2);

/// How long an edge may stay with a router that is stopped: an interval of the health check, its time-out, and the
/// attach.
const LEAVE: Duration = Duration::from_secs(4);

fn text(text: &str) -> Payload {
    Payload::Text(text.into())
}

/// Waits until an edge has attached for the `count`th time.
async fn attached(cluster: &Cluster, edge: usize, count: usize, limit: Duration) {
    let what = format!("edge {edge} is attached for time {count}");
    eventually(&what, limit, async || (cluster.attachments(edge).len() >= count).then_some(())).await;
}

async fn metric(cluster: &Cluster, node: (Role, usize), name: &str) -> u64 {
    let page = Wire::get(&format!("{}/metrics", cluster.admin(node))).await.body;
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {page}")).parse().expect("a number")
}

/// Reads envelopes up to the channel message with this text; gives the gap that came before, if one did.
async fn message(peer: &mut Peer, text: &str) -> (Value, Value) {
    let mut gap = Value::Null;
    loop {
        let mut envelope = peer.next().await.expect("the socket stays");
        if envelope["gap"].is_object() {
            gap = envelope["gap"].take();
        } else if envelope["message"]["payload"]["text"] == text {
            return (gap, envelope["message"].take());
        }
    }
}

#[tokio::test]
async fn the_edges_of_a_killed_router_go_to_the_other_and_tell_what_was_missed() {
    within(120, "a killed router", async {
        let mut cluster = Cluster::builder().edges(2).routers(2).redis().start().await;
        let urls = cluster.urls();
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::connect(&urls[0], "ann").await;
        let mut bob = Peer::connect(&urls[1], "bob").await;
        ann.subscribe("news").await;
        bob.subscribe("news").await;
        let first = api.publish("news", text("1"), "").await.unwrap();
        assert_eq!(message(&mut ann, "1").await.1["offset"], 1);
        message(&mut bob, "1").await;

        // While the edge cannot look, its router dies and a message passes through the other.
        let dead = cluster.router_of(0);
        let count = cluster.attachments(0).len();
        cluster.stop((Role::Edge, 0));
        cluster.kill((Role::Router, dead));
        let missed = api.publish("news", text("2"), "key of 2").await.unwrap();
        assert_eq!((&missed.epoch, missed.offset), (&first.epoch, 2), "Redis keeps the epoch");
        cluster.cont((Role::Edge, 0));
        attached(&cluster, 0, count + 1, REATTACH).await;
        assert_eq!(cluster.router_of(0), 1 - dead);
        api.publish("news", text("3"), "key of 3").await.unwrap();
        let (gap, third) = message(&mut ann, "3").await;
        assert_eq!((&third["epoch"], &third["offset"]), (&json!(first.epoch), &json!(3)));
        assert_eq!((&gap["from"], &gap["to"]), (&json!(2), &json!(2)), "{gap}");
        message(&mut bob, "3").await;

        // Now both edges are with the other one. It is killed under them.
        cluster.restart((Role::Router, dead)).await;
        let counts = [cluster.attachments(0).len(), cluster.attachments(1).len()];
        let alive = "sanjay_edge_peers_healthy{peer=\"router\"}";
        for edge in 0..2 {
            assert_eq!(cluster.router_of(edge), 1 - dead);
            let healthy = async || (metric(&cluster, (Role::Edge, edge), alive).await == 2).then_some(());
            eventually("the router is found again", PATIENCE, healthy).await;
        }
        let killed = Instant::now();
        cluster.kill((Role::Router, 1 - dead));
        for (edge, count) in counts.into_iter().enumerate() {
            attached(&cluster, edge, count + 1, REATTACH).await;
            assert_eq!(cluster.router_of(edge), dead);
        }
        let attached = killed.elapsed();
        ann.publish("news", "4").await;
        message(&mut ann, "4").await;
        message(&mut bob, "4").await;
        println!(
            "both edges had another router {attached:?} after the kill, a message passed {:?}",
            killed.elapsed()
        );
        assert!(killed.elapsed() < REATTACH);
        let failovers = "sanjay_edge_peer_failovers_total{peer=\"router\"}";
        assert!(metric(&cluster, (Role::Edge, 0), failovers).await >= 2);
    })
    .await;
}

#[tokio::test]
async fn a_stopped_router_is_left_and_may_come_back() {
    within(120, "a stopped router", async {
        let mut cluster = Cluster::builder().routers(2).redis().start().await;
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::connect(&cluster.url(), "ann").await;
        ann.subscribe("news").await;
        let frozen = cluster.router_of(0);
        let count = cluster.attachments(0).len();
        cluster.stop((Role::Router, frozen));
        let stopped = Instant::now();
        // Its connections stay open; nothing but the health check can tell.
        attached(&cluster, 0, count + 1, LEAVE).await;
        println!("the edge had left a stopped router after {:?}", stopped.elapsed());
        assert_eq!(cluster.router_of(0), 1 - frozen);
        for number in 0..20 {
            let body = format!("message {number}");
            api.publish("news", text(&body), &body).await.unwrap();
            message(&mut ann, &body).await;
        }
        cluster.cont((Role::Router, frozen));
        let healthy = "sanjay_edge_peers_healthy{peer=\"router\"}";
        let both = async || (metric(&cluster, (Role::Edge, 0), healthy).await == 2).then_some(());
        eventually("the router is found again", PATIENCE, both).await;
        ann.publish("news", "last").await;
        let (gap, _) = message(&mut ann, "last").await;
        assert_eq!(gap, Value::Null, "what comes back late disturbs nobody");
        assert_eq!(cluster.attachments(0).len(), count + 1, "the edge stays where it is");
    })
    .await;
}

#[tokio::test]
async fn routers_restart_one_after_the_other_under_publishers() {
    within(180, "a rolling restart of the routers", async {
        let mut cluster = Cluster::builder().routers(2).redis().start().await;
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::connect(&cluster.url(), "ann").await;
        ann.subscribe("news").await;
        let publishing = tokio::spawn(async move {
            for number in 0..300 {
                let body = number.to_string();
                api.publish("news", text(&body), &body).await.expect("one of two routers takes it");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        for router in 0..2 {
            let status = cluster.process((Role::Router, router)).terminate(PATIENCE).await;
            assert!(status.success(), "{status}");
            cluster.restart((Role::Router, router)).await;
            let healthy = "sanjay_edge_peers_healthy{peer=\"router\"}";
            let both = async || (metric(&cluster, (Role::Edge, 0), healthy).await == 2).then_some(());
            eventually("the router is found again", PATIENCE, both).await;
        }
        publishing.await.unwrap();
        // Each message arrives once, in order, or lies in a gap that was told.
        let (mut next, mut missed) = (1, 0);
        while next <= 300 {
            let envelope = ann.next().await.expect("the socket stays");
            if envelope["gap"].is_object() {
                assert_eq!(envelope["gap"]["from"], next, "{envelope}");
                let to = envelope["gap"]["to"].as_u64().unwrap();
                missed += to + 1 - next;
                next = to + 1;
            } else if envelope["message"].is_object() {
                assert_eq!(envelope["message"]["offset"], next, "{envelope}");
                next += 1;
            }
        }
        println!("{missed} of 300 messages were missed, and told");
        assert!(missed < 150, "{missed}");
    })
    .await;
}

#[tokio::test]
async fn inboxes_go_on_with_the_other_delivery_node() {
    within(120, "a killed delivery node", async {
        let mut cluster = Cluster::builder().deliveries(2).mongo().start().await;
        let api = Backend::connect(BackendOptions::new(cluster.servers().join(","), API_KEY)).await.unwrap();
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        let mut seq = 0;
        for dead in 0..2 {
            cluster.kill((Role::Delivery, dead));
            for _ in 0..5 {
                seq += 1;
                let sent = api.send(&["ann"], text("hi"), &format!("key {seq}")).await.unwrap();
                let sent = sent[0].result.clone().unwrap();
                assert_eq!(sent.seq, seq);
                assert_eq!(ann.event("inbox").await["seq"], seq);
                // Answered once it is durable.
                ann.ack(seq, seq).await;
                let receipt = api.get_delivery("ann", &sent.message_id).await.unwrap().unwrap();
                assert_eq!(receipt.state(), DeliveryState::Acked);
            }
            // A new connection reads its inbox at the node that is left.
            let again = Peer::with_inbox(&cluster.url(), "ann", 64).await;
            assert_eq!(again.welcome["inbox"]["mark"], seq);
            again.bye().await;
            assert_eq!(Wire::get(&format!("{}/readyz", cluster.admin(Role::Edge))).await.status, 200);
            cluster.restart((Role::Delivery, dead)).await;
            let healthy = "sanjay_edge_peers_healthy{peer=\"delivery node\"}";
            let both = async || (metric(&cluster, (Role::Edge, 0), healthy).await == 2).then_some(());
            eventually("the node is found again", PATIENCE, both).await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_a_node_committed_and_did_not_relay_is_delivered_by_the_other() {
    within(120, "a node that dies between commit and relay", async {
        let first = (Role::Delivery, 0);
        let point = "delivery.before_relay=abort";
        let builder = Cluster::builder().deliveries(2).mongo().env(first, "SANJAY_FAILPOINT", point);
        let mut cluster = builder.start().await;
        let servers = cluster.servers();
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        let mut options = BackendOptions::new(&servers[0], API_KEY);
        options.patience = Duration::ZERO;
        let doomed = Backend::connect(options).await.unwrap();
        let lost = doomed.send(&["ann"], text("hi"), "key").await;
        assert!(lost.is_err(), "the answer is never given: {lost:?}");
        let status = cluster.process(first).wait(PATIENCE).await;
        assert!(!status.success(), "{status}");

        let delivered = ann.event("inbox").await;
        assert_eq!((&delivered["seq"], &delivered["payload"]["text"]), (&json!(1), &json!("hi")));
        // Who repeats the send at the other node is told what became of the first.
        let again = backend(&servers[1]).await.send(&["ann"], text("hi"), "key").await.unwrap();
        let again = again[0].result.clone().unwrap();
        assert!(again.duplicate && again.seq == 1);
        assert_eq!(delivered["message_id"], again.message_id.as_str());
        ann.ack(1, 1).await;
        assert!(ann.is_quiet().await);
    })
    .await;
}

#[tokio::test]
async fn an_edge_is_ready_while_it_has_a_router_and_after_it_saw_a_delivery_node() {
    within(60, "readiness", async {
        let mut cluster = Cluster::start().await;
        let ready = format!("{}/readyz", cluster.admin(Role::Edge));
        let missing = async |flag: &'static str| {
            let answer = async || {
                let answer = Wire::get(&ready).await;
                (answer.status == 503 && answer.body.contains(flag)).then_some(())
            };
            eventually("the edge is not ready", PATIENCE, answer).await;
        };
        let is_ready = async || (Wire::get(&ready).await.status == 200).then_some(());
        assert_eq!(Wire::get(&ready).await.status, 200);

        cluster.kill(Role::Router);
        missing("edge: router").await;
        cluster.restart(Role::Router).await;
        eventually("the edge is ready again", PATIENCE, is_ready).await;

        // Channels work without delivery, and every other edge would be as badly off.
        cluster.kill(Role::Delivery);
        let unhealthy = async || {
            let healthy = "sanjay_edge_peers_healthy{peer=\"delivery node\"}";
            (metric(&cluster, (Role::Edge, 0), healthy).await == 0).then_some(())
        };
        eventually("the edge has noticed", PATIENCE, unhealthy).await;
        assert_eq!(Wire::get(&ready).await.status, 200);
        let mut ann = Peer::connect(&cluster.url(), "ann").await;
        ann.subscribe("news").await;
        ann.publish("news", "without delivery").await;
        message(&mut ann, "without delivery").await;

        // An edge that never saw one does not take clients.
        cluster.kill(Role::Edge);
        let before = cluster.log(Role::Edge).len();
        cluster.respawn(Role::Edge);
        let left_out = async || {
            let log = cluster.log(Role::Edge);
            let run = &log[before..];
            (run.contains("attached to a router") && run.contains("an endpoint is left out")).then_some(())
        };
        eventually("the new edge has a router alone", PATIENCE, left_out).await;
        assert!(!cluster.is_ready(Role::Edge), "{}", cluster.log(Role::Edge));
        cluster.restart(Role::Delivery).await;
        cluster.ready(Role::Edge).await;
    })
    .await;
}

#[tokio::test]
async fn thousands_of_sessions_are_announced_again_beside_what_clients_ask_for() {
    const SESSIONS: u64 = 3_000;
    within(180, "the announcement of many sessions", async {
        let mut cluster = Cluster::builder().routers(2).redis().start().await;
        let url = cluster.url();
        let mut ann = Peer::connect(&url, "ann").await;
        ann.subscribe("news").await;
        let mut crowd = Vec::new();
        for number in 1..SESSIONS {
            crowd.push(Peer::connect(&url, &format!("user {number}")).await);
        }
        let (dead, count) = (cluster.router_of(0), cluster.attachments(0).len());
        let killed = Instant::now();
        cluster.kill((Role::Router, dead));
        attached(&cluster, 0, count + 1, REATTACH).await;
        ann.publish("news", "beside them").await;
        message(&mut ann, "beside them").await;
        let passed = killed.elapsed();
        let announced = async || {
            let sessions = metric(&cluster, (Role::Router, 1 - dead), "sanjay_router_sessions").await;
            (sessions == SESSIONS).then_some(())
        };
        eventually("all sessions are announced", PATIENCE, announced).await;
        println!(
            "a message passed {passed:?} after the kill; all sessions were known after {:?}",
            killed.elapsed()
        );
        assert!(passed < REATTACH, "{passed:?}");
        drop(crowd);
    })
    .await;
}
