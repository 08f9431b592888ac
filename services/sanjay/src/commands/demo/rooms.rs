//! The books about channel messages: who was in the room when one was published receives it, or is told that
//! messages up to there were missed.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use tokio::time::Instant;

/// How long an accepted message may take before it counts as lost.
const OVERDUE: Duration = Duration::from_secs(30);

/// Epochs that a person remembers to have left.
const MAX_FORMER: usize = 8;

/// Where a message stands in its channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) epoch: String,
    pub(super) offset: u64,
}

/// Messages that somebody still waits for, and what the people were told.
#[derive(Debug)]
pub(super) struct Rooms {
    people: Vec<Person>,
    open: BTreeMap<u64, Entry>,
    pub(super) accepted: u64,
    pub(super) received: u64,
    /// Not received by somebody who was told so.
    pub(super) missed: u64,
    /// Not received by somebody who was told nothing.
    pub(super) lost: u64,
    /// Not accepted, or nobody knows.
    pub(super) failed: u64,
}

#[derive(Debug)]
struct Person {
    room: usize,
    /// Up to where nothing comes any more; `None` before the first subscription.
    floor: Option<Position>,
    former: VecDeque<String>,
}

#[derive(Debug)]
struct Entry {
    waiting: BTreeSet<usize>,
    accepted: Option<(Position, Instant)>,
}

impl Person {
    /// Whether a message at this place does not come any more, which the person was told.
    fn was_told(&self, at: &Position) -> bool {
        let below = |floor: &Position| floor.epoch == at.epoch && at.offset <= floor.offset;
        self.former.contains(&at.epoch) || self.floor.as_ref().is_some_and(below)
    }
}

impl Rooms {
    /// People, each in one room.
    pub(super) fn new(rooms: impl IntoIterator<Item = usize>) -> Self {
        let person = |room| Person { room, floor: None, former: VecDeque::new() };
        let people = rooms.into_iter().map(person).collect();
        Self { people, open: BTreeMap::new(), accepted: 0, received: 0, missed: 0, lost: 0, failed: 0 }
    }

    /// How many people are in their rooms.
    pub(super) fn present(&self) -> usize {
        self.people.iter().filter(|person| person.floor.is_some()).count()
    }

    /// A message is being published: whoever is in the room waits for it.
    pub(super) fn begin(&mut self, n: u64, room: usize) {
        let inside = |(_, person): &(usize, &Person)| person.room == room && person.floor.is_some();
        let waiting = self.people.iter().enumerate().filter(inside).map(|(index, _)| index).collect();
        self.open.insert(n, Entry { waiting, accepted: None });
    }

    /// It got its place.
    pub(super) fn accept(&mut self, n: u64, at: Position, now: Instant) {
        self.accepted += 1;
        if let Some(entry) = self.open.get_mut(&n) {
            entry.accepted = Some((at, now));
        }
    }

    /// It was refused, or it is unknown what became of it: nothing is owed.
    pub(super) fn fail(&mut self, n: u64) {
        self.failed += 1;
        self.open.remove(&n);
    }

    /// A person received it.
    pub(super) fn receive(&mut self, person: usize, n: u64) {
        self.received += 1;
        if let Some(entry) = self.open.get_mut(&n) {
            entry.waiting.remove(&person);
        }
    }

    /// A person was told that what comes from now on lies above this place.
    pub(super) fn told(&mut self, person: usize, floor: Position) {
        let Some(person) = self.people.get_mut(person) else { return };
        if let Some(before) = person.floor.take().filter(|before| before.epoch != floor.epoch) {
            person.former.push_back(before.epoch);
            if person.former.len() > MAX_FORMER {
                person.former.pop_front();
            }
        }
        person.floor = Some(floor);
    }

    /// Takes out what is done with: received, missed as announced, or lost.
    pub(super) fn settle(&mut self, now: Instant) {
        let Self { people, open, missed, lost, .. } = self;
        open.retain(|_, entry| {
            let Some((at, accepted)) = &entry.accepted else { return true };
            entry.waiting.retain(|person| {
                let told = people[*person].was_told(at);
                *missed += u64::from(told);
                !told
            });
            let overdue = now.duration_since(*accepted) >= OVERDUE;
            if overdue {
                *lost += entry.waiting.len() as u64;
            }
            !overdue && !entry.waiting.is_empty()
        });
    }

    /// Ends the books: what somebody still waits for is lost, unless the person has no connection: then nobody could
    /// tell of a gap yet.
    pub(super) fn end(&mut self, is_connected: impl Fn(usize) -> bool) {
        for entry in std::mem::take(&mut self.open).into_values().filter(|entry| entry.accepted.is_some()) {
            for person in entry.waiting {
                *(if is_connected(person) { &mut self.lost } else { &mut self.missed }) += 1;
            }
        }
    }

    /// Whether nothing is under way.
    pub(super) fn is_settled(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many receptions of accepted messages are waited for.
    fn waiting(rooms: &Rooms) -> usize {
        rooms.open.values().filter(|entry| entry.accepted.is_some()).map(|entry| entry.waiting.len()).sum()
    }

    fn at(epoch: &str, offset: u64) -> Position {
        Position { epoch: epoch.to_owned(), offset }
    }

    fn rooms() -> Rooms {
        let mut rooms = Rooms::new([0, 0, 1]);
        (0..3).for_each(|person| rooms.told(person, at("e", 0)));
        rooms
    }

    #[test]
    fn everybody_in_the_room_is_to_receive() {
        let (mut rooms, now) = (rooms(), Instant::now());
        rooms.begin(1, 0);
        // One has it before the answer to the publish.
        rooms.receive(0, 1);
        rooms.accept(1, at("e", 1), now);
        rooms.settle(now);
        assert_eq!((waiting(&rooms), rooms.is_settled()), (1, false));
        rooms.receive(1, 1);
        rooms.settle(now);
        assert!(rooms.is_settled());
        assert_eq!((rooms.accepted, rooms.received, rooms.missed, rooms.lost), (1, 2, 0, 0));
    }

    #[test]
    fn an_announced_gap_is_no_loss_and_silence_is() {
        let (mut rooms, now) = (rooms(), Instant::now());
        for n in 1..=3 {
            rooms.begin(n, 0);
            rooms.accept(n, at("e", n), now);
            rooms.receive(0, n);
        }
        // The other one reconnects, and everything up to the second is over for it.
        rooms.told(1, at("e", 2));
        rooms.settle(now);
        assert_eq!((rooms.missed, waiting(&rooms)), (2, 1));
        rooms.settle(now + OVERDUE);
        assert_eq!((rooms.missed, rooms.lost, rooms.is_settled()), (2, 1, true));
    }

    #[test]
    fn another_epoch_ends_the_one_before_and_not_the_next() {
        let (mut rooms, now) = (rooms(), Instant::now());
        rooms.begin(1, 1);
        rooms.accept(1, at("e", 9), now);
        rooms.begin(2, 1);
        // In the next epoch already, of which the person has not heard yet.
        rooms.accept(2, at("f", 1), now);
        rooms.settle(now);
        assert_eq!((rooms.missed, waiting(&rooms)), (0, 2));
        rooms.told(2, at("f", 0));
        rooms.settle(now);
        assert_eq!((rooms.missed, waiting(&rooms)), (1, 1));
        rooms.receive(2, 2);
        rooms.settle(now);
        assert!(rooms.is_settled());
    }

    #[test]
    fn at_the_end_only_who_is_connected_has_lost_something() {
        let (mut rooms, now) = (rooms(), Instant::now());
        for n in 1..=2 {
            rooms.begin(n, 0);
        }
        rooms.accept(1, at("e", 1), now);
        rooms.end(|person| person == 1);
        assert_eq!((rooms.lost, rooms.missed, rooms.is_settled()), (1, 1, true));
    }

    #[test]
    fn who_is_not_there_waits_for_nothing() {
        let (mut rooms, now) = (Rooms::new([0, 0]), Instant::now());
        rooms.begin(1, 0);
        rooms.accept(1, at("e", 1), now);
        rooms.settle(now);
        assert!(rooms.is_settled() && rooms.present() == 0);
        rooms.begin(2, 0);
        rooms.fail(2);
        assert!(rooms.is_settled() && rooms.failed == 1);
    }
}
