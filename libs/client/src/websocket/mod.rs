//! The WebSocket client: a handle for the application, a task that keeps the connection, and between them a
//! state machine without I/O.

mod backlog;
mod checkpoint;
mod client;
mod dedup;
mod driver;
mod error;
mod inbox;
mod machine;
mod options;
mod position;
mod ranges;
mod raw;
mod renewal;
mod session;
mod subscription;

pub use checkpoint::{Checkpoint, CheckpointError, FileCheckpoint, MemoryCheckpoint};
pub use client::{Client, State};
pub use dedup::{Discontinuity, Processed};
pub use error::{ClosedError, ConnectionError, PublishError, StartError, SubscribeError};
pub use inbox::{AckError, Acker, InboxDelivery, InboxEvent, InboxStream};
pub use options::{ClientOptions, TokenError, TokenSource};
pub use raw::RawConnection;
pub use subscription::{ChannelEvent, Subscription, SubscriptionState};
