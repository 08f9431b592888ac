//! What is counted of the breakers of one role.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DependencyLabel {
    dependency: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RefusedLabel {
    dependency: &'static str,
    reason: &'static str,
}

/// The metrics of all breakers of one role; clones count together.
#[derive(Debug, Clone, Default)]
pub struct Breakers {
    states: Family<DependencyLabel, Gauge>,
    opened: Family<DependencyLabel, Counter>,
    refused: Family<RefusedLabel, Counter>,
}

impl Breakers {
    /// Makes the metrics and registers them for a role, such as `delivery`.
    #[must_use]
    pub fn register(registry: &mut Registry, role: &str) -> Self {
        let metrics = Self::register_states(registry, role);
        let registry = registry.sub_registry_with_prefix(role);
        let help = "How often calls to this dependency failed so much that they were refused from then on";
        registry.register("dependency_breaker_opened", help, metrics.opened.clone());
        let help = "Calls to this dependency that were not made (open: the breaker was open, full: too many were under \
                    way) or given up (late)";
        registry.register("dependency_calls_refused", help, metrics.refused.clone());
        metrics
    }

    /// Likewise, for a role without a [`Policy`](crate::Policy): the states alone.
    #[must_use]
    pub fn register_states(registry: &mut Registry, role: &str) -> Self {
        let metrics = Self::default();
        let help = "Whether calls to this dependency pass: 0 they do (closed), 1 a probe is under way (half-open), 2 \
                    they are refused (open). Of roles with several processes: 0 while one of them serves, else 2";
        let registry = registry.sub_registry_with_prefix(role);
        registry.register("dependency_breaker_state", help, metrics.states.clone());
        metrics
    }

    /// The state of a dependency whose calls are refused by something else than a [`Policy`](crate::Policy).
    #[must_use]
    pub fn state(&self, dependency: &'static str) -> Gauge {
        self.states.get_or_create_owned(&DependencyLabel { dependency })
    }

    /// Those of one dependency, at hand without a look-up.
    #[must_use]
    pub fn of(&self, dependency: &'static str) -> DependencyMetrics {
        let refused = |reason| self.refused.get_or_create_owned(&RefusedLabel { dependency, reason });
        DependencyMetrics {
            state: self.state(dependency),
            opened: self.opened.get_or_create_owned(&DependencyLabel { dependency }),
            open: refused("open"),
            full: refused("full"),
            late: refused("late"),
        }
    }
}

/// The metrics of one dependency.
#[derive(Debug, Clone)]
pub struct DependencyMetrics {
    pub(crate) state: Gauge,
    pub(crate) opened: Counter,
    pub(crate) open: Counter,
    pub(crate) full: Counter,
    pub(crate) late: Counter,
}
