//! Edge, router and delivery as three processes, each of which may die without the sockets noticing.

use std::time::Duration;

use sanjay_client::{ChannelEvent, Client, DeliveryState, protocol::Payload};
use sanjay_testkit::{
    API_KEY, Cluster, Opcode, Peer, Role, Sanjay, Settings, Token, backend, client_options, eventually,
    within,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

fn text(text: &str) -> Payload {
    Payload::Text(text.into())
}

/// Publishes until the router takes it; gives the answer's body.
async fn publish_when_possible(peer: &mut Peer, channel: &str, text: &str) -> Value {
    eventually("the router takes a publish", PATIENCE, async || {
        let publish =
            json!({ "publish": { "channel": channel, "payload": { "text": text }, "dedupe": text } });
        let mut answer = peer.call(publish).await;
        match answer["error"]["code"].as_str() {
            None => Some(answer["published"].take()),
            Some("unavailable") => None,
            Some(other) => panic!("{other}: {answer}"),
        }
    })
    .await
}

#[tokio::test]
async fn three_processes_do_the_tour() {
    within(60, "the tour over three processes", async {
        let mut cluster = Cluster::start().await;
        let (url, server) = (cluster.url(), cluster.server());
        let mut ann = Peer::connect(&url, "ann").await;
        ann.subscribe("news").await;
        let api = backend(&server).await;
        let published = api.publish("news", text("hi"), "").await.unwrap();
        let message = ann.event("message").await;
        assert_eq!((&message["offset"], &message["payload"]["text"]), (&json!(1), &json!("hi")));
        assert_eq!(message["message_id"], published.message_id.as_str());

        let sent = api.send(&["bob"], text("see you"), "").await.unwrap()[0].result.clone().unwrap();
        for role in [Role::Delivery, Role::Router, Role::Edge] {
            cluster.kill(role);
        }
        // An edge is ready once it has a router.
        for role in [Role::Router, Role::Delivery, Role::Edge] {
            cluster.restart(role).await;
        }
        let mut bob = Peer::with_inbox(&url, "bob", 64).await;
        assert_eq!(bob.event("inbox").await["message_id"], sent.message_id.as_str());
        bob.ack(1, 1).await;
        bob.bye().await;
        let mut bob = Peer::with_inbox(&url, "bob", 64).await;
        assert!(bob.is_quiet().await);
        let receipt = api.get_delivery("bob", &sent.message_id).await.unwrap().unwrap();
        assert_eq!(receipt.state(), DeliveryState::Acked);
        let trace = Sanjay::new(["trace", &sent.message_id, "--server", &server, "--api-key", API_KEY]);
        let trace = trace.run().await.succeeded();
        assert!(trace.contains("acked") && trace.contains("written"), "{trace}");
    })
    .await;
}

#[tokio::test]
async fn a_killed_router_drops_no_socket_and_a_gap_is_signalled() {
    within(60, "the router's death", async {
        let mut cluster = Cluster::start().await;
        let (url, server) = (cluster.url(), cluster.server());
        let api = backend(&server).await;
        let mut ann = Peer::with_inbox(&url, "ann", 64).await;
        let before = ann.subscribe("news").await;
        ann.publish("news", "before").await;
        assert_eq!(ann.event("message").await["payload"]["text"], "before");

        cluster.kill(Role::Router);
        // Without a router, channels say so; inboxes accept and wait.
        eventually("a publish is refused", PATIENCE, async || {
            let publish = json!({ "publish": { "channel": "news", "payload": { "text": "lost" } } });
            let answer = ann.call(publish).await;
            (answer["error"]["code"] == "unavailable").then_some(())
        })
        .await;
        let sent = api.send(&["ann"], text("while it was away"), "").await.unwrap();
        let sent = sent[0].result.clone().unwrap();
        let mut cat = Peer::with_inbox(&url, "cat", 64).await;
        assert_eq!(cat.welcome["features"], json!(["channels"]));
        assert_eq!(
            cat.call(json!({ "subscribe": { "channel": "x" } })).await["error"]["code"],
            "unavailable"
        );

        assert_eq!(ann.event("degraded").await, json!({ "features": ["channels"] }));

        cluster.restart(Role::Router).await;
        assert_eq!(cat.event("degraded").await, json!({ "features": [] }));
        let (mut gap, mut inbox) = (Value::Null, Value::Null);
        publish_when_possible(&mut ann, "news", "after").await;
        let after = loop {
            let mut envelope = ann.next().await.expect("the socket stays");
            if envelope["gap"].is_object() {
                gap = envelope["gap"].take();
            } else if envelope["inbox"].is_object() {
                inbox = envelope["inbox"].take();
            } else if envelope["message"].is_object() {
                break envelope["message"].take();
            }
        };
        assert_eq!(after["payload"]["text"], "after");
        assert_ne!(after["epoch"], before["epoch"], "another router numbers anew");
        assert_eq!(
            (&gap["channel"], &gap["from"]),
            (&json!("news"), &json!(0)),
            "a gap comes before the message"
        );
        assert_eq!(gap["epoch"], after["epoch"]);
        if inbox.is_null() {
            inbox = ann.event("inbox").await;
        }
        assert_eq!(inbox["message_id"], sent.message_id.as_str());
        ann.ack(1, 1).await;

        api.send(&["ann", "cat"], text("live again"), "").await.unwrap();
        assert_eq!(ann.event("inbox").await["seq"], 2);
        assert_eq!(cat.event("inbox").await["seq"], 1);
        cat.subscribe("news").await;
        ann.publish("news", "to both").await;
        assert_eq!(cat.event("message").await["payload"]["text"], "to both");
        assert_eq!(ann.event("message").await["offset"], 2);
    })
    .await;
}

#[tokio::test]
async fn the_rust_client_is_told_that_a_channel_began_anew() {
    within(60, "a subscription over the router's death", async {
        let mut cluster = Cluster::start().await;
        let api = backend(&cluster.server()).await;
        let client = Client::connect(client_options(&cluster.url(), "ann", 0)).await.unwrap();
        let session = client.connected().await.unwrap().session.clone();
        let mut news = client.subscribe("news").await.unwrap();
        assert!(matches!(news.next().await, Some(ChannelEvent::Subscribed { offset: 0, .. })));
        api.publish("news", text("before"), "").await.unwrap();
        let Some(ChannelEvent::Message(before)) = news.next().await else { panic!("no message") };
        cluster.restart(Role::Router).await;
        // With a key the back end repeats it until the router takes it.
        api.publish("news", text("after"), "key").await.unwrap();
        let Some(ChannelEvent::Discontinuity { epoch, offset }) = news.next().await else {
            panic!("nothing was said")
        };
        assert_ne!(epoch, before.epoch);
        // The message came before the edge was attached again, and lies in what was missed, or follows.
        assert!(offset <= 1);
        api.publish("news", text("then"), "").await.unwrap();
        for (offset, payload) in [(1, text("after")), (2, text("then"))].into_iter().skip(offset as usize) {
            let Some(ChannelEvent::Message(message)) = news.next().await else { panic!("no message") };
            assert_eq!((&message.epoch, message.offset, message.payload), (&epoch, offset, payload));
        }
        assert_eq!(client.connected().await.unwrap().session, session, "the socket is still the first");
    })
    .await;
}

#[tokio::test]
async fn a_killed_delivery_drops_no_socket() {
    within(60, "the delivery node's death", async {
        let mut cluster = Cluster::start().await;
        let (url, server) = (cluster.url(), cluster.server());
        let api = backend(&server).await;
        let mut ann = Peer::with_inbox(&url, "ann", 64).await;
        ann.subscribe("news").await;
        api.send(&["ann"], text("1"), "").await.unwrap();
        assert_eq!(ann.event("inbox").await["seq"], 1);

        cluster.kill(Role::Delivery);
        // Channels go on; an ack is answered once it is durable, which is after the restart.
        ann.publish("news", "without inboxes").await;
        assert_eq!(ann.event("message").await["payload"]["text"], "without inboxes");
        let ack = ann.start(json!({ "ack": { "ranges": [[1, 1]] } })).await;
        let mut dan = Peer::with_inbox(&url, "dan", 64).await;
        assert_eq!((&dan.welcome["features"], &dan.welcome["inbox"]), (&json!(["inbox"]), &Value::Null));

        cluster.restart(Role::Delivery).await;
        assert!(ann.answer(ack).await.unwrap()["ok"].is_object());
        let api = backend(&server).await;
        api.send(&["ann", "dan"], text("2"), "").await.unwrap();
        assert_eq!(ann.event("inbox").await["seq"], 2);
        let back = dan.event("degraded").await;
        assert_eq!(back["features"], json!([]));
        assert!(back["inbox"]["epoch"].is_string(), "{back}");
        assert_eq!(dan.event("inbox").await["seq"], 1);
        let again = Peer::with_inbox(&url, "ann", 64).await;
        assert_eq!(again.welcome["inbox"]["mark"], 1);
    })
    .await;
}

#[tokio::test]
async fn a_killed_edge_loses_nothing_of_an_inbox() {
    within(60, "the edge's death", async {
        let mut cluster = Cluster::start().await;
        let (url, server) = (cluster.url(), cluster.server());
        let api = backend(&server).await;
        let mut ann = Peer::with_inbox(&url, "ann", 64).await;
        api.send(&["ann"], text("1"), "").await.unwrap();
        assert_eq!(ann.event("inbox").await["seq"], 1);
        cluster.kill(Role::Edge);
        assert!(ann.next().await.is_err());
        api.send(&["ann"], text("2"), "").await.unwrap();
        cluster.restart(Role::Edge).await;
        let hello = json!({ "token": Token::of("ann").sign() });
        let mut ann = Peer::with_hello(&url, hello).await;
        assert_eq!(ann.event("inbox").await["seq"], 1);
        assert_eq!(ann.event("inbox").await["seq"], 2);
        ann.ack(1, 2).await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_waits_for_a_role_that_is_away_stays_connected() {
    within(60, "commands during an outage", async {
        let settings = Settings::default().set("edge.heartbeat_ms", 200).set("edge.heartbeat_grace_ms", 300);
        let mut cluster = Cluster::start_with(settings).await;
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        for seq in 1..=50 {
            api.send(&["ann"], text("t"), "").await.unwrap();
            assert_eq!(ann.event("inbox").await["seq"], seq);
        }
        cluster.kill(Role::Router);
        cluster.kill(Role::Delivery);
        // More than may wait for an answer: the edge reads no further until some are answered.
        let mut acks = Vec::new();
        for seq in 1..=50 {
            acks.push(ann.start(json!({ "ack": { "ranges": [[seq, seq]] } })).await);
        }
        // Several heartbeats later the client, which is alive, still has its connection.
        for _ in 0..5 {
            loop {
                let frame = ann.wire.next().await.unwrap();
                assert_ne!(frame.opcode, Opcode::Close, "{:?}", frame.close());
                if frame.opcode == Opcode::Ping {
                    ann.wire.send(Opcode::Pong, &frame.payload).await;
                    break;
                }
            }
        }
        cluster.restart(Role::Router).await;
        cluster.restart(Role::Delivery).await;
        for ack in acks {
            assert!(ann.answer(ack).await.unwrap()["ok"].is_object());
        }
    })
    .await;
}
