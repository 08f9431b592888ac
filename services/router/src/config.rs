//! Configuration of the router.

use sanjay_protocol::names;
use sanjay_runtime::{ConfigError, Validate};
use serde::{Deserialize, Serialize};

/// What can be set about a router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address that the gRPC server listens on.
    pub listen: String,
    /// Stable name of this router, unique in the cluster.
    pub node: String,
    /// For how long, in milliseconds, an edge's sessions are kept after its stream ended (1,000 to
    /// 600,000). For as long after its start the router does not call anybody offline.
    pub lease_ms: u32,
    /// Events that may wait for one edge before publications and hints are dropped (at least 16). A payload
    /// has at most 64 KiB, and is shared between edges while it waits.
    pub mailbox_capacity: usize,
    /// Most channels that one edge may hold.
    pub max_channels_per_edge: usize,
    /// Most sessions that one edge may hold.
    pub max_sessions_per_edge: usize,
    /// Most channels that the memory registry has state of, about 300 bytes each.
    pub max_channels: usize,
    /// Recent milestones that are kept for tracing, about 100 bytes each.
    pub milestones: usize,
    /// Whether the gRPC server describes its services to whoever asks.
    pub reflection: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8083".into(),
            node: "router-1".into(),
            lease_ms: 10_000,
            mailbox_capacity: 16_384,
            max_channels_per_edge: 1_000_000,
            max_sessions_per_edge: 1_000_000,
            max_channels: 4_000_000,
            milestones: 65_536,
            reflection: true,
        }
    }
}

impl Validate for Config {
    fn validate(&self) -> Result<(), ConfigError> {
        if let Err(error) = names::check("it", &self.node) {
            return Err(ConfigError::new(
                "router.node",
                error.to_string(),
                "use a short name, such as `router-1`",
            ));
        }
        if !(1_000..=600_000).contains(&self.lease_ms) {
            let problem = format!("{} ms is out of range", self.lease_ms);
            return Err(ConfigError::new("router.lease_ms", problem, "use 1000 to 600000 milliseconds"));
        }
        let least = [
            ("router.mailbox_capacity", self.mailbox_capacity, 16),
            ("router.max_channels_per_edge", self.max_channels_per_edge, 1),
            ("router.max_sessions_per_edge", self.max_sessions_per_edge, 1),
            ("router.max_channels", self.max_channels, 64),
            ("router.milestones", self.milestones, 1),
        ];
        for (key, value, least) in least {
            if value < least {
                let problem = format!("{value} is too small");
                return Err(ConfigError::new(key, problem, format!("use {least} or more")));
            }
        }
        Ok(())
    }
}
