//! Tokens: what is wrong with one is told by a close code, wherever the token travelled.

use sanjay_testkit::{Peer, Settings, Standalone, TOKEN_SECRET, Token, Wire, within};
use serde_json::json;

use crate::bad_input::serves_the_next;

/// A token of someone who was never asked to sign it: `{"alg":"none"}`, a user, and no signature.
const UNSIGNED: &str = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhbm4iLCJleHAiOjk5OTk5OTk5OTl9.";

#[tokio::test]
async fn a_bad_token_closes_with_its_reason() {
    within(60, "bad tokens", async {
        let server = Standalone::start().await;
        let good = Token::of("ann");
        let cases = [
            (json!({}), "no token"),
            (json!({ "token": "" }), "malformed"),
            (json!({ "token": "secret" }), "malformed"),
            (json!({ "token": "a.b.c" }), "malformed"),
            (json!({ "token": UNSIGNED }), "HS256"),
            (json!({ "token": good.clone().signed_with("another secret of the same length, or so").sign() }), "signature"),
            (json!({ "token": format!("{}x", good.sign()) }), "token"),
            (json!({ "token": good.clone().expires_in_s(-5).sign() }), "expired"),
            (json!({ "token": good.clone().expires_in_s(0).sign() }), "expired"),
            (json!({ "token": good.clone().begins_in_s(60).sign() }), "not valid before"),
            (json!({ "token": Token::of("").sign() }), "sub"),
            (json!({ "token": Token::of("a\nb").sign() }), "sub"),
            (json!({ "token": Token::of(&"n".repeat(201)).sign() }), "201 bytes"),
        ];
        for (hello, part) in cases {
            let mut peer = Peer::silent(server.url()).await;
            peer.send(&json!({ "id": 1, "hello": hello })).await;
            let (code, reason) = peer.closed().await;
            assert_eq!(code, 4401, "{hello}: {reason}");
            assert!(reason.contains(part), "{part:?} is missing: {hello}: {reason}");
            assert!(!reason.contains(TOKEN_SECRET));
        }
        serves_the_next(server.url()).await;
    })
    .await;
}

#[tokio::test]
async fn a_token_may_travel_in_the_handshake() {
    within(30, "tokens in the handshake", async {
        let server = Standalone::start().await;
        let (token, bad) = (Token::of("ann").sign(), Token::of("ann").expires_in_s(-5).sign());
        let hello = br#"{"id":1,"hello":{"credit":0}}"#;
        for (path, header) in [
            (None, Some(format!("Bearer {token}"))),
            (Some(format!("/v1/ws?token={token}")), None),
            // The header is preferred to the query.
            (Some(format!("/v1/ws?token={bad}")), Some(format!("Bearer {token}"))),
        ] {
            let headers: Vec<_> = header.iter().map(|header| ("Authorization", header.as_str())).collect();
            let mut wire = Wire::upgrade(server.url(), path.as_deref(), &headers).await.unwrap();
            wire.send(sanjay_testkit::Opcode::Text, hello).await;
            let answer = String::from_utf8(wire.next().await.unwrap().payload).unwrap();
            assert!(answer.contains("\"welcome\"") && answer.contains("\"ann\""), "{answer}");
        }
        let path = format!("/v1/ws?token={bad}");
        let mut wire = Wire::upgrade(server.url(), Some(&path), &[]).await.unwrap();
        wire.send(sanjay_testkit::Opcode::Text, hello).await;
        assert_eq!(wire.closed().await.unwrap().0, 4401);
        serves_the_next(server.url()).await;
    })
    .await;
}

#[tokio::test]
async fn a_token_that_ends_closes_its_connection() {
    within(30, "an ending token", async {
        let server = Standalone::start_with(
            Settings::default().set("edge.heartbeat_ms", 500).set("edge.token_grace_s", 0),
        )
        .await;
        let hello = json!({ "token": Token::of("ann").expires_in_s(3).sign() });
        let mut peer = Peer::with_hello(server.url(), hello).await;
        let left = peer.welcome["token_ttl_s"].as_u64().unwrap();
        assert!((1..=3).contains(&left), "{left}");
        peer.subscribe("a").await;
        let (code, reason) = peer.closed().await;
        assert_eq!(code, 4410, "{reason}");
        serves_the_next(server.url()).await;
    })
    .await;
}
