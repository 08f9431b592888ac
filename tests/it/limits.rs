//! Limits: what is too slow or too much meets a bound, and nobody else notices.

use std::{collections::HashSet, time::Duration};

use sanjay_client::protocol::{ErrorCode, Payload};
use sanjay_testkit::{End, Peer, Settings, Standalone, Wire, backend, eventually, within};
use serde_json::json;

/// The value of a metric, such as `sanjay_edge_closed_total{code="4413"}`; 0 when it is not there.
async fn metric(server: &Standalone, name: &str) -> f64 {
    let page = Wire::get(&format!("{}/metrics", server.admin())).await;
    assert_eq!(page.status, 200, "{page:?}");
    let value = page.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    value.unwrap_or(0.0)
}

#[tokio::test]
async fn a_slow_consumer_is_closed_and_memory_stays_bounded() {
    within(60, "a slow consumer", async {
        let settings = Settings::default().set("edge.max_outbox_bytes", 1 << 20);
        let server = Standalone::start_with(settings).await;
        let mut fast = Peer::connect(server.url(), "fast").await;
        let mut slow = Peer::connect(server.url(), "slow").await;
        fast.subscribe("flood").await;
        slow.subscribe("flood").await;
        let backend = backend(server.server()).await;
        let payload = || Payload::Text("x".repeat(60_000));
        backend.publish("flood", payload(), "").await.unwrap();
        fast.event("message").await;
        let before = server.process.resident_kib();
        let mut published = 1_u64;
        // The kernel's buffers take some megabytes first; what a server may hold beyond them is one.
        while metric(&server, "sanjay_edge_closed_total{code=\"4413\"}").await < 1.0 {
            assert!(published < 1_000, "60 MB wait for a client that reads nothing");
            for _ in 0..10 {
                backend.publish("flood", payload(), "").await.unwrap();
                published += 1;
                assert_eq!(fast.event("message").await["offset"], published);
            }
        }
        for _ in 0..100 {
            backend.publish("flood", payload(), "").await.unwrap();
            published += 1;
            assert_eq!(fast.event("message").await["offset"], published);
        }
        let grown = server.process.resident_kib().saturating_sub(before);
        assert!(grown < 48 * 1024, "the server grew by {grown} KiB");
        let end = loop {
            if let Err(end) = slow.next().await {
                break end;
            }
        };
        // The close waits behind what the kernel holds; a client that reads at last may find it.
        assert!(matches!(end, End::Closed(4413, _) | End::Lost(_)), "{end:?}");
        fast.publish("flood", "still here").await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_reads_its_inbox_late_gets_everything() {
    within(60, "a slow inbox", async {
        const MESSAGES: u64 = 250;
        let server = Standalone::start().await;
        let backend = backend(server.server()).await;
        let mut ann = Peer::with_inbox(server.url(), "ann", 256).await;
        let before = server.process.resident_kib();
        let mut stream = backend.send_stream();
        let mut pending = Vec::new();
        for _ in 0..MESSAGES {
            pending.push(stream.send(&["ann"], Payload::Text("x".repeat(60_000)), "").await.unwrap());
        }
        for reply in pending {
            reply.wait().await.unwrap();
        }
        // A page of an inbox, the store's cache and the relay's queue may each hold all of it for a while.
        let grown = server.process.resident_kib().saturating_sub(before);
        assert!(grown < 160 * 1024, "the server grew by {grown} KiB");
        for seq in 1..=MESSAGES {
            assert_eq!(ann.event("inbox").await["seq"], seq);
        }
        ann.ack(1, MESSAGES).await;
        assert!(ann.is_quiet().await);
    })
    .await;
}

#[tokio::test]
async fn a_client_that_stalls_is_closed() {
    within(60, "a stalled client", async {
        let settings =
            Settings::default().set("edge.max_outbox_bytes", 64 << 20).set("edge.stall_timeout_ms", 500);
        let server = Standalone::start_with(settings).await;
        let mut slow = Peer::connect(server.url(), "slow").await;
        slow.subscribe("flood").await;
        let backend = backend(server.server()).await;
        for _ in 0..300 {
            backend.publish("flood", Payload::Text("x".repeat(60_000)), "").await.unwrap();
        }
        eventually("the stalled client is closed", Duration::from_secs(20), async || {
            (metric(&server, "sanjay_edge_closed_total{code=\"4413\"}").await >= 1.0).then_some(())
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn credit_bounds_what_is_in_flight() {
    within(30, "credit", async {
        let server = Standalone::start().await;
        let backend = backend(server.server()).await;
        let mut ann = Peer::with_inbox(server.url(), "ann", 4).await;
        for n in 1..=20 {
            backend.send(&["ann"], Payload::Text(n.to_string()), "").await.unwrap();
        }
        let mut next = 1;
        let mut expect = async |peer: &mut Peer, count: u64| {
            for _ in 0..count {
                let event = peer.event("inbox").await;
                assert_eq!((&event["seq"], &event["delivery"]), (&json!(next), &json!(1)));
                next += 1;
            }
            for _ in 0..3 {
                assert!(peer.is_quiet().await, "more than the credit is in flight");
            }
        };
        expect(&mut ann, 4).await;
        ann.ack(2, 3).await;
        expect(&mut ann, 2).await;
        assert!(ann.call(json!({ "credit": { "n": 7 } })).await["ok"].is_object());
        expect(&mut ann, 3).await;
        // Fewer than there are in flight: nothing comes until they are settled.
        assert!(ann.call(json!({ "credit": { "n": 1 } })).await["ok"].is_object());
        ann.ack(1, 8).await;
        expect(&mut ann, 0).await;
        ann.ack(9, 9).await;
        expect(&mut ann, 1).await;
        ann.call(json!({ "credit": { "n": 256 } })).await;
        expect(&mut ann, 10).await;
        // What was not sent on this connection cannot be settled on it.
        ann.ack(1, 1_000).await;
        backend.send(&["ann"], Payload::Text("21".into()), "").await.unwrap();
        expect(&mut ann, 1).await;
    })
    .await;
}

#[tokio::test]
async fn without_credit_a_connection_has_no_inbox() {
    within(30, "credit 0", async {
        let server = Standalone::start().await;
        let backend = backend(server.server()).await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        assert!(ann.welcome.get("inbox").is_none(), "{}", ann.welcome);
        backend.send(&["ann"], Payload::Text("t".into()), "").await.unwrap();
        for command in [json!({ "ack": { "ranges": [[1, 1]] } }), json!({ "credit": { "n": 8 } })] {
            let answer = ann.call(command).await;
            assert_eq!(answer["error"]["code"], "bad_request", "{answer}");
        }
        assert!(ann.is_quiet().await);
        let mut ann = Peer::with_inbox(server.url(), "ann", 1).await;
        assert_eq!(ann.event("inbox").await["seq"], 1);
    })
    .await;
}

#[tokio::test]
async fn a_flood_of_commands_is_answered_without_loss() {
    within(60, "pipelined commands", async {
        const COMMANDS: usize = 5_000;
        let server = Standalone::start().await;
        let mut peer = Peer::connect(server.url(), "ann").await;
        let mut ids = Vec::new();
        for n in 0..COMMANDS {
            let publish = json!({ "publish": { "channel": "pipe", "payload": { "text": n.to_string() } } });
            ids.push(peer.start(publish).await);
        }
        // Answers may come in another order; those to publishes on one channel say that their order was kept.
        let mut answered = HashSet::new();
        while answered.len() < COMMANDS {
            let answer = peer.next().await.expect("the connection lasts");
            let id = answer["id"].as_u64().unwrap();
            assert_eq!(answer["published"]["offset"], id - ids[0] + 1, "{answer}");
            assert!(answered.insert(id), "answered twice: {answer}");
        }
        let mut mixed = Vec::new();
        for n in 0..100 {
            mixed.push(peer.start(json!({ "subscribe": { "channel": format!("c{n}") } })).await);
            mixed.push(peer.start(json!({})).await);
            mixed.push(peer.start(json!({ "shout": {} })).await);
        }
        for (n, id) in mixed.into_iter().enumerate() {
            let answer = peer.answer(id).await.unwrap();
            match n % 3 {
                0 => assert!(answer["subscribed"].is_object(), "{answer}"),
                1 => assert_eq!(answer, json!({ "id": id })),
                _ => assert_eq!(answer["error"]["code"], "unknown_command"),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_connection_holds_so_many_channels() {
    within(30, "channels of a connection", async {
        let server = Standalone::start().await;
        let mut peer = Peer::connect(server.url(), "ann").await;
        let most = peer.welcome["limits"]["subscriptions"].as_u64().unwrap();
        for n in 0..most {
            peer.subscribe(&format!("c{n}")).await;
        }
        let subscribe = json!({ "subscribe": { "channel": "one more" } });
        assert_eq!(peer.call(subscribe.clone()).await["error"]["code"], "limit_exceeded");
        assert!(peer.call(json!({ "unsubscribe": { "channel": "c0" } })).await["ok"].is_object());
        assert!(peer.call(subscribe).await["subscribed"].is_object());
    })
    .await;
}

#[tokio::test]
async fn a_full_inbox_refuses_and_a_thousand_users_are_one_send() {
    within(60, "a full inbox", async {
        let settings = Settings::default().set("delivery.max_unsettled", 3);
        let server = Standalone::start_with(settings).await;
        let backend = backend(server.server()).await;
        for seq in 1..=3 {
            let sent = backend.send(&["ann"], Payload::Text("t".into()), "").await.unwrap();
            assert_eq!(sent[0].result.clone().unwrap().seq, seq);
        }
        let sent = backend.send(&["ann", "bob"], Payload::Text("t".into()), "").await.unwrap();
        let error = sent[0].result.clone().unwrap_err();
        assert_eq!((error.code, error.retryable), (ErrorCode::QueueFull, true));
        assert_eq!(sent[1].result.clone().unwrap().seq, 1);
        let mut ann = Peer::with_inbox(server.url(), "ann", 64).await;
        ann.event("inbox").await;
        ann.ack(1, 1).await;
        let sent = backend.send(&["ann"], Payload::Text("t".into()), "").await.unwrap();
        assert_eq!(sent[0].result.clone().unwrap().seq, 4);

        let users: Vec<String> = (0..1_000).map(|n| format!("user {n}")).collect();
        let users: Vec<&str> = users.iter().map(String::as_str).collect();
        let sent = backend.send(&users, Payload::Text("t".into()), "").await.unwrap();
        assert_eq!(sent.len(), 1_000);
        assert!(sent.iter().zip(&users).all(|(sent, user)| sent.user == *user && sent.result.is_ok()));
    })
    .await;
}

#[tokio::test]
async fn strangers_who_say_nothing_keep_nobody_out() {
    within(60, "a client among silent strangers", async {
        // They may stay for longer than the test, so that only their being dropped lets others in.
        let settings = Settings::default().set("edge.shards", 1).set("edge.upgrade_timeout_ms", 300_000);
        let server = Standalone::start_with(settings).await;
        let address = server.url().trim_start_matches("ws://").split('/').next().unwrap().to_owned();
        let mut strangers = Vec::new();
        for n in 0..1_500 {
            let mut stranger = tokio::net::TcpStream::connect(&address).await.unwrap();
            if n % 2 == 0 {
                tokio::io::AsyncWriteExt::write_all(&mut stranger, b"GET").await.unwrap();
            }
            strangers.push(stranger);
        }
        let mut peer = Peer::connect(server.url(), "ann").await;
        peer.subscribe("news").await;
        peer.publish("news", "served").await;
        assert_eq!(peer.event("message").await["payload"]["text"], "served");
        assert!(metric(&server, "sanjay_edge_handshakes_dropped_total").await >= 400.0);
    })
    .await;
}
