//! Members and durable publications. A channel has one document: the newest number that was given out, the publications that
//! are not finished, and how far the oldest of them is. So a number and its publication are one update, as a seq and its
//! message are.
//!
//! A step appends to the inboxes of some members, and then notes how far it is. When it is cut off between the two, it is
//! done again, and each inbox finds by a dedupe key what it has. Keys are forgotten after a day; a publication that is
//! older than that and was cut off is looked up instead.

mod members;
mod publish;

use std::sync::Arc;

use futures::{StreamExt, stream};
use mongodb::{
    bson::{Binary, Bson, Document, Uuid as BsonUuid, doc},
    options::FindOptions,
};
use sanjay_runtime::failpoint;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub(super) use members::{join, leave, list};
pub(super) use publish::{Lanes, Waiting, key};

use super::{
    database::{Database, Outcome, update_of},
    documents::{self, Header, id},
    due::Share,
    payloads,
    queue::Queue,
    reader, submit_appends,
};
use crate::{
    metrics::StoreOperation,
    store::{
        AppendError, Applied, Backlog, DEDUPE_WINDOW, NewMessage, Publication, StoreError, Turn,
        fanout::step, member_message_id,
    },
};
use members::Page;

/// How many finished publications a channel remembers, for those whose answer was lost.
const MAX_DONE: i64 = 64;

/// For how long a publication that failed rests, in microseconds.
const REST_US: u64 = 1_000_000;

/// How old a publication is, in microseconds, when its members' dedupe keys may be about to be forgotten.
const OLD_US: u64 = DEDUPE_WINDOW.as_micros() as u64 / 2;

/// Most look-ups at once.
const MAX_LOOKS: usize = 16;

/// A publication that is not finished, without its payload.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct OpenDoc {
    /// Its number.
    n: i64,
    /// Its id.
    i: BsonUuid,
    /// When it was accepted, Unix time in microseconds.
    t: i64,
    /// Encoded [`Header`].
    h: Binary,
    /// Collapse key, or empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    c: String,
}

/// A publication that is finished.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct DoneDoc {
    n: i64,
    i: BsonUuid,
}

/// A channel. A number that is not there is 0.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct ChannelDoc {
    #[serde(rename = "_id")]
    name: String,
    /// The newest number that was given out.
    head: i64,
    members: i64,
    /// In ascending number.
    open: Vec<OpenDoc>,
    done: Vec<DoneDoc>,
    /// When the oldest of `open` may be claimed, Unix time in microseconds; it may be there although there is none.
    due: i64,
    /// Raised by each claim.
    lease: i64,
    /// Members up to this name have the oldest of `open`.
    after: String,
    /// Who claimed it did not say yet that it is done with.
    held: bool,
}

async fn find(database: &Database, channel: &str) -> Result<Option<ChannelDoc>, StoreError> {
    let filter = doc! { "_id": channel };
    let found = database.find_channels(StoreOperation::ReadState, filter, FindOptions::default()).await?;
    Ok(found.into_iter().next())
}

/// Claims the oldest publications of channels that nobody has.
pub(super) async fn claim(
    database: &Database,
    share: &Share,
    now_us: u64,
    until_us: u64,
    limit: usize,
) -> Result<Vec<Turn>, StoreError> {
    let mut found: Vec<ChannelDoc> = Vec::new();
    for look in share.looks(database, now_us).await {
        if found.len() >= limit {
            break;
        }
        let options = FindOptions::builder()
            .sort(doc! { "due": 1 })
            .projection(doc! { "done": 0 })
            .limit(i64::try_from(limit - found.len()).unwrap_or(i64::MAX))
            .build();
        let some: Vec<ChannelDoc> =
            database.find_channels(StoreOperation::Claim, look.filter("due"), options).await?;
        found.extend(some.into_iter().filter(|channel| look.is_new(&channel.name)));
    }
    let namespace = database.channels.namespace();
    let hold = |channel: &ChannelDoc| {
        let mut filter = doc! { "_id": &channel.name, "due": channel.due, "head": channel.head };
        let update = if channel.open.is_empty() {
            // What was the last is finished.
            doc! { "$unset": { "due": "" } }
        } else {
            filter.insert("lease", documents::counted(channel.lease));
            doc! { "$set": { "due": until_us.cast_signed(), "lease": channel.lease + 1, "held": true } }
        };
        update_of(namespace.clone(), filter, update, false)
    };
    let outcomes = database.write(StoreOperation::Claim, found.iter().map(hold).collect()).await;
    let mut turns = Vec::with_capacity(found.len());
    for (channel, outcome) in found.into_iter().zip(outcomes) {
        match (outcome, channel.open.first()) {
            (Outcome::Done, Some(oldest)) => turns.push(Turn {
                number: oldest.n.cast_unsigned(),
                message_id: Uuid::from_bytes(oldest.i.bytes()),
                time_us: oldest.t.cast_unsigned(),
                channel: channel.name,
                after: channel.after,
                lease: (channel.lease + 1).cast_unsigned(),
                unsure: channel.held,
            }),
            // Another node has it, or nothing is left.
            (Outcome::Done | Outcome::Missed, _) => {}
            // What was claimed comes back by itself.
            (Outcome::Unknown(error), _) => return Err(StoreError::Unavailable(error)),
        }
    }
    Ok(turns)
}

/// Applies a step of a publication.
pub(super) async fn apply(
    database: &Database,
    queue: &Queue,
    turn: Turn,
    until_us: u64,
    limit: usize,
) -> Result<Applied, StoreError> {
    let Some(publication) = look(database, &turn).await? else { return Ok(Applied::Lost) };
    let limit = step(limit, prost::Message::encoded_len(&*publication.payload));
    let page = Page::read(database, &turn.channel, turn.number, &turn.after, limit).await?;
    let put = put(database, queue, &publication, &page, &turn).await;
    if let Err(error) = put {
        rest(database, &turn).await;
        return Err(error);
    }
    failpoint::hit("delivery.fan_out_noted");
    page.forget(database, turn.number).await;
    if note(database, &turn, page.next.as_deref(), until_us).await? {
        let count = page.users.len();
        return Ok(match page.next {
            Some(after) => Applied::More(Turn { after, unsure: false, ..turn }, count),
            None => Applied::Finished(count),
        });
    }
    Ok(Applied::Lost)
}

/// What a turn is for; `None` when it is over.
async fn look(database: &Database, turn: &Turn) -> Result<Option<Publication>, StoreError> {
    let channel = find(database, &turn.channel).await?.unwrap_or_default();
    let Some(oldest) = channel.open.first() else { return Ok(None) };
    let ours = channel.lease.cast_unsigned() == turn.lease
        && oldest.n.cast_unsigned() == turn.number
        && channel.after == turn.after;
    if !ours {
        return Ok(None);
    }
    let damaged = |what: &dyn std::fmt::Display| {
        StoreError::Unavailable(format!(
            "publication {} of channel {:?} in the database is damaged: {what}",
            turn.number, turn.channel
        ))
    };
    let header: Header = prost::Message::decode(&oldest.h.bytes[..]).map_err(|error| damaged(&error))?;
    let mut payloads = payloads::fetch(database, &[oldest.i]).await?;
    let payload = payloads.remove(&oldest.i).ok_or_else(|| damaged(&"it has no payload"))?;
    Ok(Some(Publication {
        channel: turn.channel.clone(),
        message_id: turn.message_id,
        caller: header.caller,
        payload,
        dedupe_key: String::new(),
        time_us: header.time_us,
        trace: header.trace,
        expires_us: header.expires_us,
        collapse_key: oldest.c.clone(),
    }))
}

/// Puts a publication into the inboxes of a page of members.
async fn put(
    database: &Database,
    queue: &Queue,
    publication: &Publication,
    page: &Page,
    turn: &Turn,
) -> Result<(), StoreError> {
    let old = database.clock.now_us().saturating_sub(publication.time_us) > OLD_US;
    let mut users = page.users.clone();
    if turn.unsure && old {
        users = without(database, publication, users).await?;
    }
    if users.is_empty() {
        return Ok(());
    }
    let messages: Vec<NewMessage> = users.iter().map(|user| publication.message(user)).collect();
    for result in submit_appends(queue, messages).await {
        match result {
            Ok(_) => {}
            Err(AppendError::Store(error)) => return Err(error),
            Err(error) => return Err(StoreError::Unavailable(error.to_string())),
        }
    }
    Ok(())
}

/// Those of these users who do not have their message yet.
async fn without(
    database: &Database,
    publication: &Publication,
    users: Vec<String>,
) -> Result<Vec<String>, StoreError> {
    let publication = publication.message_id;
    let looked: Vec<Result<Option<String>, StoreError>> = stream::iter(users)
        .map(|user| async move {
            let id = member_message_id(publication, &user);
            let found = reader::lookup(database, &user, id).await?;
            Ok(found.is_none().then_some(user))
        })
        .buffered(MAX_LOOKS)
        .collect()
        .await;
    Ok(looked.into_iter().collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect())
}

/// Selects the channel of a turn as long as that is not over.
fn during(turn: &Turn) -> Document {
    let mut filter = doc! {
        "_id": &turn.channel,
        "lease": turn.lease.cast_signed(),
        "open.0.n": turn.number.cast_signed(),
    };
    let after: Bson =
        if turn.after.is_empty() { doc! { "$exists": false }.into() } else { turn.after.as_str().into() };
    filter.insert("after", after);
    filter
}

/// Notes how far a publication is, or that it is finished; whether the turn was not over.
async fn note(
    database: &Database,
    turn: &Turn,
    next: Option<&str>,
    until_us: u64,
) -> Result<bool, StoreError> {
    let now_us = database.clock.now_us();
    let update = match next {
        Some(next) if until_us > now_us => {
            doc! { "$set": { "after": next, "due": until_us.cast_signed() } }
        }
        Some(next) => {
            doc! { "$set": { "after": next, "due": until_us.cast_signed() }, "$unset": { "held": "" } }
        }
        None => {
            let done = DoneDoc { n: turn.number.cast_signed(), i: id(turn.message_id) };
            let done = doc! { "$each": [documents::bson(&done)?], "$slice": -MAX_DONE };
            doc! {
                "$pop": { "open": -1_i32 },
                "$push": { "done": done },
                "$set": { "due": now_us.cast_signed() },
                "$unset": { "after": "", "held": "" },
            }
        }
    };
    let model = update_of(database.channels.namespace(), during(turn), update, false);
    match database.write(StoreOperation::Write, vec![model]).await.pop() {
        Some(Outcome::Done) => Ok(true),
        Some(Outcome::Unknown(problem)) => Err(StoreError::Unavailable(problem)),
        Some(Outcome::Missed) | None => Ok(false),
    }
}

/// Lets a publication be claimed again soon, as far as that can be said now.
async fn rest(database: &Database, turn: &Turn) {
    let due = database.clock.now_us().saturating_add(REST_US).cast_signed();
    let update = doc! { "$set": { "due": due } };
    let model = update_of(database.channels.namespace(), during(turn), update, false);
    let _unheard = database.write(StoreOperation::Claim, vec![model]).await;
}

/// What waits to be applied.
pub(super) async fn backlog(database: &Database) -> Result<Backlog, StoreError> {
    #[derive(Deserialize)]
    struct Waits {
        #[serde(default)]
        open: Vec<TimeDoc>,
    }
    #[derive(Deserialize)]
    struct TimeDoc {
        t: i64,
    }
    let options = FindOptions::builder().projection(doc! { "open.t": 1 }).build();
    let waiting = doc! { "due": { "$gt": 0_i64 } };
    let found: Vec<Waits> = database.find_channels(StoreOperation::Stats, waiting, options).await?;
    let times = || found.iter().flat_map(|channel| &channel.open).map(|open| open.t.cast_unsigned());
    Ok(Backlog { unfinished: times().count() as u64, oldest_us: times().min() })
}

/// The header of a publication.
fn header(publication: &Publication) -> Header {
    let message = NewMessage { payload: Arc::clone(&publication.payload), ..publication.message("") };
    Header::new(&message)
}
