//! The senders of an inbox bench: by a schedule, or each after its answer.

use std::{
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sanjay_client::BackendError;
use tokio::{sync::Semaphore, task::JoinSet, time::timeout_at};

use super::Shared;
use crate::commands::bench::{
    pace::{MAX_OPERATIONS, Pacer, Schedule},
    report::Backlog,
    stamp::Stamp,
};

/// Sends without an answer; what is due beyond them waits in the backlog.
const IN_FLIGHT: usize = 1_024;

/// How much later than its schedule the last send may go out.
const GRACE: Duration = Duration::from_millis(100);

/// Sends each message when it is due, whatever became of the ones before.
pub(super) async fn open_loop(
    schedule: Schedule,
    shared: &Arc<Shared>,
    senders: &mut JoinSet<()>,
    backlog: &mut Backlog,
) -> anyhow::Result<()> {
    let mut pacer = Pacer::start(schedule)?;
    let places = Arc::new(Semaphore::new(IN_FLIGHT));
    let mut index = 0;
    let until = schedule.at(schedule.total()) + GRACE;
    let sending = async {
        while pacer.beyond(index).await.is_some() {
            while index < pacer.due() {
                backlog.max_unsent = backlog.max_unsent.max(pacer.due() - index);
                let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
                let (shared, n, due) = (Arc::clone(shared), index, schedule.at(index));
                index += 1;
                senders.spawn(async move {
                    shared.late.record(0, due.elapsed());
                    shared.send(n, due).await;
                    drop(place);
                });
                // Only running tasks are kept.
                while senders.try_join_next().is_some() {}
            }
        }
    };
    let in_time = timeout_at(until.into(), sending).await;
    if in_time.is_err() {
        backlog.unsent = schedule.total() - index;
    }
    Ok(())
}

/// Runs senders that each wait for their answer, until the time is over.
pub(super) async fn closed_loop(
    concurrency: u64,
    until: Instant,
    shared: &Arc<Shared>,
    senders: &mut JoinSet<()>,
) {
    let next = Arc::new(AtomicU64::new(0));
    for _ in 0..concurrency {
        let (shared, next) = (Arc::clone(shared), Arc::clone(&next));
        senders.spawn(async move {
            loop {
                let now = Instant::now();
                let index = next.fetch_add(1, Ordering::Relaxed);
                if now >= until || index >= MAX_OPERATIONS || shared.ending.load(Ordering::Relaxed) {
                    return;
                }
                shared.send(index, now).await;
            }
        });
    }
    while senders.join_next().await.is_some() {}
}

impl Shared {
    /// Sends message `index`, once, and notes what became of it.
    async fn send(&self, index: u64, due: Instant) {
        // By when it is sent: a rate that cannot be kept is measured too.
        let measured = Instant::now() >= *self.measured_from.lock().unwrap_or_else(PoisonError::into_inner);
        let payload = Stamp { index, due: due - self.start, measured }.payload(&self.edge.run, self.size);
        let user = self.edge.name("user", index % self.users);
        let sent = self.backend.send(&[&user], payload, "").await;
        let took = due.elapsed();
        match sent.map(|results| results.into_iter().next().map(|result| result.result)) {
            Ok(Some(Ok(_))) => {
                self.accepted().insert(index);
                if measured {
                    self.sent_measured.fetch_add(1, Ordering::Relaxed);
                    self.send.record(index as usize, took);
                }
            }
            Ok(Some(Err(refused))) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                self.problems.note(refused.message);
            }
            Ok(None) => {
                self.unknown.fetch_add(1, Ordering::Relaxed);
                self.problems.note("the server gave no result for a user");
            }
            Err(error) => {
                let unknown = matches!(error, BackendError::Timeout(_) | BackendError::Broken(_));
                let counter = if unknown { &self.unknown } else { &self.failed };
                counter.fetch_add(1, Ordering::Relaxed);
                self.problems.note(error);
            }
        }
    }
}
