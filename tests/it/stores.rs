//! A scenario on each kind of store, and what it counts.

use sanjay_testkit::{Cluster, ClusterBuilder, Role, Wire, within};

/// Runs a scenario on a file and on MongoDB, each within `seconds`.
pub(crate) async fn on_each_store<F: Future<Output = ()>>(
    seconds: u64,
    settings: impl Fn(ClusterBuilder) -> ClusterBuilder,
    scenario: impl Fn(Cluster) -> F,
) {
    for builder in [Cluster::builder(), Cluster::builder().mongo()] {
        // Users count as offline soon after their socket is gone.
        let builder = settings(builder.set("router.lease_ms", 1_000));
        within(seconds, "a scenario on one store", async { scenario(builder.start().await).await }).await;
    }
}

/// Leaves the settings as they are.
pub(crate) fn usual(builder: ClusterBuilder) -> ClusterBuilder {
    builder
}

/// A whole number on a process's metrics page, by its name and labels; 0 when it is not there.
pub(crate) async fn metric(cluster: &Cluster, role: Role, name: &str) -> u64 {
    let page = Wire::get(&format!("{}/metrics", cluster.admin(role))).await.body;
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0, |value| value.parse().expect("a number"))
}
