//! Keeps the store tidy: removes receipts and dedupe keys that are past their time.

use std::{sync::Arc, time::Duration};

use sanjay_runtime::clock::SharedClock;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::store::InboxStore;

/// How often what is past its time is looked for.
const EVERY: Duration = Duration::from_secs(60);

/// How long the sweep rests after the store refused a step: long enough to leave a busy store alone, short
/// enough to catch up.
const REST: Duration = Duration::from_secs(1);

/// Most that is removed in one step, so that a send waits a few milliseconds for it at most.
const STEP: usize = 500;

/// Sweeps the store.
pub(crate) struct Sweep {
    pub(crate) store: Arc<dyn InboxStore>,
    pub(crate) clock: SharedClock,
}

impl Sweep {
    /// Runs until `stop`. A sweep goes on until nothing is left to remove, however long that takes: what it
    /// leaves would only be more the next time.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut failing = false;
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            // A step is asked for only when the one before it is answered, so that the sends that were queued
            // meanwhile come first.
            while !stop.is_cancelled() {
                match self.store.sweep(self.clock.now_us(), STEP).await {
                    Ok(removed) => {
                        if std::mem::replace(&mut failing, false) {
                            tracing::info!("the inbox store is swept again");
                        }
                        if removed < STEP {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                    Err(error) => {
                        if !std::mem::replace(&mut failing, true) {
                            tracing::warn!(%error, "the inbox store was not swept");
                        }
                        ticks.reset_after(REST);
                        break;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "sweep_tests.rs"]
mod tests;
