//! The wall clock as a parameter, so that a test decides what time it is.
//!
//! Only what is stored or shown takes its time from here. Latencies and deadlines use `tokio::time`, which a
//! test can pause.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// A source of wall-clock time.
pub trait Clock: Send + Sync + 'static {
    /// Unix time in microseconds.
    fn now_us(&self) -> u64;

    /// Unix time in seconds, rounded down.
    fn now_s(&self) -> u64 {
        self.now_us() / 1_000_000
    }
}

/// A clock that many parts share.
pub type SharedClock = Arc<dyn Clock>;

/// The clock of the operating system.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now_us(&self) -> u64 {
        #[expect(clippy::disallowed_methods, reason = "the one place where the operating system is asked")]
        let now = SystemTime::now();
        // A machine whose clock stands before 1970 gets 1970: wrong either way, but never a panic.
        let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    }
}

/// A clock that stands still until a test moves it.
#[derive(Debug, Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// Starts at `us`, in Unix microseconds.
    #[must_use]
    pub fn new(us: u64) -> Self {
        Self(AtomicU64::new(us))
    }

    /// Moves the clock forward.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(u64::try_from(by.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Moves the clock to `us`, in Unix microseconds; backward too.
    pub fn set(&self, us: u64) {
        self.0.store(us, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now_us(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_moves_only_when_told() {
        let clock = ManualClock::new(1_999_999);
        assert_eq!((clock.now_us(), clock.now_s()), (1_999_999, 1));
        clock.advance(Duration::from_micros(1));
        assert_eq!(clock.now_s(), 2);
        clock.set(5);
        assert_eq!(clock.now_us(), 5);
    }

    #[test]
    fn the_system_clock_is_after_this_was_written() {
        assert!(SystemClock.now_s() > 1_700_000_000);
    }
}
