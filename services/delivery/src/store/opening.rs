//! The factory of the adapters.

use std::sync::Arc;

use sanjay_runtime::{clock::SharedClock, random::SharedRandom};

use super::{CommitSink, InboxStore, Location, Overflow, mongodb, redb};
use crate::metrics::Metrics;

/// What an adapter is opened with.
#[derive(Clone)]
pub struct StoreOptions {
    /// Hears of each new message.
    pub on_commit: Arc<dyn CommitSink>,
    /// Most unsettled messages of one inbox.
    pub max_unsettled: u64,
    /// Most bytes of their encoded payloads.
    pub max_unsettled_bytes: u64,
    /// What becomes of a message beyond those two.
    pub overflow: Overflow,
    /// Whether expired messages become dead letters.
    pub keep_expired: bool,
    /// How many attempts of a message may fail before it becomes a dead letter; at least 1.
    pub max_attempts: u32,
    /// Wall clock, for due and settled times.
    pub clock: SharedClock,
    /// For the store's identity.
    pub random: SharedRandom,
    /// Group commits and store errors are counted here.
    pub metrics: Metrics,
}

/// Why a store could not be opened. The text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The redb file.
    #[error(transparent)]
    Redb(#[from] redb::OpenError),
    /// The database.
    #[error(transparent)]
    Mongodb(#[from] mongodb::OpenError),
}

/// Opens the store at a location; takes a while when a file is repaired after a crash.
///
/// # Errors
/// When the store cannot be opened.
pub async fn open(location: &Location, options: StoreOptions) -> Result<Arc<dyn InboxStore>, OpenError> {
    match location {
        Location::Redb(path) => Ok(Arc::new(redb::RedbStore::open(path.clone(), options).await?)),
        Location::Mongodb(database) => Ok(Arc::new(mongodb::MongoStore::open(database, options).await?)),
    }
}
