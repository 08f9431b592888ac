//! The documents in the database: their fields, and how they become what the store works with.
//!
//! Collection `inbox` has one document for each user, whose name is its `_id`. Collection `beside` has what left
//! those: bodies as `b/USER/FIRST/LAST`, receipts as `r/USER/…`, a dedupe key as `d/DIGEST/USER`, with the user as
//! `u`. Collection `scheduled` has what waits for its time; `channels`, `members` and `publications` are for durable
//! fan-out. An inbox has in `shared` the publications whose payloads its messages share. Servers take updated documents apart, so an inbox has as few
//! fields as serve.

use std::collections::BTreeMap;

use mongodb::bson::{
    Binary, Bson, DateTime, Document, Uuid as BsonUuid, doc, serialize_to_bson, serialize_to_document,
    spec::BinarySubtype,
};
use prost::Message as _;
use sanjay_proto::client::v1::{InboxMessage, Payload};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{inbox::Open, receipts};
use crate::{
    message::State,
    store::{Attempts, DeadReason, Devices, LoggedReceipt, NewMessage, Receipt, Settled, StoreError, due},
};

/// Version of the documents' layout.
pub(super) const FORMAT: i64 = 1;

/// Most numbers between the first and the last body of one document, so that a reader knows how far before a seq
/// the document may begin that holds it.
pub(super) const MAX_SPAN: u64 = 256;

/// `_id` of bodies beside the inbox; in the order of `first` for one user.
pub(super) fn bodies_id(user: &str, first: u64, last: u64) -> String {
    format!("b/{user}/{first:020}/{last:020}")
}

/// `_id` of a dedupe key beside the inbox.
pub(super) fn key_id(user: &str, digest: &[u8]) -> String {
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("d/{hex}/{user}")
}

/// Where a user stands among all: spreads users over lanes, and the due ones over nodes. 0 to 2³¹ − 1, and never
/// another for the same user, because it is stored.
pub(super) fn user_hash(user: &str) -> i32 {
    let digest = ring::digest::digest(&ring::digest::SHA256, user.as_bytes());
    let first = digest.as_ref().first_chunk::<4>().expect("SHA-256 has 32 bytes");
    i32::from_be_bytes(*first) & i32::MAX
}

/// What stands for a back end's dedupe or collapse key: half of a SHA-256, so that its length says nothing and fits.
pub(super) fn key_digest(caller: &str, key: &str) -> Vec<u8> {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(&(caller.len() as u64).to_be_bytes());
    context.update(caller.as_bytes());
    context.update(key.as_bytes());
    context.finish().as_ref()[..16].to_vec()
}

/// Bytes as BSON.
pub(super) fn binary(bytes: Vec<u8>) -> Binary {
    Binary { subtype: BinarySubtype::Generic, bytes }
}

/// A value as BSON.
///
/// # Errors
/// When it cannot be that; what is stored here always can.
pub(super) fn bson(value: &impl Serialize) -> Result<Bson, StoreError> {
    serialize_to_bson(value).map_err(|error| StoreError::Unavailable(error.to_string()))
}

/// A value as a document; as [`bson`].
pub(super) fn document(value: &impl Serialize) -> Result<Document, StoreError> {
    serialize_to_document(value).map_err(|error| StoreError::Unavailable(error.to_string()))
}

/// A message id as BSON.
pub(super) fn id(id: Uuid) -> BsonUuid {
    BsonUuid::from_bytes(*id.as_bytes())
}

/// Unix time in microseconds as a date, rounded up so that nothing expires too early.
pub(super) fn date(us: u64) -> DateTime {
    DateTime::from_millis(i64::try_from(us.div_ceil(1_000)).unwrap_or(i64::MAX))
}

/// Whether the time of a message with this `expires_us` has passed.
pub(super) fn has_expired(expires_us: u64, now_us: u64) -> bool {
    expires_us != 0 && expires_us <= now_us
}

/// An unsettled message, in an inbox or beside it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct MessageDoc {
    /// Its seq.
    pub(super) n: i64,
    /// Its id.
    pub(super) i: BsonUuid,
    /// Encoded [`Header`].
    pub(super) h: Binary,
    /// Encoded payload; left out where it is not needed, or shared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) p: Option<Binary>,
    /// The durable publication whose payload it shares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) s: Option<BsonUuid>,
}

/// What else is known of a message.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Header {
    /// When it was accepted, Unix time in microseconds.
    #[prost(uint64, tag = "1")]
    pub(super) time_us: u64,
    /// Who sent it.
    #[prost(string, tag = "2")]
    pub(super) caller: String,
    /// W3C `traceparent`, or empty.
    #[prost(string, tag = "3")]
    pub(super) trace: String,
    /// Length of the encoded payload.
    #[prost(uint64, tag = "4")]
    pub(super) bytes: u64,
    /// From when on no reader gets it, Unix time in microseconds; 0 for never.
    #[prost(uint64, tag = "5")]
    pub(super) expires_us: u64,
}

impl Header {
    pub(super) fn new(message: &NewMessage) -> Self {
        Self {
            time_us: message.time_us,
            caller: message.caller.clone(),
            trace: message.trace.clone(),
            bytes: message.payload.encoded_len() as u64,
            expires_us: message.expires_us,
        }
    }
}

impl MessageDoc {
    /// The document of a message that is to be put at `seq`.
    pub(super) fn new(message: &NewMessage, seq: u64) -> Self {
        Self {
            n: seq.cast_signed(),
            i: id(message.message_id),
            h: binary(Header::new(message).encode_to_vec()),
            p: message.shared.is_none().then(|| binary(message.payload.encode_to_vec())),
            s: message.shared.map(id),
        }
    }

    pub(super) fn seq(&self) -> u64 {
        self.n.cast_unsigned()
    }

    fn damaged(&self, what: impl std::fmt::Display) -> StoreError {
        StoreError::Unavailable(format!("message {} in the database is damaged: {what}", self.n))
    }

    /// What else is known of it.
    pub(super) fn header(&self) -> Result<Header, StoreError> {
        Header::decode(&self.h.bytes[..]).map_err(|error| self.damaged(error))
    }

    /// Length of the payload, where it is there.
    pub(super) fn bytes(&self) -> usize {
        self.p.as_ref().map_or(0, |payload| payload.bytes.len())
    }

    /// What an edge gets of it; `shared` is its payload when that is not its own.
    pub(super) fn message(
        &self,
        header: Header,
        shared: Option<&Payload>,
    ) -> Result<InboxMessage, StoreError> {
        let payload = match (shared, &self.p) {
            (Some(shared), _) => shared.clone(),
            (None, Some(own)) => Payload::decode(&own.bytes[..]).map_err(|error| self.damaged(error))?,
            (None, None) => return Err(self.damaged("it has no payload")),
        };
        Ok(InboxMessage {
            seq: self.seq(),
            message_id: self.i.bytes().to_vec().into(),
            payload: Some(payload),
            time_us: header.time_us,
            delivery: 1,
            trace: header.trace,
        })
    }
}

/// The receipt of a settled message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ReceiptDoc {
    /// The message's id.
    pub(super) i: BsonUuid,
    /// Its seq.
    pub(super) n: i64,
    /// [`State::number`]; what follows is left out where receipts are only counted.
    #[serde(default)]
    pub(super) s: i32,
    /// When it was accepted, Unix time in microseconds.
    #[serde(default)]
    pub(super) a: i64,
    /// When it was settled, Unix time in microseconds.
    #[serde(default)]
    pub(super) t: i64,
    /// Who sent it; absent when an earlier build stored it.
    #[serde(default)]
    pub(super) c: String,
    /// [`DeadReason::number`]; absent when it is not dead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) r: Option<i32>,
}

impl ReceiptDoc {
    /// Of a message that is settled at this time.
    pub(super) fn new(open: &Open, state: State, now_us: u64) -> Self {
        Self {
            i: open.id,
            n: open.seq.cast_signed(),
            s: state.number(),
            a: open.time_us.cast_signed(),
            t: now_us.cast_signed(),
            c: open.caller.clone(),
            r: None,
        }
    }

    /// What stands for it in `log`.
    pub(super) fn entry(&self) -> String {
        receipts::entry(self.t.cast_unsigned(), Uuid::from_bytes(self.i.bytes()))
    }

    /// Why it is dead.
    pub(super) fn reason(&self) -> Option<DeadReason> {
        self.r.and_then(DeadReason::from_number)
    }

    /// As the log has it.
    pub(super) fn logged(&self, user: &str) -> Result<LoggedReceipt, StoreError> {
        Ok(LoggedReceipt {
            user: user.to_owned(),
            message_id: Uuid::from_bytes(self.i.bytes()),
            receipt: self.receipt()?,
            caller: self.c.clone(),
            reason: self.reason(),
        })
    }

    pub(super) fn receipt(&self) -> Result<Receipt, StoreError> {
        let state = State::from_number(self.s).ok_or_else(|| {
            StoreError::Unavailable(format!("a receipt in the database has the unknown state {}", self.s))
        })?;
        let (accepted_us, settled_us) = (self.a.cast_unsigned(), self.t.cast_unsigned());
        Ok(Receipt { seq: self.n.cast_unsigned(), state, accepted_us, settled_us })
    }
}

/// The first answer under a dedupe key.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct KeyDoc {
    /// [`key_digest`].
    pub(super) k: Binary,
    /// SHA-256 of the payload.
    pub(super) h: Binary,
    /// The message's seq; 0 when it was scheduled.
    pub(super) n: i64,
    /// The message's id.
    pub(super) i: BsonUuid,
    /// When it was accepted, Unix time in microseconds.
    pub(super) t: i64,
}

/// An unsettled message with a collapse key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CollapseDoc {
    /// [`key_digest`] of its collapse key.
    pub(super) k: Binary,
    /// Its seq.
    pub(super) n: i64,
}

/// What a node last appended to an inbox: tells it what became of a batch without an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WriterDoc {
    /// Number of the batch, of this node: a write that is in the document as a whole.
    pub(super) b: i64,
    /// When, Unix time in microseconds.
    pub(super) t: i64,
}

/// Who last settled something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SettlerDoc {
    /// The node.
    pub(super) w: String,
    /// Number of the batch, of that node.
    pub(super) b: i64,
}

/// An inbox. A number that is not there is 0.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct InboxDoc {
    #[serde(rename = "_id")]
    pub(super) user: String,
    pub(super) epoch: i64,
    /// The newest number that was given out.
    pub(super) seq: i64,
    /// Everything up to it is settled.
    pub(super) mark: i64,
    /// Settled above the mark: from, to, from, to, …
    pub(super) settled: Vec<i64>,
    /// Raised by everything that settles or changes the attempts.
    pub(super) settles: i64,
    pub(super) acked: i64,
    pub(super) expired: i64,
    pub(super) superseded: i64,
    pub(super) dead: i64,
    /// Everything up to it was written to a socket.
    pub(super) written: i64,
    /// The highest seq whose body lies beside the inbox; gone when nothing does.
    pub(super) spilled: i64,
    /// Raised by everything that arms.
    pub(super) armed: i64,
    pub(super) attempt: i64,
    /// When it is due, Unix time in microseconds; absent when it is not armed.
    pub(super) due: i64,
    pub(super) messages: Vec<MessageDoc>,
    pub(super) receipts: Vec<ReceiptDoc>,
    pub(super) keys: Vec<KeyDoc>,
    /// By node.
    pub(super) writers: BTreeMap<String, WriterDoc>,
    pub(super) settler: Option<SettlerDoc>,
    /// [`Attempts::encode`]; absent when there are none.
    pub(super) attempts: Option<Binary>,
    /// Bytes of the payloads of what is neither settled nor dying. Of what an earlier build appended or settled nothing
    /// is counted, so it may be wrong, and below 0, until the inbox is empty.
    pub(super) bytes: i64,
    /// In ascending seq. What an earlier build settled may still be among them.
    pub(super) collapse: Vec<CollapseDoc>,
    /// No message in this document expires before it, Unix time in microseconds; absent when none does.
    pub(super) expires: i64,
    /// How often a key came to `keys` without raising `seq`: with a message that was scheduled.
    pub(super) plans: i64,
    /// [`Devices::encode`]; absent when there are none.
    pub(super) devices: Option<Binary>,
}

/// What an inbox has from its beginning on, beside what the write gives it anyway.
pub(super) fn new_inbox(user: &str, epoch: u64) -> Document {
    doc! {
        "h": user_hash(user), "epoch": epoch.cast_signed(), "mark": 0_i64, "settles": 0_i64, "written": 0_i64,
    }
}

/// What selects a number that is absent while it is 0.
pub(super) fn counted(number: i64) -> Bson {
    if number == 0 { doc! { "$exists": false }.into() } else { number.into() }
}

/// What is known of messages that failed, as it was stored.
///
/// # Errors
/// When it is damaged.
pub(super) fn attempts(user: &str, stored: Option<&Binary>) -> Result<Attempts, StoreError> {
    let bytes = stored.map_or(&[][..], |stored| &stored.bytes);
    Attempts::decode(bytes).map_err(|error| {
        StoreError::Unavailable(format!(
            "the attempts of inbox {user:?} in the database are damaged: {error}"
        ))
    })
}

/// The devices of an inbox, as they were stored.
///
/// # Errors
/// When they are damaged.
pub(super) fn devices(user: &str, stored: Option<&Binary>) -> Result<Devices, StoreError> {
    let bytes = stored.map_or(&[][..], |stored| &stored.bytes);
    Devices::decode(bytes).map_err(|error| {
        StoreError::Unavailable(format!("the devices of inbox {user:?} in the database are damaged: {error}"))
    })
}

impl InboxDoc {
    /// Its devices.
    pub(super) fn devices(&self) -> Result<Devices, StoreError> {
        devices(&self.user, self.devices.as_ref())
    }

    /// What is known of messages that failed.
    pub(super) fn attempts(&self) -> Result<Attempts, StoreError> {
        attempts(&self.user, self.attempts.as_ref())
    }

    pub(super) fn head(&self) -> u64 {
        self.seq.cast_unsigned()
    }

    /// How many messages are settled in one of the ways there are.
    pub(super) fn terminal(&self) -> u64 {
        (self.acked + self.expired + self.superseded + self.dead).cast_unsigned()
    }

    pub(super) fn settled(&self) -> Settled {
        settled_of(self.mark, &self.settled)
    }
}

/// What was settled, from its stored form.
pub(super) fn settled_of(mark: i64, ranges: &[i64]) -> Settled {
    let pairs = ranges.chunks_exact(2);
    let ranges = pairs.map(|pair| (pair[0].cast_unsigned(), pair[1].cast_unsigned())).collect();
    Settled::new(mark.cast_unsigned(), ranges)
}

/// What was settled, as stored.
pub(super) fn ranges(settled: &Settled) -> Vec<Bson> {
    settled.ranges().iter().flat_map(|&(from, to)| [from, to]).map(|n| Bson::Int64(n.cast_signed())).collect()
}

/// Bodies beside an inbox.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct BodiesDoc {
    #[serde(rename = "_id")]
    pub(super) id: String,
    pub(super) u: String,
    /// First and last seq.
    pub(super) f: i64,
    pub(super) l: i64,
    /// Of the messages, for the index.
    pub(super) ids: Vec<BsonUuid>,
    pub(super) messages: Vec<MessageDoc>,
    /// No message of them expires before it, Unix time in microseconds, and [`user_hash`]; absent when none does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) e: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) h: Option<i32>,
    /// The durable publications whose payloads they share, for the index.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) s: Vec<BsonUuid>,
}

impl BodiesDoc {
    /// Bodies of `user`; at least one, in ascending seq.
    ///
    /// # Errors
    /// When one is damaged.
    pub(super) fn new(user: &str, messages: Vec<MessageDoc>) -> Result<Self, StoreError> {
        let first = messages.first().map_or(0, MessageDoc::seq);
        let last = messages.last().map_or(0, MessageDoc::seq);
        let mut earliest = None;
        for message in &messages {
            earliest = due::earliest(earliest, Some(message.header()?.expires_us).filter(|us| *us != 0));
        }
        Ok(Self {
            id: bodies_id(user, first, last),
            u: user.to_owned(),
            f: first.cast_signed(),
            l: last.cast_signed(),
            ids: messages.iter().map(|message| message.i).collect(),
            s: messages.iter().filter_map(|message| message.s).collect(),
            messages,
            e: earliest.map(u64::cast_signed),
            h: earliest.map(|_| user_hash(user)),
        })
    }
}

/// Selects the documents beside an inbox that may hold a body of `from..=to`.
pub(super) fn bodies_between(user: &str, from: u64, to: u64) -> Document {
    let begin = from.saturating_sub(MAX_SPAN - 1);
    doc! {
        "_id": { "$gte": bodies_id(user, begin, 0), "$lte": bodies_id(user, to, u64::MAX) },
        "u": user,
        "l": { "$gte": from.cast_signed() },
    }
}

/// Receipts or bodies beside an inbox, as a look-up by message id finds them.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct BesideDoc {
    pub(super) messages: Vec<MessageDoc>,
    pub(super) receipts: Vec<ReceiptDoc>,
}
