//! The verdict: a line for each case, and the counts as the last line.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "it is a command")]

use std::path::Path;

use crate::baseline::Baseline;

/// A case fails when it takes more than this part above its baseline.
const TOLERANCE: f64 = 0.05;

const UPDATE: &str = "tests/run gate --record";

/// What became of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Passed,
    /// Within the tolerance only because it became better.
    Better,
    Worse,
    /// The baseline does not know it.
    New,
    /// Only the baseline knows it.
    Gone,
}

impl Verdict {
    fn of(before: Option<f64>, after: Option<f64>) -> Self {
        match (before, after) {
            (None, _) => Self::New,
            (_, None) => Self::Gone,
            (Some(before), Some(after)) if after > before * (1.0 + TOLERANCE) => Self::Worse,
            (Some(before), Some(after)) if after < before * (1.0 - TOLERANCE) => Self::Better,
            _ => Self::Passed,
        }
    }

    fn is_failure(self) -> bool {
        matches!(self, Self::Worse | Self::New | Self::Gone)
    }

    fn advice(self) -> &'static str {
        match self {
            Self::Passed => "",
            Self::Better => "  better: record it",
            Self::Worse => "  WORSE",
            Self::New => "  NOT IN THE BASELINE",
            Self::Gone => "  NOT COUNTED ANY MORE",
        }
    }
}

/// Prints the comparison; says whether no case failed.
pub(crate) fn compare(known: &Baseline, now: &Baseline, wanted: &dyn Fn(&str) -> bool) -> bool {
    let (before, after) = (&known.instructions_per_operation, &now.instructions_per_operation);
    let names = before.keys().chain(after.keys().filter(|name| !before.contains_key(*name)));
    println!("{:24} {:>12} {:>12} {:>8}", "instructions/operation", "baseline", "now", "change");
    let (mut passed, mut failed, mut better) = (0, 0, 0);
    for name in names.filter(|name| wanted(name)) {
        let (before, after) = (before.get(name).copied(), after.get(name).copied());
        let verdict = Verdict::of(before, after);
        let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
        let change = before.zip(after).map(|(before, after)| (after / before - 1.0) * 100.0);
        let change = change.map_or("-".to_owned(), |change| format!("{change:+.1} %"));
        println!("{name:24} {:>12} {:>12} {change:>8}{}", number(before), number(after), verdict.advice());
        match verdict {
            Verdict::Better => better += 1,
            _ if verdict.is_failure() => failed += 1,
            _ => {}
        }
        passed += u32::from(!verdict.is_failure());
    }
    if known.circumstances != now.circumstances {
        println!("the baseline was recorded elsewhere, which may explain a change of all cases:");
        println!("  baseline: {:?}\n  now:      {:?}", known.circumstances, now.circumstances);
    }
    if failed > 0 {
        println!(
            "a case failed: when the cost is meant, record it with `{UPDATE}` and say in the commit what it buys"
        );
    }
    if better > 0 {
        println!("a case became more than {:.0} % better: keep it with `{UPDATE}`", TOLERANCE * 100.0);
    }
    println!("{passed} passed, {failed} failed");
    failed == 0 && passed > 0
}

/// Prints what was recorded.
pub(crate) fn recorded(now: &Baseline, path: &Path) {
    for (name, each) in &now.instructions_per_operation {
        println!("{name:24} {each:>12.1} instructions per operation");
    }
    println!("recorded in {}; commit it", path.display());
    println!("{} passed, 0 failed", now.instructions_per_operation.len());
}

/// Prints an error as a failed run.
pub(crate) fn error(error: &anyhow::Error) {
    eprintln!("error: {error:#}");
    println!("0 passed, 1 failed");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_per_cent_are_tolerated() {
        let verdict = |after| Verdict::of(Some(100.0), after);
        assert_eq!(verdict(Some(105.0)), Verdict::Passed);
        assert_eq!(verdict(Some(95.0)), Verdict::Passed);
        assert_eq!(verdict(Some(105.1)), Verdict::Worse);
        assert_eq!(verdict(Some(94.9)), Verdict::Better);
        assert_eq!(verdict(None), Verdict::Gone);
        assert_eq!(Verdict::of(None, Some(1.0)), Verdict::New);
        assert!(!Verdict::Better.is_failure() && Verdict::Gone.is_failure());
    }
}
