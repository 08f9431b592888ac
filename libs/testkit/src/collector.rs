//! A collector of traces in the test's own process: it takes spans by OTLP over gRPC, as Jaeger does, and keeps them.

use std::{collections::BTreeMap, fmt::Write as _, net::SocketAddr, time::Duration};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value},
    trace::v1::{ResourceSpans, Span as ProtoSpan, span, status::StatusCode},
};
use serde_json::Value;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle, time::timeout};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

/// How long [`Collector::wait_for`] waits: processes export in batches, some seconds apart.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a span is, in relation to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanKind {
    /// Within one process.
    Internal,
    /// Answers a call.
    Server,
    /// Makes a call.
    Client,
    /// Hands a message on.
    Producer,
    /// Takes a message.
    Consumer,
}

/// A span as it was exported. Ids are in lower-case hexadecimal.
#[derive(Debug, Clone, PartialEq)]
pub struct CollectedSpan {
    /// `service.name` of the process.
    pub service: String,
    /// Its name.
    pub name: String,
    /// Its kind; `None` when the exporter gave none.
    pub kind: Option<SpanKind>,
    /// 32 digits.
    pub trace_id: String,
    /// 16 digits.
    pub span_id: String,
    /// 16 digits; `None` for the first of a trace.
    pub parent_id: Option<String>,
    /// Its attributes.
    pub attributes: BTreeMap<String, Value>,
    /// Trace and span ids of the spans that it is linked to.
    pub links: Vec<(String, String)>,
    /// Names of its events.
    pub events: Vec<String>,
    /// Its error, if it failed.
    pub error: Option<String>,
    /// Nanoseconds since 1970.
    pub start_ns: u64,
    /// Nanoseconds since 1970.
    pub end_ns: u64,
}

impl CollectedSpan {
    /// The text of an attribute.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.get(name)?.as_str()
    }
}

/// Takes and keeps spans until it is dropped.
#[derive(Debug)]
pub struct Collector {
    address: SocketAddr,
    spans: watch::Sender<Vec<CollectedSpan>>,
    serving: JoinHandle<()>,
}

impl Collector {
    /// Listens on a free port of 127.0.0.1.
    ///
    /// # Panics
    /// When it cannot.
    pub async fn start() -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("there is a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let spans = watch::Sender::new(Vec::new());
        let service = TraceServiceServer::new(Keep(spans.clone()));
        let server = Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener));
        let serving = tokio::spawn(async move { server.await.expect("the collector serves") });
        Self { address, spans, serving }
    }

    /// What processes export to: the value of `telemetry.otlp_endpoint`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Everything that has come.
    #[must_use]
    pub fn spans(&self) -> Vec<CollectedSpan> {
        self.spans.borrow().clone()
    }

    /// What has come of one trace, by its begin.
    #[must_use]
    pub fn trace(&self, trace_id: &str) -> Vec<CollectedSpan> {
        let mut spans = self.spans();
        spans.retain(|span| span.trace_id == trace_id);
        spans.sort_by_key(|span| span.start_ns);
        spans
    }

    /// Waits until the spans that have come give a value.
    ///
    /// # Panics
    /// With `what`, and with the spans that have come, when they do not within 30 s.
    pub async fn wait_for<T>(&self, what: &str, mut look: impl FnMut(&[CollectedSpan]) -> Option<T>) -> T {
        let mut spans = self.spans.subscribe();
        let mut found = None;
        let wait = async {
            let look = |spans: &Vec<CollectedSpan>| {
                found = look(spans);
                found.is_some()
            };
            spans.wait_for(look).await.expect("the collector holds the sender");
        };
        let in_time = timeout(PATIENCE, wait).await.is_ok();
        found.filter(|_| in_time).unwrap_or_else(|| {
            panic!("not within {PATIENCE:?}: {what}. What has come:\n{}", list(&self.spans()))
        })
    }

    /// Waits until a trace has a span of each of these names, and gives its spans, by their begin.
    ///
    /// # Panics
    /// When it does not within 30 s.
    pub async fn wait_for_trace(&self, trace_id: &str, names: &[&str]) -> Vec<CollectedSpan> {
        let has = |spans: &[CollectedSpan], name: &str| {
            spans.iter().any(|span| span.trace_id == trace_id && span.name == name)
        };
        let what = format!("trace {trace_id} has {names:?}");
        self.wait_for(&what, |spans| names.iter().all(|name| has(spans, name)).then_some(())).await;
        self.trace(trace_id)
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// One line for each span.
fn list(spans: &[CollectedSpan]) -> String {
    let mut text = String::new();
    for CollectedSpan { service, name, kind, trace_id, span_id, parent_id, .. } in spans {
        let parent = parent_id.as_deref().unwrap_or("nobody");
        writeln!(text, "  {trace_id} {span_id} below {parent}: {service} {name} {kind:?}")
            .expect("writing to a string does not fail");
    }
    text
}

/// The service.
struct Keep(watch::Sender<Vec<CollectedSpan>>);

#[tonic::async_trait]
impl TraceService for Keep {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let new: Vec<_> = request.into_inner().resource_spans.into_iter().flat_map(of_process).collect();
        self.0.send_modify(|spans| spans.extend(new));
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn of_process(spans: ResourceSpans) -> Vec<CollectedSpan> {
    let resource = attributes(spans.resource.map(|resource| resource.attributes).unwrap_or_default());
    let service = resource.get("service.name").and_then(Value::as_str).unwrap_or_default();
    let spans = spans.scope_spans.into_iter().flat_map(|scope| scope.spans);
    spans.map(|span| collected(service, span)).collect()
}

fn collected(service: &str, span: ProtoSpan) -> CollectedSpan {
    let kind = match span.kind() {
        span::SpanKind::Internal => Some(SpanKind::Internal),
        span::SpanKind::Server => Some(SpanKind::Server),
        span::SpanKind::Client => Some(SpanKind::Client),
        span::SpanKind::Producer => Some(SpanKind::Producer),
        span::SpanKind::Consumer => Some(SpanKind::Consumer),
        span::SpanKind::Unspecified => None,
    };
    let failed = span.status.filter(|status| status.code() == StatusCode::Error);
    CollectedSpan {
        service: service.to_owned(),
        kind,
        trace_id: hex(&span.trace_id),
        span_id: hex(&span.span_id),
        parent_id: (!span.parent_span_id.is_empty()).then(|| hex(&span.parent_span_id)),
        attributes: attributes(span.attributes),
        links: span.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id))).collect(),
        events: span.events.into_iter().map(|event| event.name).collect(),
        error: failed.map(|status| status.message),
        name: span.name,
        start_ns: span.start_time_unix_nano,
        end_ns: span.end_time_unix_nano,
    }
}

fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, Value> {
    pairs.into_iter().map(|pair| (pair.key, value(pair.value))).collect()
}

fn value(any: Option<AnyValue>) -> Value {
    use any_value::Value as Any;
    match any.and_then(|any| any.value) {
        Some(Any::StringValue(text)) => text.into(),
        Some(Any::BoolValue(flag)) => flag.into(),
        Some(Any::IntValue(number)) => number.into(),
        Some(Any::DoubleValue(number)) => number.into(),
        Some(Any::ArrayValue(array)) => array.values.into_iter().map(|any| value(Some(any))).collect(),
        Some(Any::KvlistValue(list)) => attributes(list.values).into_iter().collect(),
        Some(Any::BytesValue(bytes)) => hex(&bytes).into(),
        _ => Value::Null,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::{
        collector::trace::v1::trace_service_client::TraceServiceClient,
        resource::v1::Resource,
        trace::v1::{ScopeSpans, Status as SpanStatus},
    };
    use serde_json::json;

    use super::*;

    fn text(key: &str, text: &str) -> KeyValue {
        let value = AnyValue { value: Some(any_value::Value::StringValue(text.to_owned())) };
        KeyValue { key: key.to_owned(), value: Some(value), ..KeyValue::default() }
    }

    fn span(name: &str, id: u8, parent: Option<u8>) -> ProtoSpan {
        ProtoSpan {
            trace_id: vec![0xab; 16],
            span_id: vec![id; 8],
            parent_span_id: parent.map(|id| vec![id; 8]).unwrap_or_default(),
            name: name.to_owned(),
            kind: span::SpanKind::Producer as i32,
            start_time_unix_nano: u64::from(id),
            ..ProtoSpan::default()
        }
    }

    fn export(service: &str, spans: Vec<ProtoSpan>) -> ExportTraceServiceRequest {
        let resource = Resource { attributes: vec![text("service.name", service)], ..Resource::default() };
        let scope_spans = vec![ScopeSpans { spans, ..ScopeSpans::default() }];
        let spans = ResourceSpans { resource: Some(resource), scope_spans, ..ResourceSpans::default() };
        ExportTraceServiceRequest { resource_spans: vec![spans] }
    }

    #[tokio::test]
    async fn what_a_client_exports_is_kept() {
        let collector = Collector::start().await;
        let mut client = TraceServiceClient::connect(collector.endpoint()).await.unwrap();
        let mut second = span("second", 2, Some(1));
        second.attributes.push(text("messaging.system", "sanjay"));
        let link = span::Link { trace_id: vec![1; 16], span_id: vec![2; 8], ..span::Link::default() };
        second.links.push(link);
        second.status = Some(SpanStatus { code: StatusCode::Error as i32, message: "no".to_owned() });
        let trace_id = "ab".repeat(16);
        let waiting = collector.wait_for_trace(&trace_id, &["first", "second"]);
        let exporting = async {
            client.export(export("edge", vec![second])).await.unwrap();
            client.export(export("router", vec![span("first", 1, None)])).await.unwrap();
        };
        let (spans, ()) = tokio::join!(waiting, exporting);
        let [first, second] = spans.as_slice() else { panic!("{spans:?}") };
        assert_eq!((first.service.as_str(), second.service.as_str()), ("router", "edge"));
        assert_eq!((&first.parent_id, &second.parent_id), (&None, &Some(first.span_id.clone())));
        assert_eq!((first.kind, &first.error), (Some(SpanKind::Producer), &None));
        assert_eq!(second.attributes["messaging.system"], json!("sanjay"));
        assert_eq!(second.links, [("01".repeat(16), "02".repeat(8))]);
        assert_eq!(second.error.as_deref(), Some("no"));
        assert!(collector.trace("another").is_empty());
    }
}
