//! The way into the lanes: bounded in work and in bytes, and never waited for.

use std::sync::Arc;

use sanjay_resilience::{Policy, Refused};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{
    documents, gone,
    work::{Ack, Queued, Work},
};
use crate::store::StoreError;

/// Most messages, acks and wishes to arm that wait.
pub(super) const MAX_QUEUED: usize = 16_384;

/// Most bytes of payload that wait, in units of 1 KiB.
const MAX_QUEUED_KIB: usize = 64 * 1024;

/// The lanes, and the places before them.
#[derive(Clone)]
pub(super) struct Queue {
    lanes: Arc<[mpsc::Sender<Queued>]>,
    pub(super) queued: Arc<Semaphore>,
    queued_kib: Arc<Semaphore>,
    policy: Arc<Policy>,
}

impl Queue {
    pub(super) fn new(lanes: impl Iterator<Item = mpsc::Sender<Queued>>, policy: Arc<Policy>) -> Self {
        Self {
            lanes: lanes.collect(),
            queued: Arc::new(Semaphore::new(MAX_QUEUED)),
            queued_kib: Arc::new(Semaphore::new(MAX_QUEUED_KIB)),
            policy,
        }
    }

    /// Places for so much work, or a refusal when there are too few, or the database is known to be away: what would
    /// only wait for its deadline is not taken. Work that was taken before stays, until it is known what became of it.
    pub(super) fn places(&self, items: usize, bytes: usize) -> Result<Vec<OwnedSemaphorePermit>, StoreError> {
        if let Err(Refused::Open { retry_after }) = self.policy.check() {
            return Err(StoreError::Away { retry_after });
        }
        let take = |semaphore: &Arc<Semaphore>, count: usize, all: usize| {
            // One call larger than the whole queue is let in when the queue is empty.
            let count = u32::try_from(count.min(all)).unwrap_or(u32::MAX);
            semaphore.clone().try_acquire_many_owned(count).map_err(|_| StoreError::Busy)
        };
        let mut places = vec![take(&self.queued, items, MAX_QUEUED)?];
        if bytes > 0 {
            places.push(take(&self.queued_kib, bytes.div_ceil(1024), MAX_QUEUED_KIB)?);
        }
        Ok(places)
    }

    /// Hands work to its user's lane without waiting.
    pub(super) fn submit(&self, user: String, work: Work) {
        let hash = usize::try_from(documents::user_hash(&user)).unwrap_or(0);
        let queued = Queued::new(user, work);
        match self.lanes[hash % self.lanes.len()].try_send(queued) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(queued)) => queued.work.fail(&StoreError::Busy),
            Err(mpsc::error::TrySendError::Closed(queued)) => queued.work.fail(&gone()),
        }
    }

    /// Has the dying messages of an inbox settled, unless there is too much to do: they are due again later.
    pub(super) fn finish(&self, user: String, epoch: u64) {
        if let Ok(places) = self.places(1, 0) {
            self.submit(user.clone(), Work::Ack(Ack::finishing(user, epoch, places)));
        }
    }
}
