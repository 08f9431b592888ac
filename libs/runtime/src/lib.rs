//! What every process of Sanjay needs: configuration, telemetry, lifecycle, admin pages, gRPC servers and
//! channels, and the sources of time and randomness that everything else takes as parameters.

pub mod admin;
pub mod clock;
pub mod config;
pub mod context;
pub mod control;
pub mod failpoint;
pub mod fetch;
pub mod grpc;
pub mod jwt;
pub mod lifecycle;
pub mod mailbox;
pub mod metrics;
pub mod milestones;
pub mod namespaces;
pub mod net;
pub mod random;
pub mod readiness;
pub mod secret;
pub mod telemetry;
pub mod trace;

pub use clock::{Clock, ManualClock, SharedClock, SystemClock};
pub use config::{ConfigError, Validate};
pub use context::Context;
pub use lifecycle::Lifecycle;
pub use milestones::MilestoneRing;
pub use namespaces::{Namespace, Namespaces, SharedNamespaces};
pub use random::{OsRandom, Random, SeededRandom, SharedRandom};
pub use readiness::{Readiness, ReadinessFlag};
pub use secret::Secret;
