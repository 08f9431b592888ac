//! Measures how long publications were on the bus.

use std::sync::Arc;

use prometheus_client::metrics::histogram::Histogram;
use sanjay_proto::client::v1::Publication;
use sanjay_runtime::{SharedClock, metrics::seconds_between};

use super::{EdgeHint, Missed, Sink};

/// A [`Sink`] that looks at the time stamp of each publication and hands everything on.
pub(crate) struct Measured {
    pub(crate) sink: Arc<dyn Sink>,
    pub(crate) clock: SharedClock,
    pub(crate) latency: Histogram,
}

impl Sink for Measured {
    fn publication(&self, publication: &Arc<Publication>) {
        self.latency.observe(seconds_between(publication.time_us, self.clock.now_us()));
        self.sink.publication(publication);
    }

    fn hint(&self, hint: EdgeHint) {
        self.sink.hint(hint);
    }

    fn missed(&self, what: Missed<'_>) {
        self.sink.missed(what);
    }
}
