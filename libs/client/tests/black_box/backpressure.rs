use sanjay_client::{
    ChannelEvent, Client, ClientOptions,
    protocol::{
        Command, Event, Payload,
        event::{Published, Welcome},
    },
};

use tokio::sync::oneshot;

use crate::{
    server::{Server, inbox, message, welcome, welcome_with_inbox},
    soon,
};

/// More than the buffers of a loopback socket hold as envelopes of about 250 bytes.
const MESSAGES: u64 = 60_000;

#[tokio::test]
async fn a_slow_application_stops_the_reading_but_not_the_heartbeat() {
    let server = Server::start().await;
    let client = Client::connect(ClientOptions { buffer: 4, ..server.options() }).await.unwrap();
    let mut peer = server.welcome(Welcome { heartbeat_ms: 100, ..welcome() }).await;
    let mut news = soon(client.subscribe("news")).await.unwrap();
    peer.subscribe("news", "a", 0).await;
    let (pinged, pings) = oneshot::channel();
    let flood = tokio::spawn(peer.flood((1..=MESSAGES).map(|offset| message("news", "a", offset)), pinged));
    soon(news.subscribed()).await.unwrap();
    // The application takes nothing, so that the client stops reading; its pings say that it lives.
    soon(pings).await.unwrap();
    assert!(!flood.is_finished(), "the server is slowed down");
    assert_eq!(soon(news.next()).await, Some(ChannelEvent::Subscribed { epoch: "a".into(), offset: 0 }));
    for offset in 1..=MESSAGES {
        match soon(news.next()).await {
            Some(ChannelEvent::Message(message)) => assert_eq!(message.offset, offset),
            other => panic!("{other:?}"),
        }
    }
    drop(soon(flood).await.unwrap());
}

#[tokio::test]
async fn replies_and_acks_pass_an_application_that_is_behind() {
    let server = Server::start().await;
    let client = Client::connect(ClientOptions { buffer: 1, ..server.options() }).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 1)).await;
    let mut stream = client.inbox().unwrap();
    let mut news = soon(client.subscribe("news")).await.unwrap();
    peer.subscribe("news", "a", 0).await;
    peer.push(None, inbox(1)).await;
    for offset in 1..=100 {
        peer.push(None, message("news", "a", offset)).await;
    }
    // The subscription is not read; the application publishes and waits.
    let answer = async {
        loop {
            let envelope = peer.command().await;
            if let Command::Publish(_) = envelope.command {
                let published = Published { message_id: "id".into(), epoch: "a".into(), offset: 101 };
                peer.push(envelope.id, Event::Published(published)).await;
                return;
            }
        }
    };
    let publish = client.publish("news", Payload::Text("hi".into()), "");
    let (published, ()) = soon(async { tokio::join!(publish, answer) }).await;
    assert_eq!(published.unwrap().offset, 101);
    // The subscription's first event fills its buffer, so that the inbox message waits behind the second.
    assert!(matches!(soon(news.next()).await, Some(ChannelEvent::Subscribed { .. })));
    for _ in 0..100 {
        assert!(matches!(soon(news.next()).await, Some(ChannelEvent::Message(_))));
    }
    let Some(sanjay_client::InboxEvent::Message(delivery)) = soon(stream.next()).await else {
        panic!("a message")
    };
    soon(delivery.acker.ack()).await.unwrap();
    assert_eq!(peer.ack().await, [(1, 1)]);
}
