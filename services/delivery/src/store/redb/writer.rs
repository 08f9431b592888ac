//! The one thread that writes: it takes all operations that are ready, applies them in one transaction, makes
//! that durable and then answers.

use std::{
    cell::Cell,
    ops::ControlFlow,
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    time::{Duration, Instant},
};

use redb::Durability;
use sanjay_protocol::ErrorCode;
use sanjay_runtime::{clock::SharedClock, random::SharedRandom};
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use uuid::Uuid;

use super::{
    fanout,
    file::RedbFile,
    room::Quotas,
    transaction::{Rules, Tables, Told},
};
use crate::{
    metrics::Metrics,
    spans,
    store::{
        Acked, AppendError, Appended, CommitSink, DueInbox, Expired, Forgotten, NewMessage, Rearm,
        RegisterError, Revocation, Scheduled, ScheduledAt, Settle, StoreError, epoch::epoch,
    },
};

/// Most messages and acks of one transaction: bounds how long the first of them waits for the last.
const MAX_BATCH_ITEMS: usize = 4_096;

/// Most bytes of payload in one transaction.
const MAX_BATCH_BYTES: usize = 8 * 1024 * 1024;

/// Most commits in a row that are not synced: what they free is not used again before one that is.
const MAX_UNSYNCED: u32 = 64;

/// How long a file that could not be opened again is left alone before the next try.
const REOPEN_PAUSE: Duration = Duration::from_millis(250);

/// Something to write, with where its answer goes.
pub(super) enum Operation {
    Append {
        messages: Vec<NewMessage>,
        answer: oneshot::Sender<Vec<Result<Appended, AppendError>>>,
    },
    Ack {
        settles: Vec<Settle>,
        answer: oneshot::Sender<Vec<Result<Acked, StoreError>>>,
    },
    Arm {
        users: Vec<String>,
    },
    Claim {
        now_us: u64,
        until_us: u64,
        limit: usize,
        answer: oneshot::Sender<Result<Vec<DueInbox>, StoreError>>,
    },
    Rearm {
        rearms: Vec<Rearm>,
        answer: oneshot::Sender<Result<(), StoreError>>,
    },
    Expire {
        now_us: u64,
        limit: usize,
        answer: oneshot::Sender<Result<Expired, StoreError>>,
    },
    Schedule {
        messages: Vec<Scheduled>,
        answer: oneshot::Sender<Vec<Result<ScheduledAt, AppendError>>>,
    },
    ClaimScheduled {
        now_us: u64,
        until_us: u64,
        limit: usize,
        answer: oneshot::Sender<Result<Vec<Scheduled>, StoreError>>,
    },
    /// Without a time for good.
    Unschedule {
        messages: Vec<(String, Uuid)>,
        until_us: Option<u64>,
        answer: oneshot::Sender<Result<u64, StoreError>>,
    },
    Register {
        devices: Vec<(String, String)>,
        answer: oneshot::Sender<Vec<Result<(), RegisterError>>>,
    },
    Forget {
        now_us: u64,
        limit: usize,
        answer: oneshot::Sender<Result<Forgotten, StoreError>>,
    },
    Sweep {
        now_us: u64,
        limit: usize,
        answer: oneshot::Sender<Result<usize, StoreError>>,
    },
    Redriven {
        user: String,
        message_id: Uuid,
        sent_as: Uuid,
        answer: oneshot::Sender<Result<bool, StoreError>>,
    },
    Purge {
        letters: Vec<(String, Uuid)>,
        answer: oneshot::Sender<Result<u64, StoreError>>,
    },
    FanOut(fanout::Work),
    Revoke {
        revocation: Revocation,
        answer: oneshot::Sender<Result<(), StoreError>>,
    },
}

/// An operation in the queue, with its share of the queue's bytes.
pub(super) struct Queued {
    pub(super) operation: Operation,
    pub(super) bytes: usize,
    pub(super) _permit: Option<OwnedSemaphorePermit>,
}

/// What an operation gets once the transaction is committed.
enum Outcome {
    Append(Vec<Result<Appended, AppendError>>),
    Ack(Vec<Result<Acked, StoreError>>),
    Claim(Vec<DueInbox>),
    Expire(Expired),
    Schedule(Vec<Result<ScheduledAt, AppendError>>),
    ClaimScheduled(Vec<Scheduled>),
    Unschedule(u64),
    Register(Vec<Result<(), RegisterError>>),
    Forget(Forgotten),
    Sweep(usize),
    Redriven(bool),
    Purge(u64),
    FanOut(fanout::Done),
    Done,
}

/// What a transaction came to.
struct Committed {
    /// For each operation.
    outcomes: Vec<Outcome>,
    told: Told,
    /// How many items were made durable.
    items: usize,
}

impl Operation {
    /// How many messages, acks or inboxes it touches.
    fn items(&self) -> usize {
        match self {
            Operation::Append { messages, .. } => messages.len(),
            Operation::Ack { settles, .. } => settles.len(),
            Operation::Arm { users } => users.len(),
            Operation::Rearm { rearms, .. } => rearms.len(),
            Operation::Claim { limit, .. }
            | Operation::Expire { limit, .. }
            | Operation::ClaimScheduled { limit, .. }
            | Operation::Forget { limit, .. }
            | Operation::Sweep { limit, .. } => *limit,
            Operation::Schedule { messages, .. } => messages.len(),
            Operation::Unschedule { messages, .. } => messages.len(),
            Operation::Register { devices, .. } => devices.len(),
            Operation::Redriven { .. } | Operation::Revoke { .. } => 1,
            Operation::Purge { letters, .. } => letters.len(),
            Operation::FanOut(work) => work.items(),
        }
    }

    /// What it appends.
    fn messages(&self) -> &[NewMessage] {
        match self {
            Operation::Append { messages, .. } => messages,
            _ => &[],
        }
    }

    fn apply(&self, tables: &mut Tables<'_>) -> Result<Outcome, redb::Error> {
        Ok(match self {
            Operation::Append { messages, .. } => Outcome::Append(
                messages.iter().map(|message| tables.append(message)).collect::<Result<_, _>>()?,
            ),
            Operation::Ack { settles, .. } => Outcome::Ack(
                settles.iter().map(|settle| tables.ack(settle).map(Ok)).collect::<Result<_, _>>()?,
            ),
            Operation::Arm { users } => {
                tables.arm(users)?;
                Outcome::Done
            }
            Operation::Claim { now_us, until_us, limit, .. } => {
                Outcome::Claim(tables.claim_due(*now_us, *until_us, *limit)?)
            }
            Operation::Rearm { rearms, .. } => {
                tables.rearm(rearms)?;
                Outcome::Done
            }
            Operation::Expire { now_us, limit, .. } => Outcome::Expire(tables.expire(*now_us, *limit)?),
            Operation::Schedule { messages, .. } => Outcome::Schedule(
                messages.iter().map(|message| tables.schedule(message)).collect::<Result<_, _>>()?,
            ),
            Operation::ClaimScheduled { now_us, until_us, limit, .. } => {
                Outcome::ClaimScheduled(tables.claim_scheduled(*now_us, *until_us, *limit)?)
            }
            Operation::Unschedule { messages, until_us: None, .. } => {
                Outcome::Unschedule(tables.unschedule(messages)?)
            }
            Operation::Unschedule { messages, until_us: Some(until_us), .. } => {
                Outcome::Unschedule(tables.postpone(messages, *until_us)?)
            }
            Operation::Register { devices, .. } => Outcome::Register(
                devices
                    .iter()
                    .map(|(user, device)| tables.register(user, device))
                    .collect::<Result<_, _>>()?,
            ),
            Operation::Forget { now_us, limit, .. } => {
                Outcome::Forget(tables.forget_devices(*now_us, *limit)?)
            }
            Operation::Sweep { now_us, limit, .. } => Outcome::Sweep(tables.sweep(*now_us, *limit)?),
            Operation::Redriven { user, message_id, sent_as, .. } => {
                Outcome::Redriven(tables.redriven(user, *message_id, *sent_as)?)
            }
            Operation::Purge { letters, .. } => Outcome::Purge(tables.purge(letters)?),
            Operation::FanOut(work) => Outcome::FanOut(work.apply(tables)?),
            Operation::Revoke { revocation, .. } => {
                tables.revoke(revocation)?;
                Outcome::Done
            }
        })
    }

    /// Answers; who asked may have gone away, which is no concern of the writer.
    fn answer(self, outcome: Outcome) {
        match (self, outcome) {
            (Operation::Append { answer, .. }, Outcome::Append(results)) => drop(answer.send(results)),
            (Operation::Ack { answer, .. }, Outcome::Ack(results)) => drop(answer.send(results)),
            (Operation::Claim { answer, .. }, Outcome::Claim(claimed)) => drop(answer.send(Ok(claimed))),
            (Operation::Rearm { answer, .. }, Outcome::Done) => drop(answer.send(Ok(()))),
            (Operation::Expire { answer, .. }, Outcome::Expire(expired)) => drop(answer.send(Ok(expired))),
            (Operation::Schedule { answer, .. }, Outcome::Schedule(results)) => drop(answer.send(results)),
            (Operation::ClaimScheduled { answer, .. }, Outcome::ClaimScheduled(claimed)) => {
                drop(answer.send(Ok(claimed)));
            }
            (Operation::Unschedule { answer, .. }, Outcome::Unschedule(count)) => {
                drop(answer.send(Ok(count)));
            }
            (Operation::Register { answer, .. }, Outcome::Register(results)) => drop(answer.send(results)),
            (Operation::Forget { answer, .. }, Outcome::Forget(forgotten)) => {
                drop(answer.send(Ok(forgotten)));
            }
            (Operation::Sweep { answer, .. }, Outcome::Sweep(removed)) => drop(answer.send(Ok(removed))),
            (Operation::Redriven { answer, .. }, Outcome::Redriven(found)) => drop(answer.send(Ok(found))),
            (Operation::Purge { answer, .. }, Outcome::Purge(purged)) => drop(answer.send(Ok(purged))),
            (Operation::FanOut(work), Outcome::FanOut(done)) => work.answer(done),
            (Operation::Revoke { answer, .. }, Outcome::Done) => drop(answer.send(Ok(()))),
            _ => {}
        }
    }

    fn fail(self, error: &StoreError) {
        match self {
            Operation::Append { messages, answer } => {
                drop(answer.send(messages.iter().map(|_| Err(AppendError::Store(error.clone()))).collect()));
            }
            Operation::Ack { settles, answer } => {
                drop(answer.send(settles.iter().map(|_| Err(error.clone())).collect()));
            }
            Operation::Schedule { messages, answer } => {
                drop(answer.send(messages.iter().map(|_| Err(AppendError::Store(error.clone()))).collect()));
            }
            Operation::Expire { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::ClaimScheduled { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::Unschedule { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::Claim { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::Rearm { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::Register { devices, answer } => {
                let failed = devices.iter().map(|_| Err(error.clone().into()));
                drop(answer.send(failed.collect()));
            }
            Operation::Forget { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::Sweep { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::Redriven { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::Purge { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::FanOut(work) => work.fail(error),
            Operation::Revoke { answer, .. } => drop(answer.send(Err(error.clone()))),
            Operation::Arm { .. } => {}
        }
    }
}

/// The write side of the store. Its thread belongs to no runtime, so time is the system's monotonic clock here:
/// tokio's would be the same outside a runtime. It only measures commits and paces opening the file again.
pub(super) struct Writer {
    pub(super) file: Arc<RedbFile>,
    pub(super) operations: Receiver<Queued>,
    pub(super) store_id: u64,
    pub(super) quotas: Quotas,
    pub(super) keep_expired: bool,
    pub(super) max_attempts: u32,
    pub(super) random: SharedRandom,
    pub(super) clock: SharedClock,
    pub(super) metrics: Metrics,
    pub(super) on_commit: Arc<dyn CommitSink>,
    /// Commits since the last one that was synced.
    pub(super) unsynced: Cell<u32>,
    /// The place in the log of receipts that the next one gets, for those who wait for one.
    pub(super) next_receipt: watch::Sender<u64>,
}

impl Writer {
    /// Runs until every sender is gone and the queue is empty.
    pub(super) fn run(self) {
        let (mut tried, mut said) = (None, false);
        loop {
            let batch = match self.next_batch() {
                ControlFlow::Continue(batch) => batch,
                ControlFlow::Break(()) => break,
            };
            if !self.file.is_open() && tried.is_none_or(|at: Instant| at.elapsed() >= REOPEN_PAUSE) {
                tried = Some(Instant::now());
                said = self.reopen(said);
            }
            if batch.is_empty() {
                continue;
            }
            let started = Instant::now();
            match self.commit(&batch) {
                Ok(Committed { outcomes, told, items }) => {
                    self.metrics.group_commit(items, started.elapsed());
                    for (queued, outcome) in batch.iter().zip(&outcomes) {
                        self.tell(&queued.operation, outcome);
                    }
                    // What was committed and has ended in one batch is heard of in this order.
                    for (user, message, state) in &told.ended {
                        self.on_commit.ended(user, message, *state);
                    }
                    for (reason, count) in told.died {
                        self.on_commit.died(reason, count);
                    }
                    told.settled.iter().for_each(|receipt| self.on_commit.settled(receipt));
                    for (user, messages, bytes) in &told.filling {
                        self.on_commit.filling(user, *messages, *bytes);
                    }
                    if let Some(next) = told.next_receipt {
                        self.next_receipt.send_replace(next);
                    }
                    for (user, seq) in told.gone {
                        self.on_commit.gone(&user, epoch(self.store_id, &user), &[seq]);
                    }
                    for (queued, outcome) in batch.into_iter().zip(outcomes) {
                        queued.operation.answer(outcome);
                    }
                }
                Err(error) => {
                    self.metrics.store_error();
                    for queued in batch {
                        queued.operation.fail(&error);
                    }
                }
            }
        }
        self.file.close();
    }

    /// Tells the sink of new messages.
    fn tell(&self, operation: &Operation, outcome: &Outcome) {
        if let Outcome::FanOut(done) = outcome {
            done.appended().for_each(|(message, appended)| self.on_commit.committed(message, appended));
        }
        let (Operation::Append { messages, .. }, Outcome::Append(results)) = (operation, outcome) else {
            return;
        };
        for (message, result) in messages.iter().zip(results) {
            if let Ok(appended) = result
                && !appended.duplicate
            {
                self.on_commit.committed(message, appended);
            }
        }
    }

    /// Waits for an operation and takes what is ready with it. Returns nothing now and then while the file is
    /// closed, so that it is opened again without anybody asking.
    fn next_batch(&self) -> ControlFlow<(), Vec<Queued>> {
        let first = if self.file.is_open() {
            match self.operations.recv() {
                Ok(first) => first,
                Err(_) => return ControlFlow::Break(()),
            }
        } else {
            match self.operations.recv_timeout(REOPEN_PAUSE) {
                Ok(first) => first,
                Err(RecvTimeoutError::Timeout) => return ControlFlow::Continue(Vec::new()),
                Err(RecvTimeoutError::Disconnected) => return ControlFlow::Break(()),
            }
        };
        let (mut items, mut bytes) = (first.operation.items(), first.bytes);
        let mut batch = vec![first];
        while items < MAX_BATCH_ITEMS && bytes < MAX_BATCH_BYTES {
            match self.operations.try_recv() {
                Ok(queued) => {
                    items += queued.operation.items();
                    bytes += queued.bytes;
                    batch.push(queued);
                }
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => break,
            }
        }
        ControlFlow::Continue(batch)
    }

    /// Applies a batch and makes it durable.
    fn commit(&self, batch: &[Queued]) -> Result<Committed, StoreError> {
        let database = self.file.get()?;
        let span = spans::commit(batch.iter().flat_map(|queued| queued.operation.messages()));
        self.try_commit(&database, batch).map_err(|error| {
            spans::refused(&span, ErrorCode::Unavailable.as_str());
            tracing::error!(path = %self.file.path().display(), %error, "the inbox store failed; opening it again");
            drop(database);
            self.file.close();
            StoreError::Unavailable(format!("writing to {} failed: {error}", self.file.path().display()))
        })
    }

    fn try_commit(&self, database: &redb::Database, batch: &[Queued]) -> Result<Committed, redb::Error> {
        let mut transaction = database.begin_write()?;
        let rules = Rules {
            store_id: self.store_id,
            quotas: self.quotas,
            keep_expired: self.keep_expired,
            max_attempts: self.max_attempts,
            now_us: self.clock.now_us(),
            random: self.random.clone(),
            watched: self.on_commit.watches(),
        };
        let mut tables = Tables::open(&transaction, rules)?;
        let mut outcomes = Vec::with_capacity(batch.len());
        for queued in batch {
            outcomes.push(queued.operation.apply(&mut tables)?);
        }
        let (must_sync, told) = tables.finish()?;
        // What nobody was promised can wait for the next durable commit.
        let sync = must_sync || self.unsynced.get() >= MAX_UNSYNCED;
        let durability = if sync { Durability::Immediate } else { Durability::None };
        transaction.set_durability(durability).map_err(|error| redb::Error::Corrupted(error.to_string()))?;
        transaction.commit()?;
        self.unsynced.set(if sync { 0 } else { self.unsynced.get() + 1 });
        let items = batch.iter().filter(|_| must_sync).map(|queued| queued.operation.items()).sum();
        Ok(Committed { outcomes, told, items })
    }

    /// Tries to open the file again. Says that it could not, unless that was `said`; returns whether it is.
    fn reopen(&self, said: bool) -> bool {
        match self.file.reopen() {
            Ok(()) => {
                tracing::info!(path = %self.file.path().display(), "the inbox store is open again");
                false
            }
            Err(error) => {
                if !said {
                    tracing::error!(%error, "the inbox store could not be opened again yet");
                }
                true
            }
        }
    }
}
