//! What the metrics say about real messages, and about parts that are away.

use std::{collections::BTreeSet, time::Duration};

use sanjay_client::protocol::Payload;
use sanjay_testkit::{
    Cluster, Peer, Role, Standalone, Wire, backend, eventually, servers::MongoOptions, within,
};

const PATIENCE: Duration = Duration::from_secs(20);

async fn scrape(admin: &str) -> String {
    Wire::get(&format!("{admin}/metrics")).await.body
}

/// The value of a series, written as it is exposed.
fn value(page: &str, series: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("{series} is missing in {page}")).parse().unwrap()
}

/// Waits until a series of a process has a value.
async fn becomes(cluster: &Cluster, role: Role, series: &str, wanted: f64) {
    let what = format!("{series} of the {} becomes {wanted}", role.name());
    eventually(&what, PATIENCE, async || {
        let page = scrape(cluster.admin(role)).await;
        (value(&page, series) == wanted).then_some(())
    })
    .await;
}

#[tokio::test]
async fn messages_leave_their_traces_in_the_metrics() {
    within(60, "metrics of messages", async {
        let mut server = Standalone::start().await;
        let before = scrape(server.admin()).await;
        for role in ["edge", "router", "delivery"] {
            let version = env!("CARGO_PKG_VERSION");
            let build = format!("sanjay_build_info{{version=\"{version}\",role=\"{role}\"}}");
            assert_eq!(value(&before, &build), 1.0);
        }
        assert_eq!(value(&before, "sanjay_edge_refused_total{status=\"503\"}"), 0.0);
        assert_eq!(value(&before, "sanjay_delivery_oldest_undelivered_seconds"), 0.0);
        assert!(value(&before, "process_resident_memory_bytes") > 1e6);

        let api = backend(server.server()).await;
        let mut ann = Peer::with_inbox(server.url(), "ann", 64).await;
        ann.subscribe("news").await;
        let text = || Payload::Text("x".repeat(1_000));
        api.publish("news", text(), "").await.unwrap();
        ann.event("message").await;
        api.send(&["ann"], text(), "").await.unwrap();
        ann.event("inbox").await;
        ann.ack(1, 1).await;

        let after = scrape(server.admin()).await;
        let count = |series: &str| value(&after, series);
        assert_eq!(count("sanjay_edge_accepted_total"), 1.0);
        assert!(count("sanjay_edge_sent_bytes_total") > 2_000.0);
        let received = count("sanjay_edge_received_bytes_total");
        assert!((100.0..5_000.0).contains(&received), "{received}");
        for histogram in [
            "sanjay_edge_delivery_latency_seconds",
            "sanjay_router_publish_seconds",
            "sanjay_router_bus_latency_seconds",
            "sanjay_delivery_publish_seconds",
            "sanjay_delivery_send_seconds",
            "sanjay_delivery_settle_latency_seconds",
        ] {
            let kinds: &[&str] = if histogram.contains("edge") { &["channel", "inbox"] } else { &[""] };
            for kind in kinds {
                let label = if kind.is_empty() { String::new() } else { format!("{{kind=\"{kind}\"}}") };
                assert_eq!(count(&format!("{histogram}_count{label}")), 1.0, "{histogram}");
                let sum = count(&format!("{histogram}_sum{label}"));
                assert!((0.0..5.0).contains(&sum), "{histogram}: {sum} s");
            }
        }
        eventually("all dependencies answer", PATIENCE, async || {
            let page = scrape(server.admin()).await;
            (value(&page, "sanjay_edge_dependency_up{dependency=\"router\"}") == 1.0
                && value(&page, "sanjay_edge_dependency_up{dependency=\"delivery\"}") == 1.0
                && value(&page, "sanjay_delivery_dependency_up{dependency=\"router\"}") == 1.0)
                .then_some(())
        })
        .await;
        // The audit begins with the process.
        server.restart().await;
        eventually("the inbox is audited", PATIENCE, async || {
            let page = scrape(server.admin()).await;
            assert_eq!(value(&page, "sanjay_delivery_audit_difference_messages"), 0.0);
            (value(&page, "sanjay_delivery_audit_inboxes_total") == 1.0).then_some(())
        })
        .await;
        let families: Vec<&str> = after.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        assert_eq!(families.len(), families.iter().collect::<BTreeSet<_>>().len(), "each family comes once");
        assert!(after.ends_with("# EOF\n"));
    })
    .await;
}

#[tokio::test]
async fn a_message_that_waits_for_its_edge_has_an_age() {
    within(60, "the age of the oldest message", async {
        let mut cluster = Cluster::start().await;
        let (url, server) = (cluster.url(), cluster.server());
        let api = backend(&server).await;
        let _ann = Peer::with_inbox(&url, "ann", 64).await;
        // Stopped, the edge keeps the user's session and reports nothing.
        cluster.stop(Role::Edge);
        api.send(&["ann"], Payload::Text("hello?".into()), "").await.unwrap();
        let oldest = "sanjay_delivery_oldest_undelivered_seconds";
        eventually("the message grows old", PATIENCE, async || {
            let page = scrape(cluster.admin(Role::Delivery)).await;
            (value(&page, oldest) > 2.0).then_some(())
        })
        .await;
        cluster.cont(Role::Edge);
        becomes(&cluster, Role::Delivery, oldest, 0.0).await;
    })
    .await;
}

#[tokio::test]
async fn a_dependency_that_is_away_is_seen() {
    within(120, "dependencies", async {
        let mut cluster = Cluster::builder().redis().mongo_with(MongoOptions::default()).start().await;
        let series = |role: Role, dependency: &str| {
            format!("sanjay_{}_dependency_up{{dependency=\"{dependency}\"}}", role.name())
        };
        let all = [
            (Role::Edge, "router"),
            (Role::Edge, "delivery"),
            (Role::Router, "redis"),
            (Role::Delivery, "router"),
            (Role::Delivery, "mongodb"),
        ];
        for (role, dependency) in all {
            becomes(&cluster, role, &series(role, dependency), 1.0).await;
        }
        cluster.redis().kill();
        becomes(&cluster, Role::Router, &series(Role::Router, "redis"), 0.0).await;
        cluster.redis().restart().await;
        becomes(&cluster, Role::Router, &series(Role::Router, "redis"), 1.0).await;
        cluster.mongo().kill();
        becomes(&cluster, Role::Delivery, &series(Role::Delivery, "mongodb"), 0.0).await;
        cluster.mongo().restart().await;
        becomes(&cluster, Role::Delivery, &series(Role::Delivery, "mongodb"), 1.0).await;
        cluster.kill(Role::Router);
        becomes(&cluster, Role::Edge, &series(Role::Edge, "router"), 0.0).await;
        becomes(&cluster, Role::Delivery, &series(Role::Delivery, "router"), 0.0).await;
        cluster.kill(Role::Delivery);
        becomes(&cluster, Role::Edge, &series(Role::Edge, "delivery"), 0.0).await;
        for role in [Role::Router, Role::Delivery] {
            cluster.restart(role).await;
        }
        for (role, dependency) in all {
            becomes(&cluster, role, &series(role, dependency), 1.0).await;
        }
    })
    .await;
}
