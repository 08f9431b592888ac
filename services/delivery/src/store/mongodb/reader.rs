//! The read side: pages, receipts, counts. It reads what a majority has, so that nothing reaches a client that a
//! new primary would not know.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use futures::TryStreamExt;
use mongodb::{
    Collection,
    bson::{Document, doc},
    options::FindOptions,
};
use sanjay_proto::client::v1::InboxMessage;
use uuid::Uuid;

use super::{
    database::Database,
    documents::{BesideDoc, BodiesDoc, InboxDoc, MessageDoc, ReceiptDoc, bodies_between, has_expired, id},
    payloads::{self, Shared},
    scheduled,
};
use crate::{
    message::State,
    metrics::StoreOperation,
    store::{
        Devices, InboxQuery, Known, MAX_PAGE_BYTES, MAX_PAGE_MESSAGES, MAX_READ_BYTES, Page,
        RECEIPT_RETENTION, Receipt, Settled, Stats, StoreError, epoch::epoch,
    },
};

/// Most inboxes of one query: a document may be as large as a few hundred KiB.
const MAX_INBOXES: usize = 64;

/// Most documents of bodies that are read for one page.
const MAX_BODIES: i64 = 24;

/// How often what follows is looked at for one page when messages have expired and are not settled yet.
const MAX_LOOKS: usize = 8;

/// How often a page or a receipt is read again when what it consists of moves meanwhile.
const TRIES: usize = 4;

/// How long counting may take.
const COUNT: Duration = Duration::from_secs(60);

/// Reads parts of inboxes, within [`MAX_READ_BYTES`] together.
pub(super) async fn read(database: &Database, queries: &[InboxQuery]) -> Vec<Result<Page, StoreError>> {
    let mut pages = Vec::with_capacity(queries.len());
    let mut budget = MAX_READ_BYTES;
    for chunk in queries.chunks(MAX_INBOXES) {
        let users: Vec<String> = chunk.iter().map(|query| query.user.clone()).collect();
        let bodies = chunk.iter().any(|query| query.limit > 0 || !query.only.is_empty());
        let mut inboxes = match find(database, &users, bodies).await {
            Ok(inboxes) => inboxes,
            Err(error) => {
                pages.extend(chunk.iter().map(|_| Err(error.clone())));
                continue;
            }
        };
        for query in chunk {
            pages.push(page(database, &mut inboxes, query, &mut budget).await);
        }
    }
    pages
}

async fn find(
    database: &Database,
    users: &[String],
    bodies: bool,
) -> Result<HashMap<String, InboxDoc>, StoreError> {
    let mut projection = doc! { "receipts": 0, "log": 0, "keys": 0, "writers": 0 };
    if !bodies {
        projection.insert("messages", 0);
    }
    let found: Vec<InboxDoc> = database.find_inboxes(StoreOperation::Read, users, projection).await?;
    Ok(found.into_iter().map(|inbox| (inbox.user.clone(), inbox)).collect())
}

async fn page(
    database: &Database,
    inboxes: &mut HashMap<String, InboxDoc>,
    query: &InboxQuery,
    budget: &mut usize,
) -> Result<Page, StoreError> {
    for _ in 0..TRIES {
        let Some(inbox) = inboxes.get(&query.user) else {
            let epoch = epoch(database.store_id, &query.user);
            let device = query.device.as_ref().map_or(Known::Lately, |_| Known::Unknown);
            return Ok(Page { epoch, device, ..Page::default() });
        };
        if let Some(page) = try_page(database, inbox, query, budget).await? {
            return Ok(page);
        }
        // A body moved or was settled between the two reads.
        inboxes.extend(find(database, std::slice::from_ref(&query.user), true).await?);
    }
    Err(StoreError::Unavailable("a message is in the inbox, and its body is not found".to_owned()))
}

/// The messages that a query is about, as (seq, delivery), ascending, also when they have expired.
fn wanted(
    inbox: &InboxDoc,
    devices: &Devices,
    query: &InboxQuery,
    after: u64,
) -> Result<Box<dyn Iterator<Item = (u64, u32)> + Send>, StoreError> {
    let (attempts, settled, head) = (inbox.attempts()?, inbox.settled(), inbox.head());
    let (devices, device) = (devices.clone(), query.device.clone());
    let lacks = move |seq: &u64| device.as_ref().is_none_or(|device| !devices.has_acked(device, *seq));
    if query.only.is_empty() {
        let unsettled = unsettled(settled, head, after).filter(lacks);
        return Ok(Box::new(unsettled.filter_map(move |seq| Some((seq, attempts.delivery(seq)?)))));
    }
    let seqs = query.only_seqs().into_iter().filter(lacks);
    let seqs = seqs.filter(move |seq| *seq <= head && !settled.holds(*seq));
    Ok(Box::new(seqs.filter_map(move |seq| Some((seq, attempts.newest(seq)?)))))
}

/// A page that is being filled.
struct Filling {
    messages: Vec<InboxMessage>,
    bytes: usize,
    /// Most messages, and most bytes beside [`MAX_PAGE_BYTES`].
    limit: usize,
    left: usize,
    now_us: u64,
    /// The last seq that it holds or passes by.
    passed: u64,
}

impl Filling {
    /// Takes the next message, or passes it by when it has expired; `false` when the page ends before it. `None` when its
    /// shared payload is gone, and so it is settled.
    fn put(
        &mut self,
        found: &MessageDoc,
        delivery: u32,
        shared: &Shared,
    ) -> Result<Option<bool>, StoreError> {
        let header = found.header()?;
        if has_expired(header.expires_us, self.now_us) {
            self.passed = found.seq();
            return Ok(Some(true));
        }
        if self.messages.len() >= self.limit {
            return Ok(Some(false));
        }
        let payload = match found.s.map(|id| shared.get(id)) {
            None => None,
            Some(Ok(payload)) => Some(&**payload),
            Some(Err(gone)) => return Ok(if gone { None } else { Some(false) }),
        };
        let message = InboxMessage { delivery, ..found.message(header, payload)? };
        let size = prost::Message::encoded_len(&message);
        if (self.bytes > 0 && self.bytes + size > MAX_PAGE_BYTES) || size > self.left {
            return Ok(Some(false));
        }
        (self.bytes, self.left, self.passed) = (self.bytes + size, self.left - size, message.seq);
        self.messages.push(message);
        Ok(Some(true))
    }
}

/// The page; `None` when a body is not where the inbox says.
async fn try_page(
    database: &Database,
    inbox: &InboxDoc,
    query: &InboxQuery,
    budget: &mut usize,
) -> Result<Option<Page>, StoreError> {
    let (devices, head, epoch) = (inbox.devices()?, inbox.head(), inbox.epoch.cast_unsigned());
    let now_us = database.clock.now_us();
    let (mut mark, mut known) = (inbox.mark.cast_unsigned(), Known::Lately);
    if let Some(device) = &query.device {
        (mark, known) = (devices.mark(device, &inbox.settled()), devices.known(device, now_us));
    }
    let after = query.after.unwrap_or(mark);
    if known == Known::Unknown {
        return Ok(Some(Page { epoch, mark, head, covers: after, device: known, ..Page::default() }));
    }
    let limit = if query.only.is_empty() { query.limit } else { MAX_PAGE_MESSAGES }.min(MAX_PAGE_MESSAGES);
    let messages = Vec::new();
    let mut page = Filling { messages, bytes: 0, limit, left: *budget, now_us, passed: after };
    let inside: BTreeMap<u64, &MessageDoc> =
        inbox.messages.iter().map(|message| (message.seq(), message)).collect();
    let mut wanted = wanted(inbox, &devices, query, after)?;
    let mut ended = false;
    for look in 1.. {
        // One more than the page takes tells whether it is the last.
        let count = limit - page.messages.len() + 1;
        let some: Vec<(u64, u32)> = wanted.by_ref().take(count).collect();
        let last = some.len() < count;
        if limit == 0 {
            ended = !last;
            break;
        }
        let mut missing = some.iter().map(|(seq, _)| *seq).filter(|seq| !inside.contains_key(seq));
        let (beside, complete) = match (missing.next(), missing.next_back()) {
            (Some(first), last) => beside(database, &query.user, first, last.unwrap_or(first)).await?,
            _ => (BTreeMap::new(), true),
        };
        let body = |seq: &u64| inside.get(seq).copied().or_else(|| beside.get(seq));
        let shared =
            payloads::of_page(database, some.iter().filter_map(|(seq, _)| body(seq)), now_us).await?;
        for (seq, delivery) in some {
            ended = match body(&seq) {
                Some(found) => match page.put(found, delivery, &shared)? {
                    Some(taken) => !taken,
                    None => return Ok(None),
                },
                // Beyond what was read at once; the next page begins there.
                None if !complete && page.passed > after => true,
                None if page.messages.len() == limit => true,
                None => return Ok(None),
            };
            if ended {
                break;
            }
        }
        ended |= look == MAX_LOOKS && !last;
        if ended || last {
            break;
        }
    }
    *budget = page.left;
    let covers = if ended { page.messages.last().map_or(page.passed, |last| last.seq) } else { head };
    let mut acked_by = Vec::new();
    if query.device.is_none() && !query.only.is_empty() && !devices.is_empty() {
        let seqs = page.messages.iter().map(|message| message.seq);
        acked_by = seqs.map(|seq| (seq, devices.acked_by(seq))).collect();
    }
    Ok(Some(Page { epoch, mark, head, covers, messages: page.messages, device: known, acked_by }))
}

/// The unsettled seqs up to `head` above `after`, ascending.
pub(super) fn unsettled(settled: Settled, head: u64, after: u64) -> impl Iterator<Item = u64> + use<> {
    let mut next = after.max(settled.mark()).saturating_add(1);
    let mut ranges = settled.ranges().to_vec().into_iter().peekable();
    std::iter::from_fn(move || {
        while let Some((from, to)) = ranges.next_if(|(from, _)| *from <= next) {
            if next >= from && next <= to {
                next = to + 1;
            }
        }
        (next <= head).then(|| {
            next += 1;
            next - 1
        })
    })
}

/// Bodies beside the inbox by seq, and whether that is all of them.
pub(super) async fn beside(
    database: &Database,
    user: &str,
    from: u64,
    to: u64,
) -> Result<(BTreeMap<u64, MessageDoc>, bool), StoreError> {
    let options = FindOptions::builder()
        .sort(doc! { "_id": 1 })
        .limit(MAX_BODIES)
        .batch_size(MAX_BODIES as u32)
        .build();
    let found: Vec<BodiesDoc> =
        database.find_beside(StoreOperation::Read, bodies_between(user, from, to), options).await?;
    let complete = (found.len() as i64) < MAX_BODIES;
    let messages = found.into_iter().flat_map(|bodies| bodies.messages);
    Ok((messages.map(|message| (message.seq(), message)).collect(), complete))
}

/// Reads the record of a message.
pub(super) async fn lookup(
    database: &Database,
    user: &str,
    message_id: Uuid,
) -> Result<Option<Receipt>, StoreError> {
    let users = [user.to_owned()];
    let mut before = None;
    for _ in 0..TRIES {
        let projection = doc! { "messages.p": 0, "log": 0, "keys": 0, "writers": 0 };
        let mut found: Vec<InboxDoc> =
            database.find_inboxes(StoreOperation::Read, &users, projection).await?;
        let inbox = found.pop().unwrap_or_default();
        if let Some(receipt) = look_inside(&inbox, message_id)? {
            return Ok(current(database, receipt));
        }
        let filter = doc! { "ids": id(message_id), "u": user };
        let found: Vec<BesideDoc> =
            database.find_beside(StoreOperation::Read, filter, FindOptions::default()).await?;
        if let Some(receipt) = look_beside(&inbox, &found, message_id)? {
            return Ok(current(database, receipt));
        }
        if let Some(receipt) = scheduled::receipt(database, user, message_id).await? {
            return Ok(Some(receipt));
        }
        // It may have been settled or moved between the two reads; only then is a third of use.
        let now = (inbox.settles, inbox.spilled, inbox.receipts.len(), inbox.seq);
        if before.replace(now) == Some(now) {
            return Ok(None);
        }
    }
    Ok(None)
}

/// A receipt, unless it is past its time and only waits to be removed.
fn current(database: &Database, receipt: Receipt) -> Option<Receipt> {
    let until = receipt.settled_us.saturating_add(RECEIPT_RETENTION.as_micros() as u64);
    (!receipt.state.is_terminal() || until >= database.clock.now_us()).then_some(receipt)
}

fn accepted(message: &MessageDoc) -> Result<Receipt, StoreError> {
    let accepted_us = message.header()?.time_us;
    Ok(Receipt { seq: message.seq(), state: State::Accepted, accepted_us, settled_us: 0 })
}

fn look_inside(inbox: &InboxDoc, message_id: Uuid) -> Result<Option<Receipt>, StoreError> {
    let wanted = id(message_id);
    if let Some(message) = inbox.messages.iter().find(|message| message.i == wanted) {
        return accepted(message).map(Some);
    }
    inbox.receipts.iter().find(|receipt| receipt.i == wanted).map(ReceiptDoc::receipt).transpose()
}

fn look_beside(
    inbox: &InboxDoc,
    found: &[BesideDoc],
    message_id: Uuid,
) -> Result<Option<Receipt>, StoreError> {
    let wanted = id(message_id);
    let mut receipts = found.iter().flat_map(|beside| &beside.receipts);
    if let Some(receipt) = receipts.find(|receipt| receipt.i == wanted) {
        return receipt.receipt().map(Some);
    }
    let mut messages = found.iter().flat_map(|beside| &beside.messages);
    let message = messages.find(|message| message.i == wanted);
    // A body that stays until the mark has passed it says nothing.
    let open = |message: &&MessageDoc| message.seq() <= inbox.head() && !inbox.settled().holds(message.seq());
    message.filter(open).map(accepted).transpose()
}

/// Counts what the inboxes hold: reads all of them.
pub(super) async fn stats(database: &Database) -> Result<Stats, StoreError> {
    let counters =
        ["$acked", "$expired", "$superseded", "$dead"].map(|name| doc! { "$ifNull": [name, 0_i64] });
    let terminal = doc! { "$add": counters.to_vec() };
    let armed = doc! { "$cond": [{ "$gt": ["$due", 0_i64] }, 1_i64, 0_i64] };
    let begun = doc! { "$cond": [{ "$gt": ["$seq", 0_i64] }, 1_i64, 0_i64] };
    let pipeline = [doc! { "$group": {
        "_id": null,
        "inboxes": { "$sum": begun },
        "unsettled": { "$sum": { "$subtract": ["$seq", terminal] } },
        "armed": { "$sum": armed },
    } }];
    let inbox = database.inbox.clone();
    let counting = async move { inbox.aggregate(pipeline).max_time(COUNT).await?.try_collect().await };
    let found: Vec<Document> = database.call_within(COUNT, StoreOperation::Stats, counting).await?;
    let number = |field: &str| {
        let found = found.first().and_then(|found| found.get(field));
        let number = found.and_then(|value| value.as_i64().or_else(|| value.as_i32().map(i64::from)));
        number.unwrap_or_default().max(0).cast_unsigned()
    };
    let documents = async |collection: &Collection<Document>| {
        let collection = collection.clone();
        let counting = async move { collection.estimated_document_count().max_time(COUNT).await };
        database.call_within(COUNT, StoreOperation::Stats, counting).await
    };
    let (dead_letters, scheduled) = (documents(&database.dead).await?, documents(&database.scheduled).await?);
    Ok(Stats {
        inboxes: number("inboxes"),
        unsettled: number("unsettled"),
        armed: number("armed"),
        dead_letters,
        scheduled,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsettled_seqs_skip_what_is_settled() {
        let settled = Settled::new(2, vec![(4, 5), (8, 8), (12, 12)]);
        let seqs = |after| unsettled(settled.clone(), 12, after).collect::<Vec<u64>>();
        assert_eq!(seqs(0), [3, 6, 7, 9, 10, 11]);
        assert_eq!(seqs(4), [6, 7, 9, 10, 11]);
        assert_eq!(seqs(8), [9, 10, 11]);
        assert!(seqs(11).is_empty());
        assert!(seqs(u64::MAX).is_empty());
    }
}
