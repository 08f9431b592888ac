//! One call of a pool: on the best peer, and on another one where that cannot do it twice.

use std::{fmt::Write as _, sync::Arc, time::Duration};

use futures::future::join_all;
use tokio::time::{Instant, timeout};
use tonic::{Code, Response, Status};

use super::{
    PeerPool,
    peer::{Peer, Rank},
};
use crate::grpc::{
    client::PeerChannel,
    failure::{Known, known, plain},
};

/// Most times that a call is made again.
const MAX_RETRIES: usize = 2;

/// How a call may be made.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    within: Duration,
    idempotent: bool,
}

impl Call {
    /// May be made again on another peer after any failure but a refusal. While there is another peer, one has
    /// half of the time that is left.
    #[must_use]
    pub const fn idempotent(within: Duration) -> Self {
        Self { within, idempotent: true }
    }

    /// Is made again only when it was certainly not sent.
    #[must_use]
    pub const fn once(within: Duration) -> Self {
        Self { within, idempotent: false }
    }
}

/// Why no peer answered a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The request was certainly not sent.
    #[error("no {peer} can be reached: {problems}")]
    Unreachable {
        /// The role.
        peer: &'static str,
        /// Each endpoint with its last problem.
        problems: String,
    },
    /// A peer would not do it, and another one would not either.
    #[error("the {peer} at {endpoint} refused the call: {message}")]
    Refused {
        /// The role.
        peer: &'static str,
        /// Where.
        endpoint: String,
        /// Why.
        code: Code,
        /// Why, for a person.
        message: String,
    },
    /// It is not known whether a peer did it.
    #[error("no {peer} answers: {problems}")]
    Unknown {
        /// The role.
        peer: &'static str,
        /// Each endpoint that was tried with its problem.
        problems: String,
    },
}

impl PeerError {
    /// Whether the request was certainly not sent.
    #[must_use]
    pub fn is_not_sent(&self) -> bool {
        matches!(self, PeerError::Unreachable { .. })
    }
}

/// A peer that failed in this call, and how.
struct Failed {
    peer: Arc<Peer>,
    known: Known,
    problem: String,
}

impl PeerPool {
    /// Makes a call: `attempt` is given a channel and the request. A request is copied only where another peer
    /// could be asked with it.
    ///
    /// # Errors
    /// When no peer answered within the time, or one refused; says what is known about the outcome.
    pub async fn call<Q: Clone, R, F>(
        &self,
        call: Call,
        request: Q,
        attempt: impl Fn(PeerChannel, Q) -> F,
    ) -> Result<R, PeerError>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let deadline = Instant::now() + call.within;
        self.shared.budget.earn();
        let mut failed = Vec::new();
        let (mut next, mut request) = (self.first(deadline).await, request);
        while let Some(peer) = next {
            let spare = self.may_retry(&peer, &failed).then(|| request.clone());
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = if spare.is_some() && call.idempotent { left / 2 } else { left };
            let answer = {
                let _counted = peer.begin();
                timeout(limit, attempt(peer.channel(self.lane), request)).await
            };
            let (known, problem) = match answer {
                Ok(Ok(response)) => {
                    if !failed.is_empty() {
                        self.shared.metrics.answered.inc();
                    }
                    return Ok(response.into_inner());
                }
                Ok(Err(status)) => match known(&status) {
                    Known::Refused => return Err(self.refused(&peer, &status)),
                    known => (known, plain(&status)),
                },
                Err(_) => (Known::Away, late(limit)),
            };
            failed.push(Failed { peer, known, problem });
            next = self.after(call, &failed, spare.is_some());
            match spare {
                Some(spare) => request = spare,
                None => break,
            }
        }
        Err(self.error(&failed))
    }

    /// Asks every peer that is not known to be down, at once, for what each knows alone.
    pub async fn call_all<Q: Clone, R, F>(
        &self,
        within: Duration,
        request: Q,
        attempt: impl Fn(PeerChannel, Q) -> F,
    ) -> Vec<Result<R, PeerError>>
    where
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let peers = self.peers();
        let calls = peers.iter().map(|peer| {
            let skipped = peers.len() > 1 && peer.rank() == Rank::Down;
            let call = (!skipped).then(|| attempt(peer.channel(self.lane), request.clone()));
            async move {
                let problem = match call {
                    None => return Err(self.unknown(peer, &peer.problem())),
                    Some(call) => match timeout(within, call).await {
                        Ok(Ok(response)) => return Ok(response.into_inner()),
                        Ok(Err(status)) => plain(&status),
                        Err(_) => late(within),
                    },
                };
                Err(self.unknown(peer, &problem))
            }
        });
        join_all(calls).await
    }

    fn unknown(&self, peer: &Peer, problem: &str) -> PeerError {
        PeerError::Unknown { peer: self.shared.kind, problems: format!("{peer}: {problem}") }
    }

    fn may_retry(&self, peer: &Arc<Peer>, failed: &[Failed]) -> bool {
        failed.len() < MAX_RETRIES && self.shared.has_other(peer, |other| is_among(failed, other))
    }

    /// The peer for the first attempt. Names that are still being resolved are waited for.
    async fn first(&self, deadline: Instant) -> Option<Arc<Peer>> {
        let shared = &self.shared;
        if shared.peers.borrow().is_empty() {
            let mut settled = shared.settled.subscribe();
            let _ = tokio::time::timeout_at(deadline, settled.wait_for(|settled| *settled)).await;
        }
        shared.pick(|_| false, true)
    }

    /// Notes the last failure; gives the peer to try next, if there may be another attempt.
    fn after(&self, call: Call, failed: &[Failed], spare: bool) -> Option<Arc<Peer>> {
        let shared = &self.shared;
        let last = failed.last()?;
        if matches!(last.known, Known::NotSent | Known::Broken) {
            shared.suspect(&last.peer, &last.problem);
        }
        let again = spare && (last.known == Known::NotSent || call.idempotent);
        let next = if again { shared.pick(|peer| is_among(failed, peer), false) } else { None };
        if next.is_none() {
            if failed.len() > 1 {
                shared.metrics.failed.inc();
            }
            return None;
        }
        // What was not sent cost the peer nothing, so that it is still the same call.
        if last.known != Known::NotSent && !shared.budget.spend() {
            shared.metrics.refused.inc();
            return None;
        }
        shared.metrics.failovers.inc();
        next
    }

    fn refused(&self, peer: &Peer, status: &Status) -> PeerError {
        PeerError::Refused {
            peer: self.shared.kind,
            endpoint: peer.to_string(),
            code: status.code(),
            message: plain(status),
        }
    }

    fn error(&self, failed: &[Failed]) -> PeerError {
        let shared = &self.shared;
        let mut problems = String::new();
        let mut add = |name: &dyn std::fmt::Display, problem: &str| {
            let separator = if problems.is_empty() { "" } else { "; " };
            let _ = write!(problems, "{separator}{name}: {problem}");
        };
        for failure in failed {
            add(&failure.peer, &failure.problem);
        }
        let peer = shared.kind;
        if failed.iter().any(|failure| failure.known != Known::NotSent) {
            return PeerError::Unknown { peer, problems };
        }
        // Nobody was called: everybody's last problem says what to look at.
        for other in shared.peers.borrow().iter() {
            if !is_among(failed, other) && other.rank() == Rank::Down {
                add(other, &other.problem());
            }
        }
        let unresolved = shared.unresolved.lock();
        if !unresolved.is_empty() {
            add(&shared.setting, &unresolved);
        }
        PeerError::Unreachable { peer, problems }
    }
}

fn late(limit: Duration) -> String {
    format!("no answer within {:.1} s", limit.as_secs_f64())
}

fn is_among(failed: &[Failed], peer: &Arc<Peer>) -> bool {
    failed.iter().any(|failure| Arc::ptr_eq(&failure.peer, peer))
}
