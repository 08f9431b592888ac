//! When an inbox is relayed again, and when a message that failed is delivered again: pure functions of the attempt and
//! a random fraction.

use std::time::Duration;

/// The delay after the first attempt.
pub(crate) const BASE: Duration = Duration::from_secs(2);

/// The longest delay.
pub(crate) const CAP: Duration = Duration::from_secs(60);

/// The delay after the first failed attempt of a message.
pub(crate) const ATTEMPT_BASE: Duration = Duration::from_secs(1);

/// The longest delay after a failed attempt.
pub(crate) const ATTEMPT_CAP: Duration = Duration::from_secs(5 * 60);

/// How long after failed attempt number `count` (0 is the first) the next follows: 1 s · 2^count up to 5 min, times
/// something between ½ and 1.
#[must_use]
pub(crate) fn attempt_delay(count: u32, fraction: f64) -> Duration {
    scheduled(ATTEMPT_BASE, ATTEMPT_CAP, count, fraction)
}

/// How long after relay number `attempt` (0 is the first) the next follows: 2 s · 2^attempt up to 60 s, times
/// something between ½ and 1 by `fraction` (0 to 1), so that inboxes that failed together spread out.
#[must_use]
pub(crate) fn delay(attempt: u32, fraction: f64) -> Duration {
    scheduled(BASE, CAP, attempt, fraction)
}

fn scheduled(base: Duration, cap: Duration, attempt: u32, fraction: f64) -> Duration {
    let factor = 1_u32.checked_shl(attempt).unwrap_or(u32::MAX);
    base.saturating_mul(factor).min(cap).mul_f64(0.5 + fraction.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_schedule_doubles_up_to_its_cap() {
        let seconds: Vec<u64> = (0..8).map(|attempt| delay(attempt, 1.0).as_secs()).collect();
        assert_eq!(seconds, [2, 4, 8, 16, 32, 60, 60, 60]);
    }

    proptest! {
        #[test]
        fn delays_are_bounded(attempt: u32, fraction in 0.0..1.0) {
            let delay = delay(attempt, fraction);
            prop_assert!(delay >= BASE / 2 && delay <= CAP);
            let delay = attempt_delay(attempt, fraction);
            prop_assert!(delay >= ATTEMPT_BASE / 2 && delay <= ATTEMPT_CAP);
        }
    }
}
