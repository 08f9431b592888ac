//! Back ends that send numbered messages through streams, at a pace, and repeat or give up what had no answer.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures::{
    FutureExt as _,
    future::BoxFuture,
    stream::{FuturesOrdered, StreamExt as _},
};
use rand::{Rng, rngs::StdRng, seq::index};
use sanjay_client::{
    Backend, BackendError, BackendOptions, Jitter, SendStream, UserResult,
    protocol::{ErrorBody, ErrorCode},
};
use sanjay_testkit::API_KEY;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::{
    history::Event,
    run::{Phase, Run, name},
};

/// Back ends at once.
pub(crate) const SENDERS: usize = 3;

/// Calls of one back end without an answer.
const WINDOW: usize = 200;

/// Calls that wait to be repeated; beyond it they are given up.
const MAX_REPEATS: usize = 10_000;

/// Most users of one call.
const MAX_USERS: usize = 5;

/// Between two portions.
const TICK: Duration = Duration::from_millis(20);

/// How long a back end rests after a stream broke.
const REST: Duration = Duration::from_millis(200);

/// A send to several users.
#[derive(Debug, Clone)]
struct Call {
    number: u64,
    users: Vec<String>,
    /// The stream on which it was asked for the first time; none, when it is a repeat.
    stream: Option<u64>,
}

type Answer = (Call, Result<Vec<UserResult>, BackendError>);

/// A back end of its own. It begins with another server than the one beside it.
pub(crate) async fn connect(servers: &[String], index: usize) -> Result<Backend, BackendError> {
    let mut servers = servers.to_vec();
    let from = index % servers.len().max(1);
    servers.rotate_left(from);
    let mut options = BackendOptions::new(servers.join(","), API_KEY);
    let jitter = Jitter::seeded(index as u64);
    options.jitter = Jitter::from_source(move || jitter.fraction() / 10.0);
    Backend::connect(options).await
}

/// Sends during the storm, and then repeats what it wants to know.
pub(crate) struct Sender {
    run: Arc<Run>,
    backend: Backend,
    random: StdRng,
    stream: Option<SendStream>,
    streams: u64,
    /// The next number; numbers of different senders differ.
    next: u64,
    pending: FuturesOrdered<BoxFuture<'static, Answer>>,
    repeats: VecDeque<Call>,
    rests_until: Instant,
    /// Messages that the pace allows now.
    budget: f64,
}

impl Sender {
    pub(crate) fn new(run: Arc<Run>, backend: Backend, index: usize) -> Self {
        Self {
            random: run.random(1_000_000 + index as u64),
            run,
            backend,
            stream: None,
            streams: index as u64 + 1,
            next: index as u64 + 1,
            pending: FuturesOrdered::new(),
            repeats: VecDeque::new(),
            rests_until: Instant::now(),
            budget: 0.0,
        }
    }

    /// Runs until the storm is over and everything that it repeats has an answer.
    pub(crate) async fn run(mut self) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut last = Instant::now();
        loop {
            tokio::select! {
                biased;
                Some((call, answer)) = self.pending.next(), if !self.pending.is_empty() => {
                    self.take(call, answer);
                }
                now = ticks.tick() => {
                    let rate = f64::from(self.run.load.rate) / SENDERS as f64;
                    self.budget = (self.budget + rate * (now - last).as_secs_f64()).min(rate / 4.0);
                    last = now;
                    if self.run.phase() > Phase::Storm && self.pending.is_empty() && self.repeats.is_empty() {
                        return;
                    }
                    if now >= self.rests_until {
                        self.portion().await;
                    }
                }
            }
        }
    }

    /// Sends what the pace allows. After the storm only repeats.
    async fn portion(&mut self) {
        while self.budget > 0.0 && self.pending.len() < WINDOW {
            let call = match self.repeats.pop_front() {
                Some(call) => call,
                None if self.run.phase() == Phase::Storm => self.new_call(),
                None => return,
            };
            self.budget -= call.users.len() as f64;
            self.ask(call).await;
            if self.stream.is_none() {
                return;
            }
        }
    }

    fn new_call(&mut self) -> Call {
        let number = self.next;
        self.next += SENDERS as u64;
        let count = self.random.random_range(1..=MAX_USERS.min(self.run.load.users));
        let users = index::sample(&mut self.random, self.run.load.users, count);
        let users: Vec<String> = users.into_iter().map(name).collect();
        let mut history = self.run.history();
        for user in &users {
            history.record(user, Event::Sent { number });
            if self.run.is_poison(number) {
                history.poison(user, number);
            }
        }
        drop(history);
        Call { number, users, stream: Some(0) }
    }

    async fn ask(&mut self, mut call: Call) {
        if self.stream.is_none() {
            self.streams += SENDERS as u64;
            self.stream = Some(self.backend.send_stream());
        }
        let Some(stream) = &mut self.stream else { return };
        call.stream = call.stream.map(|_| self.streams);
        let users: Vec<&str> = call.users.iter().map(String::as_str).collect();
        let (payload, key) = (self.run.payload(call.number), format!("key {}", call.number));
        match stream.send(&users, payload, &key).await {
            Ok(reply) => self.pending.push_back(async move { (call, reply.wait().await) }.boxed()),
            Err(error) => self.take(call, Err(error)),
        }
    }

    fn take(&mut self, call: Call, answer: Result<Vec<UserResult>, BackendError>) {
        match answer {
            Ok(results) => {
                let mut unknown = Vec::new();
                for UserResult { user, result } in results {
                    match result {
                        Ok(accepted) => {
                            let stream = call.stream.filter(|_| !accepted.duplicate);
                            let (seq, id) = (accepted.seq, accepted.message_id);
                            self.run.record(&user, Event::Accepted { number: call.number, seq, id, stream });
                        }
                        Err(error) => self.refused(&call, user, &error, &mut unknown),
                    }
                }
                self.not_known(call, unknown);
            }
            Err(BackendError::Refused(error)) if !error.retryable => {
                self.run.complain(format!("a call was refused for good: {}", error.message));
            }
            Err(error) => {
                self.run.not_answered(call.users.len(), &error.to_string());
                if !matches!(error, BackendError::Refused(_)) {
                    self.stream = None;
                }
                let users = call.users.clone();
                self.not_known(call, users);
            }
        }
    }

    fn refused(&mut self, call: &Call, user: String, error: &ErrorBody, unknown: &mut Vec<String>) {
        match error.code {
            ErrorCode::QueueFull => self.run.record(&user, Event::Refused { number: call.number }),
            _ if error.retryable => {
                self.run.not_answered(1, &error.message);
                unknown.push(user);
            }
            _ => self.run.complain(format!("a send was refused for good: {}", error.message)),
        }
    }

    /// Repeats a call for some of its users, or leaves it open what became of it.
    fn not_known(&mut self, call: Call, users: Vec<String>) {
        if users.is_empty() {
            return;
        }
        self.rests_until = Instant::now() + REST;
        if self.repeats.len() < MAX_REPEATS && self.random.random_bool(0.5) {
            self.repeats.push_back(Call { users, stream: None, ..call });
        }
    }
}
