//! Compares what an inbox holds with what it says: every number that was given out and is not settled has a body, and
//! nothing else has one.

use super::Settled;

/// Most seqs that a finding names.
const MAX_NAMED: usize = 16;

/// Most bodies that one page looks at before it ends early; an inbox is always looked at as a whole.
pub(super) const MAX_AUDITED_BODIES: usize = 100_000;

/// What the audit saw of some inboxes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AuditPage {
    /// How many inboxes it looked at.
    pub inboxes: usize,
    /// Those whose bodies do not fit what they say.
    pub findings: Vec<Finding>,
    /// Where to go on; `None` after the last inbox.
    pub next: Option<String>,
}

/// An inbox whose bodies do not fit what it says. Names the inbox by its epoch, because this gets into logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Of the inbox.
    pub epoch: u64,
    /// The newest number that was given out.
    pub head: u64,
    /// Unsettled messages without a body.
    pub missing: u64,
    /// Bodies that belong to no unsettled message.
    pub excess: u64,
    /// The first seqs of both.
    pub seqs: Vec<u64>,
}

impl Finding {
    /// How many messages it is about.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.missing + self.excess
    }
}

/// Compares an inbox with the seqs of its bodies, which ascend; the same one may come twice.
pub(super) fn compare(
    epoch: u64,
    head: u64,
    settled: &Settled,
    bodies: impl IntoIterator<Item = u64>,
) -> Option<Finding> {
    let mut finding = Finding { epoch, head, missing: 0, excess: 0, seqs: Vec::new() };
    let mut bodies = bodies.into_iter().peekable();
    for (from, to) in unsettled(settled, head) {
        let mut next = from;
        while let Some(seq) = bodies.next_if(|seq| *seq <= to) {
            if seq < from {
                finding.excess(seq);
            } else if seq >= next {
                finding.missing(next, seq);
                next = seq + 1;
            }
        }
        finding.missing(next, to + 1);
    }
    bodies.for_each(|seq| finding.excess(seq));
    (finding.messages() > 0).then_some(finding)
}

impl Finding {
    fn excess(&mut self, seq: u64) {
        self.excess += 1;
        if self.seqs.len() < MAX_NAMED {
            self.seqs.push(seq);
        }
    }

    /// `from..to` have no body.
    fn missing(&mut self, from: u64, to: u64) {
        self.missing += to - from;
        let room = MAX_NAMED - self.seqs.len();
        self.seqs.extend((from..to).take(room));
    }
}

/// The ranges, inclusive and ascending, of what is not settled up to the head.
fn unsettled(settled: &Settled, head: u64) -> Vec<(u64, u64)> {
    let mut open = Vec::with_capacity(settled.ranges().len() + 1);
    let mut next = settled.mark() + 1;
    for &(from, to) in settled.ranges() {
        open.push((next, (from - 1).min(head)));
        next = to + 1;
    }
    open.push((next, head));
    open.retain(|(from, to)| from <= to);
    open
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_whole_inbox_has_no_finding() {
        let settled = Settled::new(2, vec![(4, 5), (8, 8)]);
        assert_eq!(compare(7, 10, &settled, [3, 6, 7, 9, 10]), None);
        assert_eq!(compare(7, 10, &settled, [3, 3, 6, 7, 9, 9, 10]), None);
        assert_eq!(compare(7, 0, &Settled::default(), []), None);
    }

    #[test]
    fn what_is_missing_and_what_is_too_much_is_named() {
        let settled = Settled::new(2, vec![(4, 5), (8, 8)]);
        let finding = compare(7, 10, &settled, [1, 3, 5, 7, 10, 11]).unwrap();
        let expected = Finding { epoch: 7, head: 10, missing: 2, excess: 3, seqs: vec![1, 5, 6, 9, 11] };
        assert_eq!(finding, expected);
        let finding = compare(7, 1_000_000, &Settled::default(), []).unwrap();
        assert_eq!((finding.missing, finding.seqs.len()), (1_000_000, MAX_NAMED));
    }

    proptest! {
        #[test]
        fn agrees_with_sets(
            head in 0_u64..30,
            acks in prop::collection::vec((1_u64..30, 0_u64..4), 0..6),
            bodies in prop::collection::btree_set(1_u64..34, 0..30),
        ) {
            let mut settled = Settled::default();
            for (from, length) in acks {
                settled.settle(from, (from + length).min(head)).unwrap();
            }
            let open: std::collections::BTreeSet<u64> = (1..=head).filter(|seq| !settled.holds(*seq)).collect();
            let found = compare(1, head, &settled, bodies.iter().copied());
            let counts = found.map_or((0, 0), |found| (found.missing, found.excess));
            let expected = (open.difference(&bodies).count(), bodies.difference(&open).count());
            prop_assert_eq!(counts, (expected.0 as u64, expected.1 as u64));
        }
    }
}
