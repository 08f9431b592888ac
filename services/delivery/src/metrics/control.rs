//! What is counted of the calls about connections.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};

/// A call, and its result.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CallLabel {
    call: &'static str,
    code: &'static str,
}

/// The calls that are counted.
const CALLS: [&str; 11] = [
    "broadcast",
    "disconnect",
    "list_channels",
    "list_connections",
    "list_nodes",
    "list_revocations",
    "revoke",
    "subscribe",
    "unrevoke",
    "unsubscribe",
    "watch_connections",
];

/// Calls about connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct ControlCounters {
    calls: Family<CallLabel, Counter>,
    revocations: Gauge,
    revocations_age: Gauge<f64, AtomicU64>,
}

impl ControlCounters {
    pub(super) fn register(&self, registry: &mut Registry) {
        for call in CALLS {
            let _series = self.calls.get_or_create(&CallLabel { call, code: super::OK });
        }
        let help = "Calls about connections, by call and by error code";
        registry.register("delivery_control_calls", help, self.calls.clone());
        let help = "Revocations of users, sessions and tokens that are in force";
        registry.register("delivery_revocations", help, self.revocations.clone());
        let help =
            "How long ago the store was last asked what is revoked; 0 before it was asked for the first time";
        let age = self.revocations_age.clone();
        registry.register_with_unit("delivery_revocations_age", help, Unit::Seconds, age);
    }
}

impl super::Metrics {
    /// How much is revoked, and how long ago the store was seen.
    pub(crate) fn revocations(&self, in_force: usize, seen: Option<Duration>) {
        self.control.revocations.set(i64::try_from(in_force).unwrap_or(i64::MAX));
        self.control.revocations_age.set(seen.map_or(0.0, |seen| seen.as_secs_f64()));
    }

    /// A call about connections ended.
    pub(crate) fn control(&self, call: &'static str, code: &'static str) {
        self.control.calls.get_or_create(&CallLabel { call, code }).inc();
    }
}
