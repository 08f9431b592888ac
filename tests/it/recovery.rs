//! Recovery: a client that comes back gets all that it missed, or is told that it cannot; and the reading of histories.

use std::{collections::BTreeMap, time::Duration};

use futures::future::join_all;
use sanjay_client::{
    Backend, ChannelEvent, Client,
    protocol::{Payload, token::Action},
};
use sanjay_testkit::{
    Cluster, Peer, Role, Settings, Standalone, Token, Wire, backend, client_options, eventually, within,
};
use serde_json::{Value, json};

/// How many messages the channels of these tests keep.
const KEPT: u64 = 8;

fn settings() -> Settings {
    Settings::default().set("namespaces.log.history_size", KEPT).set("edge.shards", 2)
}

fn text(text: impl ToString) -> Payload {
    Payload::Text(text.to_string())
}

async fn publish(api: &Backend, channel: &str, texts: impl IntoIterator<Item = u64>) {
    for number in texts {
        api.publish(channel, text(number), "").await.unwrap();
    }
}

/// Subscribes from a position; gives the answer's body.
async fn recover(peer: &mut Peer, channel: &str, epoch: &Value, offset: u64) -> Value {
    let command = json!({"subscribe": {"channel": channel, "recover": {"epoch": epoch, "offset": offset}}});
    let mut answer = peer.call(command).await;
    assert!(answer["subscribed"].is_object(), "not subscribed: {answer}");
    answer["subscribed"].take()
}

fn offsets(subscribed: &Value) -> Vec<u64> {
    let messages = subscribed["messages"].as_array().cloned().unwrap_or_default();
    messages.iter().map(|message| message["offset"].as_u64().unwrap()).collect()
}

#[tokio::test]
async fn a_client_goes_on_where_it_stood() {
    within(30, "recovery", async {
        let server = Standalone::start_with(settings()).await;
        let api = backend(server.server()).await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        let first = ann.subscribe("log:1").await;
        assert!(first.get("recovered").is_none(), "nobody asked: {first}");
        let epoch = first["epoch"].clone();
        publish(&api, "log:1", 1..=3).await;
        let third = ann.publish("log:1", "from ann").await;
        assert_eq!(third["offset"], 4);

        // Another stays with the channel, so that the edge knows where it stands; a third finds it unknown.
        for fresh in [false, true] {
            if fresh {
                drop(ann);
                ann = Peer::connect(server.url(), "ann").await;
            }
            let mut bob = Peer::connect(server.url(), "bob").await;
            let subscribed = recover(&mut bob, "log:1", &epoch, 1).await;
            assert_eq!((&subscribed["recovered"], &subscribed["offset"]), (&json!(true), &json!(4)));
            assert_eq!(offsets(&subscribed), [2, 3, 4]);
            let last = &subscribed["messages"][2];
            assert_eq!((&last["publisher"], &last["payload"]), (&json!("ann"), &json!({"text": "from ann"})));
            assert_eq!((&last["channel"], &last["epoch"]), (&json!("log:1"), &epoch));
            let mut eve = Peer::connect(server.url(), "eve").await;
            let subscribed = recover(&mut eve, "log:1", &epoch, 4).await;
            assert_eq!((subscribed["recovered"].clone(), offsets(&subscribed)), (json!(true), vec![]));
            let mut joe = Peer::connect(server.url(), "joe").await;
            assert_eq!(
                offsets(&recover(&mut joe, "log:1", &epoch, 0).await),
                [1, 2, 3, 4],
                "who never got anything"
            );
            let mut kim = Peer::connect(server.url(), "kim").await;
            for (epoch, offset) in [(&json!("0123456789abcdef"), 4), (&epoch, 5)] {
                let subscribed = recover(&mut kim, "log:1", epoch, offset).await;
                assert_eq!((&subscribed["recovered"], &subscribed["offset"]), (&json!(false), &json!(4)));
                assert!(subscribed.get("messages").is_none(), "{subscribed}");
                kim.call(json!({"unsubscribe": {"channel": "log:1"}})).await;
            }
        }
        // What comes after the answer is what follows it.
        let mut bob = Peer::connect(server.url(), "bob").await;
        recover(&mut bob, "log:1", &epoch, 2).await;
        publish(&api, "log:1", [5]).await;
        assert_eq!(bob.event("message").await["offset"], 5);
    })
    .await;
}

#[tokio::test]
async fn what_is_kept_no_more_is_not_recovered_in_part() {
    within(30, "a trimmed history", async {
        let server = Standalone::start_with(
            settings().set("namespaces.brief.history_size", 8).set("namespaces.brief.history_ttl_s", 1),
        )
        .await;
        let api = backend(server.server()).await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        let epoch = ann.subscribe("log:1").await["epoch"].clone();
        publish(&api, "log:1", 1..=12).await;
        let mut bob = Peer::connect(server.url(), "bob").await;
        for (offset, expected) in [(3, None), (4, Some(5..=12)), (0, None)] {
            let subscribed = recover(&mut bob, "log:1", &epoch, offset).await;
            assert_eq!(subscribed["recovered"], expected.is_some(), "{subscribed}");
            assert_eq!(offsets(&subscribed), expected.map(Iterator::collect::<Vec<_>>).unwrap_or_default());
            bob.call(json!({"unsubscribe": {"channel": "log:1"}})).await;
        }
        // A channel without a history goes on only where nothing was missed.
        let epoch = ann.subscribe("news").await["epoch"].clone();
        assert_eq!(recover(&mut bob, "news", &epoch, 0).await["recovered"], true);
        publish(&api, "news", [1]).await;
        let mut eve = Peer::connect(server.url(), "eve").await;
        assert_eq!(recover(&mut eve, "news", &epoch, 0).await["recovered"], false);
        // What is too old is gone, too.
        let epoch = ann.subscribe("brief:1").await["epoch"].clone();
        publish(&api, "brief:1", [1]).await;
        eventually("the message is too old", Duration::from_secs(10), async || {
            let subscribed = recover(&mut eve, "brief:1", &epoch, 0).await;
            eve.call(json!({"unsubscribe": {"channel": "brief:1"}})).await;
            (subscribed["recovered"] == false).then_some(())
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn a_history_is_read_in_pages_and_refused_with_a_reason() {
    within(30, "histories", async {
        let server = Standalone::start_with(settings()).await;
        let api = backend(server.server()).await;
        let caps: [(&str, &[Action]); 1] = [("log:*", &[Action::Subscribe, Action::Publish])];
        let reader = Token::of("reader").caps(&caps).sign();
        let mut reader = Peer::with_hello(server.url(), json!({"token": reader, "credit": 0})).await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        publish(&api, "log:1", 1..=12).await;

        let history = |fields: Value| json!({ "history": fields });
        let newest = ann.call(history(json!({"channel": "log:1", "limit": 3}))).await["history"].take();
        assert_eq!(
            (offsets(&newest), &newest["offset"], &newest["more"]),
            (vec![10, 11, 12], &json!(12), &json!(false))
        );
        let epoch = newest["epoch"].clone();
        let page = |offset: u64, limit: u64| {
            history(json!({"channel": "log:1", "since": {"epoch": epoch, "offset": offset}, "limit": limit}))
        };
        let first = ann.call(page(4, 5)).await["history"].take();
        assert_eq!((offsets(&first), &first["more"]), ((5..=9).collect(), &json!(true)));
        let rest = ann.call(page(9, 5)).await["history"].take();
        assert_eq!((offsets(&rest), &rest["more"]), ((10..=12).collect(), &json!(false)));

        let unkept = "channels of the namespace \"default\" keep no history";
        for (command, code, why) in [
            (page(3, 5), "not_found", "does not reach back to this position"),
            (history(json!({"channel": "news"})), "bad_request", unkept),
            (history(json!({"channel": "log:1", "limit": 0})), "bad_request", "1 to 1000 are allowed"),
        ] {
            let answer = ann.call(command).await;
            assert_eq!(answer["error"]["code"], code, "{answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains(why), "{answer}");
        }
        let error = reader.call(page(4, 5)).await["error"].take();
        assert_eq!(error["code"], "forbidden");
        let why = error["message"].as_str().unwrap();
        assert!(why.contains("does not allow to read the history of \"log:1\""), "{why}");

        // The same for back ends, and on the command line.
        let page = api.history("log:1", None, 2).await.unwrap();
        assert_eq!(page.messages.iter().map(|message| message.offset).collect::<Vec<_>>(), [11, 12]);
        assert!(api.history("news", None, 2).await.unwrap_err().to_string().contains("keep no history"));
        let since = format!("{}:4", epoch.as_str().unwrap());
        let printed =
            server.cli(["history", "log:1", "--since", &since, "--limit", "5", "--json"]).run().await;
        let lines: Vec<Value> =
            printed.stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let printed_offsets: Vec<_> =
            lines.iter().map(|line| line["message"]["offset"].as_u64().unwrap()).collect();
        assert_eq!(printed_offsets, [5, 6, 7, 8, 9], "{printed:?}");
        assert!(
            printed.stderr.contains(&format!("go on with --since {}:9", epoch.as_str().unwrap())),
            "{printed:?}"
        );
        let table = server.cli(["history", "log:1", "--limit", "1"]).run().await;
        assert!(table.stdout.contains("      12  ") && table.stdout.ends_with("  -  12\n"), "{table:?}");
        let gone = format!("{}:1", epoch.as_str().unwrap());
        let refused = server.cli(["history", "log:1", "--since", &gone]).run().await;
        assert!(refused.stderr.contains("does not reach back"), "{refused:?}");
    })
    .await;
}

#[tokio::test]
async fn a_position_that_many_share_is_read_once() {
    within(60, "a mass reconnect", async {
        const CLIENTS: usize = 40;
        let server = Standalone::start_with(settings()).await;
        let api = backend(server.server()).await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        let epoch = ann.subscribe("log:1").await["epoch"].clone();
        publish(&api, "log:1", 1..=6).await;
        let mut peers = Vec::new();
        for _ in 0..CLIENTS {
            peers.push(Peer::connect(server.url(), "bob").await);
        }
        // All at once: what one shard or the other is reading already serves those who come meanwhile.
        let recovered = join_all(peers.iter_mut().map(|peer| recover(peer, "log:1", &epoch, 2))).await;
        assert!(recovered.iter().all(|subscribed| offsets(subscribed) == [3, 4, 5, 6]));
        let page = Wire::get(&format!("{}/metrics", server.admin())).await.body;
        let metric = |name: &str| -> u64 {
            let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name}"))
        };
        assert_eq!(metric("sanjay_edge_recoveries_total{outcome=\"recovered\"}"), CLIENTS as u64);
        let reads = metric("sanjay_edge_history_reads_total");
        assert!(reads < CLIENTS as u64, "{reads} reads for {CLIENTS} clients");
    })
    .await;
}

#[tokio::test]
async fn nothing_is_missed_when_an_edge_is_killed() {
    within(90, "a killed edge", async {
        let mut cluster = Cluster::builder().settings(settings()).edges(2).routers(2).redis().start().await;
        let urls = cluster.urls();
        let api = backend(&cluster.server()).await;
        let options = sanjay_client::ClientOptions { credit: Some(0), ..client_options(&urls[0], "eve", 1) };
        let mut ann = Peer::connect(&urls[0], "ann").await;
        let epoch = ann.subscribe("log:1").await["epoch"].clone();
        publish(&api, "log:1", [1]).await;
        assert_eq!(ann.event("message").await["offset"], 1);
        let client = Client::connect(options).await.unwrap();
        let position = serde_json::from_value(json!({"epoch": epoch, "offset": 0})).unwrap();
        let mut subscription = client.subscribe_from("log:1", position).await.unwrap();
        let mut seen = Vec::new();
        cluster.kill((Role::Edge, 0));
        publish(&api, "log:1", 2..=4).await;
        let mut ann = Peer::connect(&urls[1], "ann").await;
        let subscribed = recover(&mut ann, "log:1", &epoch, 1).await;
        assert_eq!((subscribed["recovered"].clone(), offsets(&subscribed)), (json!(true), vec![2, 3, 4]));
        publish(&api, "log:1", [5]).await;
        assert_eq!(ann.event("message").await["offset"], 5);
        // The client crate does so by itself, when its edge is back.
        cluster.restart((Role::Edge, 0)).await;
        while seen.len() < 5 {
            match subscription.next().await.expect("the subscription lasts") {
                ChannelEvent::Message(message) => seen.push(message.offset),
                ChannelEvent::Subscribed { .. } => {}
                other => panic!("{other:?} after {seen:?}"),
            }
        }
        assert_eq!(seen, [1, 2, 3, 4, 5]);
        client.close().await;
    })
    .await;
}

#[tokio::test]
async fn a_router_that_forgot_says_so() {
    within(90, "a router without memory", async {
        let mut cluster = Cluster::builder().settings(settings()).start().await;
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::connect(&cluster.url(), "ann").await;
        let epoch = ann.subscribe("log:1").await["epoch"].clone();
        publish(&api, "log:1", 1..=2).await;
        assert_eq!(ann.event("message").await["offset"], 1);
        let count = cluster.attachments(0).len();
        cluster.restart((Role::Router, 0)).await;
        eventually("the edge is attached", Duration::from_secs(20), async || {
            (cluster.attachments(0).len() > count).then_some(())
        })
        .await;
        let mut bob = Peer::connect(&cluster.url(), "bob").await;
        let subscribed = eventually("the channel is back", Duration::from_secs(20), async || {
            let command =
                json!({"subscribe": {"channel": "log:1", "recover": {"epoch": epoch, "offset": 1}}});
            bob.call(command).await.get("subscribed").cloned()
        })
        .await;
        assert_eq!(subscribed["recovered"], false);
        assert_ne!(subscribed["epoch"], epoch);
        assert!(subscribed.get("messages").is_none(), "{subscribed}");
    })
    .await;
}

/// A client of a random run, as its protocol says it should be.
struct Reader {
    peer: Option<Peer>,
    epoch: Value,
    offset: u64,
    /// What it was given, and what it was told that it missed.
    got: BTreeMap<String, Vec<u64>>,
    recovered: usize,
    lost: usize,
}

impl Reader {
    /// Comes back, and checks what it is told.
    async fn come_back(&mut self, url: &str, expected: Option<bool>) {
        let mut peer = Peer::connect(url, "ann").await;
        let subscribed = recover(&mut peer, "log:1", &self.epoch, self.offset).await;
        let (recovered, offset) = (subscribed["recovered"] == true, subscribed["offset"].as_u64().unwrap());
        if let Some(expected) = expected {
            assert_eq!(recovered, expected, "from {}:{}: {subscribed}", self.epoch, self.offset);
        }
        if recovered {
            assert_eq!(subscribed["epoch"], self.epoch);
            assert_eq!(offsets(&subscribed), (self.offset + 1..=offset).collect::<Vec<_>>(), "all of it");
            self.recovered += usize::from(offset > self.offset);
        } else {
            assert_eq!(offsets(&subscribed), [0; 0], "nothing of it");
            self.lost += 1;
        }
        let got = self.got.entry(subscribed["epoch"].to_string()).or_default();
        got.extend(offsets(&subscribed));
        (self.epoch, self.offset, self.peer) = (subscribed["epoch"].clone(), offset, Some(peer));
    }

    /// Reads up to an offset; each message must be the next one.
    async fn read_to(&mut self, epoch: &str, offset: u64) {
        let peer = self.peer.as_mut().expect("it is there");
        while self.epoch != epoch || self.offset < offset {
            let message = peer.next().await.expect("the socket stays");
            if message["gap"].is_object() {
                assert_eq!(message["gap"]["from"], 0, "only a new epoch is no loss: {message}");
                self.epoch = message["gap"]["epoch"].clone();
                self.offset = message["gap"]["to"].as_u64().unwrap();
                continue;
            }
            let message = &message["message"];
            assert_eq!((&message["epoch"], message["offset"].as_u64()), (&self.epoch, Some(self.offset + 1)));
            self.offset += 1;
            self.got.entry(self.epoch.to_string()).or_default().push(self.offset);
        }
    }
}

/// Publishes, drops, reconnects, trims and new epochs at random: never a partial recovery, never a silent hole, never a
/// message twice.
async fn random_run(url: &str, api: &Backend, seed: u64, steps: usize, mut begin_anew: impl AsyncFnMut()) {
    let mut state = seed;
    let mut random = move |most: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % most
    };
    let mut peer = Peer::connect(url, "ann").await;
    let first = peer.subscribe("log:1").await;
    let (epoch, offset) = (first["epoch"].clone(), first["offset"].as_u64().unwrap());
    let mut reader = Reader { peer: Some(peer), epoch, offset, got: BTreeMap::new(), recovered: 0, lost: 0 };
    let (mut top_epoch, mut top) = (reader.epoch.as_str().unwrap().to_owned(), offset);
    for _ in 0..steps {
        match random(10) {
            0..=4 => {
                for _ in 0..=random(4) {
                    let published = api.publish("log:1", text("x"), "").await.unwrap();
                    (top_epoch, top) = (published.epoch, published.offset);
                }
            }
            5 | 6 => reader.peer = None,
            7 => {
                begin_anew().await;
                let published = api.publish("log:1", text("x"), "").await.unwrap();
                (top_epoch, top) = (published.epoch, published.offset);
            }
            // While nobody publishes, the model knows what must come of it.
            8 if reader.peer.is_none() => {
                let same = reader.epoch == top_epoch;
                reader.come_back(url, Some(same && top - reader.offset <= KEPT)).await;
            }
            // While somebody does, only that it is all or nothing.
            9 if reader.peer.is_none() => {
                let publishing = async {
                    let mut last = None;
                    for _ in 0..5 {
                        last = Some(api.publish("log:1", text("x"), "").await.unwrap());
                    }
                    last.unwrap()
                };
                let (_, last) = tokio::join!(reader.come_back(url, None), publishing);
                (top_epoch, top) = (last.epoch, last.offset);
            }
            _ => {}
        }
        if reader.peer.is_some() {
            reader.read_to(&top_epoch, top).await;
        }
    }
    assert!(reader.recovered > 3 && reader.lost > 3, "{} recovered, {} lost", reader.recovered, reader.lost);
    for offsets in reader.got.values() {
        assert!(offsets.is_sorted_by(|a, b| a < b), "twice or out of order: {offsets:?}");
    }
}

#[tokio::test]
async fn a_random_run_in_memory_is_exact() {
    within(120, "a random run in memory", async {
        let server = Standalone::start_with(settings()).await;
        let api = backend(server.server()).await;
        // Without another process there are no new epochs; what is trimmed is lost.
        random_run(server.url(), &api, 7, 400, async || {}).await;
    })
    .await;
}

#[tokio::test]
async fn a_random_run_on_redis_is_exact() {
    within(120, "a random run on Redis", async {
        let mut cluster = Cluster::builder().settings(settings()).edges(1).routers(2).redis().start().await;
        let (url, server) = (cluster.url(), cluster.server());
        let api = backend(&server).await;
        let redis = cluster.redis();
        // As if another process of Redis had touched the channel last.
        let anew = async || {
            let state = "sanjay:{p".to_owned() + &partition("log:1").to_string() + "}:c:log:1";
            if redis.command(&["EXISTS", &state]).await.integer() == 1 {
                redis.command(&["HSET", &state, "run_id", "another"]).await;
            }
        };
        random_run(&url, &api, 11, 300, anew).await;
    })
    .await;
}

/// The partition of a channel, as the routers compute it.
fn partition(channel: &str) -> u16 {
    let crc = channel.bytes().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(byte) << 8), |crc, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
        })
    });
    crc % 128
}
