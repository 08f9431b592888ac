//! Members, durable publications and shared payloads in the file. A publication goes into inboxes in the transaction that
//! notes how far it is, so that nothing of it is done twice.

mod work;

use std::sync::Arc;

use prost::Message as _;
use redb::{
    Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, Table, TableDefinition,
    WriteTransaction,
};
use sanjay_proto::client::v1::Payload;
use uuid::Uuid;
pub(super) use work::{Done, Work};

use super::{
    tables,
    transaction::{Tables, payload_sha256},
};
use crate::store::{
    Appended, Applied, Backlog, DeadReason, JoinError, MAX_UNFINISHED, Membership, NewMessage, Numbered,
    Publication, PublicationError, Turn, fanout::step,
};

/// Channel → [`ChannelRecord`].
const CHANNELS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("channels");

/// (channel, user, number of the first publication that the user gets) → number of the first that the user does not get
/// any more; 0 while the user is a member. Of one user there may be several, each for another time; those that ended go
/// when the publications are finished that they are for.
const MEMBERS: TableDefinition<'static, (&str, &str, u64), u64> = TableDefinition::new("members");

/// (channel, number) → [`PublicationRecord`] of those that are not finished.
const PUBLICATIONS: TableDefinition<'static, (&str, u64), &[u8]> = TableDefinition::new("publications");

/// (accepted_us, channel, number) of the same.
const PUBLISHED_AT: TableDefinition<'static, (u64, &str, u64), ()> = TableDefinition::new("published_at");

/// (due_us, channel) of every channel that has unfinished publications: when somebody may claim the oldest.
const TURNS: TableDefinition<'static, (u64, &str), ()> = TableDefinition::new("turns");

/// Publication's id → `sanjay.client.v1.Payload`, as long as something refers to it.
pub(super) const PAYLOADS: TableDefinition<'static, u128, &[u8]> = TableDefinition::new("payloads");

/// Publication's id → how many bodies refer to its payload, and one more while it is not finished.
const PAYLOAD_USES: TableDefinition<'static, u128, u64> = TableDefinition::new("payload_uses");

/// Begins what stands in a user's place for a channel among the dedupe keys. No user has such a name: it holds a control
/// character.
const CHANNEL_PREFIX: &str = "\u{1f}channel/";

/// How many records beside those of members a step looks at for each of them.
const LOOKS: usize = 4;

/// What is known of a channel.
#[derive(Clone, PartialEq, prost::Message)]
struct ChannelRecord {
    /// The newest number that was given out.
    #[prost(uint64, tag = "1")]
    head: u64,
    /// Publications up to it are in all their members' inboxes.
    #[prost(uint64, tag = "2")]
    finished: u64,
    #[prost(uint64, tag = "3")]
    members: u64,
    /// When the oldest unfinished one may be claimed, Unix time in microseconds; 0 while there is none.
    #[prost(uint64, tag = "4")]
    due_us: u64,
    /// Raised by each claim.
    #[prost(uint64, tag = "5")]
    lease: u64,
}

/// A publication that is not finished, without its payload.
#[derive(Clone, PartialEq, prost::Message)]
struct PublicationRecord {
    /// UUID, 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    message_id: Vec<u8>,
    #[prost(string, tag = "2")]
    caller: String,
    #[prost(uint64, tag = "3")]
    time_us: u64,
    #[prost(string, tag = "4")]
    trace: String,
    #[prost(uint64, tag = "5")]
    expires_us: u64,
    #[prost(string, tag = "6")]
    collapse_key: String,
    /// Members up to this name have it.
    #[prost(string, tag = "7")]
    after: String,
}

/// Creates the tables that a file does not have.
pub(super) fn create(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    FanOutTables::open(transaction).map(|_| ())
}

/// The tables of one write transaction.
pub(super) struct FanOutTables<'txn> {
    channels: Table<'txn, &'static str, &'static [u8]>,
    members: Table<'txn, (&'static str, &'static str, u64), u64>,
    publications: Table<'txn, (&'static str, u64), &'static [u8]>,
    published_at: Table<'txn, (u64, &'static str, u64), ()>,
    turns: Table<'txn, (u64, &'static str), ()>,
    payloads: Table<'txn, u128, &'static [u8]>,
    payload_uses: Table<'txn, u128, u64>,
}

/// Reads a shared payload.
pub(super) fn payload(
    payloads: &impl ReadableTable<u128, &'static [u8]>,
    id: Uuid,
) -> Result<Payload, redb::Error> {
    let Some(bytes) = payloads.get(id.as_u128())? else {
        return Err(redb::Error::Corrupted(format!("the payload of publication {id} is missing")));
    };
    tables::decode("payloads", bytes.value())
}

impl<'txn> FanOutTables<'txn> {
    pub(super) fn open(txn: &'txn WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Self {
            channels: txn.open_table(CHANNELS)?,
            members: txn.open_table(MEMBERS)?,
            publications: txn.open_table(PUBLICATIONS)?,
            published_at: txn.open_table(PUBLISHED_AT)?,
            turns: txn.open_table(TURNS)?,
            payloads: txn.open_table(PAYLOADS)?,
            payload_uses: txn.open_table(PAYLOAD_USES)?,
        })
    }

    /// The payload of a publication.
    pub(super) fn payload(&self, id: Uuid) -> Result<Payload, redb::Error> {
        payload(&self.payloads, id)
    }

    /// One more refers to a payload.
    pub(super) fn hold(&mut self, id: Uuid) -> Result<(), redb::Error> {
        let uses = self.payload_uses.get(id.as_u128())?.map_or(0, |uses| uses.value());
        self.payload_uses.insert(id.as_u128(), uses + 1)?;
        Ok(())
    }

    /// One less refers to a payload, which goes with the last.
    pub(super) fn release(&mut self, id: Uuid) -> Result<(), redb::Error> {
        let uses = self.payload_uses.get(id.as_u128())?.map_or(0, |uses| uses.value());
        if uses > 1 {
            self.payload_uses.insert(id.as_u128(), uses - 1)?;
        } else {
            self.payload_uses.remove(id.as_u128())?;
            self.payloads.remove(id.as_u128())?;
        }
        Ok(())
    }

    fn channel(&self, channel: &str) -> Result<ChannelRecord, redb::Error> {
        let record = self.channels.get(channel)?;
        record.map_or_else(|| Ok(ChannelRecord::default()), |bytes| tables::decode("channels", bytes.value()))
    }

    /// Writes what is known of a channel, which was `before`.
    fn set(
        &mut self,
        channel: &str,
        before: &ChannelRecord,
        record: &ChannelRecord,
    ) -> Result<(), redb::Error> {
        self.channels.insert(channel, record.encode_to_vec().as_slice())?;
        if before.due_us != record.due_us {
            if before.due_us != 0 {
                self.turns.remove((before.due_us, channel))?;
            }
            if record.due_us != 0 {
                self.turns.insert((record.due_us, channel), ())?;
            }
        }
        Ok(())
    }

    /// Since which publication a user is a member.
    fn since(&self, channel: &str, user: &str) -> Result<Option<u64>, redb::Error> {
        // The newest record says it: each begins where the one before has ended, or later.
        let newest = self.members.range((channel, user, 0)..=(channel, user, u64::MAX))?.next_back();
        let Some(newest) = newest else { return Ok(None) };
        let (key, until) = newest?;
        Ok(Some(key.value().2).filter(|_| until.value() == 0))
    }

    fn publication(&self, channel: &str, number: u64) -> Result<Option<PublicationRecord>, redb::Error> {
        let record = self.publications.get((channel, number))?;
        record.map(|bytes| tables::decode("publications", bytes.value())).transpose()
    }

    /// The next members of a publication, and the last user that was looked at; `None` when that was everybody.
    /// What ended before it, or ends with it, is forgotten.
    fn recipients(
        &mut self,
        channel: &str,
        number: u64,
        after: &str,
        limit: usize,
    ) -> Result<(Vec<String>, Option<String>), redb::Error> {
        let (mut found, mut over, mut last) = (Vec::new(), Vec::new(), None::<String>);
        let first = if after.is_empty() { 0 } else { u64::MAX };
        let (mut looked, mut more) = (0, false);
        for entry in self.members.range((channel, after, first)..)? {
            let (key, until) = entry?;
            let (of, user, since) = key.value();
            if of != channel {
                break;
            }
            // A step ends between two users, because a user may have several records.
            if last.as_deref() != Some(user) {
                if found.len() >= limit || looked >= LOOKS * limit {
                    more = true;
                    break;
                }
                last = Some(user.to_owned());
            }
            looked += 1;
            let until = until.value();
            if since <= number && (until == 0 || until > number) {
                found.push(user.to_owned());
            }
            if until != 0 && until <= number + 1 {
                over.push((user.to_owned(), since));
            }
        }
        for (user, since) in over {
            self.members.remove((channel, user.as_str(), since))?;
        }
        Ok((found, last.filter(|_| more)))
    }
}

impl Tables<'_> {
    fn join(
        &mut self,
        channel: &str,
        users: &[String],
        most: u64,
    ) -> Result<Result<Membership, JoinError>, redb::Error> {
        let before = self.fan_out.channel(channel)?;
        let mut fresh = Vec::new();
        for user in users {
            if self.fan_out.since(channel, user)?.is_none() {
                fresh.push(user);
            }
        }
        let changed = fresh.len() as u64;
        if changed > 0 && before.members + changed > most {
            return Ok(Err(JoinError::Full { members: before.members, most }));
        }
        for user in fresh {
            self.fan_out.members.insert((channel, user.as_str(), before.head + 1), 0)?;
        }
        let record = ChannelRecord { members: before.members + changed, ..before.clone() };
        if changed > 0 {
            self.fan_out.set(channel, &before, &record)?;
            self.must_sync = true;
        }
        Ok(Ok(Membership { changed, members: record.members }))
    }

    fn leave(&mut self, channel: &str, users: &[String]) -> Result<Membership, redb::Error> {
        let before = self.fan_out.channel(channel)?;
        let mut changed = 0;
        for user in users {
            let Some(since) = self.fan_out.since(channel, user)? else { continue };
            changed += 1;
            let key = (channel, user.as_str(), since);
            // Without a publication that is for the user and not finished, nothing has to be known.
            if since > before.head || before.finished == before.head {
                self.fan_out.members.remove(key)?;
            } else {
                self.fan_out.members.insert(key, before.head + 1)?;
            }
        }
        let record = ChannelRecord { members: before.members.saturating_sub(changed), ..before.clone() };
        if changed > 0 {
            self.fan_out.set(channel, &before, &record)?;
            self.must_sync = true;
        }
        Ok(Membership { changed, members: record.members })
    }

    fn publish(
        &mut self,
        publication: &Publication,
    ) -> Result<Result<Numbered, PublicationError>, redb::Error> {
        let channel = publication.channel.as_str();
        let before = self.fan_out.channel(channel)?;
        let members = before.members;
        let keyed = NewMessage {
            user: format!("{CHANNEL_PREFIX}{channel}"),
            caller: publication.caller.clone(),
            message_id: publication.message_id,
            payload: publication.payload.clone(),
            dedupe_key: publication.dedupe_key.clone(),
            time_us: publication.time_us,
            ..NewMessage::default()
        };
        let sha256 = (!keyed.dedupe_key.is_empty()).then(|| payload_sha256(&keyed));
        if let Some(sha256) = &sha256
            && let Some(first) = self.first_answer(&keyed, sha256)?
        {
            return Ok(match first {
                Ok(Appended { seq: number, message_id, .. }) => {
                    Ok(Numbered { number, message_id, duplicate: true, members })
                }
                Err(_) => Err(PublicationError::AlreadyExists { key: keyed.dedupe_key }),
            });
        }
        if before.head - before.finished >= MAX_UNFINISHED as u64 {
            return Ok(Err(PublicationError::Backlog));
        }
        let mut record = ChannelRecord { head: before.head + 1, ..before.clone() };
        if record.due_us == 0 {
            record.due_us = self.rules.now_us.max(1);
        }
        let number = record.head;
        self.insert_publication(publication, number)?;
        self.fan_out.set(channel, &before, &record)?;
        if let Some(sha256) = sha256 {
            self.insert_dedupe(&keyed, sha256, number, 0)?;
        }
        self.must_sync = true;
        Ok(Ok(Numbered { number, message_id: publication.message_id, duplicate: false, members }))
    }

    fn insert_publication(&mut self, publication: &Publication, number: u64) -> Result<(), redb::Error> {
        let channel = publication.channel.as_str();
        let record = PublicationRecord {
            message_id: publication.message_id.as_bytes().to_vec(),
            caller: publication.caller.clone(),
            time_us: publication.time_us,
            trace: publication.trace.clone(),
            expires_us: publication.expires_us,
            collapse_key: publication.collapse_key.clone(),
            after: String::new(),
        };
        let (id, fan_out) = (publication.message_id, &mut self.fan_out);
        fan_out.publications.insert((channel, number), record.encode_to_vec().as_slice())?;
        fan_out.published_at.insert((record.time_us, channel, number), ())?;
        fan_out.payloads.insert(id.as_u128(), publication.payload.encode_to_vec().as_slice())?;
        fan_out.hold(id)
    }

    fn claim_turns(&mut self, now_us: u64, until_us: u64, limit: usize) -> Result<Vec<Turn>, redb::Error> {
        let mut due = Vec::new();
        for entry in self.fan_out.turns.range((0, "")..(now_us.saturating_add(1), ""))?.take(limit) {
            due.push(entry?.0.value().1.to_owned());
        }
        let mut turns = Vec::with_capacity(due.len());
        for channel in due {
            let before = self.fan_out.channel(&channel)?;
            let number = before.finished + 1;
            let Some(publication) = self.fan_out.publication(&channel, number)? else { continue };
            let record = ChannelRecord { due_us: until_us, lease: before.lease + 1, ..before.clone() };
            self.fan_out.set(&channel, &before, &record)?;
            turns.push(Turn {
                channel,
                number,
                message_id: tables::message_id(&publication.message_id)?,
                time_us: publication.time_us,
                after: publication.after,
                lease: record.lease,
                // A page and the note of it are one transaction.
                unsure: false,
            });
        }
        Ok(turns)
    }

    /// Applies a step of a publication; returns also what came into inboxes by it.
    fn apply_turn(
        &mut self,
        turn: &Turn,
        until_us: u64,
        limit: usize,
    ) -> Result<(Applied, Vec<(NewMessage, Appended)>), redb::Error> {
        let (channel, number) = (turn.channel.as_str(), turn.number);
        let before = self.fan_out.channel(channel)?;
        let lost = Ok((Applied::Lost, Vec::new()));
        if before.lease != turn.lease || before.finished + 1 != number {
            return lost;
        }
        let Some(mut record) = self.fan_out.publication(channel, number)? else { return lost };
        if record.after != turn.after {
            return lost;
        }
        let payload = self.fan_out.payload(turn.message_id)?;
        let limit = step(limit, payload.encoded_len());
        let publication = Publication {
            channel: channel.to_owned(),
            message_id: turn.message_id,
            caller: record.caller.clone(),
            payload: Arc::new(payload),
            dedupe_key: String::new(),
            time_us: record.time_us,
            trace: record.trace.clone(),
            expires_us: record.expires_us,
            collapse_key: record.collapse_key.clone(),
        };
        let (users, next) = self.fan_out.recipients(channel, number, &record.after, limit)?;
        let count = users.len();
        let appended = self.append_all(&publication, &users)?;
        let mut after = before.clone();
        let applied = if let Some(next) = next {
            record.after.clone_from(&next);
            self.fan_out.publications.insert((channel, number), record.encode_to_vec().as_slice())?;
            after.due_us = until_us;
            Applied::More(Turn { after: next, ..turn.clone() }, count)
        } else {
            self.fan_out.publications.remove((channel, number))?;
            self.fan_out.published_at.remove((record.time_us, channel, number))?;
            self.fan_out.release(turn.message_id)?;
            after.finished = number;
            after.due_us = if after.finished < after.head { self.rules.now_us.max(1) } else { 0 };
            Applied::Finished(count)
        };
        self.fan_out.set(channel, &before, &after)?;
        self.must_sync = true;
        Ok((applied, appended))
    }

    /// Puts a publication into the inboxes of users; returns what is to be relayed.
    fn append_all(
        &mut self,
        publication: &Publication,
        users: &[String],
    ) -> Result<Vec<(NewMessage, Appended)>, redb::Error> {
        let mut appended = Vec::with_capacity(users.len());
        for user in users {
            // The place in the channel is what says that it is new.
            let message = NewMessage { dedupe_key: String::new(), ..publication.message(user) };
            match self.append(&message)? {
                Ok(place) if self.bodies.get((user.as_str(), place.seq))?.is_some() => {
                    appended.push((message, place));
                }
                // It is a dead letter.
                Ok(_) => {}
                Err(error) => return Err(redb::Error::Corrupted(format!("inbox {user:?}: {error}"))),
            }
        }
        Ok(appended)
    }

    /// Puts a message that its inbox has no room for among the dead letters: it takes a seq and dies in the same step.
    /// `None`, and nothing done, when the inbox knows of too many messages that failed.
    pub(super) fn append_dead(
        &mut self,
        message: &NewMessage,
        size: u64,
    ) -> Result<Option<Appended>, redb::Error> {
        let (user, now_us) = (message.user.as_str(), self.rules.now_us);
        let inbox = self.inbox(user)?;
        let mut attempts = inbox.record.attempts()?;
        let seq = inbox.record.head + 1;
        if !attempts.kill(seq, DeadReason::QueueFull, now_us) {
            return Ok(None);
        }
        inbox.record.head = seq;
        inbox.record.bytes += size;
        inbox.record.attempts = attempts.encode();
        inbox.changed = true;
        let epoch = inbox.record.epoch;
        self.insert_message(message, seq, size)?;
        self.told.died.push((DeadReason::QueueFull, 1));
        self.bury(user)?;
        let inbox = self.inbox(user)?;
        // What could not be settled now is due for it; else the inbox stays due as it was.
        let left = inbox.record.attempts()?;
        inbox.record.set_attempts(&left);
        inbox.record.disarm_when_done()?;
        self.must_sync = true;
        let (message_id, time_us) = (message.message_id, message.time_us);
        Ok(Some(Appended { seq, message_id, epoch, duplicate: false, time_us }))
    }
}

/// The members of a channel whose names follow `after`.
pub(super) fn members(
    database: &Database,
    channel: &str,
    after: &str,
    limit: usize,
) -> Result<Vec<String>, redb::Error> {
    let members = database.begin_read()?.open_table(MEMBERS)?;
    let first = if after.is_empty() { 0 } else { u64::MAX };
    let mut found = Vec::new();
    for entry in members.range((channel, after, first)..)? {
        let (key, until) = entry?;
        let (of, user, _) = key.value();
        if of != channel || found.len() == limit {
            break;
        }
        if until.value() == 0 {
            found.push(user.to_owned());
        }
    }
    Ok(found)
}

/// Whether a publication may be claimed: a look that takes no write transaction.
pub(super) fn anything_waits(database: &Database, now_us: u64) -> Result<bool, redb::Error> {
    let turns = database.begin_read()?.open_table(TURNS)?;
    let first = turns.first()?;
    Ok(first.is_some_and(|(key, _)| key.value().0 <= now_us))
}

/// Makes everything that was claimed anybody's again: whoever claimed it had the file open before.
pub(super) fn release_turns(database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut tables = FanOutTables::open(&transaction)?;
        let mut claimed = Vec::new();
        for entry in tables.turns.iter()? {
            claimed.push(entry?.0.value().1.to_owned());
        }
        for channel in &claimed {
            let before = tables.channel(channel)?;
            let record = ChannelRecord { due_us: 1, lease: before.lease + 1, ..before.clone() };
            tables.set(channel, &before, &record)?;
        }
        if claimed.is_empty() {
            drop(tables);
            return Ok(transaction.abort()?);
        }
    }
    transaction.commit()?;
    Ok(())
}

/// What waits to be applied.
pub(super) fn backlog(database: &Database) -> Result<Backlog, redb::Error> {
    let published_at = database.begin_read()?.open_table(PUBLISHED_AT)?;
    let oldest_us = published_at.first()?.map(|(key, _)| key.value().0);
    Ok(Backlog { unfinished: published_at.len()?, oldest_us })
}
