//! What a token grants: its claims and the match of capabilities against channels.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What a capability allows on a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Receive the channel's messages.
    Subscribe,
    /// Publish to the channel.
    Publish,
    /// See who is there.
    Presence,
    /// Read past messages.
    History,
    /// An action that this build does not know; it grants nothing.
    #[serde(other)]
    Unknown,
}

/// Channel patterns with what each allows. A pattern is a channel's name, or a prefix followed by `*`.
/// What no pattern allows is denied.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Capabilities(BTreeMap<String, Vec<Action>>);

impl Capabilities {
    /// Every action on every channel; for the development token.
    #[must_use]
    pub fn everything() -> Self {
        use Action::{History, Presence, Publish, Subscribe};
        Self(BTreeMap::from([("*".to_owned(), vec![Subscribe, Publish, Presence, History])]))
    }

    /// Whether they say nothing at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether some pattern allows `action` on `channel`.
    #[must_use]
    pub fn allow(&self, action: Action, channel: &str) -> bool {
        action != Action::Unknown
            && self.0.iter().any(|(pattern, actions)| matches(pattern, channel) && actions.contains(&action))
    }
}

impl FromIterator<(String, Vec<Action>)> for Capabilities {
    fn from_iter<I: IntoIterator<Item = (String, Vec<Action>)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

fn matches(pattern: &str, channel: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => channel.starts_with(prefix),
        None => pattern == channel,
    }
}

/// The claims of a client's token (JWT).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// The user.
    pub sub: String,
    /// When the token ends, in Unix seconds.
    pub exp: u64,
    /// When it was made, in Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iat: Option<u64>,
    /// Not to be used before, in Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nbf: Option<u64>,
    /// Names the token, so that it can be revoked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
    /// What the user may do.
    #[serde(default)]
    pub caps: Capabilities,
    /// The channel of a subscription token, which is good for nothing else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_granted_is_denied() {
        let caps: Capabilities = serde_json::from_str(
            r#"{"chat:*": ["subscribe", "publish"], "news": ["subscribe", "teleport"]}"#,
        )
        .unwrap();
        assert!(caps.allow(Action::Publish, "chat:1"));
        assert!(caps.allow(Action::Subscribe, "news"));
        assert!(!caps.allow(Action::Publish, "news"));
        assert!(!caps.allow(Action::Subscribe, "news2"));
        assert!(!caps.allow(Action::Unknown, "news"));
        assert!(!caps.allow(Action::History, "chat:1"));
        assert!(!Capabilities::default().allow(Action::Subscribe, "news"));
        assert!(Capabilities::everything().allow(Action::History, "anything"));
    }
}
