//! Channels to the other processes of a cluster.

use std::time::Duration;

use anyhow::Context as _;
use tonic::{
    service::interceptor::InterceptedService,
    transport::{Channel, Endpoint},
};

use super::{
    auth::ClusterKey,
    server::{CONNECTION_WINDOW, STREAM_WINDOW},
};
use crate::secret::Secret;

/// How often an idle channel asks whether the peer still answers.
const PING_EVERY: Duration = Duration::from_secs(10);
/// How long the peer has to answer before the connection counts as dead.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// A channel that shows the cluster key with every call. Clones share its connection.
pub type PeerChannel = InterceptedService<Channel, ClusterKey>;

/// A channel to `endpoint` (`http://host:port`), which connects at the first call and again after each loss.
/// One channel is one HTTP/2 connection: open several where one is not fast enough.
///
/// # Errors
/// When the endpoint is not such a URL, or the key cannot be sent in a header.
///
/// # Panics
/// Outside a tokio runtime.
pub fn connect_lazy(endpoint: &str, key: &Secret, connect_timeout: Duration) -> anyhow::Result<PeerChannel> {
    let usable = || format!("`{endpoint}` is no usable endpoint; it must look like `http://host:port`");
    let parsed = Endpoint::from_shared(endpoint.to_owned()).with_context(usable)?;
    let uri = parsed.uri();
    anyhow::ensure!(
        uri.scheme_str() == Some("http") && uri.host().is_some_and(|host| !host.is_empty()),
        usable()
    );
    let channel = tune(parsed).connect_timeout(connect_timeout).connect_lazy();
    Ok(InterceptedService::new(channel, ClusterKey::new(key)?))
}

/// The tuning of connections that carry calls.
pub(super) fn tune(endpoint: Endpoint) -> Endpoint {
    endpoint
        .tcp_nodelay(true)
        .tcp_keepalive(Some(PING_EVERY))
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
}
