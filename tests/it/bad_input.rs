//! Whatever a client sends: the named error or close code, and the server serves the next one.

use sanjay_protocol::token::Action;
use sanjay_testkit::{End, Opcode, Peer, Settings, Standalone, Token, Wire, within};
use serde_json::{Value, json};

/// Checks that the server still serves.
pub(crate) async fn serves_the_next(url: &str) {
    let mut peer = Peer::connect(url, "next").await;
    peer.subscribe("alive").await;
    peer.publish("alive", "yes").await;
    assert_eq!(peer.event("message").await["payload"]["text"], "yes");
    peer.bye().await;
}

/// What a connection that says `hello` sends beyond it, the error's code, and what its text names.
fn wrong_commands() -> Vec<(String, &'static str, &'static str)> {
    let long = "n".repeat(201);
    let large = "x".repeat(65_537);
    let ranges = vec![[1, 1]; 257];
    let mut cases = Vec::new();
    let mut case = |command: Value, code, part| cases.push((command.to_string(), code, part));
    for command in ["subscribe", "unsubscribe"] {
        case(json!({ command: {} }), "bad_request", "channel");
        case(json!({ command: "news" }), "bad_request", command);
        case(json!({ command: null }), "bad_request", command);
        case(json!({ command: [] }), "bad_request", command);
        case(json!({ command: { "channel": 7 } }), "bad_request", "channel");
        case(json!({ command: { "channel": null } }), "bad_request", "channel");
        case(json!({ command: { "channel": "" } }), "bad_request", "channel is empty");
        case(json!({ command: { "channel": long } }), "bad_request", "201 bytes");
        case(json!({ command: { "channel": "a\u{7}b" } }), "bad_request", "U+0007");
    }
    case(json!({ "unsubscribe": { "channel": "never" } }), "not_subscribed", "never");

    let publish =
        |channel: Value, payload: Value| json!({ "publish": { "channel": channel, "payload": payload } });
    let text = || json!({ "text": "t" });
    case(json!({ "publish": {} }), "bad_request", "channel");
    case(json!({ "publish": { "channel": "a" } }), "bad_request", "payload");
    case(publish(json!(""), text()), "bad_request", "channel is empty");
    case(publish(json!(long), text()), "bad_request", "201 bytes");
    case(publish(json!("a\nb"), text()), "bad_request", "U+000A");
    case(publish(json!(["a"]), text()), "bad_request", "publish.channel");
    for payload in [json!(null), json!("t"), json!({}), json!({ "xml": "t" }), json!({ "text": 7 })] {
        case(publish(json!("a"), payload), "bad_request", "payload");
    }
    case(publish(json!("a"), json!({ "text": "t", "bytes": "AA==" })), "bad_request", "payload");
    case(publish(json!("a"), json!({ "bytes": "%" })), "bad_request", "base64");
    case(publish(json!("a"), json!({ "text": large })), "payload_too_large", "65537");
    case(publish(json!("a"), json!({ "json": large })), "payload_too_large", "65539");
    for (dedupe, part) in [(json!(7), "dedupe"), (json!(long), "201 bytes"), (json!("\u{0}"), "U+0000")] {
        let command = json!({ "publish": { "channel": "a", "payload": text(), "dedupe": dedupe } });
        case(command, "bad_request", part);
    }

    case(json!({ "ack": {} }), "bad_request", "ranges");
    let wrong_ranges = [
        (json!([]), "0 entries"),
        (json!(ranges), "257 entries"),
        (json!([[3, 1]]), "[3,1]"),
        (json!([[0, 1]]), "[0,1]"),
        (json!([[1, 9_007_199_254_740_992_u64]]), "2⁵³"),
        (json!([[1]]), "ranges"),
        (json!([[1, 2, 3]]), "ranges"),
        (json!([1, 2]), "ranges"),
        (json!([[-1, 2]]), "ranges"),
        (json!([[1.5, 2]]), "ranges"),
        (json!([["1", "2"]]), "ranges"),
        (json!("1-2"), "ranges"),
    ];
    for (ranges, part) in wrong_ranges {
        case(json!({ "ack": { "ranges": ranges } }), "bad_request", part);
    }
    for n in [json!(0), json!(257)] {
        case(json!({ "credit": { "n": n } }), "bad_request", "1 to 256");
    }
    for n in [json!(-1), json!(1.5), json!("8"), json!(null), json!(4_294_967_296_u64)] {
        case(json!({ "credit": { "n": n } }), "bad_request", "credit");
    }
    case(json!({ "credit": {} }), "bad_request", "n");

    case(json!({ "hello": {} }), "bad_request", "once");
    case(json!({ "shout": {} }), "unknown_command", "shout");
    case(json!({ "": {} }), "unknown_command", "unknown");
    case(json!({ "Subscribe": { "channel": "a" } }), "unknown_command", "Subscribe");
    case(json!({ "subscribe": { "channel": "b" }, "credit": { "n": 1 } }), "bad_request", "one command");
    cases
}

#[tokio::test]
async fn each_wrong_field_is_named_and_the_connection_goes_on() {
    within(60, "wrong commands", async {
        let server = Standalone::start().await;
        let mut peer = Peer::with_inbox(server.url(), "ann", 64).await;
        for (command, code, part) in wrong_commands() {
            let mut command: Value = serde_json::from_str(&command).unwrap();
            let answer = peer.call(command.clone()).await;
            let error = &answer["error"];
            assert_eq!(error["code"], code, "{command}: {answer}");
            let message = error["message"].as_str().unwrap();
            assert!(message.contains(part), "{part:?} is missing: {command}: {answer}");
            assert_eq!(error["retryable"], false);
            // Without an id a failure is told all the same.
            command.as_object_mut().unwrap().remove("id");
            peer.send(&command).await;
            let told = peer.event("error").await;
            assert_eq!(told, *error, "{command}");
        }
        for id in ["\"x\"", "-1", "1.5", "null", "9007199254740992"] {
            peer.wire.send(Opcode::Text, format!("{{\"id\":{id},\"credit\":{{\"n\":1}}}}").as_bytes()).await;
            let error = peer.event("error").await;
            assert_eq!(error["code"], "bad_request", "{id}: {error}");
            assert!(error["message"].as_str().unwrap().contains("id is not an integer"), "{id}: {error}");
        }
        assert!(peer.is_quiet().await);
        serves_the_next(server.url()).await;
    })
    .await;
}

#[tokio::test]
async fn several_commands_in_one_message_are_answered_each() {
    within(30, "lines", async {
        let server = Standalone::start().await;
        let mut peer = Peer::connect(server.url(), "ann").await;
        let lines =
            "{\"id\":70,\"subscribe\":{\"channel\":\"a\"}}\n\n  {\"id\":71,\"shout\":{}} \r\n{\"id\":72}";
        peer.wire.send(Opcode::Text, lines.as_bytes()).await;
        assert_eq!(peer.answer(70).await.unwrap()["subscribed"]["channel"], "a");
        assert_eq!(peer.answer(71).await.unwrap()["error"]["code"], "unknown_command");
        assert_eq!(peer.answer(72).await.unwrap(), json!({ "id": 72 }));
        serves_the_next(server.url()).await;
    })
    .await;
}

#[tokio::test]
async fn a_wrong_first_command_closes() {
    within(60, "wrong hellos", async {
        let server = Standalone::start().await;
        let token = Token::of("ann").sign();
        let long = "n".repeat(201);
        let firsts = [
            (json!({ "subscribe": { "channel": "a" } }), "hello must be the first"),
            (json!({ "shout": {} }), "hello comes first"),
            (json!({ "hello": "ann" }), "hello"),
            (json!({ "hello": { "token": 7 } }), "hello.token"),
            (json!({ "hello": { "token": "x".repeat(4_097) } }), "4097 bytes"),
            (json!({ "hello": { "token": token, "device": 1 } }), "hello.device"),
            (json!({ "hello": { "token": token, "device": long } }), "device has 201 bytes"),
            (json!({ "hello": { "token": token, "device": "a\u{1}" } }), "U+0001"),
            (json!({ "hello": { "token": token, "client": long } }), "client has 201 bytes"),
            (json!({ "hello": { "token": token, "client": {} } }), "hello.client"),
            (json!({ "hello": { "token": token, "credit": 257 } }), "credit is 257"),
            (json!({ "hello": { "token": token, "credit": -1 } }), "hello.credit"),
            (json!({ "hello": { "token": token, "credit": "64" } }), "hello.credit"),
        ];
        for (first, part) in firsts {
            let mut peer = Peer::silent(server.url()).await;
            peer.send(&first).await;
            let (code, reason) = peer.closed().await;
            assert_eq!(code, 4400, "{first}: {reason}");
            assert!(reason.contains(part), "{part:?} is missing: {first}: {reason}");
        }
        serves_the_next(server.url()).await;
    })
    .await;
}

#[tokio::test]
async fn each_wrong_frame_has_its_close_code() {
    within(60, "wrong frames", async {
        let server = Standalone::start().await;
        let url = server.url();
        let (half, large) = ("[".repeat(70_000), " ".repeat(131_073));
        let mut frames = Wire::upgrade(url, None, &[]).await.unwrap();
        let mut masked = |fin, opcode, payload: &[u8]| frames.frame(fin, opcode, payload);
        let unmasked = vec![0x81, 0x02, b'{', b'}'];
        let mut reserved_opcode = masked(true, Opcode::Text, b"{}");
        reserved_opcode[0] = 0x83;
        let mut reserved_bit = masked(true, Opcode::Text, b"{}");
        reserved_bit[0] |= 0x40;
        let cases = [
            ("a large frame", masked(true, Opcode::Text, large.as_bytes()), 1009),
            (
                "a large message in two frames",
                [
                    masked(false, Opcode::Text, half.as_bytes()),
                    masked(true, Opcode::Continuation, half.as_bytes()),
                ]
                .concat(),
                1009,
            ),
            ("text that is not UTF-8", masked(true, Opcode::Text, b"{\"a\":\"\xff\"}"), 1007),
            ("text that ends within a character", masked(true, Opcode::Text, b"{\"a\":\"\xe2\x82"), 1007),
            ("a binary frame", masked(true, Opcode::Binary, b"{}"), 1003),
            ("an empty binary frame", masked(true, Opcode::Binary, b""), 1003),
            ("no JSON", masked(true, Opcode::Text, b"hello?"), 4400),
            ("no object", masked(true, Opcode::Text, b"[1]"), 4400),
            ("half an object", masked(true, Opcode::Text, b"{\"id\":1"), 4400),
            (
                "deep nesting",
                masked(true, Opcode::Text, format!("{{\"a\":{}", "[".repeat(6_000)).as_bytes()),
                4400,
            ),
            ("no mask", unmasked, 1002),
            ("an unknown opcode", reserved_opcode, 1002),
            ("a reserved bit", reserved_bit, 1002),
            ("a continuation of nothing", masked(true, Opcode::Continuation, b"{}"), 1002),
            ("a ping in parts", masked(false, Opcode::Ping, b""), 1002),
            ("a large ping", masked(true, Opcode::Ping, &[0; 126]), 1002),
        ];
        for (what, bytes, code) in cases {
            for identified in [false, true] {
                let mut peer =
                    if identified { Peer::connect(url, "ann").await } else { Peer::silent(url).await };
                peer.wire.write(&bytes).await;
                let closed = peer.closed().await;
                assert_eq!(closed.0, code, "{what}, identified: {identified}: {closed:?}");
            }
        }
        serves_the_next(url).await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_says_no_hello_is_closed() {
    within(30, "no hello", async {
        let server = Standalone::start_with(Settings::default().set("edge.hello_timeout_ms", 300)).await;
        let (code, reason) = Peer::silent(server.url()).await.closed().await;
        assert_eq!((code, reason.as_str()), (4408, "no hello in time"));
        // Pings are no hello.
        let mut peer = Peer::silent(server.url()).await;
        peer.send(&json!({})).await;
        assert_eq!(peer.closed().await.0, 4408);
        serves_the_next(server.url()).await;
    })
    .await;
}

#[tokio::test]
async fn a_refused_handshake_says_why() {
    within(30, "handshakes", async {
        let origins = r#"["https://app.example", "http://localhost:*"]"#;
        let server = Standalone::start_with(Settings::default().set("edge.allowed_origins", origins)).await;
        let url = server.url();
        let large = format!("Bearer {}", "x".repeat(4_097));
        let refused = [
            (None, vec![("Origin", "https://evil.example")], 403, "allowed_origins"),
            (None, vec![("Origin", "null")], 403, "allowed_origins"),
            (Some("/"), vec![], 404, "/v1/ws"),
            (Some("/v1/ws/"), vec![], 404, "/v1/ws"),
            (None, vec![("Sec-WebSocket-Protocol", "sanjay.v9.json, chat")], 400, "sanjay.v1.json"),
            (None, vec![("Authorization", &large)], 431, "4096"),
        ];
        for (path, headers, status, part) in refused {
            let answer = Wire::upgrade(url, path, &headers).await.unwrap_err();
            assert_eq!(answer.status, status, "{headers:?}: {answer:?}");
            assert!(answer.body.contains(part), "{part:?} is missing: {answer:?}");
        }
        for headers in [
            vec![],
            vec![("Origin", "https://app.example")],
            vec![("Origin", "http://localhost:5173")],
            vec![("Sec-WebSocket-Protocol", "chat, sanjay.v1.json")],
        ] {
            let upgraded = Wire::upgrade(url, None, &headers).await;
            assert!(upgraded.is_ok(), "{headers:?}: {upgraded:?}");
        }
        for (request, statuses) in [
            ("GET /v1/ws HTTP/1.1\r\nHost: a\r\n\r\n", vec![400, 426]),
            ("POST /v1/ws HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", vec![400, 405, 426]),
            ("hello\r\n\r\n", vec![400, 0]),
            ("\u{16}\u{3}\u{1}\r\n\r\n", vec![400, 0]),
        ] {
            let mut wire = Wire::open(url).await.unwrap();
            wire.write(request.as_bytes()).await;
            let answer = wire.http_answer().await;
            assert!(statuses.contains(&answer.status), "{request:?}: {answer:?}");
        }
        serves_the_next(url).await;
    })
    .await;
}

#[tokio::test]
async fn a_full_edge_says_when_to_come_back() {
    within(30, "a full edge", async {
        let server = Standalone::start_with(Settings::default().set("edge.max_connections", 1)).await;
        let peer = Peer::connect(server.url(), "ann").await;
        let answer = Wire::upgrade(server.url(), None, &[]).await.unwrap_err();
        assert_eq!((answer.status, answer.headers.get("retry-after").map(String::as_str)), (503, Some("5")));
        peer.bye().await;
        sanjay_testkit::eventually("there is room again", std::time::Duration::from_secs(5), async || {
            Wire::upgrade(server.url(), None, &[]).await.ok()
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn capabilities_are_asked_for_each_channel() {
    within(30, "capabilities", async {
        let server = Standalone::start().await;
        let caps =
            [("chat:*", &[Action::Subscribe, Action::Publish][..]), ("news", &[Action::Subscribe][..])];
        let token = Token::of("ann").caps(&caps).sign();
        let mut peer = Peer::with_hello(server.url(), json!({ "token": token })).await;
        peer.subscribe("chat:1").await;
        peer.subscribe("news").await;
        peer.publish("chat:1", "hi").await;
        let publish =
            |channel: &str| json!({ "publish": { "channel": channel, "payload": { "text": "hi" } } });
        for command in [publish("news"), publish("chat"), json!({ "subscribe": { "channel": "newsroom" } })] {
            let answer = peer.call(command).await;
            assert_eq!(answer["error"]["code"], "forbidden", "{answer}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_that_hangs_up_at_any_point_harms_nobody() {
    within(30, "lost clients", async {
        let server = Standalone::start().await;
        let handshake = "GET /v1/ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        let mut bytes = handshake.as_bytes().to_vec();
        let mut frames = Wire::open(server.url()).await.unwrap();
        let hello = json!({ "id": 1, "hello": { "token": Token::of("ann").sign() } }).to_string();
        bytes.extend(frames.frame(true, Opcode::Text, hello.as_bytes()));
        bytes.extend(frames.frame(true, Opcode::Text, b"{\"id\":2,\"subscribe\":{\"channel\":\"a\"}}"));
        for end in (0..=bytes.len()).step_by(7) {
            Wire::open(server.url()).await.unwrap().write(&bytes[..end]).await;
        }
        serves_the_next(server.url()).await;
        let mut peer = Peer::silent(server.url()).await;
        peer.wire.send(Opcode::Close, &1000_u16.to_be_bytes()).await;
        assert_eq!(peer.next().await, Err(End::Closed(1000, String::new())));
    })
    .await;
}
