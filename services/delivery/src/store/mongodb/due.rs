//! Redelivery: finds due inboxes and claims them. Nodes look in different parts of the users, so that they seldom reach
//! for the same inbox; who gets it is decided by the condition of the write.

use std::time::Duration;

use futures::TryStreamExt;
use mongodb::{
    bson::{Binary, Document, doc},
    options::{FindOptions, WriteModel},
};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    database::{Database, Outcome},
    documents::{self, InboxDoc, date},
    reader,
    rearm::Change,
};
use crate::{
    metrics::StoreOperation,
    store::{
        DueInbox, StoreError,
        due::{self, Claimed},
    },
};

/// How often a node says that it is there and looks who else is.
const ANNOUNCE: Duration = Duration::from_secs(2);

/// For how long a node counts that said nothing.
const ALIVE_US: u64 = 10_000_000;

/// For how long a due inbox is left to the node in whose part it is, in microseconds.
const GRACE_US: u64 = 5_000_000;

/// Most inboxes whose oldest message is looked up beside them for one measurement. For others its age is that of the
/// oldest in the inbox, which is younger.
const MAX_LOOKED_BESIDE: usize = 16;

/// Which part of the users this node looks in first.
pub(super) struct Share {
    /// Off in tests that count on one node finding everything at once.
    sharing: bool,
    known: Mutex<Option<(Instant, Part)>>,
}

/// Hashes from `from` to below `to`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    from: i64,
    to: i64,
}

const ALL: Part = Part { from: 0, to: 1 << 31 };

impl Part {
    /// The part of number `index` among `count` nodes.
    fn of(index: usize, count: usize) -> Self {
        let bound = |index: usize| (index as u128 * ALL.to as u128 / count.max(1) as u128) as i64;
        Self { from: bound(index), to: bound(index + 1) }
    }
}

impl Share {
    pub(super) fn new(sharing: bool) -> Self {
        Self { sharing, known: Mutex::new(None) }
    }

    /// This node's part. Without news of the others it is everything, which is right, only not as cheap.
    async fn part(&self, database: &Database) -> Part {
        if !self.sharing {
            return ALL;
        }
        if let Some((at, part)) = *self.known.lock()
            && at.elapsed() < ANNOUNCE
        {
            return part;
        }
        let part = announce(database).await.unwrap_or(ALL);
        *self.known.lock() = Some((Instant::now(), part));
        part
    }
}

/// One look for what is due by `at_us`.
pub(super) struct Look {
    pub(super) at_us: u64,
    part: Part,
    /// What was looked through before.
    done: Option<Part>,
}

impl Look {
    /// Selects by a field with a time, and by the users' hashes beside it, in the order of their index.
    pub(super) fn filter(&self, field: &str) -> Document {
        due_filter(field, self.at_us, self.part.from, self.part.to)
    }

    /// Whether this user was not among those looked through before.
    pub(super) fn is_new(&self, user: &str) -> bool {
        self.done.is_none_or(|part| !part_holds(part, user))
    }
}

impl Share {
    /// Where to look for what is due: in this node's part, then for what a node that is gone would have taken. The second
    /// is for when the first had less than enough.
    pub(super) async fn looks(&self, database: &Database, now_us: u64) -> Vec<Look> {
        self.looks_beyond(database, now_us, GRACE_US).await
    }

    /// The same, where others' parts count as left when something in them is so many microseconds late.
    pub(super) async fn looks_beyond(&self, database: &Database, now_us: u64, grace_us: u64) -> Vec<Look> {
        let part = self.part(database).await;
        let mut looks = vec![Look { at_us: now_us, part, done: None }];
        if part != ALL {
            looks.push(Look { at_us: now_us.saturating_sub(grace_us), part: ALL, done: Some(part) });
        }
        looks
    }
}

/// Says that this node is there, and works out its part from who else is.
async fn announce(database: &Database) -> Result<Part, StoreError> {
    let now_us = database.clock.now_us();
    let nodes = database.nodes.clone();
    let me = database.node.to_string();
    let found: Vec<Document> = database
        .call(StoreOperation::Claim, async move {
            let update = doc! { "$set": { "seen": date(now_us) } };
            nodes.update_one(doc! { "_id": &me }, update).upsert(true).await?;
            let alive = doc! { "seen": { "$gt": date(now_us.saturating_sub(ALIVE_US)) } };
            nodes.find(alive).await?.try_collect().await
        })
        .await?;
    let mut names: Vec<&str> = found.iter().filter_map(|node| node.get_str("_id").ok()).collect();
    names.sort_unstable();
    let index = names.iter().position(|name| *name == &*database.node);
    Ok(index.map_or(ALL, |index| Part::of(index, names.len())))
}

/// Takes this node off the list.
pub(super) async fn leave(database: Database) {
    let gone = database.nodes.delete_one(doc! { "_id": &*database.node });
    // Otherwise it counts for a few seconds longer.
    let _unheard = database.call(StoreOperation::Claim, gone).await;
}

/// What a claim goes by of an inbox.
#[derive(Debug, Deserialize)]
struct DueDoc {
    #[serde(rename = "_id")]
    user: String,
    epoch: i64,
    seq: i64,
    mark: i64,
    settles: i64,
    written: i64,
    armed: i64,
    attempt: i64,
    due: i64,
    #[serde(default)]
    attempts: Option<Binary>,
    #[serde(default)]
    devices: Option<Binary>,
}

impl DueDoc {
    /// Everything up to it is settled or written.
    fn done(&self) -> i64 {
        self.written.max(self.mark)
    }
}

/// What was claimed.
#[derive(Default)]
pub(super) struct Claims {
    pub(super) due: Vec<DueInbox>,
    /// Users, with the epochs of their inboxes, whose dying messages are to be settled.
    pub(super) dying: Vec<(String, u64)>,
}

/// Claims inboxes that are due.
pub(super) async fn claim(
    database: &Database,
    share: &Share,
    now_us: u64,
    until_us: u64,
    limit: usize,
) -> Result<Claims, StoreError> {
    let mut found = Vec::new();
    for look in share.looks(database, now_us).await {
        let due = find(database, &look, limit - found.len()).await?;
        found.extend(due.into_iter().filter(|due| look.is_new(&due.user)));
    }
    let (mut models, mut planned) = (Vec::new(), Vec::new());
    for inbox in found {
        match plan(database, &inbox, now_us, until_us) {
            Ok((model, claim)) => {
                models.push(model);
                planned.push((inbox, claim));
            }
            // The others go on.
            Err(error) => tracing::error!(%error, "an inbox is not relayed again"),
        }
    }
    let outcomes = database.write(StoreOperation::Claim, models).await;
    let mut claims = Claims::default();
    for ((inbox, plan), outcome) in planned.into_iter().zip(outcomes) {
        match outcome {
            Outcome::Done => claims.add(inbox, plan),
            Outcome::Missed => {}
            // What was claimed comes back by itself.
            Outcome::Unknown(error) => return Err(StoreError::Unavailable(error)),
        }
    }
    Ok(claims)
}

/// What a claim comes to, once its write is done.
struct Plan {
    claimed: Claimed,
    dying: bool,
    missed: bool,
}

impl Claims {
    fn add(&mut self, inbox: DueDoc, plan: Plan) {
        let epoch = inbox.epoch.cast_unsigned();
        if plan.dying {
            self.dying.push((inbox.user.clone(), epoch));
        }
        if plan.claimed.relay {
            self.due.push(DueInbox {
                after: inbox.done().cast_unsigned(),
                user: inbox.user,
                epoch,
                armed: inbox.armed.cast_unsigned(),
                attempt: u32::try_from(inbox.attempt).unwrap_or(u32::MAX),
                retries: plan.claimed.retries,
                missed: plan.missed,
            });
        }
    }
}

/// The write that claims an inbox; its condition is that nothing has changed.
fn plan(
    database: &Database,
    inbox: &DueDoc,
    now_us: u64,
    until_us: u64,
) -> Result<(WriteModel, Plan), StoreError> {
    let mut attempts = documents::attempts(&inbox.user, inbox.attempts.as_ref())?;
    let mut filter = doc! {
        "_id": &inbox.user, "armed": inbox.armed, "due": inbox.due,
        "written": inbox.written, "mark": inbox.mark,
    };
    let before = attempts.clone();
    // A node that does not know of attempts leaves those of what it settles.
    attempts.settle_by(|seq| seq <= inbox.mark.cast_unsigned());
    let dying = attempts.dying().next().is_some();
    let claimed = due::claim(&mut attempts, inbox.done() < inbox.seq, now_us, until_us);
    let mut change = Change::new(&before, inbox.settles, &mut filter);
    change.due(claimed.due_us);
    if !claimed.relay && claimed.due_us.is_none() {
        change.set.insert("attempt", 0_i64);
    }
    change.attempts(&before, &attempts);
    let devices = documents::devices(&inbox.user, inbox.devices.as_ref())?;
    let missed = devices.has_written(inbox.seq.cast_unsigned());
    Ok((database.update(filter, change.update(), false), Plan { claimed, dying, missed }))
}

fn part_holds(part: Part, user: &str) -> bool {
    let hash = i64::from(documents::user_hash(user));
    (part.from..part.to).contains(&hash)
}

/// What selects what is due by a field, of users with these hashes, in the order of the index.
pub(super) fn due_filter(field: &str, now_us: u64, from: i64, to: i64) -> Document {
    doc! { field: { "$gt": 0_i64, "$lte": now_us.cast_signed() }, "h": { "$gte": from, "$lt": to } }
}

async fn find(database: &Database, look: &Look, limit: usize) -> Result<Vec<DueDoc>, StoreError> {
    if limit == 0 {
        return Ok(Vec::new());
    }
    let fields = doc! {
        "epoch": 1, "seq": 1, "mark": 1, "settles": 1, "written": 1, "armed": 1, "attempt": 1, "due": 1,
        "attempts": 1, "devices": 1,
    };
    let options = FindOptions::builder()
        .sort(doc! { "due": 1 })
        .projection(fields)
        .limit(i64::try_from(limit).unwrap_or(i64::MAX))
        .build();
    database.find_due(look.filter("due"), options).await
}

/// When the oldest message was accepted that waits to be written, among the inboxes that are due first and last.
pub(super) async fn oldest(database: &Database, limit: usize) -> Result<Option<u64>, StoreError> {
    let fields = doc! {
        "seq": 1, "mark": 1, "settled": 1, "written": 1, "spilled": 1,
        "messages.n": 1, "messages.i": 1, "messages.h": 1,
    };
    let mut oldest: Option<u64> = None;
    let mut beside = MAX_LOOKED_BESIDE;
    for direction in [1, -1] {
        let options = FindOptions::builder()
            .sort(doc! { "due": direction })
            .projection(fields.clone())
            .limit(i64::try_from(limit).unwrap_or(i64::MAX))
            .build();
        let found: Vec<InboxDoc> = database.find_due(doc! { "due": { "$gt": 0_i64 } }, options).await?;
        for inbox in found {
            let done = inbox.written.max(inbox.mark).cast_unsigned();
            let Some(seq) = reader::unsettled(inbox.settled(), inbox.head(), done).next() else { continue };
            let mut message = inbox.messages.iter().find(|message| message.seq() >= seq).cloned();
            if seq <= inbox.spilled.cast_unsigned() && beside > 0 {
                beside -= 1;
                let (bodies, _) = reader::beside(database, &inbox.user, seq, seq).await?;
                message = bodies.get(&seq).cloned().or(message);
            }
            let Some(message) = message else { continue };
            let accepted_us = message.header()?.time_us;
            oldest = Some(oldest.map_or(accepted_us, |oldest| oldest.min(accepted_us)));
        }
    }
    Ok(oldest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_every_user_once() {
        for count in 1..=7 {
            let parts: Vec<Part> = (0..count).map(|index| Part::of(index, count)).collect();
            assert_eq!((parts[0].from, parts[count - 1].to), (ALL.from, ALL.to));
            assert!(parts.windows(2).all(|pair| pair[0].to == pair[1].from && pair[0].from < pair[0].to));
        }
    }
}
