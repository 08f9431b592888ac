//! `sanjay pub`: publishes one message to a channel, as a back end.

use std::time::Duration;

use sanjay_client::{PublishOptions, protocol::names};

use crate::{
    commands::token::parse_span,
    output,
    payload::PayloadArgs,
    settings::{ApiArgs, explain},
};

/// Publish a message to everyone who is subscribed to a channel now
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The channel
    channel: String,
    #[command(flatten)]
    payload: PayloadArgs,
    /// A second publish with the same key within five minutes gets the first answer
    #[arg(long, value_name = "KEY", default_value = "", hide_default_value = true)]
    dedupe_key: String,
    /// Into the inbox of each member of the channel (`sanjay members`), online or not, instead of to its subscribers; a
    /// dedupe key counts for a day then
    #[arg(long)]
    durable: bool,
    /// How long it may wait to be acknowledged before it expires, such as 90s, 15m, 24h or 7d
    #[arg(long, value_name = "SPAN", value_parser = parse_span, requires = "durable")]
    ttl: Option<Duration>,
    /// It replaces the message with the same key that is not acknowledged yet
    #[arg(long, value_name = "KEY", default_value = "", hide_default_value = true, requires = "durable")]
    collapse_key: String,
    #[command(flatten)]
    api: ApiArgs,
}

impl Args {
    /// Publishes and prints where the message stands in its channel; a durable one once it is durable.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        names::check("channel", &self.channel)?;
        names::check_optional("dedupe key", &self.dedupe_key)?;
        names::check_optional("collapse key", &self.collapse_key)?;
        let payload = self.payload.parse()?;
        let backend = self.api.connect().await?;
        if self.durable {
            let Self { dedupe_key, ttl, collapse_key, .. } = self;
            let options = PublishOptions { dedupe_key, ttl, collapse_key };
            let published =
                backend.publish_durable(&self.channel, payload, &options).await.map_err(explain)?;
            return output::line(&serde_json::to_string(&published)?);
        }
        let published = backend.publish(&self.channel, payload, &self.dedupe_key).await.map_err(explain)?;
        output::line(&serde_json::to_string(&published)?)
    }
}
