//! Durable publications: each member of a channel has each of them once, in their order, whoever is killed meanwhile. On a
//! file and on MongoDB.

use std::time::Duration;

use futures::{StreamExt, stream};
use sanjay_client::{Backend, BackendError, DeliveryState, PublishOptions, protocol::Payload};
use sanjay_testkit::{
    API_KEY, Cluster, ClusterBuilder, Finished, Peer, Role, Sanjay, backend, eventually, within,
};
use serde_json::{Value, json};

use crate::stores::{metric, on_each_store, usual};

const MEMBERS: usize = 10_000;

/// Most calls that a test makes at once.
const CALLS: usize = 64;

/// How long it may take until a publication is in all inboxes, with much to spare.
const LONG: Duration = Duration::from_secs(120);

fn text(text: &str) -> Payload {
    Payload::Text(text.to_owned())
}

fn keyed(key: &str) -> PublishOptions {
    PublishOptions { dedupe_key: key.to_owned(), ..PublishOptions::default() }
}

fn users(count: usize) -> Vec<String> {
    (0..count).map(|n| format!("user-{n:05}")).collect()
}

async fn join(api: &Backend, users: &[String]) {
    for some in users.chunks(1_000) {
        let some: Vec<&str> = some.iter().map(String::as_str).collect();
        assert_eq!(api.join("news", &some).await.unwrap().joined, some.len() as u64);
    }
}

/// Waits until nothing is left to be put into inboxes.
async fn finished(cluster: &Cluster, publications: u64) {
    eventually("all publications are finished", LONG, async || {
        let mut count = 0;
        for node in cluster.nodes().into_iter().filter(|node| node.role == Role::Delivery) {
            let page = sanjay_testkit::Wire::get(&format!("{}/metrics", cluster.admin(node))).await.body;
            let name = "sanjay_delivery_finished_publications_total ";
            let line = page.lines().find_map(|line| line.strip_prefix(name));
            count += line.map_or(0, |value| value.parse().unwrap_or(0));
        }
        (count >= publications).then_some(())
    })
    .await;
}

/// Where a user has a publication.
async fn seq_of(api: &Backend, user: &str, message_id: &str) -> Option<u64> {
    let found = api.get_delivery(user, message_id).await.unwrap()?;
    assert_eq!(found.state(), DeliveryState::Accepted, "{user}");
    Some(found.seq)
}

/// Every member has so many messages as there are publications, and those that are looked at, one of so many, have the
/// publications in their order.
async fn all_have(api: &Backend, users: &[String], publications: &[String], looked_at: usize) {
    let checks = stream::iter(users.iter().step_by(looked_at)).map(|user| async move {
        for (message_id, expected) in publications.iter().zip(1..) {
            assert_eq!(seq_of(api, user, message_id).await, Some(expected), "{user}");
        }
    });
    checks.buffer_unordered(CALLS).collect::<Vec<()>>().await;
    // What comes next has the next seq: so there was nothing more.
    let mut checked = 0;
    for some in users.chunks(1_000) {
        let some: Vec<&str> = some.iter().map(String::as_str).collect();
        for sent in api.send(&some, text("last"), "last").await.unwrap() {
            let seq = sent.result.unwrap().seq;
            assert_eq!(seq, publications.len() as u64 + 1, "{}", sent.user);
            checked += 1;
        }
    }
    assert_eq!(checked, users.len());
}

/// Publishes although the server is killed, and comes back.
async fn publish(api: Backend, name: &'static str) -> String {
    let begun = tokio::time::Instant::now();
    loop {
        match api.publish_durable("news", text(name), &keyed(name)).await {
            Ok(published) => return published.message_id,
            Err(error) => {
                assert!(!matches!(error, BackendError::Refused(_)) && begun.elapsed() < LONG, "{error}");
            }
        }
    }
}

/// The delivery node dies at `point` while it puts the first of two publications into inboxes, and is killed again later.
async fn survives(builder: ClusterBuilder, members: usize, looked_at: usize, point: &str) {
    let builder = builder.env(Role::Delivery, "SANJAY_FAILPOINT", point);
    let mut cluster = builder.start().await;
    let users = users(members);
    let api = backend(&cluster.server()).await;
    join(&api, &users).await;
    let publishing = tokio::spawn({
        let api = api.clone();
        async move {
            let first = publish(api.clone(), "first").await;
            (first, publish(api, "second").await)
        }
    });
    let status = cluster.process(Role::Delivery).wait(LONG).await;
    assert!(!status.success(), "{status}");
    cluster.forget_environment(Role::Delivery);
    cluster.restart(Role::Delivery).await;
    let (first, second) = publishing.await.unwrap();
    // Somewhere in the rest.
    eventually("a part of the rest is done", LONG, async || {
        (metric(&cluster, Role::Delivery, "sanjay_delivery_fanned_out_total").await > members as u64 / 5)
            .then_some(())
    })
    .await;
    cluster.kill(Role::Delivery);
    cluster.restart(Role::Delivery).await;
    let api = backend(&cluster.server()).await;
    eventually("the last publication is there", LONG, async || {
        let last = users.last().expect("there are users");
        api.get_delivery(last, &second).await.unwrap().map(drop)
    })
    .await;
    all_have(&api, &users, &[first, second], looked_at).await;
}

#[tokio::test]
async fn a_node_that_dies_half_way_leaves_nobody_out_on_a_file() {
    within(300, "10,000 members on a file", async {
        survives(Cluster::builder(), MEMBERS, 1, "delivery.fan_out=abort@7").await;
    })
    .await;
}

#[tokio::test]
async fn a_node_that_dies_half_way_leaves_nobody_out_on_mongodb() {
    within(300, "10,000 members on MongoDB", async {
        survives(Cluster::builder().mongo(), MEMBERS, 10, "delivery.fan_out_noted=abort@7").await;
    })
    .await;
}

#[tokio::test]
async fn a_node_that_dies_within_a_page_doubles_nothing() {
    within(300, "3,000 members on MongoDB, within a page", async {
        survives(Cluster::builder().mongo(), 3_000, 10, "delivery.before_relay=abort@1210").await;
    })
    .await;
}

#[tokio::test]
async fn two_nodes_put_publications_of_both_into_inboxes_once() {
    within(300, "two delivery nodes", async {
        let mut cluster = Cluster::builder().deliveries(2).mongo().start().await;
        let servers = cluster.servers();
        let (one, two) = (backend(&servers[0]).await, backend(&servers[1]).await);
        let users: Vec<String> = users(2_000);
        join(&one, &users).await;
        let mut ids = Vec::new();
        for (n, api) in [&one, &two, &one, &two].into_iter().enumerate() {
            let published =
                api.publish_durable("news", text("x"), &keyed(&format!("key-{n}"))).await.unwrap();
            assert_eq!((published.publication, published.members), (n as u64 + 1, 2_000));
            ids.push(published.message_id);
        }
        // The same key at the other node is the same publication.
        let again = one.publish_durable("news", text("x"), &keyed("key-3")).await.unwrap();
        assert_eq!((again.publication, again.duplicate, &again.message_id), (4, true, &ids[3]));
        cluster.kill((Role::Delivery, 1));
        eventually("the last publication is there", LONG, async || {
            one.get_delivery("user-01999", &ids[3]).await.unwrap().map(drop)
        })
        .await;
        all_have(&one, &users, &ids, 10).await;
        cluster.restart((Role::Delivery, 1)).await;
    })
    .await;
}

/// Runs the binary as a back end.
async fn run(cluster: &Cluster, arguments: &[&str]) -> Finished {
    let command =
        Sanjay::new(arguments).env("SANJAY_SERVER", cluster.server()).env("SANJAY_API_KEY", API_KEY);
    command.run().await
}

async fn answer(cluster: &Cluster, arguments: &[&str]) -> Value {
    let output = run(cluster, arguments).await.succeeded();
    serde_json::from_str(&output).unwrap_or_else(|error| panic!("{error}: {output}"))
}

#[tokio::test]
async fn members_at_the_time_get_it_online_or_not() {
    on_each_store(90, usual, async |cluster| {
        let joined = answer(&cluster, &["members", "join", "news", "ann", "bob", "leaves"]).await;
        assert_eq!(joined, json!({ "joined": 3, "members": 3 }));
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        let first = answer(&cluster, &["pub", "--durable", "news", "first"]).await;
        assert_eq!((&first["publication"], &first["members"]), (&json!(1), &json!(3)));
        let left = answer(&cluster, &["members", "leave", "news", "leaves", "nobody"]).await;
        assert_eq!(left, json!({ "left": 1, "members": 2 }));
        assert_eq!(answer(&cluster, &["members", "join", "news", "late"]).await["joined"], 1);
        let listed = run(&cluster, &["members", "list", "news"]).await.succeeded();
        assert_eq!(listed, "ann\nbob\nlate\n");
        let second = answer(&cluster, &["pub", "--durable", "news", "second", "--ttl", "1h"]).await;
        // Who is there gets them at once, who is not when he comes.
        for (seq, body) in [(1, "first"), (2, "second")] {
            let message = ann.event("inbox").await;
            assert_eq!((&message["seq"], &message["payload"]["text"]), (&json!(seq), &json!(body)));
            ann.ack(seq, seq).await;
        }
        assert!(ann.is_quiet().await, "and not as channel messages, too");
        let api = backend(&cluster.server()).await;
        finished(&cluster, 2).await;
        let id = |published: &Value| published["message_id"].as_str().unwrap().to_owned();
        let state = async |user: &str, published: &Value| {
            api.get_delivery(user, &id(published)).await.unwrap().map(|found| found.state())
        };
        assert_eq!(state("ann", &first).await, Some(DeliveryState::Acked));
        assert_eq!(state("leaves", &first).await, Some(DeliveryState::Accepted));
        assert_eq!(state("leaves", &second).await, None);
        assert_eq!(state("late", &first).await, None);
        let mut late = Peer::with_inbox(&cluster.url(), "late", 64).await;
        let message = late.event("inbox").await;
        assert_eq!((&message["seq"], &message["payload"]["text"]), (&json!(1), &json!("second")));
        let mut bob = Peer::with_inbox(&cluster.url(), "bob", 64).await;
        assert_eq!(bob.event("inbox").await["payload"]["text"], "first");
        assert_eq!(bob.event("inbox").await["payload"]["text"], "second");
        for (name, expected) in
            [("durable_publications_total", 2), ("finished_publications_total", 2), ("fanned_out_total", 6)]
        {
            let name = format!("sanjay_delivery_{name}");
            assert_eq!(metric(&cluster, Role::Delivery, &name).await, expected, "{name}");
        }
    })
    .await;
}

#[tokio::test]
async fn wrong_calls_are_named() {
    let few = |builder: ClusterBuilder| builder.set("delivery.max_members", 3);
    on_each_store(60, few, async |cluster| {
        let fails = async |arguments: &[&str], texts: &[&str]| {
            run(&cluster, arguments).await.failed_with(texts);
        };
        fails(
            &["members", "join", "news", "a", "b", "c", "d"],
            &["0 members", "may have 3", "nobody joined"],
        )
        .await;
        fails(&["members", "join", "news", "a", "a"], &["named twice"]).await;
        fails(&["members", "join", "", "a"], &["channel is empty"]).await;
        fails(&["pub", "news", "x", "--ttl", "1h"], &["--durable"]).await;
        let api = backend(&cluster.server()).await;
        let many: Vec<String> = (0..1_001).map(|n| n.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        let refused = api.join("news", &many).await.unwrap_err().to_string();
        assert!(refused.contains("users has 1001 entries; it needs 1 to 1000"), "{refused}");
        let refused = api.leave("news", &[]).await.unwrap_err().to_string();
        assert!(refused.contains("users has 0 entries"), "{refused}");
        let refused = api.list_members("news", 1_001, "").await.unwrap_err().to_string();
        assert!(refused.contains("page_size is 1001; give 1 to 1000"), "{refused}");
        let first = api.publish_durable("news", text("x"), &keyed("key")).await.unwrap();
        let again = api.publish_durable("news", text("x"), &keyed("key")).await.unwrap();
        assert!(again.duplicate && again.message_id == first.message_id);
        let other = api.publish_durable("news", text("y"), &keyed("key")).await.unwrap_err().to_string();
        assert!(other.contains("another payload"), "{other}");
    })
    .await;
}
