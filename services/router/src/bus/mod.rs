//! Port to what carries publications and inbox hints between routers.

pub(crate) mod measured;
pub mod memory;
pub mod redis;

use std::sync::Arc;

use async_trait::async_trait;
use sanjay_proto::{client::v1::Publication, edge::v1::InboxHint};

use crate::registry::EdgeRef;

/// An inbox hint on its way to an edge.
#[derive(Debug, Clone, PartialEq)]
pub struct EdgeHint {
    /// The edge that holds the user.
    pub edge: EdgeRef,
    /// What to hand to it.
    pub hint: Arc<InboxHint>,
}

/// Why the bus refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// [`Bus::listen`] was not called yet, or was called twice.
    #[error("the bus needs exactly one listener before it is used")]
    Listener,
    /// It cannot be reached.
    #[error("the bus is unavailable: {0}; try again")]
    Unavailable(String),
}

/// What the bus may have missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missed<'a> {
    /// Publications of one channel.
    Channel(&'a str),
    /// Publications of any channel.
    Channels,
    /// Hints of any edge.
    Hints,
}

/// Takes what the bus delivers. Called with the bus's locks held: it must return at once, and must not call
/// the bus or the registry.
pub trait Sink: Send + Sync + 'static {
    /// A publication of a subscribed channel. Of one channel they come one after another, in offset order;
    /// an adapter may repeat or miss some.
    fn publication(&self, publication: &Arc<Publication>);

    /// A hint for an edge of this router.
    fn hint(&self, hint: EdgeHint);

    /// The bus was interrupted, or dropped something. Called once it delivers again; what it did miss, if
    /// anything, is for the sink to find out.
    fn missed(&self, what: Missed<'_>);
}

/// Carries publications to the routers that subscribed to their channels, and hints to a router by name.
///
/// An adapter bounds how long a call takes and answers [`BusError::Unavailable`] beyond that.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Names who takes what this router gets; once, before everything else. After
    /// [`BusError::Unavailable`] the adapter goes on trying by itself.
    async fn listen(&self, sink: Arc<dyn Sink>) -> Result<(), BusError>;

    /// Asks for the publications of channels. When it returns, every publication whose offset is assigned
    /// from now on reaches the sink. Idempotent. Results stand in the order of the request.
    async fn subscribe(&self, channels: &[Arc<str>]) -> Vec<Result<(), BusError>>;

    /// The opposite; publications that are under way may still come. Idempotent.
    async fn unsubscribe(&self, channels: &[Arc<str>]) -> Result<(), BusError>;

    /// Hands hints to another router, in order. False when no router of that name listens.
    async fn relay(&self, router: &str, hints: Vec<EdgeHint>) -> Result<bool, BusError>;

    /// Whether the bus tells of everything that it missed. Of one that does not, somebody must look now and
    /// then.
    fn is_candid(&self) -> bool {
        false
    }
}
