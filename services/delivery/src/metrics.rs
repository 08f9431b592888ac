//! Everything that delivery counts and measures.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::relay::Outcome;

/// An error code of the protocol, or `ok`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabel {
    operation: &'static str,
}

/// A kind of call to a shared store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoreOperation {
    /// A group of appends and acks.
    Write,
    /// What must be known of inboxes before they are written to.
    ReadState,
    /// Pages and receipts.
    Read,
    /// Redelivery.
    Claim,
    /// Moving bodies, receipts and dedupe keys out of inboxes.
    Tidy,
    /// Counting.
    Stats,
}

impl StoreOperation {
    const fn as_str(self) -> &'static str {
        match self {
            StoreOperation::Write => "write",
            StoreOperation::ReadState => "read_state",
            StoreOperation::Read => "read",
            StoreOperation::Claim => "claim",
            StoreOperation::Tidy => "tidy",
            StoreOperation::Stats => "stats",
        }
    }
}

/// The metrics of one delivery node.
#[derive(Clone, Debug)]
pub struct Metrics {
    sends: Family<CodeLabel, Counter>,
    publishes: Family<CodeLabel, Counter>,
    appended: Counter,
    duplicates: Counter,
    group_items: Histogram,
    group_seconds: Histogram,
    acked: Counter,
    reads: Counter,
    relays: Family<OutcomeLabel, Counter>,
    redeliveries: Counter,
    armed: Gauge,
    unsettled: Gauge,
    store_errors: Counter,
    store_calls: Family<OperationLabel, Histogram>,
    store_failures: Family<OperationLabel, Counter>,
    store_unknown: Counter,
    store_conflicts: Counter,
    store_connections: Gauge,
}

impl Metrics {
    /// Makes the metrics and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self {
            sends: Family::default(),
            publishes: Family::default(),
            appended: Counter::default(),
            duplicates: Counter::default(),
            group_items: Histogram::new(exponential_buckets(1.0, 2.0, 13)),
            group_seconds: Histogram::new(exponential_buckets(0.000_1, 2.0, 15)),
            acked: Counter::default(),
            reads: Counter::default(),
            relays: Family::default(),
            redeliveries: Counter::default(),
            armed: Gauge::default(),
            unsettled: Gauge::default(),
            store_errors: Counter::default(),
            store_calls: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.000_1, 2.0, 16))
            }),
            store_failures: Family::default(),
            store_unknown: Counter::default(),
            store_conflicts: Counter::default(),
            store_connections: Gauge::default(),
        };
        metrics.register_calls(registry);
        metrics.register_store(registry);
        metrics.register_shared_store(registry);
        metrics
    }

    fn register_calls(&self, registry: &mut Registry) {
        registry.register("delivery_sends", "Sends, per user, by result code", self.sends.clone());
        registry.register("delivery_publishes", "Publishes by result code", self.publishes.clone());
        registry.register("delivery_inbox_reads", "Inbox pages read by edges", self.reads.clone());
        registry.register("delivery_acked", "Messages settled as acked", self.acked.clone());
        registry.register("delivery_relays", "Inbox hints by what became of them", self.relays.clone());
        registry.register("delivery_redeliveries", "Inbox hints relayed again", self.redeliveries.clone());
    }

    fn register_store(&self, registry: &mut Registry) {
        registry.register("delivery_appended", "Messages put into inboxes", self.appended.clone());
        registry.register(
            "delivery_dedupe_hits",
            "Sends answered from a dedupe key",
            self.duplicates.clone(),
        );
        let help = "Messages, acks and claims in one durable group commit";
        registry.register("delivery_group_commit_items", help, self.group_items.clone());
        let help = "Time of one durable group commit";
        registry.register_with_unit("delivery_group_commit", help, Unit::Seconds, self.group_seconds.clone());
        registry.register("delivery_due_inboxes", "Inboxes that wait for redelivery", self.armed.clone());
        registry.register("delivery_unsettled_messages", "Messages not settled", self.unsettled.clone());
        registry.register(
            "delivery_store_errors",
            "Failed transactions of the inbox store, and work that was given up",
            self.store_errors.clone(),
        );
    }

    fn register_shared_store(&self, registry: &mut Registry) {
        let help = "Time of one call to the shared store";
        registry.register_with_unit("delivery_store_call", help, Unit::Seconds, self.store_calls.clone());
        let help = "Calls to the shared store that failed or had no answer";
        registry.register("delivery_store_call_failures", help, self.store_failures.clone());
        let help = "Writes to an inbox whose outcome had to be looked up";
        registry.register("delivery_store_unknown_outcomes", help, self.store_unknown.clone());
        let help = "Writes to an inbox that another node had changed meanwhile";
        registry.register("delivery_store_conflicts", help, self.store_conflicts.clone());
        let help = "Connections to the shared store that are in use";
        registry.register("delivery_store_connections", help, self.store_connections.clone());
    }

    /// One user's result of a send; `code` is an error code or `ok`.
    pub(crate) fn send(&self, code: &'static str) {
        self.sends.get_or_create(&CodeLabel { code }).inc();
    }

    /// One publish's result; `code` is an error code or `ok`.
    pub(crate) fn publish(&self, code: &'static str) {
        self.publishes.get_or_create(&CodeLabel { code }).inc();
    }

    /// A message was appended, or found to be a duplicate.
    pub(crate) fn appended(&self, duplicate: bool) {
        if duplicate {
            self.duplicates.inc()
        } else {
            self.appended.inc()
        };
    }

    /// A transaction was committed; `items` is 0 when it held hints alone.
    pub(crate) fn group_commit(&self, items: usize, took: Duration) {
        if items > 0 {
            self.group_items.observe(items as f64);
            self.group_seconds.observe(took.as_secs_f64());
        }
    }

    /// Messages were settled as acked.
    pub(crate) fn acked(&self, count: usize) {
        self.acked.inc_by(count as u64);
    }

    /// Pages were read for an edge.
    pub(crate) fn reads(&self, count: usize) {
        self.reads.inc_by(count as u64);
    }

    /// What became of hints.
    pub(crate) fn relayed(&self, outcome: Outcome, count: usize) {
        self.relays.get_or_create(&OutcomeLabel { outcome: outcome.as_str() }).inc_by(count as u64);
    }

    /// Hints were relayed again.
    pub(crate) fn redelivered(&self, count: usize) {
        self.redeliveries.inc_by(count as u64);
    }

    /// What the store holds.
    pub(crate) fn store(&self, stats: crate::store::Stats) {
        self.armed.set(i64::try_from(stats.armed).unwrap_or(i64::MAX));
        self.unsettled.set(i64::try_from(stats.unsettled).unwrap_or(i64::MAX));
    }

    /// A transaction failed, or work for a shared store was given up.
    pub(crate) fn store_error(&self) {
        self.store_errors.inc();
    }

    /// A call to a shared store was answered or failed.
    pub(crate) fn store_call(&self, operation: StoreOperation, took: Duration, ok: bool) {
        let label = OperationLabel { operation: operation.as_str() };
        self.store_calls.get_or_create(&label).observe(took.as_secs_f64());
        if !ok {
            self.store_failures.get_or_create(&label).inc();
        }
    }

    /// What became of a write to an inbox must be looked up.
    pub(crate) fn store_unknown(&self) {
        self.store_unknown.inc();
    }

    /// A write to an inbox met a change by another node.
    pub(crate) fn store_conflict(&self) {
        self.store_conflicts.inc();
    }

    /// A connection to the shared store was taken (1) or given back (-1).
    pub(crate) fn store_connection(&self, change: i64) {
        self.store_connections.inc_by(change);
    }
}

#[cfg(test)]
impl Metrics {
    /// How many outcomes were unknown, and how many writes met another node's.
    pub(crate) fn store_troubles(&self) -> (u64, u64) {
        (self.store_unknown.get(), self.store_conflicts.get())
    }
}

#[cfg(test)]
pub(crate) fn for_tests() -> Metrics {
    Metrics::register(&mut Registry::default())
}
