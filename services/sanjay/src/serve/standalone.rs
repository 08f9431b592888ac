//! `sanjay standalone`: the three roles in one process, on the embedded adapters, still talking gRPC over loopback.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;
use sanjay_delivery::{ApiKey, hash_api_key};
use sanjay_protocol::token::{Capabilities, Claims};
use sanjay_runtime::{Clock, OsRandom, Secret, SystemClock, net::bind, telemetry::Role};
use tokio::net::TcpListener;

use super::{
    ConfigArgs, Process, open_files,
    ready::{self, Ready},
    reload::Load,
    secrets::{Secrets, write_private},
    settings::{Settings, StandaloneSettings, layers},
};
use crate::{output, settings::Signer};

/// Where `standalone` keeps everything, unless it is told otherwise.
pub(crate) const DATA_DIR: &str = ".sanjay";

/// Name of the file in the data directory that holds the process id.
const PID_FILE: &str = "pid";

/// The user of the development token.
const DEV_USER: &str = "dev";

/// How long the development token holds; a new one is made at each start.
const DEV_TOKEN_S: u64 = 30 * 24 * 3600;

/// Pages on this machine may connect; others must be allowed by configuration.
const LOCAL_ORIGINS: [&str; 2] = ["http://localhost:*", "http://127.0.0.1:*"];

/// `sanjay standalone`: everything in one process, nothing to install
#[derive(Debug, clap::Args)]
pub(crate) struct StandaloneArgs {
    #[command(flatten)]
    common: ConfigArgs,
    /// Where clients connect [default: 127.0.0.1:8080]
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Where back ends call [default: 127.0.0.1:8082]
    #[arg(long, value_name = "ADDR")]
    delivery_listen: Option<String>,
    /// Where the router listens [default: 127.0.0.1:8083]
    #[arg(long, value_name = "ADDR")]
    router_listen: Option<String>,
    /// Where inboxes and development secrets are kept
    #[arg(long, value_name = "DIR", default_value = DATA_DIR)]
    data_dir: PathBuf,
}

struct Listeners {
    edge: std::net::TcpListener,
    delivery: TcpListener,
    router: TcpListener,
}

impl StandaloneArgs {
    /// Runs everything until a signal.
    ///
    /// # Errors
    /// When it cannot start, or failed.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let layers = layers(self.common.config.as_deref())?
            .flag("--listen", "edge.listen", self.listen.as_ref())
            .flag("--delivery-listen", "delivery.listen", self.delivery_listen.as_ref())
            .flag("--router-listen", "router.listen", self.router_listen.as_ref())
            .flag("--admin-listen", "admin.listen", self.common.admin_listen.as_ref());
        let load: Load = |layers| layers.load().map(|StandaloneSettings(settings)| settings);
        let mut settings = load(&layers)?;
        let secrets = Secrets::read_or_make(&self.data_dir, &OsRandom)?;
        let listeners = Listeners {
            edge: bind("clients", "--listen", &settings.edge.listen).await?.into_std()?,
            delivery: bind("back ends", "--delivery-listen", &settings.delivery.listen).await?,
            router: bind("the router", "--router-listen", &settings.router.listen).await?,
        };
        let mut ready = self.prepare(&mut settings, &secrets, &listeners)?;
        // A secrets file that somebody wrote by hand meets the same bounds as a configuration.
        settings.validate_secrets().context("the secrets of the data directory are not good enough")?;

        let roles = [Role::Edge, Role::Router, Role::Delivery];
        let mut process = Process::begin(&settings, settings.cluster.key.clone(), &roles, (layers, load))?;
        open_files::raise_limit(settings.edge.max_connections);
        let (context, registry) = (process.context.clone(), process.metrics());
        sanjay_router::start(settings.router, listeners.router, context.clone(), registry).await?;
        sanjay_delivery::start(settings.delivery, listeners.delivery, context.clone(), registry).await.with_context(
            || {
                let dir = self.data_dir.display();
                format!("cannot open the inboxes in {dir}; one process at a time may use it, --data-dir names another")
            },
        )?;
        sanjay_edge::start(settings.edge, listeners.edge, context.clone(), registry).await?;
        let admin = process.serve_admin(&settings.admin.listen).await?;
        ready.admin = format!("http://{admin}");

        let pid = self.data_dir.join(PID_FILE);
        write_private(&pid, format!("{}\n", std::process::id()).as_bytes())?;
        let own = self.data_dir.join(ready::FILE);
        let soft = context.lifecycle.soft();
        if soft.run_until_cancelled(context.readiness.wait_ready()).await.is_some() {
            ready.write(&own)?;
            if let Some(path) = &self.common.ready_file {
                ready.write(path)?;
            }
            output::line(&greeting(&ready, &self.data_dir))?;
        }
        let result = process.run().await;
        // Clients should not look for a server that is gone. After a kill the file stays, and they say so.
        let _ = fs::remove_file(&own);
        let _ = fs::remove_file(&pid);
        result
    }

    /// Fills in what only this process knows: secrets and addresses.
    fn prepare(
        &self,
        settings: &mut Settings,
        secrets: &Secrets,
        listeners: &Listeners,
    ) -> anyhow::Result<Ready> {
        if settings.cluster.key.is_empty() {
            settings.cluster.key = Secret::new(secrets.cluster_key.clone());
        }
        if settings.edge.token_secret.is_empty() {
            settings.edge.token_secret = Secret::new(secrets.token_secret.clone());
        }
        if settings.edge.allowed_origins.is_empty() {
            settings.edge.allowed_origins = LOCAL_ORIGINS.map(str::to_owned).into();
        }
        if settings.delivery.store == sanjay_delivery::Config::default().store {
            settings.delivery.store = format!("redb:{}", self.data_dir.join("inbox.redb").display());
        }
        let name = "standalone".to_owned();
        settings.delivery.api_keys.retain(|key| key.name != name);
        settings.delivery.api_keys.push(ApiKey { name, sha256: hash_api_key(&secrets.api_key) });

        let router = format!("http://{}", listeners.router.local_addr()?);
        let server = format!("http://{}", listeners.delivery.local_addr()?);
        settings.edge.router = router.as_str().into();
        settings.delivery.router = router.as_str().into();
        settings.edge.delivery = server.as_str().into();

        let key = settings.edge.signing_key().context("the edge has no shared secret to sign with")?;
        let signer = Signer::new(key).for_whom(&settings.edge.token_audience, &settings.edge.token_issuer);
        let now_s = SystemClock.now_s();
        let claims = Claims {
            sub: DEV_USER.to_owned(),
            exp: now_s + DEV_TOKEN_S,
            iat: Some(now_s),
            nbf: None,
            jti: None,
            caps: Capabilities::everything(),
            channel: None,
        };
        Ok(Ready {
            url: Some(format!("ws://{}/v1/ws", listeners.edge.local_addr()?)),
            server: Some(server),
            router: Some(router),
            admin: String::new(),
            token: Some(signer.sign(&claims)),
            api_key: Some(secrets.api_key.clone()),
        })
    }
}

/// What a person sees who started it: where everything is, and what to type next.
fn greeting(ready: &Ready, data_dir: &Path) -> String {
    let elsewhere = if data_dir == Path::new(DATA_DIR) {
        String::new()
    } else {
        format!(" --data-dir {}", data_dir.display())
    };
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let rows = [
        ("clients", text(&ready.url)),
        ("back ends", text(&ready.server)),
        ("admin", ready.admin.clone()),
        ("api key", text(&ready.api_key)),
        ("data", data_dir.display().to_string()),
    ];
    let width = rows.iter().map(|(_, value)| value.chars().count() + 12).max().unwrap_or(0).max(48);
    let mut lines = vec![format!("╭─ Sanjay is ready {}╮", "─".repeat(width - 16))];
    lines
        .extend(rows.iter().map(|(name, value)| format!("│ {name:<10} {value:<rest$} │", rest = width - 11)));
    lines.push(format!("╰{}╯", "─".repeat(width + 2)));
    lines.push(format!("token for user {DEV_USER}: {}", text(&ready.token)));
    lines.push("In another terminal, in this directory:".to_owned());
    for command in ["sub news", "pub news hi", "send bob hi"] {
        lines.push(format!("  sanjay {command}{elsewhere}"));
    }
    lines.join("\n")
}
