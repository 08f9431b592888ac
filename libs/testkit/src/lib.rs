//! Dev only: starts the real `sanjay` binary as one process or as three, talks to it below and above the client
//! crates, and checks histories of what was accepted against what arrived.

mod binary;
mod cluster;
mod history;
mod peer;
mod process;
mod settings;
mod standalone;
mod tokens;
mod users;
mod wait;
mod wire;

pub use binary::{Finished, Sanjay, binary};
pub use cluster::{Cluster, Role};
pub use history::{History, Report};
pub use peer::{End, Peer};
pub use process::{Addresses, Process};
pub use settings::{API_KEY, OTHER_API_KEY, Settings, TOKEN_SECRET, free_port};
pub use standalone::Standalone;
pub use tokens::Token;
pub use users::{backend, backend_with, client_options, seed};
pub use wait::{eventually, within};
pub use wire::{Frame, HttpAnswer, Opcode, Wire};
