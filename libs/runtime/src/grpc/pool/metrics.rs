//! What is counted of the processes that a role calls.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PeerLabel {
    peer: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RetryLabel {
    peer: &'static str,
    outcome: &'static str,
}

/// The metrics of all pools of a role; the label `peer` names the role that is called.
#[derive(Debug, Clone, Default)]
pub struct PeerMetrics {
    known: Family<PeerLabel, Gauge>,
    healthy: Family<PeerLabel, Gauge>,
    failovers: Family<PeerLabel, Counter>,
    retries: Family<RetryLabel, Counter>,
}

impl PeerMetrics {
    /// Makes the metrics and registers them for a role, such as `edge`, that calls `peers`.
    #[must_use]
    pub fn register(registry: &mut Registry, role: &str, peers: &[&'static str]) -> Self {
        let metrics = Self::default();
        let registry = registry.sub_registry_with_prefix(role);
        let help = "Addresses of the peers that this role may call";
        registry.register("peers_known", help, metrics.known.clone());
        let help = "How many of them say that they serve";
        registry.register("peers_healthy", help, metrics.healthy.clone());
        let help = "How often another peer was taken, by the role or by a call of it";
        registry.register("peer_failovers", help, metrics.failovers.clone());
        let help = "Calls made again on another peer: answered, failed, or not made because too many calls fail to \
                    repeat them all (no_budget)";
        registry.register("peer_retries", help, metrics.retries.clone());
        for peer in peers {
            metrics.of(peer);
        }
        metrics
    }

    /// The metrics of one pool, at hand without a look-up.
    pub(super) fn of(&self, peer: &'static str) -> PoolMetrics {
        let label = PeerLabel { peer };
        let retries = |outcome| self.retries.get_or_create_owned(&RetryLabel { peer, outcome });
        PoolMetrics {
            known: self.known.get_or_create_owned(&label),
            healthy: self.healthy.get_or_create_owned(&label),
            failovers: self.failovers.get_or_create_owned(&label),
            answered: retries("answered"),
            failed: retries("failed"),
            refused: retries("no_budget"),
        }
    }
}

/// The metrics of one pool.
#[derive(Debug)]
pub(super) struct PoolMetrics {
    pub(super) known: Gauge,
    pub(super) healthy: Gauge,
    pub(super) failovers: Counter,
    /// A call that was made again got its answer.
    pub(super) answered: Counter,
    /// A call that was made again failed again.
    pub(super) failed: Counter,
    /// A call was not made again, because too many were.
    pub(super) refused: Counter,
}
