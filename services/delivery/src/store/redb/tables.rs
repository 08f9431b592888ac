//! The tables of the redb file and the records in them. Records are protobuf messages, so that a field can be
//! added without rewriting a file; a change that is more than that raises [`FORMAT`].

use redb::TableDefinition;
use uuid::Uuid;

use crate::store::{DEDUPE_WINDOW, RECEIPT_RETENTION, Settled};

/// Version of the tables' layout.
pub(super) const FORMAT: u64 = 1;

/// What is true of the whole file: `format`, and `store_id` (random, made with the file).
pub(super) const META: TableDefinition<'static, &str, u64> = TableDefinition::new("meta");

/// User → [`InboxRecord`].
pub(super) const INBOXES: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("inboxes");

/// (user, seq) → `sanjay.client.v1.InboxMessage`, unsettled ones alone.
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

    /// Takes the inbox off the due table when nothing in it waits to be written.
    pub(super) fn disarm_when_done(&mut self) {
        if self.done() >= self.head {
            (self.due_us, self.attempt) = (0, 0);
        }
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
