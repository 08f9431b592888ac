//! The gRPC servers and channels of a cluster: their tuning, their key, how they end, and which of several
//! processes of a role is called.

mod auth;
mod client;
mod connection;
mod endpoints;
mod failure;
mod pool;
mod resolve;
mod server;
#[cfg(test)]
mod tests;

pub use auth::{ClusterAuth, ClusterKey, cluster_auth};
pub use client::{PeerChannel, connect_lazy};
pub use endpoints::Endpoints;
pub use failure::plain;
pub use pool::{Call, Peer, PeerError, PeerMetrics, PeerPool, PoolOptions};
pub use resolve::{Resolve, SystemResolver};
pub use server::{MAX_MESSAGE, ServeOptions, serve, serve_with};
