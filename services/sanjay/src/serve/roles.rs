//! One role as a process of its own.

use anyhow::Context as _;
use sanjay_runtime::{net::bind, telemetry::Role};

use super::{
    ConfigArgs, Process, open_files,
    ready::Ready,
    reload::Load,
    settings::{DeliverySettings, EdgeSettings, RouterSettings, layers},
};
use crate::output;

/// `sanjay edge`: holds clients' sockets
#[derive(Debug, clap::Args)]
pub(crate) struct EdgeArgs {
    #[command(flatten)]
    common: ConfigArgs,
    /// Where clients connect [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// The router, or several with commas between them [default: http://127.0.0.1:8083]
    #[arg(long, value_name = "URL")]
    router: Option<String>,
    /// The delivery node, or several with commas between them [default: http://127.0.0.1:8082]
    #[arg(long, value_name = "URL")]
    delivery: Option<String>,
}

/// `sanjay router`: tracks sessions and subscriptions, and relays
#[derive(Debug, clap::Args)]
pub(crate) struct RouterArgs {
    #[command(flatten)]
    common: ConfigArgs,
    /// Where edges and delivery nodes call [default: 127.0.0.1:8083]
    #[arg(long, value_name = "ADDR")]
    router_listen: Option<String>,
}

/// `sanjay delivery`: owns the back ends' API and the inboxes
#[derive(Debug, clap::Args)]
pub(crate) struct DeliveryArgs {
    #[command(flatten)]
    common: ConfigArgs,
    /// Where back ends and edges call [default: 127.0.0.1:8082]
    #[arg(long, value_name = "ADDR")]
    delivery_listen: Option<String>,
    /// The router, or several with commas between them [default: http://127.0.0.1:8083]
    #[arg(long, value_name = "URL")]
    router: Option<String>,
    /// Where inboxes are kept: redb:PATH [default: redb:inbox.redb]
    #[arg(long, value_name = "STORE")]
    store: Option<String>,
}

impl EdgeArgs {
    /// Runs an edge until a signal.
    ///
    /// # Errors
    /// When it cannot start, or failed.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let layers = layers(self.common.config.as_deref())?
            .flag("--listen", "edge.listen", self.listen.as_ref())
            .flag("--router", "edge.router", self.router.as_ref())
            .flag("--delivery", "edge.delivery", self.delivery.as_ref())
            .flag("--admin-listen", "admin.listen", self.common.admin_listen.as_ref());
        let load: Load = |layers| layers.load().map(|EdgeSettings(settings)| settings);
        let settings = load(&layers)?;
        let mut process =
            Process::begin(&settings, settings.cluster.key.clone(), &[Role::Edge], (layers, load))?;
        open_files::raise_limit(settings.edge.max_connections);
        let listener = bind("clients", "--listen", &settings.edge.listen).await?.into_std()?;
        let address = listener.local_addr().context("the listener has no address")?;
        sanjay_edge::start(settings.edge, listener, process.context.clone(), process.metrics()).await?;
        let ready = Ready { url: Some(format!("ws://{address}/v1/ws")), ..Ready::default() };
        serve(process, &settings.admin.listen, &self.common, ready).await
    }
}

impl RouterArgs {
    /// Runs a router until a signal.
    ///
    /// # Errors
    /// When it cannot start, or failed.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let layers = layers(self.common.config.as_deref())?
            .flag("--router-listen", "router.listen", self.router_listen.as_ref())
            .flag("--admin-listen", "admin.listen", self.common.admin_listen.as_ref());
        let load: Load = |layers| layers.load().map(|RouterSettings(settings)| settings);
        let settings = load(&layers)?;
        let mut process =
            Process::begin(&settings, settings.cluster.key.clone(), &[Role::Router], (layers, load))?;
        let listener = bind("the router", "--router-listen", &settings.router.listen).await?;
        let address = listener.local_addr().context("the listener has no address")?;
        sanjay_router::start(settings.router, listener, process.context.clone(), process.metrics()).await?;
        let ready = Ready { router: Some(format!("http://{address}")), ..Ready::default() };
        serve(process, &settings.admin.listen, &self.common, ready).await
    }
}

impl DeliveryArgs {
    /// Runs a delivery node until a signal.
    ///
    /// # Errors
    /// When it cannot start, or failed.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let layers = layers(self.common.config.as_deref())?
            .flag("--delivery-listen", "delivery.listen", self.delivery_listen.as_ref())
            .flag("--router", "delivery.router", self.router.as_ref())
            .flag("--store", "delivery.store", self.store.as_ref())
            .flag("--admin-listen", "admin.listen", self.common.admin_listen.as_ref());
        let load: Load = |layers| layers.load().map(|DeliverySettings(settings)| settings);
        let settings = load(&layers)?;
        let mut process =
            Process::begin(&settings, settings.cluster.key.clone(), &[Role::Delivery], (layers, load))?;
        let listener = bind("back ends and edges", "--delivery-listen", &settings.delivery.listen).await?;
        let address = listener.local_addr().context("the listener has no address")?;
        sanjay_delivery::start(settings.delivery, listener, process.context.clone(), process.metrics())
            .await?;
        let ready = Ready { server: Some(format!("http://{address}")), ..Ready::default() };
        serve(process, &settings.admin.listen, &self.common, ready).await
    }
}

/// Serves the admin pages, says where everything is once it is ready, and runs until a signal.
async fn serve(mut process: Process, admin: &str, args: &ConfigArgs, mut ready: Ready) -> anyhow::Result<()> {
    let address = process.serve_admin(admin).await?;
    ready.admin = format!("http://{address}");
    let where_ = ready.url.as_ref().or(ready.server.as_ref()).or(ready.router.as_ref());
    output::line(&format!(
        "listening on {}, admin on {}",
        where_.map_or("nothing", String::as_str),
        ready.admin
    ))?;
    if let Some(path) = args.ready_file.clone() {
        let readiness = process.context.readiness.clone();
        let lifecycle = process.context.lifecycle.clone();
        process.context.lifecycle.spawn("ready file", async move {
            tokio::select! {
                () = readiness.wait_ready() => {
                    if let Err(error) = ready.write(&path) {
                        lifecycle.fail("ready file", error);
                    }
                }
                () = lifecycle.soft().cancelled_owned() => {}
            }
        });
    }
    process.run().await
}
