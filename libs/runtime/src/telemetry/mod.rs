//! Logs and traces of a process: one line on stderr for each event, with the ids of the trace it belongs to,
//! and spans over OTLP to a collector where one is configured.
//!
//! A process may play several roles; each is a service of its own in traces, chosen by the target of the span.
//! Ids of traces are made in any case, so that logs of all processes can be joined by `trace_id`.

mod export;
mod log;
#[cfg(test)]
mod tests;
mod tracer;

use std::time::Duration;

use anyhow::Context as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use serde::Deserialize;
use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::Targets, fmt::MakeWriter, layer::SubscriberExt,
    util::SubscriberInitExt,
};

use self::{
    export::Collector,
    log::LogLayer,
    tracer::{RoleTracer, provider},
};
use crate::config::{ConfigError, Validate};

/// How long dropping the guard may take; [`TelemetryGuard::shutdown`] sets another bound.
const FLUSH_ON_DROP: Duration = Duration::from_secs(2);

/// A role of Sanjay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Holds the sockets.
    Edge,
    /// Owns sessions and channels.
    Router,
    /// Owns the inboxes.
    Delivery,
}

impl Role {
    /// The name in configuration and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Edge => "edge",
            Self::Router => "router",
            Self::Delivery => "delivery",
        }
    }

    /// The name in traces.
    #[must_use]
    pub fn service(self) -> &'static str {
        match self {
            Self::Edge => "sanjay-edge",
            Self::Router => "sanjay-router",
            Self::Delivery => "sanjay-delivery",
        }
    }

    /// What the targets of the role's spans begin with: the name of its crate.
    fn target(self) -> &'static str {
        match self {
            Self::Edge => "sanjay_edge",
            Self::Router => "sanjay_router",
            Self::Delivery => "sanjay_delivery",
        }
    }
}

/// What log lines look like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One JSON object for each line.
    #[default]
    Json,
    /// For people.
    Text,
}

/// Settings of logs and traces.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Filter of log lines: a level, or directives such as `info,sanjay_edge=debug`.
    pub log_level: String,
    /// What log lines look like.
    pub log_format: LogFormat,
    /// Where spans go (OTLP over gRPC, `http://host:port`); nowhere when left out.
    pub otlp_endpoint: Option<String>,
    /// Name of this process in traces, `service.instance.id`. Empty: the machine's name and the process id.
    pub instance: String,
    /// Share of new traces that are recorded, from 0 to 1. A caller's trace is recorded when the caller says so.
    pub sample_ratio: f64,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            log_level: "info".to_owned(),
            log_format: LogFormat::Json,
            otlp_endpoint: None,
            instance: String::new(),
            sample_ratio: 1.0,
        }
    }
}

impl Validate for TelemetryConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        // The library takes a lone word that is no level for the name of a target, and would log nothing else.
        let mut lone = self.log_level.split(',').map(str::trim).filter(|part| !part.contains(['=', '[']));
        if let Some(word) = lone.find(|word| word.parse::<LevelFilter>().is_err()) {
            return Err(ConfigError::new(
                "telemetry.log_level",
                format!("has `{word}`, which is no level"),
                "set it to error, warn, info, debug or trace, or to directives such as `info,sanjay_edge=debug`",
            ));
        }
        if let Err(error) = self.log_level.parse::<EnvFilter>() {
            return Err(ConfigError::new(
                "telemetry.log_level",
                format!("is no filter of log lines ({error})"),
                "set it to error, warn, info, debug or trace, or to directives such as `info,sanjay_edge=debug`",
            ));
        }
        if !(0.0..=1.0).contains(&self.sample_ratio) {
            return Err(ConfigError::new(
                "telemetry.sample_ratio",
                format!("is {}", self.sample_ratio),
                "set it between 0 (no trace) and 1 (every trace)",
            ));
        }
        match &self.otlp_endpoint {
            Some(endpoint) if !export::is_usable(endpoint) => Err(ConfigError::new(
                "telemetry.otlp_endpoint",
                format!("is `{endpoint}`"),
                "set it to `http://host:port` of a collector's OTLP gRPC port, or leave it out",
            )),
            _ => Ok(()),
        }
    }
}

/// Sets up logs and traces for a process that plays `roles`.
///
/// # Errors
/// When called a second time in the process, or the settings are wrong.
pub fn init(config: &TelemetryConfig, roles: &[Role]) -> anyhow::Result<TelemetryGuard> {
    config.validate()?;
    let collector = config.otlp_endpoint.as_deref().map(Collector::new).transpose()?;
    let (subscriber, providers) = subscriber(config, roles, collector.as_ref(), std::io::stderr)?;
    subscriber.try_init().context("telemetry is set up already: it can be initialised once in a process")?;
    Ok(TelemetryGuard { providers, _collector: collector })
}

/// What tells this process from others of its role.
fn instance(configured: &str) -> String {
    if !configured.is_empty() {
        return configured.to_owned();
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { "localhost" } else { host.trim() };
    format!("{host}:{}", std::process::id())
}

/// Everything of [`init`] but the global part.
fn subscriber<W>(
    config: &TelemetryConfig,
    roles: &[Role],
    collector: Option<&Collector>,
    writer: W,
) -> anyhow::Result<(impl Subscriber + Send + Sync + 'static, Vec<SdkTracerProvider>)>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let mut providers = Vec::new();
    let instance = instance(&config.instance);
    for role in roles {
        providers.push((*role, provider(*role, &instance, config.sample_ratio, collector)?));
    }
    let tracer = RoleTracer::new(&providers)?;
    // Spans below INFO are for log filters; as traces they would cost more than they tell.
    let spans = Targets::new().with_target("sanjay", LevelFilter::INFO);
    let traces = tracing_opentelemetry::layer()
        .with_location(false)
        .with_threads(false)
        .with_target(true)
        .with_tracer(tracer)
        .with_filter(spans);
    let logs = LogLayer::new(config.log_format, writer).with_filter(config.log_level.parse::<EnvFilter>()?);
    // Traces first: the log layer reads the ids that they make.
    let subscriber = Registry::default().with(traces).with(logs);
    Ok((subscriber, providers.into_iter().map(|(_, provider)| provider).collect()))
}

/// Keeps telemetry going; dropping it flushes the spans that are still here, for at most two seconds.
#[derive(Debug)]
#[must_use = "spans are lost when the guard is dropped before the process ends"]
pub struct TelemetryGuard {
    providers: Vec<SdkTracerProvider>,
    /// After the providers: their last export goes through it.
    _collector: Option<Collector>,
}

impl TelemetryGuard {
    /// Flushes the spans that are still here and ends the exporters, within `deadline`; what is left then is
    /// dropped. Blocks the thread.
    pub fn shutdown(mut self, deadline: Duration) {
        self.flush(deadline);
    }

    fn flush(&mut self, deadline: Duration) {
        let providers = std::mem::take(&mut self.providers);
        std::thread::scope(|scope| {
            for provider in &providers {
                scope.spawn(move || {
                    if let Err(error) = provider.shutdown_with_timeout(deadline) {
                        tracing::warn!(%error, "the last spans were dropped");
                    }
                });
            }
        });
    }
}

impl Drop for TelemetryGuard {
    fn drop(&mut self) {
        self.flush(FLUSH_ON_DROP);
    }
}
