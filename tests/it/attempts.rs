//! Deliveries that fail: given back, given up, or not answered by a client that is alive. Each on a file and on MongoDB.

use std::time::Duration;

use sanjay_client::{Client, DeliveryState, InboxEvent, protocol::Payload};
use sanjay_testkit::{
    Cluster, ClusterBuilder, End, Peer, Role, backend, client_options,
    collector::{CollectedSpan, Collector},
    eventually,
    proxy::Proxy,
    seed, within,
};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::stores::{metric, on_each_store, usual};

/// The longest that the first two attempts and the look for them take, with much to spare.
const LONG: Duration = Duration::from_secs(20);

/// The ack deadline of tests that wait for it.
const DEADLINE: Duration = Duration::from_millis(600);

fn with_deadline(builder: ClusterBuilder) -> ClusterBuilder {
    builder.set("edge.ack_deadline_ms", DEADLINE.as_millis())
}

async fn send(cluster: &Cluster, text: &str) -> String {
    let sent = backend(&cluster.server()).await.send(&["bob"], Payload::Text(text.into()), "").await;
    sent.unwrap()[0].result.clone().unwrap().message_id
}

async fn state(cluster: &Cluster, message_id: &str) -> DeliveryState {
    backend(&cluster.server()).await.get_delivery("bob", message_id).await.unwrap().unwrap().state()
}

/// The next inbox message, as (seq, delivery).
async fn next(peer: &mut Peer) -> (u64, u64) {
    let message = timeout(LONG, peer.event("inbox")).await.expect("a message comes in time");
    (message["seq"].as_u64().unwrap(), message["delivery"].as_u64().unwrap())
}

async fn bob(cluster: &Cluster) -> Peer {
    Peer::with_inbox(&cluster.url(), "bob", 64).await
}

fn error(answer: &Value) -> (&str, &str) {
    (answer["error"]["code"].as_str().unwrap(), answer["error"]["message"].as_str().unwrap())
}

#[tokio::test]
async fn a_nak_brings_the_message_again_and_its_delay_is_kept() {
    on_each_store(60, usual, async |cluster| {
        let id = send(&cluster, "poison").await;
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 1));
        let begun = Instant::now();
        peer.nak(1, 1, 0).await;
        assert_eq!(next(&mut peer).await, (1, 2));
        assert!(
            begun.elapsed() >= Duration::from_millis(500),
            "sooner than the schedule: {:?}",
            begun.elapsed()
        );
        // The first delivery is over, whatever a client says of it.
        let answer = peer.call(json!({ "nak": { "seq": 1, "delivery": 1 } })).await;
        let (code, why) = error(&answer);
        assert!(code == "bad_request" && why.contains("the one in flight, which is 2"), "{answer}");
        peer.send(&json!({ "nak": { "seq": 1, "delivery": 1 } })).await;
        assert!(peer.is_quiet().await, "without an id nobody hears of it");
        let begun = Instant::now();
        peer.nak(1, 2, 3_000).await;
        assert_eq!(next(&mut peer).await, (1, 3));
        assert!(begun.elapsed() >= Duration::from_secs(3), "sooner than asked: {:?}", begun.elapsed());
        peer.ack(1, 1).await;
        assert_eq!(state(&cluster, &id).await, DeliveryState::Acked);
        let counts = ["naks", "redeliveries", "terms", "ack_deadlines"];
        for (name, expected) in counts.into_iter().zip([2, 2, 0, 0]) {
            let name = format!("sanjay_edge_{name}_total");
            assert_eq!(metric(&cluster, Role::Edge, &name).await, expected, "{name}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_given_up_never_comes_again() {
    on_each_store(60, usual, async |cluster| {
        let (broken, good) = (send(&cluster, "broken").await, send(&cluster, "good").await);
        let mut peer = bob(&cluster).await;
        assert_eq!((next(&mut peer).await, next(&mut peer).await), ((1, 1), (2, 1)));
        peer.term(1, 1).await;
        assert_eq!(state(&cluster, &broken).await, DeliveryState::Dead);
        peer.ack(2, 2).await;
        assert_eq!(state(&cluster, &good).await, DeliveryState::Acked);
        peer.bye().await;
        let mut peer = bob(&cluster).await;
        assert_eq!((&peer.welcome["inbox"]["mark"], &peer.welcome["inbox"]["head"]), (&json!(2), &json!(2)));
        assert!(peer.is_quiet().await);
        assert_eq!(metric(&cluster, Role::Edge, "sanjay_edge_terms_total").await, 1);
    })
    .await;
}

#[tokio::test]
async fn an_ack_behind_a_nak_wins() {
    on_each_store(60, usual, async |cluster| {
        let id = send(&cluster, "second thoughts").await;
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 1));
        peer.nak(1, 1, 60_000).await;
        peer.ack(1, 1).await;
        assert_eq!(state(&cluster, &id).await, DeliveryState::Acked);
        peer.bye().await;
        let peer = bob(&cluster).await;
        assert_eq!(peer.welcome["inbox"]["mark"], 1);
    })
    .await;
}

#[tokio::test]
async fn who_works_keeps_the_message_and_who_rests_loses_it() {
    on_each_store(60, with_deadline, async |mut cluster| {
        send(&cluster, "long work").await;
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 1));
        let begun = Instant::now();
        let mut pace = interval(DEADLINE / 4);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut killed = false;
        while begun.elapsed() < DEADLINE * 4 {
            pace.tick().await;
            peer.working(1, 1).await;
            if !killed && begun.elapsed() > DEADLINE {
                // The edge knows who works; a delivery node has no part in it.
                cluster.respawn(Role::Delivery);
                killed = true;
            }
        }
        cluster.ready(Role::Delivery).await;
        assert_eq!(metric(&cluster, Role::Edge, "sanjay_edge_ack_deadlines_total").await, 0);
        // A client that only answers heartbeats is alive, and does not work.
        assert_eq!(next(&mut peer).await, (1, 2));
        assert_eq!(metric(&cluster, Role::Edge, "sanjay_edge_ack_deadlines_total").await, 1);
        let answer = peer.call(json!({ "working": { "seq": 1, "delivery": 1 } })).await;
        assert!(error(&answer).1.contains("the one in flight, which is 2"), "{answer}");
        peer.ack(1, 1).await;
    })
    .await;
}

#[tokio::test]
async fn a_half_open_client_burns_no_attempt() {
    let settings = |builder| with_deadline(builder).set("edge.heartbeat_grace_ms", 1_000);
    on_each_store(60, settings, async |cluster| {
        send(&cluster, "into the void").await;
        let proxy = Proxy::to_port(cluster.port(Role::Edge)).await;
        let mut lost = Peer::with_inbox(&format!("ws://{}/v1/ws", proxy.address()), "bob", 64).await;
        assert_eq!(next(&mut lost).await, (1, 1));
        proxy.black_hole();
        let closed = "sanjay_edge_closed_total{code=\"4408\"}";
        let gone = async || (metric(&cluster, Role::Edge, closed).await == 1).then_some(());
        eventually("the edge gives the client up", LONG, gone).await;
        assert_eq!(metric(&cluster, Role::Edge, "sanjay_edge_ack_deadlines_total").await, 0);
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 1), "nothing failed");
        peer.ack(1, 1).await;
    })
    .await;
}

#[tokio::test]
async fn each_connection_of_a_user_has_its_own_deliveries() {
    on_each_store(60, usual, async |cluster| {
        let id = send(&cluster, "for one of them").await;
        let (mut phone, mut laptop) = (bob(&cluster).await, bob(&cluster).await);
        assert_eq!((next(&mut phone).await, next(&mut laptop).await), ((1, 1), (1, 1)));
        phone.nak(1, 1, 0).await;
        assert_eq!((next(&mut phone).await, next(&mut laptop).await), ((1, 2), (1, 2)));
        laptop.ack(1, 1).await;
        // What is settled stays settled, whatever the other says, be it told before or not.
        let _ = phone.call(json!({ "nak": { "seq": 1, "delivery": 2 } })).await;
        assert_eq!(state(&cluster, &id).await, DeliveryState::Acked);
        phone.bye().await;
        assert_eq!(bob(&cluster).await.welcome["inbox"]["mark"], 1);
    })
    .await;
}

#[tokio::test]
async fn a_nak_that_was_answered_survives_kills() {
    on_each_store(60, usual, async |mut cluster| {
        let id = send(&cluster, "killed meanwhile").await;
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 1));
        peer.nak(1, 1, 0).await;
        cluster.restart(Role::Delivery).await;
        assert_eq!(next(&mut peer).await, (1, 2), "the connection lasts");
        peer.nak(1, 2, 0).await;
        cluster.restart(Role::Edge).await;
        assert!(matches!(peer.next().await, Err(End::Lost(_) | End::Closed(..))));
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 3));
        peer.ack(1, 1).await;
        assert_eq!(state(&cluster, &id).await, DeliveryState::Acked);
    })
    .await;
}

#[tokio::test]
async fn a_message_that_was_given_up_stays_dead_across_a_kill() {
    on_each_store(60, usual, async |mut cluster| {
        let id = send(&cluster, "given up").await;
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 1));
        peer.term(1, 1).await;
        cluster.restart(Role::Delivery).await;
        assert_eq!(state(&cluster, &id).await, DeliveryState::Dead);
        peer.ack(1, 1).await;
        assert_eq!(state(&cluster, &id).await, DeliveryState::Dead, "an ack comes too late");
        let api = backend(&cluster.server()).await;
        let letter = api.get_dead_letter("bob", &id).await.unwrap().expect("it has its letter");
        assert_eq!((letter.seq, letter.failures.len()), (1, 1));
        assert!(peer.is_quiet().await);
    })
    .await;
}

#[tokio::test]
async fn who_was_away_when_the_next_attempt_was_due_gets_it_at_once() {
    on_each_store(60, usual, async |cluster| {
        send(&cluster, "later").await;
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 1));
        peer.nak(1, 1, 0).await;
        peer.bye().await;
        let offline = "sanjay_delivery_relays_total{outcome=\"offline\"}";
        let parked = async || (metric(&cluster, Role::Delivery, offline).await >= 1).then_some(());
        eventually("delivery finds the user offline", LONG, parked).await;
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 2));
        peer.ack(1, 1).await;
        assert!(peer.is_quiet().await);
    })
    .await;
}

#[tokio::test]
async fn a_busy_connection_with_little_credit_gets_its_redelivery() {
    on_each_store(60, usual, async |cluster| {
        for n in 1..=3 {
            send(&cluster, &format!("message {n}")).await;
        }
        let mut peer = Peer::with_inbox(&cluster.url(), "bob", 1).await;
        assert_eq!(next(&mut peer).await, (1, 1));
        peer.nak(1, 1, 0).await;
        // The next message takes the only place, and keeps it beyond the attempt's time.
        assert_eq!(next(&mut peer).await, (2, 1));
        let relays = "sanjay_delivery_relays_total{outcome=\"relayed\"}";
        let before = metric(&cluster, Role::Delivery, relays).await;
        let relayed = async || (metric(&cluster, Role::Delivery, relays).await > before).then_some(());
        eventually("the attempt is relayed", LONG, relayed).await;
        assert!(peer.is_quiet().await, "there is no room for it");
        peer.ack(2, 2).await;
        assert_eq!(next(&mut peer).await, (1, 2), "it comes before what is newer");
        peer.ack(1, 1).await;
        assert_eq!(next(&mut peer).await, (3, 1));
    })
    .await;
}

#[tokio::test]
async fn the_rust_client_gives_messages_back() {
    on_each_store(60, usual, async |cluster| {
        let id = send(&cluster, "for the application").await;
        let client = Client::connect(client_options(&cluster.url(), "bob", seed())).await.unwrap();
        let mut inbox = client.inbox().unwrap();
        let mut next = async || match timeout(LONG, inbox.next()).await.expect("a message comes in time") {
            Some(InboxEvent::Message(delivery)) => delivery,
            other => panic!("instead of a message came {other:?}"),
        };
        let first = next().await;
        assert_eq!((first.message.seq, first.message.delivery), (1, 1));
        first.acker.nak(Duration::ZERO, "not now").await.unwrap();
        let second = next().await;
        assert_eq!((second.message.seq, second.message.delivery), (1, 2));
        second.acker.working().await.unwrap();
        second.acker.term("never").await.unwrap();
        client.close().await;
        assert_eq!(state(&cluster, &id).await, DeliveryState::Dead);
    })
    .await;
}

#[tokio::test]
async fn each_delivery_is_a_span_of_the_messages_trace() {
    within(60, "the trace of a redelivery", async {
        let collector = Collector::start().await;
        let cluster = Cluster::builder().traces_to(&collector).start().await;
        let api = backend(&cluster.server()).await;
        let trace = "5c0e2a77b34da6a3ce929d0e0e473600";
        let traced = api.traced(&format!("00-{trace}-00f067aa0ba902b7-01")).unwrap();
        traced.send(&["bob"], Payload::Text("traced".into()), "").await.unwrap();
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, 1));
        peer.nak(1, 1, 0).await;
        assert_eq!(next(&mut peer).await, (1, 2));
        let deliveries = |spans: &[CollectedSpan]| {
            let pushes = spans.iter().filter(|span| span.trace_id == trace && span.name == "push");
            let deliveries =
                pushes.map(|span| span.attributes.get("sanjay.delivery").and_then(Value::as_u64));
            let mut deliveries: Vec<_> = deliveries.collect();
            deliveries.sort_unstable();
            (deliveries == [None, Some(2)]).then_some(())
        };
        collector.wait_for("a push for each delivery, the second with its number", deliveries).await;
    })
    .await;
}
