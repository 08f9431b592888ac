//! One policy for the calls to one dependency: breaker, bulkhead and deadline.

use std::{
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};

use crate::{
    breaker::{Breaker, Outcome, Pass, Rules, State},
    bulkhead::{Bulkhead, Full, Permit},
    metrics::{Breakers, DependencyMetrics},
};

/// Who finds out whether a dependency is back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probes {
    /// Whatever call comes first when it is time. For calls that fail soon.
    AnyCall,
    /// Only [`Policy::probe`], so that nobody's call hangs for it. Somebody has to make them: [`keep_probing`].
    Own,
}

/// What a policy is made of.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// When the breaker opens, and for how long.
    pub rules: Rules,
    /// Who probes.
    pub probes: Probes,
    /// Most calls under way.
    pub running: usize,
    /// Most calls that wait for one of these to end.
    pub waiting: usize,
}

/// Why a policy did not make a call, or gave it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The dependency fails; the call was not made.
    #[error("it does not answer, and is not asked again for {} ms", .retry_after.as_millis())]
    Open {
        /// After how long another try may be of use.
        retry_after: Duration,
    },
    /// Too many calls are under way; the call was not made.
    #[error("too many calls to it are under way")]
    Full,
    /// The call was made, and there was no answer in time: what it did is unknown.
    #[error("no answer within {:.1} s", .0.as_secs_f64())]
    Late(Duration),
}

/// Why a call has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError<E> {
    /// The policy's word.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The call's own error.
    #[error("{0}")]
    Failed(E),
}

/// What stands before one dependency. It repeats nothing.
pub struct Policy {
    dependency: &'static str,
    probes: Probes,
    breaker: Mutex<Breaker>,
    bulkhead: Bulkhead,
    states: watch::Sender<State>,
    metrics: DependencyMetrics,
}

impl Policy {
    /// The policy of a dependency, named in one word for logs and metrics.
    #[must_use]
    pub fn new(dependency: &'static str, settings: Settings, metrics: &Breakers) -> Self {
        Self {
            dependency,
            probes: settings.probes,
            breaker: Mutex::new(Breaker::new(settings.rules, Instant::now())),
            bulkhead: Bulkhead::new(settings.running, settings.waiting),
            states: watch::Sender::new(State::Closed),
            metrics: metrics.of(dependency),
        }
    }

    /// What the breaker does with calls.
    #[must_use]
    pub fn state(&self) -> State {
        *self.states.borrow()
    }

    /// For whoever would queue work for later calls: the refusal that they would meet now, if they would.
    ///
    /// # Errors
    /// [`Refused::Open`], as [`Policy::call`] would answer.
    pub fn check(&self) -> Result<(), Refused> {
        let now = Instant::now();
        let breaker = self.breaker.lock();
        let probe = self.probes == Probes::AnyCall && breaker.probe_due().is_some_and(|due| due <= now);
        match breaker.retry_after(now) {
            Some(retry_after) if !probe => {
                self.metrics.open.inc();
                Err(Refused::Open { retry_after })
            }
            _ => Ok(()),
        }
    }

    /// Makes a call, if it may be made. `within` bounds the wait for a turn and the call together; `is_outage` tells
    /// whether an error says that the dependency is away, and not that it answered and refused.
    ///
    /// # Errors
    /// [`Refused`] when it was not made or has no answer; else the call's own error.
    pub async fn call<T, E>(
        &self,
        within: Duration,
        call: impl IntoFuture<Output = Result<T, E>>,
        is_outage: impl FnOnce(&E) -> bool,
    ) -> Result<T, CallError<E>> {
        let deadline = Instant::now() + within;
        // Nobody waits for a turn to be refused then.
        self.check()?;
        let _permit = self.enter(deadline).await?;
        self.run(self.probes == Probes::AnyCall, within, deadline, call, is_outage).await
    }

    /// Like [`Policy::call`], without a turn: for calls whose number something else bounds.
    ///
    /// # Errors
    /// As [`Policy::call`].
    pub async fn call_at_once<T, E>(
        &self,
        within: Duration,
        call: impl IntoFuture<Output = Result<T, E>>,
        is_outage: impl FnOnce(&E) -> bool,
    ) -> Result<T, CallError<E>> {
        self.run(self.probes == Probes::AnyCall, within, Instant::now() + within, call, is_outage).await
    }

    /// Like [`Policy::call`], and may be the probe whoever else may. There is one at a time, so it needs no turn.
    ///
    /// # Errors
    /// As [`Policy::call`].
    pub async fn probe<T, E>(
        &self,
        within: Duration,
        call: impl IntoFuture<Output = Result<T, E>>,
        is_outage: impl FnOnce(&E) -> bool,
    ) -> Result<T, CallError<E>> {
        self.run(true, within, Instant::now() + within, call, is_outage).await
    }

    async fn run<T, E>(
        &self,
        probes: bool,
        within: Duration,
        deadline: Instant,
        call: impl IntoFuture<Output = Result<T, E>>,
        is_outage: impl FnOnce(&E) -> bool,
    ) -> Result<T, CallError<E>> {
        let mut under_way = UnderWay { policy: self, pass: Some(self.admit(probes)?) };
        match timeout_at(deadline, call.into_future()).await {
            Ok(Ok(answer)) => {
                under_way.settle(Outcome::Worked);
                Ok(answer)
            }
            Ok(Err(error)) => {
                under_way.settle(if is_outage(&error) { Outcome::Failed } else { Outcome::Worked });
                Err(CallError::Failed(error))
            }
            Err(_) => {
                under_way.settle(Outcome::Failed);
                self.metrics.late.inc();
                Err(Refused::Late(within).into())
            }
        }
    }

    async fn enter(&self, deadline: Instant) -> Result<Permit, Refused> {
        let entered = timeout_at(deadline, self.bulkhead.enter()).await.unwrap_or(Err(Full));
        entered.map_err(|Full| {
            self.metrics.full.inc();
            Refused::Full
        })
    }

    fn admit(&self, probes: bool) -> Result<Pass, Refused> {
        let admitted = self.with_breaker(
            |breaker, now| {
                if probes { breaker.admit_probe(now) } else { breaker.admit(now) }
            },
        );
        admitted.map_err(|retry_after| {
            self.metrics.open.inc();
            Refused::Open { retry_after }
        })
    }

    /// Uses the breaker, and tells what changed by that.
    fn with_breaker<T>(&self, using: impl FnOnce(&mut Breaker, Instant) -> T) -> T {
        let mut breaker = self.breaker.lock();
        let before = breaker.state();
        let result = using(&mut breaker, Instant::now());
        let after = breaker.state();
        if before != after {
            // Under the lock, so that an older state does not replace a newer one.
            self.states.send_replace(after);
            self.metrics.state.set(after.number());
            drop(breaker);
            self.tell(before, after);
        }
        result
    }

    fn tell(&self, before: State, after: State) {
        let dependency = self.dependency;
        match (before, after) {
            (State::Closed, _) => {
                self.metrics.opened.inc();
                tracing::warn!(dependency, "calls fail: they are refused at once until a probe works");
            }
            (_, State::Closed) => tracing::info!(dependency, "a probe worked: calls are made again"),
            _ => tracing::debug!(dependency, state = ?after, "the breaker changed"),
        }
    }
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("dependency", &self.dependency)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

/// A call that passed. When it is dropped before its end, the breaker learns that it was given up, so that a probe
/// that nobody waits for any more does not keep others away.
struct UnderWay<'a> {
    policy: &'a Policy,
    pass: Option<Pass>,
}

impl UnderWay<'_> {
    fn settle(&mut self, outcome: Outcome) {
        if let Some(pass) = self.pass.take() {
            self.policy.with_breaker(|breaker, now| breaker.settle(pass, outcome, now));
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.settle(Outcome::Abandoned);
    }
}

/// Probes whenever the breaker is open and its pause is over, until the policy is gone. `within` bounds one probe.
pub async fn keep_probing<T, E, F>(
    policy: Weak<Policy>,
    within: Duration,
    probe: impl Fn() -> F,
    is_outage: impl Fn(&E) -> bool,
) where
    F: Future<Output = Result<T, E>>,
{
    let Some(mut states) = policy.upgrade().map(|policy| policy.states.subscribe()) else { return };
    // Ends with the policy, which has the sender.
    while states.wait_for(|state| *state == State::Open).await.is_ok() {
        let due = policy.upgrade().and_then(|policy| policy.breaker.lock().probe_due());
        if let Some(due) = due {
            sleep_until(due).await;
        }
        let Some(policy) = policy.upgrade() else { return };
        // What it found is in the state.
        let _told = Arc::clone(&policy).probe(within, probe(), &is_outage).await;
    }
}
