//! One write transaction: applies operations to the tables, with each inbox's record held in memory until the
//! transaction is committed.

use std::collections::HashMap;

use prost::Message as _;
use redb::{ReadableTable, Table, WriteTransaction};
use sanjay_proto::client::v1::InboxMessage;
use sanjay_runtime::random::SharedRandom;

use super::{
    devices::fresh,
    fanout::FanOutTables,
    receipts::Log,
    revocations::RevocationTables,
    room::Quotas,
    tables::{self, BodyExtra, DedupeRecord, InboxRecord, ReceiptRecord},
};
use crate::{
    message::State,
    store::{
        Acked, AppendError, Appended, Attempts, DeadReason, DueInbox, FIRST_DUE, LoggedReceipt, MAX_REPORTED,
        NewMessage, Rearm, Settle, SettledMessage, due, epoch::epoch,
    },
};

/// An inbox in memory.
pub(super) struct Cached {
    pub(super) record: InboxRecord,
    /// What the due table holds for it.
    due_us: u64,
    /// And the table of when devices were seen.
    seen_us: u64,
    pub(super) changed: bool,
}

/// What a transaction goes by.
pub(super) struct Rules {
    pub(super) store_id: u64,
    pub(super) quotas: Quotas,
    pub(super) keep_expired: bool,
    pub(super) max_attempts: u32,
    pub(super) now_us: u64,
    pub(super) random: SharedRandom,
    /// Whether somebody hears of what is settled, and of inboxes that are filling.
    pub(super) watched: bool,
}

/// What becomes of messages that are settled.
pub(super) struct Ended<'a> {
    /// As what they are settled, those that are dying apart.
    how: State,
    /// How many there are of these, and how many are dead.
    pub(super) count: u64,
    pub(super) dead: u64,
    /// Bytes of their payloads, and how many collapse keys have no message any more.
    bytes: u64,
    keys: u64,
    /// Of the inbox; what is settled leaves it.
    pub(super) attempts: Attempts,
    /// Where those that were acked are named.
    report: Option<&'a mut Vec<SettledMessage>>,
}

impl Ended<'_> {
    pub(super) fn new(how: State, attempts: Attempts) -> Self {
        Self { how, count: 0, dead: 0, bytes: 0, keys: 0, attempts, report: None }
    }

    /// Notes in an inbox's record what was settled in it.
    pub(super) fn note(&self, record: &mut InboxRecord) {
        match self.how {
            State::Expired => record.expired += self.count,
            State::Superseded => record.superseded += self.count,
            State::Acked | State::Scheduled | State::Accepted | State::Dead => record.acked += self.count,
        }
        record.dead += self.dead;
        record.bytes = record.bytes.saturating_sub(self.bytes);
        record.collapsing = record.collapsing.saturating_sub(self.keys);
    }
}

/// The tables of one write transaction.
pub(super) struct Tables<'txn> {
    inboxes: Table<'txn, &'static str, &'static [u8]>,
    pub(super) bodies: Table<'txn, (&'static str, u64), &'static [u8]>,
    pub(super) receipts: Table<'txn, (&'static str, u128), &'static [u8]>,
    settled_at: Table<'txn, (u64, &'static str, u128), ()>,
    dedupe: Table<'txn, (&'static str, &'static str, &'static str), &'static [u8]>,
    deduped_at: Table<'txn, (u64, &'static str, &'static str, &'static str), ()>,
    due: Table<'txn, (u64, &'static str), ()>,
    pub(super) dead: Table<'txn, (&'static str, u128), &'static [u8]>,
    pub(super) dead_bodies: Table<'txn, (&'static str, u128), &'static [u8]>,
    pub(super) dead_at: Table<'txn, (u64, u128, &'static str), ()>,
    pub(super) dead_of: Table<'txn, (&'static str, u64, u128), ()>,
    pub(super) expires: Table<'txn, (u64, &'static str, u64), ()>,
    pub(super) collapse: Table<'txn, (&'static str, &'static str, &'static str), u64>,
    pub(super) scheduled: Table<'txn, (&'static str, u128), &'static [u8]>,
    pub(super) scheduled_due: Table<'txn, (&'static str, u128), u64>,
    pub(super) scheduled_at: Table<'txn, (u64, &'static str, u128), ()>,
    pub(super) log: Log<'txn>,
    pub(super) fan_out: FanOutTables<'txn>,
    pub(super) revocations: RevocationTables<'txn>,
    pub(super) seen: Table<'txn, (u64, &'static str), ()>,
    cache: HashMap<String, Cached>,
    /// How many messages are scheduled, of users of whom that was asked.
    pub(super) waiting: HashMap<String, usize>,
    pub(super) rules: Rules,
    /// Whether something was done that must be durable before it is answered.
    pub(super) must_sync: bool,
    /// For the sink.
    pub(super) told: Told,
}

/// What became of messages without anybody asking.
#[derive(Default)]
pub(super) struct Told {
    /// Settled as expired or superseded: whose they were, and as what.
    pub(super) ended: Vec<(String, SettledMessage, State)>,
    /// How many became dead letters, and why.
    pub(super) died: Vec<(DeadReason, usize)>,
    /// Settled in any way; empty when nobody watches.
    pub(super) settled: Vec<LoggedReceipt>,
    /// Inboxes that are filling, with what they hold; likewise.
    pub(super) filling: Vec<(String, u64, u64)>,
    /// The place in the log of receipts that the next one gets; `None` when none was added.
    pub(super) next_receipt: Option<u64>,
    /// Settled without an ack: whose they were, and their seq.
    pub(super) gone: Vec<(String, u64)>,
}

impl<'txn> Tables<'txn> {
    /// Opens the tables.
    pub(super) fn open(txn: &'txn WriteTransaction, rules: Rules) -> Result<Self, redb::Error> {
        Ok(Self {
            inboxes: txn.open_table(tables::INBOXES)?,
            bodies: txn.open_table(tables::BODIES)?,
            receipts: txn.open_table(tables::RECEIPTS)?,
            settled_at: txn.open_table(tables::SETTLED_AT)?,
            dedupe: txn.open_table(tables::DEDUPE)?,
            deduped_at: txn.open_table(tables::DEDUPED_AT)?,
            due: txn.open_table(tables::DUE)?,
            dead: txn.open_table(tables::DEAD)?,
            dead_bodies: txn.open_table(tables::DEAD_BODIES)?,
            dead_at: txn.open_table(tables::DEAD_AT)?,
            dead_of: txn.open_table(tables::DEAD_OF)?,
            expires: txn.open_table(tables::EXPIRES)?,
            collapse: txn.open_table(tables::COLLAPSE)?,
            scheduled: txn.open_table(tables::SCHEDULED)?,
            scheduled_due: txn.open_table(tables::SCHEDULED_DUE)?,
            scheduled_at: txn.open_table(tables::SCHEDULED_AT)?,
            log: Log::open(txn)?,
            fan_out: FanOutTables::open(txn)?,
            revocations: RevocationTables::open(txn)?,
            seen: txn.open_table(tables::SEEN)?,
            cache: HashMap::new(),
            waiting: HashMap::new(),
            rules,
            must_sync: false,
            told: Told::default(),
        })
    }

    /// Writes the changed inboxes. Returns whether the transaction must be durable, and what the sink is told.
    pub(super) fn finish(mut self) -> Result<(bool, Told), redb::Error> {
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
            if inbox.seen_us != inbox.record.seen_us {
                if inbox.seen_us != 0 {
                    self.seen.remove((inbox.seen_us, user.as_str()))?;
                }
                if inbox.record.seen_us != 0 {
                    self.seen.insert((inbox.record.seen_us, user.as_str()), ())?;
                }
            }
        }
        self.told.next_receipt = self.log.finish()?;
        Ok((self.must_sync, self.told))
    }

    pub(super) fn inbox(&mut self, user: &str) -> Result<&mut Cached, redb::Error> {
        // Two look-ups: the borrow checker does not accept an early return of the first.
        if !self.cache.contains_key(user) {
            let record = match self.inboxes.get(user)? {
                Some(bytes) => tables::decode("inboxes", bytes.value())?,
                None => InboxRecord { epoch: epoch(self.rules.store_id, user), ..InboxRecord::default() },
            };
            let cached = Cached { due_us: record.due_us, seen_us: record.seen_us, record, changed: false };
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
        let size = message.payload.encoded_len() as u64;
        if let Err(full) = self.make_room(message, size)? {
            if message.shared.is_none() {
                return Ok(Err(full));
            }
            if let Some(appended) = self.append_dead(message, size)? {
                return Ok(Ok(appended));
            }
        }
        let due_us = self.rules.now_us + FIRST_DUE.as_micros() as u64;
        let inbox = self.inbox(&message.user)?;
        inbox.record.head += 1;
        inbox.record.armed += 1;
        if inbox.record.due_us == 0 || inbox.record.due_us > due_us {
            (inbox.record.due_us, inbox.record.attempt) = (due_us, 0);
        }
        inbox.record.bytes += size;
        inbox.changed = true;
        let (seq, epoch) = (inbox.record.head, inbox.record.epoch);
        self.note_filling(&message.user, size)?;
        self.insert_message(message, seq, size)?;
        self.note_keys(message, seq)?;
        if let Some(sha256) = sha256 {
            self.insert_dedupe(message, sha256, seq, epoch)?;
        }
        self.must_sync = true;
        let (message_id, time_us) = (message.message_id, message.time_us);
        Ok(Ok(Appended { seq, message_id, epoch, duplicate: false, time_us }))
    }

    /// Keeps the answer under a message's dedupe key.
    pub(super) fn insert_dedupe(
        &mut self,
        message: &NewMessage,
        payload_sha256: Vec<u8>,
        seq: u64,
        epoch: u64,
    ) -> Result<(), redb::Error> {
        let record = DedupeRecord {
            payload_sha256,
            seq,
            message_id: message.message_id.as_bytes().to_vec(),
            time_us: message.time_us,
            epoch,
        };
        let (caller, user, key) =
            (message.caller.as_str(), message.user.as_str(), message.dedupe_key.as_str());
        self.dedupe.insert((caller, user, key), record.encode_to_vec().as_slice())?;
        self.deduped_at.insert((message.time_us, caller, user, key), ())?;
        Ok(())
    }

    pub(super) fn insert_message(
        &mut self,
        message: &NewMessage,
        seq: u64,
        size: u64,
    ) -> Result<(), redb::Error> {
        let payload = message.shared.is_none().then(|| (*message.payload).clone());
        let body = InboxMessage {
            seq,
            message_id: message.message_id.as_bytes().to_vec().into(),
            payload,
            time_us: message.time_us,
            delivery: 1,
            trace: message.trace.clone(),
        };
        let mut bytes = body.encode_to_vec();
        let extra = BodyExtra {
            expires_us: message.expires_us,
            collapse_key: message.collapse_key.clone(),
            payload_bytes: size,
            shared: message.shared.map(|id| id.as_bytes().to_vec()).unwrap_or_default(),
        };
        if let Some(id) = message.shared {
            self.fan_out.hold(id)?;
        }
        bytes.extend(extra.encode_to_vec());
        self.bodies.insert((message.user.as_str(), seq), bytes.as_slice())?;
        self.insert_receipt(message, seq, State::Accepted)
    }

    /// Begins the record of a message's life, or goes on with it.
    pub(super) fn insert_receipt(
        &mut self,
        message: &NewMessage,
        seq: u64,
        state: State,
    ) -> Result<(), redb::Error> {
        let receipt = ReceiptRecord {
            seq,
            state: state.number(),
            accepted_us: message.time_us,
            settled_us: 0,
            caller: message.caller.clone(),
            reason: 0,
        };
        let key = (message.user.as_str(), message.message_id.as_u128());
        self.receipts.insert(key, receipt.encode_to_vec().as_slice())?;
        Ok(())
    }

    /// What an earlier message with the same dedupe key got, when there is one within the window.
    pub(super) fn first_answer(
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

    /// Settles messages of one inbox and notes what was written and what failed.
    pub(super) fn ack(&mut self, settle: &Settle) -> Result<Acked, redb::Error> {
        let inbox = self.inbox(&settle.user)?;
        if inbox.record.epoch != settle.epoch {
            return Ok(Acked { mark: inbox.record.mark, ..Acked::default() });
        }
        let head = inbox.record.head;
        let by_device = match &settle.device {
            None => None,
            Some(device) => match self.ack_by_device(settle, device)? {
                Some(by_device) => Some(by_device),
                None => return Ok(Acked { mark: self.inbox(&settle.user)?.record.mark, ..Acked::default() }),
            },
        };
        let inbox = self.inbox(&settle.user)?;
        let written = settle.written.min(head);
        if written > inbox.record.written && by_device.is_none() {
            (inbox.record.written, inbox.changed) = (written, true);
        }
        let attempts = inbox.record.attempts()?;
        let mut settled = inbox.record.settled();
        let mut acked = Acked::default();
        let fresh = match &by_device {
            Some(by_device) => {
                acked.refused = by_device.refused;
                fresh(&mut settled, &by_device.ranges).0
            }
            None => {
                let ranges = settle.ranges.iter().map(|range| (range.from, range.to.min(head)));
                let mut ranges: Vec<_> = ranges.collect();
                // In ascending order, what moves the mark comes before what needs a range of its own.
                ranges.sort_unstable();
                let fresh = fresh(&mut settled, &ranges);
                acked.refused = fresh.1;
                fresh.0
            }
        };
        let mut ended = Ended { report: Some(&mut acked.messages), ..Ended::new(State::Acked, attempts) };
        for (from, to) in fresh {
            self.remove_bodies(&settle.user, from, to, &mut ended)?;
        }
        let inbox = self.inbox(&settle.user)?;
        if ended.count + ended.dead > 0 {
            inbox.record.set_settled(&settled);
            ended.note(&mut inbox.record);
            inbox.record.attempts = ended.attempts.encode();
            inbox.changed = true;
            self.must_sync = true;
        }
        let attempts = ended.attempts;
        let report = by_device.as_ref().and_then(|by_device| by_device.report.as_ref());
        acked.failed = self.note_attempts(report.unwrap_or(settle), attempts)?;
        let inbox = self.inbox(&settle.user)?;
        inbox.record.disarm_when_done()?;
        acked.mark = inbox.record.mark;
        Ok(acked)
    }

    /// Removes bodies and completes their receipts. Those of dying messages become dead letters.
    pub(super) fn remove_bodies(
        &mut self,
        user: &str,
        from: u64,
        to: u64,
        ended: &mut Ended<'_>,
    ) -> Result<(), redb::Error> {
        let mut removed = Vec::new();
        for entry in self.bodies.extract_from_if((user, from)..=(user, to), |_, _| true)? {
            let (_, bytes) = entry?;
            let body: InboxMessage = tables::decode("bodies", bytes.value())?;
            removed.push((body, tables::decode::<BodyExtra>("bodies", bytes.value())?));
        }
        for (mut body, extra) in removed {
            let message_id = tables::message_id(&body.message_id)?;
            let key = (user, message_id.as_u128());
            let mut receipt: ReceiptRecord = match self.receipts.get(key)? {
                Some(bytes) => tables::decode("receipts", bytes.value())?,
                None => {
                    ReceiptRecord { seq: body.seq, accepted_us: body.time_us, ..ReceiptRecord::default() }
                }
            };
            let death = ended.attempts.death(body.seq);
            let dies = death.is_some();
            if !extra.shared.is_empty() {
                let shared = tables::message_id(&extra.shared)?;
                if dies {
                    body.payload = Some(self.fan_out.payload(shared)?);
                }
                self.fan_out.release(shared)?;
            }
            receipt.state = if dies { State::Dead } else { ended.how }.number();
            receipt.reason = death.map_or(0, |(reason, _)| reason.number());
            receipt.settled_us = self.rules.now_us;
            self.receipts.insert(key, receipt.encode_to_vec().as_slice())?;
            self.log_receipt(user, message_id, &receipt)?;
            self.settled_at.insert((self.rules.now_us, user, message_id.as_u128()), ())?;
            ended.bytes += extra.payload_bytes;
            ended.keys += u64::from(self.forget_keys(user, &receipt.caller, body.seq, &extra)?);
            if dies {
                self.insert_letter(user, &body, &receipt.caller, &ended.attempts)?;
                ended.dead += 1;
                self.told.gone.push((user.to_owned(), body.seq));
                continue;
            }
            ended.count += 1;
            let InboxMessage { seq, trace, .. } = body;
            let settled = SettledMessage { seq, message_id, accepted_us: receipt.accepted_us, trace };
            match &mut ended.report {
                Some(report) if report.len() < MAX_REPORTED => report.push(settled),
                Some(_) => {}
                None => {
                    self.told.gone.push((user.to_owned(), seq));
                    self.told.ended.push((user.to_owned(), settled, ended.how));
                }
            }
        }
        ended.attempts.settle(from, to);
        Ok(())
    }

    /// Arms inboxes that hold unwritten messages and are not armed.
    pub(super) fn arm(&mut self, users: &[String]) -> Result<(), redb::Error> {
        let due_us = self.rules.now_us + FIRST_DUE.as_micros() as u64;
        for user in users {
            let inbox = self.inbox(user)?;
            if inbox.record.has_unwritten() {
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
            // What a crash or a lack of room left dying is settled now.
            self.bury(&user)?;
            let inbox = self.inbox(&user)?;
            // An operation before this one in the same transaction may have moved it.
            if inbox.record.due_us == 0 || inbox.record.due_us > now_us {
                continue;
            }
            let mut attempts = inbox.record.attempts()?;
            let claim = due::claim(&mut attempts, inbox.record.has_unwritten(), now_us, until_us);
            inbox.record.attempts = attempts.encode();
            inbox.record.due_us = claim.due_us.unwrap_or(0);
            inbox.changed = true;
            if claim.relay {
                let (after, retries) = (inbox.record.done(), claim.retries);
                let InboxRecord { epoch, armed, attempt, head, .. } = inbox.record;
                let missed = inbox.record.devices()?.has_written(head);
                claimed.push(DueInbox { user, epoch, armed, attempt, after, retries, missed });
            } else {
                inbox.record.disarm_when_done()?;
            }
        }
        Ok(claimed)
    }

    /// Says what follows for claimed inboxes.
    pub(super) fn rearm(&mut self, rearms: &[Rearm]) -> Result<(), redb::Error> {
        for rearm in rearms {
            let first_due = self.rules.now_us + FIRST_DUE.as_micros() as u64;
            let inbox = self.inbox(&rearm.user)?;
            if inbox.record.armed != rearm.armed {
                // Armed afresh since the claim, which left it due at the claim's end; the newer message must
                // not wait for that.
                if inbox.record.due_us > first_due {
                    (inbox.record.due_us, inbox.record.attempt, inbox.changed) = (first_due, 0, true);
                }
                continue;
            }
            let mut attempts = inbox.record.attempts()?;
            let (due_us, attempt) = due::rearm(&mut attempts, inbox.record.has_unwritten(), rearm.next);
            inbox.record.attempts = attempts.encode();
            (inbox.record.due_us, inbox.record.attempt) = (due_us.unwrap_or(0), attempt);
            inbox.record.disarm_when_done()?;
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
        // As many as there are receipts, so they keep step, and are not counted.
        self.log.sweep(tables::receipt_cutoff(now_us), limit)?;
        self.revocations.sweep(now_us, limit)?;
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
pub(super) fn payload_sha256(message: &NewMessage) -> Vec<u8> {
    ring::digest::digest(&ring::digest::SHA256, &message.payload.encode_to_vec()).as_ref().to_vec()
}
