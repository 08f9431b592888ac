//! Upkeep of the store that is done now and again, as long as there is something to do.

use std::time::Duration;

use tokio::{sync::Notify, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::store::StoreError;

/// How long upkeep rests after the store refused a step: long enough to leave a busy store alone, short enough to
/// catch up.
const REST: Duration = Duration::from_secs(1);

/// Takes steps `every` so often until `stop`: each time until one says that nothing is left, however long that takes,
/// because what is left would only be more the next time. `what` says in the log what is not done while steps fail.
pub(crate) async fn paced<F>(
    every: Duration,
    what: &'static str,
    stop: CancellationToken,
    step: impl FnMut() -> F,
) where
    F: Future<Output = Result<bool, StoreError>>,
{
    paced_or_woken(every, &Notify::new(), what, stop, step).await;
}

/// Like [`paced`], and takes steps at once also when it is woken, unless the store refused the last one.
pub(crate) async fn paced_or_woken<F>(
    every: Duration,
    wake: &Notify,
    what: &'static str,
    stop: CancellationToken,
    mut step: impl FnMut() -> F,
) where
    F: Future<Output = Result<bool, StoreError>>,
{
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut failing = false;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = wake.notified(), if !failing => {}
            () = stop.cancelled() => break,
        }
        // A step is asked for only when the one before it is answered, so that the sends that were queued meanwhile
        // come first.
        while !stop.is_cancelled() {
            match step().await {
                Ok(more) => {
                    if std::mem::replace(&mut failing, false) {
                        tracing::info!(what, "upkeep of the inbox store goes on");
                    }
                    if !more {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(what, %error, "upkeep of the inbox store rests until the store answers");
                    }
                    ticks.reset_after(REST);
                    break;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    };

    use tokio::{
        task::JoinHandle,
        time::{Instant, sleep},
    };

    use super::*;

    const EVERY: Duration = Duration::from_secs(60);
    const STEP: usize = 500;

    /// What is to be removed.
    #[derive(Default)]
    struct Heap {
        left: AtomicUsize,
        steps: AtomicUsize,
        busy: AtomicBool,
    }

    fn start(heap: &Arc<Heap>) -> (CancellationToken, JoinHandle<()>) {
        let (stop, heap) = (CancellationToken::new(), Arc::clone(heap));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let step = || async {
                heap.steps.fetch_add(1, Ordering::Relaxed);
                if heap.busy.load(Ordering::Relaxed) {
                    return Err(StoreError::Busy);
                }
                let removed = heap.left.load(Ordering::Relaxed).min(STEP);
                heap.left.fetch_sub(removed, Ordering::Relaxed);
                Ok(removed == STEP)
            };
            paced(EVERY, "the heap stays", stopped, step).await;
        });
        (stop, task)
    }

    #[tokio::test(start_paused = true)]
    async fn steps_follow_each_other_until_nothing_is_left_and_let_others_run() {
        let heap = Arc::new(Heap::default());
        heap.left.store(1_000 * STEP + 1, Ordering::Relaxed);
        let began = Instant::now();
        let (stop, task) = start(&heap);
        let mut turns = 0;
        while heap.left.load(Ordering::Relaxed) > 0 {
            turns += 1;
            tokio::task::yield_now().await;
        }
        assert!(turns >= 1_000, "others ran {turns} times during 1,000 steps");
        assert_eq!(began.elapsed(), Duration::ZERO, "there was no pause between them");
        sleep(EVERY - Duration::from_millis(1)).await;
        assert_eq!(heap.steps.load(Ordering::Relaxed), 1_001, "a step that leaves nothing is the last");
        heap.left.store(1, Ordering::Relaxed);
        sleep(Duration::from_millis(2)).await;
        assert_eq!(heap.left.load(Ordering::Relaxed), 0);
        stop.cancel();
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_woken_does_not_wait() {
        let (heap, wake, stop) =
            (Arc::new(Heap::default()), Arc::new(Notify::new()), CancellationToken::new());
        let (steps, woken, stopped) = (heap.clone(), wake.clone(), stop.clone());
        let task = tokio::spawn(async move {
            let step = || async {
                steps.steps.fetch_add(1, Ordering::Relaxed);
                if steps.busy.load(Ordering::Relaxed) { Err(StoreError::Busy) } else { Ok(false) }
            };
            paced_or_woken(EVERY, &woken, "the heap stays", stopped, step).await;
        });
        sleep(Duration::from_millis(1)).await;
        for expected in 2..5 {
            wake.notify_one();
            sleep(Duration::from_millis(1)).await;
            assert_eq!(heap.steps.load(Ordering::Relaxed), expected);
        }
        // A store that refuses gets its rest, whoever calls.
        heap.busy.store(true, Ordering::Relaxed);
        wake.notify_one();
        sleep(Duration::from_millis(1)).await;
        wake.notify_one();
        sleep(REST - Duration::from_millis(10)).await;
        assert_eq!(heap.steps.load(Ordering::Relaxed), 5);
        heap.busy.store(false, Ordering::Relaxed);
        sleep(REST).await;
        assert!(heap.steps.load(Ordering::Relaxed) > 5);
        stop.cancel();
        task.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_refuses_is_asked_again_soon() {
        let heap = Arc::new(Heap::default());
        heap.left.store(STEP, Ordering::Relaxed);
        heap.busy.store(true, Ordering::Relaxed);
        let (stop, task) = start(&heap);
        sleep(REST * 5 / 2).await;
        assert_eq!(heap.steps.load(Ordering::Relaxed), 3);
        heap.busy.store(false, Ordering::Relaxed);
        sleep(REST).await;
        assert_eq!(heap.left.load(Ordering::Relaxed), 0);
        stop.cancel();
        task.await.unwrap();
    }
}
