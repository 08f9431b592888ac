//! One tracer for all roles of a process, which gives each span to the service that it belongs to.
//!
//! A layer for each role would not do: the layers of a subscriber share a span's OpenTelemetry data, so the
//! first of them would start the spans of all.

use anyhow::Context as _;
use opentelemetry::{
    Context, KeyValue, Value,
    trace::{SpanBuilder, Tracer, TracerProvider as _},
};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SdkTracer, SdkTracerProvider, Span},
};

use super::{Role, export::Collector};

/// The provider of one role. Without a collector nobody records, so new traces are not sampled; a caller's
/// sampled trace stays sampled for the processes behind this one.
pub(super) fn provider(
    role: Role,
    sample_ratio: f64,
    collector: Option<&Collector>,
) -> anyhow::Result<SdkTracerProvider> {
    let resource = Resource::builder()
        .with_service_name(role.service())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .build();
    let roots =
        if collector.is_some() { Sampler::TraceIdRatioBased(sample_ratio) } else { Sampler::AlwaysOff };
    let mut builder = SdkTracerProvider::builder()
        .with_resource(resource)
        .with_sampler(Sampler::ParentBased(Box::new(roots)));
    if let Some(collector) = collector {
        builder = builder.with_span_processor(collector.processor(role)?);
    }
    Ok(builder.build())
}

/// Chooses the role's tracer by the target of the span; spans of other crates go to the first role.
pub(super) struct RoleTracer {
    roles: Vec<(&'static str, SdkTracer)>,
}

impl RoleTracer {
    pub(super) fn new(providers: &[(Role, SdkTracerProvider)]) -> anyhow::Result<Self> {
        let roles: Vec<_> =
            providers.iter().map(|(role, provider)| (role.target(), provider.tracer("sanjay"))).collect();
        roles.first().context("telemetry needs at least one role")?;
        Ok(Self { roles })
    }

    fn of(&self, target: &str) -> &SdkTracer {
        let found = self.roles.iter().find(|(prefix, _)| {
            target.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
        });
        &found.unwrap_or(&self.roles[0]).1
    }
}

impl Tracer for RoleTracer {
    type Span = Span;

    fn build_with_context(&self, builder: SpanBuilder, parent: &Context) -> Span {
        let target = builder.attributes.iter().flatten().find(|entry| entry.key.as_str() == "target");
        let tracer = match target {
            Some(KeyValue { value: Value::String(target), .. }) => self.of(target.as_str()),
            _ => self.of(""),
        };
        tracer.build_with_context(builder, parent)
    }
}
