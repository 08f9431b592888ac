//! When an inbox is relayed again: a pure function of the attempt and a random fraction.

use std::time::Duration;

/// The delay after the first attempt.
pub(crate) const BASE: Duration = Duration::from_secs(2);

/// The longest delay.
pub(crate) const CAP: Duration = Duration::from_secs(60);

/// How long after relay number `attempt` (0 is the first) the next follows: 2 s · 2^attempt up to 60 s, times
/// something between ½ and 1 by `fraction` (0 to 1), so that inboxes that failed together spread out.
#[must_use]
pub(crate) fn delay(attempt: u32, fraction: f64) -> Duration {
    let factor = 1_u32.checked_shl(attempt).unwrap_or(u32::MAX);
    let scheduled = BASE.saturating_mul(factor).min(CAP);
    scheduled.mul_f64(0.5 + fraction.clamp(0.0, 1.0) / 2.0)
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
        }
    }
}
