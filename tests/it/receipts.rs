//! The log of receipts, lists of deliveries and live events, from outside. Each on a file and on MongoDB.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use sanjay_client::{
    Backend, BackendError, DeliveryEventKind, DeliveryState, ListDeliveriesRequest, Receipt, ReceiptFilter,
    ReceiptsRequest, SendOptions, WatchDeliveriesRequest, Watched, protocol::Payload,
};
use sanjay_testkit::{
    API_KEY, Cluster, ClusterBuilder, Finished, Peer, Role, Sanjay, backend, eventually, within,
};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::stores::{on_each_store, usual};

/// So long a receipt may take to be in the log, with much to spare.
const LONG: Duration = Duration::from_secs(30);

async fn send(cluster: &Cluster, user: &str, text: &str, options: &SendOptions) -> String {
    let sent = backend(&cluster.server()).await.send_with(&[user], Payload::Text(text.into()), options).await;
    sent.unwrap()[0].result.clone().unwrap().message_id
}

async fn cli(cluster: &Cluster, arguments: &[&str]) -> Finished {
    let command =
        Sanjay::new(arguments).env("SANJAY_SERVER", cluster.server()).env("SANJAY_API_KEY", API_KEY);
    command.run().await
}

fn lines(output: &str) -> Vec<Value> {
    output.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

/// The cursor that the command ends with.
fn cursor(finished: &Finished) -> String {
    let line = finished.stderr.lines().last().unwrap_or_default();
    line.strip_prefix("cursor: ").unwrap_or_else(|| panic!("no cursor: {finished:?}")).to_owned()
}

/// Reads the log with the command until it holds so many; gives its lines and where it ended.
async fn log_of(cluster: &Cluster, count: usize, arguments: &[&str]) -> (Vec<Value>, String) {
    let arguments = [&["receipts", "--json"], arguments].concat();
    eventually("the receipts are in the log", LONG, async || {
        let finished = cli(cluster, &arguments).await;
        assert_eq!(finished.code, Some(0), "{finished:?}");
        let found = lines(&finished.stdout);
        (found.len() >= count).then(|| (found, cursor(&finished)))
    })
    .await
}

#[tokio::test]
async fn every_end_is_in_the_log_and_in_the_list() {
    on_each_store(120, usual, async |cluster| {
        let plain = SendOptions::default();
        let (bob, carl) = ("bob", "carl");
        let collapse = SendOptions { collapse_key: "k".into(), ..SendOptions::default() };
        let replaced = send(&cluster, bob, "old", &collapse).await;
        let newer = send(&cluster, bob, "new", &collapse).await;
        let short = SendOptions { ttl: Some(Duration::from_millis(1)), ..SendOptions::default() };
        let expired = send(&cluster, bob, "short", &short).await;
        let broken = send(&cluster, carl, "broken", &plain).await;
        let open = send(&cluster, carl, "open", &plain).await;
        let later = SendOptions { deliver_at_us: Some(in_a_day()), ..plain };
        let scheduled = send(&cluster, carl, "later", &later).await;
        let mut peer = Peer::with_inbox(&cluster.url(), bob, 16).await;
        assert_eq!(peer.event("inbox").await["payload"]["text"], "new");
        peer.ack(2, 2).await;
        let mut peer = Peer::with_inbox(&cluster.url(), carl, 16).await;
        assert_eq!(peer.event("inbox").await["seq"], 1);
        peer.term(1, 1).await;

        let (all, end) = log_of(&cluster, 4, &[]).await;
        let ends: BTreeMap<&str, (&str, &str, &str)> = all
            .iter()
            .map(|receipt| {
                let text = |field: &str| receipt[field].as_str().unwrap_or_default();
                (text("message_id"), (text("user"), text("state"), text("reason")))
            })
            .collect();
        let expected = [
            (&replaced, (bob, "superseded", "")),
            (&newer, (bob, "acked", "")),
            (&expired, (bob, "expired", "")),
            (&broken, (carl, "dead", "terminated")),
        ];
        assert_eq!(ends, expected.map(|(id, end)| (id.as_str(), end)).into());
        assert_eq!(all.len(), 4);
        assert!(all.iter().all(|receipt| receipt["caller"] == "tests"), "{all:?}");
        let times: Vec<u64> = all.iter().map(|receipt| receipt["settled_us"].as_u64().unwrap()).collect();
        assert!(times.is_sorted(), "{times:?}");
        // From its end on there is nothing, until there is.
        let (none, same) = log_of(&cluster, 0, &["--cursor", &end]).await;
        assert_eq!(none, [json!(null); 0]);
        let mut peer = Peer::with_inbox(&cluster.url(), carl, 16).await;
        assert_eq!(peer.event("inbox").await["seq"], 2);
        peer.ack(2, 2).await;
        for from in [&end, &same] {
            let (one, _) = log_of(&cluster, 1, &["--cursor", from]).await;
            assert_eq!(one.iter().map(|one| &one["message_id"]).collect::<Vec<_>>(), [&json!(open)]);
        }
        let (some, _) = log_of(&cluster, 2, &["--user", bob, "--state", "acked", "--state", "expired"]).await;
        assert_eq!(some.len(), 2);

        let listed = cli(&cluster, &["deliveries", carl, "--json"]).await.succeeded();
        let listed = lines(&listed);
        let told: Vec<_> = listed.iter().map(|one| (&one["message_id"], &one["state"])).collect();
        let (scheduled, open, broken) = (json!(scheduled), json!(open), json!(broken));
        let states = [json!("scheduled"), json!("acked"), json!("dead")];
        assert_eq!(told, [(&scheduled, &states[0]), (&open, &states[1]), (&broken, &states[2])]);
        assert_eq!((&listed[0]["seq"], &listed[2]["reason"]), (&json!(0), &json!("terminated")));
        let table = cli(&cluster, &["deliveries", carl, "--limit", "1"]).await;
        assert!(table.stderr.contains("more follow"), "{table:?}");
        assert_eq!(table.succeeded().lines().count(), 2);
        let acked = cli(&cluster, &["deliveries", carl, "--state", "acked"]).await.succeeded();
        assert_eq!(acked.lines().count(), 2, "{acked}");
    })
    .await;
}

#[expect(clippy::disallowed_methods, reason = "the servers under test go by the machine's clock")]
fn in_a_day() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    (now + Duration::from_secs(86_400)).as_micros() as u64
}

/// What a follower read, and where it is.
#[derive(Default)]
struct Follower {
    receipts: Vec<Receipt>,
    cursor: String,
    /// How often its stream broke.
    broken: usize,
}

/// Follows the log, at the servers in turn, and begins again from its cursor whenever its stream breaks.
async fn follow(servers: Vec<Backend>, follower: Arc<Mutex<Follower>>) {
    for turn in 0.. {
        let api = &servers[turn % servers.len()];
        let cursor = follower.lock().unwrap().cursor.clone();
        let request = ReceiptsRequest { cursor, follow: true, ..ReceiptsRequest::default() };
        let Ok(mut stream) = api.receipts(request).await else { continue };
        while let Some(batch) = stream.next().await {
            let mut follower = follower.lock().unwrap();
            match batch {
                Ok(batch) => {
                    follower.receipts.extend(batch.receipts);
                    follower.cursor = batch.cursor;
                }
                Err(BackendError::StreamEnded(_)) => follower.broken += 1,
                Err(error) => panic!("{error:?}"),
            }
        }
    }
}

/// Sends to users who acknowledge, some of it out of order, while `disturb` breaks something.
async fn settled_under_load(
    mut cluster: Cluster,
    users: usize,
    each: u64,
    disturb: impl AsyncFnOnce(&mut Cluster, &dyn Fn() -> usize),
) {
    let follower = Arc::new(Mutex::new(Follower::default()));
    let mut tasks = JoinSet::new();
    let mut servers = Vec::new();
    for server in cluster.servers() {
        servers.push(backend(&server).await);
    }
    tasks.spawn(follow(servers.clone(), follower.clone()));
    let url = cluster.url();
    for user in 0..users {
        let (url, api) = (url.clone(), servers[user % servers.len()].clone());
        tasks.spawn(async move {
            let name = format!("user-{user}");
            let mut peer = Peer::with_inbox(&url, &name, 64).await;
            for n in 0..each {
                let text = Payload::Text(n.to_string());
                while !sent(&api, &name, text.clone(), &format!("key {n}")).await {}
                let message = peer.event("inbox").await;
                let seq = message["seq"].as_u64().unwrap();
                let ack = json!({ "ack": { "ranges": [[seq, seq]] } });
                peer.send(&ack).await;
            }
            // Until all of it is settled.
            peer.ack(1, each).await;
            std::future::pending::<()>().await;
        });
    }
    let total = users * each as usize;
    let count = || follower.lock().unwrap().receipts.len();
    disturb(&mut cluster, &count).await;
    eventually("all are in the log", Duration::from_secs(60), async || (count() >= total).then_some(()))
        .await;
    let end = follower.lock().unwrap().cursor.clone();
    let follower = std::mem::take(&mut *follower.lock().unwrap());
    tasks.abort_all();
    let ids: BTreeSet<&str> = follower.receipts.iter().map(|receipt| receipt.message_id.as_str()).collect();
    assert_eq!((follower.receipts.len(), ids.len()), (total, total), "each once");
    assert!(follower.broken > 0, "its stream never broke");
    assert!(follower.receipts.iter().all(|receipt| receipt.state() == DeliveryState::Acked));
    let api = backend(&cluster.server()).await;
    let mut listed = BTreeSet::new();
    for user in 0..users {
        let mut request =
            ListDeliveriesRequest { user: format!("user-{user}"), page_size: 7, ..Default::default() };
        loop {
            let page = api.list_deliveries(request.clone()).await.unwrap();
            assert!(page.deliveries.iter().all(|one| one.state() == DeliveryState::Acked));
            listed.extend(page.deliveries.into_iter().map(|one| one.message_id));
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                break;
            }
        }
    }
    assert!(listed.iter().map(String::as_str).eq(ids), "exactly what was settled");
    // Nothing comes after it, and from the beginning it is the same in the same order.
    let rest = whole(&api, ReceiptsRequest { cursor: end, ..Default::default() }).await;
    assert_eq!(rest, []);
    let again = whole(&api, ReceiptsRequest::default()).await;
    assert!(again == follower.receipts, "another order");
}

async fn sent(api: &Backend, user: &str, payload: Payload, key: &str) -> bool {
    match api.send(&[user], payload, key).await {
        Ok(results) => results[0].result.is_ok(),
        Err(_) => false,
    }
}

async fn whole(api: &Backend, request: ReceiptsRequest) -> Vec<Receipt> {
    let (mut all, mut stream) = (Vec::new(), api.receipts(request).await.unwrap());
    while let Some(batch) = stream.next().await {
        all.extend(batch.unwrap().receipts);
    }
    all
}

/// Kills the node twice, when a part of the receipts was read.
async fn kill_twice(cluster: &mut Cluster, count: &dyn Fn() -> usize, total: usize) {
    for part in [total / 5, total / 2] {
        eventually("some were read", Duration::from_secs(60), async || (count() >= part).then_some(())).await;
        cluster.kill(Role::Delivery);
        cluster.restart(Role::Delivery).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_of_a_file_misses_nothing_when_the_node_is_killed() {
    within(150, "kills on a file", async {
        let cluster = Cluster::builder().start().await;
        settled_under_load(cluster, 8, 60, async |cluster, count| kill_twice(cluster, count, 8 * 60).await)
            .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_of_mongodb_misses_nothing_when_the_node_is_killed() {
    within(150, "kills on MongoDB", async {
        let cluster = Cluster::builder().mongo().start().await;
        settled_under_load(cluster, 8, 60, async |cluster, count| kill_twice(cluster, count, 8 * 60).await)
            .await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cursor_is_good_at_every_node() {
    within(150, "two delivery nodes", async {
        let cluster = Cluster::builder().deliveries(2).redis().mongo().start().await;
        settled_under_load(cluster, 8, 60, async |cluster, count| {
            for node in [0, 1] {
                let part = (node + 1) * 8 * 60 / 4;
                eventually("some were read", Duration::from_secs(60), async || {
                    (count() >= part).then_some(())
                })
                .await;
                cluster.kill((Role::Delivery, node));
                cluster.restart((Role::Delivery, node)).await;
            }
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn events_tell_what_happens_at_the_node() {
    let settings =
        |builder: ClusterBuilder| builder.set("delivery.max_attempts", 3).set("delivery.max_unsettled", 5);
    on_each_store(90, settings, async |cluster| {
        let api = backend(&cluster.server()).await;
        let request = WatchDeliveriesRequest { user: "bob".into(), ..WatchDeliveriesRequest::default() };
        let mut bobs = api.watch_deliveries(request).await.unwrap();
        let kinds = vec![DeliveryEventKind::InboxFilling.into(), DeliveryEventKind::Acked.into()];
        let mut others =
            api.watch_deliveries(WatchDeliveriesRequest { kinds, ..Default::default() }).await.unwrap();
        let mut peer = Peer::with_inbox(&cluster.url(), "bob", 16).await;
        let id = send(&cluster, "bob", "poison", &SendOptions::default()).await;
        for delivery in 1..=3 {
            let message = tokio::time::timeout(LONG, peer.event("inbox")).await.unwrap();
            assert_eq!(message["delivery"], delivery);
            peer.nak(1, delivery, 0).await;
        }
        use DeliveryEventKind::{Accepted, Dead, Exhausted, Failing, Relayed, Written};
        let mut seen = Vec::new();
        while seen.last() != Some(&Exhausted) {
            let next = tokio::time::timeout(LONG, bobs.next()).await.expect("an event in time");
            let Some(Ok(Watched::Event(event))) = next else { panic!("{next:?}") };
            assert_eq!((event.user.as_str(), event.message_id.as_str()), ("bob", id.as_str()), "{event:?}");
            assert!(event.seq <= 1 && event.time_us > 0, "{event:?}");
            seen.push(event.kind());
        }
        assert_eq!(seen[0], Accepted);
        for kind in [Relayed, Written, Failing, Exhausted] {
            assert!(seen.contains(&kind), "no {kind:?}: {seen:?}");
        }
        assert!(!seen.contains(&Dead), "{seen:?}");
        let mut peer = Peer::with_inbox(&cluster.url(), "eve", 0).await;
        for n in 0..5 {
            send(&cluster, "eve", &n.to_string(), &SendOptions::default()).await;
        }
        let next = tokio::time::timeout(LONG, others.next()).await.expect("an event in time");
        let Some(Ok(Watched::Event(event))) = next else { panic!("{next:?}") };
        assert_eq!((event.kind(), event.user.as_str()), (DeliveryEventKind::InboxFilling, "eve"));
        assert!(event.detail.starts_with("4 messages"), "{event:?}");
        assert!(peer.is_quiet().await);
        let mut peer = Peer::with_inbox(&cluster.url(), "eve", 16).await;
        assert_eq!(peer.event("inbox").await["seq"], 1);
        peer.ack(1, 1).await;
        let next = tokio::time::timeout(LONG, others.next()).await.expect("an event in time");
        let Some(Ok(Watched::Event(event))) = next else { panic!("{next:?}") };
        assert_eq!((event.kind(), event.seq, event.caller.as_str()), (DeliveryEventKind::Acked, 1, "tests"));
    })
    .await;
}

#[tokio::test]
async fn the_commands_follow_and_stop() {
    within(90, "sanjay receipts --follow and sanjay tail", async {
        let cluster = Cluster::builder().start().await;
        let run = |arguments: &[&str]| {
            let command = Sanjay::new(arguments).env("SANJAY_SERVER", cluster.server());
            command.env("SANJAY_API_KEY", API_KEY).spawn()
        };
        let mut following = run(&["receipts", "--follow", "--json", "--user", "bob"]);
        let mut tailing = run(&["tail", "--kind", "acked", "--kind", "accepted", "--json"]);
        eventually("tail watches", LONG, async || tailing.stderr().contains("watching").then_some(())).await;
        let ids = [
            send(&cluster, "bob", "one", &SendOptions::default()).await,
            send(&cluster, "bob", "two", &SendOptions::default()).await,
        ];
        let mut peer = Peer::with_inbox(&cluster.url(), "bob", 16).await;
        assert_eq!(peer.event("inbox").await["seq"], 1);
        peer.ack(1, 2).await;
        eventually("both are told", LONG, async || {
            (following.stdout().lines().count() == 2 && tailing.stdout().lines().count() == 4).then_some(())
        })
        .await;
        let told: Vec<Value> = lines(&following.stdout());
        assert_eq!(told.iter().map(|one| one["message_id"].as_str().unwrap()).collect::<Vec<_>>(), ids);
        for process in [&mut following, &mut tailing] {
            process.signal(15);
            let end = eventually("it ends", LONG, async || process.ended()).await;
            assert_eq!(end.code(), Some(0));
        }
        let line = following.stderr().lines().last().unwrap_or_default().to_owned();
        let from = line.strip_prefix("cursor: ").unwrap_or_else(|| panic!("no cursor: {line}"));
        let rest = cli(&cluster, &["receipts", "--cursor", from, "--json"]).await;
        assert_eq!(rest.succeeded(), "");
    })
    .await;
}

#[tokio::test]
async fn the_commands_teach_when_something_is_wrong() {
    on_each_store(60, usual, async |cluster| {
        let cases: [(&[&str], i32, &[&str]); 9] = [
            (&["receipts", "--cursor", "7"], 1, &["cursor is not one that this server gave"]),
            (&["receipts", "--cursor", "7", "--from-now", "--follow"], 2, &["--from-now"]),
            (&["receipts", "--from-now"], 2, &["--follow"]),
            (&["receipts", "--state", "accepted"], 2, &["acked", "expired", "superseded", "dead"]),
            (&["receipts", "--user", ""], 1, &["user is empty"]),
            (&["deliveries"], 2, &["<USER>"]),
            (&["deliveries", "bob", "--limit", "0"], 2, &["--limit"]),
            (&["tail", "--kind", "lost"], 2, &["accepted", "inbox_filling"]),
            (&["tail", "--caller", "a\u{1}"], 1, &["U+0001"]),
        ];
        for (arguments, code, texts) in cases {
            let finished = cli(&cluster, arguments).await;
            assert_eq!(finished.code, Some(code), "{arguments:?}: {finished:?}");
            finished.failed_with(texts);
            assert!(
                !finished.stderr.contains("cursor: "),
                "a refused cursor is none to go on from: {finished:?}"
            );
        }
        let api = backend(&cluster.server()).await;
        let filter = |states: Vec<i32>| Some(ReceiptFilter { states, ..ReceiptFilter::default() });
        for (request, text) in [
            (
                ReceiptsRequest { filter: filter(vec![1]), ..Default::default() },
                "filter.states has 1; it may have ACKED (2)",
            ),
            (ReceiptsRequest { filter: filter(vec![9]), ..Default::default() }, "filter.states has 9"),
            (ReceiptsRequest { cursor: "0".into(), from_now: true, ..Default::default() }, "both set"),
        ] {
            let error = api.receipts(request).await.unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
        let request = ListDeliveriesRequest { user: "bob".into(), page_size: 257, ..Default::default() };
        assert!(api.list_deliveries(request).await.unwrap_err().to_string().contains("1 to 256"));
        let request = WatchDeliveriesRequest { kinds: vec![12], ..Default::default() };
        assert!(api.watch_deliveries(request).await.unwrap_err().to_string().contains("kinds has 12"));
    })
    .await;
}
