//! Telemetry as a process sets it up: once, with a collector that gets the spans of every role.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    http::{HeaderMap, HeaderName, HeaderValue, Response},
    routing::post,
};
use http_body_util::{BodyExt, Full};
use sanjay_runtime::{
    Lifecycle, grpc,
    telemetry::{Role, TelemetryConfig, init},
    trace,
};
use tokio::{net::TcpListener, sync::mpsc};
use tonic::service::Routes;
use tracing::info_span;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACE_ID: [u8; 16] =
    [0x0a, 0xf7, 0x65, 0x19, 0x16, 0xcd, 0x43, 0xdd, 0x84, 0x48, 0xeb, 0x21, 0x1c, 0x80, 0x31, 0x9c];

/// Takes whatever is exported and hands its bytes on.
fn collector(received: mpsc::UnboundedSender<Bytes>) -> Routes {
    let received = Arc::new(received);
    let export = move |body: Bytes| async move {
        received.send(body).expect("the test waits for exports");
        // An empty message, uncompressed, and the status OK.
        let empty = Full::new(Bytes::from_static(&[0; 5]));
        let ok =
            HeaderMap::from_iter([(HeaderName::from_static("grpc-status"), HeaderValue::from_static("0"))]);
        let body = empty.with_trailers(async { Some(Ok::<_, Infallible>(ok)) });
        Response::builder()
            .header("content-type", "application/grpc")
            .body(Body::new(body))
            .expect("the header is valid")
    };
    Routes::from(
        Router::new().route("/opentelemetry.proto.collector.trace.v1.TraceService/Export", post(export)),
    )
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[tokio::test]
async fn spans_reach_the_collector_and_a_second_set_up_is_refused() {
    let lifecycle = Lifecycle::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut received) = mpsc::unbounded_channel();
    grpc::serve("collector", listener, collector(sender), &[], &lifecycle).await.unwrap();

    let config = TelemetryConfig { otlp_endpoint: Some(endpoint), ..TelemetryConfig::default() };
    let guard = init(&config, &[Role::Edge, Role::Router]).unwrap();
    let refused = init(&config, &[Role::Edge]).unwrap_err();
    assert!(format!("{refused:#}").contains("once in a process"), "{refused:#}");

    let publish = info_span!(target: "sanjay_edge::session", "publish");
    trace::set_parent(&publish, PARENT);
    let relay = publish.in_scope(|| info_span!(target: "sanjay_router::publish", "relay"));
    drop((publish, relay));
    tokio::task::spawn_blocking(move || guard.shutdown(Duration::from_secs(5))).await.unwrap();

    let mut exports = Vec::new();
    while let Ok(export) = received.try_recv() {
        exports.push(export);
    }
    for (service, span) in [("sanjay-edge", "publish"), ("sanjay-router", "relay")] {
        let export = exports.iter().find(|export| contains(export, service.as_bytes())).expect(service);
        assert!(contains(export, span.as_bytes()) && contains(export, &TRACE_ID), "{service}");
    }
    lifecycle.shutdown(Duration::from_secs(5)).await;
}
