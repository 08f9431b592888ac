//! What back ends ask of connections, which are at two edges, each at a router of its own.

use std::time::Duration;

use sanjay_client::{
    ChannelEvent, Client, ConnectionEventKind, ConnectionStream, WatchConnectionsRequest, WatchedConnection,
    protocol::Payload,
};
use sanjay_testkit::{
    API_KEY, Cluster, Peer, Role, Sanjay, Token, backend, client_options, eventually, within,
};
use serde_json::{Value, json};
use tokio::time::timeout;

/// The longest that something takes that comes at once, with much to spare.
const LONG: Duration = Duration::from_secs(20);

/// Each edge at a router of its own, with all that is to be known of them known.
async fn two_of_each() -> Cluster {
    let settings = Cluster::builder().edges(2).routers(2).redis().set("router.lease_ms", 1_000);
    let mut cluster = settings.set("router.redis_timeout_ms", 300).start().await;
    eventually("the edges are at different routers", Duration::from_secs(60), async || {
        if cluster.router_of(0) == cluster.router_of(1) {
            cluster.restart((Role::Edge, 1)).await;
            return None;
        }
        Some(())
    })
    .await;
    let api = backend(&cluster.server()).await;
    eventually("all nodes are known", Duration::from_secs(60), async || {
        let nodes = api.list_nodes().await.unwrap();
        (nodes.complete && nodes.nodes.len() == 4).then_some(())
    })
    .await;
    cluster
}

/// A connection of the user at each edge, of which the first says who it is.
async fn at_both(cluster: &Cluster, user: &str) -> (Peer, Peer) {
    let urls = cluster.urls();
    let hello =
        json!({ "token": Token::of(user).sign(), "device": "phone", "client": "demo/1", "credit": 0 });
    (Peer::with_hello(&urls[0], hello).await, Peer::connect(&urls[1], user).await)
}

async fn event(peer: &mut Peer, kind: &str) -> Value {
    timeout(LONG, peer.event(kind)).await.unwrap_or_else(|_| panic!("{kind} comes in time"))
}

async fn closed(peer: &mut Peer) -> (u16, String) {
    timeout(LONG, peer.closed()).await.expect("it is closed in time")
}

#[tokio::test]
async fn connections_at_both_edges_are_listed_and_closed() {
    within(180, "the scenario", async {
        let cluster = two_of_each().await;
        let api = backend(&cluster.server()).await;
        let (mut phone, mut laptop) = at_both(&cluster, "bob").await;
        let mut other = Peer::connect(&cluster.urls()[1], "ann").await;
        phone.subscribe("news").await;
        let listed = api.list_connections("bob").await.unwrap();
        assert!(listed.complete);
        assert_eq!(listed.connections.len(), 2, "{listed:?}");
        // Times of two edges are compared to some hundredths of a second.
        let (of_phone, of_laptop): (Vec<_>, Vec<_>) =
            listed.connections.iter().partition(|found| found.session == phone.welcome["session"]);
        let said = (&*of_phone[0].device, &*of_phone[0].client, of_phone[0].channels);
        assert_eq!(said, ("phone", "demo/1", 1));
        assert_eq!((&*of_laptop[0].device, of_laptop[0].channels), ("", 0));
        assert_ne!(of_phone[0].edge, of_laptop[0].edge);

        // One alone, at the other edge than the one that the delivery node may have asked first.
        let session = laptop.welcome["session"].as_str().unwrap().to_owned();
        let answer = api.disconnect("bob", &session, "go away", false).await.unwrap();
        assert_eq!((answer.disconnected, answer.complete), (1, true));
        assert_eq!(closed(&mut laptop).await, (4403, "go away".to_owned()));
        let again = api.disconnect("bob", &session, "", false).await.unwrap_err();
        assert!(again.to_string().contains("no connection"), "{again}");

        let answer = api.disconnect("bob", "", "", true).await.unwrap();
        assert_eq!((answer.disconnected, answer.complete), (1, true));
        let goaway = event(&mut phone, "goaway").await;
        assert_eq!(
            (&goaway["code"], &goaway["reason"]),
            (&json!(1012), &json!("disconnected by the application"))
        );
        assert_eq!(closed(&mut phone).await.0, 1012);
        assert!(api.list_connections("bob").await.unwrap().connections.is_empty());
        let none = api.disconnect("bob", "", "", true).await.unwrap();
        assert_eq!((none.disconnected, none.complete), (0, true));
        assert!(other.is_quiet().await, "others stay");
    })
    .await;
}

#[tokio::test]
async fn a_back_end_subscribes_and_unsubscribes_a_user() {
    within(180, "the scenario", async {
        let cluster = two_of_each().await;
        let api = backend(&cluster.server()).await;
        // The token allows nothing: the back end does.
        let hello = json!({ "token": Token::of("bob").caps(&[]).sign(), "credit": 0 });
        let mut phone = Peer::with_hello(&cluster.urls()[0], hello).await;
        let mut laptop = Peer::connect(&cluster.urls()[1], "bob").await;
        laptop.subscribe("news").await;
        let answer = api.subscribe_user("bob", "news").await.unwrap();
        assert_eq!((answer.sessions, answer.subscribed, answer.refused, answer.complete), (2, 1, 0, true));
        assert_eq!(event(&mut phone, "subscribed").await["channel"], "news");
        api.publish("news", Payload::Text("hi".into()), "").await.unwrap();
        assert_eq!(event(&mut phone, "message").await["payload"]["text"], "hi");
        assert_eq!(event(&mut laptop, "message").await["payload"]["text"], "hi");
        assert_eq!(api.subscribe_user("bob", "news").await.unwrap().subscribed, 0, "it is there");

        let answer = api.unsubscribe_user("bob", "news", "", false).await.unwrap();
        assert_eq!((answer.sessions, answer.unsubscribed, answer.complete), (2, 2, true));
        let ended = json!({
            "channel": "news", "code": "forbidden", "reason": "unsubscribed by the application", "retryable": false,
        });
        assert_eq!(event(&mut phone, "unsubscribed").await, ended);
        assert_eq!(event(&mut laptop, "unsubscribed").await, ended);
        api.publish("news", Payload::Text("to nobody".into()), "").await.unwrap();
        assert!(phone.is_quiet().await && laptop.is_quiet().await);
        // The place is free again: the limits of the connection are kept.
        for channel in 0..256 {
            assert_eq!(api.subscribe_user("bob", &format!("c{channel}")).await.unwrap().subscribed, 2);
        }
        let full = api.subscribe_user("bob", "one more").await.unwrap();
        assert_eq!((full.sessions, full.subscribed, full.refused), (2, 0, 2));
        let command = json!({ "subscribe": { "channel": "another" } });
        assert_eq!(laptop.call(command.clone()).await["error"]["code"], "limit_exceeded");
        api.unsubscribe_user("bob", "c7", "", false).await.unwrap();
        assert!(laptop.call(command).await["subscribed"].is_object());
    })
    .await;
}

#[tokio::test]
async fn channels_are_listed_with_their_subscribers_in_pages() {
    within(180, "the scenario", async {
        let cluster = two_of_each().await;
        let api = backend(&cluster.server()).await;
        let (mut phone, mut laptop) = at_both(&cluster, "bob").await;
        for channel in ["b", "room:1", "room:2", "room:3"] {
            phone.subscribe(channel).await;
        }
        for channel in ["room:2", "room:4"] {
            laptop.subscribe(channel).await;
        }
        let mut found = Vec::new();
        let mut token = String::new();
        loop {
            let page = api.list_channels("room:", 2, &token).await.unwrap();
            assert!(page.complete && page.channels.len() <= 2);
            found.extend(page.channels.into_iter().map(|found| (found.channel, found.subscribers)));
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        let counts = [("room:1", 1), ("room:2", 2), ("room:3", 1), ("room:4", 1)];
        assert_eq!(found, counts.map(|(channel, count)| (channel.to_owned(), count)));
        assert_eq!(api.list_channels("", 0, "").await.unwrap().channels.len(), 5);
        assert!(api.list_channels("rooms", 0, "").await.unwrap().channels.is_empty());

        let nodes = api.list_nodes().await.unwrap();
        assert!(nodes.complete);
        let roles: Vec<_> = nodes.nodes.iter().map(|node| (&*node.role, node.connections)).collect();
        assert_eq!(roles, [("edge", 1), ("edge", 1), ("router", 1), ("router", 1)]);
    })
    .await;
}

#[tokio::test]
async fn a_broadcast_reaches_everyone_at_both_edges_once() {
    within(180, "the scenario", async {
        let cluster = two_of_each().await;
        let api = backend(&cluster.server()).await;
        let (mut phone, mut laptop) = at_both(&cluster, "bob").await;
        let client = Client::connect(client_options(&cluster.urls()[1], "ann", 1)).await.unwrap();
        client.connected().await.unwrap();
        let mut heard = client.broadcasts();
        let told = api.broadcast(Payload::Json(r#"{"maintenance":true}"#.into())).await.unwrap();
        assert_eq!((told.reached, told.passed_over, told.edges, told.complete), (3, 0, 2, true));
        for peer in [&mut phone, &mut laptop] {
            let broadcast = event(peer, "broadcast").await;
            assert_eq!(broadcast["message_id"], told.message_id);
            assert_eq!(broadcast["payload"], json!({ "json": { "maintenance": true } }));
            assert!(broadcast["time_us"].as_u64().unwrap() > 0);
            assert!(peer.is_quiet().await, "it comes once");
        }
        let broadcast = timeout(LONG, heard.recv()).await.unwrap().unwrap();
        assert_eq!(broadcast.message_id, told.message_id);
        assert!(heard.try_recv().is_err(), "it comes once");
    })
    .await;
}

#[tokio::test]
async fn an_edge_that_cannot_answer_makes_an_answer_incomplete() {
    within(180, "the scenario", async {
        let mut cluster = two_of_each().await;
        let api = backend(&cluster.server()).await;
        let (mut phone, _laptop) = at_both(&cluster, "bob").await;
        cluster.stop((Role::Edge, 1));
        let answer = api.disconnect("bob", "", "", false).await.unwrap();
        assert_eq!((answer.disconnected, answer.complete), (1, false));
        assert_eq!(closed(&mut phone).await.0, 4403);
        cluster.cont((Role::Edge, 1));
        eventually("the edge answers again", LONG, async || {
            api.list_connections("bob").await.unwrap().complete.then_some(())
        })
        .await;
        cluster.stop((Role::Router, 0));
        assert!(!api.list_nodes().await.unwrap().complete, "a router does not answer");
        cluster.cont((Role::Router, 0));
    })
    .await;
}

#[tokio::test]
async fn the_client_library_knows_what_a_back_end_ends() {
    within(120, "the scenario", async {
        let cluster = Cluster::start().await;
        let api = backend(&cluster.server()).await;
        let client = Client::connect(client_options(&cluster.url(), "bob", 1)).await.unwrap();
        let mut news = client.subscribe("news").await.unwrap();
        let subscribed = async |news: &mut sanjay_client::Subscription| {
            let event = timeout(LONG, news.next()).await.unwrap();
            assert!(matches!(event, Some(ChannelEvent::Subscribed { .. })), "{event:?}");
        };
        subscribed(&mut news).await;
        assert_eq!(api.unsubscribe_user("bob", "news", "for now", true).await.unwrap().unsubscribed, 1);
        subscribed(&mut news).await;
        assert_eq!(api.unsubscribe_user("bob", "news", "for good", false).await.unwrap().unsubscribed, 1);
        let Some(ChannelEvent::Unsubscribed(error)) = timeout(LONG, news.next()).await.unwrap() else {
            panic!("another event");
        };
        assert_eq!((error.message.as_str(), error.retryable), ("for good", false));
    })
    .await;
}

/// Runs a command against the cluster, and reads what it printed.
async fn command(cluster: &Cluster, arguments: &[&str]) -> Vec<Value> {
    let mut all = arguments.to_vec();
    let server = cluster.server();
    all.extend(["--json", "--server", &server, "--api-key", API_KEY]);
    let printed = Sanjay::new(all).run().await.succeeded();
    printed.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[tokio::test]
async fn the_command_line_lists_closes_and_revokes() {
    within(120, "the command line", async {
        let cluster = Cluster::builder().set("router.lease_ms", 1_000).start().await;
        let mut phone = Peer::connect(&cluster.url(), "bob").await;
        phone.subscribe("room:1").await;
        let session = phone.welcome["session"].as_str().unwrap().to_owned();
        let listed = command(&cluster, &["connections", "bob"]).await;
        assert_eq!((&listed[0]["session"], &listed[0]["channels"]), (&json!(session), &json!(1)));
        let channels = command(&cluster, &["channels", "room:"]).await;
        assert_eq!(channels, [json!({ "channel": "room:1", "subscribers": 1 })]);
        let roles: Vec<Value> =
            command(&cluster, &["nodes"]).await.iter().map(|node| node["role"].clone()).collect();
        assert_eq!(roles, ["edge", "router"]);

        let revoked = command(&cluster, &["revoke", "user", "bob", "--reason", "left"]).await;
        assert_eq!((&revoked[0]["kind"], &revoked[0]["caller"]), (&json!("user"), &json!("tests")));
        assert_eq!(closed(&mut phone).await.0, 4401);
        assert_eq!(command(&cluster, &["revoke", "list"]).await, revoked);
        assert_eq!(
            command(&cluster, &["revoke", "user", "bob", "--undo"]).await,
            [json!({ "undone": true })]
        );
        assert!(command(&cluster, &["revoke", "list"]).await.is_empty());

        let server = cluster.server();
        let api = ["--server", &server, "--api-key", API_KEY];
        let none = [&["revoke", "token", "t1", "--undo"][..], &api].concat();
        Sanjay::new(none).run().await.failed_with(&["not revoked"]);
        let mut laptop = Peer::connect(&cluster.url(), "ann").await;
        let text = Sanjay::new([&["connections", "ann"][..], &api].concat()).run().await.succeeded();
        assert!(text.contains(laptop.welcome["session"].as_str().unwrap()), "{text}");
        eventually("the router has been there for a lease", LONG, async || {
            let api = backend(&server).await;
            api.list_nodes().await.unwrap().complete.then_some(())
        })
        .await;
        let gone = command(&cluster, &["disconnect", "ann", "--reason", "enough"]).await;
        assert_eq!(gone, [json!({ "disconnected": 1, "complete": true })]);
        assert_eq!(closed(&mut laptop).await, (4403, "enough".to_owned()));
        let nobody = [&["disconnect", "ann", "--session", &session][..], &api].concat();
        Sanjay::new(nobody).run().await.failed_with(&["no connection with this session"]);
    })
    .await;
}

/// The next event, as its kind, its user and its channel. What may be missing when a stream begins is none.
async fn happened(stream: &mut ConnectionStream) -> (ConnectionEventKind, String, String) {
    loop {
        match timeout(LONG, stream.next()).await.expect("something happens").unwrap().unwrap() {
            WatchedConnection::Event(event) => return (event.kind(), event.user, event.channel),
            WatchedConnection::Missed(_) => {}
        }
    }
}

#[tokio::test]
async fn who_watches_sees_connections_come_and_go_and_an_edge_die() {
    use ConnectionEventKind::{Offline, Online, Subscribed, Unsubscribed};
    within(180, "watching", async {
        let mut cluster = two_of_each().await;
        let api = backend(&cluster.server()).await;
        let wanted = WatchConnectionsRequest { user: "bob".into(), ..WatchConnectionsRequest::default() };
        let mut stream = api.watch_connections(wanted).await.unwrap();
        let bob = |kind, channel: &str| (kind, "bob".to_owned(), channel.to_owned());
        for url in cluster.urls() {
            let _other = Peer::connect(&url, "ann").await;
            let mut phone = Peer::connect(&url, "bob").await;
            assert_eq!(happened(&mut stream).await, bob(Online, ""));
            phone.subscribe("news").await;
            assert_eq!(happened(&mut stream).await, bob(Subscribed, "news"));
            assert!(phone.call(json!({ "unsubscribe": { "channel": "news" } })).await["ok"].is_object());
            assert_eq!(happened(&mut stream).await, bob(Unsubscribed, "news"));
            api.subscribe_user("bob", "room").await.unwrap();
            assert_eq!(happened(&mut stream).await, bob(Subscribed, "room"));
            api.unsubscribe_user("bob", "room", "", false).await.unwrap();
            assert_eq!(happened(&mut stream).await, bob(Unsubscribed, "room"));
            phone.bye().await;
            assert_eq!(happened(&mut stream).await, bob(Offline, ""));
        }
        let _phone = Peer::connect(&cluster.urls()[1], "bob").await;
        assert_eq!(happened(&mut stream).await, bob(Online, ""));
        cluster.kill((Role::Edge, 1));
        assert_eq!(happened(&mut stream).await, bob(Offline, ""));
    })
    .await;
}

#[tokio::test]
async fn a_watcher_is_told_when_a_router_was_away() {
    within(180, "watching", async {
        let mut cluster = two_of_each().await;
        let api = backend(&cluster.server()).await;
        let mut stream = api.watch_connections(WatchConnectionsRequest::default()).await.unwrap();
        cluster.kill((Role::Router, 0));
        let missed = timeout(LONG, stream.next()).await.unwrap().unwrap().unwrap();
        assert!(matches!(missed, WatchedConnection::Missed(_)), "{missed:?}");
        cluster.restart((Role::Router, 0)).await;
        let wrong = WatchConnectionsRequest { kinds: vec![9], ..WatchConnectionsRequest::default() };
        let wrong = api.watch_connections(wrong).await.unwrap_err();
        assert!(wrong.to_string().contains("kinds has 9"), "{wrong}");
    })
    .await;
}
