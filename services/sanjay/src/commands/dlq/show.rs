//! `sanjay dlq show`: one dead letter, with its payload and every attempt that failed.

use anyhow::anyhow;
use sanjay_client::protocol::names;

use super::{letter, parse_id};
use crate::{
    output,
    settings::{ApiArgs, explain},
};

/// Show a dead letter with its payload and its failed attempts
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Whose message it was
    user: String,
    /// Its id
    message_id: String,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

impl Args {
    /// Prints it.
    ///
    /// # Errors
    /// When there is no such letter, or the server cannot be asked.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let Self { user, message_id, json, api } = self;
        names::check("user", &user)?;
        let id = parse_id(&message_id)?;
        let backend = api.connect().await?;
        let found = backend.get_dead_letter(&user, &id).await.map_err(explain)?;
        let found = found.ok_or_else(|| {
            anyhow!(
                "{user} has no dead letter {id}; `sanjay dlq list --user {user}` names those that there are"
            )
        })?;
        if json {
            return output::line(&letter::json(&found)?);
        }
        letter::full(&found)?.iter().try_for_each(|line| output::line(line))
    }
}
