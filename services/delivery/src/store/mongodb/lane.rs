//! A lane writes to the inboxes of its users: what waits goes out as one group of writes, one write for each
//! user, and the next group when that is answered. Users are spread over lanes by their hash, so that the order of
//! what one user gets is the order in which it was submitted.

mod bury;
mod reads;
mod user;

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use sanjay_runtime::random::SharedRandom;
use tokio::{sync::mpsc, task::JoinHandle, time::Instant};

use user::{Side, User};

use super::{
    ack,
    append::{self, KeysBeside},
    database::{Database, Outcome},
    documents::SettlerDoc,
    inbox::Inbox,
    plan::{Attempt, Bounds, Kind, Rules, Step, arm, over, untidy},
    tidy::{self, Tidied},
    work::{Queued, Work},
};
use crate::{
    metrics::StoreOperation,
    spans,
    store::{CommitSink, NewMessage, Overflow, StoreError, StoreOptions},
};

/// Most users of one group of writes.
const MAX_GROUP: usize = 256;

/// Bytes of payload after which a group takes no more users.
const MAX_GROUP_BYTES: usize = 4 * 1024 * 1024;

/// Most work that a lane has taken off its queue.
const MAX_TAKEN: usize = 1_024;

/// Most inboxes that a lane remembers.
const MAX_INBOXES: usize = 512;

/// Pauses after rounds that came to nothing: short at first, because another node or the majority may be just
/// about to be through.
const PAUSES_MS: [u64; 6] = [2, 5, 20, 50, 100, 200];

/// A lane's state.
pub(super) struct Lane {
    database: Database,
    sink: Arc<dyn CommitSink>,
    max_unsettled: u64,
    max_unsettled_bytes: u64,
    overflow: Overflow,
    keep_expired: bool,
    max_attempts: u32,
    random: SharedRandom,
    bounds: Bounds,
    queue: mpsc::Receiver<Queued>,
    users: HashMap<String, User>,
    /// The names of `users`, each once, in the order of their turns.
    turns: VecDeque<String>,
    /// How much work `users` hold.
    taken: usize,
    inboxes: HashMap<String, Inbox>,
    next_batch: i64,
    /// Users whose inbox is to be tidied, and the tidying under way.
    untidy: Vec<String>,
    tidying: Option<JoinHandle<Vec<Tidied>>>,
    /// Rounds in a row that came to nothing, whether this one came to something, and what went wrong last.
    idle_rounds: usize,
    progress: bool,
    problem: Option<StoreError>,
}

impl Lane {
    pub(super) fn new(
        database: Database,
        options: &StoreOptions,
        bounds: Bounds,
        queue: mpsc::Receiver<Queued>,
    ) -> Self {
        Self {
            database,
            sink: options.on_commit.clone(),
            max_unsettled: options.max_unsettled,
            max_unsettled_bytes: options.max_unsettled_bytes,
            overflow: options.overflow,
            keep_expired: options.keep_expired,
            max_attempts: options.max_attempts,
            random: options.random.clone(),
            bounds,
            queue,
            users: HashMap::new(),
            turns: VecDeque::new(),
            taken: 0,
            inboxes: HashMap::new(),
            next_batch: 0,
            untidy: Vec::new(),
            tidying: None,
            idle_rounds: 0,
            progress: false,
            problem: None,
        }
    }

    /// Runs until the queue is closed and everything in it is answered.
    pub(super) async fn run(mut self) {
        loop {
            if self.users.is_empty() {
                // An inbox is tidied beside the writes, or when there are none.
                tokio::select! {
                    queued = self.queue.recv() => match queued {
                        Some(queued) => self.take(queued),
                        None => return,
                    },
                    tidied = join(&mut self.tidying) => self.tidied(tidied),
                }
            }
            while self.taken < MAX_TAKEN {
                let Ok(queued) = self.queue.try_recv() else { break };
                self.take(queued);
            }
            if self.tidying.as_ref().is_some_and(JoinHandle::is_finished) {
                let tidied = join(&mut self.tidying).await;
                self.tidied(tidied);
            }
            self.round().await;
            self.tidy();
        }
    }

    fn take(&mut self, queued: Queued) {
        self.taken += 1;
        match self.users.get_mut(&queued.user) {
            Some(user) => user.push(queued),
            None => {
                self.turns.push_back(queued.user.clone());
                self.users.entry(queued.user.clone()).or_default().push(queued);
            }
        }
    }

    /// One group of writes.
    async fn round(&mut self) {
        self.give_up();
        self.rest();
        self.progress = false;
        let before = self.taken;
        let users: Vec<String> = self.turns.drain(..self.turns.len().min(MAX_GROUP)).collect();
        if let Err(error) = self.group(&users).await {
            self.problem = Some(error);
        }
        let empty = users.is_empty();
        self.turns.extend(users);
        self.rest();
        self.forget();
        if self.taken < before || self.progress || empty {
            (self.idle_rounds, self.problem) = (0, None);
            return;
        }
        let pause = PAUSES_MS[self.idle_rounds.min(PAUSES_MS.len() - 1)];
        self.idle_rounds += 1;
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    async fn group(&mut self, users: &[String]) -> Result<(), StoreError> {
        self.read(users).await?;
        let beside = self.read_keys(users).await?;
        let (mut models, mut attempts, mut bytes) = (Vec::new(), Vec::new(), 0);
        for name in users {
            if bytes > MAX_GROUP_BYTES {
                break;
            }
            match self.plan(name, &beside).await {
                Ok(Some(attempt)) => {
                    bytes += attempt.bytes;
                    models.push(attempt.model.clone());
                    attempts.push((name, attempt));
                }
                Ok(None) => {}
                // The others go on: what is to be written again for them is known to `attempts` alone.
                Err(error) => self.problem = Some(error),
            }
        }
        let began = Instant::now();
        let items: usize = attempts.iter().map(|(_, attempt)| attempt.items()).sum();
        let span = spans::commit(self.appending(&attempts));
        let outcomes = self.database.write(StoreOperation::Write, models).await;
        drop(span);
        for ((name, attempt), outcome) in attempts.into_iter().zip(outcomes) {
            self.finish(name, attempt, outcome);
        }
        self.database.metrics.group_commit(items, began.elapsed());
        Ok(())
    }

    /// The messages that these writes append.
    fn appending<'a>(
        &'a self,
        attempts: &'a [(&String, Box<Attempt>)],
    ) -> impl Iterator<Item = &'a NewMessage> + Clone {
        attempts.iter().flat_map(|(name, attempt)| {
            let count = if let Kind::Append(run) = &attempt.kind { run.count } else { 0 };
            let queued = self.users.get(*name).into_iter().flat_map(|user| &user.appends).take(count);
            queued.filter_map(|queued| match &queued.work {
                Work::Append(append) => Some(&append.message),
                _ => None,
            })
        })
    }

    /// Makes the next write for a user, and answers what needs none.
    async fn plan(&mut self, name: &str, beside: &KeysBeside) -> Result<Option<Box<Attempt>>, StoreError> {
        if let Some(attempt) = self.resolve(name) {
            return Ok(Some(attempt));
        }
        let now_us = self.database.clock.now_us();
        // Whether messages cannot go in this round.
        let mut waits = false;
        loop {
            let batch = self.next_batch;
            let rules = Rules {
                database: &self.database,
                now_us,
                max_unsettled: self.max_unsettled,
                max_unsettled_bytes: self.max_unsettled_bytes,
                overflow: self.overflow,
                keep_expired: self.keep_expired,
                max_attempts: self.max_attempts,
                random: &*self.random,
                batch,
                watched: self.sink.watches(),
            };
            let Some(user) = self.users.get_mut(name) else { return Ok(None) };
            let Some(side) = user.turn(waits) else { return Ok(None) };
            let (before, acks_wait) = (user.len(), !user.acks.is_empty());
            let queue = user.queue(side);
            let step = match (queue.front().map(|queued| &queued.work), self.inboxes.get(name)) {
                (None, _) => return Ok(None),
                (Some(Work::Arm(_)), _) => arm(&rules, name, queue),
                (Some(_), None) => Step::Read,
                (Some(Work::Append(_)), Some(inbox)) if over(inbox, &self.bounds) => Step::Wait,
                (Some(Work::Append(_)), Some(inbox)) => {
                    append::plan(&rules, name, queue, acks_wait, inbox, beside)
                }
                (Some(Work::Ack(_)), Some(inbox)) => ack::plan(&rules, name, queue, inbox),
            };
            match step {
                Step::Write(attempt) => {
                    self.next_batch += 1;
                    return Ok(Some(attempt));
                }
                Step::Read => self.read_inboxes(&[name.to_owned()]).await?,
                Step::Beside(from, to) => self.read_beside(name, from, to).await?,
                Step::Bury(seqs) => self.bury(name, &seqs).await?,
                Step::Again if user.len() < before => {}
                Step::Again if side == Side::Appends => waits = true,
                Step::Again => return Ok(None),
                Step::Wait => {
                    self.untidy.push(name.to_owned());
                    waits = true;
                }
                Step::Fail(count, error) => {
                    let failed = user.queue(side).drain(..count);
                    failed.for_each(|queued| queued.work.fail(&error));
                }
            }
        }
    }

    /// What became of a write without an answer, now that the inbox was read again: it was done, or it is made
    /// once more, or it can no longer happen and its messages are planned afresh.
    fn resolve(&mut self, name: &str) -> Option<Box<Attempt>> {
        let (user, inbox) = (self.users.get_mut(name)?, self.inboxes.get_mut(name)?);
        let attempt = user.unanswered.take()?;
        let (database, sink) = (&self.database, &*self.sink);
        let done = match &attempt.kind {
            Kind::Append(_) => {
                inbox.writers.get(&*database.node).is_some_and(|writer| writer.b == attempt.batch)
            }
            Kind::Ack { plan, .. } => {
                let ours = |settler: &SettlerDoc| settler.w == *database.node && settler.b == attempt.batch;
                plan.settles() && inbox.settler.as_ref().is_some_and(ours)
            }
            Kind::Arm(_) => false,
        };
        let again = match attempt.kind {
            Kind::Append(run) if done => {
                let queue = &mut user.appends;
                let next = append::committed(database, sink, name, queue, inbox, attempt.batch, run);
                next.into_iter().for_each(|next| user.acks.push_front(next));
                return None;
            }
            Kind::Ack { plan, .. } if done => {
                plan.tell(sink, name, inbox.epoch);
                plan.answer(&mut user.acks);
                return None;
            }
            Kind::Append(ref run) => run.may_match(inbox),
            Kind::Ack { settles, ref plan } => plan.settles() && inbox.settles == settles,
            Kind::Arm(_) => false,
        };
        if again && attempt.until_us.is_some() {
            // Perhaps it came too late because this node's idea of the server's time is wrong.
            database.ask_time.notify_one();
        }
        // One that is too late is planned afresh, with a time of its own.
        Some(attempt).filter(|attempt| again && !attempt.is_late(database.clock.now_us()))
    }

    /// Takes over what became of a write.
    fn finish(&mut self, name: &str, attempt: Box<Attempt>, outcome: Outcome) {
        let Some(user) = self.users.get_mut(name) else { return };
        if let Kind::Arm(count) = attempt.kind {
            // An inbox that needs no arming is as good as an armed one, and a hint may be dropped.
            user.acks.drain(..count);
            return;
        }
        let Some(inbox) = self.inboxes.get_mut(name) else { return };
        match outcome {
            Outcome::Done => {
                self.progress = true;
                let (database, sink) = (&self.database, &*self.sink);
                match attempt.kind {
                    Kind::Append(run) => {
                        let queue = &mut user.appends;
                        let next = append::committed(database, sink, name, queue, inbox, attempt.batch, run);
                        next.into_iter().for_each(|next| user.acks.push_front(next));
                    }
                    Kind::Ack { plan, .. } => {
                        plan.apply(inbox);
                        plan.tell(sink, name, inbox.epoch);
                        plan.answer(&mut user.acks);
                    }
                    Kind::Arm(_) => {}
                }
                if untidy(inbox, &self.bounds) {
                    self.untidy.push(name.to_owned());
                }
            }
            Outcome::Missed => {
                // A retry by the driver may have missed what its first try had done, so this too is looked up.
                self.database.metrics.store_conflict();
                (inbox.shared, inbox.stale, user.unanswered) = (true, true, Some(attempt));
            }
            Outcome::Unknown(problem) => {
                self.database.metrics.store_unknown();
                self.problem = Some(StoreError::Unavailable(problem));
                (inbox.stale, user.unanswered) = (true, Some(attempt));
            }
        }
    }

    /// Drops the users without work, and counts what the others have.
    fn rest(&mut self) {
        self.users.retain(|_, user| !user.is_empty());
        self.turns.retain(|name| self.users.contains_key(name));
        self.taken = self.users.values().map(User::len).sum();
    }

    /// Answers work that has waited too long.
    fn give_up(&mut self) {
        let now = Instant::now();
        let late = "the database did not answer in time; whether something was stored is unknown".to_owned();
        let error = self.problem.clone().unwrap_or(StoreError::Unavailable(late));
        for late in self.users.values_mut().flat_map(|user| user.late(now)) {
            self.database.metrics.store_error();
            late.work.fail(&error);
        }
    }

    /// Keeps the number of remembered inboxes bounded: those without work are read again when they are needed.
    fn forget(&mut self) {
        if self.inboxes.len() > MAX_INBOXES {
            self.inboxes.retain(|name, _| self.users.contains_key(name));
        }
    }

    /// Starts tidying inboxes, unless that is under way.
    fn tidy(&mut self) {
        if self.tidying.is_none() && !self.untidy.is_empty() {
            self.untidy.sort_unstable();
            self.untidy.dedup();
            let users = self.untidy.split_off(self.untidy.len().saturating_sub(tidy::MAX_USERS));
            self.tidying = Some(tokio::spawn(tidy::tidy(self.database.clone(), self.bounds, users)));
        }
    }

    fn tidied(&mut self, tidied: Vec<Tidied>) {
        for tidied in tidied {
            if let Some(inbox) = self.inboxes.get_mut(&tidied.user) {
                tidied.apply(inbox);
                if !untidy(inbox, &self.bounds) {
                    continue;
                }
                if tidied.moved() {
                    // What came meanwhile may be too much already.
                    self.untidy.push(tidied.user);
                } else {
                    // Another node did it, which changes nothing by which this one would notice.
                    inbox.stale = true;
                }
            }
        }
    }
}

/// Waits for the tidying under way, for ever when there is none.
async fn join(tidying: &mut Option<JoinHandle<Vec<Tidied>>>) -> Vec<Tidied> {
    let Some(task) = tidying else { return std::future::pending().await };
    let result = task.await;
    *tidying = None;
    result.unwrap_or_else(|error| {
        if let Ok(panic) = error.try_into_panic() {
            std::panic::resume_unwind(panic);
        }
        // The runtime is shutting down.
        Vec::new()
    })
}
