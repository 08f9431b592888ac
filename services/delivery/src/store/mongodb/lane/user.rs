//! What waits for one user: messages, and acks beside them, each in the order in which they came.
//!
//! They wait apart, so that acks that come between messages do not cut what goes out in one write into pieces. Whose
//! first came first has the next turn: an ack makes its room before the messages that came after it look for some, and
//! neither waits for more than one write of the other.

use std::collections::VecDeque;

use tokio::time::Instant;

use super::super::{
    plan::{Attempt, Kind},
    work::{Queued, Work},
};

/// A user with work.
#[derive(Default)]
pub(super) struct User {
    /// Messages to append.
    pub(super) appends: VecDeque<Queued>,
    /// Acks, and wishes to arm.
    pub(super) acks: VecDeque<Queued>,
    /// A write that may have been done: nothing else is written before that is known.
    pub(super) unanswered: Option<Box<Attempt>>,
}

/// One of a user's queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Appends,
    Acks,
}

impl User {
    pub(super) fn push(&mut self, queued: Queued) {
        match queued.work {
            Work::Append(_) => self.appends.push_back(queued),
            Work::Ack(_) | Work::Arm(_) => self.acks.push_back(queued),
        }
    }

    /// How much work it has.
    pub(super) fn len(&self) -> usize {
        self.appends.len() + self.acks.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.appends.is_empty() && self.acks.is_empty()
    }

    /// Whether it wants nothing but to be armed.
    pub(super) fn only_arms(&self) -> bool {
        self.appends.is_empty() && self.acks.iter().all(|queued| matches!(queued.work, Work::Arm(_)))
    }

    /// Whose turn it is; messages that cannot go yet leave theirs to acks.
    pub(super) fn turn(&self, appends_wait: bool) -> Option<Side> {
        match (self.appends.front(), self.acks.front()) {
            (_, Some(_)) if appends_wait => Some(Side::Acks),
            (None, Some(_)) => Some(Side::Acks),
            (Some(append), Some(ack)) if ack.deadline <= append.deadline => Some(Side::Acks),
            (Some(_), _) if !appends_wait => Some(Side::Appends),
            _ => None,
        }
    }

    pub(super) fn queue(&mut self, side: Side) -> &mut VecDeque<Queued> {
        match side {
            Side::Appends => &mut self.appends,
            Side::Acks => &mut self.acks,
        }
    }

    /// Takes work off whose deadline has passed: all messages of a write that may have been done have one fate, as none
    /// of them may be written a second time.
    pub(super) fn late(&mut self, now: Instant) -> Vec<Queued> {
        let mut late = Vec::new();
        for side in [Side::Appends, Side::Acks] {
            while self.queue(side).front().is_some_and(|queued| queued.deadline <= now) {
                let ours = self.unanswered.take_if(|attempt| attempt.kind.side() == side);
                let count = match ours.map(|attempt| attempt.kind) {
                    Some(Kind::Append(run)) => run.count,
                    Some(Kind::Ack { .. } | Kind::Arm(_)) | None => 1,
                };
                late.extend(self.queue(side).drain(..count));
            }
        }
        late
    }
}

impl Kind {
    /// Whose front it is made for.
    fn side(&self) -> Side {
        match self {
            Kind::Append(_) => Side::Appends,
            Kind::Ack { .. } | Kind::Arm(_) => Side::Acks,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use sanjay_runtime::ManualClock;

    use super::{
        super::super::work::{Append, Call},
        *,
    };
    use crate::store::suite::message;

    fn queued(work: Work, after: u64, from: Instant) -> Queued {
        Queued { user: "u".into(), work, deadline: from + Duration::from_millis(after) }
    }

    fn ack() -> Work {
        Work::Arm(Vec::new())
    }

    fn append() -> Work {
        let (call, _unheard) = Call::new(1, Vec::new());
        let message = message("u", 1, "text", "", &ManualClock::new(1));
        Work::Append(Append { message, key: None, collapse: None, call, part: 0 })
    }

    #[test]
    fn whose_first_came_first_has_the_turn_and_what_waits_apart_goes_together() {
        let now = Instant::now();
        let mut user = User::default();
        assert_eq!(user.turn(false), None);
        for (after, is_ack) in [(1, false), (2, true), (3, false), (3, true), (5, false)] {
            user.push(queued(if is_ack { ack() } else { append() }, after, now));
        }
        assert_eq!((user.len(), user.appends.len(), user.acks.len()), (5, 3, 2));
        assert_eq!(user.turn(false), Some(Side::Appends), "the first came first");
        assert_eq!(user.turn(true), Some(Side::Acks), "unless it cannot go");
        user.appends.pop_front();
        assert_eq!(user.turn(false), Some(Side::Acks));
        user.acks.pop_front();
        assert_eq!(user.turn(false), Some(Side::Acks), "at the same time, an ack makes its room first");
        user.acks.pop_front();
        assert_eq!((user.turn(false), user.turn(true)), (Some(Side::Appends), None));
    }

    #[test]
    fn what_is_late_goes_from_both_sides_and_the_rest_stays() {
        let now = Instant::now();
        let mut user = User::default();
        for (after, is_ack) in [(1, false), (9, false), (1, true), (2, true), (9, true)] {
            user.push(queued(if is_ack { ack() } else { append() }, after, now));
        }
        assert_eq!(user.late(now + Duration::from_millis(2)).len(), 3);
        assert_eq!((user.appends.len(), user.acks.len()), (1, 1));
        assert!(user.late(now).is_empty());
    }
}
