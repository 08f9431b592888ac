//! Which part of an inbox is settled: everything up to a mark, and a bounded number of ranges above it.

use super::MAX_SETTLED_RANGES;

/// The settled part of an inbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settled {
    mark: u64,
    /// Inclusive, ascending, none touching another or the mark.
    ranges: Vec<(u64, u64)>,
}

/// Settling this would need more than [`MAX_SETTLED_RANGES`] ranges above the mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooManyRanges;

impl Settled {
    /// Rebuilds what [`Settled::mark`] and [`Settled::ranges`] gave.
    #[must_use]
    pub fn new(mark: u64, ranges: Vec<(u64, u64)>) -> Self {
        Self { mark, ranges }
    }

    /// Everything up to it is settled.
    #[must_use]
    pub fn mark(&self) -> u64 {
        self.mark
    }

    /// The settled ranges above the mark, inclusive and ascending.
    #[must_use]
    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }

    /// Whether a seq is settled.
    #[must_use]
    pub fn holds(&self, seq: u64) -> bool {
        seq <= self.mark || self.ranges.iter().any(|&(from, to)| (from..=to).contains(&seq))
    }

    /// Settles `from..=to` and returns the parts of it that were not settled before, ascending.
    ///
    /// # Errors
    /// When the ranges above the mark would be too many; nothing is settled then.
    pub fn settle(&mut self, from: u64, to: u64) -> Result<Vec<(u64, u64)>, TooManyRanges> {
        // No seq comes near the largest number, and without it nothing below overflows.
        let (from, to) = (from.max(self.mark + 1), to.min(u64::MAX - 1));
        if from > to {
            return Ok(Vec::new());
        }
        let (mut fresh, mut merged) = (Vec::new(), Vec::with_capacity(self.ranges.len() + 1));
        let (mut low, mut high, mut next, mut placed) = (from, to, from, false);
        for &(start, end) in &self.ranges {
            if end + 1 < from {
                merged.push((start, end));
            } else if start > to + 1 {
                if !placed {
                    merged.push((low, high));
                    placed = true;
                }
                merged.push((start, end));
            } else {
                // Touches or overlaps: what lies before it is new, and it becomes part of the one range.
                if next < start {
                    fresh.push((next, (start - 1).min(to)));
                }
                next = next.max(end + 1);
                (low, high) = (low.min(start), high.max(end));
            }
        }
        if !placed {
            let at = merged.partition_point(|&(start, _)| start < low);
            merged.insert(at, (low, high));
        }
        if next <= to {
            fresh.push((next, to));
        }
        let mark = match merged.first() {
            Some(&(start, end)) if start == self.mark + 1 => {
                merged.remove(0);
                end
            }
            _ => self.mark,
        };
        if merged.len() > MAX_SETTLED_RANGES {
            return Err(TooManyRanges);
        }
        (self.mark, self.ranges) = (mark, merged);
        Ok(fresh)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn settling_agrees_with_a_set(operations in prop::collection::vec((1u64..80, 0u64..12), 1..60)) {
            let (mut settled, mut model) = (Settled::default(), BTreeSet::new());
            for (from, length) in operations {
                let fresh = settled.settle(from, from + length).unwrap();
                let expected: Vec<u64> = (from..=from + length).filter(|seq| model.insert(*seq)).collect();
                let got: Vec<u64> = fresh.iter().flat_map(|&(from, to)| from..=to).collect();
                prop_assert_eq!(got, expected);
                let all: BTreeSet<u64> = (1..=settled.mark())
                    .chain(settled.ranges().iter().flat_map(|&(from, to)| from..=to))
                    .collect();
                prop_assert_eq!(&all, &model);
                prop_assert!((1..100).all(|seq| settled.holds(seq) == model.contains(&seq)));
                let mut before = settled.mark();
                for &(from, to) in settled.ranges() {
                    prop_assert!(from > before + 1 && to >= from);
                    before = to;
                }
            }
        }
    }

    #[test]
    fn too_many_ranges_are_refused_whole() {
        let mut settled = Settled::default();
        for n in 1..=MAX_SETTLED_RANGES as u64 {
            settled.settle(n * 2, n * 2).unwrap();
        }
        let before = settled.clone();
        let beyond = MAX_SETTLED_RANGES as u64 * 2 + 2;
        assert_eq!(settled.settle(beyond, beyond), Err(TooManyRanges));
        assert_eq!(settled, before);
        // One that joins the mark makes room.
        assert_eq!(settled.settle(1, 1), Ok(vec![(1, 1)]));
        assert_eq!(settled.mark(), 2);
        assert_eq!(settled.settle(beyond, beyond), Ok(vec![(beyond, beyond)]));
    }

    #[test]
    fn extreme_bounds_do_not_overflow() {
        let mut settled = Settled::default();
        assert_eq!(settled.settle(2, u64::MAX), Ok(vec![(2, u64::MAX - 1)]));
        assert_eq!(settled.settle(1, u64::MAX), Ok(vec![(1, 1)]));
        assert_eq!(settled.settle(1, u64::MAX), Ok(vec![]));
    }
}
