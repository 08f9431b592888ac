//! `sanjay members`: who gets the durable publications of a channel, as a back end.

use anyhow::ensure;
use sanjay_client::protocol::names;
use serde_json::json;

use crate::{
    output,
    settings::{ApiArgs, explain},
};

/// Most users of one call; more are several.
const MAX_USERS: usize = 1_000;

/// Say who gets the durable publications of a channel (`sanjay pub --durable`)
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Make users members of a channel
    Join(UsersArgs),
    /// End memberships
    Leave(UsersArgs),
    /// Print the members of a channel, one a line, in the order of their names
    List(ListArgs),
}

#[derive(Debug, clap::Args)]
struct UsersArgs {
    /// The channel
    channel: String,
    /// The users
    #[arg(required = true)]
    users: Vec<String>,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Debug, clap::Args)]
struct ListArgs {
    /// The channel
    channel: String,
    #[command(flatten)]
    api: ApiArgs,
}

impl Args {
    /// Joins, leaves or lists.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Join(args) => args.run(true).await,
            Command::Leave(args) => args.run(false).await,
            Command::List(args) => args.run().await,
        }
    }
}

impl UsersArgs {
    async fn run(self, joins: bool) -> anyhow::Result<()> {
        names::check("channel", &self.channel)?;
        for user in &self.users {
            names::check("user", user)?;
        }
        let mut users: Vec<&str> = self.users.iter().map(String::as_str).collect();
        users.sort_unstable();
        let count = users.len();
        users.dedup();
        ensure!(users.len() == count, "a user is named twice; name each user once");
        let backend = self.api.connect().await?;
        let (mut changed, mut members) = (0, 0);
        for users in users.chunks(MAX_USERS) {
            let (some, all) = if joins {
                let joined = backend.join(&self.channel, users).await.map_err(explain)?;
                (joined.joined, joined.members)
            } else {
                let left = backend.leave(&self.channel, users).await.map_err(explain)?;
                (left.left, left.members)
            };
            (changed, members) = (changed + some, all);
        }
        let name = if joins { "joined" } else { "left" };
        output::line(&json!({ name: changed, "members": members }).to_string())
    }
}

impl ListArgs {
    async fn run(self) -> anyhow::Result<()> {
        names::check("channel", &self.channel)?;
        let backend = self.api.connect().await?;
        let mut token = String::new();
        loop {
            let page = backend.list_members(&self.channel, 1_000, &token).await.map_err(explain)?;
            for user in &page.users {
                output::line(user)?;
            }
            token = page.next_page_token;
            if token.is_empty() {
                return Ok(());
            }
        }
    }
}
