//! From a host name to the addresses behind it.

use std::{io, net::SocketAddr, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use tokio::time::timeout;

/// How long a resolver has to answer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Finds the addresses of a host. A parameter, so that a test decides them.
pub trait Resolve: Send + Sync + 'static {
    /// The addresses of `host`, each with `port`, in any order.
    ///
    /// An error, like an empty answer, says nothing about the addresses that were known before: they stay.
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>>;
}

/// The operating system's resolver.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, host: &'a str, port: u16) -> BoxFuture<'a, io::Result<Vec<SocketAddr>>> {
        async move {
            match timeout(TIMEOUT, tokio::net::lookup_host((host, port))).await {
                Ok(found) => Ok(found?.collect()),
                Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "the resolver does not answer")),
            }
        }
        .boxed()
    }
}
