//! Tokens and sessions that back ends have revoked: all of them in memory, as the store has them, and told to edges.
//!
//! Where nodes share a store, each looks for what others wrote twice a second. What a look may have missed, because a
//! write was slow to become visible, is found by the next ones: each goes back by more than a write may take.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use sanjay_runtime::clock::SharedClock;
use tokio::{
    sync::broadcast,
    time::{Instant, MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    store::{InboxStore, MAX_REVOCATIONS_PAGE, Revocation, StoreError, Subject},
};

/// Most revocations in force: about 200 bytes each here, and less on each edge.
const MAX_REVOCATIONS: usize = 100_000;

/// How often the store is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// How far a look goes back from the one before: more than a write takes with everything that is tried again, and more
/// than the clocks of nodes differ.
const LOOK_BACK: Duration = Duration::from_secs(15);

/// After how many looks everything is read again, in case that a clock was set.
const LOOKS_A_READ: u32 = 600;

/// A node that has not seen the store for so long tells edges nothing: others may have.
const STALE: Duration = Duration::from_secs(3);

/// Changes that wait for the slowest edge; one that is slower begins anew.
const MAX_WAITING: usize = 1_024;

/// Most edges that are told at one node.
const MAX_EDGES: usize = 4_096;

/// Why something was not revoked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RevokeError {
    /// The store would not.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// There are as many as there may be.
    #[error(
        "{MAX_REVOCATIONS} revocations are in force, which is the limit; take some back, or wait until they are over"
    )]
    TooMany,
    /// There is none.
    #[error("nothing of that kind is revoked; ListRevocations names what is")]
    NotFound,
    /// What is in force was not read yet.
    #[error("the node does not know yet what is revoked, because its store is away; try again")]
    NotRead,
}

/// As many edges are told as may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_EDGES} edges are told of revocations by this node, which is its limit; ask another")]
pub(crate) struct TooManyEdges;

/// What edges are told.
pub(crate) type Change = Arc<Revocation>;

/// All revocations.
#[derive(Clone)]
pub(crate) struct Revocations {
    store: Arc<dyn InboxStore>,
    clock: SharedClock,
    /// How long a token may live.
    life: Duration,
    known: Arc<Mutex<Known>>,
    changes: broadcast::Sender<Change>,
    metrics: Metrics,
}

#[derive(Default)]
struct Known {
    /// Also those that were taken back, until they are over: an older look is not to bring them back.
    all: BTreeMap<Subject, Change>,
    /// Those of them in force.
    in_force: usize,
    /// When the store was last seen.
    seen: Option<Instant>,
}

impl Known {
    fn is_fresh(&self) -> bool {
        self.seen.is_some_and(|seen| seen.elapsed() < STALE)
    }

    /// Takes in what is written of a subject, unless something newer is known; true when that is news.
    fn take(&mut self, revocation: &Change) -> bool {
        let before = self.all.get(&revocation.subject);
        if before.is_some_and(|before| before.changed_us >= revocation.changed_us) {
            return false;
        }
        let was_in_force = before.is_some_and(|before| !before.lifted);
        self.in_force = self.in_force + usize::from(!revocation.lifted) - usize::from(was_in_force);
        self.all.insert(revocation.subject.clone(), Arc::clone(revocation));
        was_in_force || !revocation.lifted
    }

    /// Forgets what is over; returns that of it which was in force.
    fn forget(&mut self, now_us: u64) -> Vec<Change> {
        let over = self.all.extract_if(.., |_, revocation| revocation.expires_us <= now_us);
        let over: Vec<Change> = over.map(|(_, over)| over).filter(|over| !over.lifted).collect();
        self.in_force -= over.len();
        over
    }
}

impl Revocations {
    pub(crate) fn new(store: Arc<dyn InboxStore>, life: Duration, metrics: Metrics) -> Self {
        let (clock, changes) = (store.clock(), broadcast::Sender::new(MAX_WAITING));
        Self { store, clock, life, known: Arc::default(), changes, metrics }
    }

    /// Revokes. `Ok` means durable; edges know it within a second.
    pub(crate) async fn revoke(
        &self,
        subject: Subject,
        reason: String,
        caller: &str,
    ) -> Result<Change, RevokeError> {
        {
            let known = self.known.lock();
            if known.seen.is_none() {
                return Err(RevokeError::NotRead);
            }
            let again = known.all.get(&subject).is_some_and(|before| !before.lifted);
            if known.in_force >= MAX_REVOCATIONS && !again {
                return Err(RevokeError::TooMany);
            }
        }
        let now_us = self.clock.now_us();
        // A token says in whole seconds when it was made: those of this second are among them.
        let is_user = matches!(subject, Subject::User(_));
        let revocation = Revocation {
            before_s: if is_user { now_us / 1_000_000 + 1 } else { 0 },
            revoked_us: now_us,
            expires_us: now_us.saturating_add(u64::try_from(self.life.as_micros()).unwrap_or(u64::MAX)),
            reason,
            caller: caller.to_owned(),
            lifted: false,
            changed_us: self.newer(&subject, now_us),
            subject,
        };
        self.write(revocation).await
    }

    /// Takes a revocation back. `Ok` means durable.
    pub(crate) async fn unrevoke(&self, subject: &Subject, caller: &str) -> Result<Change, RevokeError> {
        let before = {
            let known = self.known.lock();
            if known.seen.is_none() {
                return Err(RevokeError::NotRead);
            }
            known.all.get(subject).filter(|before| !before.lifted).cloned()
        };
        let before = before.ok_or(RevokeError::NotFound)?;
        let changed_us = self.newer(subject, self.clock.now_us());
        let caller = caller.to_owned();
        self.write(Revocation { lifted: true, changed_us, caller, ..Revocation::clone(&before) }).await
    }

    /// A time after what is known of the subject, whatever the clock says.
    fn newer(&self, subject: &Subject, now_us: u64) -> u64 {
        let known = self.known.lock();
        known.all.get(subject).map_or(now_us, |before| now_us.max(before.changed_us + 1))
    }

    async fn write(&self, revocation: Revocation) -> Result<Change, RevokeError> {
        self.store.revoke(revocation.clone()).await?;
        let revocation = Arc::new(revocation);
        self.apply([Arc::clone(&revocation)]);
        Ok(revocation)
    }

    /// Those in force whose subjects follow `after`, at most `limit`.
    pub(crate) fn list(&self, after: Option<&Subject>, limit: usize) -> Result<Vec<Change>, RevokeError> {
        use std::ops::Bound::{Excluded, Unbounded};
        let known = self.known.lock();
        if known.seen.is_none() {
            return Err(RevokeError::NotRead);
        }
        let from = after.map_or(Unbounded, Excluded);
        let in_force = known.all.range((from, Unbounded)).filter(|(_, revocation)| !revocation.lifted);
        Ok(in_force.take(limit).map(|(_, revocation)| Arc::clone(revocation)).collect())
    }

    /// Hears of what is in force, and of every change from then on.
    pub(crate) fn watch(&self) -> Result<broadcast::Receiver<Change>, TooManyEdges> {
        if self.changes.receiver_count() >= MAX_EDGES {
            return Err(TooManyEdges);
        }
        Ok(self.changes.subscribe())
    }

    /// All that is in force, when the store was seen lately. Whoever watched before misses nothing between the two.
    pub(crate) fn snapshot(&self) -> Option<Vec<Change>> {
        let known = self.known.lock();
        let in_force = || known.all.values().filter(|revocation| !revocation.lifted).cloned().collect();
        known.is_fresh().then(in_force)
    }

    /// Whether the store was seen lately.
    pub(crate) fn is_fresh(&self) -> bool {
        self.known.lock().is_fresh()
    }

    /// Looks at the store until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut looks, mut looked_us, mut away) = (0, 0, false);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let now_us = self.clock.now_us();
            let look = async {
                if looks % LOOKS_A_READ == 0 { self.read_all().await } else { self.look(looked_us).await }
            };
            match stop.run_until_cancelled(look).await {
                None => return,
                Some(Ok(())) => {
                    (looks, looked_us) = (looks + 1, now_us);
                    self.known.lock().seen = Some(Instant::now());
                    if std::mem::take(&mut away) {
                        tracing::info!("it is known again what back ends have revoked");
                    }
                }
                Some(Err(error)) => {
                    if !std::mem::replace(&mut away, true) {
                        tracing::warn!(%error, "it is not known what back ends have revoked meanwhile; edges keep what they know");
                    }
                }
            }
            let over = self.known.lock().forget(now_us);
            for over in over {
                let lifted = Revocation { lifted: true, ..Revocation::clone(&over) };
                let _nobody = self.changes.send(Arc::new(lifted));
            }
            self.measure();
        }
    }

    async fn read_all(&self) -> Result<(), StoreError> {
        let mut after = None;
        loop {
            let page = self.store.revocations(after.take(), MAX_REVOCATIONS_PAGE).await?;
            after =
                page.last().filter(|_| page.len() >= MAX_REVOCATIONS_PAGE).map(|last| last.subject.clone());
            self.apply(page.into_iter().map(Arc::new));
            if after.is_none() {
                return Ok(());
            }
        }
    }

    /// Reads what was changed since the last look; everything when that is more than a page.
    async fn look(&self, looked_us: u64) -> Result<(), StoreError> {
        let since_us = looked_us.saturating_sub(LOOK_BACK.as_micros() as u64);
        let changed = self.store.revocations_changed(since_us, MAX_REVOCATIONS_PAGE).await?;
        if changed.len() >= MAX_REVOCATIONS_PAGE {
            return self.read_all().await;
        }
        self.apply(changed.into_iter().map(Arc::new));
        Ok(())
    }

    fn apply(&self, changes: impl IntoIterator<Item = Change>) {
        let now_us = self.clock.now_us();
        let mut known = self.known.lock();
        for change in changes.into_iter().filter(|change| change.expires_us > now_us) {
            if known.take(&change) {
                // Under the lock, so that a snapshot and what follows it fit.
                let _nobody = self.changes.send(change);
            }
        }
        drop(known);
        self.measure();
    }

    fn measure(&self) {
        let known = self.known.lock();
        self.metrics.revocations(known.in_force, known.seen.map(|seen| seen.elapsed()));
    }
}

#[cfg(test)]
#[path = "revocations_tests.rs"]
mod tests;
