//! What the composition root of every role gets from the process that starts it.

use std::sync::Arc;

use crate::{
    clock::{SharedClock, SystemClock},
    lifecycle::Lifecycle,
    namespaces::SharedNamespaces,
    random::{OsRandom, SharedRandom},
    readiness::Readiness,
    secret::Secret,
};

/// The surroundings of a role. Roles of one process share them.
#[derive(Clone)]
pub struct Context {
    /// Wall-clock time.
    pub clock: SharedClock,
    /// Randomness.
    pub random: SharedRandom,
    /// Where tasks are spawned, and how they are told to end.
    pub lifecycle: Lifecycle,
    /// Where a role says whether it can serve.
    pub readiness: Readiness,
    /// Settings of channels, which may be replaced at any time.
    pub namespaces: SharedNamespaces,
    /// What the processes of a cluster prove to each other.
    pub cluster_key: Secret,
}

impl Context {
    /// The surroundings of a real process: the operating system's clock and randomness, nothing running yet.
    #[must_use]
    pub fn system(cluster_key: Secret) -> Self {
        Self {
            clock: Arc::new(SystemClock),
            random: Arc::new(OsRandom),
            lifecycle: Lifecycle::new(),
            readiness: Readiness::new(),
            namespaces: SharedNamespaces::default(),
            cluster_key,
        }
    }
}
