//! As many dead letters as a day of trouble leaves: listed in pages and sent again at the rate that was asked for, in
//! memory that has nothing to do with how many there are. With `SANJAY_TEST_DEAD_LETTERS=100000` there are so many;
//! otherwise a tenth of that, of which more than the bound would fit.

use std::{
    collections::HashSet,
    time::{Duration, Instant},
};

use sanjay_client::protocol::Payload;
use sanjay_testkit::{API_KEY, Cluster, Role, Sanjay, backend, within};
use serde_json::{Value, json};

const USERS: usize = 1_000;

/// How many letters there are to be, in whole thousands.
const COUNT: &str = "SANJAY_TEST_DEAD_LETTERS";

/// Bytes of a payload: a hundred thousand of them are far more than the memory that may be gained.
const BYTES: usize = 2_048;

/// Letters a second.
const RATE: u64 = 10_000;

/// What a delivery node may gain while they are listed and sent again, in KiB: its store keeps up to 128 MiB of the file's
/// pages.
const GAIN_KIB: u64 = 160 * 1024;

/// What the command may hold.
const COMMAND_KIB: u64 = 64 * 1024;

/// A command that looks after dead letters.
fn dlq(cluster: &Cluster, arguments: &[&str]) -> Sanjay {
    let arguments = ["dlq"].iter().chain(arguments);
    Sanjay::new(arguments).env("SANJAY_SERVER", cluster.server()).env("SANJAY_API_KEY", API_KEY)
}

/// Letters of each user.
fn each() -> usize {
    let count = std::env::var(COUNT).map_or(10_000, |count| count.parse().expect("a number"));
    count / USERS
}

/// Kills the oldest message of each user again and again, in inboxes with room for one.
async fn fill(cluster: &Cluster, each: usize) {
    let api = backend(&cluster.server()).await;
    let users: Vec<String> = (0..USERS).map(|user| format!("user-{user}")).collect();
    let users: Vec<&str> = users.iter().map(String::as_str).collect();
    for round in 0..=each {
        let text = format!("{round} {}", "x".repeat(BYTES));
        for result in api.send(&users, Payload::Text(text), "").await.unwrap() {
            assert_eq!(result.result.unwrap().seq, round as u64 + 1);
        }
    }
}

/// Lists all letters by the command, and says how many different ones there are.
async fn listed(cluster: &Cluster) -> usize {
    let limit = "1000000";
    let output = dlq(cluster, &["list", "--json", "--limit", limit]).run().await.succeeded();
    let mut ids = HashSet::new();
    let mut newest = u64::MAX;
    for line in output.lines() {
        let letter: Value = serde_json::from_str(line).unwrap();
        assert_eq!(letter["reason"], "queue_full");
        let died_us = letter["died_us"].as_u64().unwrap();
        assert!(died_us <= newest, "the newest come first");
        newest = died_us;
        assert!(ids.insert(letter["message_id"].as_str().unwrap().to_owned()), "each comes once: {line}");
    }
    ids.len()
}

#[tokio::test]
async fn they_are_listed_and_sent_again_in_bounded_memory() {
    within(600, "many dead letters", async {
        let (each, all) = (each(), each() * USERS);
        let builder = Cluster::builder().set("delivery.overflow", "\"dead_letter_oldest\"").env(
            Role::Delivery,
            "SANJAY_DELIVERY__MAX_UNSETTLED",
            1,
        );
        let mut cluster = builder.start().await;
        let began = Instant::now();
        fill(&cluster, each).await;
        println!("{} dead letters after {:?}", all, began.elapsed());

        // With room for what is sent again; also, with memory that owes nothing to what was done so far.
        cluster.forget_environment(Role::Delivery);
        cluster.kill(Role::Delivery);
        cluster.restart(Role::Delivery).await;
        let before = cluster.process(Role::Delivery).resident_kib();

        let began = Instant::now();
        assert_eq!(listed(&cluster).await, all);
        println!("listed in {:?}", began.elapsed());
        let dry = dlq(&cluster, &["redrive", "--dry-run"]).run().await.succeeded();
        assert_eq!(dry, format!("{} dead letters would be sent again\n", all));

        let began = Instant::now();
        let rate = RATE.to_string();
        let (mut most, mut command) = (0, dlq(&cluster, &["redrive", "--rate", &rate, "--json"]).spawn());
        let ended = loop {
            most = most.max(cluster.process(Role::Delivery).resident_kib());
            if let Some(ended) = command.ended() {
                break ended;
            }
            assert!(command.resident_kib() < COMMAND_KIB, "the command holds {} KiB", command.resident_kib());
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let took = began.elapsed();
        assert!(ended.success(), "{ended}: {}", command.stderr());
        let end: Value = serde_json::from_str(command.stdout().trim()).unwrap();
        assert_eq!(end, json!({ "total": all, "examined": all, "redriven": all, "failed": 0 }));
        println!("sent again in {took:?}; the node held {before} KiB before and {most} KiB at most");
        let least = Duration::from_secs(all as u64 / RATE).mul_f64(0.9);
        assert!(took >= least, "faster than {RATE} a second: {took:?}");
        assert!(most < before + GAIN_KIB, "the node held {before} KiB before and {most} KiB at most");

        assert_eq!(listed(&cluster).await, 0, "none waits to be sent again");
    })
    .await;
}
