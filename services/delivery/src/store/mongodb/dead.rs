//! Dead letters: a collection of their own, in which each has the place among all as a field, so that a page is a
//! range of one index. A letter is written before its message is settled as dead.

use std::{collections::BTreeMap, sync::Arc};

use mongodb::{
    bson::{Binary, Document, Uuid as BsonUuid, doc},
    options::{DeleteOneModel, FindOptions, InsertOneModel, WriteModel},
};
use prost::Message as _;
use sanjay_proto::client::v1::Payload;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    database::{Database, Outcome, update_of},
    documents::{BodiesDoc, InboxDoc, MessageDoc, binary, bodies_between, document, id},
    payloads,
};
use crate::{
    metrics::StoreOperation,
    store::{
        Attempts, DeadFilter, DeadLetter, DeadPage, DeadPosition, DeadReason, StoreError,
        attempts::{decode_failures, encode_failures},
    },
};

/// A dead letter.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct DeadDoc {
    /// `USER/ID`.
    #[serde(rename = "_id")]
    id: String,
    u: String,
    /// The message's id.
    i: BsonUuid,
    /// Place among all, see [`place`].
    at: String,
    /// Seq of the message and epoch of its inbox.
    n: i64,
    e: i64,
    /// [`DeadReason::number`].
    r: i32,
    /// When it died, Unix time in microseconds.
    t: i64,
    /// The message's header, as it was in the inbox.
    h: Binary,
    /// The failures, encoded.
    f: Binary,
    /// Encoded payload; left out of lists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    p: Option<Binary>,
    /// What it was sent again as; absent while it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    again: Option<BsonUuid>,
}

/// A place among all dead letters, as text that sorts like [`DeadPosition`]: both parts have a fixed length.
fn place(position: DeadPosition) -> String {
    format!("{:020}/{}", position.died_us, position.message_id)
}

fn letter_id(user: &str, message_id: Uuid) -> String {
    format!("{user}/{message_id}")
}

/// Selects one letter; with the user as a field, which is the shard key.
pub(super) fn one(user: &str, message_id: Uuid) -> Document {
    doc! { "_id": letter_id(user, message_id), "u": user }
}

/// Selects the letters that match, above a page's end.
pub(super) fn selection(filter: &DeadFilter, after: Option<DeadPosition>) -> Document {
    let mut selected = Document::new();
    if let Some(user) = &filter.user {
        selected.insert("u", user);
    }
    let mut range = Document::new();
    if let Some(from_us) = filter.from_us {
        range.insert("$gte", format!("{from_us:020}"));
    }
    let to = filter.to_us.map(|to_us| format!("{to_us:020}"));
    if let Some(below) = to.into_iter().chain(after.map(place)).min() {
        range.insert("$lt", below);
    }
    if !range.is_empty() {
        selected.insert("at", range);
    }
    if let Some(reason) = filter.reason {
        selected.insert("r", reason.number());
    }
    if !filter.redriven {
        selected.insert("again", doc! { "$exists": false });
    }
    selected
}

impl DeadDoc {
    fn new(user: &str, epoch: u64, message: &MessageDoc, attempts: &Attempts) -> Option<Self> {
        let (reason, died_us) = attempts.death(message.seq())?;
        let message_id = Uuid::from_bytes(message.i.bytes());
        Some(Self {
            id: letter_id(user, message_id),
            u: user.to_owned(),
            i: message.i,
            at: place(DeadPosition { died_us, message_id }),
            n: message.n,
            e: epoch.cast_signed(),
            r: reason.number(),
            t: died_us.cast_signed(),
            h: message.h.clone(),
            f: binary(encode_failures(attempts.failures(message.seq()))),
            p: message.p.clone(),
            again: None,
        })
    }

    fn letter(self) -> Result<DeadLetter, StoreError> {
        let Self { id, u: user, i, n, e, r, t, h, f, p, again, .. } = self;
        let damaged = |what: &dyn std::fmt::Display| {
            StoreError::Unavailable(format!("dead letter {id} in the database is damaged: {what}"))
        };
        let message = MessageDoc { n, i, h, p: None, s: None };
        let (header, seq) = (message.header()?, message.seq());
        let reason = DeadReason::from_number(r)
            .ok_or_else(|| damaged(&format_args!("it has the unknown reason {r}")))?;
        let payload = match p {
            Some(payload) => Some(Payload::decode(&payload.bytes[..]).map_err(|error| damaged(&error))?),
            None => None,
        };
        Ok(DeadLetter {
            user,
            message_id: Uuid::from_bytes(i.bytes()),
            seq,
            epoch: e.cast_unsigned(),
            caller: header.caller,
            reason,
            accepted_us: header.time_us,
            died_us: t.cast_unsigned(),
            failures: decode_failures(seq, &f.bytes).map_err(|error| damaged(&error))?,
            trace: header.trace,
            payload: payload.map(Arc::new),
            payload_bytes: header.bytes,
            redriven_as: again.map(|id| Uuid::from_bytes(id.bytes())),
        })
    }
}

/// Most letters that are written at once: they hold their bodies.
pub(super) const MAX_LETTERS: usize = 16;

/// Writes the letters of dying messages, as far as their bodies are found; returns the seqs of those. A letter that is
/// there already stays as it is.
pub(super) async fn write_letters(
    database: &Database,
    user: &str,
    epoch: u64,
    attempts: &Attempts,
    seqs: &[u64],
) -> Result<Vec<u64>, StoreError> {
    let mut bodies = bodies(database, user, seqs).await?;
    payloads::fill(database, bodies.values_mut()).await?;
    let namespace = database.dead.namespace();
    let mut models = Vec::with_capacity(bodies.len());
    for letter in bodies.values().filter_map(|message| DeadDoc::new(user, epoch, message, attempts)) {
        let document = document(&letter)?;
        let model = InsertOneModel::builder().namespace(namespace.clone()).document(document).build();
        models.push(WriteModel::InsertOne(model));
    }
    for outcome in database.write(StoreOperation::Write, models).await {
        if let Outcome::Unknown(problem) = outcome {
            return Err(StoreError::Unavailable(problem));
        }
    }
    Ok(bodies.into_keys().collect())
}

/// Messages with their bodies, by seq. They may move beside the inbox meanwhile, so that is where is looked last.
async fn bodies(
    database: &Database,
    user: &str,
    seqs: &[u64],
) -> Result<BTreeMap<u64, MessageDoc>, StoreError> {
    let inboxes: Vec<InboxDoc> =
        database.find_inboxes(StoreOperation::ReadState, &[user.to_owned()], doc! { "messages": 1 }).await?;
    let wanted = |message: &MessageDoc| seqs.contains(&message.seq());
    let inside = inboxes.into_iter().flat_map(|inbox| inbox.messages).filter(wanted);
    let mut found: BTreeMap<u64, MessageDoc> = inside.map(|message| (message.seq(), message)).collect();
    for seq in seqs {
        if found.contains_key(seq) {
            continue;
        }
        let filter = bodies_between(user, *seq, *seq);
        let beside: Vec<BodiesDoc> =
            database.find_beside(StoreOperation::ReadState, filter, FindOptions::default()).await?;
        let messages = beside.into_iter().flat_map(|bodies| bodies.messages).filter(wanted);
        found.extend(messages.map(|message| (message.seq(), message)));
    }
    Ok(found)
}

/// Lists letters, the newest first.
pub(super) async fn list(
    database: &Database,
    filter: &DeadFilter,
    after: Option<DeadPosition>,
    limit: usize,
) -> Result<DeadPage, StoreError> {
    let limit = limit.max(1);
    // One more than the page takes tells whether it is the last.
    let options = FindOptions::builder()
        .sort(doc! { "at": -1 })
        .projection(doc! { "p": 0 })
        .limit(i64::try_from(limit + 1).unwrap_or(i64::MAX))
        .build();
    let mut found: Vec<DeadDoc> = database.find_dead(selection(filter, after), options).await?;
    let more = found.len() > limit;
    found.truncate(limit);
    let letters: Vec<DeadLetter> = found.into_iter().map(DeadDoc::letter).collect::<Result<_, _>>()?;
    let next = letters.last().filter(|_| more).map(DeadLetter::position);
    Ok(DeadPage { letters, next })
}

/// One letter with its body.
pub(super) async fn get(
    database: &Database,
    user: &str,
    message_id: Uuid,
) -> Result<Option<DeadLetter>, StoreError> {
    let mut found: Vec<DeadDoc> = database.find_dead(one(user, message_id), FindOptions::default()).await?;
    found.pop().map(DeadDoc::letter).transpose()
}

/// Notes that a letter was sent again; whether there is such a letter.
pub(super) async fn redriven(
    database: &Database,
    user: &str,
    message_id: Uuid,
    sent_as: Uuid,
) -> Result<bool, StoreError> {
    let update = doc! { "$set": { "again": id(sent_as) } };
    let model = update_of(database.dead.namespace(), one(user, message_id), update, false);
    Ok(done(database.write(StoreOperation::Write, vec![model]).await)? == 1)
}

/// Removes letters; returns how many there were.
pub(super) async fn purge(database: &Database, letters: &[(String, Uuid)]) -> Result<u64, StoreError> {
    let delete = |(user, message_id): &(String, Uuid)| {
        let filter = one(user, *message_id);
        let model = DeleteOneModel::builder().namespace(database.dead.namespace()).filter(filter).build();
        WriteModel::DeleteOne(model)
    };
    done(database.write(StoreOperation::Write, letters.iter().map(delete).collect()).await)
}

/// How many of some writes were done.
pub(super) fn done(outcomes: Vec<Outcome>) -> Result<u64, StoreError> {
    let mut count = 0;
    for outcome in outcomes {
        match outcome {
            Outcome::Done => count += 1,
            Outcome::Missed => {}
            Outcome::Unknown(problem) => return Err(StoreError::Unavailable(problem)),
        }
    }
    Ok(count)
}
