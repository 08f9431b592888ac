//! One write transaction: applies operations to the tables, with each inbox's record held in memory until the
//! transaction is committed.

use std::collections::HashMap;

use prost::Message as _;
use redb::{ReadableTable, Table, WriteTransaction};
use sanjay_proto::client::v1::InboxMessage;

use super::tables::{self, DedupeRecord, InboxRecord, ReceiptRecord};
use crate::{
    message::State,
    store::{
        Acked, AppendError, Appended, DueInbox, FIRST_DUE, MAX_REPORTED, NewMessage, Next, Rearm, Settle,
        SettledMessage, epoch::epoch,
    },
};

/// An inbox in memory.
struct Cached {
    record: InboxRecord,
    /// What the due table holds for it.
    due_us: u64,
    changed: bool,
}

/// The tables of one write transaction.
pub(super) struct Tables<'txn> {
    inboxes: Table<'txn, &'static str, &'static [u8]>,
    bodies: Table<'txn, (&'static str, u64), &'static [u8]>,
    receipts: Table<'txn, (&'static str, u128), &'static [u8]>,
    settled_at: Table<'txn, (u64, &'static str, u128), ()>,
    dedupe: Table<'txn, (&'static str, &'static str, &'static str), &'static [u8]>,
    deduped_at: Table<'txn, (u64, &'static str, &'static str, &'static str), ()>,
    due: Table<'txn, (u64, &'static str), ()>,
    cache: HashMap<String, Cached>,
    store_id: u64,
    max_unsettled: u64,
    now_us: u64,
    /// Whether something was done that must be durable before it is answered.
    pub(super) must_sync: bool,
}

impl<'txn> Tables<'txn> {
    /// Opens, and in a new file creates, the tables.
    pub(super) fn open(
        txn: &'txn WriteTransaction,
        store_id: u64,
        max_unsettled: u64,
        now_us: u64,
    ) -> Result<Self, redb::Error> {
        Ok(Self {
            inboxes: txn.open_table(tables::INBOXES)?,
            bodies: txn.open_table(tables::BODIES)?,
            receipts: txn.open_table(tables::RECEIPTS)?,
            settled_at: txn.open_table(tables::SETTLED_AT)?,
            dedupe: txn.open_table(tables::DEDUPE)?,
            deduped_at: txn.open_table(tables::DEDUPED_AT)?,
            due: txn.open_table(tables::DUE)?,
            cache: HashMap::new(),
            store_id,
            max_unsettled,
            now_us,
            must_sync: false,
        })
    }

    /// Writes the changed inboxes.
    pub(super) fn finish(mut self) -> Result<bool, redb::Error> {
        for (user, inbox) in self.cache.drain().filter(|(_, inbox)| inbox.changed) {
            self.inboxes.insert(user.as_str(), inbox.record.encode_to_vec().as_slice())?;
            if inbox.due_us != inbox.record.due_us {
                if inbox.due_us != 0 {
                    self.due.remove((inbox.due_us, user.as_str()))?;
                }
                if inbox.record.due_us != 0 {
                    self.due.insert((inbox.record.due_us, user.as_str()), ())?;
                }
            }
        }
        Ok(self.must_sync)
    }

    fn inbox(&mut self, user: &str) -> Result<&mut Cached, redb::Error> {
        // Two look-ups: the borrow checker does not accept an early return of the first.
        if !self.cache.contains_key(user) {
            let record = match self.inboxes.get(user)? {
                Some(bytes) => tables::decode("inboxes", bytes.value())?,
                None => InboxRecord { epoch: epoch(self.store_id, user), ..InboxRecord::default() },
            };
            let cached = Cached { due_us: record.due_us, record, changed: false };
            self.cache.insert(user.to_owned(), cached);
        }
        Ok(self.cache.get_mut(user).expect("inserted above"))
    }

    /// Puts one message into its inbox.
    pub(super) fn append(
        &mut self,
        message: &NewMessage,
    ) -> Result<Result<Appended, AppendError>, redb::Error> {
        let sha256 = (!message.dedupe_key.is_empty()).then(|| payload_sha256(message));
        if let Some(sha256) = &sha256
            && let Some(first) = self.first_answer(message, sha256)?
        {
            return Ok(first);
        }
        let (max_unsettled, due_us) = (self.max_unsettled, self.now_us + FIRST_DUE.as_micros() as u64);
        let inbox = self.inbox(&message.user)?;
        let unsettled = inbox.record.unsettled();
        if unsettled >= max_unsettled {
            return Ok(Err(AppendError::QueueFull { unsettled }));
        }
        inbox.record.head += 1;
        inbox.record.armed += 1;
        if inbox.record.due_us == 0 || inbox.record.due_us > due_us {
            (inbox.record.due_us, inbox.record.attempt) = (due_us, 0);
        }
        inbox.changed = true;
        let (seq, epoch) = (inbox.record.head, inbox.record.epoch);
        self.insert_message(message, seq)?;
        if let Some(sha256) = sha256 {
            let record = DedupeRecord {
                payload_sha256: sha256,
                seq,
                message_id: message.message_id.as_bytes().to_vec(),
                time_us: message.time_us,
                epoch,
            };
            let (caller, user, key) =
                (message.caller.as_str(), message.user.as_str(), message.dedupe_key.as_str());
            self.dedupe.insert((caller, user, key), record.encode_to_vec().as_slice())?;
            self.deduped_at.insert((message.time_us, caller, user, key), ())?;
        }
        self.must_sync = true;
        let (message_id, time_us) = (message.message_id, message.time_us);
        Ok(Ok(Appended { seq, message_id, epoch, duplicate: false, time_us }))
    }

    fn insert_message(&mut self, message: &NewMessage, seq: u64) -> Result<(), redb::Error> {
        let body = InboxMessage {
            seq,
            message_id: message.message_id.as_bytes().to_vec().into(),
            payload: Some((*message.payload).clone()),
            time_us: message.time_us,
            delivery: 1,
            trace: message.trace.clone(),
        };
        self.bodies.insert((message.user.as_str(), seq), body.encode_to_vec().as_slice())?;
        let receipt = ReceiptRecord {
            seq,
            state: State::Accepted.number(),
            accepted_us: message.time_us,
            settled_us: 0,
            caller: message.caller.clone(),
        };
        let key = (message.user.as_str(), message.message_id.as_u128());
        self.receipts.insert(key, receipt.encode_to_vec().as_slice())?;
        Ok(())
    }

    /// What an earlier message with the same dedupe key got, when there is one within the window.
    fn first_answer(
        &self,
        message: &NewMessage,
        sha256: &[u8],
    ) -> Result<Option<Result<Appended, AppendError>>, redb::Error> {
        let key = (message.caller.as_str(), message.user.as_str(), message.dedupe_key.as_str());
        let Some(bytes) = self.dedupe.get(key)? else { return Ok(None) };
        let record: DedupeRecord = tables::decode("dedupe", bytes.value())?;
        if record.time_us < tables::dedupe_cutoff(message.time_us) {
            return Ok(None);
        }
        if record.payload_sha256 != sha256 {
            return Ok(Some(Err(AppendError::AlreadyExists { key: message.dedupe_key.clone() })));
        }
        Ok(Some(Ok(Appended {
            seq: record.seq,
            message_id: tables::message_id(&record.message_id)?,
            epoch: record.epoch,
            duplicate: true,
            time_us: record.time_us,
        })))
    }

    /// Settles messages of one inbox and notes what was written.
    pub(super) fn ack(&mut self, settle: &Settle) -> Result<Acked, redb::Error> {
        let inbox = self.inbox(&settle.user)?;
        if inbox.record.epoch != settle.epoch {
            return Ok(Acked { mark: inbox.record.mark, ..Acked::default() });
        }
        let head = inbox.record.head;
        let written = settle.written.min(head);
        if written > inbox.record.written {
            (inbox.record.written, inbox.changed) = (written, true);
        }
        let mut settled = inbox.record.settled();
        // In ascending order, what moves the mark comes before what needs a range of its own.
        let mut ranges: Vec<_> = settle.ranges.iter().map(|range| (range.from, range.to.min(head))).collect();
        ranges.sort_unstable();
        let mut acked = Acked::default();
        let mut fresh = Vec::new();
        for (from, to) in ranges {
            match settled.settle(from, to) {
                Ok(parts) => fresh.extend(parts),
                Err(_) => acked.refused += 1,
            }
        }
        let mut count = 0;
        for (from, to) in fresh {
            count += self.remove_bodies(&settle.user, from, to, &mut acked.messages)?;
        }
        let inbox = self.inbox(&settle.user)?;
        if count > 0 {
            inbox.record.set_settled(&settled);
            inbox.record.acked += count;
        }
        inbox.changed |= count > 0;
        inbox.record.disarm_when_done();
        acked.mark = inbox.record.mark;
        self.must_sync |= count > 0;
        Ok(acked)
    }

    /// Removes bodies, completes their receipts and returns how many there were.
    fn remove_bodies(
        &mut self,
        user: &str,
        from: u64,
        to: u64,
        report: &mut Vec<SettledMessage>,
    ) -> Result<u64, redb::Error> {
        let mut count = 0;
        for entry in self.bodies.extract_from_if((user, from)..=(user, to), |_, _| true)? {
            let (_, bytes) = entry?;
            let body: InboxMessage = tables::decode("bodies", bytes.value())?;
            let message_id = tables::message_id(&body.message_id)?;
            let key = (user, message_id.as_u128());
            let mut receipt: ReceiptRecord = match self.receipts.get(key)? {
                Some(bytes) => tables::decode("receipts", bytes.value())?,
                None => {
                    ReceiptRecord { seq: body.seq, accepted_us: body.time_us, ..ReceiptRecord::default() }
                }
            };
            receipt.state = State::Acked.number();
            receipt.settled_us = self.now_us;
            self.receipts.insert(key, receipt.encode_to_vec().as_slice())?;
            self.settled_at.insert((self.now_us, user, message_id.as_u128()), ())?;
            count += 1;
            if report.len() < MAX_REPORTED {
                let accepted_us = receipt.accepted_us;
                report.push(SettledMessage { seq: body.seq, message_id, accepted_us, trace: body.trace });
            }
        }
        Ok(count)
    }

    /// Arms inboxes that hold unwritten messages and are not armed.
    pub(super) fn arm(&mut self, users: &[String]) -> Result<(), redb::Error> {
        let due_us = self.now_us + FIRST_DUE.as_micros() as u64;
        for user in users {
            let inbox = self.inbox(user)?;
            if inbox.record.done() < inbox.record.head {
                inbox.record.armed += 1;
                if inbox.record.due_us == 0 {
                    (inbox.record.due_us, inbox.record.attempt) = (due_us, 0);
                }
                inbox.changed = true;
            }
        }
        Ok(())
    }

    /// Claims inboxes that are due.
    pub(super) fn claim_due(
        &mut self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> Result<Vec<DueInbox>, redb::Error> {
        let mut users = Vec::new();
        for entry in self.due.range((0, "")..(now_us.saturating_add(1), ""))?.take(limit) {
            users.push(entry?.0.value().1.to_owned());
        }
        let mut claimed = Vec::with_capacity(users.len());
        for user in users {
            let inbox = self.inbox(&user)?;
            // An operation before this one in the same transaction may have moved it.
            if inbox.record.due_us == 0 || inbox.record.due_us > now_us {
                continue;
            }
            inbox.record.disarm_when_done();
            inbox.changed = true;
            if inbox.record.due_us != 0 {
                inbox.record.due_us = until_us;
                let InboxRecord { epoch, armed, attempt, .. } = inbox.record;
                claimed.push(DueInbox { user, epoch, armed, attempt, after: inbox.record.done() });
            }
        }
        Ok(claimed)
    }

    /// Says what follows for claimed inboxes.
    pub(super) fn rearm(&mut self, rearms: &[Rearm]) -> Result<(), redb::Error> {
        for rearm in rearms {
            let inbox = self.inbox(&rearm.user)?;
            if inbox.record.armed != rearm.armed {
                // Armed afresh since the claim, which left it due at the claim's end; the newer message must
                // not wait for that.
                let first_due = self.now_us + FIRST_DUE.as_micros() as u64;
                let inbox = self.inbox(&rearm.user)?;
                if inbox.record.due_us > first_due {
                    (inbox.record.due_us, inbox.record.attempt, inbox.changed) = (first_due, 0, true);
                }
                continue;
            }
            (inbox.record.due_us, inbox.record.attempt) = match rearm.next {
                Next::At { due_us, attempt } => (due_us, attempt),
                Next::Parked => (0, 0),
            };
            inbox.record.disarm_when_done();
            inbox.changed = true;
        }
        Ok(())
    }

    /// Removes receipts and dedupe keys that are past their time.
    pub(super) fn sweep(&mut self, now_us: u64, limit: usize) -> Result<usize, redb::Error> {
        let mut removed = 0;
        let until = (tables::receipt_cutoff(now_us), "", 0);
        for entry in self.settled_at.extract_from_if((0, "", 0)..until, |_, ()| true)?.take(limit) {
            let (key, _) = entry?;
            let (_, user, message_id) = key.value();
            self.receipts.remove((user, message_id))?;
            removed += 1;
        }
        let until = (tables::dedupe_cutoff(now_us), "", "", "");
        for entry in
            self.deduped_at.extract_from_if((0, "", "", "")..until, |_, ()| true)?.take(limit - removed)
        {
            let (key, _) = entry?;
            let (time_us, caller, user, key) = key.value();
            // A key that was used again after its window has a newer record, which stays.
            let same = match self.dedupe.get((caller, user, key))? {
                Some(bytes) => tables::decode::<DedupeRecord>("dedupe", bytes.value())?.time_us == time_us,
                None => false,
            };
            if same {
                self.dedupe.remove((caller, user, key))?;
            }
            removed += 1;
        }
        Ok(removed)
    }
}

/// Identity of a payload under a dedupe key.
fn payload_sha256(message: &NewMessage) -> Vec<u8> {
    ring::digest::digest(&ring::digest::SHA256, &message.payload.encode_to_vec()).as_ref().to_vec()
}
