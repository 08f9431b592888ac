//! Where the server under load is: flags, then the environment, then what a server in the data directory wrote down.

use sanjay_client::{
    Backend,
    protocol::{Payload, names},
};
use sanjay_runtime::{OsRandom, random::uuid_v4};

use super::edge::Edge;
pub(super) use crate::settings::ServerArgs;
use crate::settings::{AccessArgs, explain};

/// Both sides of a server: a bench is back end and client at once.
#[derive(Debug, clap::Args)]
pub(super) struct TargetArgs {
    #[command(flatten)]
    access: AccessArgs,
}

impl TargetArgs {
    /// The edge, after one connection to it: what is wrong with an address or a secret is told before any load.
    ///
    /// # Errors
    /// Says what to start or to set.
    pub(super) async fn edge(&self) -> anyhow::Result<Edge> {
        let (url, signer) = self.access.resolve()?;
        // Names of an earlier run must not meet those of this one: inboxes last.
        let run = uuid_v4(&OsRandom).simple().to_string()[..8].to_owned();
        let edge = Edge { url, signer, run };
        edge.probe().await?;
        Ok(edge)
    }

    /// The API, after one publish to a channel that nobody holds, which shows whether the key is good.
    ///
    /// # Errors
    /// Says what to start or to set.
    pub(super) async fn backend(&self, server: &ServerArgs, edge: &Edge) -> anyhow::Result<Backend> {
        let options = server.options(&self.access.secret.data_dir)?;
        let backend = Backend::connect(options).await.map_err(explain)?;
        let channel = edge.name("probe", 0);
        names::check("channel", &channel)?;
        backend.publish(&channel, Payload::Text(String::new()), "").await.map_err(explain)?;
        Ok(backend)
    }
}
