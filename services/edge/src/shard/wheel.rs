//! One timing wheel for every deadline of a shard's connections, instead of a timer for each.
//!
//! Deadlines are coarse ([`TICK`]) and lazy: an entry only says when to look at a connection again. Who finds
//! that its deadline moved in the meantime puts itself in again. So activity on a connection costs nothing here.

use std::time::Duration;

use tokio::time::Instant;

/// Resolution of every deadline.
pub const TICK: Duration = Duration::from_millis(20);

/// Slots of the wheel: 41 s ahead; what lies further is looked at then and put in again.
const SLOTS: usize = 2048;

/// Ticks since the wheel began.
pub type Tick = u32;

/// Entries by the tick at which they are due.
pub struct Wheel<E> {
    began: Instant,
    /// Everything before it was handed out.
    next: Tick,
    slots: Box<[Vec<E>]>,
}

impl<E> Wheel<E> {
    /// An empty wheel whose tick 0 is now.
    pub fn new(now: Instant) -> Self {
        Self { began: now, next: 0, slots: (0..SLOTS).map(|_| Vec::new()).collect() }
    }

    /// The tick that `at` lies in.
    pub fn tick(&self, at: Instant) -> Tick {
        let ticks = at.saturating_duration_since(self.began).as_millis() / TICK.as_millis();
        Tick::try_from(ticks).unwrap_or(Tick::MAX)
    }

    /// The tick that lies `after` beyond `now`, rounded up.
    pub fn after(now: Tick, after: Duration) -> Tick {
        let ticks = after.as_millis().div_ceil(TICK.as_millis());
        now.saturating_add(Tick::try_from(ticks).unwrap_or(Tick::MAX))
    }

    /// Has `entry` handed out at `tick`, or earlier when that is further ahead than the wheel reaches. Returns
    /// when that will be.
    pub fn insert(&mut self, tick: Tick, entry: E) -> Tick {
        let furthest = self.next + SLOTS as Tick - 1;
        let tick = tick.clamp(self.next, furthest);
        self.slots[tick as usize % SLOTS].push(entry);
        tick
    }

    /// Hands out what is due at `now` into `due`.
    pub fn advance(&mut self, now: Tick, due: &mut Vec<E>) {
        // Standing still for longer than a turn makes every slot due once.
        let last = now.min(self.next.saturating_add(SLOTS as Tick - 1));
        while self.next <= last {
            let slot = &mut self.slots[self.next as usize % SLOTS];
            due.append(slot);
            if slot.capacity() > 1024 {
                slot.shrink_to(1024);
            }
            self.next += 1;
        }
        self.next = self.next.max(now.saturating_add(1));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn entries_come_at_their_tick(
            entries in prop::collection::vec((0..1_000u32, 0..2_000u32), 1..50),
            steps in prop::collection::vec(1..300u32, 1..30),
        ) {
            let mut wheel = Wheel::new(Instant::now());
            let (mut now, mut due) = (0, Vec::new());
            let mut waiting: Vec<(Tick, usize)> = Vec::new();
            let mut entries = entries.into_iter().enumerate();
            for step in steps {
                if let Some((id, (_, ahead))) = entries.next() {
                    let tick = now + 1 + ahead;
                    wheel.insert(tick, (tick, id));
                    waiting.push((tick, id));
                }
                now += step;
                wheel.advance(now, &mut due);
                for entry in due.drain(..) {
                    prop_assert!(entry.0 <= now, "too early");
                    waiting.retain(|other| *other != entry);
                }
                prop_assert!(waiting.iter().all(|(tick, _)| *tick > now), "too late");
            }
        }
    }

    #[test]
    fn a_long_pause_makes_everything_due() {
        let mut wheel = Wheel::new(Instant::now());
        for tick in [1, 500, 2_000] {
            wheel.insert(tick, tick);
        }
        let mut due = Vec::new();
        wheel.advance(10_000, &mut due);
        assert_eq!(due, [1, 500, 2_000]);
        wheel.insert(10_001, 7);
        due.clear();
        wheel.advance(10_001, &mut due);
        assert_eq!(due, [7]);
    }

    #[test]
    fn what_lies_far_ahead_is_looked_at_in_between() {
        let mut wheel = Wheel::new(Instant::now());
        wheel.insert(Wheel::<u8>::after(0, Duration::from_secs(3_600)), 1u8);
        let mut due = Vec::new();
        wheel.advance(SLOTS as Tick, &mut due);
        assert_eq!(due, [1], "an early look, so that its owner can put it in again");
    }
}
