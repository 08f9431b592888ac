//! The handshake over real sockets, as seen by a client that writes the bytes itself.

use http::{Request, Response};
use sanjay_websocket::{Accepted, Decoder, DecoderConfig, Incoming, UpgradeRefused, offered_subprotocols};
use sanjay_websocket::{serve_upgrade, upgrade_response};
use std::ops::ControlFlow;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const HANDSHAKE: &str = "GET /v1/ws?x=1 HTTP/1.1\r\nHost: h\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: a, b\r\n\r\n";

/// Sends `request`, ends the sending direction, and returns the whole answer and the accepted stream's leftover and path.
async fn exchange(request: &[u8]) -> (String, Option<(Vec<u8>, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a local socket works");
    let mut client = TcpStream::connect(listener.local_addr().expect("a local socket works"))
        .await
        .expect("a local socket works");
    let (stream, _) = listener.accept().await.expect("a local socket works");
    client.write_all(request).await.expect("a local socket works");
    let accepted = serve_upgrade(stream, Duration::from_secs(5), |request| {
        let chosen = offered_subprotocols(request.headers()).last();
        let response = upgrade_response(request, chosen)?;
        Ok::<_, UpgradeRefused>((response, request.uri().path().to_owned()))
    })
    .await;
    let accepted = accepted.map(|Accepted { io, leftover, context }| {
        assert!(io.peer_addr().is_ok());
        (leftover.to_vec(), context)
    });
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.expect("a local socket works");
    (answer, accepted)
}

#[tokio::test]
async fn upgrades_and_hands_over_what_came_behind_the_request() {
    let frame = [0x81, 0x82, 0, 0, 0, 0, b'h', b'i'];
    let (answer, accepted) = exchange(&[HANDSHAKE.as_bytes(), &frame].concat()).await;
    let (mut leftover, path) = accepted.expect("an upgrade");
    assert_eq!(path, "/v1/ws");
    let answer = answer.to_ascii_lowercase();
    assert!(answer.starts_with("http/1.1 101 "), "{answer}");
    assert!(answer.contains("\r\nsec-websocket-accept: s3pplmbitxaq9kygzzhzrbk+xoo=\r\n"), "{answer}");
    assert!(answer.contains("\r\nsec-websocket-protocol: b\r\n"), "{answer}");
    assert!(!answer.contains("close") && !answer.contains("content-length"), "{answer}");
    let mut texts = Vec::new();
    let config = DecoderConfig { max_message_bytes: 10 };
    Decoder::new()
        .feed(&config, &mut leftover, &mut |incoming| {
            if let Incoming::Text(text) = incoming {
                texts.push(text.to_owned());
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(texts, ["hi"]);
}

#[tokio::test]
async fn refusals_carry_status_and_reason() {
    for (from, to, expected) in [
        ("GET", "POST", "405"),
        ("Upgrade: WebSocket", "Upgrade: h2c", "426"),
        ("keep-alive, Upgrade", "keep-alive", "426"),
        ("Version: 13", "Version: 8", "426"),
        ("dGhlIHNhbXBsZSBub25jZQ==", "c2hvcnQ=", "400"),
        ("Sec-WebSocket-Key", "Sec-WebSocket-Kex", "400"),
    ] {
        let (answer, accepted) = exchange(HANDSHAKE.replace(from, to).as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected} ")), "{to}: {answer}");
        assert!(accepted.is_none());
        assert!(answer.contains("close\r\n"), "{answer}");
        assert!(!answer.ends_with("\r\n\r\n"), "a reason is given: {answer}");
    }
    let (answer, _) = exchange(HANDSHAKE.replace("Version: 13", "Version: 8").as_bytes()).await;
    assert!(answer.contains("\r\nsec-websocket-version: 13\r\n"), "{answer}");
}

#[tokio::test]
async fn a_head_may_be_long_but_not_endless() {
    let padded = |size: usize| {
        HANDSHAKE.replace("Host: h", &format!("Host: h\r\nAuthorization: {}", "t".repeat(size)))
    };
    let (answer, _) = exchange(padded(8 * 1024).as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
    let (answer, accepted) = exchange(padded(15 * 1024 + 900).as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert!(accepted.is_none());
}

#[tokio::test(start_paused = true)]
async fn silence_ends_at_the_header_timeout() {
    let (mut client, server) = tokio::io::duplex(64);
    client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let started = tokio::time::Instant::now();
    let accepted = serve_upgrade(server, Duration::from_secs(7), |request| {
        upgrade_response(request, None).map(|response| (response, ()))
    })
    .await;
    assert!(accepted.is_none());
    assert_eq!(started.elapsed().as_secs(), 7);
}

#[tokio::test]
async fn a_decision_need_not_be_send_and_runs_in_a_local_set() {
    let local = tokio::task::LocalSet::new();
    let context = std::rc::Rc::new(5);
    let (mut client, server) = tokio::io::duplex(4096);
    client.write_all(HANDSHAKE.as_bytes()).await.unwrap();
    let task = local.run_until(serve_upgrade(server, Duration::from_secs(1), |request| {
        let response = upgrade_response(request, None)?;
        Ok::<_, UpgradeRefused>((response, context.clone()))
    }));
    assert_eq!(task.await.map(|accepted| *accepted.context), Some(5));
}

#[test]
fn only_offered_subprotocols_are_selected() {
    let mut request = Request::new(());
    for (name, value) in [
        ("connection", "upgrade"),
        ("upgrade", "websocket"),
        ("sec-websocket-version", "13"),
        ("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ=="),
        ("sec-websocket-protocol", "one,, two"),
    ] {
        request.headers_mut().append(name, value.parse().unwrap());
    }
    request.headers_mut().append("sec-websocket-protocol", "three".parse().unwrap());
    assert_eq!(offered_subprotocols(request.headers()).collect::<Vec<_>>(), ["one", "two", "three"]);
    let protocol = |response: Response<_>| response.headers()["sec-websocket-protocol"].clone();
    assert_eq!(upgrade_response(&request, Some("three")).map(protocol).unwrap(), "three");
    assert_eq!(upgrade_response(&request, Some("four")).unwrap_err(), UpgradeRefused::SubprotocolNotOffered);
    *request.version_mut() = http::Version::HTTP_10;
    assert_eq!(upgrade_response(&request, None).unwrap_err(), UpgradeRefused::HttpVersion);
}
