//! Tokens of every algorithm, keys that are published and replaced, tokens that end, and tokens of one subscription.

use std::time::{Duration, Instant};

use futures::{StreamExt as _, stream};
use sanjay_protocol::token::Action;
use sanjay_testkit::{
    Cluster, End, KeyPair, KeyServer, Peer, Role, Sanjay, Settings, Standalone, TOKEN_SECRET, Token, Wire,
    backend, eventually, within,
};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

fn hello(token: &Token) -> Value {
    json!({ "token": token.sign(), "credit": 0 })
}

async fn connect(url: &str, token: &Token) -> Result<Peer, End> {
    Peer::try_hello(url, hello(token)).await
}

/// The close code and reason that a token gets.
async fn refused(url: &str, token: &Token) -> (u16, String) {
    match connect(url, token).await {
        Ok(_) => panic!("the token was taken"),
        Err(End::Closed(code, reason)) => (code, reason),
        Err(end) => panic!("{end:?}"),
    }
}

/// A setting with public keys: kid, algorithm, PEM.
fn token_keys(keys: &[(&str, &str, &KeyPair)]) -> String {
    let keys = keys.iter().map(|(kid, algorithm, pair)| {
        format!("{{ kid = {kid:?}, algorithm = {algorithm:?}, public_key = {:?} }}", pair.public)
    });
    format!("[{}]", keys.collect::<Vec<_>>().join(", "))
}

async fn metric(admin: &str, series: &str) -> f64 {
    let page = Wire::get(&format!("{admin}/metrics")).await.body;
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{series} is missing")).parse().unwrap()
}

#[tokio::test]
async fn tokens_of_every_algorithm_open_a_connection() {
    within(90, "algorithms", async {
        for algorithm in ["HS384", "HS512"] {
            let secret = TOKEN_SECRET.repeat(2);
            let settings = Settings::default()
                .set("edge.token_algorithm", format!("{algorithm:?}"))
                .set("edge.token_secret", format!("{secret:?}"));
            let server = Standalone::start_with(settings).await;
            let token = Token::of("ann").signed_with(&secret);
            connect(server.url(), &token.clone().algorithm(algorithm)).await.unwrap();
            let (code, reason) = refused(server.url(), &token).await;
            assert!(code == 4401 && reason.contains(algorithm), "{code}: {reason}");
            // The token that the server makes for its developer is of its algorithm, too.
            let own = json!({ "token": server.token(), "credit": 0 });
            Peer::with_hello(server.url(), own).await;
        }
        let pairs = ["RS256", "ES256", "EdDSA"].map(|algorithm| (algorithm, KeyPair::generate(algorithm)));
        let keys: Vec<_> = pairs.iter().map(|(algorithm, pair)| (*algorithm, *algorithm, pair)).collect();
        let server =
            Standalone::start_with(Settings::default().set("edge.token_keys", token_keys(&keys))).await;
        for (algorithm, pair) in &pairs {
            let token = Token::of("ann").signed_by(pair);
            for token in [token.clone(), token.clone().kid(algorithm)] {
                let mut peer = connect(server.url(), &token).await.unwrap();
                assert_eq!(peer.welcome["user"], "ann", "{algorithm}");
                peer.subscribe("news").await;
            }
            let stranger = Token::of("ann").signed_by(&KeyPair::generate(algorithm)).kid(algorithm);
            assert!(refused(server.url(), &stranger).await.1.contains("signature"), "{algorithm}");
        }
        connect(server.url(), &Token::of("ann")).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_token_does_not_choose_how_it_is_checked() {
    within(60, "forged tokens", async {
        let (rsa, ec) = (KeyPair::generate("RS256"), KeyPair::generate("ES256"));
        let keys = token_keys(&[("rsa", "RS256", &rsa), ("ec", "ES256", &ec)]);
        let server = Standalone::start_with(Settings::default().set("edge.token_keys", keys)).await;
        let root = Token::of("root");
        for (token, part) in [
            // A public key's text as a shared secret.
            (root.clone().signed_with(&rsa.public), "signature"),
            (root.clone().signed_with(&rsa.public).kid("rsa"), "algorithm"),
            (root.clone().signed_with(&rsa.public).algorithm("HS512").kid("rsa"), "algorithm"),
            (root.clone().signed_with(&rsa.public).algorithm("HS512"), "algorithm"),
            (root.clone().signed_by(&ec).kid("rsa"), "algorithm"),
            (root.clone().signed_by(&rsa).kid("ec"), "algorithm"),
            (root.clone().signed_by(&ec).kid("other"), "kid \"other\""),
        ] {
            let (code, reason) = refused(server.url(), &token).await;
            assert!(code == 4401 && reason.contains(part), "{part}: {code} {reason}");
        }
        // {"alg":"none"} and {"alg":"none","kid":"rsa"}.
        for header in ["eyJhbGciOiJub25lIn0", "eyJhbGciOiJub25lIiwia2lkIjoicnNhIn0"] {
            let signed = root.sign();
            let claims = signed.split('.').nth(1).unwrap();
            for signature in ["", signed.rsplit('.').next().unwrap()] {
                let token = format!("{header}.{claims}.{signature}");
                let end = Peer::try_hello(server.url(), json!({ "token": token })).await.unwrap_err();
                assert!(matches!(&end, End::Closed(4401, why) if why.contains("algorithm")), "{end:?}");
            }
        }
        assert!(
            metric(server.admin(), "sanjay_edge_token_refusals_total{reason=\"algorithm\"}").await >= 9.0
        );
    })
    .await;
}

#[tokio::test]
async fn audience_and_issuer_are_asked_for() {
    within(30, "audience and issuer", async {
        let settings = Settings::default()
            .set("edge.token_audience", "\"chat\"")
            .set("edge.token_issuer", "\"https://issuer.example\"");
        let server = Standalone::start_with(settings).await;
        let token = |aud: Value, iss: &str| Token::of("ann").claim("aud", aud).claim("iss", iss);
        let issuer = "https://issuer.example";
        for aud in [json!("chat"), json!(["mail", "chat"])] {
            connect(server.url(), &token(aud, issuer)).await.unwrap();
        }
        for (token, part) in [
            (Token::of("ann"), "`aud`"),
            (token("mail".into(), issuer), "edge.token_audience"),
            (token("chat".into(), "https://other.example"), "edge.token_issuer"),
            (Token::of("ann").claim("aud", "chat"), "`iss`"),
        ] {
            let (code, reason) = refused(server.url(), &token).await;
            assert!(code == 4401 && reason.contains(part), "{part}: {code} {reason}");
        }
        Peer::with_hello(server.url(), json!({ "token": server.token() })).await;
        let minted = Sanjay::new(["token", "bob", "--token-secret", TOKEN_SECRET])
            .env("SANJAY_EDGE__TOKEN_AUDIENCE", "chat")
            .env("SANJAY_EDGE__TOKEN_ISSUER", issuer)
            .run()
            .await;
        let minted = json!({ "token": minted.succeeded().trim() });
        assert_eq!(Peer::with_hello(server.url(), minted).await.welcome["user"], "bob");
    })
    .await;
}

/// A server whose keys come from `issuer` alone.
async fn cluster_of(issuer: &KeyServer, interval_ms: u64) -> Cluster {
    let settings = Settings::default()
        .without("edge.token_secret")
        .set("edge.token_jwks_url", format!("{:?}", issuer.url()))
        .set("edge.token_jwks_interval_ms", interval_ms);
    Cluster::start_with(settings).await
}

#[tokio::test]
async fn published_keys_are_replaced_without_anybody_noticing() {
    within(90, "rotation", async {
        let (first, second) = (KeyPair::generate("ES256"), KeyPair::generate("EdDSA"));
        let issuer = KeyServer::start(&[first.jwk("1")]).await;
        let cluster = cluster_of(&issuer, 200).await;
        let url = cluster.url();
        let (old, new) =
            (Token::of("ann").signed_by(&first).kid("1"), Token::of("ann").signed_by(&second).kid("2"));
        connect(&url, &old).await.unwrap();
        connect(&url, &Token::of("ann").signed_by(&first)).await.unwrap();
        // Both for a while: a token of the new one is the first that the edge hears of it.
        issuer.publish(&[first.jwk("1"), second.jwk("2")]);
        eventually("the new key is looked up", PATIENCE, async || connect(&url, &new).await.ok()).await;
        connect(&url, &old).await.unwrap();
        issuer.publish(&[second.jwk("2")]);
        let third = Token::of("ann").signed_by(&first).kid("3");
        eventually("the old key is gone", PATIENCE, async || {
            // Each look-up replaces what is known.
            let _ = connect(&url, &third).await;
            connect(&url, &old).await.err()
        })
        .await;
        connect(&url, &new).await.unwrap();
        let (code, reason) = eventually("an unknown key is refused", PATIENCE, async || {
            Some(refused(&url, &third).await).filter(|(code, _)| *code == 4401)
        })
        .await;
        assert!(reason.contains("kid \"3\""), "{code}: {reason}");
    })
    .await;
}

#[tokio::test]
async fn the_last_good_keys_stay_while_the_issuer_is_away() {
    within(90, "an issuer that is away", async {
        let pair = KeyPair::generate("ES256");
        let issuer = KeyServer::start(&[pair.jwk("1")]).await;
        let cluster = cluster_of(&issuer, 100).await;
        let (url, admin) = (cluster.url(), cluster.admin(Role::Edge));
        let (good, unknown) =
            (Token::of("ann").signed_by(&pair).kid("1"), Token::of("ann").signed_by(&pair).kid("2"));
        let fetches = |outcome: &str| format!("sanjay_edge_jwks_fetches_total{{outcome=\"{outcome}\"}}");
        assert!(metric(admin, &fetches("fetched")).await >= 1.0);
        assert_eq!(metric(admin, "sanjay_edge_jwks_keys").await, 1.0);
        assert!(metric(admin, "sanjay_edge_jwks_fetched_at_seconds").await > 1.6e9);
        for (status, body) in [(500, ""), (200, "<html>"), (200, "{\"keys\":[]}"), (302, "")] {
            issuer.fail(status, body);
            let before = metric(admin, &fetches("bad_answer")).await;
            eventually("the failure is noticed", PATIENCE, async || {
                let (code, reason) = refused(&url, &unknown).await;
                let noticed = metric(admin, &fetches("bad_answer")).await > before;
                (noticed && code == 1013).then_some(reason)
            })
            .await;
            connect(&url, &good).await.unwrap();
        }
        assert!(metric(admin, "sanjay_edge_tokens_unchecked_total").await >= 1.0);
        issuer.publish(&[pair.jwk("2")]);
        eventually("the issuer is back", PATIENCE, async || connect(&url, &unknown).await.ok()).await;
    })
    .await;
}

#[tokio::test]
async fn an_edge_without_keys_is_not_ready_and_says_so() {
    within(60, "readiness", async {
        let issuer = KeyServer::start(&[]).await;
        // Its router and its delivery node are what this edge stands on.
        let others = Standalone::start().await;
        let pair = KeyPair::generate("ES256");
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings::default()
            .without("edge.token_secret")
            .set("edge.token_jwks_url", format!("{:?}", issuer.url()))
            .set("edge.token_jwks_interval_ms", 100)
            .set("edge.token_jwks_refresh_ms", 100)
            .set("edge.router", format!("{:?}", others.router()))
            .set("edge.delivery", format!("{:?}", others.server()));
        std::fs::write(directory.path().join("edge.toml"), settings.to_toml()).unwrap();
        let (listen, admin) = (sanjay_testkit::free_port(), sanjay_testkit::free_port());
        let (listen, admin) = (format!("127.0.0.1:{listen}"), format!("127.0.0.1:{admin}"));
        let arguments = ["edge", "--config", "edge.toml", "--listen", &listen, "--admin-listen", &admin];
        let _edge = Sanjay::new(arguments).directory(directory.path()).spawn();
        let (url, admin) = (format!("ws://{listen}/v1/ws"), format!("http://{admin}"));
        let token = Token::of("ann").signed_by(&pair).kid("1");
        let page = eventually("the keys are waited for alone", PATIENCE, async || {
            let page = Wire::get(&format!("{admin}/readyz")).await;
            let up = page.status != 0 && !page.body.contains("router") && !page.body.contains("delivery");
            up.then_some(page)
        })
        .await;
        assert!(page.status == 503 && page.body.contains("edge: token keys"), "{page:?}");
        let (code, reason) = refused(&url, &token).await;
        assert_eq!(code, 1013, "{reason}");
        issuer.publish(&[pair.jwk("1")]);
        eventually("the edge is ready", PATIENCE, async || {
            (Wire::get(&format!("{admin}/readyz")).await.status == 200).then_some(())
        })
        .await;
        connect(&url, &token).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn ten_thousand_unknown_keys_cost_one_fetch_an_interval() {
    within(180, "a flood of unknown keys", async {
        const TOKENS: usize = 10_000;
        const INTERVAL: Duration = Duration::from_secs(2);
        let pair = KeyPair::generate("ES256");
        let issuer = KeyServer::start(&[pair.jwk("1")]).await;
        let cluster = cluster_of(&issuer, u64::try_from(INTERVAL.as_millis()).unwrap()).await;
        let url = cluster.url();
        let good = Token::of("ann").signed_by(&pair).kid("1");
        // Signed once: what counts is the header.
        let signed = good.sign();
        let rest = &signed[signed.find('.').unwrap()..];
        let (before, began) = (issuer.fetches(), Instant::now());
        let codes: Vec<u16> = stream::iter(0..TOKENS)
            .map(|n| {
                let header = json!({ "alg": "ES256", "kid": format!("unknown {n}") }).to_string();
                let hello = json!({ "token": format!("{}{rest}", base64(header.as_bytes())), "credit": 0 });
                let url = &url;
                async move {
                    match Peer::try_hello(url, hello).await {
                        Err(End::Closed(code, _)) => code,
                        other => panic!("{:?}", other.err()),
                    }
                }
            })
            .buffer_unordered(64)
            .collect()
            .await;
        assert!(codes.iter().all(|code| matches!(code, 1013 | 4401)), "{codes:?}");
        let most = began.elapsed().as_secs_f64() / INTERVAL.as_secs_f64() + 2.0;
        let fetches = issuer.fetches() - before;
        println!("{TOKENS} tokens, {fetches} fetches in {:?}", began.elapsed());
        assert!(fetches >= 1 && fetches as f64 <= most, "{fetches} fetches in {:?}", began.elapsed());
        connect(&url, &good).await.unwrap();
    })
    .await;
}

/// Base64url without padding.
fn base64(bytes: &[u8]) -> String {
    let payload = sanjay_protocol::Payload::Bytes(bytes.to_vec().into());
    let text = serde_json::to_value(&payload).unwrap()["bytes"].as_str().unwrap().to_owned();
    text.trim_end_matches('=').replace('+', "-").replace('/', "_")
}

#[tokio::test]
async fn a_connection_goes_on_with_another_token() {
    within(60, "refresh", async {
        let server = Standalone::start_with(Settings::default().set("edge.token_grace_s", 20)).await;
        let backend = backend(server.server()).await;
        let mut ann = connect(server.url(), &Token::of("ann").expires_in_s(2)).await.unwrap();
        ann.subscribe("news").await;
        assert_eq!(ann.event("token_expired").await["close_in_ms"].as_u64().unwrap() % 1_000, 0);
        for command in [
            json!({ "subscribe": { "channel": "more" } }),
            json!({ "publish": { "channel": "news", "payload": { "text": "t" } } }),
        ] {
            let answer = ann.call(command).await;
            assert_eq!(answer["error"]["code"], "token_expired", "{answer}");
            assert_eq!(answer["error"]["retryable"], true);
        }
        // What is subscribed goes on through the grace.
        backend.publish("news", sanjay_protocol::Payload::Text("still".into()), "").await.unwrap();
        assert_eq!(ann.event("message").await["payload"]["text"], "still");
        let answer = ann.call(json!({ "refresh": { "token": Token::of("ann").sign() } })).await;
        let ttl = answer["refreshed"]["token_ttl_s"].as_u64().unwrap();
        assert!((3_590..=3_600).contains(&ttl), "{answer}");
        ann.subscribe("more").await;
        ann.publish("news", "again").await;
        assert_eq!(metric(server.admin(), "sanjay_edge_token_refreshes_total").await, 1.0);
        // Ahead of time, and to one that ends sooner.
        let soon = Token::of("ann").expires_in_s(2).sign();
        assert!(ann.call(json!({ "refresh": { "token": soon } })).await["refreshed"].is_object());
        ann.event("token_expired").await;
    })
    .await;
}

#[tokio::test]
async fn without_another_token_a_connection_ends_after_the_grace() {
    within(30, "the grace", async {
        let server = Standalone::start_with(Settings::default().set("edge.token_grace_s", 2)).await;
        let mut ann = connect(server.url(), &Token::of("ann").expires_in_s(1)).await.unwrap();
        assert!(ann.event("token_expired").await["close_in_ms"].as_u64().unwrap() <= 2_000);
        let refused = ann.call(json!({ "refresh": { "token": Token::of("eve").sign() } })).await;
        assert_eq!(refused["error"]["code"], "forbidden", "{refused}");
        assert_eq!(ann.closed().await.0, 4410);
        assert_eq!(metric(server.admin(), "sanjay_edge_tokens_expired_total").await, 1.0);
    })
    .await;
}

#[tokio::test]
async fn another_users_token_changes_nothing_and_fewer_capabilities_end_subscriptions() {
    within(30, "refresh with less", async {
        let server = Standalone::start().await;
        let backend = backend(server.server()).await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        for channel in ["a", "b"] {
            ann.subscribe(channel).await;
        }
        let refused = ann.call(json!({ "refresh": { "token": Token::of("eve").sign() } })).await;
        assert_eq!(refused["error"]["code"], "forbidden", "{refused}");
        ann.publish("a", "as ann").await;
        assert_eq!(ann.event("message").await["publisher"], "ann");
        let less = Token::of("ann").caps(&[("b", &[Action::Subscribe])]).sign();
        ann.call(json!({ "refresh": { "token": less } })).await;
        let ended = ann.event("unsubscribed").await;
        assert_eq!((&ended["channel"], &ended["code"]), (&json!("a"), &json!("forbidden")), "{ended}");
        assert_eq!(ended["retryable"], false);
        for channel in ["a", "b"] {
            backend.publish(channel, sanjay_protocol::Payload::Text("t".into()), "").await.unwrap();
        }
        assert_eq!(ann.event("message").await["channel"], "b");
        assert!(ann.is_quiet().await);
        let answer = ann.call(json!({ "unsubscribe": { "channel": "a" } })).await;
        assert_eq!(answer["error"]["code"], "not_subscribed", "{answer}");
        let publish = json!({ "publish": { "channel": "b", "payload": { "text": "t" } } });
        assert_eq!(ann.call(publish).await["error"]["code"], "forbidden");
    })
    .await;
}

#[tokio::test]
async fn a_subscription_token_grants_one_channel_to_one_user() {
    within(30, "subscription tokens", async {
        let server = Standalone::start().await;
        let backend = backend(server.server()).await;
        let nothing = Token::of("ann").caps(&[]);
        let mut ann = connect(server.url(), &nothing).await.unwrap();
        let subscribe = |token: Option<&Token>| match token {
            Some(token) => json!({ "subscribe": { "channel": "room:1", "token": token.sign() } }),
            None => json!({ "subscribe": { "channel": "room:1" } }),
        };
        let good = Token::for_channel("ann", "room:1");
        for (token, part) in [
            (None, "caps"),
            (Some(Token::for_channel("eve", "room:1")), "another user's"),
            (Some(Token::for_channel("ann", "room:2")), "room:2"),
            (Some(good.clone().expires_in_s(-1)), "expired"),
            (Some(Token::of("ann")), "claim `channel`"),
            (Some(good.clone().signed_with(&"x".repeat(40))), "signature"),
        ] {
            let answer = ann.call(subscribe(token.as_ref())).await;
            let (code, message) = (&answer["error"]["code"], answer["error"]["message"].as_str().unwrap());
            assert!(code == "forbidden" && message.contains(part), "{part}: {answer}");
        }
        assert!(refused(server.url(), &good).await.1.contains("subscription"), "it opens no connection");
        let minted = server
            .cli(["token", "ann", "--channel", "room:1", "--ttl", "3s", "--token-secret", TOKEN_SECRET])
            .run()
            .await;
        let minted = minted.succeeded().trim().to_owned();
        let answer = ann.call(json!({ "subscribe": { "channel": "room:1", "token": minted } })).await;
        assert!(answer["subscribed"].is_object(), "{answer}");
        backend.publish("room:1", sanjay_protocol::Payload::Text("in".into()), "").await.unwrap();
        assert_eq!(ann.event("message").await["payload"]["text"], "in");
        let publish = json!({ "publish": { "channel": "room:1", "payload": { "text": "t" } } });
        assert_eq!(ann.call(publish).await["error"]["code"], "forbidden");
        let renewed = good.clone().expires_in_s(4).sign();
        let answer = ann.call(json!({ "refresh": { "channel": "room:1", "token": renewed } })).await;
        assert_eq!(answer["refreshed"]["channel"], "room:1", "{answer}");
        let ended = ann.event("unsubscribed").await;
        assert_eq!((&ended["code"], &ended["retryable"]), (&json!("token_expired"), &json!(true)), "{ended}");
        backend.publish("room:1", sanjay_protocol::Payload::Text("out".into()), "").await.unwrap();
        assert!(ann.is_quiet().await);
        assert!(ann.call(subscribe(Some(&good))).await["subscribed"].is_object());
    })
    .await;
}

#[tokio::test]
async fn a_private_channel_takes_nothing_but_its_own_token() {
    within(30, "private channels", async {
        let server = Standalone::start_with(Settings::default().set("namespaces.club.private", true)).await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        let mut subscribe = async |token: Option<Token>| {
            let mut command = json!({ "subscribe": { "channel": "club:1" } });
            if let Some(token) = token {
                command["subscribe"]["token"] = token.sign().into();
            }
            ann.call(command).await
        };
        for (token, part) in [
            (None, "are private"),
            (Some(Token::for_channel("eve", "club:1")), "another user's"),
            (Some(Token::for_channel("ann", "club:2")), "club:2"),
            (Some(Token::for_channel("ann", "club:1").expires_in_s(-1)), "expired"),
            (Some(Token::of("ann")), "claim `channel`"),
        ] {
            let answer = subscribe(token).await;
            let message = answer["error"]["message"].as_str().unwrap_or_default();
            assert!(answer["error"]["code"] == "forbidden" && message.contains(part), "{part}: {answer}");
        }
        let answer = subscribe(Some(Token::for_channel("ann", "club:1"))).await;
        assert!(answer["subscribed"].is_object(), "{answer}");
        let backend = backend(server.server()).await;
        backend.publish("club:1", sanjay_protocol::Payload::Text("in".into()), "").await.unwrap();
        assert_eq!(ann.event("message").await["payload"]["text"], "in");
    })
    .await;
}

#[tokio::test]
async fn the_command_line_signs_with_a_private_key() {
    within(60, "sanjay token", async {
        let pair = KeyPair::generate("ES256");
        let keys = token_keys(&[("cli", "ES256", &pair)]);
        let server = Standalone::start_with(Settings::default().set("edge.token_keys", keys)).await;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        std::fs::write(&path, &pair.private).unwrap();
        let path = path.display().to_string();
        let minted = Sanjay::new(["token", "bob", "--token-key", &path, "--token-kid", "cli"]).run().await;
        let minted = json!({ "token": minted.succeeded().trim() });
        assert_eq!(Peer::with_hello(server.url(), minted).await.welcome["user"], "bob");
        std::fs::write(&path, &pair.public).unwrap();
        let wrong = Sanjay::new(["token", "bob", "--token-key", &path]).run().await;
        wrong.failed_with(&["key.pem", "no PEM of a private key"]);
        let wrong =
            Sanjay::new(["token", "bob", "--token-algorithm", "ES256", "--token-secret", TOKEN_SECRET]);
        wrong.run().await.failed_with(&["--token-key"]);
    })
    .await;
}
