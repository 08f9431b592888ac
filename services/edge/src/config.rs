//! What can be set of an edge.

mod tokens;

use std::time::Duration;

use sanjay_protocol::names;
use sanjay_runtime::{ConfigError, Secret, Validate, grpc::Endpoints, jwt::Algorithm};
use serde::Deserialize;

pub use self::tokens::TokenKey;

/// Section `edge` of the configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where clients connect: `host:port`; port 0 picks a free one.
    pub listen: String,
    /// Name of this edge, unique in the cluster. Empty: `edge-` and a random part.
    pub node: String,
    /// The routers, `http://host:port`: one, or several as a list or with commas. A host name is resolved again
    /// and again, and each of its addresses is a router. The edge stays with one of them while that serves.
    pub router: Endpoints,
    /// The delivery nodes, in the same form; each call goes to one that serves.
    pub delivery: Endpoints,
    /// The secret that signs clients' tokens, at least as long as the hash of `token_algorithm`. May be left out where
    /// there are other keys.
    pub token_secret: Secret,
    /// What `token_secret` is for: `HS256`, `HS384` or `HS512`.
    pub token_algorithm: Algorithm,
    /// Public keys of whoever signs clients' tokens; while one is replaced, both.
    pub token_keys: Vec<TokenKey>,
    /// Where more public keys are published, as a JWKS document: `https://…` or `http://…`; empty: nowhere.
    pub token_jwks_url: String,
    /// Certificates in PEM that vouch for that server, in place of the public authorities, or the path of a file with
    /// them.
    pub token_jwks_ca: String,
    /// Published keys are fetched again after so many milliseconds, or sooner when the server asks for that.
    pub token_jwks_refresh_ms: u64,
    /// From the end of a fetch to the next one there are at least so many milliseconds, whatever tokens come.
    pub token_jwks_interval_ms: u64,
    /// What a token's `aud` has to name; empty: it is not looked at.
    pub token_audience: String,
    /// What a token's `iss` has to be; empty: it is not looked at.
    pub token_issuer: String,
    /// A connection whose token has ended has so many seconds for another one, without new subscriptions or publishes.
    pub token_grace_s: u64,
    /// Threads that own connections, 1 to 64. 0: one for each core.
    pub shards: usize,
    /// Origins from which browsers may connect: `https://example.com`, `https://*.example.com`,
    /// `http://localhost:*`, or `*`. A client that sends no `Origin` is no browser and needs none.
    pub allowed_origins: Vec<String>,
    /// Most connections of this edge; more are answered 503.
    pub max_connections: usize,
    /// A connection is pinged after so many milliseconds without a frame from it.
    pub heartbeat_ms: u64,
    /// A pinged connection has so many milliseconds to send any frame.
    pub heartbeat_grace_ms: u64,
    /// A connection has so many milliseconds from its accept until the upgrade.
    pub upgrade_timeout_ms: u64,
    /// An upgraded connection has so many milliseconds to say `hello`.
    pub hello_timeout_ms: u64,
    /// A client has so many milliseconds to answer an inbox message, from when its socket took it; then, if it is
    /// alive, the delivery has failed.
    pub ack_deadline_ms: u64,
    /// Most bytes that may wait for a slow socket when a channel message comes; beyond them it is closed (4413).
    pub max_outbox_bytes: usize,
    /// A socket that takes no byte of what waits for so many milliseconds is closed (4413).
    pub stall_timeout_ms: u64,
    /// Clients spread their reconnects after a lost edge over so many milliseconds.
    pub reconnect_spread_ms: u64,
    /// Publications and hints that may wait for one shard before they are dropped and a gap is signalled.
    pub shard_queue: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8080".to_owned(),
            node: String::new(),
            router: "http://127.0.0.1:8083".into(),
            delivery: "http://127.0.0.1:8082".into(),
            token_secret: Secret::default(),
            token_algorithm: Algorithm::Hs256,
            token_keys: Vec::new(),
            token_jwks_url: String::new(),
            token_jwks_ca: String::new(),
            token_jwks_refresh_ms: 300_000,
            token_jwks_interval_ms: 10_000,
            token_audience: String::new(),
            token_issuer: String::new(),
            token_grace_s: 25,
            shards: 0,
            allowed_origins: Vec::new(),
            max_connections: 100_000,
            heartbeat_ms: 25_000,
            heartbeat_grace_ms: 10_000,
            upgrade_timeout_ms: 5_000,
            hello_timeout_ms: 5_000,
            ack_deadline_ms: 30_000,
            max_outbox_bytes: 2 * 1024 * 1024,
            stall_timeout_ms: 10_000,
            reconnect_spread_ms: 5_000,
            shard_queue: 16_384,
        }
    }
}

/// Most shards: their set is a 64-bit mask.
pub const MAX_SHARDS: usize = 64;

impl Validate for Config {
    fn validate(&self) -> Result<(), ConfigError> {
        self.validate_tokens()?;
        if let Err(error) = names::check_optional("it", &self.node) {
            return Err(ConfigError::new(
                "edge.node",
                format!("is wrong: {error}"),
                "use a short name, or leave it out",
            ));
        }
        if self.shards > MAX_SHARDS {
            return Err(ConfigError::new(
                "edge.shards",
                format!("is {}", self.shards),
                "set it from 0 to 64",
            ));
        }
        self.router.validate("edge.router")?;
        self.delivery.validate("edge.delivery")?;
        let bounds = [
            ("edge.heartbeat_ms", self.heartbeat_ms, 100, 3_600_000),
            ("edge.heartbeat_grace_ms", self.heartbeat_grace_ms, 100, 600_000),
            ("edge.upgrade_timeout_ms", self.upgrade_timeout_ms, 100, 600_000),
            ("edge.hello_timeout_ms", self.hello_timeout_ms, 100, 600_000),
            ("edge.ack_deadline_ms", self.ack_deadline_ms, 100, 86_400_000),
            ("edge.stall_timeout_ms", self.stall_timeout_ms, 100, 600_000),
            ("edge.reconnect_spread_ms", self.reconnect_spread_ms, 0, 3_600_000),
            ("edge.token_jwks_refresh_ms", self.token_jwks_refresh_ms, 100, 86_400_000),
            ("edge.token_jwks_interval_ms", self.token_jwks_interval_ms, 100, 3_600_000),
            ("edge.token_grace_s", self.token_grace_s, 0, 3_600),
            ("edge.max_connections", self.max_connections as u64, 1, u64::from(u32::MAX)),
            ("edge.max_outbox_bytes", self.max_outbox_bytes as u64, 128 * 1024, 1 << 30),
            ("edge.shard_queue", self.shard_queue as u64, 16, 1 << 24),
        ];
        for (key, value, least, most) in bounds {
            if value < least || value > most {
                return Err(ConfigError::new(
                    key,
                    format!("is {value}"),
                    format!("set it from {least} to {most}"),
                ));
            }
        }
        Ok(())
    }
}

impl Config {
    pub(crate) fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    pub(crate) fn heartbeat_grace(&self) -> Duration {
        Duration::from_millis(self.heartbeat_grace_ms)
    }

    pub(crate) fn hello_timeout(&self) -> Duration {
        Duration::from_millis(self.hello_timeout_ms)
    }

    pub(crate) fn ack_deadline(&self) -> Duration {
        Duration::from_millis(self.ack_deadline_ms)
    }

    pub(crate) fn upgrade_timeout(&self) -> Duration {
        Duration::from_millis(self.upgrade_timeout_ms)
    }

    pub(crate) fn stall_timeout(&self) -> Duration {
        Duration::from_millis(self.stall_timeout_ms)
    }

    pub(crate) fn reconnect_spread(&self) -> Duration {
        Duration::from_millis(self.reconnect_spread_ms)
    }
}
