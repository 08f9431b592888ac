//! A message for a user who is away outlives the server, arrives once, and is gone once it was acknowledged.

use sanjay_client::{DeliveryState, protocol::Payload};
use sanjay_testkit::{Peer, Standalone, backend, within};
use serde_json::json;

#[tokio::test]
async fn a_message_for_an_absent_user_survives_a_kill_and_arrives_once() {
    within(60, "send, kill, restart, connect, acknowledge", async {
        let mut server = Standalone::start().await;
        let sent = backend(server.server()).await.send(&["bob"], Payload::Text("see you".into()), "").await;
        let accepted = sent.unwrap()[0].result.clone().unwrap();
        assert_eq!((accepted.seq, accepted.duplicate), (1, false));

        server.kill();
        server.restart().await;

        let backend = backend(server.server()).await;
        let state = async || backend.get_delivery("bob", &accepted.message_id).await.unwrap().unwrap();
        let before = state().await;
        assert_eq!((before.state(), before.seq, before.settled_us), (DeliveryState::Accepted, 1, 0));

        let mut bob = Peer::with_inbox(server.url(), "bob", 64).await;
        assert_eq!((&bob.welcome["inbox"]["mark"], &bob.welcome["inbox"]["head"]), (&json!(0), &json!(1)));
        let message = bob.event("inbox").await;
        assert_eq!(message["payload"], json!({ "text": "see you" }));
        assert_eq!((&message["seq"], &message["delivery"]), (&json!(1), &json!(1)));
        assert_eq!(message["message_id"], accepted.message_id.as_str());
        assert_eq!(message["time_us"], before.accepted_us);
        bob.ack(1, 1).await;
        assert!(bob.is_quiet().await, "it came twice");
        bob.bye().await;

        let after = state().await;
        assert_eq!(after.state(), DeliveryState::Acked);
        assert!(after.settled_us >= after.accepted_us);

        let mut bob = Peer::with_inbox(server.url(), "bob", 64).await;
        assert_eq!((&bob.welcome["inbox"]["mark"], &bob.welcome["inbox"]["head"]), (&json!(1), &json!(1)));
        assert!(bob.is_quiet().await, "it came again after it was acknowledged");
        // The next one is the next one.
        backend.send(&["bob"], Payload::Text("later".into()), "").await.unwrap();
        assert_eq!(bob.event("inbox").await["seq"], 2);

        let trace = server.cli(["trace", &accepted.message_id]).run().await.succeeded();
        for stage in ["accepted", "written", "acked"] {
            assert!(trace.contains(stage), "{stage} is missing: {trace}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_was_not_acknowledged_comes_again_also_after_a_kill() {
    within(60, "an unacknowledged message", async {
        let mut server = Standalone::start().await;
        let api = backend(server.server()).await;
        let mut bob = Peer::with_inbox(server.url(), "bob", 64).await;
        for text in ["1", "2", "3"] {
            api.send(&["bob"], Payload::Text(text.into()), "").await.unwrap();
            assert_eq!(bob.event("inbox").await["payload"]["text"], text);
        }
        bob.ack(2, 2).await;
        server.kill();
        server.restart().await;
        let mut bob = Peer::with_inbox(server.url(), "bob", 64).await;
        assert_eq!((&bob.welcome["inbox"]["mark"], &bob.welcome["inbox"]["head"]), (&json!(0), &json!(3)));
        assert_eq!(bob.event("inbox").await["seq"], 1);
        assert_eq!(bob.event("inbox").await["seq"], 3);
        assert!(bob.is_quiet().await);
        bob.ack(1, 3).await;
        bob.bye().await;
        let bob = Peer::with_inbox(server.url(), "bob", 64).await;
        assert_eq!(bob.welcome["inbox"]["mark"], 3);
    })
    .await;
}

#[tokio::test]
async fn a_send_names_each_users_result_and_repeats_by_key() {
    within(30, "sends with one key", async {
        let server = Standalone::start().await;
        let backend = backend(server.server()).await;
        let (a, b) = (Payload::Text("a".into()), Payload::Text("b".into()));
        let first = backend.send(&["ann", "bob"], a.clone(), "k").await.unwrap();
        let users: Vec<_> = first.iter().map(|result| result.user.as_str()).collect();
        assert_eq!(users, ["ann", "bob"]);
        let again = backend.send(&["bob", "cat"], a, "k").await.unwrap();
        let (was, now) = (first[1].result.clone().unwrap(), again[0].result.clone().unwrap());
        assert_eq!((now.message_id, now.seq, now.duplicate), (was.message_id, was.seq, true));
        assert!(!again[1].result.clone().unwrap().duplicate);
        let other = backend.send(&["bob"], b.clone(), "k").await.unwrap();
        assert_eq!(other[0].result.clone().unwrap_err().code.as_str(), "already_exists");
        // Keys are the caller's own.
        let others = sanjay_testkit::backend_with(server.server(), sanjay_testkit::OTHER_API_KEY).await;
        let theirs = others.send(&["bob"], b, "k").await.unwrap();
        assert!(!theirs[0].result.clone().unwrap().duplicate);
    })
    .await;
}
