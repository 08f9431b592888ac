//! The edge: holds the clients' sockets, speaks the client protocol, and keeps nothing that another edge could
//! not rebuild.
//!
//! A connection goes `upgrade.rs` → `connection/session.rs` (the I/O loop) → `connection/machine.rs` (the
//! protocol's state) → `shard/effects.rs` (what the machine wants done) → `upstream/` (router and delivery).

pub mod app;
pub mod config;
pub mod connection;
pub mod in_flight;
pub mod inbox;
pub mod metrics;
pub mod revocations;
pub mod shard;
pub mod spans;
pub mod upgrade;
pub mod upstream;
pub mod verifier;

pub use app::start;
pub use config::Config;
pub use metrics::register_all as register_metrics;
