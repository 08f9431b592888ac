//! The router: knows which edge holds which channel and user, gives channel messages their order, and hands
//! messages and inbox hints to the edges that want them.

mod app;
mod asks;
pub mod bus;
mod config;
mod downlink;
mod errors;
mod fanout;
mod grpc;
mod history;
mod leases;
mod link;
#[cfg(test)]
mod link_tests;
mod metrics;
mod outage;
mod publish;
mod reconcile;
pub mod redis;
pub mod registry;
mod relay;
mod spans;
mod subscriptions;
mod watchers;
mod writer;

pub use app::{start, start_with};
pub use config::Config;
pub use metrics::register_all as register_metrics;
