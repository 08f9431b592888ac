//! The calls to the database: each with a deadline, counted, refused while the database is away, and with an outcome
//! for each write.

use std::{future::IntoFuture, sync::Arc, time::Duration};

use futures::{FutureExt, TryStreamExt, future::BoxFuture};
use mongodb::{
    Client, Collection, Cursor, Namespace,
    bson::{Document, doc},
    error::{BulkWriteError, Error, ErrorKind, PartialBulkWriteResult, WriteFailure},
    options::{FindOptions, InsertOneModel, UpdateModifications, UpdateOneModel, WriteModel},
    results::VerboseBulkWriteResult,
};
use sanjay_resilience::{CallError, Policy, Probes, Refused, Rules, Settings, keep_probing};
use sanjay_runtime::clock::SharedClock;
use serde::de::DeserializeOwned;
use tokio::{sync::Notify, time::Instant};

use super::{connect::MAX_POOL, payloads::Remembered};
use crate::{
    metrics::{MONGODB, Metrics, StoreOperation},
    store::StoreError,
};

/// The deadline of one call. The server gives up a little earlier by itself.
pub(super) const CALL: Duration = Duration::from_secs(3);

/// After how long the server gives up a read.
const MAX_TIME: Duration = Duration::from_millis(2_500);

/// When calls are refused, and how many there may be. Lanes, reads and upkeep together make about thirty at once; the
/// bound is the driver's number of connections, beyond which a call would wait for one anyway. Four failures are a second
/// or two of a server that is gone, and one change of the primary, which all lanes meet, at most. Nobody's message is a
/// probe: against a server that hangs it would be told so only at its deadline.
const SETTINGS: Settings = Settings {
    rules: Rules {
        window: 10,
        minimum: 4,
        share: 0.5,
        fresh: Duration::from_secs(30),
        pause: Duration::from_millis(500),
    },
    probes: Probes::Own,
    running: MAX_POOL as usize,
    waiting: MAX_POOL as usize,
};

/// The server's codes for being no primary, shutting down, not reaching others or not being done in time: it is there,
/// and cannot serve. The first are those that drivers retry, by the specification of retryable writes.
const CANNOT_SERVE: [i32; 18] =
    [6, 7, 89, 91, 134, 189, 262, 9_001, 10_058, 10_107, 11_600, 11_602, 13_435, 13_436, 50, 64, 100, 462];

/// The server's code for a second document with the same `_id`.
const DUPLICATE_KEY: i32 = 11_000;

/// The database, as the parts of the store share it.
#[derive(Clone)]
pub(super) struct Database {
    pub(super) client: Client,
    pub(super) inbox: Collection<Document>,
    pub(super) beside: Collection<Document>,
    pub(super) dead: Collection<Document>,
    pub(super) scheduled: Collection<Document>,
    pub(super) channels: Collection<Document>,
    pub(super) members: Collection<Document>,
    pub(super) publications: Collection<Document>,
    pub(super) revoked: Collection<Document>,
    /// Payloads that many messages share.
    pub(super) remembered: Arc<Remembered>,
    pub(super) nodes: Collection<Document>,
    /// Random, made with the database.
    pub(super) store_id: u64,
    /// Random, made when the store was opened: names this node among the writers of an inbox.
    pub(super) node: Arc<str>,
    /// The time that all nodes have in common.
    pub(super) clock: SharedClock,
    pub(super) metrics: Metrics,
    /// Whether the server looks at its clock in the condition of a write.
    pub(super) tells_now: bool,
    /// Has the server asked for its time, because a write seems to have come too late by it.
    pub(super) ask_time: Arc<Notify>,
    /// What every call goes through, but for those that ask for the time.
    pub(super) policy: Arc<Policy>,
}

/// The policy of the database.
pub(super) fn policy(metrics: &Metrics) -> Arc<Policy> {
    Arc::new(Policy::new(MONGODB, SETTINGS, &metrics.breakers))
}

/// What became of one write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It is durable.
    Done,
    /// Nothing was there for it to change, or what it would insert is there: nothing was done.
    Missed,
    /// It was done or not, or will be done later.
    Unknown(String),
}

/// Whether a document with this `_id` is there already.
pub(super) fn is_duplicate(error: &Error) -> bool {
    match &*error.kind {
        ErrorKind::Write(WriteFailure::WriteError(error)) => error.code == DUPLICATE_KEY,
        _ => false,
    }
}

impl Database {
    /// One update of an inbox.
    pub(super) fn update(
        &self,
        filter: Document,
        update: impl Into<UpdateModifications>,
        upsert: bool,
    ) -> WriteModel {
        update_of(self.inbox.namespace(), filter, update, upsert)
    }

    /// One update of what lies beside inboxes, or an insert when nothing is there.
    pub(super) fn update_beside(&self, filter: Document, update: Document) -> WriteModel {
        update_of(self.beside.namespace(), filter, update, true)
    }

    /// One insert beside inboxes.
    pub(super) fn insert(&self, document: Document) -> WriteModel {
        let namespace = self.beside.namespace();
        WriteModel::InsertOne(InsertOneModel::builder().namespace(namespace).document(document).build())
    }

    /// Runs a call within its deadline and measures it.
    ///
    /// # Errors
    /// Says what failed; what was done then is unknown.
    pub(super) async fn call<T>(
        &self,
        operation: StoreOperation,
        call: impl IntoFuture<Output = mongodb::error::Result<T>>,
    ) -> Result<T, StoreError> {
        self.call_within(CALL, operation, call).await
    }

    /// Like [`Database::call`], with another deadline.
    pub(super) async fn call_within<T>(
        &self,
        deadline: Duration,
        operation: StoreOperation,
        call: impl IntoFuture<Output = mongodb::error::Result<T>>,
    ) -> Result<T, StoreError> {
        let began = Instant::now();
        let result = self.policy.call(deadline, call, is_outage).await;
        self.measure(operation, began, &result, result.is_ok());
        // Also where it was not made: whoever asks for several things does not know of which this is said.
        result.map_err(|error| StoreError::Unavailable(problem(&error)))
    }

    /// Measures a call that was made.
    fn measure<T>(
        &self,
        operation: StoreOperation,
        began: Instant,
        result: &Result<T, CallError<Error>>,
        ok: bool,
    ) {
        if !matches!(result, Err(CallError::Refused(Refused::Open { .. } | Refused::Full))) {
            self.metrics.store_call(operation, began.elapsed(), ok);
        }
    }

    /// Probes while calls are refused, as long as somebody has the database. It is a write that changes nothing, which
    /// needs a primary and a majority, like those that are refused meanwhile.
    pub(super) fn probing(&self) -> BoxFuture<'static, ()> {
        let (nodes, me, metrics) = (self.nodes.clone(), self.node.to_string(), self.metrics.clone());
        let probe = move || {
            let (nodes, me, metrics) = (nodes.clone(), me.clone(), metrics.clone());
            async move {
                let began = Instant::now();
                let touch = doc! { "$unset": { "probe": "" } };
                let result = nodes.update_one(doc! { "_id": me }, touch).await;
                metrics.store_call(StoreOperation::Claim, began.elapsed(), result.is_ok());
                result
            }
        };
        keep_probing(Arc::downgrade(&self.policy), CALL, probe, is_outage).boxed()
    }

    /// Writes independently of each other; the outcomes are in the order of the writes.
    pub(super) async fn write(&self, operation: StoreOperation, models: Vec<WriteModel>) -> Vec<Outcome> {
        let count = models.len();
        if count == 0 {
            return Vec::new();
        }
        let began = Instant::now();
        let bulk = self.client.bulk_write(models).ordered(false).verbose_results();
        let result = self.policy.call(CALL, bulk, is_outage).await;
        let outcomes: Vec<Outcome> = match &result {
            Ok(result) => (0..count).map(|index| outcome_of(result, index)).collect(),
            Err(CallError::Failed(error)) => failed(error, count),
            // Looked up like any other, also where it was not made: one way out of doubt is enough.
            Err(error @ CallError::Refused(_)) => vec![Outcome::Unknown(problem(error)); count],
        };
        let known = outcomes.iter().all(|outcome| !matches!(outcome, Outcome::Unknown(_)));
        self.measure(operation, began, &result, known);
        outcomes
    }

    async fn find<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        operation: StoreOperation,
        collection: &Collection<Document>,
        filter: Document,
        mut options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        options.max_time = Some(MAX_TIME);
        let collection = collection.clone_with_type::<T>();
        self.call(operation, async move {
            let cursor: Cursor<T> = collection.find(filter).with_options(options).await?;
            cursor.try_collect().await
        })
        .await
    }

    /// Finds what lies beside inboxes, all of it.
    pub(super) async fn find_beside<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        operation: StoreOperation,
        filter: Document,
        options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        self.find(operation, &self.beside, filter, options).await
    }

    /// Finds dead letters.
    pub(super) async fn find_dead<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        filter: Document,
        options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        self.find(StoreOperation::Read, &self.dead, filter, options).await
    }

    /// Finds scheduled messages.
    pub(super) async fn find_scheduled<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        operation: StoreOperation,
        filter: Document,
        options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        self.find(operation, &self.scheduled, filter, options).await
    }

    /// Finds inboxes by the receipts in them.
    pub(super) async fn find_logged<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        filter: Document,
        options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        self.find(StoreOperation::Read, &self.inbox, filter, options).await
    }

    /// Finds channels.
    pub(super) async fn find_channels<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        operation: StoreOperation,
        filter: Document,
        options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        self.find(operation, &self.channels, filter, options).await
    }

    /// Finds members of channels.
    pub(super) async fn find_members<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        operation: StoreOperation,
        filter: Document,
        options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        self.find(operation, &self.members, filter, options).await
    }

    /// Finds payloads and dedupe keys of durable publications.
    pub(super) async fn find_publications<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        operation: StoreOperation,
        filter: Document,
        options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        self.find(operation, &self.publications, filter, options).await
    }

    /// Finds revocations.
    pub(super) async fn find_revoked<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        filter: Document,
        options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        self.find(StoreOperation::Read, &self.revoked, filter, options).await
    }

    /// Finds inboxes by what they hold.
    pub(super) async fn find_due<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        filter: Document,
        options: FindOptions,
    ) -> Result<Vec<T>, StoreError> {
        self.find(StoreOperation::Claim, &self.inbox, filter, options).await
    }

    /// Finds inboxes for the audit, those that ever had a message: the first of those whose users' names follow `after`, in the order of the names.
    pub(super) async fn find_after<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        after: &str,
        limit: usize,
        projection: Document,
    ) -> Result<Vec<T>, StoreError> {
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let options =
            FindOptions::builder().sort(doc! { "_id": 1 }).limit(limit).projection(projection).build();
        let filter = doc! { "_id": { "$gt": after }, "seq": { "$gt": 0_i64 } };
        self.find(StoreOperation::Audit, &self.inbox, filter, options).await
    }

    /// Finds the inboxes of users, without those that have none.
    pub(super) async fn find_inboxes<T: DeserializeOwned + Send + Sync + Unpin>(
        &self,
        operation: StoreOperation,
        users: &[String],
        projection: Document,
    ) -> Result<Vec<T>, StoreError> {
        let options = FindOptions::builder().projection(projection).build();
        self.find(operation, &self.inbox, doc! { "_id": { "$in": users } }, options).await
    }
}

/// One update in a collection.
pub(super) fn update_of(
    namespace: Namespace,
    filter: Document,
    update: impl Into<UpdateModifications>,
    upsert: bool,
) -> WriteModel {
    let model = UpdateOneModel::builder().namespace(namespace).filter(filter).update(update);
    // Left out where it is the default: it would go with each of many writes.
    WriteModel::UpdateOne(if upsert { model.upsert(true).build() } else { model.build() })
}

/// Whether an error says that the database is away, or cannot serve; not that it looked at a command and refused it.
fn is_outage(error: &Error) -> bool {
    let inner = || {
        let source = std::error::Error::source(error)?;
        source.downcast_ref::<Error>().map(is_outage)
    };
    match &*error.kind {
        ErrorKind::Io(_)
        | ErrorKind::ServerSelection { .. }
        | ErrorKind::ConnectionPoolCleared { .. }
        | ErrorKind::DnsResolve { .. }
        | ErrorKind::Authentication { .. } => true,
        ErrorKind::Command(error) => CANNOT_SERVE.contains(&error.code),
        ErrorKind::Write(WriteFailure::WriteConcernError(_)) => true,
        ErrorKind::BulkWrite(bulk) => !bulk.write_concern_errors.is_empty() || inner().unwrap_or(false),
        _ => false,
    }
}

/// What went wrong, for a caller and the log.
fn problem(error: &CallError<Error>) -> String {
    match error {
        CallError::Failed(error) => describe(error),
        CallError::Refused(refused) => refused.to_string(),
    }
}

fn outcome_of(result: &VerboseBulkWriteResult, index: usize) -> Outcome {
    let updated = result.update_results.get(&index);
    let touched = updated.is_some_and(|update| update.matched_count > 0 || update.upserted_id.is_some());
    let deleted = result.delete_results.get(&index).is_some_and(|deleted| deleted.deleted_count > 0);
    let done = touched || deleted || result.insert_results.contains_key(&index);
    if done { Outcome::Done } else { Outcome::Missed }
}

/// What an error says about each of `count` writes.
fn failed(error: &Error, count: usize) -> Vec<Outcome> {
    let unknown = Outcome::Unknown(describe(error));
    let ErrorKind::BulkWrite(bulk) = &*error.kind else { return vec![unknown; count] };
    // Written, but perhaps not by a majority: a new primary may not have it.
    if !bulk.write_concern_errors.is_empty() {
        return vec![unknown; count];
    }
    (0..count).map(|index| partly(bulk, index).unwrap_or_else(|| unknown.clone())).collect()
}

fn partly(bulk: &BulkWriteError, index: usize) -> Option<Outcome> {
    if let Some(error) = bulk.write_errors.get(&index) {
        let duplicate = error.code == DUPLICATE_KEY;
        return Some(if duplicate { Outcome::Missed } else { Outcome::Unknown(error.message.clone()) });
    }
    let Some(PartialBulkWriteResult::Verbose(result)) = &bulk.partial_result else { return None };
    let answered = result.update_results.contains_key(&index)
        || result.insert_results.contains_key(&index)
        || result.delete_results.contains_key(&index);
    answered.then(|| outcome_of(result, index))
}

/// Longest text of an error, in characters: the driver describes a whole topology in it.
const MAX_TEXT: usize = 300;

/// An error without the server's raw answer, which the driver adds to it.
fn describe(error: &Error) -> String {
    let text: String = match &*error.kind {
        ErrorKind::BulkWrite(bulk) => {
            let concern = bulk.write_concern_errors.first().map(|error| &error.message);
            let write = bulk.write_errors.values().next().map(|error| &error.message);
            match (concern.or(write), std::error::Error::source(error)) {
                (Some(message), _) => message.clone(),
                (None, Some(source)) => source.to_string(),
                (None, None) => "a group of writes failed".to_owned(),
            }
        }
        kind => kind.to_string(),
    };
    text.chars().take(MAX_TEXT).collect()
}
