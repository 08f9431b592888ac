//! Trace context across processes: W3C `traceparent` as text, in messages and in gRPC metadata.
//!
//! A span that has a remote parent is made explicitly (`info_span!` with `parent: None`), gets its parent at once and
//! is entered afterwards; after the first entry its parent is fixed. Behind the first span of a trace nobody makes
//! one for a message whose `traceparent` is not sampled ([`is_sampled`] looks at two characters): it travels on as
//! it is.

use std::time::{Duration, SystemTime};

pub use opentelemetry::Value;
use opentelemetry::{
    Context, KeyValue,
    trace::{SpanContext, SpanId, Status, TraceContextExt, TraceFlags, TraceId, TraceState},
};
use tonic::metadata::{MetadataMap, MetadataValue};
use tracing::Span;
use tracing_opentelemetry::{OpenTelemetrySpanExt, SetParentError};

/// Name of the metadata entry and of the HTTP header.
pub const TRACEPARENT: &str = "traceparent";

/// Length in bytes of a `traceparent` of version 00.
pub const TRACEPARENT_LEN: usize = 55;

/// Attribute that has a span begin so many microseconds before it was made; the tracer takes it away.
pub(crate) const UNDER_WAY: &str = "under_way_us";

/// Makes `span` a child of the remote span that `traceparent` names. Empty or invalid text changes nothing.
pub fn set_parent(span: &Span, traceparent: &str) {
    let Some(parent) = parse(traceparent) else { return };
    let parent = Context::new().with_remote_span_context(parent);
    if let Err(SetParentError::AlreadyStarted) = span.set_parent(parent) {
        tracing::debug!("a span got its remote parent too late, after it was entered");
    }
}

/// Whether the trace that `traceparent` names is recorded. False for no or invalid text.
#[must_use]
pub fn is_sampled(traceparent: &str) -> bool {
    // The flags; bit 0 says "sampled" in every version.
    traceparent.as_bytes().get(52..55).is_some_and(|flags| {
        flags[0] == b'-' && hex(flags[1]).is_some() && hex(flags[2]).is_some_and(|low| low & 1 == 1)
    })
}

/// Whether `traceparent` names a trace that its origin decided not to record.
#[must_use]
pub fn is_unsampled(traceparent: &str) -> bool {
    !traceparent.is_empty() && !is_sampled(traceparent)
}

/// Whether both texts name the same trace.
#[must_use]
pub fn is_same_trace(one: &str, other: &str) -> bool {
    match (parse(one), parse(other)) {
        (Some(one), Some(other)) => one.trace_id() == other.trace_id(),
        _ => false,
    }
}

/// Links `span` to the span that `traceparent` names. Empty or invalid text changes nothing.
pub fn link(span: &Span, traceparent: &str) {
    if let Some(other) = parse(traceparent) {
        span.add_link(other);
    }
}

/// Says of `span` which operation on messages it is, in the words of OpenTelemetry's semantic conventions: `operation`
/// is our name for it, `kind` one of `send`, `process` and `settle`, `destination` the pattern of where messages go.
pub fn messaging(span: &Span, operation: &'static str, kind: &'static str, destination: &'static str) {
    describe(
        span,
        [
            ("messaging.system", "sanjay".into()),
            ("messaging.operation.name", operation.into()),
            ("messaging.operation.type", kind.into()),
            ("messaging.destination.template", destination.into()),
        ],
    );
}

/// Adds attributes to `span`. Fields of `info_span!` would do the same, but are paid for spans that nobody records.
pub fn describe<const N: usize>(span: &Span, attributes: [(&'static str, Value); N]) {
    for (key, value) in attributes {
        span.set_attribute(key, value);
    }
}

/// Says of `span` that its work failed; `code` is a short word for why.
pub fn fail(span: &Span, code: &'static str) {
    span.set_attribute("error.type", code);
    span.set_status(Status::error(code));
}

/// Has `span` begin earlier than it was made; without effect once the span was entered or its `traceparent` was taken.
/// Whether a message is recorded is sometimes known only when the work on it is done.
pub fn under_way(span: &Span, since: Duration) {
    span.set_attribute(UNDER_WAY, i64::try_from(since.as_micros()).unwrap_or(i64::MAX));
}

/// Adds to `span` something that happened at `time_us`, Unix time in microseconds.
pub fn event<const N: usize>(
    span: &Span,
    name: &'static str,
    time_us: u64,
    attributes: [(&'static str, Value); N],
) {
    let time = SystemTime::UNIX_EPOCH + Duration::from_micros(time_us);
    let attributes = attributes.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
    span.add_event_with_timestamp(name, time, attributes);
}

/// A count as an attribute.
#[must_use]
pub fn count(number: usize) -> Value {
    i64::try_from(number).unwrap_or(i64::MAX).into()
}

/// Has `trace` name `span`, so that what follows becomes its child. A span without an OpenTelemetry context changes
/// nothing.
pub fn carry(span: &Span, trace: &mut String) {
    let own = traceparent(span);
    if !own.is_empty() {
        *trace = own;
    }
}

/// The `traceparent` of the span's OpenTelemetry context; empty when it has none.
#[must_use]
pub fn traceparent(span: &Span) -> String {
    if span.is_none() {
        return String::new();
    }
    let context = span.context();
    text(context.span().span_context())
}

fn text(span: &SpanContext) -> String {
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

/// The `traceparent` of a request's metadata, in the form of version 00; empty when there is none or it is invalid.
#[must_use]
pub fn extract(metadata: &MetadataMap) -> String {
    let value = metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok());
    value.and_then(parse).as_ref().map(text).unwrap_or_default()
}

fn hex(byte: u8) -> Option<u8> {
    match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    }
}

/// Reads `version-trace_id-span_id-flags` (W3C Trace Context, section 3.2). Versions above 00 may carry more
/// fields, which are ignored.
fn parse(text: &str) -> Option<SpanContext> {
    let mut parts = text.split('-');
    let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let lengths = [version.len(), trace_id.len(), span_id.len(), flags.len()];
    let lower_hex = |part: &str| part.bytes().all(|byte| hex(byte).is_some());
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
            link(&Span::none(), text);
            assert!(!is_same_trace(text, text), "{text}");
        }
    }

    #[test]
    fn the_flag_decides() {
        assert!(is_sampled(VALID) && !is_unsampled(VALID));
        assert!(is_sampled(&VALID.replace("-01", "-03")));
        for flags in ["-00", "-02", "-0e"] {
            let text = VALID.replace("-01", flags);
            assert!(!is_sampled(&text) && is_unsampled(&text), "{text}");
        }
        assert!(!is_sampled("") && !is_unsampled(""));
        for text in ["00", "🦀", &VALID[..54], &VALID.to_uppercase().replace("-01", "-0F")] {
            assert!(!is_sampled(text), "{text}");
        }
        let other_span = VALID.replace("b7ad6b7169203331", "00f067aa0ba902b7");
        assert!(is_same_trace(VALID, &other_span));
        assert!(!is_same_trace(VALID, &VALID.replace("0af7", "1af7")));
    }

    #[test]
    fn without_a_span_the_text_travels_on() {
        let mut trace = VALID.to_owned();
        carry(&Span::none(), &mut trace);
        assert_eq!(trace, VALID);
    }

    #[test]
    fn metadata_carries_it() {
        let mut request = tonic::Request::new(());
        assert_eq!(extract(request.metadata()), "");
        inject(&mut request, &Span::none());
        assert_eq!(extract(request.metadata()), "");
        request.metadata_mut().insert(TRACEPARENT, VALID.parse().unwrap());
        assert_eq!(extract(request.metadata()), VALID);
        request.metadata_mut().insert(TRACEPARENT, "00-nonsense".parse().unwrap());
        assert_eq!(extract(request.metadata()), "", "what is invalid goes no further");
    }
}
