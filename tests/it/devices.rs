//! Several devices of one user. Each on a file and on MongoDB.

use std::time::Duration;

use sanjay_client::{DeliveryState, protocol::Payload};
use sanjay_testkit::{Cluster, ClusterBuilder, End, Peer, Role, Token, backend, eventually};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::stores::{metric, on_each_store, usual};

/// The longest that something takes that comes at once, with much to spare.
const LONG: Duration = Duration::from_secs(20);

async fn send(cluster: &Cluster, text: &str) -> String {
    let sent = backend(&cluster.server()).await.send(&["bob"], Payload::Text(text.into()), "").await;
    sent.unwrap()[0].result.clone().unwrap().message_id
}

async fn state(cluster: &Cluster, message_id: &str) -> DeliveryState {
    backend(&cluster.server()).await.get_delivery("bob", message_id).await.unwrap().unwrap().state()
}

async fn bob(cluster: &Cluster) -> Peer {
    Peer::with_inbox(&cluster.url(), "bob", 64).await
}

/// The seq of the next inbox message.
async fn next(peer: &mut Peer) -> u64 {
    timeout(LONG, peer.event("inbox")).await.expect("a message comes in time")["seq"].as_u64().unwrap()
}

/// The ranges of the next `settled`.
async fn settled(peer: &mut Peer) -> Value {
    let settled = timeout(LONG, peer.event("settled")).await.expect("it is told in time");
    assert_eq!(settled["epoch"], peer.welcome["inbox"]["epoch"]);
    settled["ranges"].clone()
}

async fn settled_pushes(cluster: &Cluster) -> u64 {
    metric(cluster, Role::Edge, "sanjay_edge_settled_pushes_total").await
}

#[tokio::test]
async fn the_first_ack_settles_a_message_and_the_other_session_is_told() {
    on_each_store(60, usual, async |cluster| {
        let (mut phone, mut laptop) = (bob(&cluster).await, bob(&cluster).await);
        let id = send(&cluster, "for both").await;
        assert_eq!((next(&mut phone).await, next(&mut laptop).await), (1, 1));
        phone.ack(1, 1).await;
        assert_eq!(settled(&mut laptop).await, json!([[1, 1]]));
        assert_eq!(state(&cluster, &id).await, DeliveryState::Acked);
        let late = laptop.call(json!({ "nak": { "seq": 1, "delivery": 1 } })).await;
        assert_eq!(late["error"]["code"], "bad_request", "{late}");
        laptop.ack(1, 1).await;
        assert!(phone.is_quiet().await, "who acked has nothing in flight");
        assert_eq!(settled_pushes(&cluster).await, 1);
    })
    .await;
}

#[tokio::test]
async fn a_session_that_came_later_is_told_too() {
    on_each_store(60, usual, async |cluster| {
        let mut phone = bob(&cluster).await;
        for text in ["one", "two", "three"] {
            send(&cluster, text).await;
        }
        for seq in 1..=3 {
            assert_eq!(next(&mut phone).await, seq);
        }
        let mut laptop = bob(&cluster).await;
        for seq in 1..=3 {
            assert_eq!(next(&mut laptop).await, seq);
        }
        // That there is another session is a hint, which comes to the edge before the answer to this.
        eventually("it is told that there are two", LONG, async || {
            let name = "sanjay_delivery_notices_total{outcome=\"relayed\"}";
            (metric(&cluster, Role::Delivery, name).await > 0).then_some(())
        })
        .await;
        phone.subscribe("news").await;
        phone.ack(1, 3).await;
        assert_eq!(settled(&mut laptop).await, json!([[1, 3]]));
    })
    .await;
}

#[tokio::test]
async fn an_only_session_costs_no_notice() {
    on_each_store(60, usual, async |cluster| {
        let mut phone = bob(&cluster).await;
        for seq in 1..=20 {
            send(&cluster, "alone").await;
            assert_eq!(next(&mut phone).await, seq);
            phone.ack(seq, seq).await;
        }
        for outcome in ["relayed", "offline", "unknown", "failed", "dropped"] {
            let name = format!("sanjay_delivery_notices_total{{outcome=\"{outcome}\"}}");
            assert_eq!(metric(&cluster, Role::Delivery, &name).await, 0, "{outcome}");
        }
    })
    .await;
}

fn every_device(builder: ClusterBuilder) -> ClusterBuilder {
    builder.set("delivery.devices", "\"every\"")
}

fn hello(device: &str) -> Value {
    json!({ "token": Token::of("bob").sign(), "device": device, "credit": 64 })
}

async fn device(cluster: &Cluster, device: &str) -> Peer {
    Peer::with_hello(&cluster.url(), hello(device)).await
}

#[tokio::test]
async fn every_device_gets_a_message_and_the_last_ack_settles_it() {
    on_each_store(90, every_device, async |mut cluster| {
        let early = send(&cluster, "before any device").await;
        let mut phone = device(&cluster, "phone").await;
        assert_eq!(next(&mut phone).await, 1, "the first device gets what was there");
        let laptop = device(&cluster, "laptop").await;
        assert_eq!(laptop.welcome["inbox"]["mark"], 1, "another begins at the head");
        laptop.bye().await;
        phone.ack(1, 1).await;
        assert_eq!(state(&cluster, &early).await, DeliveryState::Acked);

        let (second, third) = (send(&cluster, "for both").await, send(&cluster, "too").await);
        assert_eq!((next(&mut phone).await, next(&mut phone).await), (2, 3));
        phone.ack(2, 3).await;
        cluster.kill(Role::Delivery);
        cluster.restart(Role::Delivery).await;
        assert_eq!(state(&cluster, &second).await, DeliveryState::Accepted, "the laptop lacks it");
        let mut laptop = device(&cluster, "laptop").await;
        assert_eq!((next(&mut laptop).await, next(&mut laptop).await), (2, 3));
        laptop.ack(2, 2).await;
        assert_eq!(state(&cluster, &second).await, DeliveryState::Acked);
        cluster.kill(Role::Delivery);
        cluster.restart(Role::Delivery).await;
        assert_eq!(state(&cluster, &third).await, DeliveryState::Accepted);

        // Each has its own place, also after reconnecting.
        phone.bye().await;
        let mut phone = device(&cluster, "phone").await;
        assert_eq!(phone.welcome["inbox"]["mark"], 3);
        assert!(phone.is_quiet().await);
        laptop.bye().await;
        let mut laptop = device(&cluster, "laptop").await;
        assert_eq!(next(&mut laptop).await, 3);
        laptop.ack(3, 3).await;
        assert_eq!(state(&cluster, &third).await, DeliveryState::Acked);
        let live = send(&cluster, "live").await;
        assert_eq!((next(&mut phone).await, next(&mut laptop).await), (4, 4));
        phone.ack(4, 4).await;
        assert_eq!(state(&cluster, &live).await, DeliveryState::Accepted);
        laptop.ack(4, 4).await;
        assert_eq!(state(&cluster, &live).await, DeliveryState::Acked);
    })
    .await;
}

#[tokio::test]
async fn a_redelivery_is_for_the_devices_that_have_not_acked() {
    on_each_store(60, every_device, async |cluster| {
        let (mut phone, mut laptop) = (device(&cluster, "phone").await, device(&cluster, "laptop").await);
        let id = send(&cluster, "too much for the laptop").await;
        assert_eq!((next(&mut phone).await, next(&mut laptop).await), (1, 1));
        phone.ack(1, 1).await;
        // It remembers the newest of what it acked alone.
        phone.bye().await;
        let mut phone = device(&cluster, "phone").await;
        laptop.nak(1, 1, 0).await;
        let again = timeout(LONG, laptop.event("inbox")).await.expect("it comes again");
        assert_eq!((&again["seq"], &again["delivery"]), (&json!(1), &json!(2)));
        assert!(phone.is_quiet().await, "the phone has acked it");
        laptop.ack(1, 1).await;
        assert_eq!(state(&cluster, &id).await, DeliveryState::Acked);
    })
    .await;
}

#[tokio::test]
async fn a_seventeenth_device_is_told_why_it_is_refused() {
    on_each_store(60, every_device, async |cluster| {
        for number in 1..=16 {
            device(&cluster, &format!("device-{number}")).await.bye().await;
        }
        let Err(End::Closed(code, why)) = Peer::try_hello(&cluster.url(), hello("one more")).await else {
            panic!("it was welcome");
        };
        assert_eq!(code, 4403);
        assert!(why.contains("16 other devices") && why.contains("credit 0"), "{why}");
        let counted = ["registered", "refused", "forgotten"];
        for (what, expected) in counted.into_iter().zip([16, 1, 0]) {
            let name = format!("sanjay_delivery_devices_{what}_total");
            assert_eq!(metric(&cluster, Role::Delivery, &name).await, expected, "{what}");
        }
        // The others are as welcome as before, and who takes no part in the inbox is too.
        device(&cluster, "device-16").await.bye().await;
        Peer::connect(&cluster.url(), "bob").await.bye().await;
    })
    .await;
}
