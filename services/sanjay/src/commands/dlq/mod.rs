//! `sanjay dlq`: lists dead letters, shows one, sends them again and purges them.

mod letter;
mod list;
mod purge;
mod redrive;
mod show;

use anyhow::Context as _;
use clap::{Subcommand, ValueEnum};
use sanjay_client::{DeadLetterFilter, DeadReason, protocol::names};
use sanjay_runtime::{Clock as _, SystemClock};
use uuid::Uuid;

use crate::commands::when::When;

/// Look after dead letters: messages that ended without an ack
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    List(list::Args),
    Show(show::Args),
    Redrive(redrive::Args),
    Purge(purge::Args),
}

impl Args {
    /// Does it.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::List(args) => args.run().await,
            Command::Show(args) => args.run().await,
            Command::Redrive(args) => args.run().await,
            Command::Purge(args) => args.run().await,
        }
    }
}

/// Why a message became a dead letter, as one says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Reason {
    /// As many attempts failed as it may have
    MaxAttempts,
    /// A client gave it up
    Terminated,
    /// Newer messages needed its place in a full inbox
    QueueFull,
    /// Its time to live passed
    Expired,
}

/// Which dead letters.
#[derive(Debug, clap::Args)]
struct FilterArgs {
    /// Those of this user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Those that are there for this reason
    #[arg(long)]
    reason: Option<Reason>,
    /// Those that died at this time or later: RFC 3339, or how long ago, such as 2h
    #[arg(long, value_name = "WHEN")]
    from: Option<When>,
    /// Those that died before this time
    #[arg(long, value_name = "WHEN")]
    to: Option<When>,
}

impl FilterArgs {
    /// Whether it leaves nothing out.
    fn is_empty(&self) -> bool {
        self.user.is_none() && self.reason.is_none() && self.from.is_none() && self.to.is_none()
    }

    /// As the API has it.
    ///
    /// # Errors
    /// When the user's name is none.
    fn filter(&self, redriven: bool) -> anyhow::Result<DeadLetterFilter> {
        if let Some(user) = &self.user {
            names::check("user", user)?;
        }
        let now_us = SystemClock.now_us();
        let bound = |when: Option<When>| when.map_or(0, |when| when.past_us(now_us).max(1));
        let reason = match self.reason {
            None => DeadReason::Unspecified,
            Some(Reason::MaxAttempts) => DeadReason::MaxAttempts,
            Some(Reason::Terminated) => DeadReason::Terminated,
            Some(Reason::QueueFull) => DeadReason::QueueFull,
            Some(Reason::Expired) => DeadReason::Expired,
        };
        Ok(DeadLetterFilter {
            user: self.user.clone().unwrap_or_default(),
            reason: reason.into(),
            from_us: bound(self.from),
            to_us: bound(self.to),
            redriven,
        })
    }
}

/// Reads a message id.
fn parse_id(text: &str) -> anyhow::Result<String> {
    let id = Uuid::parse_str(text).with_context(|| format!("{text:?} is no message id; one is a UUID"))?;
    Ok(id.to_string())
}

/// So many dead letters.
fn letters(count: u64) -> String {
    match count {
        1 => "1 dead letter".to_owned(),
        count => format!("{count} dead letters"),
    }
}
