//! Audits the inboxes one after another, at a pace that nobody notices: what was accepted and is not settled must be
//! there.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    store::{Finding, InboxStore, StoreError},
};

/// Time between two pages.
const EVERY: Duration = Duration::from_secs(1);

/// Time between the beginnings of two rounds, at least.
const ROUND: Duration = Duration::from_secs(60);

/// Inboxes of one page, at least.
const PAGE: usize = 64;

/// Pages of one round when there are many inboxes: 50 minutes, which leaves time for pages that fail.
const PAGES_A_ROUND: usize = 3_000;

/// Findings that are remembered, so that each is logged once.
const MAX_REMEMBERED: usize = 1_024;

/// The audit of one node. Where nodes share a store, each audits all of it.
pub(crate) struct Audit {
    store: Arc<dyn InboxStore>,
    metrics: Metrics,
    round: Round,
    /// What the last complete round found.
    found_before: u64,
    /// By epoch: the findings that were logged.
    logged: HashMap<u64, Finding>,
    failing: bool,
}

/// A round over all inboxes.
struct Round {
    began: Instant,
    /// The user after whom it goes on; empty at its beginning, `None` when it is over.
    after: Option<String>,
    page: usize,
    found: u64,
}

impl Round {
    fn begin() -> Self {
        Self { began: Instant::now(), after: Some(String::new()), page: PAGE, found: 0 }
    }
}

impl Audit {
    pub(crate) fn new(store: Arc<dyn InboxStore>, metrics: Metrics) -> Self {
        Self {
            store,
            metrics,
            round: Round::begin(),
            found_before: 0,
            logged: HashMap::new(),
            failing: false,
        }
    }

    /// Runs until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            match self.step().await {
                Ok(()) => {
                    if std::mem::replace(&mut self.failing, false) {
                        tracing::info!("inboxes are audited again");
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut self.failing, true) {
                        tracing::warn!(%error, "inboxes are not audited");
                    }
                }
            }
        }
    }

    async fn step(&mut self) -> Result<(), StoreError> {
        let after = match &self.round.after {
            Some(after) => after.clone(),
            None if self.round.began.elapsed() < ROUND => return Ok(()),
            None => {
                self.round = Round::begin();
                String::new()
            }
        };
        if after.is_empty() {
            let inboxes = usize::try_from(self.store.stats().await?.inboxes).unwrap_or(usize::MAX);
            self.round.page = PAGE.max(inboxes / PAGES_A_ROUND);
        }
        let page = self.store.audit(after, self.round.page).await?;
        self.metrics.audited(page.inboxes);
        for finding in page.findings {
            self.round.found += finding.messages();
            self.log(finding);
        }
        // What the last round found is not forgotten before this one came by.
        self.metrics.audit_difference(self.round.found.max(self.found_before));
        if page.next.is_none() {
            self.found_before = self.round.found;
            self.metrics.audit_difference(self.round.found);
        }
        self.round.after = page.next;
        Ok(())
    }

    /// Says what was found, unless it was said already. No log line names a user; the epoch leads to the inbox.
    fn log(&mut self, finding: Finding) {
        if self.logged.get(&finding.epoch) == Some(&finding) {
            return;
        }
        let Finding { epoch, head, missing, excess, seqs } = &finding;
        tracing::error!(
            epoch,
            head,
            missing,
            excess,
            ?seqs,
            "an inbox does not hold what it says: messages that were accepted may be lost"
        );
        if self.logged.len() < MAX_REMEMBERED {
            self.logged.insert(finding.epoch, finding);
        }
    }
}

#[cfg(test)]
#[path = "audit_tests.rs"]
mod tests;
