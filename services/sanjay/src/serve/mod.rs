//! The server side of the binary: settings, secrets, and the wiring of one role or of all three.

pub(crate) mod open_files;
pub(crate) mod ready;
pub(crate) mod reload;
pub(crate) mod roles;
pub(crate) mod secrets;
pub(crate) mod settings;
pub(crate) mod standalone;

#[cfg(test)]
mod metrics_doc;

use std::{path::PathBuf, sync::Arc, time::Duration};

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use sanjay_runtime::{
    Context, Lifecycle, OsRandom, Readiness, Secret, SharedNamespaces, SystemClock,
    admin::serve_admin,
    config::Layers,
    metrics::{ProcessMetrics, register_build_info},
    net::bind,
    telemetry::{self, Role, TelemetryGuard},
};
use tokio::signal::unix::{Signal, SignalKind, signal};

use self::{
    reload::{Load, Reload, ReloadMetrics},
    settings::Settings,
};

/// How long the tasks of a process have to end.
const SHUTDOWN: Duration = Duration::from_secs(8);

/// How long the last spans have to reach the collector.
const FLUSH: Duration = Duration::from_secs(2);

/// What the names of all metrics begin with that are not those of any process.
const PREFIX: &str = "sanjay";

/// Registers what every process measures.
fn register_process(registry: &mut Registry, roles: impl IntoIterator<Item = &'static str>) -> ReloadMetrics {
    ProcessMetrics::register(registry);
    let registry = registry.sub_registry_with_prefix(PREFIX);
    register_build_info(registry, env!("CARGO_PKG_VERSION"), roles);
    ReloadMetrics::register(registry)
}

/// Where the configuration comes from, for every server command.
#[derive(Debug, clap::Args)]
pub(crate) struct ConfigArgs {
    /// TOML file; SANJAY_… variables and flags override it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Where to serve /healthz, /readyz and /metrics [default: 127.0.0.1:8081]
    #[arg(long, value_name = "ADDR")]
    pub(crate) admin_listen: Option<String>,
    /// Write the addresses to this file, as JSON, once everything accepts work
    #[arg(long, value_name = "PATH")]
    pub(crate) ready_file: Option<PathBuf>,
}

/// A process that is being started.
pub(crate) struct Process {
    /// What roles get.
    pub(crate) context: Context,
    registry: Registry,
    telemetry: TelemetryGuard,
    hangup: Signal,
    reload: Reload,
}

impl Process {
    /// Begins: logs and traces first. On SIGHUP `load` reads the settings again from `layers`.
    ///
    /// # Errors
    /// When telemetry cannot be set up, or signals cannot be had.
    pub(crate) fn begin(
        settings: &Settings,
        cluster_key: Secret,
        roles: &[Role],
        (layers, load): (Layers, Load),
    ) -> anyhow::Result<Self> {
        // From here on it does not end the process.
        let hangup = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
        let telemetry = telemetry::init(&settings.telemetry, roles)?;
        let context = Context {
            clock: Arc::new(SystemClock),
            random: Arc::new(OsRandom),
            lifecycle: Lifecycle::new(),
            readiness: Readiness::new(),
            namespaces: SharedNamespaces::new(settings.namespaces.clone()),
            cluster_key,
        };
        let mut registry = Registry::default();
        let metrics = register_process(&mut registry, roles.iter().map(|role| role.name()));
        let reload = Reload::new(layers, load, context.namespaces.clone(), metrics);
        Ok(Self { context, registry, telemetry, hangup, reload })
    }

    /// What a role registers its metrics with.
    pub(crate) fn metrics(&mut self) -> &mut Registry {
        self.registry.sub_registry_with_prefix(PREFIX)
    }

    /// Serves the admin pages; returns their address.
    ///
    /// # Errors
    /// When the address cannot be had.
    pub(crate) async fn serve_admin(&mut self, listen: &str) -> anyhow::Result<String> {
        let listener = bind("the admin pages", "--admin-listen", listen).await?;
        let address = listener.local_addr().context("the admin listener has no address")?.to_string();
        let registry = std::mem::take(&mut self.registry);
        let (readiness, lifecycle) = (self.context.readiness.clone(), &self.context.lifecycle);
        serve_admin(listener, Arc::new(registry), readiness, lifecycle).await;
        Ok(address)
    }

    /// Runs until a signal or a failure, then shuts down.
    ///
    /// # Errors
    /// When a task failed that the process needs, or signals cannot be had.
    pub(crate) async fn run(mut self) -> anyhow::Result<()> {
        let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
        let lifecycle = self.context.lifecycle;
        loop {
            tokio::select! {
                _ = terminate.recv() => tracing::info!("SIGTERM: shutting down"),
                _ = interrupt.recv() => tracing::info!("SIGINT: shutting down"),
                () = lifecycle.soft().cancelled_owned() => {}
                Some(()) = self.hangup.recv() => {
                    self.reload.run();
                    continue;
                }
            }
            break;
        }
        lifecycle.shutdown(SHUTDOWN).await;
        let failure = lifecycle.failure();
        let telemetry = self.telemetry;
        let _ = tokio::task::spawn_blocking(move || telemetry.shutdown(FLUSH)).await;
        match failure {
            Some(failure) => Err(failure.into()),
            None => Ok(()),
        }
    }
}
