//! The database server's time, so that nodes whose clocks differ agree about when something is due.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use mongodb::{Client, bson::doc};
use parking_lot::Mutex;
use sanjay_runtime::clock::{Clock, SharedClock};
use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

/// How often the server is asked.
const EVERY: Duration = Duration::from_secs(60);

/// How often it is asked at most.
const AT_MOST: Duration = Duration::from_secs(1);

/// How long it may take to answer.
const ANSWER: Duration = Duration::from_secs(2);

/// The server's time when it was last asked, and the monotonic time since. Before the first answer it is the
/// clock of this machine.
pub(super) struct ServerClock {
    asked: Mutex<Option<(u64, Instant)>>,
    fallback: SharedClock,
}

impl ServerClock {
    pub(super) fn new(fallback: SharedClock) -> Arc<Self> {
        Arc::new(Self { asked: Mutex::new(None), fallback })
    }

    /// Asks the server once. An answer counts for the middle of the time that it took.
    pub(super) async fn ask(&self, client: &Client) -> bool {
        let began = Instant::now();
        let admin = client.database("admin");
        let hello = admin.run_command(doc! { "hello": 1 });
        let Ok(Ok(hello)) = timeout(ANSWER, hello.into_future()).await else { return false };
        let Ok(local) = hello.get_datetime("localTime") else { return false };
        let us = u64::try_from(local.timestamp_millis()).unwrap_or_default().saturating_mul(1_000);
        *self.asked.lock() = Some((us, began + began.elapsed() / 2));
        true
    }

    /// Asks now and then, as long as somebody has the clock. A server whose clock was set is followed, back too: what
    /// is due by its old time is due a little earlier or later.
    ///
    /// It is also asked when `wanted` says so.
    pub(super) async fn follow(clock: Weak<Self>, client: Client, wanted: Arc<Notify>) {
        loop {
            tokio::time::sleep(AT_MOST).await;
            let _either = timeout(EVERY, wanted.notified()).await;
            let Some(clock) = clock.upgrade() else { return };
            clock.ask(&client).await;
        }
    }
}

impl Clock for ServerClock {
    fn now_us(&self) -> u64 {
        let asked = *self.asked.lock();
        match asked {
            Some((us, at)) => us.saturating_add(u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX)),
            None => self.fallback.now_us(),
        }
    }
}

#[cfg(test)]
mod tests {
    use sanjay_runtime::clock::ManualClock;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn time_goes_on_from_the_last_answer() {
        let manual = Arc::new(ManualClock::new(5_000));
        let clock = ServerClock::new(manual.clone());
        assert_eq!(clock.now_us(), 5_000);
        *clock.asked.lock() = Some((9_000, Instant::now()));
        manual.set(1_000_000);
        assert_eq!(clock.now_us(), 9_000);
        tokio::time::advance(Duration::from_millis(3)).await;
        assert_eq!(clock.now_us(), 12_000);
    }
}
