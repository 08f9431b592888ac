//! Two edges, two routers and two delivery nodes on Redis and MongoDB: whatever comes in at one node reaches clients of
//! all of them.

use std::time::Duration;

use futures::{StreamExt, stream};
use sanjay_client::{ChannelEvent, Client, Subscription, protocol::Payload};
use sanjay_testkit::{
    Cluster, Peer, Publication, Publications, Role, backend, client_options, eventually, within,
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

const CHANNELS: usize = 4;
const PUBLISHERS: usize = 4;
const MESSAGES: usize = 1_000;
const SUBSCRIBERS: usize = 20;

/// What a subscriber is to get.
const EXPECTED: usize = PUBLISHERS * MESSAGES;

/// Each edge at a router of its own, so that what goes from one to the other passes through Redis.
async fn two_of_each() -> Cluster {
    let mut cluster = Cluster::builder().edges(2).routers(2).deliveries(2).redis().mongo().start().await;
    eventually("the edges are at different routers", Duration::from_secs(60), async || {
        if cluster.router_of(0) == cluster.router_of(1) {
            cluster.restart((Role::Edge, 1)).await;
            return None;
        }
        Some(())
    })
    .await;
    cluster
}

fn channel(index: usize) -> String {
    format!("many:{index}")
}

/// What the publisher's n-th message is: its channel, its number there, and its text.
fn message(publisher: usize, n: usize) -> (String, u64, String) {
    let number = (n / CHANNELS + 1) as u64;
    (channel(n % CHANNELS), number, format!("{publisher} {number}"))
}

fn published(publisher: usize, n: usize, epoch: &str, offset: u64, id: &str) -> Publication {
    let (channel, number, _) = message(publisher, n);
    let (epoch, publisher, id) = (epoch.to_owned(), publisher.to_string(), id.to_owned());
    Publication { channel, epoch, offset, publisher, number, id }
}

fn received(channel: &str, epoch: &str, offset: u64, id: &str, text: &str) -> Publication {
    let (publisher, number) = text.split_once(' ').unwrap();
    let [channel, epoch, publisher, id] = [channel, epoch, publisher, id].map(str::to_owned);
    Publication { channel, epoch, offset, publisher, number: number.parse().unwrap(), id }
}

async fn back_end(server: String, publisher: usize) -> Publications {
    let mut stream = backend(&server).await.publish_stream();
    let mut pending = Vec::with_capacity(MESSAGES);
    for n in 0..MESSAGES {
        let (channel, _, text) = message(publisher, n);
        pending.push(stream.publish(&channel, Payload::Text(text), "").await.unwrap());
    }
    let mut history = Publications::default();
    for (n, reply) in pending.into_iter().enumerate() {
        let answer = reply.wait().await.unwrap();
        history.accepted(published(publisher, n, &answer.epoch, answer.offset, &answer.message_id));
    }
    history
}

async fn sdk_publisher(url: String, publisher: usize) -> Publications {
    let mut options = client_options(&url, "publisher", 1);
    options.credit = Some(0);
    let client = Client::connect(options).await.unwrap();
    client.connected().await.unwrap();
    let publishes = stream::iter(0..MESSAGES).map(|n| {
        let (channel, _, text) = message(publisher, n);
        let client = &client;
        async move { (n, client.publish(&channel, Payload::Text(text), "").await.unwrap()) }
    });
    let answers: Vec<_> = publishes.buffered(200).collect().await;
    client.close().await;
    let mut history = Publications::default();
    for (n, answer) in answers {
        history.accepted(published(publisher, n, &answer.epoch, answer.offset, &answer.message_id));
    }
    history
}

async fn raw_publisher(url: String, publisher: usize) -> Publications {
    let mut peer = Peer::connect(&url, "raw publisher").await;
    let mut history = Publications::default();
    // In bursts that are larger than what a connection may have outstanding.
    for burst in (0..MESSAGES).collect::<Vec<_>>().chunks(50) {
        let mut started = Vec::new();
        for &n in burst {
            let (channel, _, text) = message(publisher, n);
            let publish = json!({ "publish": { "channel": channel, "payload": { "text": text } } });
            started.push((n, peer.start(publish).await));
        }
        for (n, id) in started {
            let answer = peer.answer(id).await.unwrap();
            let (epoch, offset, id) = place(&answer["published"]);
            history.accepted(published(publisher, n, &epoch, offset, &id));
        }
    }
    peer.bye().await;
    history
}

/// Epoch, offset and message id of a body.
fn place(body: &Value) -> (String, u64, String) {
    let text = |field: &str| body[field].as_str().unwrap_or_else(|| panic!("{field} of {body}")).to_owned();
    (text("epoch"), body["offset"].as_u64().unwrap(), text("message_id"))
}

async fn raw_subscriber(name: String, mut peer: Peer, mut history: Publications) -> Publications {
    for _ in 0..EXPECTED {
        let message = peer.event("message").await;
        let (epoch, offset, id) = place(&message);
        let text = message["payload"]["text"].as_str().unwrap();
        let channel = message["channel"].as_str().unwrap();
        history.received(&name, received(channel, &epoch, offset, &id, text));
    }
    // Whatever came twice would lie between the last message and the answer to a ping.
    assert!(peer.is_quiet().await, "more came than was sent");
    history
}

async fn sdk_subscriber(
    name: String,
    subscriptions: Vec<Subscription>,
    mut history: Publications,
) -> Publications {
    let mut events = stream::select_all(subscriptions);
    for _ in 0..EXPECTED {
        match events.next().await.expect("the client lasts") {
            ChannelEvent::Message(message) => {
                let Payload::Text(text) = &message.payload else { panic!("another kind: {message:?}") };
                let (offset, id) = (message.offset, &message.message_id);
                let publication = received(&message.channel, &message.epoch, offset, id, text);
                history.received(&name, publication);
            }
            other => panic!("{other:?}"),
        }
    }
    history
}

/// Starts subscribers of every channel, in turn at each edge and of each kind; they are subscribed when this returns.
async fn subscribe_all(urls: &[String]) -> JoinSet<Publications> {
    let mut running = JoinSet::new();
    for subscriber in 0..SUBSCRIBERS {
        let name = format!("subscriber {subscriber}");
        let url = &urls[subscriber / 2 % urls.len()];
        let mut history = Publications::default();
        if subscriber % 2 == 0 {
            let mut peer = Peer::connect(url, &name).await;
            for channel in (0..CHANNELS).map(channel) {
                let at = peer.subscribe(&channel).await;
                let (epoch, offset) = (at["epoch"].as_str().unwrap(), at["offset"].as_u64().unwrap());
                history.positioned(&name, &channel, epoch, offset);
            }
            running.spawn(raw_subscriber(name, peer, history));
        } else {
            let client = Client::connect(client_options(url, &name, subscriber as u64)).await.unwrap();
            let mut subscriptions = Vec::new();
            for channel in (0..CHANNELS).map(channel) {
                let mut subscription = client.subscribe(&channel).await.unwrap();
                let Some(ChannelEvent::Subscribed { epoch, offset }) = subscription.next().await else {
                    panic!("not subscribed")
                };
                history.positioned(&name, &channel, &epoch, offset);
                subscriptions.push(subscription);
            }
            running.spawn(sdk_subscriber(name, subscriptions, history));
        }
    }
    running
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_subscriber_gets_what_any_node_was_given_once_and_in_order() {
    within(150, "4 × 1,000 messages to 20 subscribers over two nodes of each role", async {
        let cluster = two_of_each().await;
        let (urls, servers) = (cluster.urls(), cluster.servers());
        let subscribers = subscribe_all(&urls).await;
        let publishers = tokio::join!(
            tokio::spawn(back_end(servers[0].clone(), 0)),
            tokio::spawn(back_end(servers[1].clone(), 1)),
            tokio::spawn(sdk_publisher(urls[0].clone(), 2)),
            tokio::spawn(raw_publisher(urls[1].clone(), 3)),
        );
        let mut history = Publications::default();
        for publisher in <[_; PUBLISHERS]>::from(publishers) {
            history.merge(publisher.unwrap());
        }
        subscribers.join_all().await.into_iter().for_each(|seen| history.merge(seen));
        let report = history.check();
        println!("{report}");
        report.assert_clean(SUBSCRIBERS * EXPECTED);
        assert_eq!(report.missed, 0, "nothing was disturbed");
    })
    .await;
}

#[tokio::test]
async fn an_inbox_is_one_inbox_at_every_node() {
    within(90, "sends and acks over two nodes of each role", async {
        let cluster = two_of_each().await;
        let (urls, servers) = (cluster.urls(), cluster.servers());
        let apis = [backend(&servers[0]).await, backend(&servers[1]).await];
        let mut peers =
            [Peer::with_inbox(&urls[0], "ann", 64).await, Peer::with_inbox(&urls[1], "ann", 64).await];
        // Both devices get each message live, whichever node took it; the numbers go on.
        for seq in 1..=20 {
            let api = &apis[seq % 2];
            let sent = api.send(&["ann"], Payload::Text(seq.to_string()), "").await.unwrap();
            assert_eq!(sent[0].result.as_ref().unwrap().seq, seq as u64);
            for peer in &mut peers {
                let message = peer.event("inbox").await;
                assert_eq!(
                    (&message["seq"], &message["payload"]["text"]),
                    (&json!(seq), &json!(seq.to_string()))
                );
            }
        }
        // Acknowledged at one edge, settled at both.
        peers[1].ack(1, 20).await;
        for url in &urls {
            let peer = Peer::with_inbox(url, "ann", 64).await;
            assert_eq!(peer.welcome["inbox"]["mark"], 20);
        }
        // A key is known to every node.
        let [one, two] = &apis;
        let first = one.send(&["ann"], Payload::Text("once".into()), "key").await.unwrap();
        let again = two.send(&["ann"], Payload::Text("once".into()), "key").await.unwrap();
        let [first, again] = [first, again].map(|mut results| results.remove(0).result.unwrap());
        assert_eq!((first.seq, first.message_id, true), (again.seq, again.message_id, again.duplicate));
    })
    .await;
}

#[tokio::test]
async fn a_dedupe_key_of_a_channel_is_known_to_every_router() {
    within(60, "publishes with one key at both nodes", async {
        let cluster = two_of_each().await;
        let (urls, servers) = (cluster.urls(), cluster.servers());
        let mut peer = Peer::connect(&urls[1], "ann").await;
        peer.subscribe("once").await;
        let mut answers = Vec::new();
        for url in &urls {
            let publish =
                json!({ "publish": { "channel": "once", "payload": { "text": "a" }, "dedupe": "k" } });
            answers.push(Peer::connect(url, "bob").await.call(publish).await["published"].take());
        }
        assert_eq!(answers[0], answers[1]);
        backend(&servers[0]).await.publish("once", Payload::Text("last".into()), "").await.unwrap();
        assert_eq!(peer.event("message").await["payload"]["text"], "a");
        assert_eq!(peer.event("message").await["payload"]["text"], "last");
    })
    .await;
}

#[tokio::test]
async fn each_process_can_be_restarted_alone() {
    within(150, "a restart of each of six processes", async {
        let mut cluster = two_of_each().await;
        let urls = cluster.urls();
        for node in cluster.nodes() {
            cluster.restart(node).await;
            let mut peers = [Peer::connect(&urls[0], "ann").await, Peer::connect(&urls[1], "bob").await];
            for peer in &mut peers {
                eventually("a subscription is taken", Duration::from_secs(20), async || {
                    let answer = peer.call(json!({ "subscribe": { "channel": "news" } })).await;
                    answer["subscribed"].is_object().then_some(())
                })
                .await;
            }
            let api = backend(&cluster.servers().join(",")).await;
            api.publish("news", Payload::Text(node.to_string()), &format!("key {node}")).await.unwrap();
            for peer in &mut peers {
                assert_eq!(peer.event("message").await["payload"]["text"], node.to_string());
            }
        }
        assert_eq!(cluster.nodes().len(), Role::ALL.len() * 2);
    })
    .await;
}
