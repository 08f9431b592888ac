//! When a client tries again: pure functions of the attempt, the server's hints and a random fraction.

use std::time::Duration;

/// How far the first attempts of a fleet are spread as long as no `welcome` gave another value.
pub(crate) const DEFAULT_SPREAD: Duration = Duration::from_secs(5);

const BASE: Duration = Duration::from_millis(500);
const CAP: Duration = Duration::from_secs(20);

/// The delay before reconnecting after `failures` failed attempts in a row.
///
/// The first attempt (`failures` = 0) lies anywhere within `spread`, so that the clients of a lost edge do
/// not come back together; later ones anywhere within a window that doubles from a second up to 20.
pub(crate) fn reconnect(failures: u32, spread: Duration, fraction: f64) -> Duration {
    let window = if failures == 0 { spread } else { doubled(BASE, failures, CAP) };
    window.mul_f64(fraction)
}

/// The delay that a `goaway` asks for.
pub(crate) fn goaway(after_ms: u64, spread_ms: u64, fraction: f64) -> Duration {
    // A day bounds what a faulty server can ask for.
    let bounded = |ms: u64| Duration::from_millis(ms.min(86_400_000));
    bounded(after_ms) + bounded(spread_ms).mul_f64(fraction)
}

/// The delay before repeating a refused request: the server's hint, when it gave one, with up to half of it
/// on top; otherwise anywhere within a window that doubles from `base` up to `cap`.
pub(crate) fn retry(
    attempt: u32,
    hint: Option<Duration>,
    base: Duration,
    cap: Duration,
    fraction: f64,
) -> Duration {
    match hint {
        Some(hint) => hint.min(cap) + (hint.min(cap) / 2).mul_f64(fraction),
        None => doubled(base, attempt, cap).mul_f64(fraction),
    }
}

fn doubled(base: Duration, exponent: u32, cap: Duration) -> Duration {
    // 2³⁰ times any base is beyond every cap.
    base.saturating_mul(1 << exponent.min(30)).min(cap)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_attempt_lies_within_the_servers_spread(ms in 0_u64..600_000, fraction in 0.0..1.0) {
            let spread = Duration::from_millis(ms);
            prop_assert!(reconnect(0, spread, fraction) <= spread);
        }

        #[test]
        fn later_attempts_lie_within_a_doubling_window(failures in 1_u32.., fraction in 0.0..1.0) {
            let window = 0.5 * 2_f64.powi(i32::try_from(failures.min(40)).unwrap());
            let delay = reconnect(failures, DEFAULT_SPREAD, fraction).as_secs_f64();
            prop_assert!(delay <= window.min(20.0) + 1e-9);
            // Full jitter: the fraction alone decides where in the window.
            prop_assert!((delay - window.min(20.0) * fraction).abs() < 1e-6);
        }

        #[test]
        fn a_goaway_is_honoured_and_bounded(after in any::<u64>(), spread in any::<u64>(), fraction in 0.0..1.0) {
            let delay = goaway(after, spread, fraction);
            prop_assert!(delay >= Duration::from_millis(after.min(86_400_000)));
            prop_assert!(delay <= Duration::from_millis(after.min(86_400_000) + spread.min(86_400_000)));
        }

        #[test]
        fn a_hint_is_never_undercut(attempt in any::<u32>(), ms in 1_u64..10_000, fraction in 0.0..1.0) {
            let cap = Duration::from_secs(10);
            let hint = Duration::from_millis(ms);
            let delay = retry(attempt, Some(hint), BASE, cap, fraction);
            prop_assert!(delay >= hint && delay <= hint * 3 / 2);
            prop_assert!(retry(attempt, None, BASE, cap, fraction) <= cap);
        }
    }
}
