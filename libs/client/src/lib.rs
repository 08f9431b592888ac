//! Rust clients of Sanjay: [`Client`] speaks the WebSocket protocol for a user, [`Backend`] the gRPC API for
//! a product's back end, and [`RawConnection`] sends and receives single envelopes for tests and load.

mod backend;
mod backoff;
mod jitter;
mod websocket;

pub use backend::{
    Accepted, Backend, BackendError, BackendOptions, ConnectionStream, DurablyPublished, MembersPage,
    PendingReply, PublishOptions, PublishStream, ReceiptStream, RedriveStream, SendOptions, SendStream,
    Subject, UserResult, WatchStream,
};
pub use jitter::Jitter;
pub use sanjay_proto::delivery::v1::{
    ConnectionEvent, DeadLetter, DeadLetterFilter, DeadReason, DeliveryEvent, DeliveryEventKind,
    DeliveryFailure, DeliveryState, GetDeliveryResponse, GetTraceResponse, ListDeadLettersResponse,
    ListDeliveriesRequest, ListDeliveriesResponse, ListedDelivery, LiveChannel, LiveNode,
    PurgeDeadLettersRequest, PurgeDeadLettersResponse, Receipt, ReceiptFilter, ReceiptsRequest,
    ReceiptsResponse, RedriveDeadLettersRequest, RedriveDeadLettersResponse, Revocation, UserConnection,
    WatchConnectionsRequest, WatchDeliveriesRequest, subject,
    watch_connections_response::Result as WatchedConnection, watch_deliveries_response::Result as Watched,
};
pub use sanjay_proto::edge::v1::ConnectionEventKind;
pub use sanjay_protocol as protocol;
pub use websocket::{
    AckError, Acker, ChannelEvent, Checkpoint, CheckpointError, Client, ClientOptions, ClosedError,
    ConnectionError, Discontinuity, FileCheckpoint, InboxDelivery, InboxEvent, InboxStream, MemoryCheckpoint,
    Processed, PublishError, RawConnection, StartError, State, SubscribeError, Subscription,
    SubscriptionState, TokenError, TokenSource,
};
