//! Moves out of inboxes what makes their documents large: bodies that nobody has acknowledged for long, receipts,
//! dedupe keys. First it is written beside, then it leaves, so that at every moment it is in one of the two places
//! or in both. Runs beside the writes: it touches no number on which their conditions depend.

use std::collections::BTreeMap;

use mongodb::{
    bson::{Bson, Document, Uuid as BsonUuid, doc},
    options::{DeleteManyModel, WriteModel},
};
use uuid::Uuid;

use super::{
    database::{Database, Outcome},
    documents::{
        BodiesDoc, InboxDoc, KeyDoc, MAX_SPAN, MessageDoc, ReceiptDoc, bodies_id, date, document, key_id,
    },
    inbox::Inbox,
    payloads,
    plan::Bounds,
};
use crate::{
    metrics::StoreOperation,
    store::{DEDUPE_WINDOW, RECEIPT_RETENTION, StoreError},
};

/// Most inboxes that are tidied at once.
pub(super) const MAX_USERS: usize = 32;

/// Most bytes of payload in one document of bodies, unless its first alone is larger: a page of an inbox is made of
/// a few of them.
const MAX_BODIES_BYTES: usize = 256 * 1024;

/// What was moved out of an inbox.
#[derive(Default)]
pub(super) struct Tidied {
    pub(super) user: String,
    /// Bodies up to this seq.
    spilled: u64,
    receipts: usize,
    /// Dedupe keys, by the id of their message: a key that was used again meanwhile stays.
    keys: Vec<BsonUuid>,
    /// Up to which seq garbage was removed.
    removed: u64,
}

impl Tidied {
    /// Whether there was anything to do.
    pub(super) fn moved(&self) -> bool {
        self.spilled > 0 || self.receipts > 0 || !self.keys.is_empty() || self.removed > 0
    }

    /// Notes it in what is known of the inbox.
    pub(super) fn apply(&self, inbox: &mut Inbox) {
        inbox.open.retain(|open| open.seq > self.spilled);
        inbox.receipts = inbox.receipts.saturating_sub(self.receipts);
        inbox.keys.retain(|key| !self.keys.contains(&key.i));
        if inbox.spilled <= self.removed {
            inbox.spilled = 0;
        }
        inbox.spilled = inbox.spilled.max(self.spilled);
    }
}

/// What is to be moved out of one inbox.
struct Move {
    tidied: Tidied,
    /// Written first.
    beside: Vec<WriteModel>,
    /// Written then.
    leave: Vec<WriteModel>,
}

/// Tidies inboxes; returns what was done. What fails is done another time.
pub(super) async fn tidy(database: Database, bounds: Bounds, users: Vec<String>) -> Vec<Tidied> {
    match try_tidy(&database, bounds, &users).await {
        Ok(tidied) => tidied,
        Err(error) => {
            tracing::warn!(%error, "inboxes were not tidied; it is tried again with the next message to them");
            Vec::new()
        }
    }
}

async fn try_tidy(database: &Database, bounds: Bounds, users: &[String]) -> Result<Vec<Tidied>, StoreError> {
    let found: Vec<InboxDoc> = database
        .find_inboxes(StoreOperation::Tidy, users, doc! { "writers": 0, "attempts": 0, "log": 0 })
        .await?;
    let mut moves = Vec::new();
    for inbox in found {
        moves.push(plan(database, bounds, inbox)?);
    }
    let beside: Vec<WriteModel> = moves.iter_mut().flat_map(|m| std::mem::take(&mut m.beside)).collect();
    // What is there already was written by another node that tidies, from the same inbox.
    settled(database.write(StoreOperation::Tidy, beside).await)?;
    let leave: Vec<WriteModel> = moves.iter_mut().flat_map(|m| std::mem::take(&mut m.leave)).collect();
    settled(database.write(StoreOperation::Tidy, leave).await)?;
    Ok(moves.into_iter().map(|m| m.tidied).collect())
}

/// Fails when it is not known what became of a write.
fn settled(outcomes: Vec<Outcome>) -> Result<(), StoreError> {
    outcomes.into_iter().try_for_each(|outcome| match outcome {
        Outcome::Done | Outcome::Missed => Ok(()),
        Outcome::Unknown(error) => Err(StoreError::Unavailable(error)),
    })
}

fn plan(database: &Database, bounds: Bounds, inbox: InboxDoc) -> Result<Move, StoreError> {
    let user = inbox.user.clone();
    let tidied = Tidied { user: user.clone(), ..Tidied::default() };
    let mut m = Move { tidied, beside: Vec::new(), leave: Vec::new() };
    let (mut pull, mut update) = (Document::new(), Document::new());
    let (mark, spilled) = (inbox.mark, inbox.spilled);
    let shared: Vec<(i64, BsonUuid)> =
        inbox.messages.iter().filter_map(|message| Some((message.n, message.s?))).collect();
    if let Some(last) = spill(database, bounds, &user, inbox.messages, &mut m.beside)? {
        let shared = payloads::ids(shared.into_iter().filter(|(seq, _)| *seq <= last).map(|(_, id)| id));
        if !shared.is_empty() {
            pull.insert("shared", doc! { "$in": shared });
        }
        pull.insert("messages", doc! { "n": { "$lte": last } });
        update.insert("$max", doc! { "spilled": last });
        m.tidied.spilled = last.cast_unsigned();
    }
    if inbox.receipts.len() > bounds.receipts {
        let ids: Vec<Bson> = inbox.receipts.iter().map(|receipt| receipt.i.into()).collect();
        m.tidied.receipts = ids.len();
        m.beside.push(database.insert(receipts_document(&user, &inbox.receipts)?));
        pull.insert("receipts", doc! { "i": { "$in": ids } });
        let log: Vec<String> = inbox.receipts.iter().map(ReceiptDoc::entry).collect();
        pull.insert("log", doc! { "$in": log });
    }
    if inbox.keys.len() > bounds.keys {
        // The last use of each key: an earlier one is out of its window.
        let last: BTreeMap<Vec<u8>, &KeyDoc> =
            inbox.keys.iter().map(|key| (key.k.bytes.clone(), key)).collect();
        for key in last.values() {
            m.beside.push(key_beside(database, &user, key)?);
        }
        let ids: Vec<BsonUuid> = inbox.keys.iter().map(|key| key.i).collect();
        pull.insert("keys", doc! { "i": { "$in": &ids } });
        m.tidied.keys = ids;
    }
    if !pull.is_empty() {
        update.insert("$pull", pull);
        m.leave.push(database.update(doc! { "_id": &user }, update, false));
    } else if spilled > 0 && mark >= spilled {
        let filter = doc! { "_id": &user, "spilled": spilled };
        m.beside.push(remove_bodies(database, &user, mark));
        m.leave.push(database.update(filter, doc! { "$unset": { "spilled": "" } }, false));
        m.tidied.removed = spilled.cast_unsigned();
    }
    Ok(m)
}

/// Moves the older bodies beside when the inbox holds too many; returns the last that leaves.
fn spill(
    database: &Database,
    bounds: Bounds,
    user: &str,
    mut messages: Vec<MessageDoc>,
    beside: &mut Vec<WriteModel>,
) -> Result<Option<i64>, StoreError> {
    let bytes: usize = messages.iter().map(MessageDoc::bytes).sum();
    if messages.len() <= bounds.messages && bytes <= bounds.bytes {
        return Ok(None);
    }
    messages.sort_unstable_by_key(|message| message.n);
    // Of large ones, fewer stay.
    let (mut keep, mut kept) = (0, 0);
    for message in messages.iter().rev() {
        kept += message.bytes();
        if keep == bounds.keep || kept > bounds.bytes / 2 {
            break;
        }
        keep += 1;
    }
    messages.truncate(messages.len() - keep);
    let last = messages.last().map(|message| message.n);
    let (mut part, mut size) = (Vec::<MessageDoc>::new(), 0);
    for message in messages {
        let length = message.bytes();
        let far = part.first().is_some_and(|first| message.seq() - first.seq() >= MAX_SPAN - 1);
        if !part.is_empty() && (size + length > MAX_BODIES_BYTES || far) {
            beside.push(bodies(database, user, std::mem::take(&mut part))?);
            size = 0;
        }
        size += length;
        part.push(message);
    }
    if !part.is_empty() {
        beside.push(bodies(database, user, part)?);
    }
    Ok(last)
}

fn bodies(database: &Database, user: &str, messages: Vec<MessageDoc>) -> Result<WriteModel, StoreError> {
    let document = document(&BodiesDoc::new(user, messages)?)?;
    Ok(database.insert(document))
}

/// Removes bodies beside the inbox of which everything is settled.
fn remove_bodies(database: &Database, user: &str, mark: i64) -> WriteModel {
    let range =
        doc! { "$gte": bodies_id(user, 0, 0), "$lte": bodies_id(user, mark.cast_unsigned(), u64::MAX) };
    let filter = doc! { "_id": range, "u": user, "l": { "$lte": mark } };
    let model = DeleteManyModel::builder().namespace(database.beside.namespace()).filter(filter).build();
    WriteModel::DeleteMany(model)
}

/// Receipts beside the inbox. Moved twice they are there twice, which is better than not at all.
fn receipts_document(user: &str, receipts: &[ReceiptDoc]) -> Result<Document, StoreError> {
    let last_us = receipts.iter().map(|receipt| receipt.t.cast_unsigned()).max().unwrap_or(0);
    let first = receipts.first().map_or(Uuid::nil(), |receipt| Uuid::from_bytes(receipt.i.bytes()));
    let ids: Vec<Bson> = receipts.iter().map(|receipt| receipt.i.into()).collect();
    let log: Vec<String> = receipts.iter().map(ReceiptDoc::entry).collect();
    let receipts: Vec<Document> = receipts.iter().map(document).collect::<Result<_, _>>()?;
    let expiry = date(last_us + RECEIPT_RETENTION.as_micros() as u64);
    // The first and how many: two nodes that move the same receipts write the same document.
    let id = format!("r/{user}/{first}/{}", ids.len());
    Ok(doc! { "_id": id, "u": user, "ids": ids, "receipts": receipts, "log": log, "x": expiry })
}

/// A dedupe key beside the inbox, in the place of one that is older.
fn key_beside(database: &Database, user: &str, key: &KeyDoc) -> Result<WriteModel, StoreError> {
    let mut set = document(key)?;
    set.insert("x", date(key.t.cast_unsigned() + DEDUPE_WINDOW.as_micros() as u64));
    let filter = doc! { "_id": key_id(user, &key.k.bytes), "u": user, "t": { "$lt": key.t } };
    Ok(database.update_beside(filter, doc! { "$set": set }))
}
