//! Namespaces: each denial, over the real sockets, and settings that change while everything runs.

use std::{fs, time::Duration};

use sanjay_client::protocol::Payload;
use sanjay_testkit::{Peer, Settings, Standalone, Token, Wire, backend, eventually, within};
use serde_json::json;

fn settings() -> Settings {
    Settings::default()
        .set("namespaces.feed.publish", "\"backends\"")
        .set("namespaces.feed.max_payload_bytes", 8)
        .set("namespaces.club.private", true)
        .set("namespaces.pair.max_subscribers", 2)
        .set("edge.shards", 2)
}

/// The error's code and text.
fn refused(answer: &serde_json::Value) -> (String, String) {
    let error = &answer["error"];
    let text = |field: &str| error[field].as_str().unwrap_or_else(|| panic!("no error: {answer}")).to_owned();
    (text("code"), text("message"))
}

#[tokio::test]
async fn what_a_namespace_does_not_allow_is_refused_with_its_reason() {
    within(30, "namespaces", async {
        let server = Standalone::start_with(settings()).await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        let publish =
            |channel: &str, text: &str| json!({"publish": {"channel": channel, "payload": {"text": text}}});

        let (code, text) = refused(&ann.call(publish("feed:1", "x")).await);
        assert_eq!(code, "forbidden");
        assert!(text.contains("only back ends publish to channels of the namespace \"feed\""), "{text}");
        ann.subscribe("feed:1").await;
        let backend = backend(server.server()).await;
        backend.publish("feed:1", Payload::Text("8 bytes.".into()), "").await.unwrap();
        assert_eq!(ann.event("message").await["payload"], json!({"text": "8 bytes."}));
        let error =
            backend.publish("feed:1", Payload::Text("9 bytes..".into()), "").await.unwrap_err().to_string();
        assert!(
            error.contains("payload has 9 bytes; at most 8 are allowed in the namespace \"feed\""),
            "{error}"
        );

        let (code, text) = refused(&ann.call(json!({"subscribe": {"channel": "club:1"}})).await);
        assert_eq!(code, "forbidden");
        assert!(text.contains("channels of the namespace \"club\" are private"), "{text}");
        // What is not configured, and what has no namespace, is as ever.
        ann.subscribe("clubs:1").await;
        ann.subscribe("club").await;
        ann.publish("club", "x").await;
    })
    .await;
}

#[tokio::test]
async fn a_channel_takes_so_many_subscribers_on_an_edge() {
    within(30, "subscribers", async {
        let server = Standalone::start_with(settings()).await;
        let mut peers = Vec::new();
        for user in ["ann", "bob", "eve", "joe"] {
            peers.push(Peer::connect(server.url(), user).await);
        }
        let subscribe = |channel: &str| json!({"subscribe": {"channel": channel}});
        let mut subscribed = Vec::new();
        for peer in &mut peers {
            let answer = peer.call(subscribe("pair:1")).await;
            if answer["error"].is_object() {
                let (code, text) = refused(&answer);
                assert_eq!(code, "limit_exceeded");
                assert!(text.contains("\"pair:1\" has 2 subscribers on this edge"), "{text}");
            }
            subscribed.push(answer["subscribed"].is_object());
        }
        assert_eq!(subscribed, [true, true, false, false], "across both shards");
        peers[2].subscribe("pair:2").await;
        drop(peers.remove(0));
        eventually("a place is free", Duration::from_secs(10), async || {
            peers[2].call(subscribe("pair:1")).await["subscribed"].is_object().then_some(())
        })
        .await;
        assert_eq!(refused(&peers[1].call(subscribe("pair:1")).await).0, "limit_exceeded");
        assert_eq!(refused(&peers[2].call(subscribe("pair:1")).await).0, "already_subscribed");
    })
    .await;
}

/// What SIGHUP is on every system that this runs on.
const SIGHUP: i32 = 1;

/// How often the configuration was read again with this outcome.
async fn reloads(server: &Standalone, outcome: &str) -> u32 {
    let page = Wire::get(&format!("{}/metrics", server.admin())).await.body;
    let name = format!("sanjay_config_reloads_total{{outcome=\"{outcome}\"}} ");
    let value = page.lines().find_map(|line| line.strip_prefix(&name)?.parse().ok());
    value.unwrap_or_else(|| panic!("there is no {name}"))
}

/// Puts other settings into the server's file, has it read again, and waits for the outcome.
async fn reload(server: &mut Standalone, settings: &Settings, expected: &str) {
    let before = reloads(server, expected).await;
    fs::write(server.data_dir().with_file_name("config.toml"), settings.to_toml()).unwrap();
    server.process.signal(SIGHUP);
    eventually("the configuration is read again", Duration::from_secs(10), async || {
        (reloads(server, expected).await > before).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_hangup_reads_the_namespaces_again() {
    within(30, "a reload", async {
        let mut server = Standalone::start_with(Settings::default()).await;
        let hello = json!({ "token": Token::of("ann").sign(), "credit": 0 });
        let mut ann = Peer::with_hello(server.url(), hello).await;
        ann.publish("feed:1", "x").await;
        reload(&mut server, &settings(), "applied").await;
        let publish = json!({"publish": {"channel": "feed:1", "payload": {"text": "x"}}});
        assert_eq!(refused(&ann.call(publish.clone()).await).0, "forbidden", "connections of before, too");
        reload(&mut server, &settings(), "unchanged").await;
        let wrong = settings().set("namespaces.feed.history_size", 10_001);
        reload(&mut server, &wrong, "refused").await;
        assert!(
            server
                .process
                .stderr()
                .contains("`namespaces.feed.history_size` is 10001; set it from 0 to 10000")
        );
        assert_eq!(refused(&ann.call(publish).await).0, "forbidden", "what held before stays");
        reload(&mut server, &Settings::default(), "applied").await;
        ann.publish("feed:1", "x").await;
    })
    .await;
}
