//! The way to a collector: OTLP over gRPC, in batches, from threads and a small runtime of its own, so that
//! neither a slow collector nor a busy process holds the other up.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use anyhow::Context as _;
use opentelemetry_otlp::{SpanExporter as OtlpExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{BatchConfigBuilder, BatchSpanProcessor, SpanData, SpanExporter},
};
use tokio::runtime::Runtime;
use tonic::transport::Uri;

use super::Role;

/// Spans of one role that may wait; more are dropped.
const QUEUE: usize = 8_192;
/// Spans in one call.
const BATCH: usize = 512;
/// How long spans wait for company.
const DELAY: Duration = Duration::from_secs(1);
/// How long one call may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Whether `endpoint` is a URL of the form `http://host:port`.
pub(super) fn is_usable(endpoint: &str) -> bool {
    endpoint
        .parse::<Uri>()
        .is_ok_and(|uri| uri.scheme_str() == Some("http") && uri.host().is_some_and(|host| !host.is_empty()))
}

/// A collector of spans.
pub(super) struct Collector {
    endpoint: String,
    /// Taken when dropped.
    runtime: Option<Runtime>,
}

impl Collector {
    pub(super) fn new(endpoint: &str) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("telemetry")
            .enable_all()
            .build()
            .context("cannot start the runtime of the trace exporter")?;
        Ok(Self { endpoint: endpoint.to_owned(), runtime: Some(runtime) })
    }

    /// What takes the finished spans of `role`: it never waits, and drops what does not fit its queue.
    pub(super) fn processor(&self, role: Role) -> anyhow::Result<BatchSpanProcessor> {
        let _inside = self.runtime.as_ref().map(Runtime::enter);
        let exporter = OtlpExporter::builder()
            .with_tonic()
            .with_endpoint(self.endpoint.clone())
            .with_timeout(TIMEOUT)
            .build()
            .with_context(|| format!("cannot export traces to `{}`", self.endpoint))?;
        let batches = BatchConfigBuilder::default()
            .with_max_queue_size(QUEUE)
            .with_max_export_batch_size(BATCH)
            .with_scheduled_delay(DELAY)
            .build();
        let exporter = Reporting {
            inner: exporter,
            role,
            endpoint: self.endpoint.clone(),
            failing: AtomicBool::new(false),
        };
        Ok(BatchSpanProcessor::builder(exporter).with_batch_config(batches).build())
    }
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Collector").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        // A plain drop would block, and panic inside another runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Says once when the collector stops taking spans, and once when it takes them again.
#[derive(Debug)]
struct Reporting<E> {
    inner: E,
    role: Role,
    endpoint: String,
    failing: AtomicBool,
}

impl<E: SpanExporter> SpanExporter for Reporting<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        let was_failing = self.failing.swap(result.is_err(), Ordering::Relaxed);
        let (service, endpoint) = (self.role.service(), self.endpoint.as_str());
        match &result {
            Err(error) if !was_failing => {
                tracing::warn!(service, endpoint, %error, "spans are dropped: the collector does not take them");
            }
            Ok(()) if was_failing => tracing::info!(service, endpoint, "the collector takes spans again"),
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
