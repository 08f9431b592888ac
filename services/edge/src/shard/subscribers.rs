//! How many subscribers channels have on this edge, across its shards: of those channels alone whose namespace bounds
//! the number, so that nobody else meets at this lock.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Shared by all shards of an edge.
#[derive(Debug, Default)]
pub struct Subscribers(Mutex<HashMap<Arc<str>, u32>>);

impl Subscribers {
    /// Counts one more, unless there are `most` already.
    pub fn add(&self, channel: &Arc<str>, most: u32) -> bool {
        let mut counts = self.counts();
        let count = counts.get(channel).copied().unwrap_or(0);
        if count >= most {
            return false;
        }
        counts.insert(Arc::clone(channel), count + 1);
        true
    }

    /// Counts those of a shard that had not been counted.
    pub fn add_all(&self, channel: &Arc<str>, more: u32) {
        *self.counts().entry(Arc::clone(channel)).or_default() += more;
    }

    /// Counts one less.
    pub fn remove(&self, channel: &str) {
        let mut counts = self.counts();
        let Some(count) = counts.get_mut(channel) else { return };
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(channel);
        }
    }

    fn counts(&self) -> MutexGuard<'_, HashMap<Arc<str>, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Channels with a count.
    #[cfg(test)]
    pub fn channels(&self) -> usize {
        self.counts().len()
    }
}
