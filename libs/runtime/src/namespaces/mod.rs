//! Settings of channels, by namespace: what stands before the first `:` of a channel's name.
//!
//! A channel without `:` belongs to the namespace `default`, and so does one whose namespace is not configured. Every
//! role reads the same section, and reads it again on a signal ([`SharedNamespaces`]).

mod shared;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use sanjay_protocol::{limits::MAX_PAYLOAD_BYTES, names};
use serde::Deserialize;

pub use shared::{Change, SharedNamespaces};

use crate::config::{ConfigError, Validate};

/// The namespace of channels whose own has no settings.
pub const DEFAULT: &str = "default";

/// Most messages that a channel's history may keep: a reader pages through them, and a registry holds them in memory.
pub const MAX_HISTORY_SIZE: u32 = 10_000;

/// Longest time that a message may stay in a history, in seconds: a week. What must be kept longer belongs in a database.
pub const MAX_HISTORY_TTL_S: u32 = 7 * 24 * 60 * 60;

/// Most namespaces.
pub const MAX_NAMESPACES: usize = 1_000;

/// The settings of a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Namespace {
    /// Messages that a channel's history keeps, at most [`MAX_HISTORY_SIZE`]; 0: it has none.
    pub history_size: u32,
    /// For how many seconds it keeps each, from 1 to [`MAX_HISTORY_TTL_S`].
    pub history_ttl_s: u32,
    /// Who may publish.
    pub publish: Publishers,
    /// Whether a capability is not enough to subscribe.
    pub private: bool,
    /// Most bytes of a payload, from 1 to the protocol's [`MAX_PAYLOAD_BYTES`].
    pub max_payload_bytes: usize,
    /// Most subscribers that one edge lets into a channel; 0: as many as there are.
    pub max_subscribers: u32,
}

/// Who may publish to a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Publishers {
    /// Clients with the capability, and back ends.
    #[default]
    Clients,
    /// Back ends alone.
    Backends,
}

impl Default for Namespace {
    fn default() -> Self {
        Self {
            history_size: 0,
            history_ttl_s: 300,
            publish: Publishers::default(),
            private: false,
            max_payload_bytes: MAX_PAYLOAD_BYTES,
            max_subscribers: 0,
        }
    }
}

/// The section `namespaces`: the settings of each by its name.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(transparent)]
pub struct Namespaces(BTreeMap<String, Namespace>);

/// The name of the namespace that a channel says it belongs to.
#[must_use]
pub fn name_of(channel: &str) -> &str {
    channel.split_once(':').map_or(DEFAULT, |(name, _)| name)
}

impl Namespaces {
    /// The settings of a channel.
    #[must_use]
    pub fn of(&self, channel: &str) -> Namespace {
        // Most deployments have none: then no name is looked for.
        if self.0.is_empty() {
            return Namespace::default();
        }
        let named = self.0.get(name_of(channel)).or_else(|| self.0.get(DEFAULT));
        named.copied().unwrap_or_default()
    }

    /// Which namespaces `newer` has that this lacks, lacks that this has, or has with other settings: `+name`, `-name`,
    /// `~name`.
    #[must_use]
    pub fn changes(&self, newer: &Self) -> Vec<String> {
        let gone = self.0.keys().filter(|name| !newer.0.contains_key(*name)).map(|name| format!("-{name}"));
        let come = newer.0.iter().filter_map(|(name, settings)| match self.0.get(name) {
            None => Some(format!("+{name}")),
            Some(before) if before != settings => Some(format!("~{name}")),
            Some(_) => None,
        });
        gone.chain(come).collect()
    }
}

impl FromIterator<(String, Namespace)> for Namespaces {
    fn from_iter<I: IntoIterator<Item = (String, Namespace)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

impl Validate for Namespaces {
    fn validate(&self) -> Result<(), ConfigError> {
        if self.0.len() > MAX_NAMESPACES {
            let problem = format!("has {} namespaces", self.0.len());
            let fix = format!(
                "use at most {MAX_NAMESPACES}; channels of one kind share a namespace: `chat:1`, `chat:2`"
            );
            return Err(ConfigError::new("namespaces", problem, fix));
        }
        for (name, settings) in &self.0 {
            check_name(name)?;
            settings.validate(name)?;
        }
        Ok(())
    }
}

fn check_name(name: &str) -> Result<(), ConfigError> {
    let key = format!("namespaces.{name}");
    if name.contains(':') {
        let fix = "name it by what stands before the first `:` of its channels";
        return Err(ConfigError::new(key, "has a `:` in its name, so no channel is in it", fix));
    }
    if let Err(error) = names::check("it", name) {
        let fix = "use the beginning of channel names, such as `chat` for `chat:1`";
        return Err(ConfigError::new(key, format!("has a wrong name: {error}"), fix));
    }
    Ok(())
}

impl Namespace {
    fn validate(&self, name: &str) -> Result<(), ConfigError> {
        let bounds = [
            ("history_size", u64::from(self.history_size), 0, u64::from(MAX_HISTORY_SIZE)),
            ("history_ttl_s", u64::from(self.history_ttl_s), 1, u64::from(MAX_HISTORY_TTL_S)),
            ("max_payload_bytes", self.max_payload_bytes as u64, 1, MAX_PAYLOAD_BYTES as u64),
        ];
        for (key, value, least, most) in bounds {
            if value < least || value > most {
                let key = format!("namespaces.{name}.{key}");
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
