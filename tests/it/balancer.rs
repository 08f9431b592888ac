//! nginx with the project's configuration in front of real edges: who goes where, what a dead or a full edge costs, and
//! that the edge ends dead connections, not nginx.

use std::{collections::BTreeMap, time::Duration};

use sanjay_testkit::{
    Cluster, End, HttpAnswer, Opcode, Peer, Role, Token, Wire, eventually,
    servers::{Nginx, NginxOptions},
    within,
};
use serde_json::json;
use tokio::time::Instant;

const CLIENTS: usize = 90;

/// How many of them an edge of three may have. A fair edge has 30 ± 5, four times that is never seen.
const FAIR: std::ops::RangeInclusive<usize> = 10..=50;

/// How long clients of a dead edge may be without another.
const MOVE: Duration = Duration::from_secs(5);

/// The project's configuration, which beside its cookie says which edges were tried.
pub(crate) fn telling() -> NginxOptions {
    let cookie = "add_header Set-Cookie $sticky_cookie always;";
    let tell = format!("{cookie} add_header X-Edge $upstream_addr always;");
    NginxOptions::default().edit("conf/websocket.conf", cookie, &tell)
}

/// A client that keeps its cookie.
pub(crate) struct Client {
    pub(crate) peer: Peer,
    /// The cookie that it has, such as `sanjay_lb=…`.
    pub(crate) cookie: String,
    /// The port of its edge.
    pub(crate) edge: u16,
}

impl Client {
    pub(crate) async fn new(nginx: &Nginx) -> Self {
        let client = Self::try_new(nginx, None).await;
        client.unwrap_or_else(|answer| panic!("refused: {answer:?}"))
    }

    pub(crate) async fn try_new(nginx: &Nginx, cookie: Option<String>) -> Result<Self, HttpAnswer> {
        let mut headers = vec![("Sec-WebSocket-Protocol", "sanjay.v1.json")];
        headers.extend(cookie.as_deref().map(|cookie| ("Cookie", cookie)));
        let wire = Wire::upgrade(&nginx.url(), None, &headers).await?;
        let given = wire.header("set-cookie").map(|given| given.split(';').next().unwrap().to_owned());
        let tried = wire.header("x-edge").unwrap();
        let edge = tried.rsplit(':').next().unwrap().parse().unwrap();
        let hello = json!({ "token": Token::of("ann").sign(), "credit": 0 });
        let peer = Peer::try_over(wire, hello).await.unwrap();
        Ok(Self { peer, cookie: given.or(cookie).expect("a cookie is given or kept"), edge })
    }

    /// Leaves as a client that is done, and comes back.
    async fn reconnect(self, nginx: &Nginx) -> Self {
        self.peer.bye().await;
        Self::try_new(nginx, Some(self.cookie)).await.unwrap_or_else(|answer| panic!("refused: {answer:?}"))
    }

    /// Reconnects, and says whether it has another edge now.
    pub(crate) async fn moves(self, nginx: &Nginx) -> (Self, bool) {
        let before = self.edge;
        let after = self.reconnect(nginx).await;
        let moved = after.edge != before;
        (after, moved)
    }
}

/// How many clients each edge has.
pub(crate) fn spread<'a>(clients: impl IntoIterator<Item = &'a Client>) -> BTreeMap<u16, usize> {
    let mut spread = BTreeMap::new();
    clients.into_iter().for_each(|client| *spread.entry(client.edge).or_default() += 1);
    spread
}

#[tokio::test]
async fn clients_come_back_to_their_edge_and_only_those_of_a_dead_one_move() {
    within(120, "90 clients over 3 edges", async {
        let mut cluster = Cluster::builder().edges(3).start().await;
        let nginx = Nginx::before_with(telling(), &cluster).await;
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(Client::new(&nginx).await);
        }
        let first = spread(&clients);
        println!("clients of each edge: {first:?}");
        assert!(first.len() == 3 && first.values().all(|count| FAIR.contains(count)), "{first:?}");
        let mut returned = Vec::new();
        for client in clients {
            let (client, moved) = client.moves(&nginx).await;
            assert!(!moved, "a cookie leads to the same edge");
            returned.push(client);
        }

        // One edge dies. Nobody else notices.
        let dead = cluster.port((Role::Edge, 1));
        let (mut orphans, mut others): (Vec<_>, Vec<_>) =
            returned.into_iter().partition(|client| client.edge == dead);
        cluster.kill((Role::Edge, 1));
        for client in &mut others {
            assert!(client.peer.is_quiet().await);
        }
        let began = Instant::now();
        let mut moved = Vec::new();
        for mut client in orphans.drain(..) {
            assert!(matches!(client.peer.next().await, Err(End::Lost(_))));
            let client = Client::try_new(&nginx, Some(client.cookie)).await;
            moved.push(client.unwrap_or_else(|answer| panic!("not moved: {answer:?}")));
        }
        println!(
            "{} clients have another edge after {:?}: {:?}",
            moved.len(),
            began.elapsed(),
            spread(&moved)
        );
        assert!(began.elapsed() < MOVE);
        assert!(spread(&moved).len() == 2, "they spread over both others: {:?}", spread(&moved));
        let mut stayed = Vec::new();
        for client in others {
            let (client, moved) = client.moves(&nginx).await;
            assert!(!moved, "the death of one edge moves no client of another");
            stayed.push(client);
        }

        // It comes back: its clients go home, at once and all of them.
        cluster.restart((Role::Edge, 1)).await;
        for client in moved {
            assert_eq!(client.reconnect(&nginx).await.edge, dead);
        }
        for client in stayed {
            assert!(!client.moves(&nginx).await.1);
        }
    })
    .await;
}

#[tokio::test]
async fn a_made_up_cookie_is_replaced_and_says_nothing_to_the_edge() {
    within(60, "cookies", async {
        let cluster = Cluster::builder().edges(3).start().await;
        let nginx = Nginx::before(&cluster).await;
        let good = "0123456789abcdef0123456789abcdef";
        for (cookie, replaced) in [
            ("sanjay_lb=edge-1", true),
            ("sanjay_lb=", true),
            ("other=1", true),
            (&format!("sanjay_lb={}", good.to_uppercase()), true),
            (&format!("sanjay_lb={good}0"), true),
            (&format!("a=b; sanjay_lb={good}; c=d"), false),
        ] {
            let wire = Wire::upgrade(&nginx.url(), None, &[("Cookie", cookie)]).await.unwrap();
            let given = wire.header("set-cookie");
            assert_eq!(given.is_some(), replaced, "{cookie}: {given:?}");
            if let Some(given) = given {
                let (key, attributes) =
                    given.strip_prefix("sanjay_lb=").and_then(|rest| rest.split_once("; ")).unwrap();
                assert!(key.len() == 32 && key.bytes().all(|b| b.is_ascii_hexdigit()), "{given}");
                assert_eq!(attributes, "Path=/; Max-Age=86400; HttpOnly; SameSite=Lax");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn who_finds_an_edge_full_or_gone_gets_another_until_there_is_none() {
    within(90, "full edges", async {
        let mut cluster = Cluster::builder().edges(3).set("edge.max_connections", 5).start().await;
        let nginx = Nginx::before_with(telling(), &cluster).await;
        let mut clients = Vec::new();
        for _ in 0..15 {
            clients.push(Client::new(&nginx).await);
        }
        assert!(spread(&clients).values().all(|&count| count == 5), "{:?}", spread(&clients));
        let Err(full) = Client::try_new(&nginx, None).await else { panic!("there is no room") };
        assert_eq!((full.status, full.headers["retry-after"].as_str()), (503, "5"));
        assert!(full.body.contains("no room"), "{full:?}");

        // Each place that becomes free is found.
        let left = clients.remove(7);
        left.peer.bye().await;
        eventually("there is room again", MOVE, async || Client::try_new(&nginx, None).await.ok()).await;

        drop(clients);
        for edge in 0..3 {
            let found = Client::try_new(&nginx, None);
            let found = within(5, "a client while an edge is left", found).await;
            assert!(found.is_ok(), "{:?}", found.err());
            cluster.kill((Role::Edge, edge));
        }
        let Err(gone) = Client::try_new(&nginx, None).await else { panic!("nobody is there") };
        assert_eq!((gone.status, gone.headers["retry-after"].as_str()), (503, "5"));
        assert_eq!(gone.body, "no edge can be reached; try again in a few seconds\n");
    })
    .await;
}

/// The project's configuration with other times for silence.
fn silence(limit: &str) -> NginxOptions {
    NginxOptions::default()
        .edit("conf/websocket.conf", "proxy_read_timeout 75s", &format!("proxy_read_timeout {limit}"))
        .edit("conf/websocket.conf", "proxy_send_timeout 75s", &format!("proxy_send_timeout {limit}"))
}

/// A cluster whose edge lets a connection be silent for so long.
async fn beating(heartbeat_ms: u64, grace_ms: u64) -> Cluster {
    let builder = Cluster::builder().set("edge.heartbeat_ms", heartbeat_ms);
    builder.set("edge.heartbeat_grace_ms", grace_ms).start().await
}

#[tokio::test]
async fn a_client_that_only_answers_pings_stays_while_the_times_follow_their_rule() {
    within(60, "a silent client", async {
        // 700 ms together, and nginx waits a second; the client says nothing for four.
        let cluster = beating(400, 300).await;
        let nginx = Nginx::before_with(silence("1s"), &cluster).await;
        let mut peer = Peer::connect(&nginx.url(), "ann").await;
        let mut pings = 0;
        while pings < 10 {
            let frame = peer.wire.next().await.unwrap();
            if frame.opcode == Opcode::Ping {
                pings += 1;
                peer.wire.send(Opcode::Pong, &frame.payload).await;
            }
        }
        assert!(peer.is_quiet().await);
        // Dead clients are closed by the edge, with its code.
        peer.answers = (false, false);
        assert_eq!(peer.closed().await.0, 4408);

        // Against the rule, nginx cuts a healthy client.
        let slow = beating(5_000, 5_000).await;
        let hasty = Nginx::before_with(silence("500ms"), &slow).await;
        let mut peer = Peer::connect(&hasty.url(), "ann").await;
        assert!(matches!(peer.next().await, Err(End::Lost(_))));
    })
    .await;
}

#[tokio::test]
async fn a_websocket_is_logged_when_it_closes_with_how_long_it_lasted() {
    within(60, "the access log", async {
        let cluster = beating(200, 300).await;
        let nginx = Nginx::before(&cluster).await;
        let mut peer = Peer::connect(&nginx.url(), "ann").await;
        // A second, as the edge counts it.
        for _ in 0..5 {
            while peer.wire.next().await.unwrap().opcode != Opcode::Ping {}
            peer.wire.send(Opcode::Text, b"{}").await;
        }
        assert!(nginx.requests().iter().all(|line| line["path"] != "/v1/ws"), "it is not over");
        peer.bye().await;
        let line = eventually("its line is written", MOVE, async || {
            nginx.requests().into_iter().find(|line| line["path"] == "/v1/ws")
        })
        .await;
        assert_eq!((&line["kind"], &line["status"]), (&json!("websocket"), &json!(101)));
        assert!(line["seconds"].as_f64().is_some_and(|seconds| (0.8..30.0).contains(&seconds)), "{line}");
        assert_eq!(line["upstream"], format!("127.0.0.1:{}", cluster.port(Role::Edge)));
        assert!(line["sent"].as_u64().unwrap() > 100 && line["client"] == "127.0.0.1", "{line}");
    })
    .await;
}
