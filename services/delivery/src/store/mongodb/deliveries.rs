//! The deliveries of one user: what waits for its time, what is unsettled, and the receipts. The order of their ids is not
//! that in which they lie in the database, so all of a user's are looked at, and the newest kept.

use std::collections::BTreeMap;

use futures::TryStreamExt;
use mongodb::{
    Collection,
    bson::{Binary, Document, Uuid as BsonUuid, doc},
};
use prost::Message as _;
use serde::{Deserialize, de::DeserializeOwned};
use uuid::Uuid;

use super::{
    database::Database,
    documents::{BesideDoc, Header, InboxDoc, MessageDoc, ReceiptDoc},
};
use crate::{
    message::State,
    metrics::StoreOperation,
    store::{
        DeliveriesPage, DeliveriesQuery, ListedDelivery, MAX_DELIVERIES, RECEIPT_RETENTION, Receipt, Settled,
        StoreError,
    },
};

/// How often it is looked again when messages were settled or moved meanwhile.
const TRIES: usize = 4;

/// Documents of one answer of the server.
const BATCH: u32 = 32;

/// The newest of what was found so far.
struct Newest<'a> {
    query: &'a DeliveriesQuery,
    /// Receipts of before are past their time.
    cutoff_us: u64,
    /// One more than the page takes, which tells whether more follows.
    most: usize,
    found: BTreeMap<Uuid, ListedDelivery>,
    /// Those that wait for their time, as far as they are in no inbox: at most as many as a user may have.
    scheduled: BTreeMap<Uuid, ListedDelivery>,
}

impl Newest<'_> {
    /// Takes a delivery that passes the filter, as far as it is among the newest.
    fn put(&mut self, delivery: ListedDelivery) {
        let id = delivery.message_id;
        let below = self.query.before.is_none_or(|before| id < before);
        if below && self.query.matches(delivery.receipt.state, &delivery.caller) {
            self.found.insert(id, delivery);
            if self.found.len() > self.most {
                self.found.pop_first();
            }
        }
    }

    fn put_receipt(&mut self, receipt: &ReceiptDoc) -> Result<(), StoreError> {
        let (message_id, found) = (Uuid::from_bytes(receipt.i.bytes()), receipt.receipt()?);
        self.scheduled.remove(&message_id);
        if found.settled_us >= self.cutoff_us {
            let (caller, reason) = (receipt.c.clone(), receipt.reason());
            self.put(ListedDelivery { message_id, receipt: found, caller, deliver_us: 0, reason });
        }
        Ok(())
    }

    fn put_message(&mut self, message: &MessageDoc, settled: &Settled, head: u64) -> Result<(), StoreError> {
        let (seq, header) = (message.seq(), message.header()?);
        self.scheduled.remove(&Uuid::from_bytes(message.i.bytes()));
        // A body that stays until the mark has passed it says nothing.
        if seq <= head && !settled.holds(seq) {
            let receipt = Receipt { seq, state: State::Accepted, accepted_us: header.time_us, settled_us: 0 };
            self.put(unsettled(message.i, receipt, header.caller, 0));
        }
        Ok(())
    }

    fn put_scheduled(&mut self, waiting: ScheduledDoc) -> Result<(), StoreError> {
        let header = Header::decode(&waiting.m.bytes[..]).map_err(|error| {
            StoreError::Unavailable(format!("a scheduled message in the database is damaged: {error}"))
        })?;
        let receipt = Receipt { seq: 0, state: State::Scheduled, accepted_us: header.time_us, settled_us: 0 };
        let delivery = unsettled(waiting.i, receipt, header.caller, waiting.at.cast_unsigned());
        self.scheduled.insert(delivery.message_id, delivery);
        Ok(())
    }

    fn page(mut self) -> DeliveriesPage {
        for delivery in std::mem::take(&mut self.scheduled).into_values() {
            self.put(delivery);
        }
        let more = self.found.len() == self.most;
        let deliveries: Vec<_> = self.found.into_values().rev().take(self.most - 1).collect();
        let next = deliveries.last().filter(|_| more).map(|last| last.message_id);
        DeliveriesPage { deliveries, next }
    }
}

fn unsettled(id: BsonUuid, receipt: Receipt, caller: String, deliver_us: u64) -> ListedDelivery {
    ListedDelivery { message_id: Uuid::from_bytes(id.bytes()), receipt, caller, deliver_us, reason: None }
}

/// A message that waits for its time, without its payload.
#[derive(Debug, Deserialize)]
struct ScheduledDoc {
    i: BsonUuid,
    at: i64,
    m: Binary,
}

/// Lists messages of one user, the newest ids first.
pub(super) async fn list(database: &Database, query: &DeliveriesQuery) -> Result<DeliveriesPage, StoreError> {
    let mut before = None;
    let mut tries = 1;
    loop {
        let (page, now) = look(database, query).await?;
        // Something may have been settled, or moved, between the looks at the parts.
        if before == Some(now) || tries == TRIES {
            return Ok(page);
        }
        let after = state(&inbox(database, &query.user, true).await?);
        if after == now {
            return Ok(page);
        }
        (before, tries) = (Some(after), tries + 1);
    }
}

/// What changes when a message is settled or moved.
type Seen = (i64, i64, usize, i64);

fn state(inbox: &InboxDoc) -> Seen {
    (inbox.settles, inbox.spilled, inbox.receipts.len(), inbox.seq)
}

async fn inbox(database: &Database, user: &str, brief: bool) -> Result<InboxDoc, StoreError> {
    let mut projection = doc! { "messages.p": 0, "keys": 0, "writers": 0, "log": 0 };
    if brief {
        projection.extend(doc! { "messages": 0, "receipts.t": 0, "receipts.a": 0, "receipts.s": 0 });
        projection.remove("messages.p");
    }
    let users = [user.to_owned()];
    let mut found: Vec<InboxDoc> = database.find_inboxes(StoreOperation::Read, &users, projection).await?;
    Ok(found.pop().unwrap_or_default())
}

/// The page as it is found, and how the inbox was then.
async fn look(database: &Database, query: &DeliveriesQuery) -> Result<(DeliveriesPage, Seen), StoreError> {
    let (user, now_us) = (query.user.as_str(), database.clock.now_us());
    let mut newest = Newest {
        query,
        cutoff_us: now_us.saturating_sub(RECEIPT_RETENTION.as_micros() as u64),
        most: query.limit.clamp(1, MAX_DELIVERIES) + 1,
        found: BTreeMap::new(),
        scheduled: BTreeMap::new(),
    };
    // In the order in which a message moves.
    let waiting = doc! { "i": 1, "at": 1, "m": 1 };
    let mut pages = Pages::new(database, &database.scheduled, doc! { "u": user }, waiting);
    while let Some(some) = pages.next::<ScheduledDoc>().await? {
        some.into_iter().try_for_each(|waiting| newest.put_scheduled(waiting))?;
    }
    let inbox = inbox(database, user, false).await?;
    let (settled, head) = (inbox.settled(), inbox.head());
    for message in &inbox.messages {
        newest.put_message(message, &settled, head)?;
    }
    inbox.receipts.iter().try_for_each(|receipt| newest.put_receipt(receipt))?;
    for kind in ["b", "r"] {
        let fields = doc! { "messages.n": 1, "messages.i": 1, "messages.h": 1, "receipts": 1 };
        let mut pages = Pages::new(database, &database.beside, of(kind, user), fields);
        while let Some(some) = pages.next::<BesideDoc>().await? {
            for BesideDoc { messages, receipts } in some {
                messages.iter().try_for_each(|message| newest.put_message(message, &settled, head))?;
                receipts.iter().try_for_each(|receipt| newest.put_receipt(receipt))?;
            }
        }
    }
    let seen = state(&inbox);
    Ok((newest.page(), seen))
}

/// Selects the documents of a kind beside a user's inbox.
pub(super) fn of(kind: &str, user: &str) -> Document {
    // The character that follows the slash.
    doc! { "_id": { "$gte": format!("{kind}/{user}/"), "$lt": format!("{kind}/{user}0") }, "u": user }
}

/// Documents of a collection in the order of their `_id`s, a few at a time.
struct Pages<'a> {
    database: &'a Database,
    collection: &'a Collection<Document>,
    filter: Document,
    fields: Document,
    /// The last `_id` that was read; `None` before the first page.
    last: Option<String>,
    ended: bool,
}

impl<'a> Pages<'a> {
    fn new(
        database: &'a Database,
        collection: &'a Collection<Document>,
        filter: Document,
        fields: Document,
    ) -> Self {
        Self { database, collection, filter, fields, last: None, ended: false }
    }

    /// The next few; `None` after the last.
    async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<Vec<T>>, StoreError> {
        if self.ended {
            return Ok(None);
        }
        let mut filter = self.filter.clone();
        if let Some(last) = &self.last {
            match filter.get_document_mut("_id") {
                Ok(range) => drop((range.remove("$gte"), range.insert("$gt", last))),
                Err(_) => drop(filter.insert("_id", doc! { "$gt": last })),
            }
        }
        let (collection, fields) = (self.collection.clone(), self.fields.clone());
        let find = async move {
            let find = collection.find(filter).projection(fields).sort(doc! { "_id": 1 });
            find.limit(i64::from(BATCH)).batch_size(BATCH).await?.try_collect::<Vec<Document>>().await
        };
        let found = self.database.call(StoreOperation::Read, find).await?;
        self.ended = found.len() < BATCH as usize;
        self.last = found.last().and_then(|last| last.get_str("_id").ok()).map(str::to_owned);
        let damaged =
            |error| StoreError::Unavailable(format!("a document in the database is damaged: {error}"));
        let read = |found| mongodb::bson::deserialize_from_document(found).map_err(damaged);
        found.into_iter().map(read).collect::<Result<Vec<T>, _>>().map(Some)
    }
}
