//! Trace context across processes: W3C `traceparent` as text, in messages and in gRPC metadata.
//!
//! A span that has a remote parent is made explicitly (`info_span!`), gets its parent at once and is entered
//! afterwards; after the first entry its parent is fixed.

use opentelemetry::{
    Context,
    trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use tonic::metadata::{MetadataMap, MetadataValue};
use tracing::Span;
use tracing_opentelemetry::{OpenTelemetrySpanExt, SetParentError};

/// Name of the metadata entry and of the HTTP header.
pub const TRACEPARENT: &str = "traceparent";

/// Makes `span` a child of the remote span that `traceparent` names. Empty or invalid text changes nothing.
pub fn set_parent(span: &Span, traceparent: &str) {
    let Some(parent) = parse(traceparent) else { return };
    let parent = Context::new().with_remote_span_context(parent);
    if let Err(SetParentError::AlreadyStarted) = span.set_parent(parent) {
        tracing::debug!("a span got its remote parent too late, after it was entered");
    }
}

/// The `traceparent` of the span's OpenTelemetry context; empty when it has none.
#[must_use]
pub fn traceparent(span: &Span) -> String {
    let context = span.context();
    let span = context.span();
    let span = span.span_context();
    if !span.is_valid() {
        return String::new();
    }
    format!("00-{}-{}-{:02x}", span.trace_id(), span.span_id(), span.trace_flags())
}

/// Adds the span's `traceparent` to the metadata of a request.
pub fn inject<T>(request: &mut tonic::Request<T>, span: &Span) {
    let text = traceparent(span);
    if !text.is_empty() {
        let value = MetadataValue::try_from(text).expect("a traceparent is hex digits and hyphens");
        request.metadata_mut().insert(TRACEPARENT, value);
    }
}

/// The `traceparent` of a request's metadata; empty when there is none.
#[must_use]
pub fn extract(metadata: &MetadataMap) -> String {
    metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned()
}

/// Reads `version-trace_id-span_id-flags` (W3C Trace Context, section 3.2). Versions above 00 may carry more
/// fields, which are ignored.
fn parse(text: &str) -> Option<SpanContext> {
    let mut parts = text.split('-');
    let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let lengths = [version.len(), trace_id.len(), span_id.len(), flags.len()];
    let lower_hex = |part: &str| part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if lengths != [2, 32, 16, 2]
        || ![version, trace_id, span_id, flags].into_iter().all(lower_hex)
        || version == "ff"
        || (version == "00" && parts.next().is_some())
    {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let trace_id = TraceId::from_hex(trace_id).ok()?;
    let span_id = SpanId::from_hex(span_id).ok()?;
    let context = SpanContext::new(trace_id, span_id, flags, true, TraceState::default());
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_traceparent_is_read() {
        let context = parse(VALID).unwrap();
        assert_eq!(context.trace_id().to_string(), VALID[3..35]);
        assert_eq!(context.span_id().to_string(), VALID[36..52]);
        assert!(context.is_sampled() && context.is_remote());
        assert!(!parse(&VALID.replace("-01", "-02")).unwrap().is_sampled());
        assert!(parse(&format!("{}-later", VALID.replacen("00", "01", 1))).is_some());
    }

    #[test]
    fn nonsense_is_no_parent() {
        let zero_trace = format!("00-{:032}-b7ad6b7169203331-01", 0);
        let zero_span = format!("00-0af7651916cd43dd8448eb211c80319c-{:016}-01", 0);
        let newer = format!("{VALID}-x");
        let upper = VALID.to_uppercase();
        let invalid = VALID.replacen("00", "ff", 1);
        let texts = ["", "00", "🦀", &zero_trace, &zero_span, &newer, &upper, &invalid, &VALID[..54]];
        for text in texts {
            assert!(parse(text).is_none(), "{text}");
            set_parent(&Span::none(), text);
        }
    }

    #[test]
    fn metadata_carries_it() {
        let mut request = tonic::Request::new(());
        assert_eq!(extract(request.metadata()), "");
        inject(&mut request, &Span::none());
        assert_eq!(extract(request.metadata()), "");
        request.metadata_mut().insert(TRACEPARENT, VALID.parse().unwrap());
        assert_eq!(extract(request.metadata()), VALID);
    }
}
