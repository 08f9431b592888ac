//! How much may be tried again: a share of all calls, so that an outage is not answered with more load.

use std::sync::atomic::{AtomicU32, Ordering};

/// What each call adds, in thousandths of a retry: one retry for five calls.
const EARNED: u32 = 200;

/// What one retry costs.
const COST: u32 = 1_000;

/// Most that can be saved up, and what there is at the start: retries at once after a quiet time.
const CAP: u32 = 20 * COST;

/// The account of one pool. The scheme is that of Finagle's retry budgets, without their clock: who calls
/// seldom lives on what is saved.
#[derive(Debug)]
pub(super) struct Budget(AtomicU32);

impl Default for Budget {
    fn default() -> Self {
        Self(AtomicU32::new(CAP))
    }
}

impl Budget {
    /// A call is made for the first time.
    pub(super) fn earn(&self) {
        if self.0.load(Ordering::Relaxed) < CAP {
            // A race overshoots by one call at most for each thread, which the next look sees.
            self.0.fetch_add(EARNED, Ordering::Relaxed);
        }
    }

    /// A call is to be made again; false when that must not be.
    pub(super) fn spend(&self) -> bool {
        let spent = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(COST));
        spent.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_is_retried_for_a_share_of_the_calls_only() {
        let budget = Budget::default();
        let mut retries = 0;
        for _ in 0..10_000 {
            budget.earn();
            retries += u32::from(budget.spend());
        }
        assert!((2_000..=2_020).contains(&retries), "{retries}");
        (0..1_000).for_each(|_| budget.earn());
        let saved = (0..1_000).filter(|_| budget.spend()).count();
        assert_eq!(saved, 20, "a quiet time saves no more than the cap");
    }
}
