//! The read side: snapshots of the last commit, never waiting for the writer.

use std::ops::Bound;

use redb::{Database, ReadOnlyTable, ReadableDatabase, ReadableTable, ReadableTableMetadata};
use sanjay_proto::client::v1::InboxMessage;
use uuid::Uuid;

use super::{
    fanout::PAYLOADS,
    receipts::receipt,
    tables::{self, BodyExtra, InboxRecord},
};
use crate::store::{
    InboxQuery, Known, MAX_PAGE_BYTES, MAX_PAGE_MESSAGES, MAX_READ_BYTES, Page, Receipt, Stats,
    audit::{self, AuditPage, MAX_AUDITED_BODIES},
    epoch::epoch,
};

/// Reads parts of inboxes in one snapshot, within [`MAX_READ_BYTES`] together.
pub(super) fn read(
    database: &Database,
    store_id: u64,
    now_us: u64,
    queries: &[InboxQuery],
) -> Result<Vec<Page>, redb::Error> {
    let transaction = database.begin_read()?;
    let inboxes = transaction.open_table(tables::INBOXES)?;
    let bodies = transaction.open_table(tables::BODIES)?;
    let payloads = transaction.open_table(PAYLOADS)?;
    let mut budget = MAX_READ_BYTES;
    queries
        .iter()
        .map(|query| {
            let record: InboxRecord = match inboxes.get(query.user.as_str())? {
                Some(bytes) => tables::decode("inboxes", bytes.value())?,
                None => InboxRecord { epoch: epoch(store_id, &query.user), ..InboxRecord::default() },
            };
            read_page(&bodies, &payloads, &record, query, now_us, &mut budget)
        })
        .collect()
}

/// A page that is being filled.
struct Filling<'a> {
    page: Page,
    limit: usize,
    bytes: usize,
    /// What has expired by then is left out.
    now_us: u64,
    /// Bytes that all pages of the call may still take.
    budget: &'a mut usize,
    payloads: &'a ReadOnlyTable<u128, &'static [u8]>,
}

impl Filling<'_> {
    /// Adds a body; false when the page is full.
    fn add(&mut self, body: &[u8], delivery: u32) -> Result<bool, redb::Error> {
        let extra: BodyExtra = tables::decode("bodies", body)?;
        if extra.has_expired(self.now_us) {
            return Ok(true);
        }
        let shared = !extra.shared.is_empty();
        let size = body.len() + if shared { extra.payload_bytes as usize } else { 0 };
        let fits = self.bytes == 0 || self.bytes + size <= MAX_PAGE_BYTES;
        if self.page.messages.len() >= self.limit || !fits || size > *self.budget {
            return Ok(false);
        }
        let mut message = InboxMessage { delivery, ..tables::decode("bodies", body)? };
        if shared {
            let id = tables::message_id(&extra.shared)?;
            message.payload = Some(super::fanout::payload(self.payloads, id)?);
        }
        self.page.messages.push(message);
        self.bytes += size;
        *self.budget -= size;
        Ok(true)
    }
}

fn read_page(
    bodies: &ReadOnlyTable<(&'static str, u64), &'static [u8]>,
    payloads: &ReadOnlyTable<u128, &'static [u8]>,
    record: &InboxRecord,
    query: &InboxQuery,
    now_us: u64,
    budget: &mut usize,
) -> Result<Page, redb::Error> {
    let (attempts, devices) = (record.attempts()?, record.devices()?);
    let InboxRecord { epoch, head, .. } = *record;
    let (mut mark, mut known) = (record.mark, Known::Lately);
    if let Some(device) = &query.device {
        (mark, known) = (devices.mark(device, &record.settled()), devices.known(device, now_us));
        if known == Known::Unknown {
            let covers = query.after.unwrap_or(mark);
            return Ok(Page { epoch, mark, head, covers, device: known, ..Page::default() });
        }
    }
    let has_acked = |seq| query.device.as_ref().is_some_and(|device| devices.has_acked(device, seq));
    let page = Page { epoch, mark, head, device: known, ..Page::default() };
    let limit = if query.only.is_empty() { query.limit.min(MAX_PAGE_MESSAGES) } else { MAX_PAGE_MESSAGES };
    let mut filling = Filling { page, limit, bytes: 0, now_us, budget, payloads };
    let user = query.user.as_str();
    if !query.only.is_empty() {
        for seq in query.only_seqs() {
            let Some(delivery) = attempts.newest(seq) else { continue };
            let Some(body) = bodies.get((user, seq))?.filter(|_| !has_acked(seq)) else { continue };
            if !filling.add(body.value(), delivery)? {
                break;
            }
        }
        if query.device.is_none() && !devices.is_empty() {
            let seqs = filling.page.messages.iter().map(|message| message.seq);
            filling.page.acked_by = seqs.map(|seq| (seq, devices.acked_by(seq))).collect();
        }
        return Ok(filling.page);
    }
    filling.page.covers = head;
    let after = query.after.unwrap_or(mark);
    let above = after.saturating_add(1).max(mark + 1);
    for entry in bodies.range((user, above)..=(user, u64::MAX))? {
        let (key, body) = entry?;
        let seq = key.value().1;
        let Some(delivery) = attempts.delivery(seq).filter(|_| !has_acked(seq)) else { continue };
        if !filling.add(body.value(), delivery)? {
            filling.page.covers = filling.page.messages.last().map_or(after, |last| last.seq);
            break;
        }
    }
    Ok(filling.page)
}

/// Reads the record of a message.
pub(super) fn lookup(
    database: &Database,
    user: &str,
    message_id: Uuid,
) -> Result<Option<Receipt>, redb::Error> {
    let receipts = database.begin_read()?.open_table(tables::RECEIPTS)?;
    let Some(bytes) = receipts.get((user, message_id.as_u128()))? else { return Ok(None) };
    receipt(&tables::decode("receipts", bytes.value())?).map(Some)
}

/// Whether an inbox is due: a look that takes no write transaction.
pub(super) fn anything_due(database: &Database, now_us: u64) -> Result<bool, redb::Error> {
    let due = database.begin_read()?.open_table(tables::DUE)?;
    let first = due.first()?;
    Ok(first.is_some_and(|(key, _)| key.value().0 <= now_us))
}

/// Whether a message has expired that is not settled.
pub(super) fn anything_expired(database: &Database, now_us: u64) -> Result<bool, redb::Error> {
    let expires = database.begin_read()?.open_table(tables::EXPIRES)?;
    let first = expires.first()?;
    Ok(first.is_some_and(|(key, _)| key.value().0 <= now_us))
}

/// Whether the time of a scheduled message has come.
pub(super) fn anything_scheduled(database: &Database, now_us: u64) -> Result<bool, redb::Error> {
    let scheduled = database.begin_read()?.open_table(tables::SCHEDULED_AT)?;
    let first = scheduled.first()?;
    Ok(first.is_some_and(|(key, _)| key.value().0 <= now_us))
}

/// When the oldest message was accepted that waits to be written, among the inboxes that are due first and last.
pub(super) fn oldest_undelivered(database: &Database, limit: usize) -> Result<Option<u64>, redb::Error> {
    let transaction = database.begin_read()?;
    let due = transaction.open_table(tables::DUE)?;
    let inboxes = transaction.open_table(tables::INBOXES)?;
    let bodies = transaction.open_table(tables::BODIES)?;
    let mut oldest = None;
    for entry in due.iter()?.take(limit).chain(due.iter()?.rev().take(limit)) {
        let (key, _) = entry?;
        let (_, user) = key.value();
        let Some(bytes) = inboxes.get(user)? else { continue };
        let record: InboxRecord = tables::decode("inboxes", bytes.value())?;
        let Some(first) = bodies.range((user, record.done() + 1)..=(user, u64::MAX))?.next() else {
            continue;
        };
        let body: InboxMessage = tables::decode("bodies", first?.1.value())?;
        oldest = Some(oldest.map_or(body.time_us, |oldest: u64| oldest.min(body.time_us)));
    }
    Ok(oldest)
}

/// Compares inboxes with their bodies, in one snapshot.
pub(super) fn audit(database: &Database, after: &str, limit: usize) -> Result<AuditPage, redb::Error> {
    let transaction = database.begin_read()?;
    let inboxes = transaction.open_table(tables::INBOXES)?;
    let bodies = transaction.open_table(tables::BODIES)?;
    let mut page = AuditPage::default();
    let mut looked_at = 0;
    let mut last: Option<String> = None;
    for entry in inboxes.range::<&str>((Bound::Excluded(after), Bound::Unbounded))? {
        if page.inboxes >= limit || looked_at >= MAX_AUDITED_BODIES {
            page.next = last;
            break;
        }
        let (user, bytes) = entry?;
        let user = user.value();
        let record: InboxRecord = tables::decode("inboxes", bytes.value())?;
        let mut failed = None;
        let seqs = bodies.range((user, 0)..=(user, u64::MAX))?.map_while(|entry| match entry {
            Ok((key, _)) => Some(key.value().1),
            Err(error) => {
                failed = Some(error);
                None
            }
        });
        let seqs = seqs.inspect(|_| looked_at += 1);
        let finding = audit::compare(record.epoch, record.head, &record.settled(), seqs);
        if let Some(error) = failed {
            return Err(error.into());
        }
        page.findings.extend(finding);
        page.inboxes += 1;
        last = Some(user.to_owned());
    }
    Ok(page)
}

/// How much the tables hold.
pub(super) fn stats(database: &Database) -> Result<Stats, redb::Error> {
    let transaction = database.begin_read()?;
    Ok(Stats {
        inboxes: transaction.open_table(tables::INBOXES)?.len()?,
        unsettled: transaction.open_table(tables::BODIES)?.len()?,
        armed: transaction.open_table(tables::DUE)?.len()?,
        dead_letters: transaction.open_table(tables::DEAD)?.len()?,
        scheduled: transaction.open_table(tables::SCHEDULED)?.len()?,
    })
}
