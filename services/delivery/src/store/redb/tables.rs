//! The tables of the redb file and the records in them. Records are protobuf messages, so that a field can be
//! added without rewriting a file; a change that is more than that raises [`FORMAT`].

use redb::{TableDefinition, WriteTransaction};
use uuid::Uuid;

use crate::store::{Attempts, DEDUPE_WINDOW, RECEIPT_RETENTION, Settled};

/// Version of the tables' layout.
pub(super) const FORMAT: u64 = 1;

/// What is true of the whole file: `format`, and `store_id` (random, made with the file).
pub(super) const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");

/// User → [`InboxRecord`].
pub(super) const INBOXES: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("inboxes");

/// (user, seq) → `sanjay.client.v1.InboxMessage` with a [`BodyExtra`] behind it, unsettled ones alone.
pub(super) const BODIES: TableDefinition<'static, (&str, u64), &[u8]> = TableDefinition::new("bodies");

/// (user, message id) → [`ReceiptRecord`], from the message's acceptance on.
pub(super) const RECEIPTS: TableDefinition<'static, (&str, u128), &[u8]> = TableDefinition::new("receipts");

/// (settled_us, user, message id) of every settled message, for the sweep.
pub(super) const SETTLED_AT: TableDefinition<'static, (u64, &str, u128), ()> =
    TableDefinition::new("settled_at");

/// (caller, user, dedupe key) → [`DedupeRecord`].
pub(super) const DEDUPE: TableDefinition<'static, (&str, &str, &str), &[u8]> = TableDefinition::new("dedupe");

/// (accepted_us, caller, user, dedupe key), for the sweep.
pub(super) const DEDUPED_AT: TableDefinition<'static, (u64, &str, &str, &str), ()> =
    TableDefinition::new("deduped_at");

/// (due_us, user) of every armed inbox.
pub(super) const DUE: TableDefinition<'static, (u64, &str), ()> = TableDefinition::new("due");

/// (user, message id) → [`DeadRecord`].
pub(super) const DEAD: TableDefinition<'static, (&str, u128), &[u8]> = TableDefinition::new("dead");

/// (user, message id) → `sanjay.client.v1.Payload` of a dead letter: a list reads none.
pub(super) const DEAD_BODIES: TableDefinition<'static, (&str, u128), &[u8]> =
    TableDefinition::new("dead_bodies");

/// (died_us, message id, user) of every dead letter: the order of a list.
pub(super) const DEAD_AT: TableDefinition<'static, (u64, u128, &str), ()> = TableDefinition::new("dead_at");

/// (user, died_us, message id) of every dead letter: the order of a list of one user's.
pub(super) const DEAD_OF: TableDefinition<'static, (&str, u64, u128), ()> = TableDefinition::new("dead_of");

/// (expires_us, user, seq) of unsettled messages that expire: when they are looked at. That is later for those that
/// could not be settled; such an entry may outlive its message until then.
pub(super) const EXPIRES: TableDefinition<'static, (u64, &str, u64), ()> = TableDefinition::new("expires");

/// (user, caller, collapse key) → seq of the newest unsettled message with that key.
pub(super) const COLLAPSE: TableDefinition<'static, (&str, &str, &str), u64> =
    TableDefinition::new("collapse");

/// (user, message id) → [`ScheduledRecord`].
pub(super) const SCHEDULED: TableDefinition<'static, (&str, u128), &[u8]> = TableDefinition::new("scheduled");

/// (user, message id) of every scheduled message → its time, or when its claim ends. Not in the record, so that neither a
/// claim nor a count has to do with payloads.
pub(super) const SCHEDULED_DUE: TableDefinition<'static, (&str, u128), u64> =
    TableDefinition::new("scheduled_due");

/// (due_us, user, message id) of every scheduled message: the same the other way round.
pub(super) const SCHEDULED_AT: TableDefinition<'static, (u64, &str, u128), ()> =
    TableDefinition::new("scheduled_at");

/// Place in the log, from 1 without holes → [`LogRecord`] of a settled message.
pub(super) const RECEIPT_LOG: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("receipt_log");

/// Key of [`META`]: the place that the next receipt gets. Not there before the first.
pub(super) const NEXT_RECEIPT: &str = "next_receipt";
/// (seen_us, user) of every inbox with devices: when the one was last seen that is away for longest.
pub(super) const SEEN: TableDefinition<'static, (u64, &str), ()> = TableDefinition::new("seen");

/// Creates the tables that a file does not have.
pub(super) fn create(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    transaction.open_table(META)?;
    transaction.open_table(INBOXES)?;
    transaction.open_table(BODIES)?;
    transaction.open_table(RECEIPTS)?;
    transaction.open_table(SETTLED_AT)?;
    transaction.open_table(DEDUPE)?;
    transaction.open_table(DEDUPED_AT)?;
    transaction.open_table(DUE)?;
    transaction.open_table(DEAD)?;
    transaction.open_table(DEAD_BODIES)?;
    transaction.open_table(DEAD_AT)?;
    transaction.open_table(DEAD_OF)?;
    transaction.open_table(EXPIRES)?;
    transaction.open_table(COLLAPSE)?;
    transaction.open_table(SCHEDULED)?;
    transaction.open_table(SCHEDULED_DUE)?;
    transaction.open_table(SCHEDULED_AT)?;
    transaction.open_table(RECEIPT_LOG)?;
    super::fanout::create(transaction)?;
    super::revocations::create(transaction)?;
    transaction.open_table(SEEN)?;
    Ok(())
}

/// One user's inbox without its bodies.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct InboxRecord {
    #[prost(fixed64, tag = "1")]
    pub(super) epoch: u64,
    #[prost(uint64, tag = "2")]
    pub(super) head: u64,
    #[prost(uint64, tag = "3")]
    pub(super) mark: u64,
    /// from, to, from, to, …
    #[prost(uint64, repeated, tag = "4")]
    pub(super) settled: Vec<u64>,
    #[prost(uint64, tag = "5")]
    pub(super) written: u64,
    #[prost(uint64, tag = "6")]
    pub(super) acked: u64,
    #[prost(uint64, tag = "7")]
    pub(super) expired: u64,
    #[prost(uint64, tag = "8")]
    pub(super) superseded: u64,
    #[prost(uint64, tag = "9")]
    pub(super) dead: u64,
    /// Unix time in microseconds; 0 while the inbox is not armed.
    #[prost(uint64, tag = "10")]
    pub(super) due_us: u64,
    #[prost(uint32, tag = "11")]
    pub(super) attempt: u32,
    /// Raised by everything that arms the inbox afresh.
    #[prost(uint64, tag = "12")]
    pub(super) armed: u64,
    /// [`Attempts::encode`].
    #[prost(bytes = "vec", tag = "13")]
    pub(super) attempts: Vec<u8>,
    /// Of the encoded payloads of unsettled messages, as far as they count.
    #[prost(uint64, tag = "14")]
    pub(super) bytes: u64,
    /// How many collapse keys have an unsettled message.
    #[prost(uint64, tag = "15")]
    pub(super) collapsing: u64,
    /// [`crate::store::Devices::encode`].
    #[prost(bytes = "vec", tag = "16")]
    pub(super) devices: Vec<u8>,
    /// When the device was last seen that is away for longest, Unix time in microseconds; 0 without devices.
    #[prost(uint64, tag = "17")]
    pub(super) seen_us: u64,
}

/// What of a message concerns the store alone. Its bytes stand behind those of the `InboxMessage`, whose reader skips
/// them.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct BodyExtra {
    /// Unix time in microseconds; 0 for never.
    #[prost(uint64, tag = "1001")]
    pub(super) expires_us: u64,
    #[prost(string, tag = "1002")]
    pub(super) collapse_key: String,
    /// What it counts for in [`InboxRecord::bytes`]: nothing when an earlier build stored it.
    #[prost(uint64, tag = "1003")]
    pub(super) payload_bytes: u64,
    /// UUID, 16 bytes, under which its payload is stored beside others' that have the same; empty when it is in the
    /// message itself.
    #[prost(bytes = "vec", tag = "1004")]
    pub(super) shared: Vec<u8>,
}

impl BodyExtra {
    /// Whether it has expired.
    pub(super) fn has_expired(&self, now_us: u64) -> bool {
        self.expires_us != 0 && self.expires_us <= now_us
    }
}

/// A message that waits for its time.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ScheduledRecord {
    #[prost(uint64, tag = "1")]
    pub(super) deliver_us: u64,
    #[prost(string, tag = "2")]
    pub(super) caller: String,
    /// Encoded `sanjay.client.v1.Payload`.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) payload: Vec<u8>,
    #[prost(uint64, tag = "4")]
    pub(super) time_us: u64,
    #[prost(string, tag = "5")]
    pub(super) trace: String,
    #[prost(uint64, tag = "6")]
    pub(super) expires_us: u64,
    #[prost(string, tag = "7")]
    pub(super) collapse_key: String,
}

impl InboxRecord {
    /// How many messages are not settled.
    pub(super) fn unsettled(&self) -> u64 {
        self.head.saturating_sub(self.acked + self.expired + self.superseded + self.dead)
    }

    /// Everything up to it is settled or written.
    pub(super) fn done(&self) -> u64 {
        self.written.max(self.mark)
    }

    pub(super) fn settled(&self) -> Settled {
        let ranges = self.settled.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
        Settled::new(self.mark, ranges)
    }

    pub(super) fn set_settled(&mut self, settled: &Settled) {
        self.mark = settled.mark();
        self.settled = settled.ranges().iter().flat_map(|&(from, to)| [from, to]).collect();
    }

    /// Whether something waits for its first delivery.
    pub(super) fn has_unwritten(&self) -> bool {
        self.done() < self.head
    }

    /// What is known of messages that failed.
    ///
    /// # Errors
    /// When it is damaged.
    pub(super) fn attempts(&self) -> Result<Attempts, redb::Error> {
        Attempts::decode(&self.attempts)
            .map_err(|error| redb::Error::Corrupted(format!("the attempts of an inbox: {error}")))
    }

    /// Notes attempts that changed: what is due by them is due no later.
    pub(super) fn set_attempts(&mut self, attempts: &Attempts) {
        self.attempts = attempts.encode();
        if let Some(due_us) = attempts.next_due_us()
            && (self.due_us == 0 || self.due_us > due_us)
        {
            self.due_us = due_us;
        }
    }

    /// Leaves what the attempts say when nothing waits to be written for the first time.
    pub(super) fn disarm_when_done(&mut self) -> Result<(), redb::Error> {
        if !self.has_unwritten() {
            self.due_us = self.attempts()?.next_due_us().unwrap_or(0);
            if self.due_us == 0 {
                self.attempt = 0;
            }
        }
        Ok(())
    }
}

/// A message's life.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ReceiptRecord {
    #[prost(uint64, tag = "1")]
    pub(super) seq: u64,
    /// [`crate::message::State::number`].
    #[prost(int32, tag = "2")]
    pub(super) state: i32,
    #[prost(uint64, tag = "3")]
    pub(super) accepted_us: u64,
    #[prost(uint64, tag = "4")]
    pub(super) settled_us: u64,
    #[prost(string, tag = "5")]
    pub(super) caller: String,
    /// [`crate::store::DeadReason::number`]; 0 when it is not dead, or an earlier build let it die.
    #[prost(int32, tag = "6")]
    pub(super) reason: i32,
}

/// A receipt in the log.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct LogRecord {
    #[prost(string, tag = "1")]
    pub(super) user: String,
    /// UUID, 16 bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub(super) message_id: Vec<u8>,
    #[prost(message, required, tag = "3")]
    pub(super) receipt: ReceiptRecord,
}

/// A dead letter without its body.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DeadRecord {
    #[prost(uint64, tag = "1")]
    pub(super) seq: u64,
    #[prost(fixed64, tag = "2")]
    pub(super) epoch: u64,
    #[prost(string, tag = "3")]
    pub(super) caller: String,
    /// [`crate::store::DeadReason::number`].
    #[prost(int32, tag = "4")]
    pub(super) reason: i32,
    #[prost(uint64, tag = "5")]
    pub(super) accepted_us: u64,
    #[prost(uint64, tag = "6")]
    pub(super) died_us: u64,
    /// The failures, encoded.
    #[prost(bytes = "vec", tag = "7")]
    pub(super) failures: Vec<u8>,
    #[prost(string, tag = "8")]
    pub(super) trace: String,
    #[prost(uint64, tag = "9")]
    pub(super) payload_bytes: u64,
    /// UUID, 16 bytes; empty while it was not sent again.
    #[prost(bytes = "vec", tag = "10")]
    pub(super) redriven_as: Vec<u8>,
}

/// The first answer under a dedupe key.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct DedupeRecord {
    /// SHA-256 of the encoded payload.
    #[prost(bytes = "vec", tag = "1")]
    pub(super) payload_sha256: Vec<u8>,
    #[prost(uint64, tag = "2")]
    pub(super) seq: u64,
    /// UUID, 16 bytes.
    #[prost(bytes = "vec", tag = "3")]
    pub(super) message_id: Vec<u8>,
    #[prost(uint64, tag = "4")]
    pub(super) time_us: u64,
    #[prost(fixed64, tag = "5")]
    pub(super) epoch: u64,
}

/// Decodes a record.
///
/// # Errors
/// Names the table when its bytes are not such a record.
pub(super) fn decode<M: prost::Message + Default>(
    table: &'static str,
    bytes: &[u8],
) -> Result<M, redb::Error> {
    M::decode(bytes).map_err(|error| redb::Error::Corrupted(format!("a record of table {table}: {error}")))
}

/// Reads a message id of a record.
///
/// # Errors
/// When it is not 16 bytes.
pub(super) fn message_id(bytes: &[u8]) -> Result<Uuid, redb::Error> {
    Uuid::from_slice(bytes).map_err(|error| redb::Error::Corrupted(format!("a message id: {error}")))
}

/// Dedupe keys accepted before it are forgotten at `now_us`.
pub(super) fn dedupe_cutoff(now_us: u64) -> u64 {
    now_us.saturating_sub(DEDUPE_WINDOW.as_micros() as u64)
}

/// Receipts settled before it are removed at `now_us`.
pub(super) fn receipt_cutoff(now_us: u64) -> u64 {
    now_us.saturating_sub(RECEIPT_RETENTION.as_micros() as u64)
}
