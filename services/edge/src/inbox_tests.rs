use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// The log of one inbox as delivery keeps it.
#[derive(Default)]
struct Log {
    head: u64,
    settled: BTreeSet<u64>,
    /// The newest delivery of what has failed, and whether it waits for its next attempt.
    attempts: BTreeMap<u64, (u32, bool)>,
}

impl Log {
    fn delivery(&self, seq: u64) -> u32 {
        self.attempts.get(&seq).map_or(1, |(delivery, _)| *delivery)
    }

    fn waits(&self, seq: u64) -> bool {
        self.attempts.get(&seq).is_some_and(|(_, waits)| *waits)
    }

    /// A delivery failed: another follows, unless this one is not the newest.
    fn fail(&mut self, seq: u64, delivery: u32) {
        if seq <= self.head
            && !self.settled.contains(&seq)
            && !self.waits(seq)
            && self.delivery(seq) == delivery
        {
            self.attempts.insert(seq, (delivery, true));
        }
    }

    /// Hands out what waits for its next attempt.
    fn claim(&mut self) -> Vec<u64> {
        let waits =
            self.attempts.iter_mut().filter(|(seq, (_, waits))| *waits && !self.settled.contains(seq));
        waits
            .map(|(seq, (delivery, waits))| {
                (*delivery, *waits) = (*delivery + 1, false);
                *seq
            })
            .collect()
    }

    fn message(&self, seq: u64) -> InboxMessage {
        InboxMessage { delivery: self.delivery(seq), ..message(seq) }
    }

    fn mark(&self) -> u64 {
        (1..=self.head).find(|seq| !self.settled.contains(seq)).unwrap_or(self.head + 1) - 1
    }

    fn page(&self, after: Option<u64>, limit: u32) -> InboxPage {
        let after = after.unwrap_or_else(|| self.mark());
        let unsettled =
            (after + 1..=self.head).filter(|seq| !self.settled.contains(seq) && !self.waits(*seq));
        let unsettled: Vec<u64> = unsettled.collect();
        let taken: Vec<u64> = unsettled.iter().copied().take(limit as usize).collect();
        let covers = if taken.len() == unsettled.len() {
            self.head.max(after)
        } else {
            taken.last().copied().unwrap_or(after)
        };
        let messages = taken.into_iter().map(|seq| self.message(seq)).collect();
        InboxPage { epoch: 7, mark: self.mark(), head: self.head, covers, messages, error: None }
    }
}

fn log(head: u64) -> Log {
    Log { head, ..Log::default() }
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
    /// The client gives its oldest, or its newest, message in flight back.
    Nak {
        newest: bool,
    },
    /// The client lets everything time out.
    Late,
    /// Another connection fails at what it was sent of a seq.
    FailElsewhere(u8),
    /// The next attempts are due; their hints are lost, or arrive after this many other events.
    Due(Option<u8>),
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
        2 => any::<bool>().prop_map(|newest| Event::Nak { newest }),
        1 => Just(Event::Late),
        1 => any::<u8>().prop_map(Event::FailElsewhere),
        2 => prop::option::of(0..4u8).prop_map(Event::Due),
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
    hints: Vec<(u8, InboxMessage)>,
    read: Option<(Option<u64>, u32)>,
    armed: bool,
    /// What was pushed, in order, with its delivery.
    pushed: Vec<(u64, u32)>,
    /// What is in flight, with its delivery.
    unacked: BTreeMap<u64, u32>,
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
            unacked: BTreeMap::new(),
            credit,
        };
        world.step(Cursor::resync);
        world
    }

    fn step(&mut self, call: impl FnOnce(&mut Cursor, &mut Vec<Step>)) {
        let mut steps = Vec::new();
        call(&mut self.cursor, &mut steps);
        let pushes = steps.iter().filter(|step| matches!(step, Step::Push(_))).count();
        self.cursor.on_handed(pushes as u64, Written::Until(1));
        for step in steps {
            match step {
                Step::Push(message) => {
                    self.check_push(message.seq, message.delivery);
                    self.pushed.push((message.seq, message.delivery));
                    self.unacked.insert(message.seq, message.delivery);
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

    /// A message comes once for each delivery, and in order unless it had failed.
    fn check_push(&self, seq: u64, delivery: u32) {
        let before =
            self.pushed.iter().filter(|(other, _)| *other == seq).map(|(_, delivery)| *delivery).max();
        assert!(before.is_none_or(|before| before < delivery), "{delivery} of {seq} after {before:?}");
        let last = self.pushed.iter().map(|(seq, _)| *seq).max().unwrap_or_default();
        assert!(delivery > 1 || seq > last, "{seq} for the first time after {last}");
    }

    fn pick(&self, newest: bool) -> Option<(u64, u32)> {
        let picked = if newest { self.unacked.last_key_value() } else { self.unacked.first_key_value() };
        picked.map(|(seq, delivery)| (*seq, *delivery))
    }

    fn apply(&mut self, event: Event) {
        match event {
            Event::Commit(delay) => {
                self.log.head += 1;
                self.hints.extend(delay.map(|delay| (delay, message(self.log.head))));
            }
            Event::Ack { newest } => {
                if let Some((seq, _)) = self.pick(newest) {
                    self.unacked.remove(&seq);
                    self.step(|cursor, steps| {
                        assert_eq!(cursor.on_ack(&[(seq, seq)], steps), [(seq, seq)]);
                    });
                    self.log.settled.insert(seq);
                }
            }
            Event::Nak { newest } => {
                if let Some((seq, delivery)) = self.pick(newest) {
                    self.unacked.remove(&seq);
                    self.step(|cursor, steps| {
                        assert_eq!(
                            cursor.on_failed(seq, delivery + 1, &mut Vec::new()),
                            Err(Stale::Other(delivery))
                        );
                        assert_eq!(cursor.on_failed(seq, delivery, steps), Ok(()));
                        assert!(
                            cursor.on_failed(seq, delivery, &mut Vec::new()).is_err(),
                            "it failed already"
                        );
                    });
                    self.log.fail(seq, delivery);
                }
            }
            Event::Late => {
                let mut overdue = Vec::new();
                let expected: Vec<_> = std::mem::take(&mut self.unacked).into_iter().collect();
                self.step(|cursor, steps| {
                    assert_eq!(cursor.on_overdue(0, steps), []);
                    overdue = cursor.on_overdue(1, steps);
                });
                overdue.sort_unstable();
                assert_eq!(overdue, expected);
                overdue.into_iter().for_each(|(seq, delivery)| self.log.fail(seq, delivery));
            }
            Event::FailElsewhere(n) if self.log.head > 0 => {
                let seq = u64::from(n) % self.log.head + 1;
                self.log.fail(seq, self.log.delivery(seq));
            }
            Event::FailElsewhere(_) => {}
            Event::Due(delay) => {
                let due = self.log.claim();
                let hints = due.into_iter().map(|seq| self.log.message(seq));
                self.hints
                    .extend(delay.into_iter().flat_map(|delay| hints.clone().map(move |hint| (delay, hint))));
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
        let due: Vec<_> = self.hints.extract_if(.., |(delay, _)| *delay == 0).map(|(_, hint)| hint).collect();
        self.hints.iter_mut().for_each(|(delay, _)| *delay -= 1);
        for hint in due {
            self.step(|cursor, steps| cursor.on_hint(7, hint, steps));
        }
    }

    /// What delivery does for messages that no edge reported: it relays them again; and the client acks.
    fn settle_down(&mut self) {
        for _ in 0..2_000 {
            self.apply(Event::Answer { fails: false });
            self.apply(Event::Timer);
            self.apply(Event::Ack { newest: false });
            self.apply(Event::Due(None));
            let unsettled = (1..=self.log.head).filter(|seq| !self.log.settled.contains(seq));
            let hints: Vec<_> = unsettled.map(|seq| self.log.message(seq)).collect();
            for hint in hints {
                self.step(|cursor, steps| cursor.on_hint(7, hint, steps));
            }
        }
    }
}

proptest! {
    #[test]
    fn each_delivery_is_pushed_once_until_all_is_acked(events in events(), credit in 1..6u32) {
        let mut world = World::new(credit);
        events.into_iter().for_each(|event| world.apply(event));
        world.settle_down();
        for seq in 1..=world.log.head {
            prop_assert!(world.log.settled.contains(&seq), "{} was lost: {:?}", seq, world.pushed);
        }
        prop_assert!(!world.cursor.has_in_flight());
    }
}

#[test]
fn a_hint_is_pushed_at_once_when_it_is_next() {
    let mut world = World::new(4);
    world.apply(Event::Answer { fails: false });
    world.apply(Event::Commit(Some(0)));
    assert_eq!(world.pushed, [(1, 1)]);
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
    cursor.on_page(log(3).page(None, 4), &mut steps);
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
    cursor.on_page(log(5).page(None, 2), &mut steps);
    assert_eq!(cursor.on_ack(&[(1, 100), (4, 5)], &mut steps), [(1, 2)]);
}

#[test]
fn a_redelivery_is_pushed_again_while_it_is_not_acked() {
    let mut cursor = Cursor::new(2);
    let mut steps = Vec::new();
    cursor.resync(&mut steps);
    cursor.on_page(log(1).page(None, 2), &mut steps);
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
    cursor.on_page(log(10).page(None, 8), &mut steps);
    steps.clear();
    cursor.on_ack(&[(1, 1)], &mut steps);
    assert_eq!(steps, [Step::Arm(REORDER_WAIT)]);
    steps.clear();
    cursor.on_timer(&mut steps);
    assert_eq!(steps, [Step::Read { after: Some(8), limit: 1 }]);
}

/// A cursor with a credit that was sent everything of an inbox.
fn sent(head: u64, credit: u32) -> (Cursor, Vec<Step>) {
    let (mut cursor, mut steps) = (Cursor::new(credit), Vec::new());
    cursor.resync(&mut steps);
    cursor.on_page(log(head).page(None, credit), &mut steps);
    cursor.on_handed(head, Written::Until(5));
    steps.clear();
    (cursor, steps)
}

#[test]
fn what_failed_frees_its_credit_and_can_still_be_acked() {
    let (mut cursor, mut steps) = sent(2, 2);
    cursor.on_hint(7, message(3), &mut steps);
    assert_eq!(steps, [], "no room");
    assert_eq!(cursor.on_failed(1, 1, &mut steps), Ok(()));
    assert_eq!(steps, [Step::Read { after: Some(2), limit: 1 }]);
    assert_eq!(cursor.on_failed(1, 1, &mut steps), Err(Stale::Failed(1)));
    assert_eq!(cursor.on_failed(3, 1, &mut steps), Err(Stale::NotSent));
    assert_eq!(cursor.on_ack(&[(1, 1)], &mut steps), [(1, 1)], "the ack wins");
    assert_eq!(cursor.on_failed(1, 1, &mut steps), Err(Stale::NotInFlight));
    steps.clear();
    cursor.on_hint(7, InboxMessage { delivery: 2, ..message(1) }, &mut steps);
    assert_eq!(steps, [], "a hint that comes behind the ack");
}

#[test]
fn a_delivery_that_comes_behind_its_ack_is_not_pushed_wherever_the_newest_acks_are() {
    let (mut cursor, mut steps) = sent(6, 6);
    cursor.on_ack(&[(5, 6)], &mut steps);
    for seq in [2, 3] {
        assert_eq!(cursor.on_failed(seq, 1, &mut steps), Ok(()));
    }
    let hint = |delivery, seq| InboxMessage { delivery, ..message(seq) };
    steps.clear();
    cursor.on_hint(7, hint(2, 2), &mut steps);
    assert_eq!(steps, [Step::Push(hint(2, 2))]);
    // One while its second delivery is in flight, the other before that comes.
    cursor.on_ack(&[(2, 2)], &mut steps);
    cursor.on_ack(&[(3, 3)], &mut steps);
    steps.clear();
    for late in [hint(2, 2), hint(3, 2), hint(2, 3)] {
        cursor.on_hint(7, late, &mut steps);
    }
    assert_eq!(steps, []);
    assert!(cursor.has_in_flight(), "1 and 4");
}

#[test]
fn a_deadline_begins_anew_for_what_is_worked_on() {
    let (mut cursor, mut steps) = sent(3, 3);
    assert_eq!(cursor.next_due(), Some(5));
    assert_eq!(cursor.on_working(2, 1, 9), Ok(()));
    assert_eq!(cursor.on_working(2, 2, 90), Err(Stale::Other(1)));
    assert_eq!(cursor.on_overdue(5, &mut steps), [(1, 1), (3, 1)]);
    assert_eq!(cursor.next_due(), Some(9));
    assert_eq!(cursor.on_working(1, 1, 90), Err(Stale::Failed(1)));
    assert_eq!(cursor.on_overdue(9, &mut steps), [(2, 1)]);
    assert_eq!((cursor.next_due(), cursor.has_in_flight()), (None, false));
}

#[test]
fn a_delivery_without_room_is_read_as_soon_as_there_is_some() {
    let (mut cursor, mut steps) = sent(3, 2);
    // Messages 1 and 2 are in flight. The next delivery of 1 finds that 3 took its place.
    assert_eq!(cursor.on_failed(1, 1, &mut steps), Ok(()));
    cursor.on_page(log(3).page(Some(2), 1), &mut steps);
    steps.clear();
    cursor.on_hint(7, InboxMessage { delivery: 2, ..message(1) }, &mut steps);
    assert_eq!(steps, []);
    cursor.on_ack(&[(3, 3)], &mut steps);
    assert_eq!(steps, [Step::Read { after: Some(0), limit: 1 }], "from below it, before anything newer");
    steps.clear();
    let again = InboxMessage { delivery: 2, ..message(1) };
    let messages = vec![again.clone()];
    cursor.on_page(InboxPage { epoch: 7, mark: 0, head: 3, covers: 1, messages, error: None }, &mut steps);
    assert_eq!(steps, [Step::Push(again)]);
}

#[test]
fn what_was_settled_elsewhere_is_not_in_flight_any_more() {
    let (mut cursor, mut steps) = (Cursor::new(4), Vec::new());
    cursor.resync(&mut steps);
    cursor.on_page(log(6).page(None, 4), &mut steps);
    assert_eq!((cursor.last(), cursor.has_in_flight()), (4, true));
    cursor.on_ack(&[(2, 2)], &mut steps);
    steps.clear();
    assert_eq!(cursor.on_settled(8, &[(1, 4)], &mut steps), [], "of another inbox");
    // 2 was answered here, and 5 was not sent.
    assert_eq!(cursor.on_settled(7, &[(1, 3), (5, 5)], &mut steps), [(1, 1), (3, 3)]);
    assert_eq!(cursor.on_settled(7, &[(1, 3)], &mut steps), [], "once");
    assert_eq!(steps, [Step::Read { after: Some(4), limit: 3 }], "its room is free");
    let steps = &mut Vec::new();
    assert_eq!(cursor.on_failed(3, 1, steps), Err(Stale::NotInFlight));
    cursor.on_page(log(6).page(Some(4), 3), &mut Vec::new());
    assert_eq!(cursor.on_settled(7, &[(4, 6)], steps), [(4, 6)]);
    assert!(!cursor.has_in_flight());
}

#[test]
fn a_late_delivery_of_what_was_settled_elsewhere_is_not_pushed() {
    let (mut cursor, mut steps) = (Cursor::new(4), Vec::new());
    cursor.resync(&mut steps);
    cursor.on_page(log(2).page(None, 4), &mut steps);
    cursor.on_failed(1, 1, &mut steps).unwrap();
    assert_eq!(cursor.on_settled(7, &[(1, 1)], &mut steps), [], "it was given back");
    cursor.on_hint(7, InboxMessage { delivery: 2, ..message(2) }, &mut steps);
    assert_eq!(cursor.on_settled(7, &[(2, 2)], &mut steps), [(2, 2)]);
    steps.clear();
    for seq in [1, 2] {
        cursor.on_hint(7, InboxMessage { delivery: 3, ..message(seq) }, &mut steps);
    }
    assert_eq!(steps, []);
}
