//! Failed attempts and dead letters in the file. A message becomes a dead letter in the transaction that settles it.

use prost::Message as _;
use redb::{Database, ReadOnlyTable, ReadableDatabase, ReadableTable};
use sanjay_proto::client::v1::{InboxMessage, Payload};
use uuid::Uuid;

use super::{
    tables::{self, DeadRecord},
    transaction::{Ended, Tables},
};
use crate::{
    message::State,
    store::{
        Attempts, DeadFilter, DeadLetter, DeadPage, DeadPosition, DeadReason, Settle, Verdict,
        attempts::{decode_failures, encode_failures},
    },
};

/// A message's dead letter and its place in the lists are found by its user and id.
type ByMessage = ReadOnlyTable<(&'static str, u128), &'static [u8]>;

impl Tables<'_> {
    /// Notes redeliveries that were written and attempts that failed; what failed for good is settled as dead.
    pub(super) fn note_attempts(
        &mut self,
        settle: &Settle,
        mut attempts: Attempts,
    ) -> Result<Vec<(u64, Verdict)>, redb::Error> {
        if attempts.is_empty() && settle.failed.is_empty() {
            // The usual way: nothing is known of any message, and nothing is to be noted.
            return Ok(Vec::new());
        }
        let (random, max_attempts) = (self.rules.random.clone(), self.rules.max_attempts);
        let inbox = self.inbox(&settle.user)?;
        let (settled, head, before) = (inbox.record.settled(), inbox.record.head, attempts.clone());
        let failed = attempts.report(settle, head, &settled, max_attempts, &*random);
        let taken = failed.iter().any(|(_, verdict)| *verdict != Verdict::Full);
        if attempts != before {
            inbox.record.set_attempts(&attempts);
            inbox.changed = true;
        }
        if taken {
            inbox.record.attempt = 0;
            self.must_sync = true;
        }
        self.bury(&settle.user)?;
        Ok(failed)
    }

    /// Settles as dead what is dying, as far as the inbox has room for further settled ranges.
    pub(super) fn bury(&mut self, user: &str) -> Result<(), redb::Error> {
        let inbox = self.inbox(user)?;
        if inbox.record.attempts.is_empty() {
            return Ok(());
        }
        let attempts = inbox.record.attempts()?;
        let mut settled = inbox.record.settled();
        let dying: Vec<u64> = attempts.dying().filter(|seq| settled.settle(*seq, *seq).is_ok()).collect();
        if dying.is_empty() {
            return Ok(());
        }
        let mut ended = Ended::new(State::Dead, attempts);
        for seq in dying {
            self.remove_bodies(user, seq, seq, &mut ended)?;
        }
        let inbox = self.inbox(user)?;
        inbox.record.set_settled(&settled);
        ended.note(&mut inbox.record);
        inbox.record.set_attempts(&ended.attempts);
        inbox.changed = true;
        self.must_sync = true;
        Ok(())
    }

    /// Writes the dead letter of a dying message.
    pub(super) fn insert_letter(
        &mut self,
        user: &str,
        body: &InboxMessage,
        caller: &str,
        attempts: &Attempts,
    ) -> Result<(), redb::Error> {
        let Some((reason, died_us)) = attempts.death(body.seq) else { return Ok(()) };
        let payload = body.payload.as_ref().map(prost::Message::encode_to_vec).unwrap_or_default();
        let id = tables::message_id(&body.message_id)?.as_u128();
        let record = DeadRecord {
            seq: body.seq,
            epoch: self.inbox(user)?.record.epoch,
            caller: caller.to_owned(),
            reason: reason.number(),
            accepted_us: body.time_us,
            died_us,
            failures: encode_failures(attempts.failures(body.seq)),
            trace: body.trace.clone(),
            payload_bytes: payload.len() as u64,
            redriven_as: Vec::new(),
        };
        self.dead.insert((user, id), record.encode_to_vec().as_slice())?;
        self.dead_bodies.insert((user, id), payload.as_slice())?;
        self.dead_at.insert((died_us, id, user), ())?;
        self.dead_of.insert((user, died_us, id), ())?;
        Ok(())
    }

    /// Notes that a dead letter was sent again; whether there is such a letter.
    pub(super) fn redriven(
        &mut self,
        user: &str,
        message_id: Uuid,
        sent_as: Uuid,
    ) -> Result<bool, redb::Error> {
        let key = (user, message_id.as_u128());
        let mut record: DeadRecord = match self.dead.get(key)? {
            Some(bytes) => tables::decode("dead", bytes.value())?,
            None => return Ok(false),
        };
        record.redriven_as = sent_as.as_bytes().to_vec();
        self.dead.insert(key, record.encode_to_vec().as_slice())?;
        self.must_sync = true;
        Ok(true)
    }

    /// Removes dead letters; returns how many there were.
    pub(super) fn purge(&mut self, letters: &[(String, Uuid)]) -> Result<u64, redb::Error> {
        let mut purged = 0;
        for (user, message_id) in letters {
            let (user, id) = (user.as_str(), message_id.as_u128());
            let died_us = match self.dead.remove((user, id))? {
                Some(bytes) => tables::decode::<DeadRecord>("dead", bytes.value())?.died_us,
                None => continue,
            };
            self.dead_bodies.remove((user, id))?;
            self.dead_at.remove((died_us, id, user))?;
            self.dead_of.remove((user, died_us, id))?;
            self.must_sync = true;
            purged += 1;
        }
        Ok(purged)
    }
}

/// Lists dead letters, the newest first.
pub(super) fn list(
    database: &Database,
    filter: &DeadFilter,
    after: Option<DeadPosition>,
    limit: usize,
) -> Result<DeadPage, redb::Error> {
    let transaction = database.begin_read()?;
    let letters = transaction.open_table(tables::DEAD)?;
    let from_us = filter.from_us.unwrap_or(0);
    // Below this position, which is that of no letter of the page.
    let end = (filter.to_us.unwrap_or(u64::MAX), 0);
    let end = after.map_or(end, |after| end.min((after.died_us, after.message_id.as_u128())));
    let mut page = Pages { letters, filter, limit: limit.max(1), page: DeadPage::default() };
    if let Some(user) = &filter.user {
        let user = user.as_str();
        let places = transaction.open_table(tables::DEAD_OF)?;
        for entry in places.range((user, from_us, 0)..(user, end.0, end.1))?.rev() {
            let (_, _, id) = entry?.0.value();
            if page.is_full(user, id)? {
                break;
            }
        }
    } else {
        let places = transaction.open_table(tables::DEAD_AT)?;
        for entry in places.range((from_us, 0, "")..(end.0, end.1, ""))?.rev() {
            let (place, ()) = entry.map(|(place, unit)| (place, unit.value()))?;
            let (_, id, user) = place.value();
            if page.is_full(user, id)? {
                break;
            }
        }
    }
    Ok(page.page)
}

/// A page that is being filled.
struct Pages<'a> {
    letters: ByMessage,
    filter: &'a DeadFilter,
    limit: usize,
    page: DeadPage,
}

impl Pages<'_> {
    /// Adds a letter that passes the filter; true when there was one more than the page takes.
    fn is_full(&mut self, user: &str, id: u128) -> Result<bool, redb::Error> {
        let Some(bytes) = self.letters.get((user, id))? else { return Ok(false) };
        let letter = letter(user, id, bytes.value())?;
        if !self.filter.matches(&letter) {
            return Ok(false);
        }
        if self.page.letters.len() == self.limit {
            self.page.next = self.page.letters.last().map(DeadLetter::position);
            return Ok(true);
        }
        self.page.letters.push(letter);
        Ok(false)
    }
}

/// One dead letter with its body.
pub(super) fn get(
    database: &Database,
    user: &str,
    message_id: Uuid,
) -> Result<Option<DeadLetter>, redb::Error> {
    let transaction = database.begin_read()?;
    let (letters, bodies) =
        (transaction.open_table(tables::DEAD)?, transaction.open_table(tables::DEAD_BODIES)?);
    let key = (user, message_id.as_u128());
    let Some(bytes) = letters.get(key)? else { return Ok(None) };
    let mut letter = letter(user, message_id.as_u128(), bytes.value())?;
    if let Some(body) = bodies.get(key)? {
        letter.payload = Some(std::sync::Arc::new(tables::decode::<Payload>("dead_bodies", body.value())?));
    }
    Ok(Some(letter))
}

fn letter(user: &str, id: u128, bytes: &[u8]) -> Result<DeadLetter, redb::Error> {
    let record: DeadRecord = tables::decode("dead", bytes)?;
    let damaged = |what: String| redb::Error::Corrupted(format!("a record of table dead: {what}"));
    let reason = DeadReason::from_number(record.reason)
        .ok_or_else(|| damaged(format!("the unknown reason {}", record.reason)))?;
    Ok(DeadLetter {
        user: user.to_owned(),
        message_id: Uuid::from_u128(id),
        seq: record.seq,
        epoch: record.epoch,
        caller: record.caller,
        reason,
        accepted_us: record.accepted_us,
        died_us: record.died_us,
        failures: decode_failures(record.seq, &record.failures)
            .map_err(|error| damaged(error.to_string()))?,
        trace: record.trace,
        payload: None,
        payload_bytes: record.payload_bytes,
        redriven_as: Uuid::from_slice(&record.redriven_as).ok(),
    })
}
