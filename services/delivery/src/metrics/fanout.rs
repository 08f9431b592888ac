//! What is counted and measured of durable publications.

use prometheus_client::registry::{Registry, Unit};
use sanjay_runtime::metrics::seconds_between;

use super::Metrics;
use crate::store::Backlog;

impl Metrics {
    pub(super) fn register_fan_out(&self, registry: &mut Registry) {
        let help = "Durable publications accepted";
        registry.register("delivery_durable_publications", help, self.published_durably.clone());
        let help = "Durable publications that are in the inboxes of all their members";
        registry.register("delivery_finished_publications", help, self.publications_finished.clone());
        let help = "Members into whose inboxes a durable publication was put, those without room included";
        registry.register("delivery_fanned_out", help, self.fanned_out.clone());
        let help = "Durable publications that are not in the inboxes of all their members yet; where nodes share a store, \
                    each of them says how many all of it holds";
        registry.register("delivery_unfinished_publications", help, self.unfinished.clone());
        let help = "Age of the oldest of these; 0 when there is none";
        let oldest = self.oldest_unfinished.clone();
        registry.register_with_unit("delivery_oldest_unfinished_publication", help, Unit::Seconds, oldest);
    }

    /// A durable publication was accepted, or found to be a duplicate.
    pub(crate) fn published_durably(&self, duplicate: bool) {
        if duplicate {
            self.duplicates.inc()
        } else {
            self.published_durably.inc()
        };
    }

    /// A durable publication was put into so many inboxes.
    pub(crate) fn fanned_out(&self, count: usize) {
        self.fanned_out.inc_by(count as u64);
        self.appended.inc_by(count as u64);
    }

    /// A durable publication is in all its inboxes.
    pub(crate) fn publication_finished(&self) {
        self.publications_finished.inc();
    }

    /// What of durable publications is not in inboxes yet.
    pub(crate) fn backlog(&self, backlog: Backlog, now_us: u64) {
        self.unfinished.set(i64::try_from(backlog.unfinished).unwrap_or(i64::MAX));
        self.oldest_unfinished.set(backlog.oldest_us.map_or(0.0, |at| seconds_between(at, now_us)));
    }
}
