//! Which attachments nobody renews any more, told by this router's own clock alone: neither the server's clock
//! nor another machine's can end one.

use std::{collections::HashMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

/// Attachments as they were seen, and since when they are so. Every renewal changes one.
pub(super) struct Watch {
    lease: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    seen: HashMap<Arc<str>, Seen>,
    looked: Option<Instant>,
}

struct Seen {
    record: Arc<str>,
    since: Instant,
}

impl Watch {
    pub(super) fn new(lease: Duration) -> Self {
        Self { lease, state: Mutex::default() }
    }

    /// Takes all attachments as they are now. Returns the edges, with their attachments, that are as they were
    /// for two leases: one in which the edge counted as attached, and one in which its sessions were kept.
    pub(super) fn look(&self, edges: &[(Arc<str>, Arc<str>)]) -> Vec<(Arc<str>, Arc<str>)> {
        let now = Instant::now();
        let mut state = self.state.lock();
        // Who did not look for so long was stopped itself, and could not renew its own either.
        if state.looked.replace(now).is_some_and(|looked| now - looked >= self.lease * 2) {
            state.seen.clear();
        }
        let mut before = std::mem::take(&mut state.seen);
        let mut abandoned = Vec::new();
        for (edge, record) in edges {
            let since = match before.remove(edge) {
                Some(seen) if seen.record == *record => seen.since,
                _ => now,
            };
            if now - since >= self.lease * 2 {
                abandoned.push((Arc::clone(edge), Arc::clone(record)));
            }
            state.seen.insert(Arc::clone(edge), Seen { record: Arc::clone(record), since });
        }
        abandoned
    }

    /// Whether the attachment may still last: it was renewed within a lease, as far as is known.
    pub(super) fn is_fresh(&self, edge: &str, record: &str) -> bool {
        let state = self.state.lock();
        let seen = state.seen.get(edge).filter(|seen| *seen.record == *record);
        seen.is_none_or(|seen| seen.since.elapsed() < self.lease)
    }

    /// Forgets everything: nothing counts as abandoned before it was watched for two leases anew.
    pub(super) fn forget(&self) {
        *self.state.lock() = State::default();
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    const LEASE: Duration = Duration::from_secs(10);

    fn edges(records: &[(&str, &str)]) -> Vec<(Arc<str>, Arc<str>)> {
        records.iter().map(|(edge, record)| ((*edge).into(), (*record).into())).collect()
    }

    async fn watch_for(watch: &Watch, records: &[(&str, &str)], seconds: u64) -> usize {
        let mut abandoned = 0;
        for _ in 0..seconds {
            advance(Duration::from_secs(1)).await;
            abandoned = watch.look(&edges(records)).len();
        }
        abandoned
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_renews_is_stale_after_one_lease_and_abandoned_after_two() {
        let watch = Watch::new(LEASE);
        assert!(watch.is_fresh("a", "1"), "never seen");
        assert_eq!(watch.look(&edges(&[("a", "1"), ("b", "1")])).len(), 0);
        assert_eq!(watch_for(&watch, &[("a", "1"), ("b", "1")], 9).await, 0);
        assert!(watch.is_fresh("a", "1"));
        assert_eq!(watch_for(&watch, &[("a", "1"), ("b", "2")], 10).await, 0);
        assert!(!watch.is_fresh("a", "1") && watch.is_fresh("b", "2"));
        assert!(watch.is_fresh("a", "2"), "renewed since");
        assert_eq!(watch_for(&watch, &[("a", "1"), ("b", "2")], 1).await, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_did_not_look_knows_nothing() {
        let watch = Watch::new(LEASE);
        watch_for(&watch, &[("a", "1")], 19).await;
        advance(LEASE * 2).await;
        assert_eq!(watch.look(&edges(&[("a", "1")])).len(), 0);
        assert!(watch.is_fresh("a", "1"));
        assert_eq!(watch_for(&watch, &[("a", "1")], 20).await, 1);
        watch.forget();
        assert_eq!(watch_for(&watch, &[("a", "1")], 20).await, 0);
    }
}
