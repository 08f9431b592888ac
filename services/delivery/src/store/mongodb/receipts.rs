//! The log of receipts: they lie in the inboxes, and beside them, and are read in the order of the times at which their
//! messages were settled.
//!
//! A reader must not pass a time before everything is there that was settled by then. Therefore each write that settles
//! something asks, on the server and by its clock, whether it comes before its time is up ([`LIFETIME_US`]); what comes
//! later does nothing, and is made anew with another time. So a reader that keeps a little more than that behind the
//! server's clock ([`SLACK_US`]) passes nothing by. Each entry of `log`, in an inbox or beside it, stands for a receipt in
//! the same document, and is how the index finds it.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use mongodb::{
    bson::{Document, doc},
    options::{FindOptions, ReturnDocument},
};
use sanjay_runtime::clock::SharedClock;
use serde::Deserialize;
use tokio::{
    sync::{Mutex, Semaphore},
    time::Instant,
};
use uuid::Uuid;

use super::{
    database::Database,
    documents::{ReceiptDoc, date},
    plan::Rules,
};
use crate::{
    metrics::StoreOperation,
    store::{
        LogError, LogPage, LogPosition, LogStart, LoggedReceipt, MAX_LOG_PAGE, RECEIPT_RETENTION, StoreError,
    },
};

/// How long a write may settle something after the time that its receipts have, in microseconds: many times what it
/// takes, and short enough for a reader.
pub(super) const LIFETIME_US: u64 = 3_000_000;

/// By how much a reader keeps further behind: for a write that has looked at the clock and not written yet, and for
/// members of a replica set whose clocks differ.
pub(super) const SLACK_US: u64 = 2_000_000;

/// How far a reader keeps behind on a server that does not look at its clock: by then a write was given up.
const UNBOUNDED_LAG_US: u64 = 15_000_000;

/// So much of what is kept is left out by a reader that begins with the oldest, so that it is not overtaken at once.
const HEAD_START_US: u64 = 60_000_000;

/// A place may be ahead of the clock by so much before it is taken for one of another store.
const AHEAD_US: u64 = 24 * 3_600_000_000;

/// Most documents that are read at once; each has some dozen receipts.
const MAX_DOCUMENTS: usize = 256;

/// The span of time that is read at once: it grows while little is found, and shrinks while too much is.
const FIRST_WIDTH_US: u64 = 1_000_000;
const MAX_WIDTH_US: u64 = 24 * 3_600_000_000;

/// Most pages that are read at once.
const MAX_READING: usize = 4;

/// After how long a page ends although it is not full.
const PAGE_TIME: Duration = Duration::from_millis(1_500);

/// How often it is looked for something new while somebody waits.
const POLL: Duration = Duration::from_secs(1);

/// What the readers of a node share.
pub(super) struct Log {
    /// The time, where it is not the server's.
    clock: Option<SharedClock>,
    lag_us: u64,
    width_us: AtomicU64,
    /// Room for pages that are read at once; apart from other reads, which are short.
    reading: Semaphore,
    poll: Mutex<Poll>,
}

/// What was found by those who wait.
#[derive(Default)]
struct Poll {
    asked: Option<Instant>,
    /// Receipts of `from..=upto` were looked for.
    from: u64,
    upto: u64,
    /// `upto` when some were found last; 0 when that never was.
    found: u64,
}

/// A place in the order.
type Place = (u64, Uuid, String);

impl Log {
    pub(super) fn new(database: &Database, clock: Option<SharedClock>, lag_us: Option<u64>) -> Self {
        let usual = if database.tells_now { LIFETIME_US + SLACK_US } else { UNBOUNDED_LAG_US };
        Self {
            clock,
            lag_us: lag_us.unwrap_or(usual),
            width_us: AtomicU64::new(FIRST_WIDTH_US),
            reading: Semaphore::new(MAX_READING),
            poll: Mutex::default(),
        }
    }

    /// The server's time, by a write that a majority has: whatever was done before it is seen after it.
    async fn now_us(&self, database: &Database) -> Result<u64, StoreError> {
        let (nodes, me) = (database.nodes.clone(), database.node.to_string());
        // By itself it does not count this node among those that share the work, and goes away.
        let update = doc! { "$currentDate": { "asked": true }, "$setOnInsert": { "seen": date(0) } };
        let asking = async move {
            let asked = nodes.find_one_and_update(doc! { "_id": me }, update);
            asked.upsert(true).return_document(ReturnDocument::After).await
        };
        let asked = database.call(StoreOperation::Read, asking).await?;
        if let Some(clock) = &self.clock {
            return Ok(clock.now_us());
        }
        let asked = asked.as_ref().and_then(|asked| asked.get_datetime("asked").ok());
        let ms = asked.and_then(|asked| u64::try_from(asked.timestamp_millis()).ok());
        ms.map(|ms| ms * 1_000)
            .ok_or_else(|| StoreError::Unavailable("the database did not tell its time".to_owned()))
    }
}

/// What stands for a receipt in `log`: text that sorts by its time and its message.
pub(super) fn entry(settled_us: u64, message_id: Uuid) -> String {
    format!("{settled_us:016x}{}", message_id.simple())
}

/// Makes a write that adds receipts do nothing once their time is too old; returns when that is.
pub(super) fn in_time(rules: &Rules<'_>, filter: &mut Document) -> Option<u64> {
    if !rules.database.tells_now {
        return None;
    }
    let until_us = rules.now_us.saturating_add(LIFETIME_US);
    // SecantusDB looks through all documents for an expression that stands by itself, whatever else is asked.
    filter.insert("$and", [doc! { "$expr": { "$lt": ["$$NOW", date(until_us)] } }]);
    Some(until_us)
}

/// Selects the documents that hold receipts of these times and messages.
pub(super) fn between(from: (u64, Uuid), to: (u64, Uuid)) -> Document {
    doc! { "log": { "$elemMatch": { "$gte": entry(from.0, from.1), "$lte": entry(to.0, to.1) } } }
}

/// An inbox, or receipts beside one.
#[derive(Debug, Deserialize)]
struct FoundDoc {
    #[serde(rename = "_id")]
    id: String,
    /// Of those beside.
    u: Option<String>,
    #[serde(default)]
    receipts: Vec<ReceiptDoc>,
}

/// Receipts of these times and messages, unordered, with others; `None` when they are in more documents than are read at
/// once. Receipts move from the inboxes to beside them, so that is where is looked last.
async fn find(
    database: &Database,
    from: (u64, Uuid),
    to: (u64, Uuid),
    most: Option<usize>,
) -> Result<Option<Vec<FoundDoc>>, StoreError> {
    let limit = most.map(|most| i64::try_from(most + 1).unwrap_or(i64::MAX));
    let options = |fields| FindOptions::builder().projection(fields).limit(limit).build();
    let too_many = |found: &Vec<FoundDoc>| most.is_some_and(|most| found.len() > most);
    let mut found = database.find_logged(between(from, to), options(doc! { "receipts": 1 })).await?;
    if too_many(&found) {
        return Ok(None);
    }
    let fields = doc! { "u": 1, "receipts": 1 };
    let beside: Vec<FoundDoc> =
        database.find_beside(StoreOperation::Read, between(from, to), options(fields)).await?;
    if too_many(&beside) {
        return Ok(None);
    }
    found.extend(beside);
    Ok(Some(found))
}

/// A page that is being filled.
struct Filling {
    /// Everything below it was read, and what stands exactly there.
    at: Place,
    receipts: Vec<LoggedReceipt>,
    limit: usize,
    /// How much is read at once: of time, and while that is a single microsecond of messages' ids.
    width_us: u64,
    ids: u128,
}

impl Filling {
    /// Where the next look ends.
    fn end(&self, safe_us: u64) -> (u64, u128) {
        if self.width_us > 0 {
            return (self.at.0.saturating_add(self.width_us).min(safe_us), u128::MAX);
        }
        (self.at.0, self.at.1.as_u128().saturating_add(self.ids))
    }

    /// Looks at less the next time; `false` when it is a single message.
    fn narrow(&mut self) {
        if self.width_us > 0 {
            (self.width_us, self.ids) = (self.width_us / 2, u128::MAX);
        }
        if self.width_us == 0 {
            self.ids /= 2;
        }
    }

    fn widen(&mut self, end: (u64, u128)) {
        if self.width_us > 0 {
            self.width_us = (self.width_us * 2).min(MAX_WIDTH_US);
        } else if end.1 == u128::MAX {
            self.width_us = 1;
        } else {
            self.ids = self.ids.saturating_mul(2).max(1);
        }
    }

    /// Takes what was found up to `end`, in order and each once, as far as the page has room.
    fn take(&mut self, found: Vec<FoundDoc>, end: (u64, u128)) -> Result<(), StoreError> {
        let last = (end.0, Uuid::from_u128(end.1));
        let mut next = BTreeSet::new();
        let mut receipts = Vec::new();
        for FoundDoc { id, u, receipts: some } in found {
            let user = u.unwrap_or(id);
            for receipt in some {
                let place = (receipt.t.cast_unsigned(), Uuid::from_bytes(receipt.i.bytes()), user.clone());
                if place > self.at && (place.0, place.1) <= last && next.insert(place.clone()) {
                    receipts.push((place, receipt));
                }
            }
        }
        receipts.sort_unstable_by(|one, other| one.0.cmp(&other.0));
        let room = self.limit - self.receipts.len();
        let whole = receipts.len() <= room;
        for (place, receipt) in receipts.into_iter().take(room) {
            self.receipts.push(receipt.logged(&place.2)?);
            self.at = place;
        }
        if whole {
            self.at = match end.1.checked_add(1) {
                Some(id) => (end.0, Uuid::from_u128(id), String::new()),
                None => (end.0.saturating_add(1), Uuid::nil(), String::new()),
            };
        }
        Ok(())
    }
}

/// Reads a part of the log.
pub(super) async fn read(
    database: &Database,
    log: &Log,
    from: LogStart,
    limit: usize,
) -> Result<LogPage, LogError> {
    let _permit = log.reading.acquire().await;
    let began = Instant::now();
    let now_us = log.now_us(database).await?;
    let safe_us = now_us.saturating_sub(log.lag_us);
    let oldest_us = now_us.saturating_sub(RECEIPT_RETENTION.as_micros() as u64);
    let at = match from {
        LogStart::Oldest => (oldest_us.saturating_add(HEAD_START_US), Uuid::nil(), String::new()),
        LogStart::Now => (now_us, Uuid::nil(), String::new()),
        LogStart::After(after) if after.store_id != database.store_id => return Err(LogError::Foreign),
        LogStart::After(after) if after.at > now_us.saturating_add(AHEAD_US) => {
            return Err(LogError::Foreign);
        }
        LogStart::After(after) if after.at < oldest_us => return Err(LogError::Gone),
        LogStart::After(after) => (after.at, after.message_id, after.user),
    };
    let limit = limit.clamp(1, MAX_LOG_PAGE);
    let width_us = log.width_us.load(Ordering::Relaxed);
    let mut page = Filling { at, receipts: Vec::new(), limit, width_us, ids: u128::MAX };
    while page.at.0 <= safe_us && page.receipts.len() < limit && began.elapsed() < PAGE_TIME {
        let end = page.end(safe_us);
        let single = page.width_us == 0 && page.ids == 0;
        let most = (!single).then_some(MAX_DOCUMENTS);
        let from = (page.at.0, page.at.1);
        match find(database, from, (end.0, Uuid::from_u128(end.1)), most).await? {
            None => page.narrow(),
            Some(found) => {
                let few = found.len() < MAX_DOCUMENTS / 4;
                page.take(found, end)?;
                if few {
                    page.widen(end);
                }
            }
        }
    }
    log.width_us.store(page.width_us.max(1), Ordering::Relaxed);
    let tail = page.at.0 > safe_us;
    let (at, message_id, user) = page.at;
    let next = LogPosition { store_id: database.store_id, at, message_id, user };
    Ok(LogPage { receipts: page.receipts, next, tail })
}

/// Waits until the log goes on after a place; a few may wait, and one of them looks for all.
pub(super) async fn wait(database: &Database, log: &Log, position: &LogPosition) {
    loop {
        let mut poll = log.poll.lock().await;
        if poll.asked.is_some() && (poll.found >= position.at.max(1) || position.at < poll.from) {
            return;
        }
        if let Some(next) = poll.asked.map(|asked| asked + POLL).filter(|next| *next > Instant::now()) {
            drop(poll);
            tokio::time::sleep_until(next).await;
            continue;
        }
        if poll.asked.is_none() {
            (poll.from, poll.upto) = (position.at, position.at.saturating_sub(1));
        }
        poll.asked = Some(Instant::now());
        if look(database, log, &mut poll).await.is_err() {
            // Whoever reads on is told why.
            drop(poll);
            return tokio::time::sleep(POLL).await;
        }
    }
}

/// Looks for what came since the last look.
async fn look(database: &Database, log: &Log, poll: &mut Poll) -> Result<(), StoreError> {
    let safe_us = log.now_us(database).await?.saturating_sub(log.lag_us);
    if safe_us <= poll.upto {
        return Ok(());
    }
    let (from, to) = ((poll.upto + 1, Uuid::nil()), (safe_us, Uuid::max()));
    let one = || FindOptions::builder().projection(doc! { "_id": 1 }).limit(1).build();
    let mut found: Vec<FoundDoc> = database.find_logged(between(from, to), one()).await?;
    if found.is_empty() {
        found = database.find_beside(StoreOperation::Read, between(from, to), one()).await?;
    }
    poll.upto = safe_us;
    if !found.is_empty() {
        poll.found = safe_us;
    }
    Ok(())
}
