//! Channels: every subscriber gets every message of its channels, once and in order.

use futures::{StreamExt, stream};
use sanjay_client::{ChannelEvent, Client, Subscription, protocol::Payload};
use sanjay_testkit::{History, Peer, Standalone, backend, client_options, within};
use serde_json::json;
use tokio::task::JoinSet;

const CHANNELS: usize = 5;
const PUBLISHERS: usize = 4;
const MESSAGES: usize = 1_000;
const SUBSCRIBERS: usize = 20;

/// A message whose publish was answered.
#[derive(Clone)]
struct Sent {
    publisher: usize,
    /// Counts the publisher's messages of the channel from 1.
    number: u64,
    channel: usize,
    offset: u64,
    id: String,
}

/// A message as a subscriber saw it.
struct Seen {
    channel: usize,
    offset: u64,
    id: String,
    text: String,
}

fn channel(index: usize) -> String {
    format!("live:{index}")
}

/// What the publisher's n-th message is: its channel, its number there, and its text.
fn message(publisher: usize, n: usize) -> (usize, u64, String) {
    let (channel, number) = (n % CHANNELS, (n / CHANNELS + 1) as u64);
    (channel, number, format!("{publisher} {number}"))
}

/// The two channels of a subscriber.
fn channels_of(subscriber: usize) -> [usize; 2] {
    [subscriber % CHANNELS, (subscriber + 1 + subscriber / CHANNELS % 3) % CHANNELS]
}

async fn back_end(server: String, publisher: usize) -> Vec<Sent> {
    let backend = backend(&server).await;
    let mut stream = backend.publish_stream();
    let mut pending = Vec::with_capacity(MESSAGES);
    for n in 0..MESSAGES {
        let (channel, number, text) = message(publisher, n);
        let reply = stream.publish(&self::channel(channel), Payload::Text(text), "").await.unwrap();
        pending.push((channel, number, reply));
    }
    let mut sent = Vec::with_capacity(MESSAGES);
    for (channel, number, reply) in pending {
        let published = reply.wait().await.unwrap();
        sent.push(Sent { publisher, number, channel, offset: published.offset, id: published.message_id });
    }
    sent
}

async fn sdk_publisher(url: String, publisher: usize) -> Vec<Sent> {
    let mut options = client_options(&url, "publisher", 1);
    options.credit = Some(0);
    let client = Client::connect(options).await.unwrap();
    client.connected().await.unwrap();
    let publishes = stream::iter(0..MESSAGES).map(|n| {
        let (channel, number, text) = message(publisher, n);
        let client = &client;
        async move {
            let published = client.publish(&self::channel(channel), Payload::Text(text), "").await.unwrap();
            Sent { publisher, number, channel, offset: published.offset, id: published.message_id }
        }
    });
    let sent = publishes.buffered(200).collect().await;
    client.close().await;
    sent
}

async fn raw_publisher(url: String, publisher: usize) -> Vec<Sent> {
    let mut peer = Peer::connect(&url, "raw publisher").await;
    let mut sent = Vec::with_capacity(MESSAGES);
    // In bursts that are larger than what a connection may have outstanding.
    for burst in (0..MESSAGES).collect::<Vec<_>>().chunks(50) {
        let mut started = Vec::new();
        for &n in burst {
            let (channel, number, text) = message(publisher, n);
            let publish =
                json!({ "publish": { "channel": self::channel(channel), "payload": { "text": text } } });
            started.push((channel, number, peer.start(publish).await));
        }
        for (channel, number, id) in started {
            let answer = peer.answer(id).await.unwrap();
            let published = &answer["published"];
            let offset = published["offset"].as_u64().unwrap_or_else(|| panic!("{answer}"));
            let id = published["message_id"].as_str().unwrap().to_owned();
            sent.push(Sent { publisher, number, channel, offset, id });
        }
    }
    peer.bye().await;
    sent
}

/// How many messages a subscriber is to get.
const EXPECTED: usize = 2 * PUBLISHERS * MESSAGES / CHANNELS;

async fn raw_subscriber(mut peer: Peer) -> Vec<Seen> {
    let mut seen = Vec::with_capacity(EXPECTED);
    while seen.len() < EXPECTED {
        let message = peer.event("message").await;
        let text = |field: &str| message[field].as_str().unwrap().to_owned();
        seen.push(Seen {
            channel: text("channel").trim_start_matches("live:").parse().unwrap(),
            offset: message["offset"].as_u64().unwrap(),
            id: text("message_id"),
            text: message["payload"]["text"].as_str().unwrap().to_owned(),
        });
    }
    // Whatever came twice would lie between the last message and the answer to a ping.
    assert!(peer.is_quiet().await, "more came than was sent");
    seen
}

async fn sdk_subscriber(subscriptions: Vec<Subscription>) -> Vec<Seen> {
    let mut events = stream::select_all(subscriptions);
    let mut seen = Vec::with_capacity(EXPECTED);
    while seen.len() < EXPECTED {
        match events.next().await.expect("the subscription lasts") {
            ChannelEvent::Message(message) => {
                let Payload::Text(text) = message.payload else {
                    panic!("another kind: {:?}", message.payload)
                };
                let channel = message.channel.trim_start_matches("live:").parse().unwrap();
                seen.push(Seen { channel, offset: message.offset, id: message.message_id, text });
            }
            ChannelEvent::Subscribed { .. } => {}
            other => panic!("{other:?}"),
        }
    }
    seen
}

/// Starts the subscribers; each is subscribed when this returns.
async fn subscribe_all(url: &str) -> JoinSet<(usize, Vec<Seen>)> {
    let mut running = JoinSet::new();
    for subscriber in 0..SUBSCRIBERS {
        let (name, channels) = (format!("subscriber {subscriber}"), channels_of(subscriber));
        if subscriber % 2 == 0 {
            let mut peer = Peer::connect(url, &name).await;
            for index in channels {
                peer.subscribe(&channel(index)).await;
            }
            running.spawn(async move { (subscriber, raw_subscriber(peer).await) });
        } else {
            let client = Client::connect(client_options(url, &name, subscriber as u64)).await.unwrap();
            let mut subscriptions = Vec::new();
            for index in channels {
                let subscription = client.subscribe(&channel(index)).await.unwrap();
                subscription.subscribed().await.unwrap();
                subscriptions.push(subscription);
            }
            running.spawn(async move { (subscriber, sdk_subscriber(subscriptions).await) });
        }
    }
    running
}

/// Checks each subscriber's messages in two ways: by offset, and by what each publisher counted.
fn check(sent: &[Sent], subscribers: Vec<(usize, Vec<Seen>)>) {
    let (mut by_offset, mut by_publisher) = (History::default(), History::default());
    for (subscriber, seen) in subscribers {
        let stream = |channel| format!("subscriber {subscriber} channel {channel}");
        let from = |channel, publisher| format!("{} publisher {publisher}", stream(channel));
        for message in sent.iter().filter(|message| channels_of(subscriber).contains(&message.channel)) {
            by_offset.accepted(&stream(message.channel), message.offset, &message.id);
            by_publisher.accepted(&from(message.channel, message.publisher), message.number, &message.id);
        }
        for Seen { channel, offset, id, text } in seen {
            by_offset.received(&stream(channel), offset, &id);
            by_offset.applied(&stream(channel), offset, &id);
            let (publisher, number) = text.split_once(' ').unwrap();
            let (publisher, number) = (publisher.parse().unwrap(), number.parse().unwrap());
            by_publisher.received(&from(channel, publisher), number, &id);
            by_publisher.applied(&from(channel, publisher), number, &id);
        }
    }
    for history in [by_offset, by_publisher] {
        history.check().assert_clean(SUBSCRIBERS * EXPECTED);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_subscribers_get_each_message_once_and_in_order() {
    within(60, "4 × 1,000 messages to 20 subscribers", async {
        let server = Standalone::start().await;
        let subscribers = subscribe_all(server.url()).await;
        let (url, api) = (server.url().to_owned(), server.server().to_owned());
        let publishers = tokio::join!(
            tokio::spawn(back_end(api.clone(), 0)),
            tokio::spawn(back_end(api, 1)),
            tokio::spawn(sdk_publisher(url.clone(), 2)),
            tokio::spawn(raw_publisher(url, 3)),
        );
        let sent: Vec<Sent> =
            <[_; PUBLISHERS]>::from(publishers).into_iter().flat_map(Result::unwrap).collect();
        assert_eq!(sent.len(), PUBLISHERS * MESSAGES);
        check(&sent, subscribers.join_all().await);
    })
    .await;
}

#[tokio::test]
async fn a_payload_keeps_its_kind_and_a_publisher_its_name() {
    within(30, "one message of each kind", async {
        let server = Standalone::start().await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        let mut bob = Peer::connect(server.url(), "bob").await;
        assert_eq!(ann.subscribe("kinds").await["offset"], 0);
        let payloads = [
            json!({ "text": "größe \u{1f980} \" \\ \u{7f}" }),
            json!({ "json": { "a b": [1, 2.5, null, true], "größe": "\n" } }),
            json!({ "bytes": "AAEC/w==" }),
            json!({ "text": "" }),
        ];
        for (n, payload) in payloads.iter().enumerate() {
            let answer = bob.call(json!({ "publish": { "channel": "kinds", "payload": payload } })).await;
            assert_eq!(answer["published"]["offset"], n + 1);
            let message = ann.event("message").await;
            assert_eq!((&message["payload"], &message["publisher"]), (payload, &json!("bob")));
            assert_eq!(message["message_id"], answer["published"]["message_id"]);
        }
        let backend = backend(server.server()).await;
        backend.publish("kinds", Payload::Bytes(vec![0, 1].into()), "").await.unwrap();
        let message = ann.event("message").await;
        assert_eq!((&message["payload"], &message["publisher"]), (&json!({ "bytes": "AAE=" }), &json!(null)));
    })
    .await;
}

#[tokio::test]
async fn a_dedupe_key_publishes_once() {
    within(30, "publishes with one key", async {
        let server = Standalone::start().await;
        let mut peer = Peer::connect(server.url(), "ann").await;
        peer.subscribe("once").await;
        let publish = json!({ "publish": { "channel": "once", "payload": { "text": "a" }, "dedupe": "k" } });
        let first = peer.call(publish.clone()).await["published"].take();
        assert_eq!(peer.call(publish).await["published"], first);
        let backend = backend(server.server()).await;
        let one = backend.publish("once", Payload::Text("b".into()), "k2").await.unwrap();
        assert_eq!(backend.publish("once", Payload::Text("b".into()), "k2").await.unwrap(), one);
        assert_eq!(peer.publish("once", "last").await["offset"], 3);
        let texts = [peer.event("message").await, peer.event("message").await, peer.event("message").await];
        assert_eq!(texts.map(|message| message["payload"]["text"].clone()), ["a", "b", "last"]);
        assert!(peer.is_quiet().await);
    })
    .await;
}

#[tokio::test]
async fn unsubscribed_means_silent() {
    within(30, "subscribe and unsubscribe", async {
        let server = Standalone::start().await;
        let mut peer = Peer::connect(server.url(), "ann").await;
        peer.subscribe("a").await;
        let again = peer.call(json!({ "subscribe": { "channel": "a" } })).await;
        assert_eq!(again["error"]["code"], "already_subscribed");
        peer.publish("a", "1").await;
        assert_eq!(peer.event("message").await["offset"], 1);
        assert!(peer.call(json!({ "unsubscribe": { "channel": "a" } })).await["ok"].is_object());
        let again = peer.call(json!({ "unsubscribe": { "channel": "a" } })).await;
        assert_eq!(again["error"]["code"], "not_subscribed");
        peer.publish("a", "2").await;
        assert!(peer.is_quiet().await);
        assert_eq!(peer.subscribe("a").await["offset"], 2);
    })
    .await;
}
