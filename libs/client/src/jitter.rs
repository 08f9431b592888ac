//! The random source of back-off delays, a parameter so that a test or a seed decides them.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use rand::{Rng, SeedableRng, rngs::StdRng};

/// Gives fractions from 0 up to, but not including, 1.
#[derive(Clone)]
pub struct Jitter(Arc<dyn Fn() -> f64 + Send + Sync>);

impl Jitter {
    /// Seeded by the operating system.
    #[must_use]
    pub fn from_os() -> Self {
        Self::from_rng(StdRng::from_os_rng())
    }

    /// The same fractions for the same seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self::from_rng(StdRng::seed_from_u64(seed))
    }

    /// What `source` gives; values outside 0 to 1 are clamped.
    pub fn from_source(source: impl Fn() -> f64 + Send + Sync + 'static) -> Self {
        Self(Arc::new(source))
    }

    fn from_rng(rng: StdRng) -> Self {
        let rng = Mutex::new(rng);
        Self::from_source(move || rng.lock().unwrap_or_else(PoisonError::into_inner).random())
    }

    /// The next fraction.
    #[must_use]
    pub fn fraction(&self) -> f64 {
        (self.0)().clamp(0.0, 1.0)
    }
}

impl Default for Jitter {
    fn default() -> Self {
        Self::from_os()
    }
}

impl fmt::Debug for Jitter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Jitter")
    }
}
