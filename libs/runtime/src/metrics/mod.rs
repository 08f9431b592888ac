//! What the metrics of all roles have in common: the buckets of latencies, guards that measure, and the metrics of a
//! process.
//!
//! House rules: base units, names that say them, and never a user, a channel or a message as a label. Every value that
//! a label can have is made when the metric is registered: a series that begins with its first event hides that event
//! from a rate, and the documentation of metrics is made from what is registered.

mod dependencies;
mod process;

use std::time::Duration;

pub use dependencies::Dependencies;
pub use process::ProcessMetrics;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tokio::time::Instant;

/// Upper bounds of latencies in seconds: from 0.25 ms, which a message takes within a machine, to the minute after
/// which nothing is a latency any more.
pub const LATENCY_BUCKETS: [f64; 17] = [
    0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];

/// A histogram of latencies in seconds.
#[must_use]
pub fn latency() -> Histogram {
    Histogram::new(LATENCY_BUCKETS)
}

/// Seconds between two times of the wall clock, both Unix time in microseconds. Clocks of two machines differ: what
/// seems to have taken less than nothing took no time.
#[must_use]
pub fn seconds_between(from_us: u64, to_us: u64) -> f64 {
    Duration::from_micros(to_us.saturating_sub(from_us)).as_secs_f64()
}

/// Measures from its beginning to its end, however that comes.
#[derive(Debug)]
#[must_use = "it measures until it is dropped"]
pub struct Timer {
    histogram: Histogram,
    began: Instant,
}

impl Timer {
    /// Begins now; the histogram is one of seconds.
    pub fn start(histogram: &Histogram) -> Self {
        Self { histogram: histogram.clone(), began: Instant::now() }
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.histogram.observe(self.began.elapsed().as_secs_f64());
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BuildLabels {
    version: &'static str,
    role: &'static str,
}

/// Registers `build_info`: 1 for each role that this process plays.
pub fn register_build_info(
    registry: &mut Registry,
    version: &'static str,
    roles: impl IntoIterator<Item = &'static str>,
) {
    let build = Family::<BuildLabels, Gauge>::default();
    for role in roles {
        build.get_or_create(&BuildLabels { version, role }).set(1);
    }
    registry.register("build_info", "1, with the version of the process and a role that it plays", build);
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text;

    use super::*;

    fn encoded(registry: &Registry) -> String {
        let mut text = String::new();
        text::encode(&mut text, registry).unwrap();
        text
    }

    #[tokio::test(start_paused = true)]
    async fn a_timer_measures_until_it_is_dropped() {
        let (mut registry, histogram) = (Registry::default(), latency());
        registry.register("call_seconds", "A call", histogram.clone());
        let timer = Timer::start(&histogram);
        tokio::time::advance(Duration::from_millis(40)).await;
        assert!(encoded(&registry).contains("call_seconds_count 0"));
        drop(timer);
        let text = encoded(&registry);
        assert!(text.contains("call_seconds_bucket{le=\"0.05\"} 1"), "{text}");
        assert!(text.contains("call_seconds_bucket{le=\"0.025\"} 0"), "{text}");
    }

    #[test]
    fn time_between_two_machines_is_never_negative() {
        assert_eq!(seconds_between(1_000_000, 1_250_000), 0.25);
        assert_eq!(seconds_between(2, 1), 0.0);
    }

    #[test]
    fn a_process_says_what_it_is() {
        let mut registry = Registry::default();
        register_build_info(&mut registry, "1.2.3", ["edge", "router"]);
        let text = encoded(&registry);
        for role in ["edge", "router"] {
            assert!(text.contains(&format!("build_info{{version=\"1.2.3\",role=\"{role}\"}} 1\n")), "{text}");
        }
    }
}
