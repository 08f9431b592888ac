//! Delivery: takes messages from product back ends, keeps each user's inbox until everything in it is settled,
//! and relays to the routers.

mod app;
mod audit;
mod auth;
mod config;
mod dead;
mod events;
mod fanout;
mod grpc;
mod inbox;
pub mod message;
pub mod metrics;
mod paced;
mod path;
mod publish;
mod receipts;
mod redeliver;
mod redrive;
mod relay;
mod retry;
mod revocations;
mod router;
mod schedule;
mod settled;
mod spans;
pub mod store;
mod sweep;

pub use app::start;
pub use auth::{ApiKey, hash_api_key};
pub use config::Config;
pub use metrics::register_all as register_metrics;
