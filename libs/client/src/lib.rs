//! Rust clients of Sanjay: [`Client`] speaks the WebSocket protocol for a user, [`Backend`] the gRPC API for
//! a product's back end, and [`RawConnection`] sends and receives single envelopes for tests and load.

mod backend;
mod backoff;
mod jitter;
mod websocket;

pub use backend::{
    Accepted, Backend, BackendError, BackendOptions, PendingReply, PublishStream, RedriveStream, SendOptions,
    SendStream, UserResult,
};
pub use jitter::Jitter;
pub use sanjay_proto::delivery::v1::{
    DeadLetter, DeadLetterFilter, DeadReason, DeliveryFailure, DeliveryState, GetDeliveryResponse,
    GetTraceResponse, ListDeadLettersResponse, PurgeDeadLettersRequest, PurgeDeadLettersResponse,
    RedriveDeadLettersRequest, RedriveDeadLettersResponse,
};
pub use sanjay_protocol as protocol;
pub use websocket::{
    AckError, Acker, ChannelEvent, Checkpoint, CheckpointError, Client, ClientOptions, ClosedError,
    ConnectionError, Discontinuity, FileCheckpoint, InboxDelivery, InboxEvent, InboxStream, MemoryCheckpoint,
    Processed, PublishError, RawConnection, StartError, State, SubscribeError, Subscription,
    SubscriptionState, TokenError, TokenSource,
};
