//! Inboxes in MongoDB, which several delivery nodes share.
//!
//! One document holds all that decides about an inbox: the head, what is settled, when it is due, and the newest
//! bodies. So one update is one step, on one shard, and its condition (the head as this node knows it) is what keeps
//! seqs without gaps while several nodes append. `lane.rs` groups the updates of many users, `append.rs` and `ack.rs`
//! make them, `tidy.rs` moves out of the document what makes it large. `documents.rs` has the fields.

mod ack;
mod append;
mod audit;
mod clock;
mod connect;
mod counted;
mod database;
mod dead;
mod deliveries;
mod devices;
mod documents;
mod due;
mod expire;
mod fanout;
mod inbox;
mod lane;
mod payloads;
mod plan;
mod queue;
mod reader;
mod rearm;
mod receipts;
mod revocations;
mod scheduled;
mod sharding;
#[cfg(test)]
mod tests;
mod tidy;
mod work;

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use clock::ServerClock;
pub use connect::OpenError;
use counted::{Counted, count};
use database::Database;
use due::Share;
use futures::{FutureExt, future::BoxFuture};
use lane::Lane;
use mongodb::{
    bson::Document,
    event::{EventHandler, command::CommandEvent},
};
use parking_lot::Mutex;
use plan::Bounds;
use prost::Message as _;
use queue::Queue;
use receipts::Log;
use sanjay_runtime::clock::SharedClock;
pub use sharding::{ShardError, shard, shard_commands};
use tokio::{
    sync::{Notify, Semaphore, mpsc, oneshot},
    time::Instant,
};
use uuid::Uuid;
use work::{Ack, Append, Call, Queued, Seeing, Work};

use super::{
    Acked, AppendError, Appended, Applied, AuditPage, Backlog, DeadFilter, DeadLetter, DeadPage,
    DeadPosition, DeliveriesPage, DeliveriesQuery, DueInbox, Expired, Forgotten, InboxQuery, InboxStore,
    JoinError, LogError, LogPage, LogPosition, LogStart, Membership, NewMessage, Numbered, Page, Publication,
    PublicationError, Rearm, Receipt, RegisterError, Revocation, Scheduled, ScheduledAt, Settle, Stats,
    StoreError, StoreOptions, Subject, Turn,
};

/// How many groups of writes are under way at once: enough that the server has work for all its cores, and can sync
/// several groups at once, while one waits for a disk or a majority.
const LANES: usize = 8;

/// Most reads that run at once, and most that run or wait.
const MAX_READERS: usize = 8;
const MAX_WAITING_READS: usize = 4_096;

/// How long work may take, with everything that is tried again for it. Less than a back end's deadline, so that it
/// gets an answer.
const DEADLINE: Duration = Duration::from_millis(4_500);

/// What is otherwise in tests.
#[derive(Clone)]
pub(crate) struct Tuning {
    /// The time; `None` for the server's.
    pub(crate) clock: Option<SharedClock>,
    /// Whether nodes share the work of redelivery.
    pub(crate) sharing: bool,
    /// Whether a count may be used again.
    pub(crate) old_stats: bool,
    bounds: Bounds,
    /// How far readers of the log keep behind the clock, in microseconds; `None` for what is right.
    pub(crate) log_lag_us: Option<u64>,
    /// Hears of each command.
    pub(crate) commands: Option<EventHandler<CommandEvent>>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            clock: None,
            sharing: true,
            old_stats: true,
            bounds: Bounds::default(),
            log_lag_us: None,
            commands: None,
        }
    }
}

/// The MongoDB adapter. Dropping it lets what is queued finish.
pub struct MongoStore {
    database: Database,
    queue: Queue,
    publications: fanout::Lanes,
    readers: Arc<Semaphore>,
    waiting_reads: Arc<Semaphore>,
    share: Arc<Share>,
    counted: Arc<Mutex<Counted>>,
    old_stats: bool,
    bounds: Bounds,
    log: Arc<Log>,
}

impl MongoStore {
    /// Connects to a database, and makes in it what is missing.
    ///
    /// # Errors
    /// When no server answers, it is too old or stands by itself, or the database is of another build.
    pub async fn open(location: &super::Database, options: StoreOptions) -> Result<Self, OpenError> {
        Self::open_with(location, options, Tuning::default()).await
    }

    pub(crate) async fn open_with(
        location: &super::Database,
        options: StoreOptions,
        tuning: Tuning,
    ) -> Result<Self, OpenError> {
        let opened = connect::open(location, &options, &tuning).await?;
        options.metrics.shares_store();
        let (own_clock, ask_time) = (tuning.clock, Arc::new(Notify::new()));
        let clock = match own_clock.clone() {
            Some(clock) => clock,
            None => server_clock(&opened.client, options.clock.clone(), ask_time.clone()).await,
        };
        let database = Database {
            inbox: opened.database.collection("inbox"),
            beside: opened.database.collection("beside"),
            dead: opened.database.collection("dead"),
            scheduled: opened.database.collection("scheduled"),
            channels: opened.database.collection("channels"),
            members: opened.database.collection("members"),
            publications: opened.database.collection("publications"),
            revoked: opened.database.collection("revoked"),
            remembered: Arc::default(),
            nodes: opened.database.collection::<Document>("nodes"),
            client: opened.client,
            store_id: opened.store_id,
            node: format!("{:016x}", options.random.next_u64()).into(),
            clock,
            policy: database::policy(&options.metrics),
            metrics: options.metrics.clone(),
            tells_now: opened.tells_now,
            ask_time,
        };
        tokio::spawn(database.probing());
        let lanes = (0..LANES).map(|_| start_lane(&database, &options, tuning.bounds));
        let queue = Queue::new(lanes, database.policy.clone());
        Ok(Self {
            log: Arc::new(Log::new(&database, own_clock, tuning.log_lag_us)),
            publications: fanout::Lanes::start(&database),
            database,
            queue,
            readers: Arc::new(Semaphore::new(MAX_READERS)),
            waiting_reads: Arc::new(Semaphore::new(MAX_WAITING_READS)),
            share: Arc::new(Share::new(tuning.sharing)),
            counted: Arc::default(),
            old_stats: tuning.old_stats,
            bounds: tuning.bounds,
        })
    }

    /// Runs a read when it is its turn.
    fn run<T, F>(
        &self,
        read: impl FnOnce(Database) -> F + Send + 'static,
    ) -> BoxFuture<'static, Result<T, StoreError>>
    where
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
        T: Send + 'static,
    {
        let Ok(waiting) = self.waiting_reads.clone().try_acquire_owned() else {
            return async { Err(StoreError::Busy) }.boxed();
        };
        let (database, readers) = (self.database.clone(), self.readers.clone());
        async move {
            let _waiting = waiting;
            let _permit = readers.acquire_owned().await.map_err(|_| gone())?;
            read(database).await
        }
        .boxed()
    }
}

/// Starts a lane. One that panics would leave users whose inboxes take nothing: the process ends instead.
fn start_lane(database: &Database, options: &StoreOptions, bounds: Bounds) -> mpsc::Sender<Queued> {
    let (sender, queue) = mpsc::channel(queue::MAX_QUEUED);
    let lane = Lane::new(database.clone(), options, bounds, queue);
    tokio::spawn(async move {
        if AssertUnwindSafe(lane.run()).catch_unwind().await.is_err() {
            tracing::error!(
                "a lane of the inbox store panicked; the process aborts so that it is started again"
            );
            std::process::abort();
        }
    });
    sender
}

async fn server_clock(client: &mongodb::Client, fallback: SharedClock, wanted: Arc<Notify>) -> SharedClock {
    let clock = ServerClock::new(fallback);
    if !clock.ask(client).await {
        tracing::warn!("the database did not tell its time; this machine's is used until it does");
    }
    tokio::spawn(ServerClock::follow(Arc::downgrade(&clock), client.clone(), wanted));
    clock
}

/// The lane is gone, which happens on shutdown.
fn gone() -> StoreError {
    StoreError::Unavailable("the store is closing".to_owned())
}

/// Waits for the answers to a call of so many parts.
async fn answers<R>(
    count: usize,
    submitted: Result<oneshot::Receiver<Vec<R>>, StoreError>,
    refusal: impl Fn(StoreError) -> R,
) -> Vec<R> {
    let results = match submitted {
        Ok(answered) => answered.await.map_err(|_| gone()),
        Err(error) => Err(error),
    };
    results.unwrap_or_else(|error| (0..count).map(|_| refusal(error.clone())).collect())
}

/// Hands messages to their users' lanes; the answers are in their order.
fn submit_appends(
    queue: &Queue,
    messages: Vec<NewMessage>,
) -> BoxFuture<'static, Vec<Result<Appended, AppendError>>> {
    let count = messages.len();
    if count == 0 {
        return async { Vec::new() }.boxed();
    }
    // What others share is not written with them.
    let own = messages.iter().filter(|message| message.shared.is_none());
    let bytes = own.map(|message| message.payload.encoded_len()).sum();
    let submitted = queue.places(count, bytes).map(|places| {
        let (call, answered) = Call::new(count, places);
        for (part, message) in messages.into_iter().enumerate() {
            let (key, collapse) = (key(&message), collapse(&message));
            let user = message.user.clone();
            queue.submit(user, Work::Append(Append { message, key, collapse, call: call.clone(), part }));
        }
        answered
    });
    answers(count, submitted, |error| Err(error.into())).boxed()
}

impl InboxStore for MongoStore {
    fn append(&self, messages: Vec<NewMessage>) -> BoxFuture<'static, Vec<Result<Appended, AppendError>>> {
        submit_appends(&self.queue, messages)
    }

    fn read(&self, queries: Vec<InboxQuery>) -> BoxFuture<'static, Vec<Result<Page, StoreError>>> {
        let count = queries.len();
        let pages = self.run(move |database| async move { Ok(reader::read(&database, &queries).await) });
        async move { pages.await.unwrap_or_else(|error| (0..count).map(|_| Err(error.clone())).collect()) }
            .boxed()
    }

    fn ack(&self, settles: Vec<Settle>) -> BoxFuture<'static, Vec<Result<Acked, StoreError>>> {
        let count = settles.len();
        if count == 0 {
            return async { Vec::new() }.boxed();
        }
        let submitted = self.queue.places(count, 0).map(|places| {
            let (call, answered) = Call::new(count, places);
            for (part, settle) in settles.into_iter().enumerate() {
                let user = settle.user.clone();
                self.queue.submit(user, Work::Ack(Ack::new(settle, call.clone(), part)));
            }
            answered
        });
        answers(count, submitted, Err).boxed()
    }

    fn lookup(
        &self,
        user: String,
        message_id: Uuid,
    ) -> BoxFuture<'static, Result<Option<Receipt>, StoreError>> {
        self.run(move |database| async move { reader::lookup(&database, &user, message_id).await })
    }

    fn arm(&self, users: Vec<String>) {
        for user in users {
            // A hint: without a place in the queue, the edge's own reads make up for it.
            let Ok(places) = self.queue.places(1, 0) else { return };
            self.queue.submit(user, Work::Arm(places));
        }
    }

    fn claim_due(
        &self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<DueInbox>, StoreError>> {
        let share = self.share.clone();
        let claim = self
            .run(move |database| async move { due::claim(&database, &share, now_us, until_us, limit).await });
        let queue = self.queue.clone();
        async move {
            let claimed = claim.await?;
            claimed.dying.into_iter().for_each(|(user, epoch)| queue.finish(user, epoch));
            Ok(claimed.due)
        }
        .boxed()
    }

    fn rearm(&self, rearms: Vec<Rearm>) -> BoxFuture<'static, Result<(), StoreError>> {
        self.run(move |database| async move { rearm::rearm(&database, &rearms).await })
    }

    fn dead_letters(
        &self,
        filter: DeadFilter,
        after: Option<DeadPosition>,
        limit: usize,
    ) -> BoxFuture<'static, Result<DeadPage, StoreError>> {
        self.run(move |database| async move { dead::list(&database, &filter, after, limit).await })
    }

    fn dead_letter(
        &self,
        user: String,
        message_id: Uuid,
    ) -> BoxFuture<'static, Result<Option<DeadLetter>, StoreError>> {
        self.run(move |database| async move { dead::get(&database, &user, message_id).await })
    }

    fn redriven(
        &self,
        user: String,
        message_id: Uuid,
        sent_as: Uuid,
    ) -> BoxFuture<'static, Result<bool, StoreError>> {
        self.run(move |database| async move { dead::redriven(&database, &user, message_id, sent_as).await })
    }

    fn purge(&self, letters: Vec<(String, Uuid)>) -> BoxFuture<'static, Result<u64, StoreError>> {
        self.run(move |database| async move { dead::purge(&database, &letters).await })
    }

    fn expire(&self, now_us: u64, limit: usize) -> BoxFuture<'static, Result<Expired, StoreError>> {
        let (share, queue) = (self.share.clone(), self.queue.clone());
        self.run(
            move |database| async move { expire::expire(&database, &share, &queue, now_us, limit).await },
        )
    }

    fn schedule(
        &self,
        messages: Vec<Scheduled>,
    ) -> BoxFuture<'static, Vec<Result<ScheduledAt, AppendError>>> {
        let (count, bounds) = (messages.len(), self.bounds);
        let messages: Vec<_> = messages.into_iter().map(|s| (key(&s.message), s)).collect();
        let answers = self
            .run(move |database| async move { Ok(scheduled::schedule(&database, bounds, &messages).await) });
        async move {
            answers.await.unwrap_or_else(|error| (0..count).map(|_| Err(error.clone().into())).collect())
        }
        .boxed()
    }

    fn claim_scheduled(
        &self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Scheduled>, StoreError>> {
        let share = self.share.clone();
        self.run(
            move |database| async move { scheduled::claim(&database, &share, now_us, until_us, limit).await },
        )
    }

    fn unschedule(&self, messages: Vec<(String, Uuid)>) -> BoxFuture<'static, Result<u64, StoreError>> {
        self.run(move |database| async move { scheduled::forget(&database, &messages).await })
    }

    fn postpone(
        &self,
        messages: Vec<(String, Uuid)>,
        until_us: u64,
    ) -> BoxFuture<'static, Result<(), StoreError>> {
        self.run(move |database| async move { scheduled::postpone(&database, &messages, until_us).await })
    }

    fn register(&self, devices: Vec<(String, String)>) -> BoxFuture<'static, Vec<Result<(), RegisterError>>> {
        let count = devices.len();
        if count == 0 {
            return async { Vec::new() }.boxed();
        }
        let submitted = self.queue.places(count, 0).map(|places| {
            let (call, answered) = Call::new(count, places);
            for (part, (user, device)) in devices.into_iter().enumerate() {
                let ack = Ack::seeing(user.clone(), Seeing::Device(device), call.clone(), part);
                self.queue.submit(user, Work::Ack(ack));
            }
            answered
        });
        let seen = answers(count, submitted, Err);
        let result = |seen: Result<Acked, StoreError>| match seen {
            Ok(acked) if acked.refused > 0 => Err(RegisterError::TooMany),
            Ok(_) => Ok(()),
            Err(error) => Err(error.into()),
        };
        async move { seen.await.into_iter().map(result).collect() }.boxed()
    }

    fn forget_devices(&self, now_us: u64, limit: usize) -> BoxFuture<'static, Result<Forgotten, StoreError>> {
        let (share, queue) = (self.share.clone(), self.queue.clone());
        self.run(
            move |database| async move { devices::forget(&database, &share, &queue, now_us, limit).await },
        )
    }

    fn sweep(&self, now_us: u64, limit: usize) -> BoxFuture<'static, Result<usize, StoreError>> {
        // TTL indexes remove what is past its time; what is left are payloads that nobody needs any more.
        self.run(move |database| async move { payloads::sweep(&database, now_us, limit).await })
    }

    fn stats(&self) -> BoxFuture<'static, Result<Stats, StoreError>> {
        if !self.old_stats {
            return self.run(|database| async move { reader::stats(&database).await });
        }
        let mut counted = self.counted.lock();
        let due = counted.again.is_none_or(|again| again <= Instant::now());
        if due && !counted.counting {
            counted.counting = true;
            // Nobody waits for it: it may take long.
            tokio::spawn(count(self.database.clone(), self.counted.clone()));
        }
        let stats = counted.stats;
        async move { Ok(stats) }.boxed()
    }

    fn oldest_undelivered(&self, limit: usize) -> BoxFuture<'static, Result<Option<u64>, StoreError>> {
        self.run(move |database| async move { due::oldest(&database, limit).await })
    }

    fn audit(&self, after: String, limit: usize) -> BoxFuture<'static, Result<AuditPage, StoreError>> {
        self.run(move |database| async move { audit::audit(&database, &after, limit).await })
    }

    fn join(
        &self,
        channel: String,
        users: Vec<String>,
        most: u64,
    ) -> BoxFuture<'static, Result<Membership, JoinError>> {
        let joined = self
            .run(move |database| async move { Ok(fanout::join(&database, &channel, &users, most).await) });
        async move { joined.await? }.boxed()
    }

    fn leave(
        &self,
        channel: String,
        users: Vec<String>,
    ) -> BoxFuture<'static, Result<Membership, StoreError>> {
        self.run(move |database| async move { fanout::leave(&database, &channel, &users).await })
    }

    fn members(
        &self,
        channel: String,
        after: String,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<String>, StoreError>> {
        self.run(move |database| async move { fanout::list(&database, &channel, &after, limit).await })
    }

    fn publish_durable(
        &self,
        publication: Publication,
    ) -> BoxFuture<'static, Result<Numbered, PublicationError>> {
        let places = match self.queue.places(1, publication.payload.encoded_len()) {
            Ok(places) => places,
            Err(error) => return async move { Err(error.into()) }.boxed(),
        };
        let (answer, answered) = oneshot::channel();
        let key = fanout::key(&publication);
        self.publications.submit(fanout::Waiting { publication, key, answer, _places: places });
        async move { answered.await.unwrap_or_else(|_| Err(gone().into())) }.boxed()
    }

    fn claim_publications(
        &self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Turn>, StoreError>> {
        let share = self.share.clone();
        self.run(
            move |database| async move { fanout::claim(&database, &share, now_us, until_us, limit).await },
        )
    }

    fn apply(
        &self,
        turn: Turn,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Applied, StoreError>> {
        let (database, queue) = (self.database.clone(), self.queue.clone());
        async move { fanout::apply(&database, &queue, turn, until_us, limit).await }.boxed()
    }

    fn backlog(&self) -> BoxFuture<'static, Result<Backlog, StoreError>> {
        self.run(|database| async move { fanout::backlog(&database).await })
    }

    fn clock(&self) -> SharedClock {
        self.database.clock.clone()
    }

    fn receipts(&self, from: LogStart, limit: usize) -> BoxFuture<'static, Result<LogPage, LogError>> {
        let (database, log) = (self.database.clone(), self.log.clone());
        async move { receipts::read(&database, &log, from, limit).await }.boxed()
    }

    fn receipts_after(&self, position: LogPosition) -> BoxFuture<'static, ()> {
        let (database, log) = (self.database.clone(), self.log.clone());
        async move { receipts::wait(&database, &log, &position).await }.boxed()
    }

    fn deliveries(&self, query: DeliveriesQuery) -> BoxFuture<'static, Result<DeliveriesPage, StoreError>> {
        self.run(move |database| async move { deliveries::list(&database, &query).await })
    }

    fn revoke(&self, revocation: Revocation) -> BoxFuture<'static, Result<(), StoreError>> {
        self.run(move |database| async move { revocations::set(&database, &revocation).await })
    }

    fn revocations(
        &self,
        after: Option<Subject>,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Revocation>, StoreError>> {
        self.run(move |database| async move { revocations::list(&database, after.as_ref(), limit).await })
    }

    fn revocations_changed(
        &self,
        since_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Revocation>, StoreError>> {
        self.run(move |database| async move { revocations::changed(&database, since_us, limit).await })
    }
}

/// Digests of a message's dedupe key and of its payload.
fn key(message: &NewMessage) -> Option<append::Key> {
    (!message.dedupe_key.is_empty()).then(|| {
        let payload = ring::digest::digest(&ring::digest::SHA256, &message.payload.encode_to_vec());
        (documents::key_digest(&message.caller, &message.dedupe_key), payload.as_ref().to_vec())
    })
}

/// Digest of a message's collapse key.
fn collapse(message: &NewMessage) -> Option<Vec<u8>> {
    let key = &message.collapse_key;
    (!key.is_empty()).then(|| documents::key_digest(&message.caller, key))
}

impl Drop for MongoStore {
    fn drop(&mut self) {
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(due::leave(self.database.clone()));
        }
    }
}
