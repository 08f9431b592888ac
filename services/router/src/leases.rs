//! Time limits of attachments: renews those of this router's edges, ends the stream of an edge whose attachment is
//! gone, and sweeps after an edge that had its time.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::{
    downlink::End,
    fanout::Fanout,
    outage::Outage,
    registry::{Attachment, Registry, RegistryError},
};

/// Renewals within one lease: one that fails does not end it.
const RENEWALS: u32 = 3;

/// Renews what the fan-out holds.
pub(crate) struct Leases {
    fanout: Arc<Fanout>,
    registry: Arc<dyn Registry>,
    every: Duration,
    renewing: Outage,
}

impl Leases {
    pub(crate) fn new(fanout: Arc<Fanout>, registry: Arc<dyn Registry>, lease: Duration) -> Self {
        Self { fanout, registry, every: lease / RENEWALS, renewing: Outage::default() }
    }

    /// Renews, for as long as it is polled.
    pub(crate) async fn run(self) {
        let mut ticks = interval(self.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.renew().await;
        }
    }

    /// Renews all attachments once. A stream that ends here is the edge's cue to attach and announce anew.
    pub(crate) async fn renew(&self) {
        let links = self.fanout.links();
        if links.is_empty() {
            return;
        }
        let attachments: Vec<_> = links.iter().map(|link| link.attachment.clone()).collect();
        let answers = self.registry.renew(&attachments).await;
        let mut failed = None;
        for (link, answer) in links.iter().zip(answers) {
            match answer {
                Ok(()) => {}
                Err(RegistryError::Superseded { .. }) => link.end(End::Superseded),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            Some(error) if self.renewing.begins() => {
                tracing::warn!(%error, "could not renew the attachments of edges");
            }
            None if self.renewing.ends() => tracing::info!("attachments of edges are renewed again"),
            _ => {}
        }
    }
}

/// Sweeps after some time, and again a lease later for as long as the registry refuses. Returns how many sessions that
/// removed.
pub(crate) async fn sweep_after(
    time: Duration,
    lease: Duration,
    registry: &dyn Registry,
    attachment: &Attachment,
) -> usize {
    let refused = Outage::default();
    let edge = &attachment.edge.id;
    sleep(time).await;
    loop {
        match registry.sweep(attachment).await {
            Ok(0) => return 0,
            Ok(sessions) => {
                tracing::info!(%edge, sessions, "removed sessions that nobody vouched for");
                return sessions;
            }
            Err(error) if refused.begins() => {
                tracing::warn!(%error, %edge, "could not sweep sessions; trying again");
            }
            Err(_) => {}
        }
        sleep(lease).await;
    }
}

#[cfg(test)]
#[path = "leases_tests.rs"]
mod tests;
