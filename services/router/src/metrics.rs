//! What the router counts.

use std::fmt::{self, Write};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use sanjay_proto::router::v1::RelayOutcome;

/// The router's metrics; clones count together.
#[derive(Debug, Clone, Default)]
pub(crate) struct Metrics {
    pub(crate) edges: Gauge,
    pub(crate) channels: Gauge,
    pub(crate) sessions: Gauge,
    pub(crate) deepest_mailbox: Gauge,
    pub(crate) publications: Counter,
    pub(crate) repeats: Counter,
    pub(crate) deliveries: Counter,
    pub(crate) gaps: Counter,
    pub(crate) resyncs: Counter,
    /// Channels of which the bus lost something that no later publication revealed.
    pub(crate) losses: Counter,
    dropped: Family<DropLabels, Counter>,
    relays: Family<RelayLabels, Counter>,
}

/// Why something for an edge was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum DropReason {
    /// The edge reads too slowly.
    Full,
    /// Its stream ended.
    Gone,
    /// No edge holds the channel or the user here any more.
    NoInterest,
    /// The bus delivered it twice, or after it was given up as lost.
    Repeated,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DropLabels {
    reason: DropReason,
}

impl EncodeLabelValue for DropReason {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> Result<(), fmt::Error> {
        encoder.write_str(match self {
            DropReason::Full => "full",
            DropReason::Gone => "gone",
            DropReason::NoInterest => "no_interest",
            DropReason::Repeated => "repeated",
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RelayLabels {
    outcome: &'static str,
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let mut gauge = |name: &str, help: &str, gauge: &Gauge| registry.register(name, help, gauge.clone());
        gauge("router_attached_edges", "Edges with an open stream", &metrics.edges);
        gauge("router_channels", "Channels that an attached edge holds", &metrics.channels);
        gauge("router_sessions", "Sessions that attached edges announced", &metrics.sessions);
        gauge("router_deepest_mailbox", "Events that wait for the slowest edge", &metrics.deepest_mailbox);
        let mut counter =
            |name: &str, help: &str, counter: &Counter| registry.register(name, help, counter.clone());
        counter("router_publications", "Publications that got an offset", &metrics.publications);
        counter("router_repeated_publications", "Publishes under a known dedupe key", &metrics.repeats);
        counter("router_deliveries", "Publications handed to an edge", &metrics.deliveries);
        counter("router_gaps", "Gaps signalled to an edge", &metrics.gaps);
        counter("router_resyncs", "Resyncs signalled to an edge", &metrics.resyncs);
        counter("router_losses", "Channels found behind the registry and given up as lost", &metrics.losses);
        let dropped = metrics.dropped.clone();
        registry.register("router_dropped", "Publications and hints that an edge did not get", dropped);
        let relays = metrics.relays.clone();
        registry.register("router_relays", "Inbox hints by what became of them", relays);
        metrics
    }

    pub(crate) fn dropped(&self, reason: DropReason) {
        self.dropped.get_or_create(&DropLabels { reason }).inc();
    }

    pub(crate) fn relay(&self, outcome: RelayOutcome) {
        let outcome = match outcome {
            RelayOutcome::Unspecified => "unknown",
            RelayOutcome::Relayed => "relayed",
            RelayOutcome::Offline => "offline",
        };
        self.relays.get_or_create(&RelayLabels { outcome }).inc();
    }
}
