//! Latencies of many tasks, kept in HDR histograms and summed up as percentiles.

use std::{sync::PoisonError, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;
use std::sync::Mutex;

/// Longest latency that is told apart, in microseconds: longer ones count as this.
const MAX_US: u64 = 600_000_000;

/// Tasks share a histogram, of which each takes a quarter of a megabyte; a few of them keep tasks from waiting for
/// each other.
const PARTS: usize = 8;

/// A recorder that many tasks share. Values are exact to three digits.
#[derive(Debug)]
pub(super) struct Recorder(Vec<Mutex<Histogram<u64>>>);

/// Percentiles in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Latency {
    /// How many were measured; everything else is 0 when none were.
    pub(super) count: u64,
    mean: f64,
    p50: u64,
    p90: u64,
    p99: u64,
    p999: u64,
    pub(super) max: u64,
}

impl Recorder {
    pub(super) fn new() -> Self {
        Self((0..PARTS).map(|_| Mutex::new(histogram())).collect())
    }

    /// Records for task `who`.
    pub(super) fn record(&self, who: usize, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let part = &self.0[who % PARTS];
        part.lock().unwrap_or_else(PoisonError::into_inner).saturating_record(us);
    }

    /// What was recorded so far.
    pub(super) fn summary(&self) -> Latency {
        let mut all = histogram();
        for part in &self.0 {
            let part = part.lock().unwrap_or_else(PoisonError::into_inner);
            all.add(&*part).expect("histograms of one shape can be added");
        }
        if all.is_empty() {
            return Latency::default();
        }
        Latency {
            count: all.len(),
            mean: (all.mean() * 10.0).round() / 10.0,
            p50: all.value_at_quantile(0.5),
            p90: all.value_at_quantile(0.9),
            p99: all.value_at_quantile(0.99),
            p999: all.value_at_quantile(0.999),
            max: all.max(),
        }
    }
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, MAX_US, 3).expect("the bounds are constants that fit")
}

impl std::fmt::Display for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.count == 0 {
            return f.write_str("nothing was measured");
        }
        let ms = |us: u64| us as f64 / 1e3;
        let (p50, p90, p99, p999) = (ms(self.p50), ms(self.p90), ms(self.p99), ms(self.p999));
        let max = ms(self.max);
        write!(f, "p50 {p50:.2} ms, p90 {p90:.2}, p99 {p99:.2}, p99.9 {p999:.2}, max {max:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_cover_all_tasks() {
        let recorder = Recorder::new();
        assert_eq!(recorder.summary(), Latency::default());
        for n in 1..=1_000_u64 {
            recorder.record(n as usize, Duration::from_micros(n));
        }
        let latency = recorder.summary();
        assert_eq!((latency.count, latency.p50, latency.p90, latency.max), (1_000, 500, 900, 1_000));
        assert_eq!((latency.p99, latency.p999), (990, 999));
        assert!((latency.mean - 500.5).abs() < 0.1);
        recorder.record(0, Duration::from_secs(100_000));
        assert!(recorder.summary().max >= MAX_US);
    }
}
