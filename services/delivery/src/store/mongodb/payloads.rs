//! Payloads that the messages of many users share: the body of a durable publication is a document of its own, to which
//! messages in inboxes and beside them refer by the publication's id.
//!
//! Nobody counts the references. An inbox, and a document of bodies, has the ids to which it refers in an array with an
//! index, so that a look tells whether there is one; now and then each payload is looked at, and removed when there is none. An array loses an
//! id in the write that takes the message away, and a body is beside the inbox before it leaves it: so who looks into the
//! inboxes first, and beside them then, overlooks none.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use mongodb::{
    Collection,
    bson::{Binary, Bson, Document, Uuid as BsonUuid, doc},
    options::{DeleteOneModel, FindOptions, InsertOneModel, WriteModel},
};
use parking_lot::Mutex;
use prost::Message as _;
use sanjay_proto::client::v1::Payload;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    database::{Database, Outcome, update_of},
    documents::{self, MessageDoc, binary, document, id},
};
use crate::{
    metrics::StoreOperation,
    store::{MAX_PAGE_BYTES, StoreError},
};

/// How long after its acceptance a payload is looked at first: long after its publication has its number or will never
/// have one. Then again and again, after as long as it is old, but not more seldom than every hour.
const FIRST_LOOK_US: u64 = 600_000_000;
const LAST_LOOK_US: u64 = 3_600_000_000;

/// How many payloads a node remembers: what it has just put into inboxes is what is read from them next.
const MAX_REMEMBERED: usize = 32;

/// A payload.
#[derive(Debug, Serialize, Deserialize)]
struct PayloadDoc {
    /// [`payload_id`].
    #[serde(rename = "_id")]
    id: String,
    /// The publication's id, and its channel.
    i: BsonUuid,
    c: String,
    /// When it was accepted, Unix time in microseconds.
    t: i64,
    /// When it is looked at next whether anything refers to it.
    gc: i64,
    /// Encoded payload.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    p: Option<Binary>,
}

/// `_id` of a publication's payload.
fn payload_id(publication: Uuid) -> String {
    format!("p/{publication}")
}

/// The newest payloads that this node had to do with.
#[derive(Default)]
pub(super) struct Remembered(Mutex<VecDeque<(BsonUuid, Arc<Payload>)>>);

impl Remembered {
    fn get(&self, id: BsonUuid) -> Option<Arc<Payload>> {
        self.0.lock().iter().find(|(known, _)| *known == id).map(|(_, payload)| payload.clone())
    }

    fn put(&self, id: BsonUuid, payload: &Arc<Payload>) {
        let mut known = self.0.lock();
        if known.iter().any(|(other, _)| *other == id) {
            return;
        }
        if known.len() == MAX_REMEMBERED {
            known.pop_front();
        }
        known.push_back((id, payload.clone()));
    }
}

/// Stores the payload of a publication. One that is there was stored by a try whose answer was lost.
pub(super) async fn insert(
    database: &Database,
    publication: Uuid,
    channel: &str,
    payload: &Arc<Payload>,
    time_us: u64,
) -> Result<(), StoreError> {
    let stored = PayloadDoc {
        id: payload_id(publication),
        i: id(publication),
        c: channel.to_owned(),
        t: time_us.cast_signed(),
        gc: time_us.max(database.clock.now_us()).saturating_add(FIRST_LOOK_US).cast_signed(),
        p: Some(binary(payload.encode_to_vec())),
    };
    let namespace = database.publications.namespace();
    let model = InsertOneModel::builder().namespace(namespace).document(document(&stored)?).build();
    match database.write(StoreOperation::Write, vec![WriteModel::InsertOne(model)]).await.pop() {
        Some(Outcome::Unknown(problem)) => Err(StoreError::Unavailable(problem)),
        _ => {
            database.remembered.put(id(publication), payload);
            Ok(())
        }
    }
}

/// Payloads by their publications' ids; those that are not there are left out.
pub(super) async fn fetch(
    database: &Database,
    ids: &[BsonUuid],
) -> Result<HashMap<BsonUuid, Arc<Payload>>, StoreError> {
    let (mut found, mut missing) = (HashMap::new(), Vec::new());
    for wanted in ids {
        match database.remembered.get(*wanted) {
            Some(payload) => drop(found.insert(*wanted, payload)),
            None => missing.push(payload_id(Uuid::from_bytes(wanted.bytes()))),
        }
    }
    if missing.is_empty() {
        return Ok(found);
    }
    let filter = doc! { "_id": { "$in": missing } };
    let stored: Vec<PayloadDoc> =
        database.find_publications(StoreOperation::Read, filter, FindOptions::default()).await?;
    for stored in stored {
        let bytes = stored.p.map(|payload| payload.bytes).unwrap_or_default();
        let payload = Payload::decode(&bytes[..]).map_err(|error| {
            StoreError::Unavailable(format!("payload {} in the database is damaged: {error}", stored.id))
        })?;
        let payload = Arc::new(payload);
        database.remembered.put(stored.i, &payload);
        found.insert(stored.i, payload);
    }
    Ok(found)
}

/// The payloads that a page needs of these messages, in their order, as far as it has room for them.
pub(super) async fn of_page<'a>(
    database: &Database,
    messages: impl Iterator<Item = &'a MessageDoc>,
    now_us: u64,
) -> Result<Shared, StoreError> {
    let (mut ids, mut bytes) = (Vec::new(), 0);
    for message in messages {
        if bytes > MAX_PAGE_BYTES {
            break;
        }
        let header = message.header()?;
        if documents::has_expired(header.expires_us, now_us) {
            continue;
        }
        bytes += usize::try_from(header.bytes).unwrap_or(usize::MAX);
        ids.extend(message.s);
    }
    let found = if ids.is_empty() { HashMap::new() } else { fetch(database, &ids).await? };
    Ok(Shared { asked: ids, found })
}

/// Payloads that a page needs.
pub(super) struct Shared {
    asked: Vec<BsonUuid>,
    found: HashMap<BsonUuid, Arc<Payload>>,
}

impl Shared {
    /// A payload that was asked for. `Err(true)`: it was asked for and is gone, so the message is settled by now.
    /// `Err(false)`: it was not, because the page is full before it.
    pub(super) fn get(&self, id: BsonUuid) -> Result<&Arc<Payload>, bool> {
        self.found.get(&id).ok_or_else(|| self.asked.contains(&id))
    }
}

/// Puts shared payloads into messages that are to stand by themselves.
pub(super) async fn fill(
    database: &Database,
    messages: impl Iterator<Item = &mut MessageDoc>,
) -> Result<(), StoreError> {
    let mut messages: Vec<(BsonUuid, &mut MessageDoc)> =
        messages.filter_map(|message| Some((message.s?, message))).collect();
    if messages.is_empty() {
        return Ok(());
    }
    let ids: Vec<BsonUuid> = messages.iter().map(|(id, _)| *id).collect();
    let found = fetch(database, &ids).await?;
    for (id, message) in &mut messages {
        let payload = found.get(id).ok_or_else(|| {
            StoreError::Unavailable(format!("the payload of publication {id} is missing in the database"))
        })?;
        message.p = Some(binary(payload.encode_to_vec()));
    }
    Ok(())
}

/// Removes payloads to which nothing refers, of up to `limit` that are to be looked at; returns how many were looked at.
pub(super) async fn sweep(database: &Database, now_us: u64, limit: usize) -> Result<usize, StoreError> {
    let options = FindOptions::builder()
        .sort(doc! { "gc": 1 })
        .projection(doc! { "p": 0 })
        .limit(i64::try_from(limit).unwrap_or(i64::MAX))
        .build();
    let due = doc! { "gc": { "$gt": 0_i64, "$lte": now_us.cast_signed() } };
    let found: Vec<PayloadDoc> = database.find_publications(StoreOperation::Tidy, due, options).await?;
    let mut models = Vec::with_capacity(found.len());
    for payload in &found {
        let namespace = database.publications.namespace();
        let filter = doc! { "_id": &payload.id, "gc": payload.gc };
        models.push(if is_used(database, payload).await? {
            let age_us = now_us.saturating_sub(payload.t.cast_unsigned());
            let next_us = now_us.saturating_add(age_us.clamp(FIRST_LOOK_US / 10, LAST_LOOK_US));
            update_of(namespace, filter, doc! { "$set": { "gc": next_us.cast_signed() } }, false)
        } else {
            WriteModel::DeleteOne(DeleteOneModel::builder().namespace(namespace).filter(filter).build())
        });
    }
    super::dead::done(database.write(StoreOperation::Tidy, models).await)?;
    Ok(found.len())
}

/// Whether its publication is not finished, or a message refers to it. In this order: see above.
async fn is_used(database: &Database, payload: &PayloadDoc) -> Result<bool, StoreError> {
    let unfinished = doc! { "_id": &payload.c, "open.i": payload.i };
    Ok(any(database, &database.channels, unfinished).await?
        || any(database, &database.inbox, doc! { "shared": payload.i }).await?
        || any(database, &database.beside, doc! { "s": payload.i }).await?)
}

async fn any(
    database: &Database,
    collection: &Collection<Document>,
    filter: Document,
) -> Result<bool, StoreError> {
    let find = collection.find_one(filter).projection(doc! { "_id": 1 });
    Ok(database.call(StoreOperation::Tidy, find).await?.is_some())
}

/// Ids as an array.
pub(super) fn ids(shared: impl IntoIterator<Item = BsonUuid>) -> Vec<Bson> {
    shared.into_iter().map(Bson::from).collect()
}
