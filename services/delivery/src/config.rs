//! The configuration of a delivery node.

use std::{collections::BTreeSet, time::Duration};

use sanjay_runtime::{
    Secret,
    config::{ConfigError, Validate},
    grpc::Endpoints,
};
use serde::Deserialize;

use crate::{
    auth::{ApiKey, parse_hash},
    store::{self, Location, LocationError},
};

/// Most seconds that `max_age_s` may be.
const MAX_AGE_S: u64 = 315_360_000;

/// Bounds of `max_token_life_s`: a minute, and ten years.
const TOKEN_LIFE_S: std::ops::RangeInclusive<u64> = 60..=315_360_000;

/// What becomes of a message for a full inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overflow {
    /// It is refused.
    Reject,
    /// The oldest unsettled messages become dead letters.
    DeadLetterOldest,
}

/// Which devices of a user have to acknowledge a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Devices {
    /// Any of them: the first ack settles it.
    Any,
    /// Every one: it is settled when all that are registered have acked it.
    Every,
}

impl From<Overflow> for store::Overflow {
    fn from(overflow: Overflow) -> Self {
        match overflow {
            Overflow::Reject => store::Overflow::Reject,
            Overflow::DeadLetterOldest => store::Overflow::DeadLetterOldest,
        }
    }
}

/// Settings of a delivery node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the gRPC server listens, for back ends and for edges.
    pub listen: String,
    /// The routers, `http://host:port`: one, or several as a list or with commas. A host name is resolved again
    /// and again, and each of its addresses is a router.
    pub router: Endpoints,
    /// Where inboxes live: `redb:PATH`, a file of this node alone, or
    /// `mongodb://HOST:PORT[,HOST:PORT…]/DATABASE[?options]`, which nodes share.
    pub store: String,
    /// User name for MongoDB; empty to connect without credentials.
    pub mongodb_username: String,
    /// The password of that user.
    pub mongodb_password: Secret,
    /// Who may call the back ends' API.
    pub api_keys: Vec<ApiKey>,
    /// Whether gRPC reflection is served; it needs no key.
    pub reflection: bool,
    /// Most unsettled messages of one inbox, 1 to 10,000,000.
    pub max_unsettled: u64,
    /// Most bytes of their encoded payloads, 65,536 to 1,099,511,627,776.
    pub max_unsettled_bytes: u64,
    /// What becomes of a message for an inbox at one of these two limits.
    pub overflow: Overflow,
    /// Most seconds that a message waits to be acknowledged before it expires, whatever its sender asked for; 0 for no
    /// limit, at most 315,360,000.
    pub max_age_s: u64,
    /// Whether expired messages are kept as dead letters.
    pub keep_expired: bool,
    /// Which devices of a user have to acknowledge a message: `any`, or `every` one.
    pub devices: Devices,
    /// How many deliveries of a message may fail before it becomes a dead letter, 1 to 100.
    pub max_attempts: u32,
    /// How many members a channel may have, 1 to 100,000,000.
    pub max_members: u64,
    /// Most seconds that a client's token lives, 60 to 315,360,000: revocations are kept for so long.
    pub max_token_life_s: u64,
    /// How long a call may take before it is answered with `unavailable`, in milliseconds, 100 to 60,000.
    pub call_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8082".to_owned(),
            router: "http://127.0.0.1:8083".into(),
            store: "redb:inbox.redb".to_owned(),
            mongodb_username: String::new(),
            mongodb_password: Secret::default(),
            api_keys: Vec::new(),
            reflection: true,
            max_unsettled: 100_000,
            max_unsettled_bytes: 1 << 30,
            overflow: Overflow::Reject,
            max_age_s: 0,
            keep_expired: false,
            devices: Devices::Any,
            max_attempts: 8,
            max_members: 1_000_000,
            max_token_life_s: 31 * 24 * 60 * 60,
            call_timeout_ms: 5_000,
        }
    }
}

impl Config {
    /// The deadline of one call.
    #[must_use]
    pub fn call_timeout(&self) -> Duration {
        Duration::from_millis(self.call_timeout_ms)
    }

    /// Most time that a message waits to be acknowledged.
    #[must_use]
    pub fn max_age(&self) -> Option<Duration> {
        Some(self.max_age_s).filter(|seconds| *seconds > 0).map(Duration::from_secs)
    }

    /// How long a client's token may live.
    #[must_use]
    pub fn max_token_life(&self) -> Duration {
        Duration::from_secs(self.max_token_life_s)
    }

    /// Where inboxes live, with what it takes to log in there.
    ///
    /// # Errors
    /// When `store` has no known form.
    pub fn location(&self) -> Result<Location, LocationError> {
        let location: Location = self.store.parse()?;
        Ok(location.with_credentials(&self.mongodb_username, &self.mongodb_password))
    }

    /// Checks where inboxes live, and that the credentials fit that.
    fn validate_store(&self) -> Result<(), ConfigError> {
        let (name, password) = (!self.mongodb_username.is_empty(), !self.mongodb_password.is_empty());
        let (key, problem, fix) = match self.location() {
            Err(problem) => {
                let fix =
                    "set it to redb:PATH, or to mongodb://HOST:PORT/DATABASE for inboxes that nodes share";
                ("store", format!("is wrong: {problem}"), fix)
            }
            Ok(Location::Redb(_)) if name || password => {
                let key = if name { "mongodb_username" } else { "mongodb_password" };
                let fix = "remove it, or set delivery.store to mongodb://HOST:PORT/DATABASE";
                (key, "is set, and delivery.store is a file".to_owned(), fix)
            }
            Ok(Location::Mongodb(_)) if name != password => {
                let (missing, other) = if name {
                    ("mongodb_password", "delivery.mongodb_username")
                } else {
                    ("mongodb_username", "delivery.mongodb_password")
                };
                (missing, format!("is not set, and {other} is"), "set both or neither")
            }
            Ok(_) => return Ok(()),
        };
        Err(ConfigError::new(format!("delivery.{key}"), problem, fix))
    }
}

impl Validate for Config {
    fn validate(&self) -> Result<(), ConfigError> {
        let error = |key: &str, problem: String, fix: &str| {
            Err(ConfigError::new(format!("delivery.{key}"), problem, fix))
        };
        self.validate_store()?;
        self.router.validate("delivery.router")?;
        if !(1..=10_000_000).contains(&self.max_unsettled) {
            let problem = format!("is {}, out of bounds", self.max_unsettled);
            return error("max_unsettled", problem, "set it between 1 and 10000000");
        }
        if !(65_536..=1 << 40).contains(&self.max_unsettled_bytes) {
            let problem = format!("is {}, out of bounds", self.max_unsettled_bytes);
            return error("max_unsettled_bytes", problem, "set it between 65536 and 1099511627776");
        }
        if self.max_age_s > MAX_AGE_S {
            let problem = format!("is {}, out of bounds", self.max_age_s);
            return error(
                "max_age_s",
                problem,
                "set it between 1 and 315360000 (ten years), or to 0 for no limit",
            );
        }
        if !(1..=100).contains(&self.max_attempts) {
            let problem = format!("is {}, out of bounds", self.max_attempts);
            return error("max_attempts", problem, "set it between 1 and 100");
        }
        if !(1..=100_000_000).contains(&self.max_members) {
            let problem = format!("is {}, out of bounds", self.max_members);
            return error("max_members", problem, "set it between 1 and 100000000");
        }
        if !TOKEN_LIFE_S.contains(&self.max_token_life_s) {
            let problem = format!("is {}, out of bounds", self.max_token_life_s);
            return error("max_token_life_s", problem, "set it between 60 and 315360000 (ten years)");
        }
        if !(100..=60_000).contains(&self.call_timeout_ms) {
            let problem = format!("is {}, out of bounds", self.call_timeout_ms);
            return error("call_timeout_ms", problem, "set it between 100 and 60000");
        }
        let mut names = BTreeSet::new();
        for (index, key) in self.api_keys.iter().enumerate() {
            if let Err(problem) = sanjay_protocol::names::check("name", &key.name) {
                return error(
                    &format!("api_keys[{index}].name"),
                    format!("is wrong: {problem}"),
                    "name the back end",
                );
            }
            if !names.insert(&key.name) {
                // A caller's name scopes its dedupe keys, so two back ends under one name would mix theirs.
                let problem = format!("is {:?}, which another key has", key.name);
                return error(&format!("api_keys[{index}].name"), problem, "give each key its own name");
            }
            if parse_hash(&key.sha256).is_none() {
                let fix = "set it to the 64 hex digits that `printf %s KEY | sha256sum` prints";
                return error(
                    &format!("api_keys[{index}].sha256"),
                    "is not a SHA-256 in hex".to_owned(),
                    fix,
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_key() {
        assert_eq!(Config::default().validate(), Ok(()));
        let key = |name: &str, sha256: &str| ApiKey { name: name.into(), sha256: sha256.into() };
        let good = crate::hash_api_key("k");
        type Change = Box<dyn Fn(&mut Config)>;
        let cases: [(&str, Change); 20] = [
            ("delivery.store", Box::new(|c| c.store = "mongo".into())),
            ("delivery.store", Box::new(|c| c.store = "mongodb://a:1".into())),
            ("delivery.store", Box::new(|c| c.store = "mongodb://bob:hunter2@a:1/db".into())),
            ("delivery.mongodb_username", Box::new(|c| c.mongodb_username = "bob".into())),
            (
                "delivery.mongodb_password",
                Box::new(|c| {
                    (c.store, c.mongodb_username) = ("mongodb://a:1/db".into(), "bob".into());
                }),
            ),
            (
                "delivery.mongodb_username",
                Box::new(|c| {
                    (c.store, c.mongodb_password) = ("mongodb://a:1/db".into(), "hunter2".into());
                }),
            ),
            ("delivery.router", Box::new(|c| c.router = "localhost:8083".into())),
            ("delivery.max_unsettled", Box::new(|c| c.max_unsettled = 0)),
            ("delivery.max_unsettled_bytes", Box::new(|c| c.max_unsettled_bytes = 65_535)),
            ("delivery.max_age_s", Box::new(|c| c.max_age_s = 315_360_001)),
            ("delivery.max_attempts", Box::new(|c| c.max_attempts = 0)),
            ("delivery.max_attempts", Box::new(|c| c.max_attempts = 101)),
            ("delivery.max_members", Box::new(|c| c.max_members = 0)),
            ("delivery.max_members", Box::new(|c| c.max_members = 100_000_001)),
            ("delivery.max_token_life_s", Box::new(|c| c.max_token_life_s = 59)),
            ("delivery.max_token_life_s", Box::new(|c| c.max_token_life_s = 315_360_001)),
            ("delivery.call_timeout_ms", Box::new(|c| c.call_timeout_ms = 1)),
            ("delivery.api_keys[0].name", Box::new(move |c| c.api_keys = vec![key("", "")])),
            ("delivery.api_keys[0].sha256", Box::new(move |c| c.api_keys = vec![key("a", "12")])),
            (
                "delivery.api_keys[1].name",
                Box::new(move |c| c.api_keys = vec![key("a", &good), key("a", &good)]),
            ),
        ];
        for (name, change) in cases {
            let mut config = Config::default();
            change(&mut config);
            assert_eq!(config.validate().expect_err(name).key, name);
        }
    }
}
