use std::{
    io,
    sync::{Arc, Mutex as StdMutex},
    time::Duration,
};

use opentelemetry::trace::Status;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Sampler, SimpleSpanProcessor, SpanData, SpanExporter},
};
use parking_lot::Mutex;
use serde_json::Value;
use tracing::{info, info_span, subscriber::with_default};

use super::*;
use crate::trace;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACE_ID: &str = "0af7651916cd43dd8448eb211c80319c";

/// The lines that were written.
#[derive(Clone, Default)]
struct Lines(Arc<StdMutex<Vec<u8>>>);

impl Lines {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    fn json(&self) -> Vec<Value> {
        self.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn logged(config: &TelemetryConfig, body: impl FnOnce()) -> Lines {
    let lines = Lines::default();
    let writer = lines.clone();
    let (subscriber, _providers) = subscriber(config, &[Role::Edge], None, move || writer.clone()).unwrap();
    with_default(subscriber, body);
    lines
}

#[test]
fn a_line_inside_a_span_carries_the_trace_of_its_remote_parent() {
    // The log filter hides the span; its ids must be in the line all the same.
    let config = TelemetryConfig { log_level: "warn".to_owned(), ..Default::default() };
    let mut sent = String::new();
    let lines = logged(&config, || {
        let span = info_span!(target: "sanjay_edge::session", "publish");
        trace::set_parent(&span, PARENT);
        sent = trace::traceparent(&span);
        let inside = span.enter();
        tracing::warn!(target: "sanjay_edge::session", sockets = 3_u64, user = "u1", "written");
        drop(inside);
        tracing::warn!(target: "sanjay_edge::session", parent: &span, "named its parent");
        tracing::warn!("outside");
    });
    let lines = lines.json();
    assert!(sent.starts_with(&format!("00-{TRACE_ID}-")) && sent.ends_with("-01"), "{sent}");
    let span_id = sent.split('-').nth(2).unwrap();
    assert_ne!(span_id, PARENT.split('-').nth(2).unwrap());
    for line in &lines[..2] {
        assert_eq!((line["trace_id"].as_str(), line["span_id"].as_str()), (Some(TRACE_ID), Some(span_id)));
    }
    let line = &lines[0];
    assert_eq!(line["message"], "written");
    assert_eq!((&line["sockets"], &line["user"]), (&Value::from(3), &Value::from("u1")));
    assert_eq!(
        (line["level"].as_str(), line["target"].as_str()),
        (Some("WARN"), Some("sanjay_edge::session"))
    );
    let time = line["timestamp"].as_str().unwrap();
    assert!(time.len() == 27 && time.ends_with('Z') && &time[10..11] == "T", "{time}");
    assert!(lines[2].get("trace_id").is_none());
}

#[test]
fn ids_are_made_without_a_collector() {
    logged(&TelemetryConfig::default(), || {
        let outer = info_span!(target: "sanjay_edge", "outer");
        let parent = trace::traceparent(&outer);
        assert!(parent.starts_with("00-") && parent.len() == 55, "{parent}");
        let inner = outer.in_scope(|| trace::traceparent(&info_span!(target: "sanjay_edge", "inner")));
        assert_eq!(inner[..36], parent[..36], "the same trace");
        assert_ne!(inner, parent, "another span");
    });
    assert_eq!(trace::traceparent(&info_span!("without telemetry")), "");
}

#[test]
fn odd_fields_do_not_break_a_line() {
    let lines = logged(&TelemetryConfig::default(), || {
        let error = io::Error::other("disk \"full\"\n");
        info!(level = 7, target_ = ?Some(1), error = &error as &dyn std::error::Error, nan = f64::NAN, "a\nb");
    });
    let line = &lines.json()[0];
    assert_eq!(line["field.level"], 7);
    assert_eq!(line["message"], "a\nb");
    assert_eq!(line["error"], "disk \"full\"\n");
    assert_eq!(line["nan"], Value::Null);
}

#[test]
fn text_is_for_people() {
    let config = TelemetryConfig { log_format: LogFormat::Text, ..Default::default() };
    let lines = logged(&config, || {
        let span = info_span!(target: "sanjay_edge", "publish");
        span.in_scope(|| info!(target: "sanjay_edge", sockets = 3, user = "u1", "written"));
    });
    let text = lines.text();
    assert!(text.contains(" INFO sanjay_edge: written sockets=3 user=\"u1\" trace_id="), "{text}");
}

/// Which service exported which span.
type Exported = Arc<Mutex<Vec<(String, String)>>>;

#[derive(Debug)]
struct Recorder {
    service: String,
    exported: Exported,
}

impl SpanExporter for Recorder {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.exported
            .lock()
            .extend(batch.into_iter().map(|span| (self.service.clone(), span.name.into_owned())));
        Ok(())
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.service = resource.get(&"service.name".into()).unwrap().to_string();
    }
}

#[test]
fn each_role_is_a_service_of_its_own() {
    let exported = Exported::default();
    let providers = [Role::Edge, Role::Router, Role::Delivery].map(|role| {
        let recorder = Recorder { service: String::new(), exported: Arc::clone(&exported) };
        let provider = SdkTracerProvider::builder()
            .with_sampler(Sampler::AlwaysOn)
            .with_resource(Resource::builder().with_service_name(role.service()).build())
            .with_span_processor(SimpleSpanProcessor::new(recorder))
            .build();
        (role, provider)
    });
    let layer = tracing_opentelemetry::layer()
        .with_location(false)
        .with_target(true)
        .with_tracer(RoleTracer::new(&providers).unwrap());
    with_default(Registry::default().with(layer), || {
        let send = info_span!(target: "sanjay_delivery::grpc", "send");
        let router = send.in_scope(|| info_span!(target: "sanjay_router", "relay"));
        let edge = router.in_scope(|| info_span!(target: "sanjay_edge::hub", "write"));
        drop((edge, router, send));
        drop(info_span!(target: "sanjay_edges", "other"));
    });
    let mut exported = exported.lock().clone();
    exported.sort();
    let expected = [
        ("sanjay-delivery", "send"),
        ("sanjay-edge", "other"),
        ("sanjay-edge", "write"),
        ("sanjay-router", "relay"),
    ]
    .map(|(service, name)| (service.to_owned(), name.to_owned()));
    assert_eq!(exported, expected);
}

/// Finished spans of the edge, under a sampler that records no trace of its own.
#[derive(Debug, Clone, Default)]
struct Finished(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Finished {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().extend(batch);
        Ok(())
    }
}

fn finished(body: impl FnOnce()) -> Vec<SpanData> {
    let spans = Finished::default();
    let provider = SdkTracerProvider::builder()
        .with_sampler(Sampler::ParentBased(Box::new(tracer::Roots(Sampler::AlwaysOff))))
        .with_span_processor(SimpleSpanProcessor::new(spans.clone()))
        .build();
    let layer = tracing_opentelemetry::layer()
        .with_target(true)
        .with_tracer(RoleTracer::new(&[(Role::Edge, provider)]).unwrap());
    with_default(Registry::default().with(layer), body);
    std::mem::take(&mut *spans.0.lock())
}

#[test]
fn a_batch_is_recorded_when_it_holds_a_recorded_message() {
    let unsampled = PARENT.replace("-01", "-00");
    let spans = finished(|| {
        for links in [&[][..], &[unsampled.as_str()], &[unsampled.as_str(), PARENT]] {
            let span = info_span!(parent: None, "commit");
            links.iter().for_each(|link| trace::link(&span, link));
        }
    });
    assert_eq!(spans.len(), 1, "{spans:?}");
    assert_eq!(spans[0].links.iter().count(), 2);
    assert_ne!(spans[0].span_context.trace_id().to_string(), TRACE_ID, "a trace of its own");
}

#[test]
fn a_span_begins_when_its_work_did() {
    let spans = finished(|| {
        let span = info_span!(parent: None, "settle");
        trace::set_parent(&span, PARENT);
        trace::under_way(&span, Duration::from_secs(5));
        trace::describe(&span, [("seq", trace::count(1))]);
        trace::fail(&span, "unavailable");
    });
    let lasted = spans[0].end_time.duration_since(spans[0].start_time).unwrap();
    assert!((5..60).contains(&lasted.as_secs()), "{lasted:?}");
    let keys: Vec<_> = spans[0].attributes.iter().map(|entry| entry.key.as_str()).collect();
    assert!(keys.contains(&"seq") && !keys.contains(&"under_way_us"), "{keys:?}");
    assert!(matches!(&spans[0].status, Status::Error { description } if description == "unavailable"));
}

#[tokio::test]
async fn a_collector_that_is_gone_holds_nobody_up() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let collector = Collector::new(&endpoint).unwrap();
    let (subscriber, providers) =
        subscriber(&TelemetryConfig::default(), &[Role::Edge], Some(&collector), io::sink).unwrap();
    let guard = TelemetryGuard { providers, _collector: Some(collector) };
    let started = tokio::time::Instant::now();
    with_default(subscriber, || {
        for _ in 0..50_000 {
            drop(info_span!(target: "sanjay_edge", "write"));
        }
        guard.shutdown(Duration::from_millis(300));
    });
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[test]
fn wrong_settings_are_named() {
    let wrong = |config: TelemetryConfig| config.validate().unwrap_err().to_string();
    let base = TelemetryConfig::default();
    assert_eq!(base.validate(), Ok(()));
    let text = wrong(TelemetryConfig { log_level: "sanjay_edge=loud".into(), ..base.clone() });
    assert!(text.starts_with("`telemetry.log_level` ") && text.contains("debug or trace"), "{text}");
    for ratio in [-0.1, 1.1, f64::NAN] {
        let text = wrong(TelemetryConfig { sample_ratio: ratio, ..base.clone() });
        assert!(text.starts_with("`telemetry.sample_ratio` is ") && text.contains("between 0"), "{text}");
    }
    for endpoint in ["collector:4317", "https://collector:4317", "http://", ""] {
        let text = wrong(TelemetryConfig { otlp_endpoint: Some(endpoint.into()), ..base.clone() });
        assert!(
            text.starts_with("`telemetry.otlp_endpoint` is ") && text.contains("http://host:port"),
            "{text}"
        );
    }
}

#[test]
fn a_level_that_does_not_exist_is_refused_by_name() {
    let checked = |level: &str| {
        TelemetryConfig { log_level: level.to_owned(), ..TelemetryConfig::default() }
            .validate()
            .map_err(|e| e.to_string())
    };
    assert_eq!(checked("info"), Ok(()));
    assert_eq!(checked("off"), Ok(()));
    assert_eq!(checked("info,sanjay_edge=debug"), Ok(()));
    assert!(checked("loud").unwrap_err().contains("`loud`, which is no level"));
    assert!(checked("warning,sanjay_edge=debug").unwrap_err().contains("`warning`"));
}
