//! `sanjay dlq list`: dead letters, the newest first.

use std::num::NonZeroU64;

use super::{FilterArgs, letter, letters};
use crate::{
    output,
    settings::{ApiArgs, explain},
};

/// Letters of one call.
const PAGE: u64 = 256;

/// List dead letters, the newest first, without their payloads
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    filter: FilterArgs,
    /// Also those that were sent again
    #[arg(long)]
    redriven: bool,
    /// At most so many
    #[arg(long, value_name = "N", default_value = "100")]
    limit: NonZeroU64,
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

impl Args {
    /// Prints a page while the next is not asked for yet, so that the list may be as long as it likes.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let filter = self.filter.filter(self.redriven)?;
        let backend = self.api.connect().await?;
        let (mut left, mut token) = (self.limit.get(), String::new());
        if !self.json {
            output::line(letter::HEADER)?;
        }
        while left > 0 {
            let size = left.min(PAGE) as u32;
            let page = backend.list_dead_letters(&filter, size, &token).await.map_err(explain)?;
            left -= left.min(page.dead_letters.len() as u64);
            for found in &page.dead_letters {
                output::line(&if self.json { letter::json(found)? } else { letter::row(found) })?;
            }
            token = page.next_page_token;
            if token.is_empty() {
                return Ok(());
            }
        }
        output::status(&format!("more follow these {}; give a higher --limit", letters(self.limit.get())));
        Ok(())
    }
}
