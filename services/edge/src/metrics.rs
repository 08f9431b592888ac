//! The edge's metrics.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Why a connection ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CloseLabel {
    /// The close code that the edge sent first; 0 when it did not: the client closed, or the socket failed.
    pub code: u16,
}

/// Why a handshake was refused.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RefusalLabel {
    /// The HTTP status.
    pub status: u16,
}

/// What happens on an edge. Counters are rates; nothing here is per user or channel.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Upgraded connections.
    pub connections: Gauge,
    /// Connections that ended, by close code.
    pub closed: Family<CloseLabel, Counter>,
    /// Handshakes that were refused, by HTTP status.
    pub refused: Family<RefusalLabel, Counter>,
    /// Handshakes that were dropped unfinished because too many were under way.
    pub handshakes_dropped: Counter,
    /// Channels with a local subscriber, summed over the shards.
    pub channels: Gauge,
    /// Commands that were taken.
    pub commands: Counter,
    /// Channel messages that arrived from the router, counted once a shard.
    pub publications: Counter,
    /// Channel messages handed to sockets.
    pub deliveries: Counter,
    /// Inbox messages handed to sockets.
    pub inbox_deliveries: Counter,
    /// Gaps that subscribers were told of, one for each channel and shard.
    pub gaps: Counter,
    /// Publications that found a shard's queue full.
    pub dropped_publications: Counter,
    /// Hints that found a shard's queue full.
    pub dropped_hints: Counter,
    /// Inboxes that were read.
    pub inbox_reads: Counter,
    /// Reads that failed.
    pub inbox_read_failures: Counter,
    /// Acks and written reports sent to delivery.
    pub acks: Counter,
    /// Batches of acks that had to be sent again.
    pub ack_failures: Counter,
    /// 1 while attached to a router.
    pub attached: Gauge,
}

impl Metrics {
    /// Registers everything.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        let it = &metrics;
        registry.register("edge_connections", "Upgraded connections", it.connections.clone());
        registry.register("edge_closed", "Connections that ended, by close code sent", it.closed.clone());
        registry.register("edge_refused", "Handshakes refused, by HTTP status", it.refused.clone());
        let dropped = it.handshakes_dropped.clone();
        registry.register("edge_handshakes_dropped", "Unfinished handshakes dropped for newer ones", dropped);
        registry.register(
            "edge_channels",
            "Channels with a subscriber, summed over the shards",
            it.channels.clone(),
        );
        registry.register("edge_commands", "Commands taken from clients", it.commands.clone());
        registry.register("edge_publications", "Channel messages from the router", it.publications.clone());
        registry.register("edge_deliveries", "Channel messages handed to sockets", it.deliveries.clone());
        registry.register(
            "edge_inbox_deliveries",
            "Inbox messages handed to sockets",
            it.inbox_deliveries.clone(),
        );
        registry.register(
            "edge_gaps",
            "Gaps that subscribers were told of, by channel and shard",
            it.gaps.clone(),
        );
        let dropped = it.dropped_publications.clone();
        registry.register("edge_dropped_publications", "Publications that found a shard full", dropped);
        registry.register("edge_dropped_hints", "Hints that found a shard full", it.dropped_hints.clone());
        registry.register("edge_inbox_reads", "Inboxes read", it.inbox_reads.clone());
        registry.register(
            "edge_inbox_read_failures",
            "Inbox reads that failed",
            it.inbox_read_failures.clone(),
        );
        registry.register("edge_acks", "Acks and written reports sent to delivery", it.acks.clone());
        registry.register("edge_ack_failures", "Batches of acks sent again", it.ack_failures.clone());
        registry.register("edge_attached", "1 while attached to a router", it.attached.clone());
        metrics
    }
}
