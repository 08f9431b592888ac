use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

/// The log of one inbox as delivery keeps it.
#[derive(Default)]
struct Log {
    head: u64,
    settled: BTreeSet<u64>,
}

impl Log {
    fn mark(&self) -> u64 {
        (1..=self.head).find(|seq| !self.settled.contains(seq)).unwrap_or(self.head + 1) - 1
    }

    fn page(&self, after: Option<u64>, limit: u32) -> InboxPage {
        let after = after.unwrap_or_else(|| self.mark());
        let unsettled: Vec<u64> = (after + 1..=self.head).filter(|seq| !self.settled.contains(seq)).collect();
        let taken: Vec<u64> = unsettled.iter().copied().take(limit as usize).collect();
        let covers = if taken.len() == unsettled.len() {
            self.head.max(after)
        } else {
            taken.last().copied().unwrap_or(after)
        };
        let messages = taken.into_iter().map(message).collect();
        InboxPage { epoch: 7, mark: self.mark(), head: self.head, covers, messages, error: None }
    }
}

fn message(seq: u64) -> InboxMessage {
    InboxMessage { seq, delivery: 1, ..InboxMessage::default() }
}

#[derive(Debug, Clone)]
enum Event {
    /// A message is committed; its hint is lost, or arrives after this many other events.
    Commit(Option<u8>),
    /// The client acks its oldest, or its newest, message in flight.
    Ack {
        newest: bool,
    },
    /// Another device settles a seq.
    SettleElsewhere(u8),
    /// The read under way is answered, or fails.
    Answer {
        fails: bool,
    },
    Timer,
    Resync,
    Credit(u8),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        4 => prop::option::of(0..4u8).prop_map(Event::Commit),
        3 => any::<bool>().prop_map(|newest| Event::Ack { newest }),
        1 => any::<u8>().prop_map(Event::SettleElsewhere),
        4 => prop::bool::weighted(0.2).prop_map(|fails| Event::Answer { fails }),
        2 => Just(Event::Timer),
        1 => Just(Event::Resync),
        1 => (1..6u8).prop_map(Event::Credit),
    ];
    prop::collection::vec(event, 0..80)
}

struct World {
    log: Log,
    cursor: Cursor,
    hints: Vec<(u8, u64)>,
    read: Option<(Option<u64>, u32)>,
    armed: bool,
    pushed: Vec<u64>,
    unacked: BTreeSet<u64>,
    credit: u32,
}

impl World {
    fn new(credit: u32) -> Self {
        let mut world = World {
            log: Log::default(),
            cursor: Cursor::new(credit),
            hints: Vec::new(),
            read: None,
            armed: false,
            pushed: Vec::new(),
            unacked: BTreeSet::new(),
            credit,
        };
        world.step(Cursor::resync);
        world
    }

    fn step(&mut self, call: impl FnOnce(&mut Cursor, &mut Vec<Step>)) {
        let mut steps = Vec::new();
        call(&mut self.cursor, &mut steps);
        for step in steps {
            match step {
                Step::Push(message) => {
                    self.pushed.push(message.seq);
                    self.unacked.insert(message.seq);
                    assert!(self.unacked.len() <= self.credit.max(6) as usize, "more in flight than credit");
                }
                Step::Read { after, limit } => {
                    assert!(self.read.replace((after, limit)).is_none(), "one read at a time");
                }
                Step::Arm(_) => assert!(!std::mem::replace(&mut self.armed, true), "one timer at a time"),
                Step::Known(position) => assert_eq!(position.epoch, 7),
            }
        }
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Commit(delay) => {
                self.log.head += 1;
                self.hints.extend(delay.map(|delay| (delay, self.log.head)));
            }
            Event::Ack { newest } => {
                let seq = if newest { self.unacked.last() } else { self.unacked.first() };
                if let Some(seq) = seq.copied() {
                    self.unacked.remove(&seq);
                    self.step(|cursor, steps| {
                        assert_eq!(cursor.on_ack(&[(seq, seq)], steps), [(seq, seq)]);
                    });
                    self.log.settled.insert(seq);
                }
            }
            Event::SettleElsewhere(n) if self.log.head > 0 => {
                self.log.settled.insert(u64::from(n) % self.log.head + 1);
            }
            Event::SettleElsewhere(_) => {}
            Event::Answer { fails } => {
                if let Some((after, limit)) = self.read.take() {
                    let page = self.log.page(after, limit);
                    self.step(|cursor, steps| match fails {
                        true => cursor.on_read_failed(0.5, steps),
                        false => cursor.on_page(page, steps),
                    });
                }
            }
            Event::Timer if std::mem::take(&mut self.armed) => self.step(Cursor::on_timer),
            Event::Timer => {}
            Event::Resync => self.step(Cursor::resync),
            Event::Credit(n) => {
                self.credit = u32::from(n);
                self.step(|cursor, steps| cursor.on_credit(u32::from(n), steps));
            }
        }
        let due: Vec<u64> = self.hints.extract_if(.., |(delay, _)| *delay == 0).map(|(_, seq)| seq).collect();
        self.hints.iter_mut().for_each(|(delay, _)| *delay -= 1);
        for seq in due {
            self.step(|cursor, steps| cursor.on_hint(7, message(seq), steps));
        }
    }

    /// What delivery does for a message that no edge reported: it relays it again; and the client acks.
    fn settle_down(&mut self) {
        for _ in 0..2_000 {
            self.apply(Event::Answer { fails: false });
            self.apply(Event::Timer);
            self.apply(Event::Ack { newest: false });
            if self.log.head > 0 {
                let head = self.log.head;
                self.step(|cursor, steps| cursor.on_hint(7, message(head), steps));
            }
        }
    }
}

proptest! {
    #[test]
    fn everything_is_pushed_once_in_order(events in events(), credit in 1..6u32) {
        let mut world = World::new(credit);
        events.into_iter().for_each(|event| world.apply(event));
        world.settle_down();
        prop_assert!(world.pushed.is_sorted_by(|a, b| a < b), "out of order or twice: {:?}", world.pushed);
        let pushed: BTreeSet<u64> = world.pushed.iter().copied().collect();
        for seq in 1..=world.log.head {
            prop_assert!(pushed.contains(&seq) || world.log.settled.contains(&seq), "{} was lost", seq);
        }
    }
}

#[test]
fn a_hint_is_pushed_at_once_when_it_is_next() {
    let mut world = World::new(4);
    world.apply(Event::Answer { fails: false });
    world.apply(Event::Commit(Some(0)));
    assert_eq!(world.pushed, [1]);
    assert_eq!(world.read, None, "no read was needed");
}

#[test]
fn a_hint_during_the_first_read_is_not_forgotten() {
    let mut cursor = Cursor::new(4);
    let mut steps = Vec::new();
    cursor.resync(&mut steps);
    let before = Log::default().page(None, 4);
    cursor.on_hint(7, message(1), &mut steps);
    steps.clear();
    cursor.on_page(before.clone(), &mut steps);
    let position = Position { epoch: 7, mark: 0, head: 0 };
    assert_eq!(steps, [Step::Known(position), Step::Read { after: Some(0), limit: 4 }]);
    steps.clear();
    cursor.on_page(before, &mut steps);
    assert_eq!(steps, [], "what the log does not know is not asked for again");
}

#[test]
fn another_epoch_begins_again() {
    let mut cursor = Cursor::new(4);
    let mut steps = Vec::new();
    cursor.resync(&mut steps);
    cursor.on_page(Log { head: 3, settled: BTreeSet::new() }.page(None, 4), &mut steps);
    steps.clear();
    cursor.on_hint(8, message(1), &mut steps);
    assert_eq!(steps, [Step::Read { after: Some(3), limit: 1 }]);
    steps.clear();
    let page = InboxPage { epoch: 8, mark: 0, head: 1, covers: 1, messages: vec![], error: None };
    cursor.on_page(page, &mut steps);
    let position = Position { epoch: 8, mark: 0, head: 1 };
    assert_eq!(steps, [Step::Known(position), Step::Read { after: Some(0), limit: 4 }]);
}

#[test]
fn what_was_not_pushed_cannot_be_acked() {
    let mut cursor = Cursor::new(2);
    let mut steps = Vec::new();
    cursor.resync(&mut steps);
    cursor.on_page(Log { head: 5, settled: BTreeSet::new() }.page(None, 2), &mut steps);
    assert_eq!(cursor.on_ack(&[(1, 100), (4, 5)], &mut steps), [(1, 2)]);
}

#[test]
fn a_redelivery_is_pushed_again_while_it_is_not_acked() {
    let mut cursor = Cursor::new(2);
    let mut steps = Vec::new();
    cursor.resync(&mut steps);
    cursor.on_page(Log { head: 1, settled: BTreeSet::new() }.page(None, 2), &mut steps);
    steps.clear();
    let again = InboxMessage { delivery: 2, ..message(1) };
    cursor.on_hint(7, again.clone(), &mut steps);
    assert_eq!(steps, [Step::Push(again.clone())]);
    steps.clear();
    cursor.on_ack(&[(1, 1)], &mut steps);
    cursor.on_hint(7, again, &mut steps);
    assert_eq!(steps, []);
}

#[test]
fn a_little_room_is_used_after_a_moment() {
    let mut cursor = Cursor::new(8);
    let mut steps = Vec::new();
    cursor.resync(&mut steps);
    cursor.on_page(Log { head: 10, settled: BTreeSet::new() }.page(None, 8), &mut steps);
    steps.clear();
    cursor.on_ack(&[(1, 1)], &mut steps);
    assert_eq!(steps, [Step::Arm(REORDER_WAIT)]);
    steps.clear();
    cursor.on_timer(&mut steps);
    assert_eq!(steps, [Step::Read { after: Some(8), limit: 1 }]);
}
