//! What the router counts.

use std::fmt::{self, Write};

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use sanjay_proto::router::v1::RelayOutcome;
use sanjay_runtime::metrics::latency;

use crate::{bus::redis::metrics::BusMetrics, redis::metrics::RedisMetrics};

/// The router's metrics; clones count together.
#[derive(Debug, Clone)]
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
    /// How long reading a history takes.
    pub(crate) history_seconds: Histogram,
    /// Positions that a history could not be continued from.
    pub(crate) lost_positions: Counter,
    /// How long publishing takes, for a call.
    pub(crate) publish_seconds: Histogram,
    /// From a publication's time stamp to its arrival from the bus.
    pub(crate) bus_latency: Histogram,
    dropped: Family<DropLabels, Counter>,
    relays: Family<RelayLabels, Counter>,
    /// The counters of `dropped`, by [`DropReason`].
    drops: [Counter; 4],
    relayed: Counter,
    offline: Counter,
    unknown: Counter,
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

impl DropReason {
    const ALL: [Self; 4] = [Self::Full, Self::Gone, Self::NoInterest, Self::Repeated];
}

impl Default for Metrics {
    fn default() -> Self {
        let dropped = Family::<DropLabels, Counter>::default();
        let relays = Family::<RelayLabels, Counter>::default();
        let relay = |outcome| relays.get_or_create_owned(&RelayLabels { outcome });
        Self {
            edges: Gauge::default(),
            channels: Gauge::default(),
            sessions: Gauge::default(),
            deepest_mailbox: Gauge::default(),
            publications: Counter::default(),
            repeats: Counter::default(),
            deliveries: Counter::default(),
            gaps: Counter::default(),
            resyncs: Counter::default(),
            losses: Counter::default(),
            history_seconds: latency(),
            lost_positions: Counter::default(),
            publish_seconds: latency(),
            bus_latency: latency(),
            drops: DropReason::ALL.map(|reason| dropped.get_or_create_owned(&DropLabels { reason })),
            relayed: relay("relayed"),
            offline: relay("offline"),
            unknown: relay("unknown"),
            dropped,
            relays,
        }
    }
}

impl Metrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let mut gauge = |name: &str, help: &str, gauge: &Gauge| registry.register(name, help, gauge.clone());
        gauge("router_attached_edges", "Edges with an open stream", &metrics.edges);
        gauge("router_channels", "Channels that an attached edge holds", &metrics.channels);
        let help = "Sessions that attached edges announced; measured once a second";
        gauge("router_sessions", help, &metrics.sessions);
        let help = "Events that wait for the slowest edge; measured once a second";
        gauge("router_deepest_mailbox", help, &metrics.deepest_mailbox);
        let mut counter =
            |name: &str, help: &str, counter: &Counter| registry.register(name, help, counter.clone());
        counter("router_publications", "Publications that got an offset", &metrics.publications);
        let help = "Publishes known by their dedupe key";
        counter("router_repeated_publications", help, &metrics.repeats);
        counter("router_deliveries", "Publications handed to edges", &metrics.deliveries);
        let help = "Gaps: times that an edge was told of channel messages that it did not get";
        counter("router_gaps", help, &metrics.gaps);
        let help = "Resyncs: times that an edge was told to read its users' inboxes because hints were lost";
        counter("router_resyncs", help, &metrics.resyncs);
        let help = "Channels found behind the registry, whose subscribers were told a gap";
        counter("router_losses", help, &metrics.losses);
        let help = "Positions in channels that could not be continued: another epoch, or something behind them is kept no more";
        counter("router_lost_positions", help, &metrics.lost_positions);
        let help = "Publications and hints that an edge did not get: it reads too slowly (full), its stream ended \
                    (gone), nobody holds the channel or user any more (no_interest), or it came twice or after it was \
                    given up as lost (repeated)";
        registry.register("router_dropped", help, metrics.dropped.clone());
        let help = "Inbox hints by what became of them; unknown: the router cannot say where the user is";
        registry.register("router_relays", help, metrics.relays.clone());
        let help = "Time that reading a part of a channel's history takes";
        registry.register_with_unit("router_history", help, Unit::Seconds, metrics.history_seconds.clone());
        let help = "Time from a call with publishes to their offsets, one observation for each call";
        registry.register_with_unit("router_publish", help, Unit::Seconds, metrics.publish_seconds.clone());
        let help = "Time from a publication's time stamp to its arrival from the bus, on each router that holds the \
                    channel; between machines their clocks' difference is in it";
        registry.register_with_unit("router_bus_latency", help, Unit::Seconds, metrics.bus_latency.clone());
        metrics
    }

    pub(crate) fn dropped(&self, reason: DropReason) {
        self.drops[reason as usize].inc();
    }

    pub(crate) fn relay(&self, outcome: RelayOutcome) {
        match outcome {
            RelayOutcome::Unspecified => &self.unknown,
            RelayOutcome::Relayed => &self.relayed,
            RelayOutcome::Offline => &self.offline,
        }
        .inc();
    }
}

/// Registers every metric that a router can have, for documentation.
pub fn register_all(registry: &mut Registry) {
    let _metrics = Metrics::register(registry);
    let _redis = RedisMetrics::register(registry);
    let _bus = BusMetrics::register(registry);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_counter_of_its_own() {
        let metrics = Metrics::default();
        for (times, reason) in (1..).zip(DropReason::ALL) {
            (0..times).for_each(|_| metrics.dropped(reason));
        }
        for (times, reason) in (1..).zip(DropReason::ALL) {
            assert_eq!(metrics.dropped.get_or_create(&DropLabels { reason }).get(), times, "{reason:?}");
        }
    }
}
