//! `sanjay token`: makes a token for a user, as a product's back end would.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Context as _;
use sanjay_client::protocol::{
    names,
    token::{Action, Capabilities, Claims},
};
use sanjay_runtime::{Clock, SystemClock};

use crate::{
    output,
    settings::{SecretArgs, Signer},
};

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
    /// What the user may do, as JSON [default: everything; with --channel: to subscribe to it]
    #[arg(long, value_name = "JSON", value_parser = parse_caps)]
    caps: Option<Capabilities>,
    /// Make a subscription token for this channel, which is good for nothing else
    #[arg(long, value_name = "NAME")]
    channel: Option<String>,
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
        if let Some(channel) = &self.channel {
            names::check("channel", channel)?;
        }
        let signer = self.secret.signer()?;
        let caps = match (self.caps, &self.channel) {
            (Some(caps), _) => caps,
            (None, Some(_)) => Capabilities::default(),
            (None, None) => Capabilities::everything(),
        };
        let claims = claims(&self.user, caps, self.ttl, &SystemClock);
        output::line(&signer.sign(&Claims { channel: self.channel, ..claims }))
    }
}

/// A token for `user` that may do everything for a day.
pub(crate) fn mint(user: &str, signer: &Signer) -> String {
    signer.sign(&claims(user, Capabilities::everything(), SHORT, &SystemClock))
}

fn claims(user: &str, caps: Capabilities, ttl: Duration, clock: &dyn Clock) -> Claims {
    let now = clock.now_s();
    let exp = now.saturating_add(ttl.as_secs());
    Claims { sub: user.to_owned(), exp, iat: Some(now), nbf: None, jti: None, caps, channel: None }
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
    use sanjay_runtime::{
        ManualClock, Secret,
        jwt::{Algorithm, Rules, SigningKey, Unverified},
    };

    #[test]
    fn a_token_says_what_was_asked_for() {
        let caps = parse_caps(r#"{"chat:*":["subscribe"]}"#).unwrap();
        let ttl = parse_span("15m").unwrap();
        let wanted = claims("bob", caps.clone(), ttl, &ManualClock::new(1_000_000));
        assert_eq!(
            wanted,
            Claims { sub: "bob".into(), exp: 901, iat: Some(1), nbf: None, jti: None, caps, channel: None }
        );
        let secret = Secret::new("s".repeat(64));
        for algorithm in [Algorithm::Hs256, Algorithm::Hs384, Algorithm::Hs512] {
            let key = SigningKey::from_secret(algorithm, &secret).unwrap();
            let token = Signer::new(key).for_whom("chat", "shop").sign(&wanted);
            let read = Unverified::parse(&token).unwrap();
            assert_eq!(read.algorithm(), Some(algorithm));
            let rules =
                |audience: &str| Rules { audience: Some(audience.into()), issuer: Some("shop".into()) };
            assert_eq!(read.claims(&rules("chat"), 2).as_ref(), Ok(&wanted));
            assert!(read.claims(&rules("mail"), 2).is_err());
            assert!(read.claims(&rules("chat"), 901).is_err());
        }
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
