//! Messages that end without an ack, or begin later: time to live, collapse keys, full inboxes, scheduled sends. Each on a
//! file and on MongoDB, with a delivery node that is killed in the middle.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sanjay_client::{
    Accepted, DeliveryState, SendOptions, UserResult,
    protocol::{ErrorCode, Payload},
};
use sanjay_testkit::{API_KEY, Cluster, ClusterBuilder, Peer, Role, Sanjay, backend, eventually};
use serde_json::Value;
use tokio::time::timeout;

use crate::stores::{metric, on_each_store, usual};

/// The longest that something takes that is due, with much to spare.
const LONG: Duration = Duration::from_secs(20);

/// How long it may take until a count shows what is: nodes that share a store count it every half minute.
const COUNTED: Duration = Duration::from_secs(50);

fn text(text: &str) -> Payload {
    Payload::Text(text.into())
}

async fn send_to(cluster: &Cluster, users: &[&str], body: Payload, options: &SendOptions) -> Vec<UserResult> {
    backend(&cluster.server()).await.send_with(users, body, options).await.unwrap()
}

/// Sends to bob, and is accepted.
async fn send(cluster: &Cluster, body: &str, options: &SendOptions) -> Accepted {
    send_to(cluster, &["bob"], text(body), options).await.remove(0).result.unwrap()
}

/// Sends to bob, and is refused with a code and a text.
async fn refused(cluster: &Cluster, body: Payload) -> (ErrorCode, String) {
    let sent = send_to(cluster, &["bob"], body, &SendOptions::default()).await.remove(0);
    let error = sent.result.unwrap_err();
    (error.code, error.message)
}

async fn state(cluster: &Cluster, message_id: &str) -> DeliveryState {
    backend(&cluster.server()).await.get_delivery("bob", message_id).await.unwrap().unwrap().state()
}

async fn becomes(cluster: &Cluster, message_id: &str, wanted: DeliveryState) {
    let what = format!("message {message_id} is {wanted:?}");
    eventually(&what, LONG, async || (state(cluster, message_id).await == wanted).then_some(())).await;
}

/// The next inbox message, as (seq, text).
async fn next(peer: &mut Peer) -> (u64, String) {
    let message = timeout(LONG, peer.event("inbox")).await.expect("a message comes in time");
    (message["seq"].as_u64().unwrap(), message["payload"]["text"].as_str().unwrap().to_owned())
}

async fn bob(cluster: &Cluster) -> Peer {
    Peer::with_inbox(&cluster.url(), "bob", 64).await
}

/// Runs `sanjay`, and reads the lines that it prints.
async fn sanjay(cluster: &Cluster, arguments: &[&str]) -> Vec<Value> {
    let command =
        Sanjay::new(arguments).env("SANJAY_SERVER", cluster.server()).env("SANJAY_API_KEY", API_KEY);
    let output = command.run().await.succeeded();
    output.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[expect(clippy::disallowed_methods, reason = "the servers under test go by the machine's clock")]
fn now_us() -> u64 {
    u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()).unwrap()
}

fn ttl(ms: u64) -> SendOptions {
    SendOptions { ttl: Some(Duration::from_millis(ms)), ..SendOptions::default() }
}

fn collapse(key: &str) -> SendOptions {
    SendOptions { collapse_key: key.to_owned(), ..SendOptions::default() }
}

#[tokio::test]
async fn what_expires_is_not_delivered_and_everything_else_is() {
    on_each_store(90, usual, async |mut cluster| {
        let short = send(&cluster, "for now", &ttl(1_500)).await;
        let long = send(&cluster, "for long", &ttl(600_000)).await;
        let plain = send(&cluster, "for ever", &SendOptions::default()).await;
        cluster.restart(Role::Delivery).await;
        becomes(&cluster, &short.message_id, DeliveryState::Expired).await;
        assert_eq!(state(&cluster, &long.message_id).await, DeliveryState::Accepted);
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (2, "for long".to_owned()));
        assert_eq!(next(&mut peer).await, (3, "for ever".to_owned()));
        peer.ack(1, 3).await;
        becomes(&cluster, &plain.message_id, DeliveryState::Acked).await;
        assert_eq!(state(&cluster, &short.message_id).await, DeliveryState::Expired);
        // One that nobody ever acknowledges, to a user who is there.
        let seen = send(&cluster, "unanswered", &ttl(1_000)).await;
        assert_eq!(next(&mut peer).await, (4, "unanswered".to_owned()));
        becomes(&cluster, &seen.message_id, DeliveryState::Expired).await;
        // Since the node was started anew; the first may have gone before or after that.
        assert!((1..=2).contains(&metric(&cluster, Role::Delivery, "sanjay_delivery_expired_total").await));
        let unsettled = async || metric(&cluster, Role::Delivery, "sanjay_delivery_unsettled_messages").await;
        eventually("all is settled", COUNTED, async || (unsettled().await == 0).then_some(())).await;
    })
    .await;
}

#[tokio::test]
async fn expired_messages_are_kept_where_that_is_wanted_and_old_age_ends_all() {
    let kept =
        |builder: ClusterBuilder| builder.set("delivery.keep_expired", true).set("delivery.max_age_s", 1);
    on_each_store(90, kept, async |mut cluster| {
        // It asks for more than a message may have here.
        let old = send(&cluster, "old news", &ttl(600_000)).await;
        cluster.restart(Role::Delivery).await;
        becomes(&cluster, &old.message_id, DeliveryState::Dead).await;
        let letters = sanjay(&cluster, &["dlq", "list", "--json", "--reason", "expired"]).await;
        assert_eq!(letters.len(), 1);
        assert_eq!(letters[0]["message_id"], old.message_id);
        let letter = sanjay(&cluster, &["dlq", "show", "bob", &old.message_id, "--json"]).await.remove(0);
        assert_eq!(letter["payload"]["text"], "old news");
        let died = "sanjay_delivery_dead_letters_total{reason=\"expired\"}";
        // By the node that was started anew, unless the first one was as quick.
        let next = send(&cluster, "older news", &SendOptions::default()).await;
        becomes(&cluster, &next.message_id, DeliveryState::Dead).await;
        assert!((1..=2).contains(&metric(&cluster, Role::Delivery, died).await));
    })
    .await;
}

#[tokio::test]
async fn the_newest_message_of_a_collapse_key_takes_the_place_of_the_older_ones() {
    on_each_store(90, usual, async |mut cluster| {
        let first = send(&cluster, "1 : 0", &collapse("score")).await;
        let other = send(&cluster, "goal!", &SendOptions::default()).await;
        let second = send(&cluster, "2 : 0", &collapse("score")).await;
        cluster.restart(Role::Delivery).await;
        let third = send(&cluster, "2 : 1", &collapse("score")).await;
        assert_eq!((first.seq, other.seq, second.seq, third.seq), (1, 2, 3, 4));
        cluster.restart(Role::Delivery).await;
        for gone in [&first, &second] {
            assert_eq!(state(&cluster, &gone.message_id).await, DeliveryState::Superseded);
        }
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (2, "goal!".to_owned()));
        assert_eq!(next(&mut peer).await, (4, "2 : 1".to_owned()));
        // What a client has already is replaced too, and its ack changes nothing any more.
        let fourth = send(&cluster, "3 : 1", &collapse("score")).await;
        assert_eq!(next(&mut peer).await, (5, "3 : 1".to_owned()));
        peer.ack(2, 4).await;
        assert_eq!(state(&cluster, &third.message_id).await, DeliveryState::Superseded);
        assert_eq!(state(&cluster, &other.message_id).await, DeliveryState::Acked);
        peer.ack(5, 5).await;
        assert_eq!(state(&cluster, &fourth.message_id).await, DeliveryState::Acked);
        // Nothing is left to replace.
        let fifth = send(&cluster, "4 : 1", &collapse("score")).await;
        assert_eq!(next(&mut peer).await, (6, "4 : 1".to_owned()));
        assert_eq!(state(&cluster, &fifth.message_id).await, DeliveryState::Accepted);
        assert_eq!(state(&cluster, &fourth.message_id).await, DeliveryState::Acked);
    })
    .await;
}

#[tokio::test]
async fn a_full_inbox_refuses_until_there_is_room() {
    let small = |builder: ClusterBuilder| {
        builder.set("delivery.max_unsettled", 3).set("delivery.max_unsettled_bytes", 65_536)
    };
    on_each_store(90, small, async |mut cluster| {
        for body in ["1", "2"] {
            send(&cluster, body, &SendOptions::default()).await;
        }
        let large = || text(&"x".repeat(60_000));
        let sent = send_to(&cluster, &["bob"], large(), &SendOptions::dedupe("large")).await.remove(0);
        assert_eq!(sent.result.unwrap().seq, 3);
        cluster.restart(Role::Delivery).await;
        let (code, why) = refused(&cluster, text("4")).await;
        assert_eq!(code, ErrorCode::QueueFull);
        assert!(why.contains("holds 3 unsettled messages"), "{why}");
        // Of several users some may have room: a repeat under the key reaches the others alone.
        let key = SendOptions::dedupe("both");
        // On a stream, which does not repeat it by itself for whom it may yet fit.
        let mut sends = backend(&cluster.server()).await.send_stream();
        let reply = sends.send_with(&["ann", "bob"], text("both"), &key).await.unwrap();
        let sent = reply.wait().await.unwrap();
        let ann = sent[0].result.clone().unwrap();
        assert_eq!(sent[1].result.as_ref().unwrap_err().code, ErrorCode::QueueFull);
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await.0, 1);
        peer.ack(1, 1).await;
        let (code, why) = refused(&cluster, large()).await;
        assert_eq!(code, ErrorCode::QueueFull);
        assert!(why.contains("bytes of unsettled messages"), "{why}");
        cluster.restart(Role::Delivery).await;
        let sent = send_to(&cluster, &["ann", "bob"], text("both"), &key).await;
        assert_eq!(sent[0].result, Ok(Accepted { duplicate: true, ..ann }));
        let late = sent[1].result.clone().unwrap();
        assert_eq!((late.seq, late.duplicate), (4, false));
        let other = send_to(&cluster, &["ann"], text("another"), &key).await.remove(0);
        assert_eq!(other.result.unwrap_err().code, ErrorCode::AlreadyExists);
    })
    .await;
}

#[tokio::test]
async fn a_full_inbox_gives_up_its_oldest_where_that_is_wanted() {
    let small = |builder: ClusterBuilder| {
        builder.set("delivery.max_unsettled", 2).set("delivery.overflow", "\"dead_letter_oldest\"")
    };
    on_each_store(90, small, async |mut cluster| {
        let first = send(&cluster, "1", &SendOptions::default()).await;
        let second = send(&cluster, "2", &SendOptions::default()).await;
        let third = send(&cluster, "3", &SendOptions::default()).await;
        cluster.restart(Role::Delivery).await;
        let fourth = send(&cluster, "4", &SendOptions::default()).await;
        becomes(&cluster, &first.message_id, DeliveryState::Dead).await;
        becomes(&cluster, &second.message_id, DeliveryState::Dead).await;
        let died = "sanjay_delivery_dead_letters_total{reason=\"queue_full\"}";
        assert_eq!(metric(&cluster, Role::Delivery, died).await, 1, "since the node was started anew");
        let letters = sanjay(&cluster, &["dlq", "list", "--json", "--reason", "queue_full"]).await;
        let ids: Vec<_> = letters.iter().map(|letter| letter["message_id"].as_str().unwrap()).collect();
        assert_eq!(ids, [&second.message_id, &first.message_id]);
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (3, "3".to_owned()));
        assert_eq!(next(&mut peer).await, (4, "4".to_owned()));
        peer.ack(3, 4).await;
        for settled in [third, fourth] {
            assert_eq!(state(&cluster, &settled.message_id).await, DeliveryState::Acked);
        }
        // There is room again, for what was given up too.
        let sent = sanjay(&cluster, &["dlq", "redrive", "--user", "bob", "--json"]).await.remove(0);
        assert_eq!(sent["redriven"], 2);
        assert_eq!(next(&mut peer).await, (5, "1".to_owned()));
        assert_eq!(next(&mut peer).await, (6, "2".to_owned()));
    })
    .await;
}

#[tokio::test]
async fn a_scheduled_message_comes_at_its_time_and_once() {
    on_each_store(90, usual, async |mut cluster| {
        let mut peer = bob(&cluster).await;
        let at = now_us() + 2_500_000;
        let later = SendOptions { deliver_at_us: Some(at), ..SendOptions::dedupe("later") };
        let waits = send(&cluster, "later", &later).await;
        assert_eq!((waits.seq, waits.duplicate, waits.deliver_at_us), (0, false, Some(at)));
        assert_eq!(state(&cluster, &waits.message_id).await, DeliveryState::Scheduled);
        let now = send(&cluster, "now", &SendOptions::default()).await;
        assert_eq!((now.seq, next(&mut peer).await), (1, (1, "now".to_owned())));
        cluster.restart(Role::Delivery).await;
        let again = send(&cluster, "later", &later).await;
        assert_eq!((again.message_id.as_str(), again.duplicate), (waits.message_id.as_str(), true));
        let other = send_to(&cluster, &["bob"], text("other"), &later).await.remove(0);
        assert_eq!(other.result.unwrap_err().code, ErrorCode::AlreadyExists);
        assert_eq!(state(&cluster, &waits.message_id).await, DeliveryState::Scheduled);
        assert!(now_us() < at, "everything above must come before its time");
        cluster.restart(Role::Delivery).await;

        assert_eq!(next(&mut peer).await, (2, "later".to_owned()));
        assert!(now_us() >= at, "it came before its time");
        assert_eq!(state(&cluster, &waits.message_id).await, DeliveryState::Accepted);
        peer.ack(1, 2).await;
        assert_eq!(state(&cluster, &waits.message_id).await, DeliveryState::Acked);
        cluster.restart(Role::Delivery).await;
        let again = send(&cluster, "later", &later).await;
        assert_eq!((again.message_id.as_str(), again.duplicate), (waits.message_id.as_str(), true));
        // A message after it would have to be the third if it had come twice.
        let last = send(&cluster, "last", &SendOptions::default()).await;
        assert_eq!(last.seq, 3);
        let waiting = async || metric(&cluster, Role::Delivery, "sanjay_delivery_waiting_scheduled").await;
        eventually("nothing waits", LONG, async || (waiting().await == 0).then_some(())).await;
    })
    .await;
}

#[tokio::test]
async fn a_scheduled_messages_time_to_live_begins_in_its_inbox() {
    on_each_store(60, usual, async |mut cluster| {
        let at = now_us() + 500_000;
        let ttl = Duration::from_secs(5);
        let options = SendOptions { deliver_at_us: Some(at), ttl: Some(ttl), ..SendOptions::default() };
        let waits = send(&cluster, "late", &options).await;
        cluster.kill(Role::Delivery);
        // Its time, and as long again as it may live.
        let back = Duration::from_micros(at.saturating_sub(now_us())) + ttl;
        tokio::time::sleep(back).await;
        cluster.restart(Role::Delivery).await;
        let mut peer = bob(&cluster).await;
        assert_eq!(next(&mut peer).await, (1, "late".to_owned()));
        peer.ack(1, 1).await;
        assert_eq!(state(&cluster, &waits.message_id).await, DeliveryState::Acked);
    })
    .await;
}

#[tokio::test]
async fn the_command_line_asks_for_all_of_it() {
    on_each_store(90, usual, async |cluster| {
        let key = ["send", "bob", "old", "--collapse-key", "k", "--ttl", "1h"];
        let old = sanjay(&cluster, &key).await.remove(0);
        let key = ["send", "bob", "new", "--collapse-key", "k", "--ttl", "1h"];
        let new = sanjay(&cluster, &key).await.remove(0);
        assert_eq!((&old["seq"], &new["seq"]), (&1.into(), &2.into()));
        assert_eq!(state(&cluster, old["message_id"].as_str().unwrap()).await, DeliveryState::Superseded);
        let waits = sanjay(&cluster, &["send", "bob", "tomorrow", "--at", "24h"]).await.remove(0);
        let at = waits["deliver_at_us"].as_u64().unwrap();
        assert!((now_us() + 86_000_000_000..now_us() + 86_500_000_000).contains(&at), "{at}");
        assert_eq!(state(&cluster, waits["message_id"].as_str().unwrap()).await, DeliveryState::Scheduled);
        let api = backend(&cluster.server()).await;
        for (options, told) in [
            (ttl(315_360_000_001), "ttl_ms is 315360000001"),
            (SendOptions { deliver_at_us: Some(u64::MAX), ..SendOptions::default() }, "at most 366 days"),
            (collapse(&"k".repeat(201)), "collapse_key has 201 bytes"),
        ] {
            let error = api.send_with(&["bob"], text("x"), &options).await.unwrap_err().to_string();
            assert!(error.contains(told), "{error}");
        }
    })
    .await;
}
