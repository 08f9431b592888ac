//! How a process ends: a soft token asks, tracked tasks finish, a deadline passes, a hard token cuts.

use std::{collections::BTreeMap, fmt, future::Future, sync::Arc, thread, time::Duration};

use parking_lot::Mutex;
use tokio::time::timeout;
use tokio_util::{
    sync::CancellationToken,
    task::{TaskTracker, task_tracker::TaskTrackerToken},
};

/// How long tasks may take to be dropped after the hard token. Only a task that blocks its thread needs it.
const AFTER_HARD: Duration = Duration::from_secs(1);

/// The life of one process, or of one node of a test. Clones share it.
#[derive(Clone, Default)]
pub struct Lifecycle(Arc<Shared>);

#[derive(Default)]
struct Shared {
    soft: CancellationToken,
    hard: CancellationToken,
    tracker: TaskTracker,
    /// How many tasks of each name run.
    running: Mutex<BTreeMap<&'static str, usize>>,
    failure: Mutex<Option<Failure>>,
}

/// Which task failed first, and why.
#[derive(Debug, Clone)]
pub struct Failure {
    /// The task's name.
    pub task: &'static str,
    /// The error with its causes.
    pub error: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "task `{}` failed: {}", self.task, self.error)
    }
}

impl std::error::Error for Failure {}

impl Lifecycle {
    /// Nothing runs yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancelled when the process should end: finish what was begun, begin nothing.
    #[must_use]
    pub fn soft(&self) -> CancellationToken {
        self.0.soft.clone()
    }

    /// Cancelled when the deadline has passed, or all tasks have ended: drop everything.
    #[must_use]
    pub fn hard(&self) -> CancellationToken {
        self.0.hard.clone()
    }

    /// Whether the soft token is cancelled.
    #[must_use]
    pub fn is_shutting_down(&self) -> bool {
        self.0.soft.is_cancelled()
    }

    /// Runs a task that shutdown waits for; `name` says in logs what it is. At the hard token the future is
    /// dropped where it stands. A panic counts as a failure of the process.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn(&self, name: &'static str, future: impl Future<Output = ()> + Send + 'static) {
        let running = self.track(name);
        let hard = self.hard();
        tokio::spawn(async move {
            let _running = running;
            let _ = hard.run_until_cancelled_owned(future).await;
        });
    }

    /// Runs a task without which the process makes no sense: when it ends in an error, or at all before
    /// shutdown, that is a failure of the process.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn spawn_vital(
        &self,
        name: &'static str,
        future: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        let lifecycle = self.clone();
        self.spawn(name, async move {
            match future.await {
                Err(error) => lifecycle.fail(name, error),
                Ok(()) if !lifecycle.is_shutting_down() => {
                    lifecycle.fail(name, anyhow::anyhow!("the task ended before shutdown"));
                }
                Ok(()) => {}
            }
        });
    }

    /// Makes shutdown wait until the returned value is dropped; for threads and for tasks that cannot move
    /// between threads. Dropping it while the thread panics is a failure of the process.
    #[must_use = "shutdown waits only while the value lives"]
    pub fn track(&self, name: &'static str) -> Tracked {
        *self.0.running.lock().entry(name).or_default() += 1;
        Tracked { name, lifecycle: self.clone(), _token: self.0.tracker.token() }
    }

    /// Cancels the soft token. Calling it again changes nothing.
    pub fn begin_shutdown(&self) {
        self.0.soft.cancel();
    }

    /// Begins shutdown, waits at most `deadline` for the tracked tasks, logs which are late, and cancels the
    /// hard token. Returns the names of the late ones.
    pub async fn shutdown(&self, deadline: Duration) -> Vec<&'static str> {
        self.begin_shutdown();
        self.0.tracker.close();
        let mut late = Vec::new();
        if timeout(deadline, self.0.tracker.wait()).await.is_err() {
            late = self.running();
            tracing::warn!(?late, deadline_ms = deadline.as_millis() as u64, "tasks did not end in time");
        }
        self.0.hard.cancel();
        if timeout(AFTER_HARD, self.0.tracker.wait()).await.is_err() {
            tracing::error!(stuck = ?self.running(), "tasks did not end even when they were dropped");
        }
        late
    }

    /// Says that a task which must not end did: logs it, remembers the first, and begins shutdown.
    #[expect(clippy::needless_pass_by_value, reason = "callers hand their error over")]
    pub fn fail(&self, task: &'static str, error: anyhow::Error) {
        let failure = Failure { task, error: format!("{error:#}") };
        tracing::error!(task, error = failure.error, "a task failed that the process needs");
        self.0.failure.lock().get_or_insert(failure);
        self.begin_shutdown();
    }

    /// The first failure, if there was one.
    #[must_use]
    pub fn failure(&self) -> Option<Failure> {
        self.0.failure.lock().clone()
    }

    /// The names of the tracked tasks that run, in alphabetical order.
    #[must_use]
    pub fn running(&self) -> Vec<&'static str> {
        self.0.running.lock().keys().copied().collect()
    }
}

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifecycle")
            .field("running", &self.running())
            .field("soft", &self.0.soft.is_cancelled())
            .field("hard", &self.0.hard.is_cancelled())
            .finish()
    }
}

/// A task that shutdown waits for.
#[derive(Debug)]
pub struct Tracked {
    name: &'static str,
    lifecycle: Lifecycle,
    _token: TaskTrackerToken,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let mut running = self.lifecycle.0.running.lock();
        if let Some(count) = running.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                running.remove(self.name);
            }
        }
        drop(running);
        if thread::panicking() {
            self.lifecycle.fail(self.name, anyhow::anyhow!("the task panicked"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::Instant;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn shutdown_waits_for_tasks_that_end_by_themselves() {
        let lifecycle = Lifecycle::new();
        let soft = lifecycle.soft();
        lifecycle.spawn("flush", async move {
            soft.cancelled().await;
            tokio::time::sleep(Duration::from_secs(3)).await;
        });
        let started = Instant::now();
        assert!(lifecycle.shutdown(DEADLINE).await.is_empty());
        assert_eq!(started.elapsed(), Duration::from_secs(3));
        assert!(lifecycle.hard().is_cancelled() && lifecycle.failure().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn late_tasks_are_named_and_dropped_at_the_deadline() {
        let lifecycle = Lifecycle::new();
        let (dropped, mut was_dropped) = tokio::sync::oneshot::channel::<()>();
        lifecycle.spawn("stuck", async move {
            let _dropped = dropped;
            pending().await
        });
        lifecycle.spawn("quick", async {});
        let started = Instant::now();
        assert_eq!(lifecycle.shutdown(DEADLINE).await, ["stuck"]);
        assert_eq!(started.elapsed(), DEADLINE);
        assert!(matches!(was_dropped.try_recv(), Err(tokio::sync::oneshot::error::TryRecvError::Closed)));
        assert!(lifecycle.running().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_tracked_by_hand_is_waited_for() {
        let lifecycle = Lifecycle::new();
        let shard = lifecycle.track("shard");
        let started = Instant::now();
        assert_eq!(lifecycle.shutdown(DEADLINE).await, ["shard"]);
        assert_eq!(started.elapsed(), DEADLINE + AFTER_HARD);
        drop(shard);
        assert!(lifecycle.shutdown(DEADLINE).await.is_empty());
    }

    #[tokio::test]
    async fn a_vital_task_that_ends_begins_shutdown() {
        let lifecycle = Lifecycle::new();
        lifecycle.spawn_vital("listener", async { Err(anyhow::anyhow!("gone").context("cannot accept")) });
        lifecycle.soft().cancelled().await;
        lifecycle.fail("other", anyhow::anyhow!("later"));
        let failure = lifecycle.failure().unwrap();
        assert_eq!(failure.to_string(), "task `listener` failed: cannot accept: gone");

        let lifecycle = Lifecycle::new();
        lifecycle.spawn_vital("listener", async { Ok(()) });
        lifecycle.soft().cancelled().await;
        assert!(lifecycle.failure().unwrap().error.contains("before shutdown"));

        let lifecycle = Lifecycle::new();
        let soft = lifecycle.soft();
        lifecycle.spawn_vital("listener", async move {
            soft.cancelled().await;
            Ok(())
        });
        assert!(lifecycle.shutdown(DEADLINE).await.is_empty());
        assert!(lifecycle.failure().is_none());
    }

    #[tokio::test]
    async fn a_panic_is_a_failure() {
        let lifecycle = Lifecycle::new();
        lifecycle.spawn("relay", async { panic!("a panic that this test wants") });
        lifecycle.soft().cancelled().await;
        assert_eq!(lifecycle.failure().unwrap().task, "relay");
    }
}
