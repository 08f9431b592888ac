//! Whether what a role depends on answers it.

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge},
    registry::Registry,
};

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DependencyLabel {
    dependency: &'static str,
}

/// The gauges of one role: 1 while the dependency answers, 0 while it does not or was not reached yet.
#[derive(Debug, Clone, Default)]
pub struct Dependencies(Family<DependencyLabel, Gauge>);

impl Dependencies {
    /// Makes the gauges and registers them for a role, such as `edge`.
    #[must_use]
    pub fn register(registry: &mut Registry, role: &str) -> Self {
        let up = Self::default();
        let help = "1 while this dependency answers, else 0";
        registry.sub_registry_with_prefix(role).register("dependency_up", help, up.0.clone());
        up
    }

    /// The gauge of one dependency, which begins at 0.
    #[must_use]
    pub fn of(&self, dependency: &'static str) -> Gauge {
        self.0.get_or_create_owned(&DependencyLabel { dependency })
    }
}
