//! The gRPC servers and channels of a cluster: their tuning, their key, and how they end.

mod auth;
mod client;
mod connection;
mod server;
#[cfg(test)]
mod tests;

pub use auth::{ClusterAuth, ClusterKey, cluster_auth};
pub use client::{PeerChannel, connect_lazy};
pub use server::{MAX_MESSAGE, ServeOptions, serve, serve_with};
