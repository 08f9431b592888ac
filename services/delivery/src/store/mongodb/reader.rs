//! The read side: pages, receipts, counts. It reads what a majority has, so that nothing reaches a client that a
//! new primary would not know.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use futures::TryStreamExt;
use mongodb::{
    bson::{Document, doc},
    options::FindOptions,
};
use sanjay_proto::client::v1::InboxMessage;
use uuid::Uuid;

use super::{
    database::Database,
    documents::{BesideDoc, BodiesDoc, InboxDoc, MessageDoc, ReceiptDoc, bodies_between, id},
};
use crate::{
    message::State,
    metrics::StoreOperation,
    store::{
        InboxQuery, MAX_PAGE_BYTES, MAX_PAGE_MESSAGES, MAX_READ_BYTES, Page, RECEIPT_RETENTION, Receipt,
        Stats, StoreError, epoch::epoch,
    },
};

/// Most inboxes of one query: a document may be as large as a few hundred KiB.
const MAX_INBOXES: usize = 64;

/// Most documents of bodies that are read for one page.
const MAX_BODIES: i64 = 24;

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
    let mut projection = doc! { "receipts": 0, "keys": 0, "writers": 0 };
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
            let covers = 0;
            return Ok(Page { epoch, covers, ..Page::default() });
        };
        if let Some(page) = try_page(database, inbox, query, budget).await? {
            return Ok(page);
        }
        // A body moved or was settled between the two reads.
        inboxes.extend(find(database, std::slice::from_ref(&query.user), true).await?);
    }
    Err(StoreError::Unavailable("a message is in the inbox, and its body is not found".to_owned()))
}

/// The messages that a query is about, as (seq, delivery), ascending; one more than a page takes.
fn wanted(inbox: &InboxDoc, query: &InboxQuery) -> Result<Vec<(u64, u32)>, StoreError> {
    let attempts = inbox.attempts()?;
    if query.only.is_empty() {
        let after = query.after.unwrap_or(inbox.mark.cast_unsigned());
        let deliverable = unsettled(inbox, after).filter_map(|seq| Some((seq, attempts.delivery(seq)?)));
        return Ok(deliverable.take(query.limit.min(MAX_PAGE_MESSAGES) + 1).collect());
    }
    let (settled, head) = (inbox.settled(), inbox.head());
    let seqs = query.only_seqs().into_iter().filter(|seq| *seq <= head && !settled.holds(*seq));
    Ok(seqs.filter_map(|seq| Some((seq, attempts.newest(seq)?))).take(MAX_PAGE_MESSAGES + 1).collect())
}

/// The page; `None` when a body is not where the inbox says.
async fn try_page(
    database: &Database,
    inbox: &InboxDoc,
    query: &InboxQuery,
    budget: &mut usize,
) -> Result<Option<Page>, StoreError> {
    let (mark, head) = (inbox.mark.cast_unsigned(), inbox.head());
    let after = query.after.unwrap_or(mark);
    let mut page =
        Page { epoch: inbox.epoch.cast_unsigned(), mark, head, covers: head, messages: Vec::new() };
    let some = !query.only.is_empty();
    let limit = if some { MAX_PAGE_MESSAGES } else { query.limit.min(MAX_PAGE_MESSAGES) };
    // One more than the page takes tells whether it is the last.
    let wanted = wanted(inbox, query)?;
    let inside: BTreeMap<u64, &MessageDoc> =
        inbox.messages.iter().map(|message| (message.seq(), message)).collect();
    let expected = wanted[..wanted.len().min(limit)].iter().map(|(seq, _)| *seq);
    let missing: Vec<u64> = expected.filter(|seq| !inside.contains_key(seq)).collect();
    let (beside, complete) = match (missing.first(), missing.last()) {
        (Some(first), Some(last)) => beside(database, &query.user, *first, *last).await?,
        _ => (BTreeMap::new(), true),
    };
    let (mut bytes, mut budget_left) = (0, *budget);
    for (seq, delivery) in &wanted {
        let found = inside.get(seq).copied().or_else(|| beside.get(seq));
        let message = match found {
            _ if page.messages.len() >= limit => None,
            Some(found) => Some(InboxMessage { delivery: *delivery, ..found.message()? }),
            // Beyond what was read at once; the next page begins there.
            None if !complete && !page.messages.is_empty() => None,
            None => return Ok(None),
        };
        let size = message.as_ref().map_or(0, prost::Message::encoded_len);
        let fits = (bytes == 0 || bytes + size <= MAX_PAGE_BYTES) && size <= budget_left;
        let Some(message) = message.filter(|_| fits) else {
            page.covers = page.messages.last().map_or(after, |last: &InboxMessage| last.seq);
            break;
        };
        (bytes, budget_left) = (bytes + size, budget_left - size);
        page.messages.push(message);
    }
    *budget = budget_left;
    Ok(Some(page))
}

/// The unsettled seqs above `after`, ascending.
pub(super) fn unsettled(inbox: &InboxDoc, after: u64) -> impl Iterator<Item = u64> + use<> {
    let (settled, head) = (inbox.settled(), inbox.head());
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
        let projection = doc! { "messages.p": 0, "keys": 0, "writers": 0 };
        let mut found: Vec<InboxDoc> =
            database.find_inboxes(StoreOperation::Read, &users, projection).await?;
        let Some(inbox) = found.pop() else { return Ok(None) };
        if let Some(receipt) = look_inside(&inbox, message_id)? {
            return Ok(current(database, receipt));
        }
        let filter = doc! { "ids": id(message_id), "u": user };
        let found: Vec<BesideDoc> =
            database.find_beside(StoreOperation::Read, filter, FindOptions::default()).await?;
        if let Some(receipt) = look_beside(&inbox, &found, message_id)? {
            return Ok(current(database, receipt));
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
    let open = |message: &&MessageDoc| {
        unsettled(inbox, message.seq().saturating_sub(1)).next() == Some(message.seq())
    };
    message.filter(open).map(accepted).transpose()
}

/// Counts what the inboxes hold: reads all of them.
pub(super) async fn stats(database: &Database) -> Result<Stats, StoreError> {
    let counters =
        ["$acked", "$expired", "$superseded", "$dead"].map(|name| doc! { "$ifNull": [name, 0_i64] });
    let terminal = doc! { "$add": counters.to_vec() };
    let armed = doc! { "$cond": [{ "$gt": ["$due", 0_i64] }, 1_i64, 0_i64] };
    let pipeline = [doc! { "$group": {
        "_id": null,
        "inboxes": { "$sum": 1_i64 },
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
    let dead = database.dead.clone();
    let counting = async move { dead.estimated_document_count().max_time(COUNT).await };
    let dead_letters = database.call_within(COUNT, StoreOperation::Stats, counting).await?;
    Ok(Stats {
        inboxes: number("inboxes"),
        unsettled: number("unsettled"),
        armed: number("armed"),
        dead_letters,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsettled_seqs_skip_what_is_settled() {
        let inbox = InboxDoc { seq: 12, mark: 2, settled: vec![4, 5, 8, 8, 12, 12], ..InboxDoc::default() };
        let seqs = |after| unsettled(&inbox, after).collect::<Vec<u64>>();
        assert_eq!(seqs(0), [3, 6, 7, 9, 10, 11]);
        assert_eq!(seqs(4), [6, 7, 9, 10, 11]);
        assert_eq!(seqs(8), [9, 10, 11]);
        assert!(seqs(11).is_empty());
        assert!(seqs(u64::MAX).is_empty());
    }
}
