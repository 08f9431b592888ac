//! Keeps the store tidy: settles messages whose time to live has passed, and removes receipts and dedupe keys that are
//! past their time.

use std::{sync::Arc, time::Duration};

use prometheus_client::metrics::counter::Counter;
use sanjay_runtime::clock::SharedClock;
use tokio_util::sync::CancellationToken;

use crate::{
    paced::paced,
    store::{Forgotten, InboxStore},
};

/// How often records that are past their time are looked for.
const EVERY: Duration = Duration::from_secs(60);

/// How often messages are looked for that have expired. Readers do not get them anyway; what waits is their end.
const EXPIRE_EVERY: Duration = Duration::from_millis(500);

/// Most that is removed in one step, so that a send waits a few milliseconds for it at most.
const STEP: usize = 500;

/// Sweeps the store.
#[derive(Clone)]
pub(crate) struct Sweep {
    pub(crate) store: Arc<dyn InboxStore>,
    pub(crate) clock: SharedClock,
}

impl Sweep {
    /// Removes records until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let step = || async { Ok(self.store.sweep(self.clock.now_us(), STEP).await? >= STEP) };
        paced(EVERY, "receipts and dedupe keys past their time stay", stop, step).await;
    }

    /// Forgets devices that were not seen for long until `stop`, and counts them.
    pub(crate) async fn forget(self, forgotten: Counter, stop: CancellationToken) {
        let step = || async {
            let Forgotten { devices, more } = self.store.forget_devices(self.clock.now_us(), STEP).await?;
            forgotten.inc_by(devices as u64);
            Ok(more)
        };
        paced(EVERY, "devices that are gone are not forgotten", stop, step).await;
    }

    /// Settles expired messages until `stop`.
    pub(crate) async fn expire(self, stop: CancellationToken) {
        let step = || async { Ok(self.store.expire(self.clock.now_us(), STEP).await?.more) };
        paced(EXPIRE_EVERY, "expired messages are not settled", stop, step).await;
    }
}
