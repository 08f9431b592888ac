//! What the bus in Redis counts.

use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};

/// Metrics of the bus; clones count together.
#[derive(Debug, Clone, Default)]
pub(crate) struct BusMetrics {
    /// Subscriber connections that were made.
    pub(crate) connects: Counter,
    /// Channels that the bus was asked for.
    pub(crate) wanted: Gauge,
    /// Subscriptions that were made again after they were lost.
    pub(crate) resubscriptions: Counter,
    /// Subscriber connections that were given up because nothing came over them.
    pub(crate) probe_failures: Counter,
    /// Messages that found no room on their way to the fan-out.
    pub(crate) overflows: Counter,
    /// Messages that this build does not understand.
    pub(crate) undecodable: Counter,
}

impl BusMetrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let wanted = metrics.wanted.clone();
        registry.register("router_bus_wanted_channels", "Channels that this router asked Redis for", wanted);
        let mut counter =
            |name: &str, help: &str, counter: &Counter| registry.register(name, help, counter.clone());
        counter("router_bus_connects", "Subscriber connections made to Redis", &metrics.connects);
        counter(
            "router_bus_resubscriptions",
            "Subscriptions made again after they were lost",
            &metrics.resubscriptions,
        );
        counter(
            "router_bus_probe_failures",
            "Subscriber connections given up because nothing came over them",
            &metrics.probe_failures,
        );
        counter(
            "router_bus_overflows",
            "Messages from Redis that found no room on their way to the fan-out; they become gaps",
            &metrics.overflows,
        );
        counter(
            "router_bus_undecodable",
            "Messages from Redis that this build does not understand",
            &metrics.undecodable,
        );
        metrics
    }
}
