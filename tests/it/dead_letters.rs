//! Dead letters, from the message that fails for good to the one that is sent in its place. Each on a file and on MongoDB.

use std::{collections::BTreeSet, time::Duration};

use sanjay_client::{
    BackendError, DeadLetterFilter, DeadReason, DeliveryState, RedriveDeadLettersRequest, protocol::Payload,
};
use sanjay_testkit::{
    API_KEY, Cluster, ClusterBuilder, Finished, Peer, Role, Sanjay, backend, collector::Collector, within,
};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::stores::{metric, on_each_store};

/// The longest that one attempt and the look for it take, with much to spare.
const LONG: Duration = Duration::from_secs(20);

fn three_attempts(builder: ClusterBuilder) -> ClusterBuilder {
    builder.set("delivery.max_attempts", 3)
}

async fn send(cluster: &Cluster, text: &str) -> String {
    let sent = backend(&cluster.server()).await.send(&["bob"], Payload::Text(text.into()), "").await;
    sent.unwrap()[0].result.clone().unwrap().message_id
}

async fn state(cluster: &Cluster, message_id: &str) -> DeliveryState {
    backend(&cluster.server()).await.get_delivery("bob", message_id).await.unwrap().unwrap().state()
}

async fn bob(cluster: &Cluster) -> Peer {
    Peer::with_inbox(&cluster.url(), "bob", 128).await
}

/// The next inbox message.
async fn next(peer: &mut Peer) -> Value {
    timeout(LONG, peer.event("inbox")).await.expect("a message comes in time")
}

/// The next inbox message, as (seq, delivery).
async fn next_delivery(peer: &mut Peer) -> (u64, u64) {
    let message = next(peer).await;
    (message["seq"].as_u64().unwrap(), message["delivery"].as_u64().unwrap())
}

/// Runs `sanjay dlq`.
async fn dlq(cluster: &Cluster, arguments: &[&str]) -> Finished {
    let arguments = ["dlq"].iter().chain(arguments);
    let command =
        Sanjay::new(arguments).env("SANJAY_SERVER", cluster.server()).env("SANJAY_API_KEY", API_KEY);
    command.run().await
}

async fn dlq_lines(cluster: &Cluster, arguments: &[&str]) -> Vec<Value> {
    let output = dlq(cluster, arguments).await.succeeded();
    output.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[tokio::test]
async fn a_poison_message_ends_as_a_dead_letter_and_is_sent_again() {
    on_each_store(90, three_attempts, async |cluster| {
        let poison = send(&cluster, "poison").await;
        let mut peer = bob(&cluster).await;
        for delivery in 1..=3 {
            assert_eq!(next_delivery(&mut peer).await, (1, delivery));
            assert_eq!(state(&cluster, &poison).await, DeliveryState::Accepted);
            peer.nak(1, delivery, 0).await;
        }
        assert_eq!(state(&cluster, &poison).await, DeliveryState::Dead);
        let broken = send(&cluster, "broken").await;
        assert_eq!(next_delivery(&mut peer).await, (2, 1));
        peer.term(2, 1).await;

        let listed = dlq_lines(&cluster, &["list", "--user", "bob", "--json"]).await;
        let told: Vec<_> = listed.iter().map(|letter| (&letter["message_id"], &letter["reason"])).collect();
        let expected = [(json!(broken), json!("terminated")), (json!(poison), json!("max_attempts"))];
        assert_eq!(told, expected.iter().map(|(id, reason)| (id, reason)).collect::<Vec<_>>());
        let shown = dlq_lines(&cluster, &["show", "bob", &poison, "--json"]).await.remove(0);
        assert_eq!((&shown["payload"], &shown["caller"]), (&json!({ "text": "poison" }), &json!("tests")));
        let failures = shown["failures"].as_array().unwrap();
        let kinds: Vec<_> = failures.iter().map(|f| (f["delivery"].as_u64().unwrap(), &f["kind"])).collect();
        assert_eq!(kinds, [(1, &json!("nak")), (2, &json!("nak")), (3, &json!("nak"))]);
        for failure in failures {
            assert_eq!(failure["reason"], "told to");
            assert!(failure["edge"].as_str().is_some_and(|edge| edge.starts_with("edge-")), "{failure}");
            assert_eq!(failure["session"].as_str().map(str::len), Some(36), "{failure}");
        }
        let trace = Sanjay::new(["trace", &poison])
            .env("SANJAY_SERVER", cluster.server())
            .env("SANJAY_API_KEY", API_KEY);
        let trace = trace.run().await.succeeded();
        assert_eq!((trace.matches("failed").count(), trace.matches("dead").count()), (3, 1), "{trace}");

        let dry = dlq(&cluster, &["redrive", "--user", "bob", "--dry-run"]).await.succeeded();
        assert_eq!(dry, "2 dead letters would be sent again\n");
        let one = dlq(&cluster, &["redrive", &poison, "--user", "bob"]).await.succeeded();
        assert_eq!(one, "1 of 1 dead letter sent again\n");
        let rest = dlq_lines(&cluster, &["redrive", "--json"]).await.remove(0);
        assert_eq!(rest, json!({ "total": 1, "examined": 1, "redriven": 1, "failed": 0 }));
        for (seq, text) in [(3, "poison"), (4, "broken")] {
            let message = next(&mut peer).await;
            assert_eq!((&message["seq"], &message["delivery"]), (&json!(seq), &json!(1)));
            assert_eq!(message["payload"], json!({ "text": text }));
            peer.ack(seq, seq).await;
        }
        // They are told apart from those that wait, and nothing more comes of them.
        assert_eq!(dlq_lines(&cluster, &["list", "--json"]).await, [json!(null); 0]);
        let noted = dlq_lines(&cluster, &["list", "--json", "--redriven"]).await;
        let sent_as = noted[1]["redriven_as"].as_str().unwrap();
        assert_eq!(state(&cluster, sent_as).await, DeliveryState::Acked);
        let nothing = dlq(&cluster, &["redrive"]).await.succeeded();
        assert_eq!(nothing, "0 of 0 dead letters sent again\n");
        assert!(peer.is_quiet().await);

        for (name, expected) in [
            ("failed_attempts_total{kind=\"nak\"}", 3),
            ("failed_attempts_total{kind=\"term\"}", 1),
            ("dead_letters_total{reason=\"max_attempts\"}", 1),
            ("dead_letters_total{reason=\"terminated\"}", 1),
            ("redriven_total", 2),
        ] {
            assert_eq!(
                metric(&cluster, Role::Delivery, &format!("sanjay_delivery_{name}")).await,
                expected,
                "{name}"
            );
        }
        purges(&cluster).await;
    })
    .await;
}

async fn purges(cluster: &Cluster) {
    let all = ["purge", "--to", "now", "--redriven"];
    let with = |flag| [&all[..], &[flag]].concat();
    dlq(cluster, &all).await.failed_with(&["--yes"]);
    let dry = dlq(cluster, &with("--dry-run")).await.succeeded();
    assert_eq!(dry, "2 dead letters would be removed; give --yes instead of --dry-run\n");
    assert_eq!(dlq(cluster, &with("--yes")).await.succeeded(), "2 dead letters removed\n");
    assert_eq!(dlq_lines(cluster, &["list", "--json", "--redriven"]).await, [json!(null); 0]);
}

#[tokio::test]
async fn attempts_are_counted_across_a_kill() {
    on_each_store(90, three_attempts, async |mut cluster| {
        let id = send(&cluster, "poison").await;
        let mut peer = bob(&cluster).await;
        for delivery in 1..=2 {
            assert_eq!(next_delivery(&mut peer).await, (1, delivery));
            peer.nak(1, delivery, 0).await;
            // What was answered is known afterwards, also that an attempt is due.
            cluster.kill(Role::Delivery);
            cluster.restart(Role::Delivery).await;
        }
        assert_eq!(next_delivery(&mut peer).await, (1, 3));
        peer.nak(1, 3, 0).await;
        assert_eq!(state(&cluster, &id).await, DeliveryState::Dead);
        let letter = backend(&cluster.server()).await.get_dead_letter("bob", &id).await.unwrap().unwrap();
        let deliveries: Vec<u32> = letter.failures.iter().map(|failure| failure.delivery).collect();
        assert_eq!((letter.reason(), deliveries), (DeadReason::MaxAttempts, vec![1, 2, 3]));
        cluster.kill(Role::Delivery);
        cluster.restart(Role::Delivery).await;
        let again = backend(&cluster.server()).await.get_dead_letter("bob", &id).await.unwrap();
        assert_eq!(again, Some(letter));
    })
    .await;
}

#[tokio::test]
async fn a_redrive_that_is_killed_is_repeated_and_sends_nothing_twice() {
    const COUNT: u64 = 60;
    on_each_store(90, three_attempts, async |mut cluster| {
        let api = backend(&cluster.server()).await;
        for n in 0..COUNT {
            api.send(&["bob"], Payload::Text(n.to_string()), &format!("key {n}")).await.unwrap();
        }
        let mut peer = bob(&cluster).await;
        for seq in 1..=COUNT {
            assert_eq!(next_delivery(&mut peer).await, (seq, 1));
            peer.term(seq, 1).await;
        }
        let filter = Some(DeadLetterFilter { user: "bob".into(), ..DeadLetterFilter::default() });
        let request = RedriveDeadLettersRequest { filter, rate: 20, ..RedriveDeadLettersRequest::default() };
        let mut redrive = api.redrive_dead_letters(request.clone()).await.unwrap();
        let before = loop {
            let far = redrive.next().await.unwrap().unwrap();
            assert!(!far.done, "ended before it was killed: {far:?}");
            if far.redriven >= 5 {
                break far.redriven;
            }
        };
        cluster.kill(Role::Delivery);
        let cut = loop {
            if let Err(error) = redrive.next().await.expect("an end that is told") {
                break error;
            }
        };
        assert!(matches!(&cut, BackendError::CutOff(_)), "{cut:?}");
        cluster.restart(Role::Delivery).await;
        let request = RedriveDeadLettersRequest { rate: 1_000, ..request };
        let mut redrive = api.redrive_dead_letters(request).await.unwrap();
        let end = loop {
            let far = redrive.next().await.unwrap().unwrap();
            if far.done {
                break far;
            }
        };
        assert!(end.total <= COUNT - before && end.redriven == end.total && end.failed == 0, "{end:?}");

        let mut bodies = BTreeSet::new();
        for seq in COUNT + 1..=2 * COUNT {
            let message = next(&mut peer).await;
            assert_eq!(message["seq"], seq);
            bodies.insert(message["payload"]["text"].as_str().unwrap().parse::<u64>().unwrap());
        }
        assert!(bodies.into_iter().eq(0..COUNT), "each comes once");
        peer.ack(COUNT + 1, 2 * COUNT).await;
        assert!(peer.is_quiet().await);
    })
    .await;
}

#[tokio::test]
async fn the_command_teaches_when_something_is_wrong() {
    let settings = |builder: ClusterBuilder| builder.set("delivery.max_unsettled", 1);
    on_each_store(90, settings, async |cluster| {
        let id = send(&cluster, "first").await;
        let mut peer = bob(&cluster).await;
        assert_eq!(next_delivery(&mut peer).await, (1, 1));
        peer.term(1, 1).await;
        send(&cluster, "second").await;
        let full = dlq(&cluster, &["redrive"]).await;
        full.clone().failed_with(&["1 of 1 dead letter could not be sent", "which is its limit"]);
        assert_eq!((full.code, full.stdout.as_str()), (Some(1), "0 of 1 dead letter sent again\n"));
        let other = "00000000-0000-0000-0000-000000000000";
        let cases: [(&[&str], i32, &[&str]); 10] = [
            (&["show", "bob", other], 1, &["bob has no dead letter", "`sanjay dlq list --user bob`"]),
            (&["show", "bob", "7"], 1, &["\"7\" is no message id"]),
            (&["redrive", other, "--user", "bob"], 1, &["has no dead letter"]),
            (&["redrive", other], 2, &["--user"]),
            (&["redrive", "--rate", "0"], 2, &["1..=10000"]),
            (&["list", "--from", "yesterday"], 2, &["such as 2026-11-24T09:30:00Z", "such as 90s"]),
            (&["list", "--reason", "bored"], 2, &["max_attempts", "terminated"]),
            (&["list", "--from", "1h", "--to", "2h"], 1, &["from_us is the earlier one"]),
            (&["purge", "--yes"], 1, &["--user, --reason, --from or --to", "--to now"]),
            (&["purge", "--user", "bob"], 2, &["--yes"]),
        ];
        for (arguments, code, texts) in cases {
            let finished = dlq(&cluster, arguments).await;
            assert_eq!(finished.code, Some(code), "{arguments:?}: {finished:?}");
            finished.failed_with(texts);
        }
        // Nothing of that changed anything.
        let table = dlq(&cluster, &["list", "--from", "1h", "--limit", "1"]).await.succeeded();
        let rows: Vec<&str> = table.lines().collect();
        assert_eq!(rows.len(), 2, "{table}");
        assert!(rows[1].contains(&id) && rows[1].contains("terminated"), "{table}");
        let shown = dlq(&cluster, &["show", "bob", &id]).await.succeeded();
        assert!(shown.contains("payload        {\"text\":\"first\"}"), "{shown}");
    })
    .await;
}

#[tokio::test]
async fn the_trace_of_a_dead_letter_has_its_attempts_and_a_redrive_links_it() {
    within(90, "the traces of a dead letter", async {
        let collector = Collector::start().await;
        let cluster = Cluster::builder().set("delivery.max_attempts", 2).traces_to(&collector).start().await;
        let api = backend(&cluster.server()).await;
        let trace = "0af7651916cd43dd8448eb211c80319c";
        let traced = api.traced(&format!("00-{trace}-00f067aa0ba902b7-01")).unwrap();
        traced.send(&["bob"], Payload::Text("poison".into()), "").await.unwrap();
        let mut peer = bob(&cluster).await;
        for delivery in 1..=2 {
            assert_eq!(next_delivery(&mut peer).await, (1, delivery));
            peer.nak(1, delivery, 0).await;
        }
        let look = |name: &'static str| {
            move |spans: &[sanjay_testkit::collector::CollectedSpan]| {
                spans.iter().find(|span| span.trace_id == trace && span.name == name).cloned()
            }
        };
        let settle = collector.wait_for("the end of the message", look("settle")).await;
        let process = collector.wait_for("its way to the disk", look("process")).await;
        assert_eq!(settle.parent_id.as_deref(), Some(process.span_id.as_str()));
        assert_eq!(settle.events, ["delivery failed"; 2]);
        assert_eq!(settle.attribute("error.type"), Some("max_attempts"));
        assert!(settle.error.is_some());
        assert!(
            !format!("{:?}", collector.spans()).contains("told to"),
            "what the client said is in no span"
        );

        assert_eq!(dlq(&cluster, &["redrive"]).await.succeeded(), "1 of 1 dead letter sent again\n");
        assert_eq!(next_delivery(&mut peer).await, (2, 1));
        let link = (trace.to_owned(), process.span_id);
        let again = collector
            .wait_for("the send of the redrive", |spans| {
                spans.iter().find(|span| span.name == "send" && span.links == [link.clone()]).cloned()
            })
            .await;
        assert_eq!((again.parent_id, again.trace_id == trace), (None, false));
    })
    .await;
}
