//! Accepting publications: payload first, then the dedupe key, then the number. A number is given out by an update of the
//! channel's document under the condition that it is the next, with the publication. What became of one without an
//! answer is read from there.

use std::{sync::Arc, time::Duration};

use mongodb::{
    bson::{Binary, Uuid as BsonUuid, doc},
    options::FindOptions,
};
use serde::Deserialize;
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::Instant,
};
use uuid::Uuid;

use super::{
    super::{
        DEADLINE,
        append::Key,
        database::{Database, Outcome, update_of},
        documents::{self, binary, bson, date, id, key_id, user_hash},
        gone, payloads,
    },
    OpenDoc, find, header,
    members::recount,
};
use crate::{
    metrics::StoreOperation,
    store::{DEDUPE_WINDOW, MAX_UNFINISHED, Numbered, Publication, PublicationError, StoreError},
};

/// How many publications are accepted at once, each of another channel.
const LANES: usize = 4;

/// Most publications that wait in a lane.
const MAX_QUEUED: usize = 4_096;

/// Pauses before a publication is tried again.
const PAUSES_MS: [u64; 8] = [2, 5, 20, 50, 100, 200, 400, 800];

/// The use of a dedupe key.
#[derive(Debug, Deserialize)]
struct KeyDoc {
    /// SHA-256 of the payload.
    h: Binary,
    /// The publication's id.
    i: BsonUuid,
    /// When it was accepted, Unix time in microseconds.
    t: i64,
    /// Its number; 0 while it is not known to have one.
    #[serde(default)]
    n: i64,
}

/// A publication that waits, with where its answer goes.
pub(in super::super) struct Waiting {
    pub(in super::super) publication: Publication,
    /// Digests of its dedupe key and of its payload.
    pub(in super::super) key: Option<Key>,
    pub(in super::super) answer: oneshot::Sender<Result<Numbered, PublicationError>>,
    /// Its places in the queue.
    pub(in super::super) _places: Vec<OwnedSemaphorePermit>,
}

/// Keeps publications of a channel in order: one after the other is accepted.
pub(in super::super) struct Lanes(Vec<mpsc::Sender<Waiting>>);

impl Lanes {
    pub(in super::super) fn start(database: &Database) -> Self {
        let lane = |_| {
            let (sender, mut waiting) = mpsc::channel::<Waiting>(MAX_QUEUED);
            let database = database.clone();
            tokio::spawn(async move {
                while let Some(Waiting { publication, key, answer, _places }) = waiting.recv().await {
                    // Who asked may have gone away, which is no concern of the lane.
                    let _gone = answer.send(accept(&database, publication, key).await);
                }
            });
            sender
        };
        Self((0..LANES).map(lane).collect())
    }

    /// Hands a publication to its channel's lane without waiting.
    pub(in super::super) fn submit(&self, waiting: Waiting) {
        let hash = usize::try_from(user_hash(&waiting.publication.channel)).unwrap_or(0);
        let (waiting, error) = match self.0[hash % self.0.len()].try_send(waiting) {
            Ok(()) => return,
            Err(mpsc::error::TrySendError::Full(waiting)) => (waiting, StoreError::Busy),
            Err(mpsc::error::TrySendError::Closed(waiting)) => (waiting, gone()),
        };
        drop(waiting.answer.send(Err(error.into())));
    }
}

/// Accepts a publication, unless its key was used before.
async fn accept(
    database: &Database,
    mut publication: Publication,
    key: Option<Key>,
) -> Result<Numbered, PublicationError> {
    let deadline = Instant::now() + DEADLINE;
    let mut problem = StoreError::Unavailable("others published to the channel meanwhile".to_owned());
    for pause in PAUSES_MS {
        let tried = attempt(database, &mut publication, key.as_ref()).await;
        match tried {
            Ok(Some(numbered)) => return Ok(counted(database, &publication.channel, numbered).await),
            Ok(None) => database.metrics.store_conflict(),
            // The next try looks whether it was done.
            Err(PublicationError::Store(error)) => {
                database.metrics.store_unknown();
                problem = error;
            }
            Err(error) => return Err(error),
        }
        let next = Instant::now() + Duration::from_millis(pause);
        if next >= deadline {
            break;
        }
        tokio::time::sleep_until(next).await;
    }
    database.metrics.store_error();
    Err(problem.into())
}

/// One try; `None` when something else came in between.
async fn attempt(
    database: &Database,
    publication: &mut Publication,
    key: Option<&Key>,
) -> Result<Option<Numbered>, PublicationError> {
    let own = publication.message_id;
    payloads::insert(database, own, &publication.channel, &publication.payload, publication.time_us).await?;
    if let Some(key) = key {
        match first_use(database, publication, key).await? {
            Some(first) if first.h.bytes != key.1 => {
                let key = publication.dedupe_key.clone();
                return Err(PublicationError::AlreadyExists { key });
            }
            Some(first) if first.i == id(own) => {}
            Some(first) => {
                let first_id = Uuid::from_bytes(first.i.bytes());
                if first.n > 0 {
                    let (number, duplicate) = (first.n.cast_unsigned(), true);
                    let members = members(database, &publication.channel).await?;
                    return Ok(Some(Numbered { number, message_id: first_id, duplicate, members }));
                }
                // Who came first did not get far, or is about to: it is the same publication, and has one number.
                publication.message_id = first_id;
                publication.time_us = first.t.cast_unsigned();
                let Publication { channel, payload, time_us, .. } = &*publication;
                payloads::insert(database, first_id, channel, payload, *time_us).await?;
            }
            None => return Ok(None),
        }
    }
    let Some(numbered) = number(database, publication).await? else { return Ok(None) };
    if let Some(key) = key {
        note_number(database, publication, key, numbered.number).await;
    }
    Ok(Some(numbered))
}

/// Counts the members anew, which is little beside what the publication asks for: calls that were cut off may have left a
/// wrong number. What cannot be counted now stays as it was counted.
async fn counted(database: &Database, channel: &str, numbered: Numbered) -> Numbered {
    let counting = async {
        let before = find(database, channel).await?.unwrap_or_default();
        recount(database, channel, before.members).await
    };
    let members = counting.await.map_or(numbered.members, i64::cast_unsigned);
    Numbered { members, ..numbered }
}

async fn members(database: &Database, channel: &str) -> Result<u64, StoreError> {
    let channel = find(database, channel).await?.unwrap_or_default();
    Ok(channel.members.max(0).cast_unsigned())
}

/// Uses a dedupe key, unless it was used before; who used it first. `None` when that is not known.
async fn first_use(
    database: &Database,
    publication: &Publication,
    key: &Key,
) -> Result<Option<KeyDoc>, StoreError> {
    let Publication { channel, message_id, time_us, .. } = publication;
    let key_id = key_id(channel, &key.0);
    let filter = doc! { "_id": &key_id };
    let options = FindOptions::default();
    let found = database.find_publications(StoreOperation::ReadState, filter, options).await?;
    let window_us = DEDUPE_WINDOW.as_micros() as u64;
    let first: Option<KeyDoc> = found.into_iter().next();
    if let Some(first) = first
        && first.t.cast_unsigned().saturating_add(window_us) >= *time_us
    {
        return Ok(Some(first));
    }
    let (sha256, own) = (binary(key.1.clone()), id(*message_id));
    let filter = doc! { "_id": &key_id, "t": { "$lt": time_us.saturating_sub(window_us).cast_signed() } };
    let used = doc! {
        "c": channel, "h": sha256.clone(), "i": own, "t": time_us.cast_signed(), "n": 0_i64,
        "x": date(time_us.saturating_add(window_us)),
    };
    let model = update_of(database.publications.namespace(), filter, doc! { "$set": used }, true);
    match database.write(StoreOperation::Write, vec![model]).await.pop() {
        Some(Outcome::Done) => Ok(Some(KeyDoc { h: sha256, i: own, t: time_us.cast_signed(), n: 0 })),
        Some(Outcome::Unknown(problem)) => Err(StoreError::Unavailable(problem)),
        Some(Outcome::Missed) | None => Ok(None),
    }
}

/// Gives a publication the next number of its channel, unless it has one.
async fn number(
    database: &Database,
    publication: &Publication,
) -> Result<Option<Numbered>, PublicationError> {
    let (own, message_id) = (id(publication.message_id), publication.message_id);
    let found = find(database, &publication.channel).await?;
    let none = found.is_none();
    let channel = found.unwrap_or_default();
    let members = channel.members.max(0).cast_unsigned();
    let open = channel.open.iter().map(|open| (open.n, open.i));
    let mut known = open.chain(channel.done.iter().map(|done| (done.n, done.i)));
    if let Some((number, _)) = known.find(|(_, known)| *known == own) {
        let number = number.cast_unsigned();
        return Ok(Some(Numbered { number, message_id, duplicate: false, members }));
    }
    if channel.open.len() >= MAX_UNFINISHED {
        return Err(PublicationError::Backlog);
    }
    let number = channel.head + 1;
    let entry = OpenDoc {
        n: number,
        i: own,
        t: publication.time_us.cast_signed(),
        h: binary(prost::Message::encode_to_vec(&header(publication))),
        c: publication.collapse_key.clone(),
    };
    let now_us = database.clock.now_us();
    let mut filter = doc! { "_id": &publication.channel, "head": channel.head };
    let mut update = doc! {
        "$set": { "head": number },
        "$push": { "open": bson(&entry)? },
        // What is claimed stays claimed.
        "$max": { "due": now_us.max(1).cast_signed() },
    };
    if none {
        let new = doc! { "h": user_hash(&publication.channel), "members": 0_i64 };
        update.insert("$setOnInsert", new);
    } else {
        filter.insert("open.i", doc! { "$ne": own });
        filter.insert("done.i", doc! { "$ne": own });
    }
    let model = update_of(database.channels.namespace(), filter, update, none);
    match database.write(StoreOperation::Write, vec![model]).await.pop() {
        Some(Outcome::Done) => {
            let number = number.cast_unsigned();
            Ok(Some(Numbered { number, message_id, duplicate: false, members }))
        }
        Some(Outcome::Unknown(problem)) => Err(StoreError::Unavailable(problem).into()),
        Some(Outcome::Missed) | None => Ok(None),
    }
}

/// Notes the number beside the key, for those who use it again. Without the note they find it in the channel, as long as that
/// remembers it.
async fn note_number(database: &Database, publication: &Publication, key: &Key, number: u64) {
    let filter = doc! { "_id": key_id(&publication.channel, &key.0), "i": id(publication.message_id) };
    let update = doc! { "$set": { "n": number.cast_signed() } };
    let model = update_of(database.publications.namespace(), filter, update, false);
    if let Some(Outcome::Unknown(problem)) = database.write(StoreOperation::Write, vec![model]).await.pop() {
        tracing::debug!(problem, "the number of a publication was not noted beside its dedupe key");
    }
}

/// Shares the digest of a publication's payload and dedupe key with the queue.
pub(in super::super) fn key(publication: &Publication) -> Option<Key> {
    (!publication.dedupe_key.is_empty()).then(|| {
        let payload = prost::Message::encode_to_vec(&*Arc::clone(&publication.payload));
        let digest = ring::digest::digest(&ring::digest::SHA256, &payload);
        let key = documents::key_digest(&publication.caller, &publication.dedupe_key);
        (key, digest.as_ref().to_vec())
    })
}
