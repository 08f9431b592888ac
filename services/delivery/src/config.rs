//! The configuration of a delivery node.

use std::{collections::BTreeSet, time::Duration};

use sanjay_runtime::config::{ConfigError, Validate};
use serde::{Deserialize, Serialize};

use crate::{
    auth::{ApiKey, parse_hash},
    store::Location,
};

/// Settings of a delivery node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where the gRPC server listens, for back ends and for edges.
    pub listen: String,
    /// URL of the router.
    pub router: String,
    /// Where inboxes live: `redb:PATH`.
    pub store: String,
    /// Who may call the back ends' API.
    pub api_keys: Vec<ApiKey>,
    /// Whether gRPC reflection is served; it needs no key.
    pub reflection: bool,
    /// Most unsettled messages of one inbox, 1 to 10,000,000.
    pub max_unsettled: u64,
    /// How long a call may take before it is answered with `unavailable`, in milliseconds, 100 to 60,000.
    pub call_timeout_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8082".to_owned(),
            router: "http://127.0.0.1:8083".to_owned(),
            store: "redb:inbox.redb".to_owned(),
            api_keys: Vec::new(),
            reflection: true,
            max_unsettled: 100_000,
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
}

impl Validate for Config {
    fn validate(&self) -> Result<(), ConfigError> {
        let error = |key: &str, problem: String, fix: &str| {
            Err(ConfigError::new(format!("delivery.{key}"), problem, fix))
        };
        if let Err(problem) = self.store.parse::<Location>() {
            return error("store", format!("is wrong: {problem}"), "set it to redb:PATH");
        }
        if !self.router.starts_with("http://") {
            let problem = format!("is {:?}, which is not the URL of a router", self.router);
            return error(
                "router",
                problem,
                "set it to the router's gRPC address, such as http://127.0.0.1:8083",
            );
        }
        if !(1..=10_000_000).contains(&self.max_unsettled) {
            let problem = format!("is {}, out of bounds", self.max_unsettled);
            return error("max_unsettled", problem, "set it between 1 and 10000000");
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
        let cases: [(&str, Change); 7] = [
            ("delivery.store", Box::new(|c| c.store = "mongo".into())),
            ("delivery.router", Box::new(|c| c.router = "localhost:8083".into())),
            ("delivery.max_unsettled", Box::new(|c| c.max_unsettled = 0)),
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
