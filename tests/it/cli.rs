//! The command line: what each subcommand does when all is well, and what it teaches when it is not.

use std::{fs, path::Path, time::Duration};

use sanjay_client::{DeliveryState, protocol::Payload};
use sanjay_testkit::{
    Finished, Peer, Process, Sanjay, Settings, Standalone, Wire, backend, eventually, within,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

async fn sanjay(arguments: &[&str]) -> Finished {
    Sanjay::new(arguments).run().await
}

fn lines(output: &str) -> Vec<Value> {
    output.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// Waits until a running command has said this on standard error.
async fn says(process: &mut Process, text: &str) {
    let what = format!("`sanjay {}` says {text:?}", process.name());
    eventually(&what, PATIENCE, async || {
        assert!(process.ended().is_none() || process.stderr().contains(text), "{}", process.stderr());
        process.stderr().contains(text).then_some(())
    })
    .await;
}

/// Waits for the end of a command that is to succeed; gives what it printed.
async fn ends(process: &mut Process) -> Vec<Value> {
    let status = process.wait(PATIENCE).await;
    assert_eq!(status.code(), Some(0), "{}", process.stderr());
    lines(&process.stdout())
}

/// A port that is in use as long as the listener lives.
fn taken() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

#[tokio::test]
async fn sub_prints_what_pub_publishes() {
    within(60, "pub and sub", async {
        let server = Standalone::start().await;
        let mut sub = server.cli(["sub", "news", "sport", "--count", "3"]).spawn();
        says(&mut sub, "subscribed to news").await;
        says(&mut sub, "subscribed to sport").await;
        let published = server.cli(["pub", "news", "hi"]).run().await.succeeded();
        let published = lines(&published).remove(0);
        assert_eq!(published["offset"], 1);
        server.cli(["pub", "sport", "--json", r#"{"goals": [1, 0]}"#]).run().await.succeeded().clear();
        server.cli(["pub", "news", "--base64", "AAE="]).run().await.succeeded().clear();
        let printed = ends(&mut sub).await;
        assert_eq!(printed.len(), 3, "{printed:?}");
        let message = |value: &Value| value.get("message").unwrap_or(value).clone();
        let first = message(&printed[0]);
        assert_eq!((&first["channel"], &first["payload"]), (&json!("news"), &json!({ "text": "hi" })));
        assert_eq!(first["message_id"], published["message_id"]);
        assert_eq!(message(&printed[1])["payload"], json!({ "json": { "goals": [1, 0] } }));
        assert_eq!(message(&printed[2])["payload"], json!({ "bytes": "AAE=" }));

        let again = ["pub", "news", "once", "--dedupe-key", "k"];
        let (one, two) =
            (server.cli(again).run().await.succeeded(), server.cli(again).run().await.succeeded());
        assert_eq!(one, two);
    })
    .await;
}

#[tokio::test]
async fn sub_reads_an_inbox_and_acknowledges() {
    within(60, "send and sub --inbox", async {
        let server = Standalone::start_with(Settings::default().without("edge.token_secret")).await;
        let data = server.data_dir().display().to_string();
        let mut ids = Vec::new();
        for text in ["one", "two"] {
            let sent = lines(&server.cli(["send", "bob", text]).run().await.succeeded()).remove(0);
            assert!(sent["seq"].is_u64(), "{sent}");
            ids.push(sent["message_id"].as_str().unwrap().to_owned());
        }
        let inbox = ["sub", "--inbox", "--user", "bob", "--count", "1", "--data-dir", &data];
        for (seq, text) in [(1, "one"), (2, "two")] {
            // Everything from the data directory: a second terminal needs no variables.
            let printed = lines(&sanjay(&inbox).await.succeeded());
            let message = printed[0].get("inbox").unwrap_or(&printed[0]).clone();
            assert_eq!(
                (&message["seq"], &message["payload"]["text"]),
                (&json!(seq), &json!(text)),
                "{printed:?}"
            );
        }
        let backend = backend(server.server()).await;
        for id in ids {
            let receipt = backend.get_delivery("bob", &id).await.unwrap().unwrap();
            assert_eq!(receipt.state(), DeliveryState::Acked);
        }
    })
    .await;
}

#[tokio::test]
async fn sub_ends_on_a_signal_with_its_acks_made() {
    within(60, "an interrupted sub", async {
        let server = Standalone::start().await;
        backend(server.server()).await.send(&["dev"], Payload::Text("t".into()), "").await.unwrap();
        let mut sub = server.cli(["sub", "--inbox"]).spawn();
        eventually("the message is printed", PATIENCE, async || (!sub.stdout().is_empty()).then_some(()))
            .await;
        assert_eq!(sub.terminate(PATIENCE).await.code(), Some(0), "{}", sub.stderr());
        let dev = Peer::with_inbox(server.url(), "dev", 64).await;
        assert_eq!(dev.welcome["inbox"]["mark"], 1);
    })
    .await;
}

#[tokio::test]
async fn token_makes_a_token_that_the_edge_takes() {
    within(60, "tokens", async {
        let settings = Settings::default().without("edge.token_secret");
        let server = Standalone::start_with(settings).await;
        let data = server.data_dir().display().to_string();
        let made = sanjay(&["token", "bob", "--data-dir", &data, "--ttl", "15m"]).await.succeeded();
        let mut peer = Peer::with_hello(server.url(), json!({ "token": made.trim() })).await;
        assert_eq!(peer.welcome["user"], "bob");
        peer.subscribe("anything").await;
        let caps = r#"{"news":["subscribe"]}"#;
        let made = sanjay(&["token", "bob", "--data-dir", &data, "--caps", caps]).await.succeeded();
        let mut peer = Peer::with_hello(server.url(), json!({ "token": made.trim() })).await;
        peer.subscribe("news").await;
        let answer = peer.call(json!({ "subscribe": { "channel": "sport" } })).await;
        assert_eq!(answer["error"]["code"], "forbidden");

        sanjay(&["token", "bob"]).await.failed_with(&["sanjay standalone", "--token-secret"]);
        sanjay(&["token", "", "--token-secret", "s"]).await.failed_with(&["empty"]);
        sanjay(&["token", "bob", "--token-secret", "s", "--ttl", "soon"])
            .await
            .failed_with(&["--ttl", "24h"]);
        sanjay(&["token", "bob", "--token-secret", "s", "--caps", "[]"])
            .await
            .failed_with(&["--caps", "chat:*"]);
    })
    .await;
}

#[tokio::test]
async fn trace_shows_the_way_of_a_message() {
    within(60, "trace", async {
        let server = Standalone::start().await;
        let sent = lines(&server.cli(["send", "bob", "t"]).run().await.succeeded()).remove(0);
        let id = sent["message_id"].as_str().unwrap();
        let table = server.cli(["trace", id]).run().await.succeeded();
        assert!(table.contains("delivery") && table.contains("committed"), "{table}");
        server.cli(["trace", "x"]).run().await.failed_with(&["no message id", "UUID"]);
        let unknown = server.cli(["trace", "01890a5d-ac96-774b-bcce-b302099a8057"]).run().await;
        unknown.failed_with(&["01890a5d-ac96-774b-bcce-b302099a8057"]);
    })
    .await;
}

#[tokio::test]
async fn client_commands_say_how_to_reach_a_server() {
    within(60, "client commands without a server", async {
        for command in [&["pub", "a", "b"][..], &["send", "a", "b"], &["sub", "a"], &["health"]] {
            sanjay(command).await.failed_with(&["sanjay standalone", ".sanjay/ready.json"]);
        }
        let (closed, address) = taken();
        drop(closed);
        let http = format!("http://{address}");
        for command in [&["pub", "a", "b"][..], &["send", "a", "b"]] {
            let command = [command, &["--server", &http, "--api-key", "k"]].concat();
            sanjay(&command).await.failed_with(&[
                "no server answers",
                &address,
                "sanjay standalone",
                "--server",
            ]);
        }
        let sub = ["sub", "a", "--url", &format!("ws://{address}/v1/ws"), "--token", "t"];
        sanjay(&sub).await.failed_with(&["no server answers", &address, "sanjay standalone", "--url"]);
        let health = ["health", "--admin", &http];
        sanjay(&health).await.failed_with(&["no server answers", &address, "--admin"]);
        for (url, part) in [("http://x", "ws:"), ("wss://127.0.0.1/v1/ws", "TLS"), ("x", "ws://")] {
            sanjay(&["sub", "a", "--url", url, "--token", "t"]).await.failed_with(&[part]);
        }
    })
    .await;
}

#[tokio::test]
async fn a_wrong_token_or_key_names_the_fix() {
    within(60, "wrong tokens and keys", async {
        let server = Standalone::start().await;
        let sub = ["sub", "a", "--url", server.url(), "--token"];
        sanjay(&[&sub[..], &["nonsense"]].concat()).await.failed_with(&[
            "token",
            "sanjay token USER",
            "--token",
        ]);
        let old = sanjay_testkit::Token::of("a").expires_in_s(-1).sign();
        sanjay(&[&sub[..], &[&old]].concat()).await.failed_with(&["expired", "sanjay token USER"]);
        let none = sanjay_testkit::Token::of("a").caps(&[]).sign();
        sanjay(&[&sub[..], &[&none]].concat()).await.failed_with(&["does not allow", "caps"]);
        for command in [&["pub", "a", "b"][..], &["send", "a", "b"]] {
            let command = [command, &["--server", server.server(), "--api-key", "wrong"]].concat();
            sanjay(&command).await.failed_with(&["API key", "--api-key", "SANJAY_API_KEY"]);
        }
        let path = server.url().replace("/v1/ws", "/");
        sanjay(&["sub", "a", "--url", &path, "--token", server.token()])
            .await
            .failed_with(&["404", "/v1/ws"]);
    })
    .await;
}

#[tokio::test]
async fn wrong_usage_is_explained() {
    within(60, "wrong usage", async {
        for (command, parts) in [
            (&["--nonsense"][..], &["--nonsense"][..]),
            (&["standalone", "--nonsense"], &["--nonsense"]),
            (&["shout"], &["shout"]),
            (&["pub", "a"], &["PAYLOAD"]),
            (&["sub"], &["CHANNEL"]),
            (&["sub", "a", "--count", "0"], &["--count"]),
            (&["edge", "--data-dir", "x"], &["--data-dir"]),
            (&["router", "--data-dir", "x"], &["--data-dir"]),
            (&["delivery", "--data-dir", "x"], &["--data-dir"]),
        ] {
            let finished = sanjay(command).await;
            assert_eq!(finished.code, Some(2), "{command:?}: {finished:#?}");
            finished.failed_with(parts);
        }
        sanjay(&["pub", "", "b", "--server", "http://x", "--api-key", "k"])
            .await
            .failed_with(&["channel is empty"]);
        sanjay(&["pub", "a", "{", "--json"]).await.failed_with(&["JSON"]);
        sanjay(&["pub", "a", "?", "--base64"]).await.failed_with(&["base64"]);
        sanjay(&["send", "a", &"x".repeat(65_537)]).await.failed_with(&["65536"]);
        for command in ["standalone", "edge", "router", "delivery", "sub", "check-config"] {
            let help = sanjay(&[command, "--help"]).await.succeeded();
            assert!(help.contains("Usage: sanjay"), "{help}");
        }
    })
    .await;
}

#[tokio::test]
async fn secrets_may_be_files() {
    within(60, "secrets from files", async {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| {
            let path = directory.path().join(name);
            fs::write(&path, content).unwrap();
            path.display().to_string()
        };
        let settings = Settings::default().without("delivery.api_keys").without("edge.token_secret");
        let config = write("config.toml", &settings.to_toml());
        let secret = write("token_secret", &format!("{}\n", "s".repeat(40)));
        let key = write("api_key", "a-key\n");
        // printf %s a-key | sha256sum
        let digest = "2a8a1240f50636655520ac8ed22aa29473b8517b4abfdbc3bc03bcad73fc8849";
        let keys = write("api_keys", &format!("[{{ name = \"shop\", sha256 = \"{digest}\" }}]\n"));
        let free = "127.0.0.1:0";
        let mut command = vec!["standalone", "--config", &config, "--ready-file", "ready.json"];
        command.extend(["--listen", free, "--delivery-listen", free, "--router-listen", free]);
        let mut server = Sanjay::new(command)
            .directory(directory.path())
            .env("SANJAY_EDGE__TOKEN_SECRET_FILE", &secret)
            .env("SANJAY_DELIVERY__API_KEYS_FILE", &keys)
            .env("SANJAY_ADMIN__LISTEN", free)
            .spawn();
        let addresses = server.ready(&directory.path().join("ready.json")).await;
        let (url, api) = (addresses.get("url"), addresses.get("server"));

        let send = Sanjay::new(["send", "bob", "hi", "--server", api]).env("SANJAY_API_KEY_FILE", &key);
        assert_eq!(lines(&send.run().await.succeeded())[0]["seq"], 1);
        let sub = ["sub", "--inbox", "--user", "bob", "--count", "1", "--url", url];
        let sub = Sanjay::new(sub).env("SANJAY_EDGE__TOKEN_SECRET_FILE", &secret);
        assert_eq!(lines(&sub.run().await.succeeded())[0]["inbox"]["payload"]["text"], "hi");
        let token = Sanjay::new(["token", "bob", "--token-secret-file", &secret]).run().await.succeeded();
        let token = write("token", &token);
        let sub = ["sub", "--inbox", "--token-file", &token, "--count", "1", "--url", url];
        let mut sub = Sanjay::new(sub).spawn();
        says(&mut sub, "connected as bob").await;

        let both = Sanjay::new(["send", "bob", "hi", "--server", api]).env("SANJAY_API_KEY_FILE", &key);
        both.env("SANJAY_API_KEY", "a").run().await.failed_with(&["SANJAY_API_KEY`", "SANJAY_API_KEY_FILE"]);
        let both = Sanjay::new(["check-config"]).env("SANJAY_EDGE__TOKEN_SECRET_FILE", &secret);
        let both = both.env("SANJAY_EDGE__TOKEN_SECRET", "a").run().await;
        both.failed_with(&["SANJAY_EDGE__TOKEN_SECRET`", "SANJAY_EDGE__TOKEN_SECRET_FILE"]);
    })
    .await;
}

#[tokio::test]
async fn port_0_takes_a_free_port_and_prints_it() {
    within(60, "port 0", async {
        let free = "127.0.0.1:0";
        let mut command = vec!["standalone", "--listen", free, "--delivery-listen", free];
        command.extend(["--router-listen", free, "--admin-listen", free, "--ready-file", "ready.json"]);
        let directory = tempfile::tempdir().unwrap();
        let mut server = Sanjay::new(command).directory(directory.path()).spawn();
        let addresses = server.ready(&directory.path().join("ready.json")).await;
        for field in ["url", "server", "admin"] {
            assert!(!addresses.get(field).contains(":0"), "{addresses:?}");
            eventually("the address is printed", PATIENCE, async || {
                server.stdout().contains(addresses.get(field)).then_some(())
            })
            .await;
        }
        let printed = server.stdout();
        for part in ["sanjay sub news", "sanjay pub news hi", "sanjay send bob hi", addresses.get("token")] {
            assert!(printed.contains(part), "{part:?} is missing: {printed}");
        }
        // In the same directory, commands find the server by themselves.
        let health = Sanjay::new(["health"]).directory(directory.path()).run().await;
        health.succeeded().clear();
        let published =
            Sanjay::new(["pub", "news", "hi"]).directory(directory.path()).run().await.succeeded();
        assert_eq!(lines(&published)[0]["offset"], 1);
        for page in ["/healthz", "/readyz", "/metrics"] {
            let answer = Wire::get(&format!("{}{page}", addresses.get("admin"))).await;
            assert_eq!(answer.status, 200, "{page}: {answer:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_port_in_use_names_the_flag() {
    within(60, "ports in use", async {
        let (_listener, address) = taken();
        let port = address.rsplit(':').next().unwrap();
        for flag in ["--listen", "--delivery-listen", "--router-listen", "--admin-listen"] {
            let mut command = vec!["standalone"];
            for listener in ["--listen", "--delivery-listen", "--router-listen", "--admin-listen"] {
                command.extend([listener, if listener == flag { &address } else { "127.0.0.1:0" }]);
            }
            sanjay(&command).await.failed_with(&[&address, flag, "another process", port]);
        }
        sanjay(&["standalone", "--listen", "nowhere"]).await.failed_with(&["--listen", "host:port"]);
    })
    .await;
}

#[tokio::test]
async fn a_data_directory_in_use_is_refused() {
    within(60, "a locked data directory", async {
        let server = Standalone::start().await;
        let data = server.data_dir().display().to_string();
        let free = "127.0.0.1:0";
        let mut command =
            vec!["standalone", "--data-dir", &data, "--listen", free, "--delivery-listen", free];
        command.extend(["--router-listen", free, "--admin-listen", free]);
        sanjay(&command).await.failed_with(&["in use by another sanjay process", "inbox.redb"]);
        // The one that runs is not harmed, and is still the one that commands find.
        sanjay(&["pub", "a", "b", "--data-dir", &data]).await.succeeded().clear();
    })
    .await;
}

async fn check(directory: &Path, toml: &str, role: &str) -> Finished {
    fs::write(directory.join("config.toml"), toml).unwrap();
    Sanjay::new(["check-config", "config.toml", "--for", role]).directory(directory).run().await
}

#[tokio::test]
async fn check_config_names_the_wrong_key() {
    within(60, "configurations", async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let good = Settings::default();
        for role in ["standalone", "edge", "router", "delivery"] {
            check(path, &good.to_toml(), role).await.succeeded().clear();
        }
        check(path, "", "standalone").await.succeeded().clear();
        let wrong = [
            ("edge.shards", "65", "edge", "65"),
            ("edge.token_secret", "\"short\"", "edge", "32"),
            ("edge.token_algorithm", "\"ES256\"", "edge", "token_keys"),
            ("edge.token_keys", r#"[{ algorithm = "ES256", public_key = "x" }]"#, "edge", "BEGIN PUBLIC KEY"),
            ("edge.token_keys", r#"[{ algorithm = "none", public_key = "x" }]"#, "edge", "EdDSA"),
            ("edge.token_jwks_url", "\"issuer/keys\"", "standalone", "https://"),
            ("edge.token_grace_s", "4000", "edge", "3600"),
            ("edge.router", "\"localhost:8083\"", "edge", "http://"),
            ("edge.heartbeat_ms", "\"often\"", "edge", "often"),
            ("edge.hello_timeout_ms", "1", "edge", "100"),
            ("edge.max_outbox_bytes", "1", "standalone", "131072"),
            ("router.lease_ms", "1", "router", "1"),
            ("router.registry", "\"mongo\"", "router", "redis://HOST:PORT"),
            ("router.registry", "\"redis://a:b@there\"", "standalone", "router.redis_password"),
            ("router.redis_timeout_ms", "1", "router", "50"),
            ("delivery.store", "\"mongo\"", "delivery", "redb:PATH"),
            ("delivery.max_unsettled", "0", "delivery", "10000000"),
            ("delivery.call_timeout_ms", "1", "delivery", "60000"),
            ("delivery.api_keys", r#"[{ name = "a", sha256 = "12" }]"#, "delivery", "sha256"),
            ("cluster.key", "\"short\"", "edge", "16"),
            ("telemetry.log_format", "\"xml\"", "standalone", "xml"),
            ("telemetry.sample_ratio", "2.0", "standalone", "2"),
            ("edge.colour", "1", "edge", "colour"),
            ("shop.open", "true", "router", "shop"),
        ];
        for (key, value, role, part) in wrong {
            let finished = check(path, &good.clone().set(key, value).to_toml(), role).await;
            let name = if key == "shop.open" { "shop" } else { key };
            assert_eq!(finished.code, Some(1), "{key}: {finished:?}");
            finished.failed_with(&[name, part, "config.toml"]);
        }
        for (without, role) in [("cluster.key", "router"), ("edge.token_secret", "edge")] {
            check(path, &good.clone().without(without).to_toml(), role).await.failed_with(&[without]);
        }
        check(path, "[edge\n", "edge").await.failed_with(&["config.toml", "line 1"]);
        sanjay(&["check-config", "absent.toml"]).await.failed_with(&["absent.toml"]);
        let variable = Sanjay::new(["check-config"]).env("SANJAY_EDGE__SHARDS", "65").run().await;
        variable.failed_with(&["edge.shards", "SANJAY_EDGE__SHARDS"]);
        let unknown = Sanjay::new(["check-config"]).env("SANJAY_EDGE__COLOUR", "1").run().await;
        unknown.failed_with(&["colour"]);
        // A server does not start with what check-config refuses.
        fs::write(path.join("config.toml"), good.set("edge.shards", 65).to_toml()).unwrap();
        let server = Sanjay::new(["standalone", "--config", "config.toml"]).directory(path).run().await;
        server.failed_with(&["edge.shards"]);
    })
    .await;
}

#[tokio::test]
async fn health_tells_ready_from_not_ready() {
    within(60, "health", async {
        let server = Standalone::start().await;
        let health = async |admin: &str| sanjay(&["health", "--admin", admin]).await;
        health(server.admin()).await.succeeded().clear();
        // As in the container of a server that listens on all addresses of it.
        let everywhere = server.admin().replace("http://127.0.0.1", "0.0.0.0");
        let config = tempfile::NamedTempFile::new().unwrap();
        fs::write(config.path(), format!("[admin]\nlisten = {everywhere:?}\n")).unwrap();
        sanjay(&["health", "--config", config.path().to_str().unwrap()]).await.succeeded().clear();
        let variable = Sanjay::new(["health"]).env("SANJAY_ADMIN__LISTEN", &everywhere);
        variable.run().await.succeeded().clear();
        // An edge without a router lives, and is not ready.
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings::default()
            .set("edge.router", "\"http://127.0.0.1:1\"")
            .set("edge.delivery", "\"http://127.0.0.1:1\"");
        fs::write(directory.path().join("config.toml"), settings.to_toml()).unwrap();
        let free = "127.0.0.1:0";
        let command = ["edge", "--config", "config.toml", "--listen", free, "--admin-listen", free];
        let edge = Sanjay::new(command).directory(directory.path()).spawn();
        let admin = eventually("the admin address is printed", PATIENCE, async || {
            let printed = edge.stdout();
            printed.split_whitespace().rfind(|word| word.starts_with("http://")).map(str::to_owned)
        })
        .await;
        let finished = health(&admin).await;
        assert_eq!(finished.code, Some(1));
        finished.failed_with(&["not ready", "router"]);
        assert_eq!(Wire::get(&format!("{admin}/healthz")).await.status, 200);
        assert_eq!(Wire::get(&format!("{admin}/readyz")).await.status, 503);
    })
    .await;
}

#[tokio::test]
async fn secrets_are_kept_private_and_out_of_the_log() {
    within(60, "secrets", async {
        use std::os::unix::fs::PermissionsExt;
        let settings = Settings::default().set("telemetry.log_level", "\"trace\"");
        let server = Standalone::start_with(settings).await;
        let backend = backend(server.server()).await;
        let mut ann = Peer::with_inbox(server.url(), "ann", 64).await;
        ann.subscribe("news").await;
        let payload = || Payload::Text("a payload of a test".into());
        backend.publish("news", payload(), "").await.unwrap();
        backend.send(&["ann"], payload(), "").await.unwrap();
        ann.event("inbox").await;
        ann.ack(1, 1).await;
        for name in ["secrets.json", "ready.json"] {
            let mode = fs::metadata(server.data_dir().join(name)).unwrap().permissions().mode();
            assert_eq!(mode & 0o077, 0, "{name}: {mode:o}");
        }
        let secrets: Value =
            serde_json::from_slice(&fs::read(server.data_dir().join("secrets.json")).unwrap()).unwrap();
        let log = server.process.stderr();
        let token = sanjay_testkit::Token::of("ann").sign();
        let header = token.split('.').next().unwrap();
        let mut hidden =
            vec![sanjay_testkit::TOKEN_SECRET, sanjay_testkit::API_KEY, header, "a payload of a test"];
        hidden.extend(secrets.as_object().unwrap().values().map(|value| value.as_str().unwrap()));
        for text in hidden {
            let line = log.lines().find(|line| line.contains(text));
            assert!(line.is_none(), "in the log: {line:?}");
        }
    })
    .await;
}
