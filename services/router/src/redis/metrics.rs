//! What is counted about Redis.

use std::time::Duration;

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use sanjay_resilience::Breakers;
use sanjay_runtime::metrics::Dependencies;

/// Redis, as metrics and logs name it.
pub(crate) const REDIS: &str = "redis";

/// Everything that is asked of Redis.
const OPERATIONS: [&str; 17] = [
    "attach", "close", "collect", "detach", "edge", "expire", "history", "locate", "maintain", "number",
    "open", "probe", "publish", "renew", "scan", "sweep", "tops",
];

/// Metrics of the registry in Redis; clones count together.
#[derive(Debug, Clone)]
pub(crate) struct RedisMetrics {
    /// Connections that were made.
    pub(crate) connects: Counter,
    /// Epochs that were opened because a channel was new, idle for too long, or came from another Redis
    /// process.
    pub(crate) epochs: Counter,
    /// 1 while Redis answers.
    pub(crate) up: Gauge,
    /// Of what stands before it.
    pub(crate) breakers: Breakers,
    calls: Family<CallLabels, Counter>,
    seconds: Family<OperationLabels, Histogram, fn() -> Histogram>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabels {
    operation: &'static str,
    result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabels {
    operation: &'static str,
}

impl Default for RedisMetrics {
    fn default() -> Self {
        Self {
            connects: Counter::default(),
            epochs: Counter::default(),
            up: Gauge::default(),
            breakers: Breakers::default(),
            calls: Family::default(),
            // 100 µs to about 1.6 s: a call that takes longer is given up.
            seconds: Family::new_with_constructor(|| Histogram::new(exponential_buckets(1e-4, 2.0, 15))),
        }
    }
}

impl RedisMetrics {
    pub(crate) fn register(registry: &mut Registry) -> Self {
        let up = Dependencies::register(registry, "router").of(REDIS);
        let breakers = Breakers::register(registry, "router");
        let _series = breakers.of(REDIS);
        let metrics = Self { up, breakers, ..Self::default() };
        let mut counter =
            |name: &str, help: &str, counter: &Counter| registry.register(name, help, counter.clone());
        counter("router_redis_connects", "Connections made to Redis", &metrics.connects);
        counter("router_epochs_opened", "Channels that began a new sequence", &metrics.epochs);
        for operation in OPERATIONS {
            for result in ["ok", "error"] {
                let _series = metrics.calls.get_or_create(&CallLabels { operation, result });
            }
            let _series = metrics.seconds.get_or_create(&OperationLabels { operation });
        }
        let calls = metrics.calls.clone();
        registry.register("router_redis_calls", "Round trips to Redis by operation and result", calls);
        let seconds = metrics.seconds.clone();
        registry.register("router_redis_call_seconds", "How long round trips to Redis took", seconds);
        metrics
    }

    /// Counts one round trip.
    pub(crate) fn call(&self, operation: &'static str, ok: bool, took: Duration) {
        let result = if ok { "ok" } else { "error" };
        debug_assert!(OPERATIONS.contains(&operation), "{operation} has no series from the start");
        self.up.set(ok.into());
        self.calls.get_or_create(&CallLabels { operation, result }).inc();
        self.seconds.get_or_create(&OperationLabels { operation }).observe(took.as_secs_f64());
    }
}
