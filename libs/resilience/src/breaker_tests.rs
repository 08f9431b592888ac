//! The breaker against a model that keeps everything that ever happened.

use std::time::Duration;

use proptest::prelude::*;
use tokio::time::Instant;

use crate::{Breaker, Outcome, Pass, Rules, State};

const RULES: Rules = Rules {
    window: 10,
    minimum: 4,
    share: 0.5,
    fresh: Duration::from_secs(10),
    pause: Duration::from_millis(500),
};

const MS: Duration = Duration::from_millis(1);

/// Has the next calls end like this, one at a time.
fn calls(breaker: &mut Breaker, now: Instant, outcomes: &[Outcome]) {
    for outcome in outcomes {
        let pass = breaker.admit(now).expect("it is closed");
        breaker.settle(pass, *outcome, now);
    }
}

#[test]
fn it_opens_by_the_share_of_failures_among_the_newest() {
    let now = Instant::now();
    let mut breaker = Breaker::new(RULES, now);
    calls(&mut breaker, now, &[Outcome::Failed; 3]);
    assert_eq!(breaker.state(), State::Closed, "three say nothing");
    calls(&mut breaker, now, &[Outcome::Failed]);
    assert_eq!(breaker.state(), State::Open);

    let mut breaker = Breaker::new(RULES, now);
    calls(&mut breaker, now, &[Outcome::Worked; 1_000]);
    calls(&mut breaker, now, &[Outcome::Failed; 4]);
    assert_eq!(breaker.state(), State::Closed, "four of ten");
    calls(&mut breaker, now, &[Outcome::Abandoned; 10]);
    assert_eq!(breaker.state(), State::Closed, "what was given up says nothing");
    calls(&mut breaker, now, &[Outcome::Failed]);
    assert_eq!(breaker.state(), State::Open, "five of ten");

    let mut breaker = Breaker::new(RULES, now);
    calls(&mut breaker, now, &[Outcome::Failed; 3]);
    calls(&mut breaker, now + RULES.fresh + MS, &[Outcome::Failed]);
    assert_eq!(breaker.state(), State::Closed, "three are too old");
}

#[test]
fn one_probe_decides() {
    let now = Instant::now();
    let mut breaker = Breaker::new(RULES, now);
    let old = breaker.admit(now).unwrap();
    calls(&mut breaker, now, &[Outcome::Failed; 4]);
    let due = now + RULES.pause;
    assert_eq!(breaker.probe_due(), Some(due));
    assert_eq!(breaker.admit_probe(due - MS), Err(RULES.pause / 2), "the pause lasts");
    assert_eq!(breaker.admit(due), Err(RULES.pause / 2), "this one does not probe");
    let probe = breaker.admit_probe(due).unwrap();
    assert_eq!(breaker.state(), State::HalfOpen);
    assert_eq!(breaker.admit_probe(due), Err(RULES.pause), "there is one");
    breaker.settle(old, Outcome::Worked, due);
    assert_eq!(breaker.state(), State::HalfOpen, "what began before says nothing");
    breaker.settle(probe, Outcome::Failed, due);
    assert_eq!(breaker.probe_due(), Some(due + RULES.pause));
    let probe = breaker.admit_probe(due + RULES.pause).unwrap();
    breaker.settle(probe, Outcome::Abandoned, due + RULES.pause);
    let probe = breaker.admit_probe(due + RULES.pause).expect("the next one need not wait");
    breaker.settle(probe, Outcome::Worked, due + RULES.pause);
    assert_eq!(breaker.state(), State::Closed);
    calls(&mut breaker, now, &[Outcome::Failed; 3]);
    assert_eq!(breaker.state(), State::Closed, "earlier failures are forgotten");
}

#[derive(Debug, Clone)]
enum Step {
    Admit {
        probe: bool,
    },
    /// Ends one of the calls under way.
    Settle {
        which: usize,
        outcome: Outcome,
    },
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let outcome = prop_oneof![
        3 => Just(Outcome::Failed),
        2 => Just(Outcome::Worked),
        1 => Just(Outcome::Abandoned),
    ];
    let step = prop_oneof![
        4 => any::<bool>().prop_map(|probe| Step::Admit { probe }),
        4 => (any::<usize>(), outcome).prop_map(|(which, outcome)| Step::Settle { which, outcome }),
        1 => (0_u64..1_500).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..200)
}

/// What the model knows: the outcomes since it was closed last, and since when calls count.
struct Model {
    state: State,
    until: Instant,
    counted: Vec<(Instant, bool)>,
    /// Calls under way, and whether their outcome counts still.
    calls: Vec<(Pass, bool)>,
}

impl Model {
    fn turn(&mut self, state: State) {
        self.state = state;
        self.counted.clear();
        self.calls.iter_mut().for_each(|(_, counts)| *counts = false);
    }

    /// The definition, without any cleverness.
    fn should_open(&self, now: Instant) -> bool {
        let fresh = self.counted.iter().rev().take(RULES.window);
        let fresh: Vec<bool> =
            fresh.filter(|(at, _)| now - *at <= RULES.fresh).map(|(_, failed)| *failed).collect();
        let failures = fresh.iter().filter(|failed| **failed).count();
        fresh.len() >= RULES.minimum && failures * 2 >= fresh.len()
    }

    fn settle(&mut self, counts: bool, outcome: Outcome, now: Instant) {
        if !counts {
            return;
        }
        match (self.state, outcome) {
            (State::Closed, Outcome::Abandoned) => {}
            (State::Closed, outcome) => {
                self.counted.push((now, outcome == Outcome::Failed));
                if outcome == Outcome::Failed && self.should_open(now) {
                    self.until = now + RULES.pause;
                    self.turn(State::Open);
                }
            }
            (_, Outcome::Worked) => self.turn(State::Closed),
            (_, outcome) => {
                self.until = if outcome == Outcome::Failed { now + RULES.pause } else { now };
                self.turn(State::Open);
            }
        }
    }
}

proptest! {
    #[test]
    fn it_agrees_with_the_model(steps in steps()) {
        let mut now = Instant::now();
        let mut breaker = Breaker::new(RULES, now);
        let mut model = Model { state: State::Closed, until: now, counted: Vec::new(), calls: Vec::new() };
        for step in steps {
            match step {
                Step::Wait(ms) => now += MS * u32::try_from(ms).unwrap(),
                Step::Admit { probe } => {
                    let turns = probe && model.state == State::Open && model.until <= now;
                    if turns {
                        model.turn(State::HalfOpen);
                    }
                    let passes = turns || model.state == State::Closed;
                    let admitted = if probe { breaker.admit_probe(now) } else { breaker.admit(now) };
                    prop_assert_eq!(admitted.is_ok(), passes);
                    match admitted {
                        Ok(pass) => model.calls.push((pass, true)),
                        Err(after) => prop_assert!(after > Duration::ZERO && after <= RULES.pause),
                    }
                }
                Step::Settle { which, outcome } => {
                    if !model.calls.is_empty() {
                        let (pass, counts) = model.calls.swap_remove(which % model.calls.len());
                        breaker.settle(pass, outcome, now);
                        model.settle(counts, outcome, now);
                    }
                }
            }
            prop_assert_eq!(breaker.state(), model.state);
            let probes = model.calls.iter().filter(|(_, counts)| *counts).count();
            prop_assert!(model.state != State::HalfOpen || probes == 1);
        }
    }
}
