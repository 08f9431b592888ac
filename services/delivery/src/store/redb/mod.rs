//! Inboxes in one redb file on this machine.
//!
//! One thread writes, in group commits: what is ready goes into one transaction, which is on the disk before any
//! of it is answered. Readers see the last commit and run on the blocking pool, a few at a time.

mod dead;
mod devices;
mod ending;
mod fanout;
mod file;
mod reader;
mod receipts;
mod revocations;
mod room;
mod scheduled;
mod tables;
#[cfg(test)]
mod tests;
mod transaction;
mod writer;

use std::{
    cell::Cell,
    path::PathBuf,
    sync::{
        Arc, Weak,
        mpsc::{SyncSender, sync_channel},
    },
    thread::JoinHandle,
};

pub use file::OpenError;
use file::RedbFile;
use futures::{FutureExt, future::BoxFuture};
use sanjay_runtime::clock::SharedClock;
use tokio::sync::{Semaphore, oneshot, watch};
use uuid::Uuid;
use writer::{Operation, Queued, Writer};

use super::{
    Acked, AppendError, Appended, Applied, AuditPage, Backlog, DeadFilter, DeadLetter, DeadPage,
    DeadPosition, DeliveriesPage, DeliveriesQuery, DueInbox, Expired, Forgotten, InboxQuery, InboxStore,
    JoinError, LogError, LogPage, LogPosition, LogStart, Membership, NewMessage, Numbered, Page, Publication,
    PublicationError, Rearm, Receipt, RegisterError, Revocation, Scheduled, ScheduledAt, Settle, Stats,
    StoreError, StoreOptions, Subject, Turn,
};

/// Most operations that wait for the writer.
const MAX_QUEUED: usize = 16_384;

/// Most bytes of payload that wait for the writer, in units of 1 KiB.
const MAX_QUEUED_KIB: usize = 64 * 1024;

/// Most reads that run at once: they are short, and the blocking pool is shared with the rest of the process.
const MAX_READERS: usize = 8;

/// Most reads that run or wait.
const MAX_WAITING_READS: usize = 4_096;

/// The redb adapter. Dropping it finishes what is queued and closes the file.
pub struct RedbStore {
    file: Arc<RedbFile>,
    operations: Option<Arc<SyncSender<Queued>>>,
    writer: Option<JoinHandle<()>>,
    queued_kib: Arc<Semaphore>,
    readers: Arc<Semaphore>,
    waiting_reads: Arc<Semaphore>,
    store_id: u64,
    clock: SharedClock,
    /// The place in the log of receipts that the next one gets; 0 before the first since the file was opened.
    next_receipt: watch::Receiver<u64>,
}

impl RedbStore {
    /// Opens or creates the file at `path`.
    ///
    /// # Errors
    /// When the file is in use, is no store, or cannot be read or written. A file that is not understood is
    /// never changed.
    pub async fn open(path: PathBuf, options: StoreOptions) -> Result<Self, OpenError> {
        let shown = path.display().to_string();
        let failed = |error: String| OpenError::Other { path: shown.clone(), error };
        let random = options.random.clone();
        let opened = tokio::task::spawn_blocking(move || RedbFile::open(path, &*random)).await;
        let (file, store_id) = opened.map_err(|error| failed(error.to_string()))??;
        let file = Arc::new(file);
        let (sender, operations) = sync_channel(MAX_QUEUED);
        let (next_receipt, receipts) = watch::channel(0);
        let writer = Writer {
            file: file.clone(),
            operations,
            store_id,
            quotas: room::Quotas::new(&options),
            keep_expired: options.keep_expired,
            max_attempts: options.max_attempts,
            random: options.random,
            clock: options.clock.clone(),
            metrics: options.metrics,
            on_commit: options.on_commit,
            unsynced: Cell::new(0),
            next_receipt,
        };
        let writer = std::thread::Builder::new().name("inbox-writer".to_owned()).spawn(move || {
            let guard = AbortOnPanic;
            writer.run();
            std::mem::forget(guard);
        });
        Ok(Self {
            file,
            operations: Some(Arc::new(sender)),
            writer: Some(writer.map_err(|error| failed(error.to_string()))?),
            queued_kib: Arc::new(Semaphore::new(MAX_QUEUED_KIB)),
            readers: Arc::new(Semaphore::new(MAX_READERS)),
            waiting_reads: Arc::new(Semaphore::new(MAX_WAITING_READS)),
            store_id,
            clock: options.clock,
            next_receipt: receipts,
        })
    }

    /// Hands an operation to the writer without waiting; a full queue or a writer that is gone drops it, and
    /// with it the way to answer.
    fn submit(&self, operation: Operation, bytes: usize) -> Result<(), StoreError> {
        let mut permit = None;
        if bytes > 0 {
            // One operation larger than the whole queue is let in when the queue is empty.
            let kib = bytes.div_ceil(1024).min(MAX_QUEUED_KIB) as u32;
            permit = Some(self.queued_kib.clone().try_acquire_many_owned(kib).map_err(|_| StoreError::Busy)?);
        }
        let operations = self.operations.as_ref().expect("it is taken on drop alone");
        operations.try_send(Queued { operation, bytes, _permit: permit }).map_err(|_| StoreError::Busy)
    }

    /// Has the writer do something that it answers as a whole.
    fn ask<T: Send + 'static>(
        &self,
        operation: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Operation,
    ) -> BoxFuture<'static, Result<T, StoreError>> {
        let (answer, answered) = oneshot::channel();
        let submitted = self.submit(operation(answer), 0);
        async move {
            submitted?;
            answered.await.map_err(|_| gone())?
        }
        .boxed()
    }

    /// As [`RedbStore::ask`], once a look that takes no write transaction says that there is anything to do; else the
    /// answer is that of nothing.
    fn ask_when<T: Default + Send + 'static>(
        &self,
        anything: BoxFuture<'static, Result<bool, StoreError>>,
        operation: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Operation + Send + 'static,
    ) -> BoxFuture<'static, Result<T, StoreError>> {
        let (answer, answered) = oneshot::channel();
        // Weak, because the writer ends when the last sender is gone.
        let operations = self.operations.as_ref().map_or_else(Weak::new, Arc::downgrade);
        async move {
            if !anything.await? {
                return Ok(T::default());
            }
            let queued = Queued { operation: operation(answer), bytes: 0, _permit: None };
            operations.upgrade().ok_or_else(gone)?.try_send(queued).map_err(|_| StoreError::Busy)?;
            answered.await.map_err(|_| gone())?
        }
        .boxed()
    }

    /// Submits messages and waits for a result for each.
    fn store<T: Send + 'static>(
        &self,
        count: usize,
        bytes: usize,
        operation: impl FnOnce(oneshot::Sender<Vec<Result<T, AppendError>>>) -> Operation,
    ) -> BoxFuture<'static, Vec<Result<T, AppendError>>> {
        let (answer, answered) = oneshot::channel();
        let submitted = self.submit(operation(answer), bytes);
        async move {
            let results = match submitted {
                Ok(()) => answered.await.map_err(|_| gone()),
                Err(error) => Err(error),
            };
            results.unwrap_or_else(|error| (0..count).map(|_| Err(error.clone().into())).collect())
        }
        .boxed()
    }

    /// As [`RedbStore::ask`], for what has errors of its own.
    fn fan_out<T: Send + 'static, E: From<StoreError> + Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(oneshot::Sender<Result<T, E>>) -> fanout::Work,
    ) -> BoxFuture<'static, Result<T, E>> {
        let (answer, answered) = oneshot::channel();
        let submitted = self.submit(Operation::FanOut(work(answer)), bytes);
        async move {
            submitted?;
            answered.await.unwrap_or_else(|_| Err(gone().into()))
        }
        .boxed()
    }

    /// Runs a read on the blocking pool.
    fn run<T: Send + 'static>(
        &self,
        read: impl FnOnce(&redb::Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, StoreError>> {
        let Ok(waiting) = self.waiting_reads.clone().try_acquire_owned() else {
            return async { Err(StoreError::Busy) }.boxed();
        };
        let (file, readers) = (self.file.clone(), self.readers.clone());
        async move {
            let unavailable = |error: String| StoreError::Unavailable(error);
            let permit = readers.acquire_owned().await.map_err(|error| unavailable(error.to_string()))?;
            let task = tokio::task::spawn_blocking(move || {
                let (_permit, _waiting) = (permit, waiting);
                let database = file.get()?;
                let path = file.path().display();
                read(&database)
                    .map_err(|error| StoreError::Unavailable(format!("reading from {path} failed: {error}")))
            });
            task.await.map_err(|error| unavailable(error.to_string()))?
        }
        .boxed()
    }
}

/// A writer that panics would leave a node that answers everything with a refusal: the process ends, and what it
/// had answered is in the file.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        tracing::error!(
            "the writer of the inbox store panicked; the process aborts so that it is started again"
        );
        std::process::abort();
    }
}

/// The writer dropped the way to answer: it is gone, which happens on shutdown.
fn gone() -> StoreError {
    StoreError::Unavailable("the store is closing".to_owned())
}

impl InboxStore for RedbStore {
    fn append(&self, messages: Vec<NewMessage>) -> BoxFuture<'static, Vec<Result<Appended, AppendError>>> {
        let count = messages.len();
        let bytes = messages.iter().map(|message| prost::Message::encoded_len(&*message.payload)).sum();
        self.store(count, bytes, |answer| Operation::Append { messages, answer })
    }

    fn read(&self, queries: Vec<InboxQuery>) -> BoxFuture<'static, Vec<Result<Page, StoreError>>> {
        let (count, store_id) = (queries.len(), self.store_id);
        let now_us = self.clock.now_us();
        let pages = self.run(move |database| reader::read(database, store_id, now_us, &queries));
        pages
            .map(move |pages| match pages {
                Ok(pages) => pages.into_iter().map(Ok).collect(),
                Err(error) => (0..count).map(|_| Err(error.clone())).collect(),
            })
            .boxed()
    }

    fn ack(&self, settles: Vec<Settle>) -> BoxFuture<'static, Vec<Result<Acked, StoreError>>> {
        let count = settles.len();
        let (answer, answered) = oneshot::channel();
        let submitted = self.submit(Operation::Ack { settles, answer }, 0);
        async move {
            let results = match submitted {
                Ok(()) => answered.await.map_err(|_| gone()),
                Err(error) => Err(error),
            };
            results.unwrap_or_else(|error| (0..count).map(|_| Err(error.clone())).collect())
        }
        .boxed()
    }

    fn lookup(
        &self,
        user: String,
        message_id: Uuid,
    ) -> BoxFuture<'static, Result<Option<Receipt>, StoreError>> {
        self.run(move |database| reader::lookup(database, &user, message_id))
    }

    fn arm(&self, users: Vec<String>) {
        // A hint: when the writer is busy, the edge's own reads make up for it.
        let _dropped = self.submit(Operation::Arm { users }, 0);
    }

    fn claim_due(
        &self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<DueInbox>, StoreError>> {
        let anything = self.run(move |database| reader::anything_due(database, now_us));
        self.ask_when(anything, move |answer| Operation::Claim { now_us, until_us, limit, answer })
    }

    fn rearm(&self, rearms: Vec<Rearm>) -> BoxFuture<'static, Result<(), StoreError>> {
        self.ask(|answer| Operation::Rearm { rearms, answer })
    }

    fn dead_letters(
        &self,
        filter: DeadFilter,
        after: Option<DeadPosition>,
        limit: usize,
    ) -> BoxFuture<'static, Result<DeadPage, StoreError>> {
        self.run(move |database| dead::list(database, &filter, after, limit))
    }

    fn dead_letter(
        &self,
        user: String,
        message_id: Uuid,
    ) -> BoxFuture<'static, Result<Option<DeadLetter>, StoreError>> {
        self.run(move |database| dead::get(database, &user, message_id))
    }

    fn redriven(
        &self,
        user: String,
        message_id: Uuid,
        sent_as: Uuid,
    ) -> BoxFuture<'static, Result<bool, StoreError>> {
        self.ask(|answer| Operation::Redriven { user, message_id, sent_as, answer })
    }

    fn purge(&self, letters: Vec<(String, Uuid)>) -> BoxFuture<'static, Result<u64, StoreError>> {
        self.ask(|answer| Operation::Purge { letters, answer })
    }

    fn expire(&self, now_us: u64, limit: usize) -> BoxFuture<'static, Result<Expired, StoreError>> {
        let anything = self.run(move |database| reader::anything_expired(database, now_us));
        self.ask_when(anything, move |answer| Operation::Expire { now_us, limit, answer })
    }

    fn schedule(
        &self,
        messages: Vec<Scheduled>,
    ) -> BoxFuture<'static, Vec<Result<ScheduledAt, AppendError>>> {
        let count = messages.len();
        let size = |scheduled: &Scheduled| prost::Message::encoded_len(&*scheduled.message.payload);
        let bytes = messages.iter().map(size).sum();
        self.store(count, bytes, |answer| Operation::Schedule { messages, answer })
    }

    fn claim_scheduled(
        &self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Scheduled>, StoreError>> {
        let anything = self.run(move |database| reader::anything_scheduled(database, now_us));
        self.ask_when(anything, move |answer| Operation::ClaimScheduled { now_us, until_us, limit, answer })
    }

    fn unschedule(&self, messages: Vec<(String, Uuid)>) -> BoxFuture<'static, Result<u64, StoreError>> {
        self.ask(|answer| Operation::Unschedule { messages, until_us: None, answer })
    }

    fn postpone(
        &self,
        messages: Vec<(String, Uuid)>,
        until_us: u64,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        let asked = self.ask(|answer| Operation::Unschedule { messages, until_us: Some(until_us), answer });
        async move { asked.await.map(drop) }.boxed()
    }

    fn register(&self, devices: Vec<(String, String)>) -> BoxFuture<'static, Vec<Result<(), RegisterError>>> {
        let count = devices.len();
        let (answer, answered) = oneshot::channel();
        let submitted = self.submit(Operation::Register { devices, answer }, 0);
        async move {
            let results = match submitted {
                Ok(()) => answered.await.map_err(|_| gone()),
                Err(error) => Err(error),
            };
            results.unwrap_or_else(|error| (0..count).map(|_| Err(error.clone().into())).collect())
        }
        .boxed()
    }

    fn forget_devices(&self, now_us: u64, limit: usize) -> BoxFuture<'static, Result<Forgotten, StoreError>> {
        let anyone = self.run(move |database| devices::anyone_to_forget(database, now_us));
        self.ask_when(anyone, move |answer| Operation::Forget { now_us, limit, answer })
    }

    fn sweep(&self, now_us: u64, limit: usize) -> BoxFuture<'static, Result<usize, StoreError>> {
        self.ask(|answer| Operation::Sweep { now_us, limit, answer })
    }

    fn stats(&self) -> BoxFuture<'static, Result<Stats, StoreError>> {
        self.run(reader::stats)
    }

    fn oldest_undelivered(&self, limit: usize) -> BoxFuture<'static, Result<Option<u64>, StoreError>> {
        self.run(move |database| reader::oldest_undelivered(database, limit))
    }

    fn audit(&self, after: String, limit: usize) -> BoxFuture<'static, Result<AuditPage, StoreError>> {
        self.run(move |database| reader::audit(database, &after, limit))
    }

    fn join(
        &self,
        channel: String,
        users: Vec<String>,
        most: u64,
    ) -> BoxFuture<'static, Result<Membership, JoinError>> {
        self.fan_out(0, |answer| fanout::Work::Join { channel, users, most, answer })
    }

    fn leave(
        &self,
        channel: String,
        users: Vec<String>,
    ) -> BoxFuture<'static, Result<Membership, StoreError>> {
        self.fan_out(0, |answer| fanout::Work::Leave { channel, users, answer })
    }

    fn members(
        &self,
        channel: String,
        after: String,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<String>, StoreError>> {
        self.run(move |database| fanout::members(database, &channel, &after, limit))
    }

    fn publish_durable(
        &self,
        publication: Publication,
    ) -> BoxFuture<'static, Result<Numbered, PublicationError>> {
        let bytes = prost::Message::encoded_len(&*publication.payload);
        self.fan_out(bytes, |answer| fanout::Work::Publish { publication, answer })
    }

    fn claim_publications(
        &self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Turn>, StoreError>> {
        let anything = self.run(move |database| fanout::anything_waits(database, now_us));
        self.ask_when(anything, move |answer| {
            Operation::FanOut(fanout::Work::Claim { now_us, until_us, limit, answer })
        })
    }

    fn apply(
        &self,
        turn: Turn,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Applied, StoreError>> {
        self.fan_out(0, |answer| fanout::Work::Apply { turn, until_us, limit, answer })
    }

    fn backlog(&self) -> BoxFuture<'static, Result<Backlog, StoreError>> {
        self.run(fanout::backlog)
    }

    fn clock(&self) -> SharedClock {
        self.clock.clone()
    }

    fn receipts(&self, from: LogStart, limit: usize) -> BoxFuture<'static, Result<LogPage, LogError>> {
        let store_id = self.store_id;
        let page = self.run(move |database| receipts::read(database, store_id, from, limit));
        async move { page.await? }.boxed()
    }

    fn receipts_after(&self, position: LogPosition) -> BoxFuture<'static, ()> {
        let mut next = self.next_receipt.clone();
        async move {
            // A store that is closing says so to whoever reads on.
            let _closing = next.wait_for(|next| *next > position.at + 1).await;
        }
        .boxed()
    }

    fn deliveries(&self, query: DeliveriesQuery) -> BoxFuture<'static, Result<DeliveriesPage, StoreError>> {
        let now_us = self.clock.now_us();
        self.run(move |database| receipts::deliveries(database, &query, now_us))
    }

    fn revoke(&self, revocation: Revocation) -> BoxFuture<'static, Result<(), StoreError>> {
        self.ask(|answer| Operation::Revoke { revocation, answer })
    }

    fn revocations(
        &self,
        after: Option<Subject>,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Revocation>, StoreError>> {
        let now_us = self.clock.now_us();
        self.run(move |database| revocations::list(database, after.as_ref(), limit, now_us))
    }

    fn revocations_changed(
        &self,
        since_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Revocation>, StoreError>> {
        self.run(move |database| revocations::changed(database, since_us, limit))
    }
}

impl Drop for RedbStore {
    fn drop(&mut self) {
        drop(self.operations.take());
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the inbox store's writer ended in a panic");
        }
    }
}
