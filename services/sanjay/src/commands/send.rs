//! `sanjay send`: puts one message into a user's inbox, as a back end.

use std::time::Duration;

use anyhow::{anyhow, bail};
use sanjay_client::{SendOptions, protocol::names};
use sanjay_runtime::{SystemClock, clock::Clock as _};

use crate::{
    commands::{token::parse_span, when::When},
    output,
    payload::PayloadArgs,
    settings::{ApiArgs, explain},
};

/// Put a message into a user's inbox, whether the user is online or not
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The user
    user: String,
    #[command(flatten)]
    payload: PayloadArgs,
    /// A second send with the same key within a day gets the first answer
    #[arg(long, value_name = "KEY", default_value = "", hide_default_value = true)]
    dedupe_key: String,
    /// How long it may wait to be acknowledged before it expires, such as 90s, 15m, 24h or 7d
    #[arg(long, value_name = "SPAN", value_parser = parse_span)]
    ttl: Option<Duration>,
    /// It replaces the message with the same key that is not acknowledged yet
    #[arg(long, value_name = "KEY", default_value = "", hide_default_value = true)]
    collapse_key: String,
    /// When it goes into the inbox: a time such as 2026-11-24T09:30:00Z, or how long from now, such as 15m
    #[arg(long, value_name = "TIME")]
    at: Option<When>,
    #[command(flatten)]
    api: ApiArgs,
}

impl Args {
    /// Sends and prints where the message stands in the inbox, once it is durable there.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        names::check("user", &self.user)?;
        names::check_optional("dedupe key", &self.dedupe_key)?;
        names::check_optional("collapse key", &self.collapse_key)?;
        let payload = self.payload.parse()?;
        let backend = self.api.connect().await?;
        let options = SendOptions {
            dedupe_key: self.dedupe_key,
            ttl: self.ttl,
            collapse_key: self.collapse_key,
            deliver_at_us: self.at.map(|at| at.ahead_us(SystemClock.now_us())),
        };
        let results = backend.send_with(&[&self.user], payload, &options).await.map_err(explain)?;
        let Some(result) = results.into_iter().next() else {
            bail!("the server gave no result for {}", self.user)
        };
        let accepted = result.result.map_err(|error| anyhow!("{}: {}", self.user, error.message))?;
        output::line(&serde_json::to_string(&accepted)?)
    }
}
