//! Who is a member of a channel. A user has one document for each channel: since which publication, and for which ones
//! before.

use mongodb::{
    bson::{Document, doc},
    options::{DeleteOneModel, FindOptions, ReturnDocument, WriteModel},
};
use serde::{Deserialize, Serialize};

use super::{ChannelDoc, find};
use crate::{
    metrics::StoreOperation,
    store::{JoinError, Membership, StoreError},
};

use super::super::{
    database::{Database, Outcome, update_of},
    documents::user_hash,
};

/// Stands between the parts of an `_id`. No name holds it, as it is a control character, and it sorts before all that
/// they may hold: so the documents of a channel lie in the order of the users' names.
const SEPARATOR: char = '\u{1f}';

/// What sorts after all that begins with the separator.
const AFTER: char = ' ';

/// A time of membership that is over.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct PastDoc {
    /// The first publication, and the first that is not for the user any more.
    f: i64,
    x: i64,
}

/// A user of a channel.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct MemberDoc {
    #[serde(rename = "_id")]
    id: String,
    u: String,
    /// The first publication that is for the user; absent when the user is no member.
    #[serde(default)]
    s: Option<i64>,
    #[serde(default)]
    past: Vec<PastDoc>,
}

impl MemberDoc {
    fn gets(&self, number: i64) -> bool {
        self.s.is_some_and(|since| since <= number)
            || self.past.iter().any(|past| past.f <= number && number < past.x)
    }
}

fn member_id(channel: &str, user: &str) -> String {
    format!("{channel}{SEPARATOR}{user}")
}

/// Selects users of a channel whose names follow `after`.
fn following(channel: &str, after: &str) -> Document {
    let above = member_id(channel, after);
    doc! { "_id": { "$gt": above, "$lt": format!("{channel}{AFTER}") }, "c": channel }
}

async fn known(database: &Database, channel: &str, users: &[String]) -> Result<Vec<MemberDoc>, StoreError> {
    let ids: Vec<String> = users.iter().map(|user| member_id(channel, user)).collect();
    let filter = doc! { "_id": { "$in": ids }, "c": channel };
    database.find_members(StoreOperation::ReadState, filter, FindOptions::default()).await
}

/// Adds to what is counted of a channel's members; the channel as it is then.
async fn count(database: &Database, channel: &str, change: i64) -> Result<ChannelDoc, StoreError> {
    let channels = database.channels.clone_with_type::<ChannelDoc>();
    let update = doc! {
        "$inc": { "members": change },
        "$setOnInsert": { "h": user_hash(channel), "head": 0_i64 },
    };
    let counting = channels
        .find_one_and_update(doc! { "_id": channel }, update)
        .upsert(true)
        .return_document(ReturnDocument::After)
        .projection(doc! { "done": 0, "open": 0 });
    Ok(database.call(StoreOperation::Write, counting).await?.unwrap_or_default())
}

/// How many members a channel has after all: what was counted may be wrong after calls that failed half-way.
pub(super) async fn recount(database: &Database, channel: &str, counted: i64) -> Result<i64, StoreError> {
    let members = database.members.count_documents(doc! { "c": channel, "s": { "$gt": 0_i64 } });
    let members = database.call(StoreOperation::Stats, members).await?.cast_signed();
    if members == counted {
        return Ok(members);
    }
    let filter = doc! { "_id": channel, "members": counted };
    let update = doc! { "$set": { "members": members } };
    let model = update_of(database.channels.namespace(), filter, update, false);
    let _next_time = database.write(StoreOperation::Write, vec![model]).await;
    Ok(members)
}

/// Makes users members. The channel's document is written before theirs, so that they get what it gives a number after
/// that.
pub(in super::super) async fn join(
    database: &Database,
    channel: &str,
    users: &[String],
    most: u64,
) -> Result<Membership, JoinError> {
    let known = known(database, channel, users).await?;
    let is_member =
        |user: &&String| known.iter().any(|member| member.s.is_some() && member.u == user.as_str());
    let fresh: Vec<&String> = users.iter().filter(|user| !is_member(user)).collect();
    let before = find(database, channel).await?.map_or(0, |channel| channel.members);
    let wanted = fresh.len() as i64;
    if wanted == 0 {
        return Ok(Membership { changed: 0, members: before.max(0).cast_unsigned() });
    }
    let too_many = |members: i64| (members.max(0) + wanted).cast_unsigned() > most;
    if too_many(before) {
        let members = recount(database, channel, before).await?;
        if too_many(members) {
            return Err(JoinError::Full { members: members.cast_unsigned(), most });
        }
    }
    let state = count(database, channel, wanted).await?;
    let namespace = database.members.namespace();
    let models = fresh.iter().map(|user| {
        let filter = doc! { "_id": member_id(channel, user), "c": channel, "s": { "$exists": false } };
        let update = doc! { "$set": { "s": state.head + 1 }, "$setOnInsert": { "u": *user } };
        update_of(namespace.clone(), filter, update, true)
    });
    let changed = settled(database.write(StoreOperation::Write, models.collect()).await)?;
    let mut members = state.members;
    if changed < wanted {
        // Some have joined meanwhile.
        members = count(database, channel, changed - wanted).await?.members;
    }
    Ok(Membership { changed: changed.cast_unsigned(), members: members.max(0).cast_unsigned() })
}

/// How many of some writes were done.
fn settled(outcomes: Vec<Outcome>) -> Result<i64, StoreError> {
    Ok(super::super::dead::done(outcomes)?.cast_signed())
}

/// Ends memberships. The channel is read before they are written, so that they still get what it had given a number.
pub(in super::super) async fn leave(
    database: &Database,
    channel: &str,
    users: &[String],
) -> Result<Membership, StoreError> {
    let known = known(database, channel, users).await?;
    let state = find(database, channel).await?.unwrap_or_default();
    let namespace = database.members.namespace();
    let model = |member: &MemberDoc| {
        let since = member.s?;
        let filter = doc! { "_id": &member.id, "c": channel, "s": since };
        if since <= state.head && !state.open.is_empty() {
            let past = doc! { "f": since, "x": state.head + 1 };
            let update = doc! { "$unset": { "s": "" }, "$push": { "past": past } };
            return Some(update_of(namespace.clone(), filter, update, false));
        }
        // Without a publication that is for the user and not finished, nothing has to be known.
        if member.past.is_empty() {
            let model = DeleteOneModel::builder().namespace(namespace.clone()).filter(filter).build();
            return Some(WriteModel::DeleteOne(model));
        }
        Some(update_of(namespace.clone(), filter, doc! { "$unset": { "s": "" } }, false))
    };
    let models: Vec<WriteModel> = known.iter().filter_map(model).collect();
    if models.is_empty() {
        return Ok(Membership { changed: 0, members: state.members.max(0).cast_unsigned() });
    }
    let changed = settled(database.write(StoreOperation::Write, models).await)?;
    let members = count(database, channel, -changed).await?.members;
    Ok(Membership { changed: changed.cast_unsigned(), members: members.max(0).cast_unsigned() })
}

/// The first members whose names follow `after`.
pub(in super::super) async fn list(
    database: &Database,
    channel: &str,
    after: &str,
    limit: usize,
) -> Result<Vec<String>, StoreError> {
    let mut filter = following(channel, after);
    filter.insert("s", doc! { "$gt": 0_i64 });
    let options = in_order(limit);
    let found: Vec<MemberDoc> = database.find_members(StoreOperation::Read, filter, options).await?;
    Ok(found.into_iter().map(|member| member.u).collect())
}

fn in_order(limit: usize) -> FindOptions {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    FindOptions::builder().sort(doc! { "_id": 1 }).limit(limit).build()
}

/// Some of those whom a publication is for.
pub(super) struct Page {
    pub(super) users: Vec<String>,
    /// Where the next begins; `None` when that was everybody.
    pub(super) next: Option<String>,
    channel: String,
    /// Those with times that are over.
    past: Vec<MemberDoc>,
}

impl Page {
    pub(super) async fn read(
        database: &Database,
        channel: &str,
        number: u64,
        after: &str,
        limit: usize,
    ) -> Result<Self, StoreError> {
        let number = number.cast_signed();
        let filter = following(channel, after);
        let found: Vec<MemberDoc> =
            database.find_members(StoreOperation::ReadState, filter, in_order(limit)).await?;
        let next = found.last().filter(|_| found.len() == limit).map(|member| member.u.clone());
        let users = found.iter().filter(|member| member.gets(number)).map(|member| member.u.clone());
        Ok(Self {
            users: users.collect(),
            next,
            channel: channel.to_owned(),
            past: found.iter().filter(|member| !member.past.is_empty()).cloned().collect(),
        })
    }

    /// Forgets times that are over, now that these members have this publication. What fails is done with the next one.
    pub(super) async fn forget(&self, database: &Database, number: u64) {
        let namespace = database.members.namespace();
        let mut models = Vec::new();
        for member in &self.past {
            let over = |past: &PastDoc| past.x <= number.cast_signed() + 1;
            if !member.past.iter().any(over) {
                continue;
            }
            let filter = doc! { "_id": &member.id, "c": &self.channel };
            let pull = doc! { "$pull": { "past": { "x": { "$lte": number.cast_signed() + 1 } } } };
            models.push(update_of(namespace.clone(), filter.clone(), pull, false));
        }
        let forgotten = database.write(StoreOperation::Tidy, models).await;
        if forgotten.is_empty() {
            return;
        }
        let gone = self.past.iter().filter(|member| member.s.is_none()).map(|member| {
            let filter = doc! {
                "_id": &member.id, "c": &self.channel,
                "s": { "$exists": false }, "past": { "$size": 0_i32 },
            };
            WriteModel::DeleteOne(
                DeleteOneModel::builder().namespace(namespace.clone()).filter(filter).build(),
            )
        });
        let _next_time = database.write(StoreOperation::Tidy, gone.collect()).await;
    }
}
