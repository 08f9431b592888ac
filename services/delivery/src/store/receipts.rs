//! The log of receipts: every message that was settled, in an order that never changes, so that whoever reads it from
//! where it stopped misses none. And the deliveries of one user, as a list.

use uuid::Uuid;

use super::{DeadReason, Receipt, StoreError};
use crate::message::State;

/// Most receipts of one page of the log.
pub const MAX_LOG_PAGE: usize = 1_000;

/// Most deliveries of one page of a list.
pub const MAX_DELIVERIES: usize = 256;

/// The end of a message's life, as the log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggedReceipt {
    /// Whose inbox it was in.
    pub user: String,
    /// Its id.
    pub message_id: Uuid,
    /// Its record; settled.
    pub receipt: Receipt,
    /// The back end that sent it; empty when an earlier build stored it.
    pub caller: String,
    /// Why, when it is dead and that is known.
    pub reason: Option<DeadReason>,
}

/// A place in the log: what stands up to it was read. Each adapter orders by what it can, so that a place belongs to the
/// store that gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPosition {
    /// Which store: random, made with it.
    pub store_id: u64,
    /// A counter, or a time.
    pub at: u64,
    /// Further parts of the place, where the first does not decide.
    pub message_id: Uuid,
    /// Likewise; may be empty.
    pub user: String,
}

/// From where the log is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogStart {
    /// From the oldest receipt that is kept.
    Oldest,
    /// What is settled from now on.
    Now,
    /// What follows a place.
    After(LogPosition),
}

/// Part of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPage {
    /// In the log's order; may be empty although more follows.
    pub receipts: Vec<LoggedReceipt>,
    /// Where the next page begins.
    pub next: LogPosition,
    /// Whether that is the log's end for now.
    pub tail: bool,
}

/// Why the log was not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// What follows the place is not kept any more.
    #[error(
        "the cursor is older than what is kept, which is 7 days: receipts behind it are gone; begin without a cursor, which reads what is kept"
    )]
    Gone,
    /// The place is not one of this store.
    #[error("the cursor belongs to another store, or to a later state of this one; begin without a cursor")]
    Foreign,
    /// The store could not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Which deliveries of a user are listed; everything that is set must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeliveriesQuery {
    /// Whose.
    pub user: String,
    /// Those in one of these states; empty for all.
    pub states: Vec<State>,
    /// Those that this back end sent.
    pub caller: Option<String>,
    /// Those with an id below it: where the page before ended.
    pub before: Option<Uuid>,
    /// At most so many, bounded to [`MAX_DELIVERIES`]; at least one.
    pub limit: usize,
}

impl DeliveriesQuery {
    /// Whether a message that is in this state, and was sent by this back end, is one of them.
    #[must_use]
    pub fn matches(&self, state: State, caller: &str) -> bool {
        (self.states.is_empty() || self.states.contains(&state))
            && self.caller.as_ref().is_none_or(|wanted| wanted == caller)
    }
}

/// A message of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedDelivery {
    /// Its id.
    pub message_id: Uuid,
    /// Its record.
    pub receipt: Receipt,
    /// The back end that sent it; empty when an earlier build stored it.
    pub caller: String,
    /// When it goes into the inbox, Unix time in microseconds; 0 when it is there.
    pub deliver_us: u64,
    /// Why, when it is dead and that is known.
    pub reason: Option<DeadReason>,
}

/// A page of deliveries.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeliveriesPage {
    /// The newest first, by their ids; may be empty although more follows.
    pub deliveries: Vec<ListedDelivery>,
    /// Where the next page begins; `None` on the last.
    pub next: Option<Uuid>,
}

/// The part of the port that a test's store has no business with: the log of receipts, and lists of deliveries.
#[cfg(test)]
macro_rules! logs_nothing {
    () => {
        fn receipts(
            &self,
            _: $crate::store::LogStart,
            _: usize,
        ) -> ::futures::future::BoxFuture<'static, Result<$crate::store::LogPage, $crate::store::LogError>> {
            unreachable!("no receipts are read here")
        }

        fn receipts_after(&self, _: $crate::store::LogPosition) -> ::futures::future::BoxFuture<'static, ()> {
            unreachable!("nobody waits for receipts here")
        }

        fn deliveries(
            &self,
            _: $crate::store::DeliveriesQuery,
        ) -> ::futures::future::BoxFuture<
            'static,
            Result<$crate::store::DeliveriesPage, $crate::store::StoreError>,
        > {
            unreachable!("no deliveries are listed here")
        }
    };
}
#[cfg(test)]
pub(crate) use logs_nothing;
