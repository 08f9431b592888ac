//! The edge's metrics.

mod tokens;

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use sanjay_protocol::CloseCode;
use sanjay_resilience::Breakers;
use sanjay_runtime::{
    grpc::PeerMetrics,
    metrics::{Dependencies, latency},
};

pub use self::tokens::{FetchOutcome, TokenMetrics};

/// The roles that an edge calls, as its peers' metrics name them.
pub(crate) const PEERS: [&str; 2] = ["router", "delivery node"];

/// What [`crate::upgrade`] and the handshake refuse a connection with.
const REFUSALS: [u16; 8] = [400, 403, 404, 405, 426, 431, 503, 505];

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

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

/// What became of a client that wanted to go on in a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// It has all that it missed.
    Recovered,
    /// What it missed cannot be told.
    Lost,
    /// The history could not be read now.
    Failed,
}

impl Recovery {
    const ALL: [Self; 3] = [Self::Recovered, Self::Lost, Self::Failed];

    fn label(self) -> OutcomeLabel {
        let outcome = match self {
            Self::Recovered => "recovered",
            Self::Lost => "lost",
            Self::Failed => "failed",
        };
        OutcomeLabel { outcome }
    }
}

/// What happens on an edge. Counters are rates; nothing here is per user or channel.
#[derive(Debug)]
pub struct Metrics {
    /// Connections that were upgraded.
    pub accepted: Counter,
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
    /// Bytes of frames handed to sockets.
    pub sent_bytes: Counter,
    /// Bytes read from sockets.
    pub received_bytes: Counter,
    /// Channel messages that arrived from the router, counted once a shard.
    pub publications: Counter,
    /// Channel messages handed to sockets.
    pub deliveries: Counter,
    /// Inbox messages handed to sockets.
    pub inbox_deliveries: Counter,
    /// Among them, those that were not the first delivery.
    pub redeliveries: Counter,
    /// Deliveries that clients gave back for another one.
    pub naks: Counter,
    /// Messages that clients gave up.
    pub terms: Counter,
    /// Deliveries that living clients did not answer in time.
    pub ack_deadlines: Counter,
    /// Times that a client was told that messages in flight were settled elsewhere.
    pub settled_pushes: Counter,
    /// Connections that were closed because their tokens were revoked.
    pub revoked: Counter,
    /// Revocations that are known.
    pub revocations: Gauge,
    /// How long ago a delivery node said what is revoked.
    pub revocations_age: Gauge<f64, AtomicU64>,
    /// From a channel message's time stamp until all sockets of a shard were written.
    pub channel_latency: Histogram,
    /// From an inbox message's time stamp until a socket was written.
    pub inbox_latency: Histogram,
    /// Gaps that subscribers were told of, one for each channel and shard.
    pub gaps: Counter,
    /// Publications that found a shard's queue full.
    pub dropped_publications: Counter,
    /// Hints that found a shard's queue full.
    pub dropped_hints: Counter,
    /// Reads of channels' histories.
    pub history_reads: Counter,
    /// Those that failed.
    pub history_read_failures: Counter,
    /// Clients that wanted to go on in a channel.
    recoveries: Family<OutcomeLabel, Counter>,
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
    /// The same, under the name that all dependencies have.
    pub router_up: Gauge,
    /// 1 while some delivery node serves.
    pub delivery_up: Gauge,
    /// 0 while some router serves, else 2.
    pub router_breaker: Gauge,
    /// Likewise for delivery nodes.
    pub delivery_breaker: Gauge,
    /// Tokens and their keys.
    pub tokens: TokenMetrics,
}

impl Metrics {
    /// Registers everything.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let dependencies = Dependencies::register(registry, "edge");
        let breakers = Breakers::register_states(registry, "edge");
        let latencies = Family::<KindLabel, Histogram>::new_with_constructor(latency);
        let of_kind = |kind| latencies.get_or_create_owned(&KindLabel { kind });
        let metrics = Self {
            accepted: Counter::default(),
            connections: Gauge::default(),
            closed: Family::default(),
            refused: Family::default(),
            handshakes_dropped: Counter::default(),
            channels: Gauge::default(),
            commands: Counter::default(),
            sent_bytes: Counter::default(),
            received_bytes: Counter::default(),
            publications: Counter::default(),
            deliveries: Counter::default(),
            inbox_deliveries: Counter::default(),
            redeliveries: Counter::default(),
            naks: Counter::default(),
            terms: Counter::default(),
            ack_deadlines: Counter::default(),
            settled_pushes: Counter::default(),
            revoked: Counter::default(),
            revocations: Gauge::default(),
            revocations_age: Gauge::default(),
            channel_latency: of_kind("channel"),
            inbox_latency: of_kind("inbox"),
            gaps: Counter::default(),
            dropped_publications: Counter::default(),
            dropped_hints: Counter::default(),
            history_reads: Counter::default(),
            history_read_failures: Counter::default(),
            recoveries: Family::default(),
            inbox_reads: Counter::default(),
            inbox_read_failures: Counter::default(),
            acks: Counter::default(),
            ack_failures: Counter::default(),
            attached: Gauge::default(),
            router_up: dependencies.of("router"),
            delivery_up: dependencies.of("delivery"),
            router_breaker: breakers.state("router"),
            delivery_breaker: breakers.state("delivery"),
            tokens: TokenMetrics::register(registry),
        };
        metrics.register_connections(registry);
        metrics.register_messages(registry);
        metrics.register_upstream(registry);
        metrics.register_histories(registry);
        let help = "From a message's acceptance to the write into sockets. Channel messages: the router's time stamp \
                    until all subscribers on a shard were written, one observation for each shard. Inbox messages: \
                    one for each first delivery from a hint";
        registry.register_with_unit("edge_delivery_latency", help, Unit::Seconds, latencies);
        metrics
    }

    fn register_connections(&self, registry: &mut Registry) {
        for code in CloseCode::ALL {
            let _series = self.closed.get_or_create(&CloseLabel { code: code.code() });
        }
        let _series = self.closed.get_or_create(&CloseLabel { code: 0 });
        for status in REFUSALS {
            let _series = self.refused.get_or_create(&RefusalLabel { status });
        }
        registry.register("edge_connections", "Upgraded connections", self.connections.clone());
        registry.register("edge_accepted", "Connections that were upgraded", self.accepted.clone());
        let help = "Connections that ended, by the close code that the edge sent; 0 when the client closed or was \
                    lost. Many 4413 are slow clients, many 4408 dead ones";
        registry.register("edge_closed", help, self.closed.clone());
        registry.register("edge_refused", "Handshakes refused, by HTTP status", self.refused.clone());
        let help = "Unfinished handshakes dropped for newer ones: when it rises, somebody opens connections and says \
                    nothing; limit new connections of an address at the load balancer";
        registry.register("edge_handshakes_dropped", help, self.handshakes_dropped.clone());
        let help = "Bytes of WebSocket frames handed to connections, close frames left out; what a slow socket does not take is \
                    counted too";
        registry.register_with_unit("edge_sent", help, Unit::Bytes, self.sent_bytes.clone());
        let help = "Bytes read from connections after the handshake";
        registry.register_with_unit("edge_received", help, Unit::Bytes, self.received_bytes.clone());
    }

    fn register_messages(&self, registry: &mut Registry) {
        let help = "Channels with a subscriber, counted once for each shard";
        registry.register("edge_channels", help, self.channels.clone());
        let help = "Commands from clients, bad ones and {} too";
        registry.register("edge_commands", help, self.commands.clone());
        let help = "Channel messages from the router, counted once for each shard";
        registry.register("edge_publications", help, self.publications.clone());
        registry.register("edge_deliveries", "Channel messages handed to sockets", self.deliveries.clone());
        let help = "Inbox messages handed to sockets";
        registry.register("edge_inbox_deliveries", help, self.inbox_deliveries.clone());
        let help = "Inbox messages handed to sockets again after a failed delivery";
        registry.register("edge_redeliveries", help, self.redeliveries.clone());
        registry.register(
            "edge_naks",
            "Deliveries that clients gave back for another one",
            self.naks.clone(),
        );
        registry.register("edge_terms", "Inbox messages that clients gave up", self.terms.clone());
        let help = "Deliveries that living clients did not answer within the ack deadline";
        registry.register("edge_ack_deadlines", help, self.ack_deadlines.clone());
        let help =
            "Times that a client was told that messages which it had not answered were settled elsewhere";
        registry.register("edge_settled_pushes", help, self.settled_pushes.clone());
        let help = "Connections that were closed because a user, a session or a token was revoked; hellos are not among them";
        registry.register("edge_revoked", help, self.revoked.clone());
        let help = "Revocations of users, sessions and tokens that are known";
        registry.register("edge_revocations", help, self.revocations.clone());
        let help = "How long ago a delivery node last said what is revoked, or since the start when none has: above a few \
                    seconds, tokens that were revoked meanwhile are still good here";
        registry.register_with_unit(
            "edge_revocations_age",
            help,
            Unit::Seconds,
            self.revocations_age.clone(),
        );
        let help = "Gaps that subscribers were told of, counted once for each channel and shard";
        registry.register("edge_gaps", help, self.gaps.clone());
        let help = "Channel messages that found a shard's queue full; not zero means overload";
        registry.register("edge_dropped_publications", help, self.dropped_publications.clone());
        let help = "Inbox hints that found a shard's queue full; not zero means overload";
        registry.register("edge_dropped_hints", help, self.dropped_hints.clone());
    }

    /// Counts a client that wanted to go on in a channel.
    pub fn recovery(&self, outcome: Recovery) {
        self.recoveries.get_or_create(&outcome.label()).inc();
    }

    fn register_histories(&self, registry: &mut Registry) {
        for outcome in Recovery::ALL {
            let _series = self.recoveries.get_or_create(&outcome.label());
        }
        let help = "Subscriptions from a position: everything missed was sent (recovered), that could not be told (lost), or \
                    the history could not be read now (failed)";
        registry.register("edge_recoveries", help, self.recoveries.clone());
        let help = "Reads of channels' histories; those of one position at a time are one";
        registry.register("edge_history_reads", help, self.history_reads.clone());
        let help = "Reads of channels' histories that failed or were refused";
        registry.register("edge_history_read_failures", help, self.history_read_failures.clone());
    }

    fn register_upstream(&self, registry: &mut Registry) {
        registry.register("edge_inbox_reads", "Inboxes read at delivery", self.inbox_reads.clone());
        let help = "Inbox reads that failed; each is repeated after 1 to 5 s";
        registry.register("edge_inbox_read_failures", help, self.inbox_read_failures.clone());
        registry.register(
            "edge_acks",
            "Acks and reports of what was written, sent to delivery",
            self.acks.clone(),
        );
        let help = "Batches of acks that had to be repeated";
        registry.register("edge_ack_failures", help, self.ack_failures.clone());
        let help = "1 while attached to a router; without one, channels rest";
        registry.register("edge_attached", help, self.attached.clone());
    }

    /// Attached to a router, or not any more.
    pub(crate) fn set_attached(&self, attached: bool) {
        self.attached.set(attached.into());
        self.router_up.set(attached.into());
    }
}

/// Registers every metric that an edge can have, for documentation.
pub fn register_all(registry: &mut Registry) {
    let _metrics = Metrics::register(registry);
    let _peers = PeerMetrics::register(registry, "edge", &PEERS);
}
