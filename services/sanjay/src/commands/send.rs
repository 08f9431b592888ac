//! `sanjay send`: puts one message into a user's inbox, as a back end.

use anyhow::{anyhow, bail};
use sanjay_client::protocol::names;

use crate::{
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
        let payload = self.payload.parse()?;
        let backend = self.api.connect().await?;
        let results = backend.send(&[&self.user], payload, &self.dedupe_key).await.map_err(explain)?;
        let Some(result) = results.into_iter().next() else {
            bail!("the server gave no result for {}", self.user)
        };
        let accepted = result.result.map_err(|error| anyhow!("{}: {}", self.user, error.message))?;
        output::line(&serde_json::to_string(&accepted)?)
    }
}
