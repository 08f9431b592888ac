//! What a lane knows of an inbox: enough to write to it without reading it first. The condition of each write says
//! whether it still holds.

use std::collections::{BTreeMap, BTreeSet};

use mongodb::bson::Uuid as BsonUuid;
use uuid::Uuid;

use super::documents::{CollapseDoc, InboxDoc, KeyDoc, MessageDoc, SettlerDoc, WriterDoc, id};
use crate::store::{Attempts, Devices, NewMessage, Settled, SettledMessage, StoreError, epoch::epoch};

/// An unsettled message without its body.
#[derive(Debug, Clone)]
pub(super) struct Open {
    pub(super) seq: u64,
    pub(super) id: BsonUuid,
    pub(super) time_us: u64,
    pub(super) caller: String,
    pub(super) trace: String,
    /// Length of the payload.
    pub(super) bytes: usize,
    /// Unix time in microseconds; 0 for never.
    pub(super) expires_us: u64,
    /// The durable publication whose payload it shares.
    pub(super) shared: Option<BsonUuid>,
}

impl Open {
    pub(super) fn new(message: &MessageDoc) -> Result<Self, StoreError> {
        let header = message.header()?;
        Ok(Self {
            seq: message.seq(),
            id: message.i,
            time_us: header.time_us,
            caller: header.caller,
            trace: header.trace,
            bytes: usize::try_from(header.bytes).unwrap_or(usize::MAX),
            expires_us: header.expires_us,
            shared: message.s,
        })
    }

    /// A message that was just put at `seq`.
    pub(super) fn appended(message: &NewMessage, seq: u64) -> Self {
        Self {
            seq,
            id: id(message.message_id),
            time_us: message.time_us,
            caller: message.caller.clone(),
            trace: message.trace.clone(),
            bytes: prost::Message::encoded_len(&*message.payload),
            expires_us: message.expires_us,
            shared: message.shared.map(id),
        }
    }

    /// What is told of it when it is settled.
    pub(super) fn settled(&self) -> SettledMessage {
        SettledMessage {
            seq: self.seq,
            message_id: Uuid::from_bytes(self.id.bytes()),
            accepted_us: self.time_us,
            trace: self.trace.clone(),
        }
    }
}

/// An inbox as it was last seen, with what this node wrote since.
#[derive(Debug)]
pub(super) struct Inbox {
    /// Whether there is a document.
    pub(super) exists: bool,
    pub(super) epoch: u64,
    pub(super) head: u64,
    pub(super) settled: Settled,
    pub(super) settles: i64,
    /// How many messages are settled.
    pub(super) terminal: u64,
    pub(super) written: u64,
    pub(super) spilled: u64,
    /// The messages in the document, in ascending seq.
    pub(super) open: Vec<Open>,
    /// How many receipts are in the document.
    pub(super) receipts: usize,
    /// The dedupe keys in the document.
    pub(super) keys: Vec<KeyDoc>,
    pub(super) writers: BTreeMap<String, WriterDoc>,
    pub(super) settler: Option<SettlerDoc>,
    /// Bytes of the payloads of what is neither settled nor dying, as stored: it may be below 0.
    pub(super) held_bytes: i64,
    /// Messages with a collapse key, in ascending seq; some may be settled.
    pub(super) collapse: Vec<CollapseDoc>,
    /// No message in the document expires before it; 0 when none does.
    pub(super) expires_us: u64,
    /// Changes with each key of a scheduled message.
    pub(super) plans: i64,
    /// Messages beside the document, as far as somebody asked for them; for one round.
    pub(super) beside: BTreeMap<u64, Open>,
    /// Which seqs were asked for, as ranges.
    pub(super) looked_beside: Vec<(u64, u64)>,
    /// What failed; changes with `settles`.
    pub(super) attempts: Attempts,
    /// Its devices; change with `settles`.
    pub(super) devices: Devices,
    /// Dying messages whose dead letters are written; for one round.
    pub(super) buried: BTreeSet<u64>,
    /// Whether it was read in this round: what it says is no older than what is asked.
    pub(super) fresh: bool,
    /// Whether another node wrote to it lately, so that it is read before each write.
    pub(super) shared: bool,
    /// Whether it must be read before it is used again.
    pub(super) stale: bool,
}

impl Inbox {
    /// The inbox of a user without one.
    pub(super) fn none(store_id: u64, user: &str) -> Self {
        let epoch = epoch(store_id, user).cast_signed();
        Self {
            exists: false,
            ..Self::with(
                InboxDoc { epoch, ..InboxDoc::default() },
                Vec::new(),
                Attempts::default(),
                Devices::default(),
            )
        }
    }

    /// What was read.
    ///
    /// # Errors
    /// When a message in it is damaged.
    pub(super) fn new(document: InboxDoc) -> Result<Self, StoreError> {
        let open = document.messages.iter().map(Open::new).collect::<Result<_, _>>()?;
        let (attempts, devices) = (document.attempts()?, document.devices()?);
        Ok(Self::with(document, open, attempts, devices))
    }

    fn with(document: InboxDoc, open: Vec<Open>, attempts: Attempts, devices: Devices) -> Self {
        Self {
            exists: true,
            epoch: document.epoch.cast_unsigned(),
            head: document.head(),
            settled: document.settled(),
            settles: document.settles,
            terminal: document.terminal(),
            written: document.written.cast_unsigned(),
            spilled: document.spilled.cast_unsigned(),
            open,
            receipts: document.receipts.len(),
            keys: document.keys,
            writers: document.writers,
            settler: document.settler,
            held_bytes: document.bytes,
            collapse: document.collapse,
            expires_us: document.expires.cast_unsigned(),
            plans: document.plans,
            beside: BTreeMap::new(),
            looked_beside: Vec::new(),
            attempts,
            devices,
            buried: BTreeSet::new(),
            fresh: true,
            shared: false,
            stale: false,
        }
    }

    /// Takes over what was just read. An inbox that nobody else touched is not shared any more.
    pub(super) fn refresh(&mut self, read: Inbox) {
        let touched = self.head != read.head || self.settles != read.settles;
        let shared = self.shared && touched;
        *self = Self { shared, ..read };
    }

    pub(super) fn unsettled(&self) -> u64 {
        self.head.saturating_sub(self.terminal)
    }

    /// Bytes of the payloads in the document.
    pub(super) fn bytes(&self) -> usize {
        self.open.iter().filter(|open| open.shared.is_none()).map(|open| open.bytes).sum()
    }

    /// An unsettled message, in the document or among those read beside it.
    pub(super) fn message(&self, seq: u64) -> Option<&Open> {
        match self.open.binary_search_by_key(&seq, |open| open.seq) {
            Ok(index) => Some(&self.open[index]),
            Err(_) => self.beside.get(&seq),
        }
    }

    /// Whether a seq was looked for beside the document in this round.
    pub(super) fn looked_for(&self, seq: u64) -> bool {
        self.looked_beside.iter().any(|(from, to)| (*from..=*to).contains(&seq))
    }

    /// Unsettled messages that are not dying.
    pub(super) fn held(&self) -> u64 {
        self.unsettled().saturating_sub(self.attempts.dying().count() as u64)
    }

    /// Forgets the collapse keys of what is settled.
    pub(super) fn drop_collapse_keys(&mut self) {
        let settled = &self.settled;
        self.collapse.retain(|entry| !settled.holds(entry.n.cast_unsigned()));
    }

    /// Whether garbage lies beside the document: bodies of messages that are settled by now.
    pub(super) fn has_garbage(&self) -> bool {
        self.spilled > 0 && self.settled.mark() >= self.spilled
    }
}
