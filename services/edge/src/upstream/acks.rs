//! Acks, failures and reports of inboxes: those of many connections travel together, and are repeated until delivery has
//! them.
//!
//! What is ready goes out in one call, and the next call gathers what comes meanwhile. When a call takes long, others go
//! beside it, so that one inbox that is slow does not hold up all of an edge. Of one user there is one call at a time: what
//! a connection says of its inbox arrives in the order in which it was said.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::{StreamExt, stream::FuturesUnordered};
use sanjay_proto::{
    client::v1::SeqRange,
    edge::v1::{AckRequest as PbAckRequest, InboxError, Rewritten, UserAck, UserAckResult},
};
use sanjay_protocol::{ErrorBody, ErrorCode};
use sanjay_runtime::{
    SharedRandom,
    grpc::{Call, PeerError, PeerPool},
    random::full_jitter,
};
use tokio::{sync::mpsc, time::Instant};
use tonic::Code;

use super::{
    AckRequest, ShardEvent,
    inbox::{MAX_BATCH, client},
    shards::Replies,
};
use crate::metrics::Metrics;

/// An ack that has no answer by then is sent again: until it is durable or refused for good.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Pauses between attempts: full jitter that doubles from the first to the other.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// A call that takes longer has others go beside it. A commit to a disk takes less.
const SLOW: Duration = Duration::from_millis(50);

/// Most calls at once.
const MAX_CALLS: usize = 8;

/// Requests that wait here for a call; more wait in the lanes of the shards.
const MAX_WAITING: usize = 2 * MAX_BATCH;

/// The task: ends when the shards are gone and everything is durable.
///
/// While delivery is away acks and failures wait here and in the lanes of the shards, which then stop reading sockets
/// and judge no deadline. `node` is the edge's name.
pub async fn run(
    node: String,
    delivery: PeerPool,
    requests: mpsc::Receiver<AckRequest>,
    replies: Replies,
    random: SharedRandom,
    metrics: Arc<Metrics>,
) {
    let call = |acks: Vec<UserAck>| {
        metrics.acks.inc_by(acks.len() as u64);
        let (delivery, edge) = (delivery.clone(), node.clone());
        async move {
            let request = PbAckRequest { acks, edge };
            let ack = async |channel, request| client(channel).ack(request).await;
            match delivery.call(Call::idempotent(TIMEOUT), request, ack).await {
                Ok(response) => Ok(response.results),
                Err(PeerError::Refused { code: Code::InvalidArgument, message, .. }) => {
                    Err(Failure::Refused(message))
                }
                Err(error) => Err(Failure::Away(error.to_string())),
            }
        }
    };
    let answer = |key, id, result| replies.reply(key, ShardEvent::Acked(key, id, result));
    Acks::new(call, answer, random, &metrics).run(requests).await;
}

/// Why a call failed.
#[derive(Debug)]
enum Failure {
    /// The same batch would be refused again.
    Refused(String),
    /// Later it may be taken.
    Away(String),
}

/// What waits, and which users have a call under way.
struct Acks<'a, C, A> {
    call: C,
    answer: A,
    random: SharedRandom,
    metrics: &'a Metrics,
    waiting: VecDeque<AckRequest>,
    busy: HashSet<String>,
    /// Failures in a row, and until when nothing is tried.
    attempt: u32,
    rests_until: Option<Instant>,
    /// When a call was made last.
    called: Instant,
}

impl<C, F, A> Acks<'_, C, A>
where
    C: Fn(Vec<UserAck>) -> F,
    F: Future<Output = Result<Vec<UserAckResult>, Failure>>,
    A: Fn(super::ConnKey, Option<u64>, Result<(), ErrorBody>),
{
    fn new(call: C, answer: A, random: SharedRandom, metrics: &Metrics) -> Acks<'_, C, A> {
        Acks {
            call,
            answer,
            random,
            metrics,
            waiting: VecDeque::new(),
            busy: HashSet::new(),
            attempt: 0,
            rests_until: None,
            called: Instant::now(),
        }
    }

    async fn run(mut self, mut requests: mpsc::Receiver<AckRequest>) {
        let (mut calls, mut open, mut taken) = (FuturesUnordered::new(), true, Vec::new());
        while open || !self.waiting.is_empty() || !calls.is_empty() {
            while self.may_call(calls.len())
                && let Some(batch) = self.next_batch()
            {
                let calling = (self.call)(batch.iter().map(user_ack).collect());
                self.called = Instant::now();
                calls.push(async move { (batch, calling.await) });
            }
            let room = MAX_WAITING.saturating_sub(self.waiting.len()).min(MAX_BATCH);
            let again = self.looks_again_at();
            tokio::select! {
                Some((batch, result)) = calls.next(), if !calls.is_empty() => self.done(batch, result),
                count = requests.recv_many(&mut taken, room), if open && room > 0 => {
                    open = count > 0;
                    self.waiting.extend(taken.drain(..));
                }
                () = tokio::time::sleep_until(again), if !self.waiting.is_empty() => {}
            }
        }
    }

    /// Whether a call may be made beside so many others. While delivery fails there is one at a time.
    fn may_call(&self, calls: usize) -> bool {
        let now = Instant::now();
        let rests = self.rests_until.is_some_and(|until| until > now);
        let beside = self.attempt == 0 && calls < MAX_CALLS && self.called + SLOW <= now;
        !rests && (calls == 0 || beside)
    }

    /// When a call may be made that may not be made now, unless one under way ends before.
    fn looks_again_at(&self) -> Instant {
        self.rests_until.unwrap_or(self.called).max(self.called + SLOW).max(Instant::now() + SLOW / 5)
    }

    /// What goes out together: of users without a call under way, in the order in which it came.
    fn next_batch(&mut self) -> Option<Vec<AckRequest>> {
        let mut batch = Vec::new();
        let mut rest = VecDeque::with_capacity(self.waiting.len());
        for request in self.waiting.drain(..) {
            if batch.len() < MAX_BATCH && !self.busy.contains(&request.user) {
                batch.push(request);
            } else {
                rest.push_back(request);
            }
        }
        self.waiting = rest;
        self.busy.extend(batch.iter().map(|request: &AckRequest| request.user.clone()));
        Some(batch).filter(|batch| !batch.is_empty())
    }

    /// Answers what was settled or refused, and keeps what delivery could not take now, before what came later.
    fn done(&mut self, batch: Vec<AckRequest>, result: Result<Vec<UserAckResult>, Failure>) {
        for request in &batch {
            self.busy.remove(&request.user);
        }
        let (results, mut why) = match result {
            Ok(results) if results.len() == batch.len() => (results, None),
            Ok(_) => {
                (away(&batch), Some("delivery answered another number of acks than were sent".to_owned()))
            }
            Err(Failure::Away(why)) => (away(&batch), Some(why)),
            Err(Failure::Refused(why)) => {
                tracing::error!(
                    why,
                    "delivery refused a batch of acks; its messages will be delivered again"
                );
                let refused = ErrorBody::new(ErrorCode::Internal, why);
                for (conn, id) in batch.into_iter().filter_map(|request| request.waiter) {
                    (self.answer)(conn, id, Err(refused.clone()));
                }
                return self.note(None);
            }
        };
        let mut again = Vec::new();
        for (request, result) in batch.into_iter().zip(results) {
            let error =
                result.error.map(|error| ErrorBody::new(ErrorCode::from_text(&error.code), error.message));
            match (error, request.waiter) {
                (Some(error), _) if error.retryable => {
                    why.get_or_insert(error.message);
                    again.push(request);
                }
                (error, Some((conn, id))) => (self.answer)(conn, id, error.map_or(Ok(()), Err)),
                (Some(error), None) => {
                    tracing::debug!(
                        code = error.code.as_str(),
                        why = error.message,
                        "delivery refused a report"
                    );
                }
                (None, None) => {}
            }
        }
        for request in again.into_iter().rev() {
            self.waiting.push_front(request);
        }
        self.note(why);
    }

    /// Notes how a call went: a failure has everything rest.
    fn note(&mut self, why: Option<String>) {
        let Some(why) = why else {
            if self.attempt > 0 {
                tracing::info!(attempt = self.attempt, "acks go through again");
            }
            (self.attempt, self.rests_until) = (0, None);
            return;
        };
        self.attempt += 1;
        self.metrics.ack_failures.inc();
        if self.attempt == 1 {
            tracing::warn!(why, "acks wait; check that delivery runs and edge.delivery names it");
        }
        let pause = full_jitter(&*self.random, self.attempt, FIRST_PAUSE, MAX_PAUSE);
        self.rests_until = Some(Instant::now() + pause);
    }
}

/// Every part of a call that came to nothing.
fn away(batch: &[AckRequest]) -> Vec<UserAckResult> {
    batch.iter().map(|_| error(ErrorCode::Unavailable, "")).collect()
}

fn error(code: ErrorCode, why: &str) -> UserAckResult {
    let error = InboxError { code: code.as_str().to_owned(), message: why.to_owned() };
    UserAckResult { mark: 0, error: Some(error) }
}

fn user_ack(request: &AckRequest) -> UserAck {
    UserAck {
        user: request.user.clone(),
        device: request.device.clone(),
        epoch: request.epoch,
        acked: request.ranges.iter().map(|&(from, to)| SeqRange { from, to }).collect(),
        written: request.written,
        milestones: Vec::new(),
        rewritten: request.rewritten.iter().map(|&(seq, delivery)| Rewritten { seq, delivery }).collect(),
        failed: request.failed.clone(),
        session: request.session.as_bytes().to_vec().into(),
        trace: request.trace.clone(),
        shared: request.shared,
    }
}

#[cfg(test)]
#[path = "acks_tests.rs"]
mod tests;
