//! Port to what all routers know together: the sequence of each channel, and where users are connected.

mod history;
pub mod memory;
pub mod redis;
#[cfg(test)]
pub(crate) mod suite;

use std::sync::Arc;

use async_trait::async_trait;
use sanjay_proto::router::v1::NewPublication;

pub use history::{HistoryPage, HistoryQuery};

/// UUID of a session.
pub type SessionId = [u8; 16];

/// One start of an edge process.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct EdgeRef {
    /// Stable name of the edge node.
    pub id: Arc<str>,
    /// Random for each start of its process.
    pub incarnation: u64,
}

/// The registry's record that an edge is attached to a router: every stream of an edge gets one of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Who is attached.
    pub edge: EdgeRef,
    /// The router that it is attached to.
    pub router: Arc<str>,
    /// Grows with every attachment in the registry, so that a newer one of the same edge is known as such.
    pub number: u64,
}

/// The newest position of a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Top {
    /// Names the sequence: lower-case hexadecimal digits, never used for another sequence.
    pub epoch: Arc<str>,
    /// The newest offset that was assigned; 0 when there is none.
    pub offset: u64,
}

/// The answer to a publish.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assigned {
    /// Sequence and position of the publication.
    pub at: Top,
    /// Id of the publication; under a dedupe key, that of the first one.
    pub message_id: prost::bytes::Bytes,
    /// Unix time in microseconds when the offset was assigned.
    pub time_us: u64,
    /// True when the dedupe key was known: this is the first answer, and nothing was published.
    pub repeated: bool,
}

/// A session of a user, as an edge announces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserSession {
    /// The user.
    pub user: Arc<str>,
    /// The session.
    pub session: SessionId,
    /// Whether it takes part in the user's inbox. Without meaning where a session is closed.
    pub inbox: bool,
}

/// Where a user's session is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The session.
    pub session: SessionId,
    /// The edge that holds it.
    pub edge: EdgeRef,
    /// The router that the edge is, or was last, attached to.
    pub router: Arc<str>,
    /// False while the edge is away; its sessions are then kept until a sweep.
    pub attached: bool,
    /// Whether the session takes part in the user's inbox.
    pub inbox: bool,
}

/// Why the registry refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// It holds as many channels as it may; channels that are not used are forgotten after a while.
    #[error("the registry holds its {limit} channels; raise router.max_channels, or use fewer channels")]
    TooManyChannels {
        /// The configured bound.
        limit: usize,
    },
    /// The edge was attached anew meanwhile, or its attachment ended.
    #[error("a newer stream of edge {edge} took over; announce the session on that one")]
    Superseded {
        /// The edge's name.
        edge: Arc<str>,
    },
    /// It cannot be reached; what was asked may or may not have been done.
    #[error("the registry is unavailable: {0}; try again")]
    Unavailable(String),
}

/// What all routers know together.
///
/// Batches exist so that an adapter can send one in a single round trip. Results stand in the order of the
/// request. An adapter bounds how long a call takes and answers [`RegistryError::Unavailable`] beyond that.
#[async_trait]
pub trait Registry: Send + Sync + 'static {
    /// Publishes, in the order of the batch.
    ///
    /// For each publication, atomically with respect to everything else about its channel: a known
    /// `dedupe_key` gives the first answer and publishes nothing; else the next offset of the channel's
    /// epoch is assigned, the time stamped and the publication handed to the bus, so that the bus carries a
    /// channel's publications in offset order. A key is known for five minutes; a channel remembers a
    /// bounded number of them, the oldest go first.
    ///
    /// In the same step the publication enters the channel's history, when the channel's namespace says that it keeps one:
    /// so many of the newest, each for so long. It may go earlier, the oldest first, where there is no room.
    ///
    /// A channel's epoch is made with its state. State that was neither subscribed nor used for ten minutes
    /// may be forgotten, unless its history is still to be read; the next use opens a new epoch. No offset is ever assigned twice within an epoch.
    async fn publish(&self, publications: Vec<NewPublication>) -> Vec<Result<Assigned, RegistryError>>;

    /// The newest position of each channel. Makes the state of a channel that has none, so there is always
    /// an answer.
    ///
    /// Every publication at or below the answer was handed to the bus before, every one above it
    /// afterwards.
    async fn tops(&self, channels: &[Arc<str>]) -> Vec<Result<Top, RegistryError>>;

    /// Reads a part of what a channel keeps, as its namespace says now. Makes the state of a channel that has none.
    ///
    /// Exact: what is answered has no hole, and holds everything behind the position that was asked for, up to the bounds
    /// of the question; otherwise the position is `lost`, and nothing is answered. A position is lost when its epoch is not
    /// the channel's, when it is above the top, and when something behind it is kept no more.
    async fn history(&self, query: &HistoryQuery) -> Result<HistoryPage, RegistryError>;

    /// Records that an edge attached to a router, and ends the edge's attachment before.
    ///
    /// Sessions of another incarnation of the edge are gone when this returns; those of the same
    /// incarnation are kept and wait to be announced again.
    async fn attach(&self, edge: &EdgeRef, router: &Arc<str>) -> Result<Attachment, RegistryError>;

    /// Records that an attachment ended; the edge's sessions are kept. Idempotent; without effect when a
    /// newer attachment of the edge exists.
    async fn detach(&self, attachment: &Attachment) -> Result<(), RegistryError>;

    /// Says that attachments last. Routers call it for theirs three times within a lease: an attachment that
    /// nobody renewed for that long counts as ended, and after another lease its sessions are removed.
    ///
    /// [`RegistryError::Superseded`] means that the attachment has ended, or is not known any more: the edge
    /// must attach anew and announce everything that it holds.
    async fn renew(&self, attachments: &[Attachment]) -> Vec<Result<(), RegistryError>>;

    /// Removes the edge's sessions that nobody vouches for, and returns their number: all of them when the
    /// attachment ended, those that were not announced on it while it lasts. Without effect when a newer
    /// attachment exists. Idempotent. Compares and removes atomically for each session. Refused with
    /// [`RegistryError::Unavailable`] while the registry cannot tell whether edges are gone or were only cut
    /// off.
    async fn sweep(&self, attachment: &Attachment) -> Result<usize, RegistryError>;

    /// Records sessions. Idempotent; a session that is already known moves to the user, attachment and
    /// `inbox` given.
    ///
    /// Each fails with [`RegistryError::Superseded`] once the attachment has ended.
    async fn open_sessions(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Vec<Result<(), RegistryError>>;

    /// Removes sessions. Idempotent; without effect once the attachment has ended.
    async fn close_sessions(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Result<(), RegistryError>;

    /// Where each user is connected, in the order in which the sessions were opened. An empty answer means
    /// that no session is recorded, never that the registry could not tell.
    async fn locate(&self, users: &[Arc<str>]) -> Result<Vec<Vec<Location>>, RegistryError>;

    /// Whether an empty answer of [`Self::locate`] that came before means that the user is offline. False for
    /// a lease after the registry lost what it knew: edges have not announced everything again.
    fn is_settled(&self) -> bool;

    /// Forgets a bounded part of what has expired, and removes sessions of edges whose router is gone; routers
    /// call it about once a second.
    async fn maintain(&self) -> Result<(), RegistryError>;
}
