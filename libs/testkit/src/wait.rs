//! Waiting for conditions, always with a deadline.

use std::{future::Future, time::Duration};

use tokio::time::{Instant, sleep, timeout};

/// Between two looks at a condition.
const INTERVAL: Duration = Duration::from_millis(10);

/// Looks at a condition until it gives a value.
///
/// # Panics
/// With `what` when `limit` has passed.
pub async fn eventually<T>(what: &str, limit: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {limit:?}: {what}");
        sleep(INTERVAL).await;
    }
}

/// Bounds a test, or a part of one, by `seconds`.
///
/// # Panics
/// With `what` when the time has passed.
pub fn within<T>(seconds: u64, what: &str, work: impl Future<Output = T>) -> impl Future<Output = T> {
    // On the heap: whole tests pass through here.
    let mut work = Box::pin(work);
    async move {
        // By reference: its processes are to see the panic when they are dropped, and print their logs.
        match timeout(Duration::from_secs(seconds), &mut work).await {
            Ok(value) => value,
            Err(_) => panic!("not within {seconds} s: {what}"),
        }
    }
}
