//! One tracer for all roles of a process, which gives each span to the service that it belongs to.
//!
//! A layer for each role would not do: the layers of a subscriber share a span's OpenTelemetry data, so the
//! first of them would start the spans of all.

use std::time::Duration;

use anyhow::Context as _;
use opentelemetry::{
    Context, KeyValue, TraceId, Value,
    trace::{Link, SpanBuilder, SpanKind, Tracer, TracerProvider as _},
};
use opentelemetry_sdk::{
    Resource,
    trace::{Sampler, SamplingResult, SdkTracer, SdkTracerProvider, ShouldSample, Span},
};

use super::{Role, export::Collector};
use crate::trace::UNDER_WAY;

/// The provider of one role. Without a collector nobody records, so new traces are not sampled; a caller's
/// sampled trace stays sampled for the processes behind this one.
pub(super) fn provider(
    role: Role,
    instance: &str,
    sample_ratio: f64,
    collector: Option<&Collector>,
) -> anyhow::Result<SdkTracerProvider> {
    let resource = Resource::builder()
        .with_service_name(role.service())
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
        .with_attribute(KeyValue::new("service.instance.id", instance.to_owned()))
        .build();
    let roots: Box<dyn ShouldSample> = match collector {
        Some(_) => Box::new(Roots(Sampler::TraceIdRatioBased(sample_ratio))),
        None => Box::new(Sampler::AlwaysOff),
    };
    let mut builder =
        SdkTracerProvider::builder().with_resource(resource).with_sampler(Sampler::ParentBased(roots));
    if let Some(collector) = collector {
        builder = builder.with_span_processor(collector.processor(role)?);
    }
    Ok(builder.build())
}

/// Decides for the first span of a trace. A batch that holds a recorded message is recorded, whatever the ratio: its
/// span is in no message's trace, and is found through the links alone.
#[derive(Debug, Clone)]
pub(super) struct Roots(pub(super) Sampler);

impl ShouldSample for Roots {
    fn should_sample(
        &self,
        parent: Option<&Context>,
        trace_id: TraceId,
        name: &str,
        kind: &SpanKind,
        attributes: &[KeyValue],
        links: &[Link],
    ) -> SamplingResult {
        let holds_recorded = links.iter().any(|link| link.span_context.is_sampled());
        let sampler = if holds_recorded { &Sampler::AlwaysOn } else { &self.0 };
        sampler.should_sample(parent, trace_id, name, kind, attributes, links)
    }
}

/// Has the span begin when [`trace::under_way`](crate::trace::under_way) says.
fn begin_earlier(builder: &mut SpanBuilder) {
    let Some(attributes) = &mut builder.attributes else { return };
    let Some(at) = attributes.iter().position(|entry| entry.key.as_str() == UNDER_WAY) else { return };
    if let (Value::I64(micros), Some(start)) = (attributes.swap_remove(at).value, builder.start_time) {
        let earlier = start.checked_sub(Duration::from_micros(micros.try_into().unwrap_or(0)));
        builder.start_time = earlier.or(Some(start));
    }
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

    fn build_with_context(&self, mut builder: SpanBuilder, parent: &Context) -> Span {
        begin_earlier(&mut builder);
        let target = builder.attributes.iter().flatten().find(|entry| entry.key.as_str() == "target");
        let tracer = match target {
            Some(KeyValue { value: Value::String(target), .. }) => self.of(target.as_str()),
            _ => self.of(""),
        };
        tracer.build_with_context(builder, parent)
    }
}
