//! What nginx lets nobody do: claim an address, take everything, look at admin pages, or leave a token in a log.

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use sanjay_testkit::{
    Cluster, HttpAnswer, Peer, Wire, eventually,
    servers::{Nginx, NginxOptions},
    within,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

const PATIENCE: Duration = Duration::from_secs(10);

/// An HTTP server in the place of an edge: it refuses everybody, and tells the test what it was asked.
struct Recorder {
    address: SocketAddr,
    heads: mpsc::UnboundedReceiver<(SocketAddr, String)>,
}

impl Recorder {
    async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (told, heads) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut socket, from)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") && socket.read_buf(&mut head).await.is_ok_and(|n| n > 0) {}
                let answer =
                    b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                let _ = socket.write_all(answer).await;
                let _ = told.send((from, String::from_utf8(head).unwrap()));
            }
        });
        Self { address, heads }
    }

    /// The headers of the next request, in lower case, and who sent it.
    async fn next(&mut self) -> (SocketAddr, Vec<String>) {
        let (from, head) = self.heads.recv().await.unwrap();
        (from, head.lines().skip(1).map(str::to_lowercase).collect())
    }
}

/// Asks for an upgrade that is refused.
async fn refused(url: &str, headers: &[(&str, &str)]) -> HttpAnswer {
    Wire::upgrade(url, None, headers).await.expect_err("it is refused")
}

fn trusting() -> NginxOptions {
    NginxOptions::default().edit(
        "conf/trusted_proxies.conf",
        "# set_real_ip_from 192.0.2.0/24;",
        "set_real_ip_from 127.0.0.1; set_real_ip_from 192.0.2.0/24;",
    )
}

/// What a stranger may send to look like somebody else.
const CLAIMS: [(&str, &str); 5] = [
    ("X-Forwarded-For", "203.0.113.66, 198.51.100.7, 192.0.2.9"),
    ("X-Real-IP", "203.0.113.66"),
    ("Forwarded", "for=203.0.113.66"),
    ("X-Forwarded-Proto", "https"),
    ("Cookie", "session=203.0.113.66"),
];

#[tokio::test]
async fn only_a_trusted_proxy_may_say_who_a_client_is() {
    within(60, "X-Forwarded-For", async {
        for (options, client) in [(NginxOptions::default(), "127.0.0.1"), (trusting(), "198.51.100.7")] {
            let mut edge = Recorder::start().await;
            let nginx = Nginx::start_with(options, &[edge.address], &[]).await;
            assert_eq!(refused(&nginx.url(), &CLAIMS).await.status, 426);
            let (_, headers) = edge.next().await;
            assert!(headers.contains(&format!("x-forwarded-for: {client}")), "{headers:?}");
            assert!(headers.contains(&"x-forwarded-proto: http".to_owned()), "{headers:?}");
            assert!(!headers.iter().any(|line| line.contains("203.0.113.66")), "{headers:?}");
            let line = async || nginx.requests().into_iter().find(|line| line["path"] == "/v1/ws");
            assert_eq!(eventually("its line is written", PATIENCE, line).await["client"], client);
        }
    })
    .await;
}

#[tokio::test]
async fn a_balancer_in_front_may_speak_the_proxy_protocol() {
    within(30, "the PROXY protocol", async {
        let options = trusting().edit("listen/websocket.conf", " backlog=", " proxy_protocol backlog=").edit(
            "conf/client_address.conf",
            "real_ip_header X-Forwarded-For",
            "real_ip_header proxy_protocol",
        );
        let mut edge = Recorder::start().await;
        let nginx = Nginx::start_with(options, &[edge.address], &[]).await;
        let mut wire = Wire::open(&nginx.url()).await.unwrap();
        let said = "PROXY TCP4 198.51.100.7 192.0.2.9 4711 8080\r\n\
                    GET /v1/ws HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 203.0.113.66\r\n\r\n";
        wire.write(said.as_bytes()).await;
        assert_eq!(wire.http_answer().await.status, 426);
        let (_, headers) = edge.next().await;
        assert!(headers.contains(&"x-forwarded-for: 198.51.100.7".to_owned()), "{headers:?}");
        assert!(!headers.iter().any(|line| line.contains("203.0.113.66")), "{headers:?}");
    })
    .await;
}

#[tokio::test]
async fn the_upgrade_reaches_the_edge_as_it_was_asked_for() {
    within(30, "an upgrade's headers", async {
        let mut edge = Recorder::start().await;
        let nginx = Nginx::start(&[edge.address], &[]).await;
        let headers = [
            ("Sec-WebSocket-Protocol", "sanjay.v1.json"),
            ("Sec-WebSocket-Extensions", "permessage-deflate"),
            ("Origin", "https://app.example.com"),
            ("Authorization", "Bearer abc"),
        ];
        refused(&nginx.url(), &headers).await;
        let (_, seen) = edge.next().await;
        let asked = headers.iter().map(|(name, value)| format!("{name}: {value}").to_lowercase());
        for header in asked.chain(["upgrade: websocket", "connection: upgrade"].map(str::to_owned)) {
            assert!(seen.contains(&header), "{header} is missing: {seen:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn connections_to_one_edge_may_come_from_several_addresses() {
    within(30, "source addresses", async {
        let variant = "variants/source_addresses.conf";
        let options = NginxOptions::default()
            .copy(variant, "upstreams/source_addresses.conf")
            .edit("upstreams/source_addresses.conf", "172.31.250.50", "127.0.0.50")
            .edit("upstreams/source_addresses.conf", "172.31.250.51", "127.0.0.51");
        let mut edge = Recorder::start().await;
        let nginx = Nginx::start_with(options, &[edge.address], &[]).await;
        let mut sources = BTreeSet::new();
        while sources.len() < 2 {
            refused(&nginx.url(), &[]).await;
            sources.insert(edge.next().await.0.ip().to_string());
        }
        assert_eq!(sources.into_iter().collect::<Vec<_>>(), ["127.0.0.50", "127.0.0.51"]);
    })
    .await;
}

#[tokio::test]
async fn a_network_may_not_take_everything() {
    within(60, "limits", async {
        let cluster = Cluster::start().await;
        let options =
            trusting().edit("conf/websocket.conf", "limit_conn connections 5000", "limit_conn connections 3");
        let nginx = Nginx::before_with(options, &cluster).await;
        let from =
            async |address: &str| Wire::upgrade(&nginx.url(), None, &[("X-Forwarded-For", address)]).await;

        // Three connections at once, whatever addresses of its /64 it uses.
        for address in ["198.51.100.7", "2001:db8:1:2::1"] {
            let mut taken = Vec::new();
            for _ in 0..3 {
                taken.push(from(address).await.unwrap());
            }
            let answer = from(address).await.unwrap_err();
            assert_eq!((answer.status, answer.headers["retry-after"].as_str()), (429, "5"));
            assert!(answer.body.contains("too many connections"), "{answer:?}");
            let neighbour =
                from(if address.contains(':') { "2001:db8:1:2:3::4" } else { "::ffff:198.51.100.7" }).await;
            assert_eq!(neighbour.unwrap_err().status, 429);
            for other in ["198.51.100.8", "::ffff:198.51.100.9", "2001:db8:1:3::1"] {
                assert!(from(other).await.is_ok(), "{other}");
            }
            drop(taken.pop());
            eventually("a place is free again", PATIENCE, async || from(address).await.ok()).await;
        }
        let line = async || nginx.requests().into_iter().find(|line| line["status"] == 429);
        let line = eventually("its line is written", PATIENCE, line).await;
        assert_eq!(line["limit_connections"], "REJECTED");
    })
    .await;
}

#[tokio::test]
async fn a_network_may_not_come_again_and_again() {
    within(60, "the rate of handshakes", async {
        let cluster = Cluster::start().await;
        let options = NginxOptions::default().edit("conf/limits.conf", "rate=100r/s", "rate=1r/m").edit(
            "conf/websocket.conf",
            "burst=1000",
            "burst=4",
        );
        let nginx = Nginx::before_with(options, &cluster).await;
        for _ in 0..5 {
            Peer::connect(&nginx.url(), "ann").await.bye().await;
        }
        let answer = refused(&nginx.url(), &[]).await;
        assert_eq!((answer.status, answer.headers["retry-after"].as_str()), (429, "5"));
        let line = async || nginx.requests().into_iter().find(|line| line["status"] == 429);
        let line = eventually("its line is written", PATIENCE, line).await;
        assert_eq!(line["limit_handshakes"], "REJECTED");
        // Health checks are not handshakes.
        assert_eq!(Wire::get(&nginx.url().replace("/v1/ws", "/healthz")).await.status, 200);
    })
    .await;
}

#[tokio::test]
async fn only_the_path_of_the_protocol_leads_to_an_edge() {
    within(30, "paths", async {
        let mut edge = Recorder::start().await;
        let nginx = Nginx::start(&[edge.address], &[]).await;
        let base = nginx.url();
        let base = base.trim_end_matches("/v1/ws");
        for path in [
            "/",
            "/metrics",
            "/readyz",
            "/v1/ws/",
            "/v1/ws/../../metrics",
            "/v1/wsx",
            "//metrics",
            "/%2e%2e/metrics",
            "/status",
        ] {
            let answer = Wire::upgrade(base, Some(path), &[]).await.expect_err(path);
            assert!(matches!(answer.status, 400 | 404), "{path}: {answer:?}");
        }
        assert_eq!(Wire::get(&format!("{base}/healthz")).await.body, "ok\n");
        assert_eq!(Wire::get(&format!("{}/metrics", nginx.status())).await.status, 404);
        assert!(Wire::get(&format!("{}/status", nginx.status())).await.body.contains("Active connections"));
        // None of them reached the edge, this one does.
        assert_eq!(refused(&nginx.url(), &[]).await.status, 426);
        edge.next().await;
        assert!(edge.heads.try_recv().is_err());
    })
    .await;
}

#[tokio::test]
async fn a_head_that_nginx_takes_is_never_too_long_for_an_edge() {
    within(60, "long heads", async {
        let cluster = Cluster::start().await;
        let nginx = Nginx::before(&cluster).await;
        let (fits, large) = ("x".repeat(6_900), "x".repeat(7_300));
        for name in ["X-One", "Cookie"] {
            assert_eq!(refused(&nginx.url(), &[(name, &large)]).await.status, 400, "{name}");
            assert!(Wire::upgrade(&nginx.url(), None, &[(name, &fits)]).await.is_ok(), "{name}");
        }
        // All that nginx has room for: the first kilobyte and two buffers.
        let all = [("X-Zero", &fits[..500]), ("X-One", &fits), ("X-Two", &fits)];
        let answer = Wire::upgrade(&nginx.url(), None, &all).await;
        assert!(answer.is_ok(), "{:?}", answer.err());
        let more = [("X-One", &fits[..]), ("X-Two", &fits), ("X-Three", &fits)];
        assert_eq!(refused(&nginx.url(), &more).await.status, 400);
    })
    .await;
}

#[tokio::test]
async fn no_log_has_a_token() {
    within(60, "tokens in logs", async {
        let mut cluster = Cluster::start().await;
        let options = NginxOptions::default().edit("conf/limits.conf", "rate=100r/s", "rate=1r/m").edit(
            "conf/websocket.conf",
            "burst=1000",
            "burst=3",
        );
        let nginx = Nginx::before_with(options, &cluster).await;
        let path = "/v1/ws?token=SECRET-IN-QUERY";
        let headers = [("Authorization", "Bearer SECRET-IN-HEADER"), ("Cookie", "token=SECRET-IN-COOKIE")];
        let ask = async |path| Wire::upgrade(&nginx.url(), Some(path), &headers).await;
        let status = |answer: Result<Wire, HttpAnswer>| answer.map_or_else(|refused| refused.status, |_| 101);
        assert_eq!(status(ask(path).await), 101);
        assert_eq!(status(ask("/other?token=SECRET-IN-QUERY").await), 404);
        cluster.kill(sanjay_testkit::Role::Edge);
        assert_eq!(status(ask(path).await), 503);
        // An edge that goes away in the middle of a handshake.
        let listener =
            TcpListener::bind((Ipv4Addr::LOCALHOST, cluster.port(sanjay_testkit::Role::Edge))).await;
        let listener = listener.unwrap();
        let (answer, ()) = tokio::join!(ask(path), async {
            let (mut socket, _) = listener.accept().await.unwrap();
            let _ = socket.read_u8().await;
        });
        assert_eq!(status(answer), 503);
        drop(listener);
        assert_eq!(status(ask(path).await), 503);
        assert_eq!(status(ask(path).await), 429);
        let written = async || (nginx.requests().len() >= 6).then_some(());
        eventually("each has its line", PATIENCE, written).await;
        for log in [nginx.access_log(), nginx.log()] {
            assert!(!log.contains("SECRET") && !log.contains("?token"), "{log}");
        }
        let lines = nginx.requests();
        let statuses: Vec<_> = lines.iter().map(|line| line["status"].as_u64().unwrap()).collect();
        assert_eq!(statuses.iter().filter(|&&status| status == 503).count(), 3, "{statuses:?}");
        assert!(lines.iter().any(|line| line["upstream_status"] == "502"), "{lines:?}");
    })
    .await;
}

#[tokio::test]
async fn who_says_nothing_is_let_go() {
    within(30, "a stranger that says nothing", async {
        let options = NginxOptions::default()
            .edit("conf/limits.conf", "client_header_timeout 5s", "client_header_timeout 300ms")
            .edit("conf/websocket.conf", "keepalive_timeout 10s", "keepalive_timeout 300ms");
        let nginx = Nginx::start_with(options, &[], &[]).await;
        let address = nginx.url().replace("ws://", "").replace("/v1/ws", "");
        for said in ["", "GET /v1/ws HTTP/1.1\r\nHost:", "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"] {
            let mut socket = TcpStream::connect(&address).await.unwrap();
            socket.write_all(said.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            // A reset is an end, too.
            let _ = socket.read_to_end(&mut answer).await;
        }
    })
    .await;
}
