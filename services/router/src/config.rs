//! Configuration of the router.

use std::time::Duration;

use sanjay_protocol::names;
use sanjay_runtime::{ConfigError, Secret, Validate};
use serde::Deserialize;

use crate::redis::RedisConfig;

/// What can be set about a router.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Address that the gRPC server listens on.
    pub listen: String,
    /// Name of this router, unique in the cluster. Empty: `router-` and eight random digits.
    pub node: String,
    /// Where routers keep what they know together, and what carries messages between them: `memory`, or
    /// `redis://HOST:PORT` and perhaps `/DB`. With `memory` there must be no second router: each would know
    /// only its own edges and number the same channels by itself, and nothing can detect that.
    pub registry: String,
    /// User that Redis knows the router by; empty for its default user.
    pub redis_username: String,
    /// Password of that user; empty when Redis asks for none.
    pub redis_password: Secret,
    /// How long, in milliseconds, connecting to Redis and each call may take (50 to 60,000, and at most a
    /// third of `lease_ms`).
    pub redis_timeout_ms: u32,
    /// For how long, in milliseconds, an edge's sessions are kept after its stream ended, and an edge counts
    /// as attached after its router was heard of last (1,000 to 600,000). For as long after its start the
    /// router does not call anybody offline.
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
    /// Most bytes that the histories of all channels may take in the memory registry (at least 1 MiB); the oldest
    /// publications go first. Redis has a bound of its own.
    pub max_history_bytes: usize,
    /// Recent milestones that are kept for tracing, about 100 bytes each.
    pub milestones: usize,
    /// Whether the gRPC server describes its services to whoever asks.
    pub reflection: bool,
}

/// Value of `router.registry` for the embedded adapters.
const MEMORY: &str = "memory";

impl Config {
    /// The Redis server to use, or nothing for the memory of this process.
    ///
    /// # Errors
    /// When `router.registry` is neither.
    pub fn redis(&self) -> Result<Option<RedisConfig>, ConfigError> {
        if self.registry == MEMORY {
            if !self.redis_username.is_empty() || !self.redis_password.is_empty() {
                let problem = "is `memory`, but credentials for Redis are set";
                let fix = "set it to `redis://HOST:PORT`, or remove `router.redis_username` and `router.redis_password`";
                return Err(ConfigError::new("router.registry", problem, fix));
            }
            return Ok(None);
        }
        if !self.registry.contains("://") {
            let problem = "names no registry that there is";
            return Err(ConfigError::new("router.registry", problem, "use `memory` or `redis://HOST:PORT`"));
        }
        let redis = RedisConfig::parse(&self.registry)?;
        if !self.redis_username.is_empty() && self.redis_password.is_empty() {
            let fix = "set it too, or remove `router.redis_username`";
            return Err(ConfigError::new("router.redis_password", "is not set, but a user is", fix));
        }
        Ok(Some(RedisConfig {
            username: self.redis_username.clone(),
            password: self.redis_password.clone(),
            timeout: Duration::from_millis(self.redis_timeout_ms.into()),
            ..redis
        }))
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8083".into(),
            node: String::new(),
            registry: MEMORY.into(),
            redis_username: String::new(),
            redis_password: Secret::default(),
            redis_timeout_ms: 1_000,
            lease_ms: 10_000,
            mailbox_capacity: 16_384,
            max_channels_per_edge: 1_000_000,
            max_sessions_per_edge: 1_000_000,
            max_channels: 4_000_000,
            max_history_bytes: 256 * 1024 * 1024,
            milestones: 65_536,
            reflection: true,
        }
    }
}

impl Validate for Config {
    fn validate(&self) -> Result<(), ConfigError> {
        if let Err(error) = names::check_optional("it", &self.node) {
            return Err(ConfigError::new(
                "router.node",
                format!("is wrong: {error}"),
                "use a short name, or leave it out",
            ));
        }
        if !(1_000..=600_000).contains(&self.lease_ms) {
            let problem = format!("{} ms is out of range", self.lease_ms);
            return Err(ConfigError::new("router.lease_ms", problem, "use 1000 to 600000 milliseconds"));
        }
        if !(50..=60_000).contains(&self.redis_timeout_ms) {
            let problem = format!("{} ms is out of range", self.redis_timeout_ms);
            return Err(ConfigError::new("router.redis_timeout_ms", problem, "use 50 to 60000 milliseconds"));
        }
        // A lease is renewed three times, so that one call that fails does not end it.
        if self.redis()?.is_some() && self.redis_timeout_ms > self.lease_ms / 3 {
            let problem = format!("{} ms is more than a third of `router.lease_ms`", self.redis_timeout_ms);
            let fix = format!("use {} or less, or a longer lease", self.lease_ms / 3);
            return Err(ConfigError::new("router.redis_timeout_ms", problem, fix));
        }
        let least = [
            ("router.mailbox_capacity", self.mailbox_capacity, 16),
            ("router.max_channels_per_edge", self.max_channels_per_edge, 1),
            ("router.max_sessions_per_edge", self.max_sessions_per_edge, 1),
            ("router.max_channels", self.max_channels, 64),
            ("router.max_history_bytes", self.max_history_bytes, 1024 * 1024),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(config: Config) -> String {
        config.validate().expect_err("it is wrong").to_string()
    }

    #[test]
    fn the_registry_is_memory_or_redis() {
        let with = |registry: &str| Config { registry: registry.into(), ..Config::default() };
        assert_eq!(Config::default().redis(), Ok(None));
        let redis = Config {
            redis_username: "router".into(),
            redis_password: "hunter2".into(),
            redis_timeout_ms: 500,
            ..with("redis://there:7000/2")
        };
        assert_eq!(redis.validate(), Ok(()));
        let redis = redis.redis().unwrap().unwrap();
        assert_eq!((redis.host.as_str(), redis.port, redis.db), ("there", 7000, 2));
        assert_eq!((redis.password.expose(), redis.timeout), ("hunter2", Duration::from_millis(500)));
        assert!(!format!("{redis:?}").contains("hunter2"));

        assert!(problem(with("mongodb")).contains("use `memory` or `redis://HOST:PORT`"));
        assert!(problem(with("redis://a:b@there")).contains("router.redis_username"));
        let forgotten = Config { redis_password: "x".into(), ..Config::default() };
        assert!(problem(forgotten).contains("credentials for Redis are set"));
        let half = Config { redis_username: "x".into(), ..with("redis://there") };
        assert!(problem(half).contains("router.redis_password"));
        let slow = Config { redis_timeout_ms: 4_000, ..with("redis://there") };
        assert!(problem(slow).contains("use 3333 or less"));
        let slow = Config { redis_timeout_ms: 4_000, ..Config::default() };
        assert_eq!(slow.validate(), Ok(()), "memory does not care");
    }
}
