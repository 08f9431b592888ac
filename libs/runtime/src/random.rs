//! Randomness as a parameter, so that a seed reproduces a run, and what is made from it: ids and jitter.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use rand::RngCore;
use uuid::{Builder, Uuid};

use crate::clock::Clock;

/// A source of random numbers.
pub trait Random: Send + Sync + 'static {
    /// The next number; every value is equally likely.
    fn next_u64(&self) -> u64;
}

/// A random source that many parts share.
pub type SharedRandom = Arc<dyn Random>;

/// Cryptographically strong randomness, seeded by the operating system.
#[derive(Debug, Clone, Copy, Default)]
pub struct OsRandom;

impl Random for OsRandom {
    fn next_u64(&self) -> u64 {
        #[expect(clippy::disallowed_methods, reason = "the one place where real randomness comes from")]
        rand::rng().next_u64()
    }
}

/// Reproducible randomness: SplitMix64 (Steele, Lea and Flood, 2014), whose state is one counter. Threads may
/// share it, but then their interleaving decides who gets which number.
#[derive(Debug)]
pub struct SeededRandom(AtomicU64);

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

impl SeededRandom {
    /// The same seed gives the same numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(AtomicU64::new(seed))
    }
}

impl Random for SeededRandom {
    fn next_u64(&self) -> u64 {
        let mut z = self.0.fetch_add(GOLDEN_GAMMA, Ordering::Relaxed).wrapping_add(GOLDEN_GAMMA);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// A UUID version 7: the clock's milliseconds, then the fraction of the millisecond in 12 bits (RFC 9562,
/// section 6.2, method 3), then 62 random bits. Ids of one clock sort by the time they were made.
#[must_use]
pub fn uuid_v7(clock: &dyn Clock, random: &dyn Random) -> Uuid {
    let now_us = clock.now_us();
    let fraction = ((now_us % 1_000) * 4_096 / 1_000) as u16;
    let mut rest = [0; 10];
    rest[..2].copy_from_slice(&fraction.to_be_bytes());
    rest[2..].copy_from_slice(&random.next_u64().to_be_bytes());
    Builder::from_unix_timestamp_millis(now_us / 1_000, &rest).into_uuid()
}

/// A UUID version 4: 122 random bits.
#[must_use]
pub fn uuid_v4(random: &dyn Random) -> Uuid {
    let bits = (u128::from(random.next_u64()) << 64) | u128::from(random.next_u64());
    Builder::from_random_bytes(bits.to_be_bytes()).into_uuid()
}

/// A name for a node that was given none: `role`, a hyphen, and 32 random bits as eight hex digits.
#[must_use]
pub fn node_name(role: &str, random: &dyn Random) -> String {
    format!("{role}-{:08x}", random.next_u64() >> 32)
}

/// A number in [0, 1), with 53 random bits.
#[must_use]
pub fn fraction(random: &dyn Random) -> f64 {
    (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
}

/// How long to wait before attempt `attempt` (0 is the first retry): somewhere between zero and
/// `min(cap, base · 2^attempt)`, so that callers which failed together do not come back together.
#[must_use]
pub fn full_jitter(random: &dyn Random, attempt: u32, base: Duration, cap: Duration) -> Duration {
    let factor = 1_u32.checked_shl(attempt).unwrap_or(u32::MAX);
    base.saturating_mul(factor).min(cap).mul_f64(fraction(random))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    #[test]
    fn a_seed_reproduces_its_numbers() {
        let numbers = |seed| -> Vec<u64> {
            let random = SeededRandom::new(seed);
            (0..8).map(|_| random.next_u64()).collect()
        };
        assert_eq!(numbers(7), numbers(7));
        assert_ne!(numbers(7), numbers(8));
        // The first output of SplitMix64 for seed 0, as published with the algorithm.
        assert_eq!(numbers(0)[0], 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn ids_sort_by_their_microsecond() {
        let (clock, random) = (ManualClock::new(1_700_000_000_123_456), SeededRandom::new(1));
        let mut last = uuid_v7(&clock, &random);
        assert_eq!(last.get_version_num(), 7);
        for _ in 0..3_000 {
            clock.advance(Duration::from_micros(1));
            let next = uuid_v7(&clock, &random);
            assert!(next > last, "{next} after {last}");
            last = next;
        }
        assert_eq!(uuid_v4(&random).get_version_num(), 4);
        assert_ne!(uuid_v4(&OsRandom), uuid_v4(&OsRandom));
    }

    #[test]
    fn a_node_is_called_by_its_role_and_eight_digits() {
        let name = node_name("edge", &SeededRandom::new(0));
        assert_eq!(name, "edge-e220a839", "the upper half of the first number");
    }

    #[test]
    fn jitter_stays_below_its_ceiling() {
        let random = SeededRandom::new(3);
        let (base, cap) = (Duration::from_millis(100), Duration::from_secs(5));
        for attempt in [0, 1, 5, 31, 32, u32::MAX] {
            for _ in 0..100 {
                let wait = full_jitter(&random, attempt, base, cap);
                assert!(wait <= cap.min(base.saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX))));
            }
        }
        assert!((0..1_000).map(|_| fraction(&random)).all(|f| (0.0..1.0).contains(&f)));
    }
}
