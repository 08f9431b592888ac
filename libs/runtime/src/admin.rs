//! The admin pages: `/healthz`, `/readyz` and `/metrics`, for balancers and Prometheus.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::{encoding::text, registry::Registry};
use serde::Serialize;
use tokio::net::TcpListener;

use crate::{lifecycle::Lifecycle, readiness::Readiness};

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone)]
struct Pages {
    registry: Arc<Registry>,
    readiness: Readiness,
    lifecycle: Lifecycle,
}

/// Serves the admin pages in a task that answers until the hard token: during shutdown `/readyz` is what
/// tells the balancer. Shutdown does not wait for it.
///
/// # Panics
/// Outside a tokio runtime.
pub async fn serve_admin(
    listener: TcpListener,
    registry: Arc<Registry>,
    readiness: Readiness,
    lifecycle: &Lifecycle,
) {
    let hard = lifecycle.hard();
    let pages = Pages { registry, readiness, lifecycle: lifecycle.clone() };
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(pages);
    tokio::spawn(async move {
        let serving = axum::serve(listener, router).into_future();
        if let Some(Err(error)) = hard.run_until_cancelled_owned(serving).await {
            tracing::error!(%error, "the admin pages ended");
        }
    });
}

async fn healthz() -> &'static str {
    "ok\n"
}

#[derive(Serialize)]
struct Ready {
    ready: bool,
    /// What is not ready.
    missing: Vec<&'static str>,
}

async fn readyz(State(pages): State<Pages>) -> Response {
    let mut missing = pages.readiness.missing();
    if pages.lifecycle.is_shutting_down() {
        missing.push("shutdown");
    }
    let ready = missing.is_empty();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Ready { ready, missing })).into_response()
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let mut body = String::new();
    match text::encode(&mut body, &pages.registry) {
        Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], body).into_response(),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, "the metrics could not be written\n").into_response(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use prometheus_client::metrics::counter::Counter;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    async fn get(addr: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).await.unwrap();
        response
    }

    #[tokio::test]
    async fn the_pages_tell_how_the_process_is() {
        let mut registry = Registry::with_prefix("sanjay");
        let sockets = Counter::<u64>::default();
        registry.register("edge_sockets", "Sockets that were opened", sockets.clone());
        sockets.inc_by(3);
        let (readiness, lifecycle) = (Readiness::new(), Lifecycle::new());
        let store = readiness.register("store");
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        serve_admin(listener, Arc::new(registry), readiness, &lifecycle).await;

        assert!(get(addr, "/healthz").await.starts_with("HTTP/1.1 200"));
        let waiting = get(addr, "/readyz").await;
        assert!(
            waiting.starts_with("HTTP/1.1 503")
                && waiting.ends_with(r#"{"ready":false,"missing":["store"]}"#)
        );
        store.set(true);
        let ready = get(addr, "/readyz").await;
        assert!(ready.starts_with("HTTP/1.1 200") && ready.ends_with(r#"{"ready":true,"missing":[]}"#));
        let metrics = get(addr, "/metrics").await;
        assert!(metrics.contains("application/openmetrics-text; version=1.0.0"), "{metrics}");
        assert!(metrics.contains("sanjay_edge_sockets_total 3\n# EOF"), "{metrics}");

        lifecycle.begin_shutdown();
        let ending = get(addr, "/readyz").await;
        assert!(ending.starts_with("HTTP/1.1 503") && ending.contains(r#"["shutdown"]"#), "{ending}");
        assert!(get(addr, "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(lifecycle.shutdown(std::time::Duration::from_secs(5)).await.is_empty());
    }
}
