//! `sanjay token`: makes a token for a user, as a product's back end would.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context as _;
use sanjay_client::protocol::{
    names,
    token::{Action, Capabilities, Claims},
};
use sanjay_runtime::{Clock, Secret, SystemClock, jwt};

use crate::{output, settings::SecretArgs};

/// How long a token for one command lives.
const SHORT: Duration = Duration::from_secs(24 * 60 * 60);

/// Make a token for a user
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The user
    user: String,
    /// How long the token is valid, such as 90s, 15m, 24h or 7d
    #[arg(long, default_value = "24h", value_parser = parse_span)]
    ttl: Duration,
    /// What the user may do, as JSON [default: everything]
    #[arg(long, value_name = "JSON", value_parser = parse_caps)]
    caps: Option<Capabilities>,
    #[command(flatten)]
    secret: SecretArgs,
}

impl Args {
    /// Prints the token.
    ///
    /// # Errors
    /// When the name is none or no secret is known.
    pub(crate) fn run(self) -> anyhow::Result<()> {
        names::check("user", &self.user)?;
        let secret = self.secret.token_secret()?;
        let caps = self.caps.unwrap_or_else(Capabilities::everything);
        output::line(&sign(&self.user, caps, self.ttl, &secret, &SystemClock))
    }
}

/// A token for `user` that may do everything for a day.
pub(crate) fn mint(user: &str, secret: &Secret) -> String {
    sign(user, Capabilities::everything(), SHORT, secret, &SystemClock)
}

fn sign(user: &str, caps: Capabilities, ttl: Duration, secret: &Secret, clock: &dyn Clock) -> String {
    let now = clock.now_s();
    let exp = now.saturating_add(ttl.as_secs());
    jwt::sign(&Claims { sub: user.to_owned(), exp, iat: Some(now), nbf: None, caps }, secret)
}

/// Reads a span of time: a number with its unit.
///
/// # Errors
/// When it is none, with an example.
pub(super) fn parse_span(text: &str) -> anyhow::Result<Duration> {
    let help = "give a number with its unit, such as 90s, 15m, 24h or 7d";
    let unit = text.chars().last().context(help)?;
    let seconds: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 60 * 60,
        'd' => 24 * 60 * 60,
        _ => anyhow::bail!(help),
    };
    let number: u64 = text[..text.len() - 1].parse().ok().filter(|&number| number > 0).context(help)?;
    // 100 years keep every sum within bounds.
    let ttl = number.checked_mul(seconds).filter(|&ttl| ttl <= 100 * 365 * 24 * 60 * 60);
    Ok(Duration::from_secs(ttl.context("give at most 36500d")?))
}

fn parse_caps(text: &str) -> anyhow::Result<Capabilities> {
    let help = "give channel patterns with their actions, such as {\"chat:*\":[\"subscribe\",\"publish\"]}";
    let caps: BTreeMap<String, Vec<Action>> = serde_json::from_str(text).context(help)?;
    if caps.values().flatten().any(|&action| action == Action::Unknown) {
        anyhow::bail!("an action is not known; there are subscribe, publish, presence and history");
    }
    Ok(caps.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use sanjay_runtime::ManualClock;

    #[test]
    fn a_token_says_what_was_asked_for() {
        let secret = Secret::new("secret");
        let caps = parse_caps(r#"{"chat:*":["subscribe"]}"#).unwrap();
        let token =
            sign("bob", caps.clone(), parse_span("15m").unwrap(), &secret, &ManualClock::new(1_000_000));
        let claims = jwt::verify_hs256(&token, &secret, 2).unwrap();
        assert_eq!(claims, Claims { sub: "bob".into(), exp: 901, iat: Some(1), nbf: None, caps });
        assert!(jwt::verify_hs256(&token, &secret, 901).is_err());
    }

    #[test]
    fn wrong_options_are_refused_with_an_example() {
        for ttl in ["", "h", "1", "0h", "-1h", "1w", "1é", "999999999d", "99999999999999999999d"] {
            assert!(parse_span(ttl).is_err(), "{ttl}");
        }
        assert_eq!(parse_span("7d").unwrap(), Duration::from_secs(604_800));
        assert!(parse_caps("[]").is_err());
        assert!(parse_caps(r#"{"a":["fly"]}"#).unwrap_err().to_string().contains("subscribe"));
    }
}
