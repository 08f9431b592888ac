//! The circuit breaker: a state machine without a clock of its own.
//!
//! ```text
//! closed ── enough of the newest calls failed ──▶ open ── the pause is over, one probe ──▶ half-open
//!    ▲                                              ▲                                         │ │
//!    │                                              └───────────────── it failed ─────────────┘ │
//!    └────────────────────────────────────────────────── it worked ─────────────────────────────┘
//! ```

use std::{collections::VecDeque, time::Duration};

use tokio::time::Instant;

/// When a breaker opens, and for how long.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rules {
    /// How many of the newest outcomes are looked at; at least `minimum`. A number of calls and not a time, because
    /// calls that hang are few: in a time, the many that worked before would outweigh them.
    pub window: usize,
    /// Fewer outcomes than this say nothing; at least 1.
    pub minimum: usize,
    /// The share of failures that opens it, above 0 up to 1.
    pub share: f64,
    /// Outcomes older than this say nothing.
    pub fresh: Duration,
    /// How long it stays open before a probe.
    pub pause: Duration,
}

/// What a breaker does with calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// They pass.
    Closed,
    /// One is under way as a probe; the others are refused.
    HalfOpen,
    /// They are refused.
    Open,
}

impl State {
    /// The number that metrics show: 0 closed, 1 half-open, 2 open.
    #[must_use]
    pub const fn number(self) -> i64 {
        match self {
            State::Closed => 0,
            State::HalfOpen => 1,
            State::Open => 2,
        }
    }
}

/// What became of a call that passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The dependency answered, whatever it said.
    Worked,
    /// It did not answer, or said that it cannot serve.
    Failed,
    /// Whoever made the call gave it up.
    Abandoned,
}

/// Leave for one call. What became of it is to be told to the breaker that gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pass {
    term: u64,
}

/// A circuit breaker. It is told the time, so that the same calls always lead to the same states.
#[derive(Debug)]
pub struct Breaker {
    rules: Rules,
    state: State,
    /// When a probe may begin; of meaning while it is open.
    until: Instant,
    /// Newest last: when it became known, and whether it was a failure.
    outcomes: VecDeque<(Instant, bool)>,
    /// Grows with each change of the state: what calls of an earlier term tell is no news.
    term: u64,
}

impl Breaker {
    /// A closed one.
    #[must_use]
    pub fn new(rules: Rules, now: Instant) -> Self {
        let minimum = rules.minimum.max(1);
        let rules = Rules { minimum, window: rules.window.max(minimum), ..rules };
        Self { rules, state: State::Closed, until: now, outcomes: VecDeque::new(), term: 0 }
    }

    /// What it does with calls.
    #[must_use]
    pub fn state(&self) -> State {
        self.state
    }

    /// When a probe may begin, while it is open.
    #[must_use]
    pub fn probe_due(&self) -> Option<Instant> {
        (self.state == State::Open).then_some(self.until)
    }

    /// After how long another call may be of use; `None` when one passes.
    #[must_use]
    pub fn retry_after(&self, now: Instant) -> Option<Duration> {
        match self.state {
            State::Closed => None,
            State::HalfOpen => Some(self.rules.pause),
            // At the very end of the pause nothing has changed yet: the probe needs some time too.
            State::Open => Some(self.until.saturating_duration_since(now).max(self.rules.pause / 2)),
        }
    }

    /// Leave for a call that does not probe.
    ///
    /// # Errors
    /// Unless it is closed: says after how long to try again.
    pub fn admit(&mut self, now: Instant) -> Result<Pass, Duration> {
        self.retry_after(now).map_or(Ok(Pass { term: self.term }), Err)
    }

    /// Leave for a call that may be the probe.
    ///
    /// # Errors
    /// While the pause lasts or another probe is under way: says after how long to try again.
    pub fn admit_probe(&mut self, now: Instant) -> Result<Pass, Duration> {
        if self.state == State::Open && self.until <= now {
            self.change(State::HalfOpen);
            return Ok(Pass { term: self.term });
        }
        self.admit(now)
    }

    /// Takes over what became of a call.
    pub fn settle(&mut self, pass: Pass, outcome: Outcome, now: Instant) {
        if pass.term != self.term {
            return;
        }
        match (self.state, outcome) {
            (State::Closed, Outcome::Abandoned) | (State::Open, _) => {}
            (State::Closed, outcome) => self.note(outcome == Outcome::Failed, now),
            (State::HalfOpen, Outcome::Worked) => self.change(State::Closed),
            (State::HalfOpen, Outcome::Failed) => self.open(now + self.rules.pause),
            // Nothing was learnt, so the next probe need not wait.
            (State::HalfOpen, Outcome::Abandoned) => self.open(now),
        }
    }

    fn note(&mut self, failed: bool, now: Instant) {
        let Rules { window, minimum, share, fresh, pause } = self.rules;
        self.outcomes.push_back((now, failed));
        while self.outcomes.len() > window
            || self.outcomes.front().is_some_and(|(at, _)| now.saturating_duration_since(*at) > fresh)
        {
            self.outcomes.pop_front();
        }
        let (all, failures) =
            (self.outcomes.len(), self.outcomes.iter().filter(|(_, failed)| *failed).count());
        if failed && all >= minimum && failures as f64 >= share * all as f64 {
            self.open(now + pause);
        }
    }

    fn open(&mut self, until: Instant) {
        self.until = until;
        self.change(State::Open);
    }

    fn change(&mut self, state: State) {
        self.state = state;
        self.term += 1;
        self.outcomes.clear();
    }
}
