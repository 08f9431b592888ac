//! `sanjay admin`: what is done to a cluster once, by who runs it.

use std::path::PathBuf;

use anyhow::{Context as _, bail};
use clap::Subcommand;
use sanjay_delivery::store::{Location, mongodb};
use sanjay_runtime::{ConfigError, Secret, Validate};
use serde::Deserialize;

use crate::{output, serve::settings::layers};

/// Prepare what a cluster keeps its data in
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Shard(ShardArgs),
}

/// Spread the inboxes over the shards of a MongoDB cluster: print the commands, or run them
#[derive(Debug, clap::Args)]
struct ShardArgs {
    /// TOML file with delivery.store and its credentials; SANJAY_DELIVERY__… variables override it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The database: mongodb://HOST:PORT/DATABASE, HOST a router (mongos) of the cluster
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
    /// Run them, as the configured user, who needs the role clusterManager
    #[arg(long)]
    run: bool,
}

/// What it needs of the configuration; nothing else is looked at.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Settings {
    delivery: Store,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Store {
    store: String,
    mongodb_username: String,
    mongodb_password: Secret,
}

impl Validate for Settings {
    fn validate(&self) -> Result<(), ConfigError> {
        Ok(())
    }
}

impl Args {
    /// Does it.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Shard(args) => args.run().await,
        }
    }
}

impl ShardArgs {
    async fn run(self) -> anyhow::Result<()> {
        let Settings { delivery } =
            layers(self.config.as_deref())?.flag("--store", "delivery.store", self.store.as_ref()).load()?;
        if delivery.store.is_empty() {
            bail!(
                "say which database, with --store mongodb://HOST:PORT/DATABASE or delivery.store in a --config file"
            );
        }
        let location: Location = delivery.store.parse().context("--store, or delivery.store, is wrong")?;
        let location = location.with_credentials(&delivery.mongodb_username, &delivery.mongodb_password);
        let Location::Mongodb(database) = location else {
            bail!("a store in a file has no shards; give --store mongodb://HOST:PORT/DATABASE");
        };
        if self.run {
            // Each as it is done, since the next may take long.
            return Ok(mongodb::shard(&database, output::status).await?);
        }
        mongodb::shard_commands(&database.name).iter().try_for_each(|command| output::line(command))
    }
}
