//! Messages that wait for their time: a collection of their own. A dedupe key goes where an append would put it, into the
//! inbox's document, in one transaction with the message; a count in that document tells an append that knows an older
//! list of keys that it must look again.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::TryStreamExt;
use mongodb::{
    bson::{Binary, Document, Uuid as BsonUuid, doc},
    error::{TRANSIENT_TRANSACTION_ERROR, UNKNOWN_TRANSACTION_COMMIT_RESULT},
    options::{DeleteOneModel, FindOptions, InsertOneModel, WriteModel},
};
use prost::Message as _;
use sanjay_proto::client::v1::Payload;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    DEADLINE,
    append::{self, Key},
    database::{Database, Outcome, is_duplicate, update_of},
    documents::{self, Header, InboxDoc, KeyDoc, binary, bson, document, id, key_id, user_hash},
    due::Share,
    plan::Bounds,
    tidy,
};
use crate::{
    message::State,
    metrics::StoreOperation,
    store::{
        AppendError, MAX_SCHEDULED, NewMessage, Quota, Receipt, Scheduled, ScheduledAt, StoreError,
        epoch::epoch,
    },
};

/// Pauses before a write is tried again.
const PAUSES_MS: [u64; 8] = [2, 5, 20, 50, 100, 200, 400, 800];

/// How late a message of another node's share is, in microseconds, when this one takes it too: the other most likely died.
const GRACE_US: u64 = 500_000;

/// A message that waits for its time.
#[derive(Debug, Serialize, Deserialize)]
struct ScheduledDoc {
    /// `USER/ID`.
    #[serde(rename = "_id")]
    id: String,
    u: String,
    /// [`user_hash`].
    h: i32,
    /// The message's id.
    i: BsonUuid,
    /// When it is to be appended, and when it is handed out next: Unix time in microseconds.
    at: i64,
    due: i64,
    /// Encoded [`Header`].
    m: Binary,
    /// Encoded payload.
    p: Binary,
    /// Collapse key, or empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    c: String,
}

/// Selects one message; with the user as a field, which is the shard key.
pub(super) fn one(user: &str, message_id: Uuid) -> Document {
    doc! { "_id": format!("{user}/{message_id}"), "u": user }
}

impl ScheduledDoc {
    fn new(scheduled: &Scheduled) -> Self {
        let Scheduled { message, deliver_us } = scheduled;
        let at = i64::try_from(*deliver_us).unwrap_or(i64::MAX);
        Self {
            id: format!("{}/{}", message.user, message.message_id),
            u: message.user.clone(),
            h: user_hash(&message.user),
            i: id(message.message_id),
            at,
            // What is due at 0 would not be found.
            due: at.max(1),
            m: binary(Header::new(message).encode_to_vec()),
            p: binary(message.payload.encode_to_vec()),
            c: message.collapse_key.clone(),
        }
    }

    fn scheduled(self) -> Result<Scheduled, StoreError> {
        let damaged = |error: prost::DecodeError| {
            StoreError::Unavailable(format!(
                "scheduled message {} in the database is damaged: {error}",
                self.id
            ))
        };
        let header = Header::decode(&self.m.bytes[..]).map_err(damaged)?;
        let payload = Payload::decode(&self.p.bytes[..]).map_err(damaged)?;
        let message = NewMessage {
            user: self.u,
            caller: header.caller,
            message_id: Uuid::from_bytes(self.i.bytes()),
            payload: Arc::new(payload),
            dedupe_key: String::new(),
            time_us: header.time_us,
            trace: header.trace,
            expires_us: header.expires_us,
            collapse_key: self.c,
            shared: None,
        };
        Ok(Scheduled { message, deliver_us: self.at.cast_unsigned() })
    }
}

fn accepted(scheduled: &Scheduled) -> ScheduledAt {
    let Scheduled { message, deliver_us } = scheduled;
    let (message_id, time_us) = (message.message_id, message.time_us);
    ScheduledAt { message_id, deliver_us: *deliver_us, duplicate: false, time_us }
}

/// Keeps messages until their time; the answers are in their order.
pub(super) async fn schedule(
    database: &Database,
    bounds: Bounds,
    messages: &[(Option<Key>, Scheduled)],
) -> Vec<Result<ScheduledAt, AppendError>> {
    let deadline = Instant::now() + DEADLINE;
    let mut counts = match counts(database, messages).await {
        Ok(counts) => counts,
        Err(error) => return messages.iter().map(|_| Err(error.clone().into())).collect(),
    };
    let mut answers = Vec::with_capacity(messages.len());
    let mut room = |user: &str| {
        let count = counts.entry(user.to_owned()).or_default();
        let full = *count >= MAX_SCHEDULED as u64;
        *count += u64::from(!full);
        let error = AppendError::QueueFull { quota: Quota::Scheduled, held: *count };
        if full { Err(error) } else { Ok(()) }
    };
    let mut rest = messages;
    while let Some((key, first)) = rest.first() {
        if let Some(key) = key {
            answers.push(with_key(database, bounds, first, key, &mut room, deadline).await);
            rest = &rest[1..];
            continue;
        }
        let count = rest.iter().take_while(|(key, _)| key.is_none()).count();
        let (plain, others) = rest.split_at(count);
        let taken: Vec<Result<&Scheduled, AppendError>> =
            plain.iter().map(|(_, scheduled)| room(&scheduled.message.user).map(|()| scheduled)).collect();
        let fit: Vec<&Scheduled> = taken.iter().filter_map(|taken| taken.as_ref().ok().copied()).collect();
        let stored = insert(database, &fit, deadline).await;
        answers.extend(taken.into_iter().map(|taken| {
            stored.clone()?;
            taken.map(accepted)
        }));
        rest = others;
    }
    answers
}

/// How many messages wait for each of the users.
async fn counts(
    database: &Database,
    messages: &[(Option<Key>, Scheduled)],
) -> Result<HashMap<String, u64>, StoreError> {
    #[derive(Deserialize)]
    struct Count {
        #[serde(rename = "_id")]
        user: String,
        n: i64,
    }
    let mut users: Vec<&str> = messages.iter().map(|(_, scheduled)| &*scheduled.message.user).collect();
    users.sort_unstable();
    users.dedup();
    let pipeline = [
        doc! { "$match": { "u": { "$in": users } } },
        doc! { "$group": { "_id": "$u", "n": { "$sum": 1_i64 } } },
    ];
    let scheduled = database.scheduled.clone();
    let counting = async move {
        let found = scheduled.aggregate(pipeline).with_type::<Count>().await?;
        found.try_collect::<Vec<Count>>().await
    };
    let found = database.call(StoreOperation::ReadState, counting).await?;
    Ok(found.into_iter().map(|count| (count.user, count.n.cast_unsigned())).collect())
}

/// Inserts messages without dedupe keys. One that is there was inserted by a try whose answer was lost.
async fn insert(database: &Database, messages: &[&Scheduled], deadline: Instant) -> Result<(), AppendError> {
    let mut models = Vec::with_capacity(messages.len());
    for scheduled in messages {
        let document = document(&ScheduledDoc::new(scheduled))?;
        let namespace = database.scheduled.namespace();
        let model = InsertOneModel::builder().namespace(namespace).document(document).build();
        models.push(WriteModel::InsertOne(model));
    }
    let mut problem = String::new();
    for pause in PAUSES_MS {
        let outcomes = database.write(StoreOperation::Write, models.clone()).await;
        let unknown = outcomes.into_iter().find_map(|outcome| match outcome {
            Outcome::Unknown(problem) => Some(problem),
            Outcome::Done | Outcome::Missed => None,
        });
        let Some(unknown) = unknown else { return Ok(()) };
        problem = unknown;
        if !again(pause, deadline).await {
            break;
        }
    }
    Err(StoreError::Unavailable(problem).into())
}

/// Waits before another try; `false` when it is too late for one.
async fn again(pause_ms: u64, deadline: Instant) -> bool {
    let next = Instant::now() + Duration::from_millis(pause_ms);
    if next >= deadline {
        return false;
    }
    tokio::time::sleep_until(next).await;
    true
}

/// Keeps a message with a dedupe key, unless the key was used before.
async fn with_key(
    database: &Database,
    bounds: Bounds,
    scheduled: &Scheduled,
    key: &Key,
    room: &mut impl FnMut(&str) -> Result<(), AppendError>,
    deadline: Instant,
) -> Result<ScheduledAt, AppendError> {
    let message = &scheduled.message;
    let mut problem = "others wrote to the inbox meanwhile".to_owned();
    let mut has_room = false;
    for pause in PAUSES_MS {
        let (inbox, first) = look(database, message, key).await?;
        if let Some(first) = first {
            return answer(database, scheduled, key, &first).await;
        }
        if !has_room {
            room(&message.user)?;
            has_room = true;
        }
        let keys = inbox.keys.len() + 1;
        match database.call(StoreOperation::Write, store(database, inbox, scheduled, key)?).await {
            Ok(true) => {
                if keys > bounds.keys {
                    tidy::tidy(database.clone(), bounds, vec![message.user.clone()]).await;
                }
                return Ok(accepted(scheduled));
            }
            Ok(false) => database.metrics.store_conflict(),
            // The next look tells whether it was done.
            Err(StoreError::Unavailable(error)) => {
                database.metrics.store_unknown();
                problem = error;
            }
            Err(error) => return Err(error.into()),
        }
        if !again(pause, deadline).await {
            break;
        }
    }
    Err(StoreError::Unavailable(problem).into())
}

/// What the inbox says, and the use of a key that still holds. The inbox comes first: a key leaves it after it was written
/// beside it.
async fn look(
    database: &Database,
    message: &NewMessage,
    key: &Key,
) -> Result<(InboxDoc, Option<KeyDoc>), StoreError> {
    let users = [message.user.clone()];
    let fields = doc! { "seq": 1, "epoch": 1, "plans": 1, "keys": 1 };
    let found: Vec<InboxDoc> = database.find_inboxes(StoreOperation::ReadState, &users, fields).await?;
    let inbox = found.into_iter().next().unwrap_or_default();
    let mut first = inbox.keys.iter().rev().find(|used| used.k.bytes == key.0).cloned();
    if first.is_none() {
        let filter = doc! { "_id": key_id(&message.user, &key.0), "u": &message.user };
        let beside: Vec<KeyDoc> =
            database.find_beside(StoreOperation::ReadState, filter, FindOptions::default()).await?;
        first = beside.into_iter().next();
    }
    Ok((inbox, first.filter(|first| append::holds(first, message.time_us))))
}

/// The answer to a message whose key was used before; by itself when an earlier try was done after all.
async fn answer(
    database: &Database,
    scheduled: &Scheduled,
    key: &Key,
    first: &KeyDoc,
) -> Result<ScheduledAt, AppendError> {
    let message = &scheduled.message;
    if first.i == id(message.message_id) {
        return Ok(accepted(scheduled));
    }
    if first.h.bytes != key.1 {
        return Err(AppendError::AlreadyExists { key: message.dedupe_key.clone() });
    }
    let message_id = Uuid::from_bytes(first.i.bytes());
    let waiting = find(database, &message.user, message_id).await?;
    let deliver_us = waiting.map_or(0, |waiting| waiting.at.cast_unsigned());
    Ok(ScheduledAt { message_id, deliver_us, duplicate: true, time_us: first.t.cast_unsigned() })
}

/// The transaction that stores a message with its key where the inbox still is as it was read; `false` when it is not.
fn store(
    database: &Database,
    inbox: InboxDoc,
    scheduled: &Scheduled,
    key: &Key,
) -> Result<impl Future<Output = mongodb::error::Result<bool>> + Send + use<>, StoreError> {
    let message = &scheduled.message;
    let key = KeyDoc {
        k: binary(key.0.clone()),
        h: binary(key.1.clone()),
        n: 0,
        i: id(message.message_id),
        t: message.time_us.cast_signed(),
    };
    let filter = doc! { "_id": &message.user, "seq": inbox.seq, "plans": documents::counted(inbox.plans) };
    let mut update = doc! { "$inc": { "plans": 1_i64 }, "$push": { "keys": bson(&key)? } };
    let none = inbox.user.is_empty();
    if none {
        let mut new = documents::new_inbox(&message.user, epoch(database.store_id, &message.user));
        new.extend(doc! { "armed": 0_i64, "attempt": 0_i64 });
        update.insert("$setOnInsert", new);
    }
    let document = document(&ScheduledDoc::new(scheduled))?;
    let database = database.clone();
    Ok(async move {
        let mut session = database.client.start_session().await?;
        session.start_transaction().await?;
        let updated = database.inbox.update_one(filter, update).upsert(none).session(&mut session).await;
        let stored = match updated {
            Ok(updated) if updated.matched_count == 0 && updated.upserted_id.is_none() => Ok(false),
            Ok(_) => database.scheduled.insert_one(document).session(&mut session).await.map(|_| true),
            Err(error) => Err(error),
        };
        match stored {
            Ok(true) => {}
            Ok(false) => {
                session.abort_transaction().await?;
                return Ok(false);
            }
            // Somebody else wrote to the inbox, or made it.
            Err(error) if is_duplicate(&error) || error.contains_label(TRANSIENT_TRANSACTION_ERROR) => {
                session.abort_transaction().await?;
                return Ok(false);
            }
            Err(error) => return Err(error),
        }
        loop {
            match session.commit_transaction().await {
                Ok(()) => return Ok(true),
                Err(error) if error.contains_label(TRANSIENT_TRANSACTION_ERROR) => return Ok(false),
                // Until the call's deadline.
                Err(error) if error.contains_label(UNKNOWN_TRANSACTION_COMMIT_RESULT) => {
                    tokio::time::sleep(Duration::from_millis(PAUSES_MS[3])).await;
                }
                Err(error) => return Err(error),
            }
        }
    })
}

async fn find(database: &Database, user: &str, message_id: Uuid) -> Result<Option<ScheduledDoc>, StoreError> {
    let found: Vec<ScheduledDoc> =
        database.find_scheduled(StoreOperation::Read, one(user, message_id), FindOptions::default()).await?;
    Ok(found.into_iter().next())
}

/// The record of a message that waits.
pub(super) async fn receipt(
    database: &Database,
    user: &str,
    message_id: Uuid,
) -> Result<Option<Receipt>, StoreError> {
    let Some(found) = find(database, user, message_id).await? else { return Ok(None) };
    let accepted_us = found.scheduled()?.message.time_us;
    Ok(Some(Receipt { seq: 0, state: State::Scheduled, accepted_us, settled_us: 0 }))
}

/// Hands out messages whose time has come, the earliest first.
pub(super) async fn claim(
    database: &Database,
    share: &Share,
    now_us: u64,
    until_us: u64,
    limit: usize,
) -> Result<Vec<Scheduled>, StoreError> {
    let mut found: Vec<ScheduledDoc> = Vec::new();
    for look in share.looks_beyond(database, now_us, GRACE_US).await {
        if found.len() >= limit {
            break;
        }
        let limit = i64::try_from(limit - found.len()).unwrap_or(i64::MAX);
        let options = FindOptions::builder().sort(doc! { "due": 1 }).limit(limit).build();
        let some: Vec<ScheduledDoc> =
            database.find_scheduled(StoreOperation::Claim, look.filter("due"), options).await?;
        found.extend(some.into_iter().filter(|some| look.is_new(&some.u)));
    }
    let namespace = database.scheduled.namespace();
    let hold = |found: &ScheduledDoc| {
        let filter = doc! { "_id": &found.id, "u": &found.u, "due": found.due };
        let update = doc! { "$set": { "due": until_us.cast_signed() } };
        update_of(namespace.clone(), filter, update, false)
    };
    let outcomes = database.write(StoreOperation::Claim, found.iter().map(hold).collect()).await;
    let mut claimed = Vec::with_capacity(found.len());
    for (found, outcome) in found.into_iter().zip(outcomes) {
        match outcome {
            Outcome::Done => match found.scheduled() {
                Ok(scheduled) => claimed.push(scheduled),
                // The others go on.
                Err(error) => tracing::error!(%error, "a scheduled message is not sent"),
            },
            // Another node has it.
            Outcome::Missed => {}
            // What was claimed comes back by itself.
            Outcome::Unknown(error) => return Err(StoreError::Unavailable(error)),
        }
    }
    Ok(claimed)
}

/// Has messages handed out again at another time.
pub(super) async fn postpone(
    database: &Database,
    messages: &[(String, Uuid)],
    until_us: u64,
) -> Result<(), StoreError> {
    let postpone = |(user, message_id): &(String, Uuid)| {
        let update = doc! { "$set": { "due": until_us.cast_signed() } };
        update_of(database.scheduled.namespace(), one(user, *message_id), update, false)
    };
    let outcomes = database.write(StoreOperation::Write, messages.iter().map(postpone).collect()).await;
    super::dead::done(outcomes).map(drop)
}

/// Forgets messages; returns how many there were.
pub(super) async fn forget(database: &Database, messages: &[(String, Uuid)]) -> Result<u64, StoreError> {
    let delete = |(user, message_id): &(String, Uuid)| {
        let namespace = database.scheduled.namespace();
        let filter = one(user, *message_id);
        WriteModel::DeleteOne(DeleteOneModel::builder().namespace(namespace).filter(filter).build())
    };
    super::dead::done(database.write(StoreOperation::Write, messages.iter().map(delete).collect()).await)
}
