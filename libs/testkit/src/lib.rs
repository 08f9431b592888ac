//! Dev only: starts the real `sanjay` binary as one process or as many, and the servers that it needs; talks to it
//! below and above the client crates, puts faults in between, and checks histories of what was accepted against what
//! arrived.

mod binary;
mod cluster;
mod history;
mod keys;
mod peer;
mod process;
mod settings;
mod spawn;
mod standalone;
mod tokens;
mod users;
mod wait;
mod wire;

pub mod collector;
pub mod proxy;
pub mod servers;

pub use binary::{Finished, Sanjay, binary};
pub use cluster::{Cluster, ClusterBuilder, Node, Role};
pub use history::{History, Publication, Publications, Report};
pub use keys::{KeyPair, KeyServer};
pub use peer::{End, Peer};
pub use process::{Addresses, Process};
pub use settings::{API_KEY, OTHER_API_KEY, Settings, TOKEN_SECRET, free_port};
pub use standalone::Standalone;
pub use tokens::Token;
pub use users::{backend, backend_with, client_options, seed};
pub use wait::{eventually, within};
pub use wire::{Frame, HttpAnswer, Opcode, Wire};
