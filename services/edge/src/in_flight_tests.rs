use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// The same without runs: for each message in flight its delivery, and what became of that.
#[derive(Default)]
struct Model {
    in_flight: BTreeMap<u64, (u32, Written, bool)>,
    /// Pushed and not handed to the socket yet, in order.
    waiting: Vec<u64>,
    failed: BTreeMap<u64, u32>,
}

#[derive(Debug, Clone)]
enum Op {
    /// The next so many messages, for the first time.
    Push(u8),
    /// One that was pushed before, again.
    Again(u8),
    /// What was pushed since the last time is handed over in up to two frames, which are written, or wait.
    Hand(u8, Option<u8>),
    Take(u8),
    Settle(u8, u8),
    Fail(u8),
    Extend(u8),
    Overdue,
    Report,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (1..6u8).prop_map(Op::Push),
        2 => any::<u8>().prop_map(Op::Again),
        6 => (0..6u8, prop::option::of(1..200u8)).prop_map(|(first, waits)| Op::Hand(first, waits)),
        3 => (1..250u8).prop_map(Op::Take),
        2 => (any::<u8>(), 0..8u8).prop_map(|(from, more)| Op::Settle(from, more)),
        2 => any::<u8>().prop_map(Op::Fail),
        2 => any::<u8>().prop_map(Op::Extend),
        1 => Just(Op::Overdue),
        1 => Just(Op::Report),
    ];
    prop::collection::vec(op, 0..120)
}

#[derive(Default)]
struct World {
    model: Model,
    real: InFlight,
    head: u64,
    now: Tick,
}

impl World {
    fn pick(&self, n: u8) -> Option<u64> {
        (self.head > 0).then(|| u64::from(n) % self.head + 1)
    }

    fn push(&mut self, seq: u64, delivery: u32) {
        self.model.failed.remove(&seq);
        self.model.waiting.retain(|waiting| *waiting != seq);
        self.model.in_flight.insert(seq, (delivery, Written::Not, delivery == 1));
        self.model.waiting.push(seq);
        self.real.push(seq, delivery);
    }

    fn hand(&mut self, count: usize, written: Written) {
        for seq in self.model.waiting.drain(..count) {
            if let Some(entry) = self.model.in_flight.get_mut(&seq) {
                entry.1 = written;
            }
        }
        self.real.handed(count as u64, written);
    }

    fn settle(&mut self, from: u64, to: u64) {
        self.model.in_flight.retain(|seq, _| *seq < from || *seq > to);
        self.model.failed.retain(|seq, _| *seq < from || *seq > to);
        self.real.settle(from, to);
    }

    fn apply(&mut self, op: Op) {
        self.now += 1;
        // Each turn hands over everything that it pushed, before anything else happens.
        if !matches!(op, Op::Push(_) | Op::Again(_) | Op::Hand(..)) {
            self.hand(self.model.waiting.len(), Written::Until(self.now));
        }
        match op {
            Op::Push(count) => (0..count).for_each(|_| {
                self.head += 1;
                self.push(self.head, 1);
            }),
            Op::Again(n) => {
                let Some(seq) = self.pick(n).filter(|seq| !self.model.waiting.contains(seq)) else { return };
                let newest = self.model.in_flight.get(&seq).map(|entry| entry.0);
                let newest = newest.or(self.model.failed.get(&seq).copied()).unwrap_or(1);
                self.push(seq, newest + 1);
            }
            Op::Hand(first, waits) => {
                let first = usize::from(first).min(self.model.waiting.len());
                self.hand(first, Written::Until(self.now));
                let written = waits.map_or(Written::Until(self.now), |bytes| Written::After(bytes.into()));
                self.hand(self.model.waiting.len(), written);
            }
            Op::Take(bytes) => {
                for (_, written, _) in self.model.in_flight.values_mut() {
                    if let Written::After(left) = *written {
                        *written = match left.checked_sub(bytes.into()) {
                            Some(left) if left > 0 => Written::After(left),
                            _ => Written::Until(self.now),
                        };
                    }
                }
                self.real.taken(bytes.into(), self.now);
            }
            Op::Settle(n, more) => {
                let Some(from) = self.pick(n) else { return };
                self.settle(from, from + u64::from(more));
            }
            Op::Fail(n) => {
                let Some(seq) = self.pick(n) else { return };
                if let Some((delivery, ..)) = self.model.in_flight.remove(&seq) {
                    self.model.failed.insert(seq, delivery);
                    self.real.fail(seq, delivery);
                }
            }
            Op::Extend(n) => {
                let Some(seq) = self.pick(n) else { return };
                if let Some((_, written @ Written::Until(_), _)) = self.model.in_flight.get_mut(&seq) {
                    *written = Written::Until(self.now);
                }
                self.real.extend(seq, self.now);
            }
            Op::Overdue => {
                let mut overdue = self.real.overdue(self.now / 2);
                overdue.sort_unstable();
                let until = |written| matches!(written, Written::Until(due) if due <= self.now / 2);
                let expected = self.model.in_flight.iter().filter(|(_, entry)| until(entry.1));
                assert_eq!(overdue, expected.map(|(seq, entry)| (*seq, entry.0)).collect::<Vec<_>>());
            }
            Op::Report => {
                let mut rewritten = self.real.rewritten();
                rewritten.sort_unstable();
                let mut expected = Vec::new();
                for (seq, (delivery, written, reported)) in &mut self.model.in_flight {
                    if matches!(written, Written::Until(_)) && !std::mem::replace(reported, true) {
                        expected.push((*seq, *delivery));
                    }
                }
                assert_eq!(rewritten, expected);
            }
        }
    }

    fn check(&self) {
        let model = &self.model.in_flight;
        assert_eq!(self.real.count(), model.len() as u64);
        for seq in 1..=self.head {
            assert_eq!(self.real.delivery(seq), model.get(&seq).map(|entry| entry.0), "seq {seq}");
            assert_eq!(self.real.failed(seq), self.model.failed.get(&seq).copied(), "seq {seq}");
        }
        let due = model.values().filter_map(|entry| match entry.1 {
            Written::Until(due) => Some(due),
            _ => None,
        });
        assert_eq!(self.real.next_due(), due.min());
        assert_eq!(self.real.is_empty(), model.is_empty() && self.model.failed.is_empty());
    }
}

proptest! {
    #[test]
    fn runs_say_what_single_messages_would(ops in ops()) {
        let mut world = World::default();
        for op in ops {
            world.apply(op);
            world.check();
        }
    }
}

#[test]
fn messages_of_one_moment_are_one_run() {
    let mut in_flight = InFlight::default();
    for seq in 1..=100 {
        in_flight.push(seq, 1);
        in_flight.handed(1, Written::Until(7));
    }
    assert_eq!((in_flight.runs.len(), in_flight.count()), (1, 100));
    in_flight.extend(50, 9);
    assert_eq!((in_flight.runs.len(), in_flight.count()), (3, 100));
    assert_eq!(in_flight.overdue(8).len(), 99);
}

#[test]
fn what_waits_for_the_socket_is_not_overdue() {
    let mut in_flight = InFlight::default();
    in_flight.push(1, 1);
    in_flight.push(2, 1);
    in_flight.handed(1, Written::After(10));
    in_flight.handed(1, Written::After(30));
    assert!(!in_flight.taken(9, 5));
    assert_eq!(in_flight.next_due(), None);
    assert!(in_flight.taken(1, 6));
    assert_eq!((in_flight.next_due(), in_flight.overdue(100)), (Some(6), vec![(1, 1)]));
    assert!(in_flight.taken(20, 7));
    assert_eq!(in_flight.overdue(100), [(1, 1), (2, 1)]);
}

#[test]
fn failed_messages_are_remembered_up_to_a_bound() {
    let mut in_flight = InFlight::default();
    for seq in 1..=300 {
        in_flight.push(seq, 1);
        in_flight.fail(seq, 1);
    }
    assert_eq!((in_flight.failed.len(), in_flight.failed(44), in_flight.failed(45)), (256, None, Some(1)));
}
