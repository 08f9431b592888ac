//! What every result has in common.

use serde::Serialize;

use super::problems::Problem;

/// A result. Its serialization is the JSON that `docs/benchmarks.md` describes.
pub(super) trait Report: Serialize {
    /// The same for people.
    fn lines(&self) -> Vec<String>;

    /// Whether the run counts.
    ///
    /// # Errors
    /// Says what was lost or failed.
    fn verdict(&self) -> anyhow::Result<()>;
}

/// How well the schedule was kept.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Rate {
    /// Per second; `None` in a closed loop.
    pub(super) asked: Option<f64>,
    /// Per second, over the measured time.
    pub(super) reached: f64,
}

/// What the load was ahead of: of this process, and of the server.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Backlog {
    /// Due and not sent, at the worst moment.
    pub(super) max_unsent: u64,
    /// Due and not sent at the end of the time; never sent.
    pub(super) unsent: u64,
    /// Accepted and not received, once the last answer was there.
    pub(super) undelivered: u64,
}

/// A run that ends with more than this part of its deliveries under way was too fast for the server.
const MAX_UNDELIVERED: f64 = 0.05;

impl Backlog {
    /// Whether the queues stood still: everything was sent, and nearly all of what was `expected` had arrived.
    pub(super) fn is_sustained(&self, expected: u64) -> bool {
        self.unsent == 0 && self.undelivered as f64 <= expected as f64 * MAX_UNDELIVERED
    }
}

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.asked {
            Some(asked) => write!(f, "asked {asked:.1}/s, reached {:.1}/s", self.reached),
            None => write!(f, "reached {:.1}/s", self.reached),
        }
    }
}

impl std::fmt::Display for Backlog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { max_unsent, unsent, undelivered } = self;
        write!(f, "unsent at most {max_unsent}, at the end {unsent}; undelivered at the end {undelivered}")
    }
}

/// Adds a line when the rate was too high, and one for each problem.
pub(super) fn conclude(sustained: bool, problems: &[Problem], lines: &mut Vec<String>) {
    if !sustained {
        lines.push("overload   the rate was not sustained: latencies are those of growing queues".to_owned());
    }
    lines.extend(problems.iter().map(|problem| format!("problem    {} x {}", problem.count, problem.text)));
}

/// A count over a time in seconds; 0 when there was no time.
pub(super) fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { (count as f64 / seconds * 10.0).round() / 10.0 } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growing_queues_are_told_from_standing_ones() {
        let backlog = Backlog { max_unsent: 40, unsent: 0, undelivered: 50 };
        assert!(backlog.is_sustained(1_000));
        assert!(!backlog.is_sustained(999));
        assert!(!Backlog { unsent: 1, ..backlog }.is_sustained(1_000));
        assert!(Backlog::default().is_sustained(0));
    }

    #[test]
    fn a_rate_needs_time() {
        assert!((per_second(5, 0.0)).abs() < f64::EPSILON);
        assert!((per_second(15, 2.0) - 7.5).abs() < f64::EPSILON);
    }
}
