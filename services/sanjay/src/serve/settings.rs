//! The whole configuration: one section for each role, and those that every process has.

use std::path::Path;

use sanjay_runtime::{ConfigError, Namespaces, Secret, Validate, config::Layers, telemetry::TelemetryConfig};
use serde::Deserialize;

/// Shortest key that members of a cluster show each other.
const MIN_CLUSTER_KEY_BYTES: usize = 16;

/// Everything that can be set. A file may hold sections that a process has no use for, so that one file can
/// serve a whole cluster.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Settings {
    /// Edges.
    pub(crate) edge: sanjay_edge::Config,
    /// Routers.
    pub(crate) router: sanjay_router::Config,
    /// Delivery nodes.
    pub(crate) delivery: sanjay_delivery::Config,
    /// Settings of channels, for every role.
    pub(crate) namespaces: Namespaces,
    /// Logs and traces.
    pub(crate) telemetry: TelemetryConfig,
    /// Admin pages.
    pub(crate) admin: Admin,
    /// What members of a cluster share.
    pub(crate) cluster: Cluster,
}

impl Settings {
    /// Checks what is shared or signs.
    ///
    /// # Errors
    /// When a secret is too short.
    pub(crate) fn validate_secrets(&self) -> Result<(), ConfigError> {
        self.cluster.validate()?;
        self.edge.validate()
    }
}

/// Section `admin`.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Admin {
    /// Where `/healthz`, `/readyz` and `/metrics` are: `host:port`; port 0 picks a free one.
    pub(crate) listen: String,
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: "127.0.0.1:8081".to_owned() }
    }
}

/// Section `cluster`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Cluster {
    /// The key with which edges, routers and delivery nodes call each other, at least 16 bytes.
    pub(crate) key: Secret,
}

impl Cluster {
    fn validate(&self) -> Result<(), ConfigError> {
        let length = self.key.expose().len();
        if length < MIN_CLUSTER_KEY_BYTES {
            let problem = format!("has {length} bytes");
            let fix = "set it to at least 16 random bytes, the same for every edge, router and delivery node";
            return Err(ConfigError::new("cluster.key", problem, fix));
        }
        Ok(())
    }
}

macro_rules! for_role {
    ($($(#[$doc:meta])* $name:ident: $($check:ident).+;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Deserialize)]
        #[serde(transparent)]
        pub(crate) struct $name(pub(crate) Settings);

        impl Validate for $name {
            fn validate(&self) -> Result<(), ConfigError> {
                self.0.telemetry.validate()?;
                self.0.cluster.validate()?;
                self.0.namespaces.validate()?;
                self.0.$($check).+.validate()
            }
        }
    )*};
}

for_role! {
    /// The settings of an edge process.
    EdgeSettings: edge;
    /// The settings of a router process.
    RouterSettings: router;
    /// The settings of a delivery process.
    DeliverySettings: delivery;
}

/// Where the admin pages of a server are, whatever its role. Nothing else is looked at.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct AdminSettings {
    /// Admin pages.
    pub(crate) admin: Admin,
}

impl Validate for AdminSettings {
    fn validate(&self) -> Result<(), ConfigError> {
        Ok(())
    }
}

/// The settings of `standalone`, which makes its own secrets where none are given.
#[derive(Debug, Clone, Deserialize)]
#[serde(transparent)]
pub(crate) struct StandaloneSettings(pub(crate) Settings);

impl Validate for StandaloneSettings {
    fn validate(&self) -> Result<(), ConfigError> {
        self.0.telemetry.validate()?;
        self.0.namespaces.validate()?;
        self.0.router.validate()?;
        self.0.delivery.validate()?;
        if !self.0.cluster.key.is_empty() {
            self.0.cluster.validate()?;
        }
        // The edge is checked with a secret in its place when it has none yet.
        let mut edge = self.0.edge.clone();
        if edge.token_secret.is_empty() {
            edge.token_secret = Secret::new("x".repeat(64));
        }
        edge.validate()
    }
}

/// The layers below the flags.
///
/// # Errors
/// When the environment holds a variable that is no text.
pub(crate) fn layers(file: Option<&Path>) -> anyhow::Result<Layers> {
    let layers = match file {
        Some(file) => Layers::new().file(file),
        None => Layers::new(),
    };
    Ok(layers.environment()?)
}
