//! `sanjay nodes`, `connections`, `channels` and `disconnect`: who is connected, as a back end.

use sanjay_client::{LiveChannel, LiveNode, UserConnection, protocol::names};
use serde_json::json;

use crate::{
    commands::{receipts::clean, when::readable},
    output,
    settings::{ApiArgs, explain},
};

/// Channels of one call.
const PAGE: u32 = 1_000;

/// Tells whoever reads that an answer may lack something.
fn tell_incomplete(complete: bool) {
    if !complete {
        output::status("not all edges answered: there may be more; try again in a moment");
    }
}

/// List the edges and routers that run
#[derive(Debug, clap::Args)]
pub(crate) struct NodesArgs {
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

impl NodesArgs {
    /// Prints a line for each.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let listed = self.api.connect().await?.list_nodes().await.map_err(explain)?;
        if !self.json {
            output::line("role    since                     build       connections  name")?;
        }
        for LiveNode { role, name, build, since_us, connections } in &listed.nodes {
            output::line(&if self.json {
                let node = json!({
                    "role": role, "name": name, "build": build, "since_us": since_us, "connections": connections,
                });
                node.to_string()
            } else {
                let since = readable(*since_us);
                format!("{role:<6}  {since:<24}  {build:<10}  {connections:<11}  {}", clean(name))
            })?;
        }
        tell_incomplete(listed.complete);
        Ok(())
    }
}

/// List the connections that a user has now, the oldest first
#[derive(Debug, clap::Args)]
pub(crate) struct ConnectionsArgs {
    /// The user
    user: String,
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

impl ConnectionsArgs {
    /// Prints a line for each.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        names::check("user", &self.user)?;
        let listed = self.api.connect().await?.list_connections(&self.user).await.map_err(explain)?;
        if !self.json {
            output::line(
                "session                               since                     channels  edge, device, client",
            )?;
        }
        for UserConnection { session, edge, device, client, since_us, channels } in &listed.connections {
            output::line(&if self.json {
                let connection = json!({
                    "session": session, "edge": edge, "device": device, "client": client, "since_us": since_us,
                    "channels": channels,
                });
                connection.to_string()
            } else {
                let since = readable(*since_us);
                let named = [edge, device, client].map(|name| clean(name));
                format!("{session:<36}  {since:<24}  {channels:<8}  {}", named.join(", "))
            })?;
        }
        tell_incomplete(listed.complete);
        Ok(())
    }
}

/// List the channels that have subscribers now, in the order of their names
#[derive(Debug, clap::Args)]
pub(crate) struct ChannelsArgs {
    /// Those whose names begin so
    #[arg(default_value = "")]
    prefix: String,
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

impl ChannelsArgs {
    /// Prints a page while the next is not asked for yet.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        names::check_optional("prefix", &self.prefix)?;
        let backend = self.api.connect().await?;
        let (mut token, mut complete) = (String::new(), true);
        if !self.json {
            output::line("subscribers  channel")?;
        }
        loop {
            let page = backend.list_channels(&self.prefix, PAGE, &token).await.map_err(explain)?;
            for LiveChannel { channel, subscribers } in &page.channels {
                output::line(&if self.json {
                    json!({ "channel": channel, "subscribers": subscribers }).to_string()
                } else {
                    format!("{subscribers:<11}  {}", clean(channel))
                })?;
            }
            complete &= page.complete;
            token = page.next_page_token;
            if token.is_empty() {
                tell_incomplete(complete);
                return Ok(());
            }
        }
    }
}

/// Close the connections that a user has now; `sanjay revoke` keeps it from coming back
#[derive(Debug, clap::Args)]
pub(crate) struct DisconnectArgs {
    /// The user
    user: String,
    /// This connection alone, as `sanjay connections` names it
    #[arg(long, value_name = "UUID")]
    session: Option<String>,
    /// What the client is told
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// The client is to come back
    #[arg(long)]
    reconnect: bool,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

impl DisconnectArgs {
    /// Closes them.
    ///
    /// # Errors
    /// Says what was wrong and what to do; also when not all edges answered.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        names::check("user", &self.user)?;
        let backend = self.api.connect().await?;
        let session = self.session.unwrap_or_default();
        let closed = backend.disconnect(&self.user, &session, &self.reason, self.reconnect);
        let closed = closed.await.map_err(explain)?;
        output::line(&if self.json {
            json!({ "disconnected": closed.disconnected, "complete": closed.complete }).to_string()
        } else {
            format!("{} closed", closed.disconnected)
        })?;
        anyhow::ensure!(
            closed.complete,
            "not all edges answered: there may be others; try again in a moment"
        );
        Ok(())
    }
}
