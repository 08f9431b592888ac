//! `sanjay bench`: short runs whose counts are exact, and what a wrong target teaches.

use std::time::Duration;

use sanjay_testkit::{Process, Sanjay, Standalone, TOKEN_SECRET, Wire, eventually, within};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(20);

/// A bench of this server, which mints its users' tokens itself.
fn bench(server: &Standalone, arguments: &[&str]) -> Sanjay {
    server.cli([&["bench"], arguments].concat()).env("SANJAY_EDGE__TOKEN_SECRET", TOKEN_SECRET)
}

async fn json(server: &Standalone, arguments: &[&str]) -> Value {
    let printed = bench(server, &[arguments, &["--json"]].concat()).run().await.succeeded();
    assert_eq!(printed.lines().count(), 1, "{printed}");
    serde_json::from_str(&printed).unwrap()
}

/// Checks counters of a result.
fn counts(result: &Value, expected: &[(&str, u64)]) {
    for (name, count) in expected {
        assert_eq!(result[name].as_u64(), Some(*count), "{name}: {result}");
    }
    assert_eq!(result["problems"], Value::Array(Vec::new()), "{result}");
}

/// Checks that percentiles rise and lie within the run.
fn latency(result: &Value, name: &str, count: u64) {
    let latency = &result[name];
    assert_eq!(latency["count"].as_u64(), Some(count), "{name}: {result}");
    let values = ["p50", "p90", "p99", "p999", "max"].map(|p| latency[p].as_u64().unwrap());
    assert!(values.is_sorted() && values[0] > 0 && values[4] < 60_000_000, "{name}: {result}");
}

#[tokio::test]
async fn connect_opens_holds_and_closes_each_connection() {
    within(60, "bench connect", async {
        let server = Standalone::start().await;
        let arguments = ["connect", "--connections", "40", "--rate", "100"];
        let result =
            json(&server, &[&arguments[..], &["--duration", "1s", "--warm-up", "100ms"]].concat()).await;
        counts(&result, &[("connections", 40), ("opened", 40), ("failed", 0), ("lost", 0), ("closed", 40)]);
        for name in ["connect_us", "handshake_us", "welcome_us"] {
            latency(&result, name, 40);
        }
        assert!(result["held_s"].as_f64().unwrap() >= 1.0, "{result}");
        assert_eq!((&result["bench"], &result["interrupted"]), (&"connect".into(), &false.into()));
    })
    .await;
}

#[tokio::test]
async fn fanout_counts_every_delivery() {
    within(60, "bench fanout", async {
        let server = Standalone::start().await;
        let arguments =
            ["fanout", "--subscribers", "7", "--channels", "3", "--rate", "60", "--duration", "1s"];
        let result = json(&server, &[&arguments[..], &["--warm-up", "0s", "--size", "64"]].concat()).await;
        // 20 messages in each channel, of which one has three subscribers and two have two.
        counts(&result, &[("published", 60), ("expected", 140), ("delivered", 140), ("lost", 0)]);
        counts(&result, &[("failed", 0), ("unknown", 0), ("repeated", 0), ("gaps", 0), ("disconnected", 0)]);
        latency(&result, "latency_us", 140);
        latency(&result, "publish_us", 60);
        assert_eq!((&result["complete"], &result["rate"]["asked"]), (&true.into(), &60.0.into()), "{result}");

        // What belongs to the warm-up is counted, and left out of the latencies.
        let arguments =
            ["fanout", "--subscribers", "2", "--rate", "50", "--duration", "1s", "--warm-up", "1s"];
        let result = json(&server, &arguments).await;
        counts(&result, &[("published", 100), ("expected", 200), ("delivered", 200)]);
        let measured = result["publish_us"]["count"].as_u64().unwrap();
        assert!((50..100).contains(&measured), "{result}");
        latency(&result, "latency_us", 2 * measured);
    })
    .await;
}

#[tokio::test]
async fn inbox_counts_what_was_accepted_received_and_acknowledged() {
    within(90, "bench inbox", async {
        let server = Standalone::start().await;
        let arguments = ["inbox", "--users", "5", "--rate", "50", "--duration", "1s", "--warm-up", "0s"];
        let result = json(&server, &arguments).await;
        counts(&result, &[("accepted", 50), ("received", 50), ("acked", 50), ("lost", 0), ("failed", 0)]);
        counts(&result, &[("repeated", 0), ("out_of_order", 0), ("unknown", 0), ("disconnected", 0)]);
        latency(&result, "send_us", 50);
        latency(&result, "receive_us", 50);
        assert_eq!(result["concurrency"], Value::Null);

        let arguments =
            ["inbox", "--users", "3", "--concurrency", "4", "--duration", "1s", "--warm-up", "0s"];
        let result = json(&server, &arguments).await;
        let accepted = result["accepted"].as_u64().unwrap();
        assert!(accepted > 4, "{result}");
        counts(&result, &[("concurrency", 4), ("received", accepted), ("acked", accepted), ("lost", 0)]);
        latency(&result, "receive_us", accepted);
        assert_eq!((&result["rate"]["asked"], &result["complete"]), (&Value::Null, &true.into()), "{result}");
    })
    .await;
}

/// Waits until one of the edge's counters has moved: the load has begun.
async fn has_begun(server: &Standalone, running: &mut Process, counter: &str) {
    eventually("a message went through", PATIENCE, async || {
        assert!(running.ended().is_none(), "{}", running.stderr());
        let page = Wire::get(&format!("{}/metrics", server.admin())).await.body;
        let value = page.lines().find_map(|line| line.strip_prefix(counter)?.trim().parse::<u64>().ok());
        value.filter(|value| *value > 0)
    })
    .await;
}

#[tokio::test]
async fn an_interrupt_prints_what_was_measured() {
    within(90, "interrupted benches", async {
        let server = Standalone::start().await;
        let fanout = ["fanout", "--subscribers", "2", "--duration", "10m", "--json", "--warm-up", "0s"];
        let inbox = ["inbox", "--users", "2", "--duration", "10m", "--json", "--warm-up", "0s"];
        let counters = ["sanjay_edge_deliveries_total", "sanjay_edge_inbox_deliveries_total"];
        for (arguments, counter) in [fanout, inbox].into_iter().zip(counters) {
            let mut running = bench(&server, &arguments).spawn();
            has_begun(&server, &mut running, counter).await;
            assert_eq!(running.terminate(PATIENCE).await.code(), Some(0), "{}", running.stderr());
            let result: Value = serde_json::from_str(&running.stdout()).unwrap();
            assert_eq!(
                (&result["interrupted"], &result["complete"]),
                (&true.into(), &true.into()),
                "{result}"
            );
            let done = result["delivered"].as_u64().or(result["received"].as_u64()).unwrap();
            assert!(done > 0 && result["measured_s"].as_f64().unwrap() < 60.0, "{result}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_run_that_lost_its_server_does_not_count() {
    within(90, "a bench without its server", async {
        let mut server = Standalone::start().await;
        let fanout = ["fanout", "--subscribers", "2", "--duration", "2s", "--warm-up", "0s", "--json"];
        let mut running = bench(&server, &fanout).spawn();
        has_begun(&server, &mut running, "sanjay_edge_deliveries_total").await;
        server.kill();
        assert_eq!(running.wait(Duration::from_secs(40)).await.code(), Some(1), "{}", running.stdout());
        assert!(running.stderr().contains("the run does not count"), "{}", running.stderr());
        let result: Value = serde_json::from_str(&running.stdout()).unwrap();
        assert_eq!((&result["complete"], &result["disconnected"]), (&false.into(), &2.into()), "{result}");
        assert_ne!(result["problems"], Value::Array(Vec::new()), "{result}");
    })
    .await;
}

#[tokio::test]
async fn a_wrong_target_or_option_is_explained_before_any_load() {
    within(60, "benches that cannot run", async {
        for kind in ["connect", "fanout", "inbox"] {
            Sanjay::new(["bench", kind]).run().await.failed_with(&[
                "sanjay standalone",
                "--url",
                ".sanjay/ready.json",
            ]);
            let refused = ["bench", kind, "--url", "ws://127.0.0.1:1/v1/ws", "--token-secret", TOKEN_SECRET];
            Sanjay::new(refused).run().await.failed_with(&["no server answers", "127.0.0.1:1", "--url"]);
        }
        let server = Standalone::start().await;
        let fails = async |arguments: &[&str], parts: &[&str]| {
            bench(&server, arguments).run().await.failed_with(parts);
        };
        let other = "another secret, which this server does not know";
        fails(&["connect", "--token-secret", other], &["refused a token", "--token-secret"]).await;
        fails(&["fanout", "--api-key", "nonsense"], &["API key", "--api-key"]).await;
        fails(&["inbox", "--server", "http://127.0.0.1:1"], &["no server answers", "--server"]).await;
        fails(&["connect", "--connections", "19001"], &["19001", "19000", "open file"]).await;
        fails(&["inbox", "--users", "1000000000000"], &["19000"]).await;
        fails(&["fanout", "--channels", "9", "--subscribers", "8"], &["9 channels"]).await;
        fails(&["fanout", "--size", "63"], &["--size", "64"]).await;
        fails(&["fanout", "--rate", "0"], &["--rate", "0.1"]).await;
        fails(&["fanout", "--rate", "10000", "--duration", "60m"], &["36020000", "10000000", "--rate"]).await;
        fails(&["connect", "--duration", "soon"], &["--duration", "10s"]).await;
        fails(&["inbox", "--rate", "1", "--concurrency", "1"], &["--concurrency"]).await;
    })
    .await;
}
