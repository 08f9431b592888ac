//! The log of receipts in the file: a receipt gets the next place in the transaction that settles its message. And the
//! deliveries of one user.

use prost::Message as _;
use redb::{Database, ReadableDatabase, ReadableTable, Table, WriteTransaction};
use uuid::Uuid;

use super::{
    tables::{self, LogRecord, ReceiptRecord, ScheduledRecord},
    transaction::Tables,
};
use crate::{
    message::State,
    store::{
        DeadReason, DeliveriesPage, DeliveriesQuery, ListedDelivery, LogError, LogPage, LogPosition,
        LogStart, LoggedReceipt, MAX_DELIVERIES, MAX_LOG_PAGE, Receipt,
    },
};

/// Most records that one page of deliveries looks at: with a filter that few pass, a page may be short.
const MAX_LOOKED_AT: usize = 4_096;

/// The log in a write transaction.
pub(super) struct Log<'txn> {
    log: Table<'txn, u64, &'static [u8]>,
    meta: Table<'txn, &'static str, u64>,
    /// Place of the next receipt, and whether one was added.
    next: u64,
    added: bool,
}

impl<'txn> Log<'txn> {
    pub(super) fn open(txn: &'txn WriteTransaction) -> Result<Self, redb::Error> {
        let meta = txn.open_table(tables::META)?;
        let next = meta.get(tables::NEXT_RECEIPT)?.map_or(1, |next| next.value());
        Ok(Self { log: txn.open_table(tables::RECEIPT_LOG)?, meta, next, added: false })
    }

    fn add(&mut self, record: &LogRecord) -> Result<(), redb::Error> {
        self.log.insert(self.next, record.encode_to_vec().as_slice())?;
        self.next += 1;
        self.added = true;
        Ok(())
    }

    /// Notes the next place, which outlives the receipts before it; returns it when receipts were added.
    pub(super) fn finish(&mut self) -> Result<Option<u64>, redb::Error> {
        if !self.added {
            return Ok(None);
        }
        self.meta.insert(tables::NEXT_RECEIPT, self.next)?;
        Ok(Some(self.next))
    }

    /// Removes up to `limit` of the oldest receipts, as far as they were settled before `cutoff_us`.
    pub(super) fn sweep(&mut self, cutoff_us: u64, limit: usize) -> Result<(), redb::Error> {
        let mut old = Vec::new();
        for entry in self.log.iter()?.take(limit) {
            let (place, bytes) = entry?;
            let record: LogRecord = tables::decode("receipt_log", bytes.value())?;
            // A clock that was set back may leave later ones for a while.
            if record.receipt.settled_us >= cutoff_us {
                break;
            }
            old.push(place.value());
        }
        for place in old {
            self.log.remove(place)?;
        }
        Ok(())
    }
}

impl Tables<'_> {
    /// Adds a message that was just settled to the log.
    pub(super) fn log_receipt(
        &mut self,
        user: &str,
        message_id: Uuid,
        receipt: &ReceiptRecord,
    ) -> Result<(), redb::Error> {
        let record = LogRecord {
            user: user.to_owned(),
            message_id: message_id.as_bytes().to_vec(),
            receipt: receipt.clone(),
        };
        self.log.add(&record)?;
        if self.rules.watched {
            self.told.settled.push(logged(record)?);
        }
        Ok(())
    }
}

fn logged(record: LogRecord) -> Result<LoggedReceipt, redb::Error> {
    let message_id = tables::message_id(&record.message_id)?;
    let receipt = receipt(&record.receipt)?;
    let reason = DeadReason::from_number(record.receipt.reason);
    Ok(LoggedReceipt { user: record.user, message_id, receipt, caller: record.receipt.caller, reason })
}

/// What a record says.
///
/// # Errors
/// When its state is not known.
pub(super) fn receipt(record: &ReceiptRecord) -> Result<Receipt, redb::Error> {
    let state = State::from_number(record.state)
        .ok_or_else(|| redb::Error::Corrupted(format!("a receipt has the unknown state {}", record.state)))?;
    let ReceiptRecord { seq, accepted_us, settled_us, .. } = *record;
    Ok(Receipt { seq, state, accepted_us, settled_us })
}

/// Reads a part of the log in one snapshot.
pub(super) fn read(
    database: &Database,
    store_id: u64,
    from: LogStart,
    limit: usize,
) -> Result<Result<LogPage, LogError>, redb::Error> {
    let transaction = database.begin_read()?;
    let log = transaction.open_table(tables::RECEIPT_LOG)?;
    let next =
        transaction.open_table(tables::META)?.get(tables::NEXT_RECEIPT)?.map_or(1, |next| next.value());
    let first = log.first()?.map_or(next, |(place, _)| place.value());
    let mut at = match from {
        LogStart::Oldest => first - 1,
        LogStart::Now => next - 1,
        LogStart::After(after) if after.store_id != store_id || after.at >= next => {
            return Ok(Err(LogError::Foreign));
        }
        LogStart::After(after) if after.at + 1 < first => return Ok(Err(LogError::Gone)),
        LogStart::After(after) => after.at,
    };
    let mut receipts = Vec::new();
    for entry in log.range(at + 1..)?.take(limit.clamp(1, MAX_LOG_PAGE)) {
        let (place, bytes) = entry?;
        receipts.push(logged(tables::decode("receipt_log", bytes.value())?)?);
        at = place.value();
    }
    let position = LogPosition { store_id, at, message_id: Uuid::nil(), user: String::new() };
    Ok(Ok(LogPage { receipts, next: position, tail: at + 1 == next }))
}

/// Lists messages of one user, the newest ids first.
pub(super) fn deliveries(
    database: &Database,
    query: &DeliveriesQuery,
    now_us: u64,
) -> Result<DeliveriesPage, redb::Error> {
    let transaction = database.begin_read()?;
    let receipts = transaction.open_table(tables::RECEIPTS)?;
    let scheduled = transaction.open_table(tables::SCHEDULED)?;
    let (user, limit) = (query.user.as_str(), query.limit.clamp(1, MAX_DELIVERIES));
    let cutoff_us = tables::receipt_cutoff(now_us);
    let below = query.before.map_or(u128::MAX, |before| before.as_u128());
    let mut page = DeliveriesPage::default();
    let mut last = None;
    for (looked_at, entry) in receipts.range((user, 0)..(user, below))?.rev().enumerate() {
        // There is one more than the page takes.
        if page.deliveries.len() == limit || looked_at == MAX_LOOKED_AT {
            page.next = last;
            break;
        }
        let (key, bytes) = entry?;
        let id = key.value().1;
        let record: ReceiptRecord = tables::decode("receipts", bytes.value())?;
        last = Some(Uuid::from_u128(id));
        let found = receipt(&record)?;
        let old = found.state.is_terminal() && found.settled_us < cutoff_us;
        if old || !query.matches(found.state, &record.caller) {
            continue;
        }
        let deliver_us = match scheduled.get((user, id))? {
            Some(bytes) if found.state == State::Scheduled => {
                tables::decode::<ScheduledRecord>("scheduled", bytes.value())?.deliver_us
            }
            _ => 0,
        };
        page.deliveries.push(ListedDelivery {
            message_id: Uuid::from_u128(id),
            receipt: found,
            caller: record.caller,
            deliver_us,
            reason: DeadReason::from_number(record.reason),
        });
    }
    Ok(page)
}
