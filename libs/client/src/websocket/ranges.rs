//! Sets of inbox seqs as sorted, disjoint, inclusive ranges.

use serde::{Deserialize, Serialize};

/// Sorted, disjoint ranges that do not touch.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn as_slice(&self) -> &[(u64, u64)] {
        &self.0
    }

    pub(crate) fn last(&self) -> Option<u64> {
        self.0.last().map(|&(_, to)| to)
    }

    pub(crate) fn contains(&self, seq: u64) -> bool {
        let next = self.0.partition_point(|&(from, _)| from <= seq);
        next > 0 && seq <= self.0[next - 1].1
    }

    /// Adds `from..=to` and joins what it touches.
    pub(crate) fn insert(&mut self, from: u64, to: u64) {
        let first = self.0.partition_point(|&(_, end)| end.saturating_add(1) < from);
        let after = self.0.partition_point(|&(start, _)| start <= to.saturating_add(1));
        let joined = self.0[first..after].iter().fold((from, to), |(a, b), &(c, d)| (a.min(c), b.max(d)));
        self.0.splice(first..after, [joined]);
    }

    /// Removes every seq up to and including `seq`.
    pub(crate) fn remove_up_to(&mut self, seq: u64) {
        self.0.retain(|&(_, to)| to > seq);
        if let Some((from, _)) = self.0.first_mut() {
            *from = (*from).max(seq + 1);
        }
    }

    /// Takes the first `most` ranges.
    pub(crate) fn take(&mut self, most: usize) -> Vec<(u64, u64)> {
        self.0.drain(..most.min(self.0.len())).collect()
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Whether the ranges are what this type promises; for what was read from a file.
    pub(crate) fn is_valid(&self) -> bool {
        self.0.iter().all(|(from, to)| *from > 0 && from <= to && *to < u64::MAX)
            && self.0.windows(2).all(|pair| pair[0].1 + 1 < pair[1].0)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_are_a_set(
            inserts in prop::collection::vec((1_u64..60, 0_u64..6), 0..40),
            cut in 0_u64..70,
        ) {
            let (mut ranges, mut model) = (Ranges::default(), BTreeSet::new());
            for (from, length) in inserts {
                ranges.insert(from, from + length);
                model.extend(from..=from + length);
                prop_assert!(ranges.is_valid());
            }
            let members = |ranges: &Ranges| (0..100).filter(|&seq| ranges.contains(seq)).collect::<Vec<_>>();
            prop_assert_eq!(members(&ranges), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(ranges.last(), model.last().copied());
            ranges.remove_up_to(cut);
            model.retain(|&seq| seq > cut);
            prop_assert_eq!(members(&ranges), model.iter().copied().collect::<Vec<_>>());
            prop_assert!(ranges.is_valid());
        }
    }
}
