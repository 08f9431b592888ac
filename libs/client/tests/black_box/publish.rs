use std::time::Duration;

use sanjay_client::{
    Client, ClientOptions, PublishError,
    protocol::{Command, ErrorBody, ErrorCode, Event, Payload, event::Published},
};

use crate::{
    server::{Server, welcome},
    soon,
};

fn text(text: &str) -> Payload {
    Payload::Text(text.into())
}

fn published(offset: u64) -> Published {
    Published { message_id: "id".into(), epoch: "a".into(), offset }
}

#[tokio::test]
async fn a_publish_is_answered_or_refused() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    let answer = async {
        let envelope = peer.command().await;
        assert!(matches!(envelope.command, Command::Publish(p) if p.payload == text("hi")));
        peer.push(envelope.id, Event::Published(published(7))).await;
        let envelope = peer.command().await;
        assert!(
            matches!(envelope.command, Command::Publish(p) if p.payload == Payload::Json("{\"a\":1}".into()))
        );
        peer.push(envelope.id, Event::Error(ErrorBody::new(ErrorCode::Forbidden, "no capability"))).await;
    };
    let ask = async {
        assert_eq!(client.publish("news", text("hi"), "").await.unwrap(), published(7));
        let refused = client.publish("news", Payload::Json("{ \"a\": 1 }".into()), "").await;
        assert!(matches!(refused, Err(PublishError::Refused(e)) if e.code == ErrorCode::Forbidden));
    };
    soon(async { tokio::join!(answer, ask) }).await;
    for (payload, code) in [
        (text(&"x".repeat(65_537)), ErrorCode::PayloadTooLarge),
        // Each takes six bytes in JSON.
        (text(&"\u{1}".repeat(65_536)), ErrorCode::PayloadTooLarge),
        (Payload::Json("{\"a\":".into()), ErrorCode::BadRequest),
    ] {
        let refused = soon(client.publish("news", payload, "")).await;
        assert!(matches!(&refused, Err(PublishError::Refused(e)) if e.code == code), "{refused:?}");
    }
}

#[tokio::test]
async fn publishes_keep_the_order_in_which_they_were_started() {
    const PUBLISHES: u64 = 60;
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    // All of them wait for the connection first.
    let numbered = |n: u64| text(&n.to_string());
    let publishing = (0..PUBLISHES).map(|n| client.publish("news", numbered(n), ""));
    let publishing = Box::pin(futures::future::join_all(publishing));
    let answering = async {
        let mut peer = server.welcome(welcome()).await;
        let mut arrived = 0;
        while arrived < PUBLISHES {
            for envelope in peer.next().await.expect("the client stays") {
                assert!(
                    matches!(&envelope.command, Command::Publish(p) if p.payload == numbered(arrived)),
                    "{arrived}: {envelope:?}"
                );
                peer.push(envelope.id, Event::Published(published(arrived))).await;
                arrived += 1;
            }
        }
    };
    let (answers, ()) = soon(async { tokio::join!(publishing, answering) }).await;
    for (n, answer) in (0..).zip(answers) {
        assert_eq!(answer.unwrap(), published(n));
    }
}

#[tokio::test]
async fn only_a_dedupe_key_lets_a_publish_be_repeated() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    let lost = tokio::spawn({
        let client = client.clone();
        async move { client.publish("news", text("once"), "").await }
    });
    peer.command().await;
    drop(peer);
    assert!(matches!(soon(lost).await.unwrap(), Err(PublishError::Disconnected)));

    let repeated = tokio::spawn({
        let client = client.clone();
        async move { client.publish("news", text("again"), "key").await }
    });
    let mut peer = server.welcome(welcome()).await;
    peer.command().await;
    drop(peer);
    let mut peer = server.welcome(welcome()).await;
    let envelope = peer.command().await;
    assert!(matches!(envelope.command, Command::Publish(p) if p.dedupe == "key"));
    peer.push(envelope.id, Event::Published(published(1))).await;
    assert_eq!(soon(repeated).await.unwrap().unwrap(), published(1));
}

#[tokio::test]
async fn a_publish_without_an_answer_ends() {
    let server = Server::start().await;
    let options = ClientOptions { request_timeout: Duration::from_millis(300), ..server.options() };
    let client = Client::connect(options).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    let (late, _) =
        soon(async { tokio::join!(client.publish("news", text("hi"), ""), peer.command()) }).await;
    assert!(matches!(late, Err(PublishError::Timeout(_))), "{late:?}");
    soon(client.close()).await;
    assert!(matches!(soon(client.publish("news", text("hi"), "")).await, Err(PublishError::Closed(_))));
}
