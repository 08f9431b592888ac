//! The router: knows which edge holds which channel and user, gives channel messages their order, and hands
//! messages and inbox hints to the edges that want them.

mod app;
pub mod bus;
mod config;
mod downlink;
mod errors;
mod fanout;
mod grpc;
mod link;
#[cfg(test)]
mod link_tests;
mod metrics;
mod outage;
mod publish;
pub mod registry;
mod relay;
mod subscriptions;
mod writer;

pub use app::{start, start_with};
pub use config::Config;
