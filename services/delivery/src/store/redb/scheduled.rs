//! Messages that wait outside the inbox for their time.

use std::sync::Arc;

use prost::Message as _;
use redb::ReadableTable;
use sanjay_proto::client::v1::Payload;
use uuid::Uuid;

use super::{
    tables::{self, ReceiptRecord, ScheduledRecord},
    transaction::{Tables, payload_sha256},
};
use crate::{
    message::State,
    store::{AppendError, MAX_READ_BYTES, MAX_SCHEDULED, NewMessage, Quota, Scheduled, ScheduledAt},
};

impl Tables<'_> {
    /// Keeps a message until its time.
    pub(super) fn schedule(
        &mut self,
        scheduled: &Scheduled,
    ) -> Result<Result<ScheduledAt, AppendError>, redb::Error> {
        let Scheduled { message, deliver_us } = scheduled;
        let deliver_us = *deliver_us;
        let sha256 = (!message.dedupe_key.is_empty()).then(|| payload_sha256(message));
        if let Some(sha256) = &sha256
            && let Some(first) = self.first_answer(message, sha256)?
        {
            let first = match first {
                Ok(first) => first,
                Err(error) => return Ok(Err(error)),
            };
            let waits = self.scheduled.get((message.user.as_str(), first.message_id.as_u128()))?;
            let deliver_us = match waits {
                Some(bytes) => tables::decode::<ScheduledRecord>("scheduled", bytes.value())?.deliver_us,
                None => 0,
            };
            let (message_id, time_us) = (first.message_id, first.time_us);
            return Ok(Ok(ScheduledAt { message_id, deliver_us, duplicate: true, time_us }));
        }
        let (user, id) = (message.user.as_str(), message.message_id.as_u128());
        let held = match self.waiting.get(user) {
            Some(held) => *held,
            None => self.scheduled_due.range((user, 0)..=(user, u128::MAX))?.count(),
        };
        if held >= MAX_SCHEDULED {
            return Ok(Err(AppendError::QueueFull { quota: Quota::Scheduled, held: held as u64 }));
        }
        let record = ScheduledRecord {
            deliver_us,
            caller: message.caller.clone(),
            payload: message.payload.encode_to_vec(),
            time_us: message.time_us,
            trace: message.trace.clone(),
            expires_us: message.expires_us,
            collapse_key: message.collapse_key.clone(),
        };
        self.scheduled.insert((user, id), record.encode_to_vec().as_slice())?;
        self.hand_out_at(user, id, deliver_us)?;
        self.waiting.insert(user.to_owned(), held + 1);
        self.insert_receipt(message, 0, State::Scheduled)?;
        if let Some(sha256) = sha256 {
            let epoch = self.inbox(user)?.record.epoch;
            self.insert_dedupe(message, sha256, 0, epoch)?;
        }
        self.must_sync = true;
        let (message_id, time_us) = (message.message_id, message.time_us);
        Ok(Ok(ScheduledAt { message_id, deliver_us, duplicate: false, time_us }))
    }

    /// Says when a message is handed out next.
    fn hand_out_at(&mut self, user: &str, id: u128, due_us: u64) -> Result<(), redb::Error> {
        let before = self.scheduled_due.insert((user, id), due_us)?.map(|before| before.value());
        if let Some(before) = before {
            self.scheduled_at.remove((before, user, id))?;
        }
        self.scheduled_at.insert((due_us, user, id), ())?;
        Ok(())
    }

    /// Hands out messages whose time has come, until `until_us`: as many as fit into [`MAX_READ_BYTES`], and at least one.
    pub(super) fn claim_scheduled(
        &mut self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> Result<Vec<Scheduled>, redb::Error> {
        let mut due = Vec::new();
        for entry in self.scheduled_at.range((0, "", 0)..(now_us.saturating_add(1), "", 0))?.take(limit) {
            let (key, _) = entry?;
            let (_, user, id) = key.value();
            due.push((user.to_owned(), id));
        }
        let (mut claimed, mut bytes) = (Vec::with_capacity(due.len()), 0);
        for (user, id) in due {
            let record: ScheduledRecord = match self.scheduled.get((user.as_str(), id))? {
                Some(record) => {
                    bytes += record.value().len();
                    if bytes > MAX_READ_BYTES && !claimed.is_empty() {
                        break;
                    }
                    tables::decode("scheduled", record.value())?
                }
                None => continue,
            };
            self.hand_out_at(&user, id, until_us)?;
            claimed.push(scheduled(user, id, record)?);
        }
        Ok(claimed)
    }

    /// Has messages handed out again at another time; returns how many there were.
    pub(super) fn postpone(
        &mut self,
        messages: &[(String, Uuid)],
        until_us: u64,
    ) -> Result<u64, redb::Error> {
        let mut postponed = 0;
        for (user, id) in messages {
            if self.scheduled_due.get((user.as_str(), id.as_u128()))?.is_some() {
                self.hand_out_at(user, id.as_u128(), until_us)?;
                postponed += 1;
            }
        }
        Ok(postponed)
    }

    /// Forgets scheduled messages; returns how many there were.
    pub(super) fn unschedule(&mut self, messages: &[(String, Uuid)]) -> Result<u64, redb::Error> {
        let mut forgotten = 0;
        for (user, id) in messages {
            let key = (user.as_str(), id.as_u128());
            let Some(due_us) = self.scheduled_due.remove(key)?.map(|due_us| due_us.value()) else {
                continue;
            };
            self.scheduled_at.remove((due_us, key.0, key.1))?;
            self.scheduled.remove(key)?;
            self.waiting.remove(user);
            self.must_sync = true;
            // Unless it was appended, nothing is left of it.
            let waits = match self.receipts.get(key)? {
                Some(bytes) => {
                    let receipt: ReceiptRecord = tables::decode("receipts", bytes.value())?;
                    receipt.state == State::Scheduled.number()
                }
                None => false,
            };
            if waits {
                self.receipts.remove(key)?;
            }
            forgotten += 1;
        }
        Ok(forgotten)
    }
}

fn scheduled(user: String, id: u128, record: ScheduledRecord) -> Result<Scheduled, redb::Error> {
    let ScheduledRecord { deliver_us, caller, payload, time_us, trace, expires_us, collapse_key, .. } =
        record;
    let payload: Payload = tables::decode("scheduled", &payload)?;
    let message = NewMessage {
        user,
        caller,
        message_id: Uuid::from_u128(id),
        payload: Arc::new(payload),
        dedupe_key: String::new(),
        time_us,
        trace,
        expires_us,
        collapse_key,
        shared: None,
    };
    Ok(Scheduled { message, deliver_us })
}
