//! `sanjay dlq purge`: removes dead letters for good.

use anyhow::bail;
use sanjay_client::PurgeDeadLettersRequest;
use serde_json::json;

use super::{FilterArgs, letters, parse_id};
use crate::{
    output,
    settings::{ApiArgs, explain},
};

/// Remove dead letters for good
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// This one alone
    #[arg(requires = "user")]
    message_id: Option<String>,
    #[command(flatten)]
    filter: FilterArgs,
    /// Also those that were sent again
    #[arg(long)]
    redriven: bool,
    /// Yes, remove them
    #[arg(long, required_unless_present = "dry_run", conflicts_with = "dry_run")]
    yes: bool,
    /// Count them, and remove nothing
    #[arg(long)]
    dry_run: bool,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

impl Args {
    /// Prints how many were removed, or would be.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        if self.filter.is_empty() {
            bail!(
                "say which dead letters: with --user, --reason, --from or --to; all of them are those with --to now"
            );
        }
        let request = PurgeDeadLettersRequest {
            filter: Some(self.filter.filter(self.redriven)?),
            message_id: self.message_id.as_deref().map(parse_id).transpose()?.unwrap_or_default(),
            dry_run: self.dry_run,
        };
        let backend = self.api.connect().await?;
        let purged = backend.purge_dead_letters(request).await.map_err(explain)?;
        if self.json {
            let line = json!({ "purged": purged.purged, "more": purged.more, "dry_run": self.dry_run });
            return output::line(&line.to_string());
        }
        let count = letters(purged.purged);
        let more = if purged.more { " or more" } else { "" };
        let done = if self.dry_run { "would be removed; give --yes instead of --dry-run" } else { "removed" };
        output::line(&format!("{count}{more} {done}"))
    }
}
