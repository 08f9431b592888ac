//! Where the server under load is: flags, then the environment, then what a server in the data directory wrote down.

use sanjay_client::{
    Backend, BackendOptions,
    protocol::{Payload, names},
};
use sanjay_runtime::{OsRandom, random::uuid_v4};

use super::edge::Edge;
use crate::settings::{DataDir, explain};

/// Both sides of a server: a bench is back end and client at once.
#[derive(clap::Args)]
pub(super) struct TargetArgs {
    /// The edge's address, such as ws://127.0.0.1:8080/v1/ws
    #[arg(long, env = "SANJAY_URL", value_name = "URL")]
    url: Option<String>,
    /// The edge's token secret, to make a token for each user with
    #[arg(long, env = "SANJAY_EDGE__TOKEN_SECRET", value_name = "SECRET", hide_env_values = true)]
    token_secret: Option<String>,
    #[command(flatten)]
    data_dir: DataDir,
}

/// The gRPC API for back ends.
#[derive(clap::Args)]
pub(super) struct ServerArgs {
    /// The API's address, such as http://127.0.0.1:8082
    #[arg(long, env = "SANJAY_SERVER", value_name = "URL")]
    server: Option<String>,
    /// A key of that server
    #[arg(long, env = "SANJAY_API_KEY", value_name = "KEY", hide_env_values = true)]
    api_key: Option<String>,
}

impl std::fmt::Debug for TargetArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TargetArgs").field("url", &self.url).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for ServerArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerArgs").field("server", &self.server).finish_non_exhaustive()
    }
}

impl TargetArgs {
    /// The edge, after one connection to it: what is wrong with an address or a secret is told before any load.
    ///
    /// # Errors
    /// Says what to start or to set.
    pub(super) async fn edge(&self) -> anyhow::Result<Edge> {
        let url = self.data_dir.resolve(self.url.clone(), "--url", "SANJAY_URL", |ready| ready.url)?;
        let secret = self.data_dir.token_secret(self.token_secret.as_deref())?;
        // Names of an earlier run must not meet those of this one: inboxes last.
        let run = uuid_v4(&OsRandom).simple().to_string()[..8].to_owned();
        let edge = Edge { url, secret, run };
        edge.probe().await?;
        Ok(edge)
    }

    /// The API, after one publish to a channel that nobody holds, which shows whether the key is good.
    ///
    /// # Errors
    /// Says what to start or to set.
    pub(super) async fn backend(&self, server: &ServerArgs, edge: &Edge) -> anyhow::Result<Backend> {
        let data_dir = &self.data_dir;
        let address =
            data_dir.resolve(server.server.clone(), "--server", "SANJAY_SERVER", |ready| ready.server)?;
        let key =
            data_dir.resolve(server.api_key.clone(), "--api-key", "SANJAY_API_KEY", |ready| ready.api_key)?;
        let backend = Backend::connect(BackendOptions::new(address, key)).await.map_err(explain)?;
        let channel = edge.name("probe", 0);
        names::check("channel", &channel)?;
        backend.publish(&channel, Payload::Text(String::new()), "").await.map_err(explain)?;
        Ok(backend)
    }
}
