//! `sanjay pub`: publishes one message to a channel, as a back end.

use sanjay_client::protocol::names;

use crate::{
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
    #[command(flatten)]
    api: ApiArgs,
}

impl Args {
    /// Publishes and prints where the message stands in its channel.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        names::check("channel", &self.channel)?;
        names::check_optional("dedupe key", &self.dedupe_key)?;
        let payload = self.payload.parse()?;
        let backend = self.api.connect().await?;
        let published = backend.publish(&self.channel, payload, &self.dedupe_key).await.map_err(explain)?;
        output::line(&serde_json::to_string(&published)?)
    }
}
