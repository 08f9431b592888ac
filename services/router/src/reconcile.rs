//! Finds what the bus lost and no later publication revealed: compares the tops of held channels with what was
//! handed on.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use crate::{
    fanout::{Fanout, Suspects},
    metrics::Metrics,
    outage::Outage,
    registry::{Registry, RegistryError, Top},
};

/// Channels of one round trip to the registry.
const BATCH: usize = 512;

/// Between two looks at all held channels. A subscriber learns of a loss within this time and [`UNDER_WAY`].
const EVERY: Duration = Duration::from_secs(10);

/// How long a publication may be under way between the registry and the fan-out. One that takes longer is given up,
/// and dropped when it comes after all.
const UNDER_WAY: Duration = Duration::from_millis(500);

/// Between two attempts while the registry does not answer.
const RETRY: Duration = Duration::from_secs(1);

/// Compares the registry with the fan-out.
pub(crate) struct Reconciler {
    fanout: Arc<Fanout>,
    registry: Arc<dyn Registry>,
    metrics: Metrics,
    /// Whether to look without being asked to.
    regular: bool,
    /// Of the registry's answers.
    looking: Outage,
}

/// Channels that stood below the registry's top, and that top.
type Behind = Vec<(Arc<str>, Top)>;

impl Reconciler {
    /// A `regular` one looks now and then; otherwise only when the bus says that it missed something.
    pub(crate) fn new(
        fanout: Arc<Fanout>,
        registry: Arc<dyn Registry>,
        metrics: Metrics,
        regular: bool,
    ) -> Self {
        Self { fanout, registry, metrics, regular, looking: Outage::default() }
    }

    /// Looks, for as long as it is polled.
    pub(crate) async fn run(self) {
        let mut due = Instant::now() + EVERY;
        loop {
            let suspects = match self.regular {
                true => timeout_at(due, self.fanout.suspects()).await.unwrap_or(Suspects::All),
                false => self.fanout.suspects().await,
            };
            let (began, all) = (Instant::now(), suspects == Suspects::All);
            let unanswered = self.look(suspects).await;
            if all {
                // A look that takes long must leave the registry as much time for others.
                due = (began + EVERY).max(Instant::now() + began.elapsed());
            }
            if unanswered != Suspects::Nothing {
                self.fanout.suspect(unanswered);
                sleep(RETRY).await;
            }
        }
    }

    /// Looks at the suspects twice; what was under way the first time has arrived by the second. Returns those that the
    /// registry did not answer for.
    pub(crate) async fn look(&self, suspects: Suspects) -> Suspects {
        let mut behind = Behind::new();
        let mut unanswered = Suspects::Nothing;
        let mut last_answer = Instant::now();
        match suspects {
            Suspects::Nothing => {}
            Suspects::Some(channels) => {
                let held = |channel: &Arc<str>| self.fanout.holds(channel);
                let channels: Vec<_> = channels.into_iter().filter(held).collect();
                if !self.compare(&channels, &mut behind).await {
                    unanswered = Suspects::Some(channels.into_iter().collect());
                }
                last_answer = Instant::now();
            }
            Suspects::All => {
                for part in 0..Fanout::PARTS {
                    if !self.compare(&self.fanout.held(part), &mut behind).await {
                        unanswered = Suspects::All;
                        break;
                    }
                    last_answer = Instant::now();
                }
            }
        }
        if !behind.is_empty() {
            sleep_until(last_answer + UNDER_WAY).await;
            self.give_up(behind);
        }
        unanswered
    }

    /// Adds the channels that stand below their tops; false when the registry does not answer.
    async fn compare(&self, channels: &[Arc<str>], behind: &mut Behind) -> bool {
        for batch in channels.chunks(BATCH) {
            let tops = self.registry.tops(batch).await;
            for (channel, top) in batch.iter().zip(tops) {
                match top {
                    Ok(top) if self.fanout.is_behind(channel, &top) => {
                        behind.push((Arc::clone(channel), top))
                    }
                    // Without a state there is nothing to compare with.
                    Ok(_) | Err(RegistryError::TooManyChannels { .. } | RegistryError::Superseded { .. }) => {
                    }
                    Err(error @ RegistryError::Unavailable(_)) => {
                        if self.looking.begins() {
                            tracing::warn!(%error, "cannot tell whether the bus lost publications");
                        }
                        return false;
                    }
                }
            }
            if self.looking.ends() {
                tracing::info!("the registry tells again where channels stand");
            }
        }
        true
    }

    fn give_up(&self, behind: Behind) {
        let lost = behind.iter().filter(|(channel, top)| self.fanout.lost(channel, top)).count();
        if lost > 0 {
            self.metrics.losses.inc_by(lost as u64);
            tracing::warn!(channels = lost, "the bus lost publications; subscribers are told");
        }
    }
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;
