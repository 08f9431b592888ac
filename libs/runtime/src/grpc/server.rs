//! Serves gRPC with health and reflection, and ends in time.

use std::{future::pending, io, time::Duration};

use anyhow::Context as _;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_stream::{StreamExt, wrappers::TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::{Routes, interceptor::InterceptedService},
    transport::Server,
};
use tonic_health::{ServingStatus, server::HealthReporter};

use super::{
    auth::{ClusterAuth, HealthAuth},
    connection::Connection,
};
use crate::lifecycle::Lifecycle;

/// Largest message that a server of the cluster decodes, in bytes: every generated server is given this bound,
/// and whoever sends batches splits them to stay below it.
pub const MAX_MESSAGE: usize = 4 * 1024 * 1024;
/// Bytes in flight on one stream: a window of 64 KiB, the protocol's default, stalls at a few MB/s.
pub(super) const STREAM_WINDOW: u32 = 1024 * 1024;
/// Bytes in flight on one connection.
pub(super) const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Calls and streams at a time on one connection; more wait on the client's side.
const MAX_CALLS: u32 = 1_024;
/// How long to leave the listener alone when the process has no more file descriptors: trying again at once
/// would only burn a core.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often an idle connection is asked whether the peer still answers.
const PING_EVERY: Duration = Duration::from_secs(20);
/// How long the peer has to answer.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// What a server serves.
#[derive(Debug)]
pub struct ServeOptions {
    /// Name of the server's task, for logs.
    pub name: &'static str,
    /// The services.
    pub routes: Routes,
    /// The cluster's key, for health checks that show one; `None` takes any.
    pub key: Option<ClusterAuth>,
    /// Full names of the services that health reports as serving until shutdown begins.
    pub health: &'static [&'static str],
    /// Whether clients may ask for the definitions of all services.
    pub reflection: bool,
    /// Whether the services serve, as health reports it; `None`: until shutdown begins.
    pub serving: Option<watch::Receiver<bool>>,
}

/// Serves `routes` with health and reflection; see [`serve_with`].
///
/// # Errors
/// As [`serve_with`].
pub async fn serve(
    name: &'static str,
    listener: TcpListener,
    routes: Routes,
    health: &'static [&'static str],
    lifecycle: &Lifecycle,
) -> anyhow::Result<()> {
    serve_with(
        listener,
        ServeOptions { name, routes, key: None, health, reflection: true, serving: None },
        lifecycle,
    )
    .await
}

/// Serves in a task of `lifecycle` and returns at once. At the soft token health turns to not serving, no
/// more connections are accepted, and running calls may end; at the hard token the open ones are cut.
///
/// # Errors
/// When the descriptors for reflection cannot be read.
pub async fn serve_with(
    listener: TcpListener,
    options: ServeOptions,
    lifecycle: &Lifecycle,
) -> anyhow::Result<()> {
    let ServeOptions { name, mut routes, key, health, reflection, serving } = options;
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let serves = serving.as_ref().is_none_or(|serving| *serving.borrow());
    report(&reporter, health, status(serves)).await;
    routes = match key {
        Some(key) => routes.add_service(InterceptedService::new(health_service, HealthAuth(key))),
        None => routes.add_service(health_service),
    };
    if reflection {
        routes = add_reflection(routes, health)?;
    }
    let (soft, hard) = (lifecycle.soft(), lifecycle.hard());
    let incoming = TcpListenerStream::new(listener).then(move |accepted| accept(accepted, hard.clone()));
    lifecycle.spawn_vital(name, async move {
        let ending = async {
            let following = follow(&reporter, health, serving);
            soft.run_until_cancelled(following).await;
            report(&reporter, health, ServingStatus::NotServing).await;
            end_watches(reporter, health).await;
        };
        Server::builder()
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(MAX_CALLS)
            .http2_keepalive_interval(Some(PING_EVERY))
            .http2_keepalive_timeout(Some(PING_TIMEOUT))
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, ending)
            .await
            .context("the gRPC server failed")
    });
    Ok(())
}

async fn accept(accepted: io::Result<TcpStream>, cut: CancellationToken) -> io::Result<Connection> {
    match accepted {
        Ok(stream) => {
            stream.set_nodelay(true)?;
            Ok(Connection::new(stream, cut))
        }
        Err(error) => {
            // A connection that was reset before it was accepted concerns nobody else.
            if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset) {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
            Err(error)
        }
    }
}

fn status(serves: bool) -> ServingStatus {
    if serves { ServingStatus::Serving } else { ServingStatus::NotServing }
}

/// Reports each change; never ends.
async fn follow(
    reporter: &HealthReporter,
    services: &[&'static str],
    serving: Option<watch::Receiver<bool>>,
) {
    if let Some(mut serving) = serving {
        while serving.changed().await.is_ok() {
            let serves = *serving.borrow_and_update();
            report(reporter, services, status(serves)).await;
        }
    }
    pending().await
}

async fn report(reporter: &HealthReporter, services: &[&'static str], status: ServingStatus) {
    // The empty name is the server as a whole.
    for service in services.iter().copied().chain([""]) {
        reporter.set_service_status(service, status).await;
    }
}

/// Ends the streams in which peers follow the health: each gets the last status first. Else they would keep the server
/// until it is cut, since nobody ends them on the other side.
async fn end_watches(mut reporter: HealthReporter, services: &[&'static str]) {
    for service in services.iter().copied().chain([""]) {
        reporter.clear_service_status(service).await;
    }
}

/// Both versions: newer tools ask v1, older ones v1alpha.
/// Only what this server has is listed, though the descriptors name every service of Sanjay.
fn add_reflection(routes: Routes, services: &[&'static str]) -> anyhow::Result<Routes> {
    let builder = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(sanjay_proto::DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .with_service_name("grpc.health.v1.Health");
        services.iter().fold(builder, |builder, name| builder.with_service_name(*name))
    };
    let unreadable = "the built-in service descriptors cannot be read";
    let v1 = builder().build_v1().context(unreadable)?;
    let v1alpha = builder().build_v1alpha().context(unreadable)?;
    Ok(routes.add_service(v1).add_service(v1alpha))
}
