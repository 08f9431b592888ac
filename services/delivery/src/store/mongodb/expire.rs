//! Finds what has expired and has it settled. Inboxes and the documents beside them say when the first message in them
//! expires; where that has passed, the user's lane settles what it finds, and says when to look again.

use std::collections::{BTreeMap, HashMap};

use futures::future::join_all;
use mongodb::{
    bson::{Document, doc},
    options::{FindOptions, WriteModel},
};
use serde::Deserialize;

use super::{
    ack::AGAIN_US,
    database::{Database, Outcome, update_of},
    documents::{MessageDoc, has_expired},
    due::Share,
    gone,
    queue::Queue,
    work::{Ack, Call, Expiring, Work},
};
use crate::{
    metrics::StoreOperation,
    store::{Acked, Expired, MAX_REPORTED, StoreError},
};

/// Most documents of bodies that are looked at together; each has some hundred messages at most.
const MAX_BODIES: usize = 64;

/// An inbox in which something may have expired.
#[derive(Debug, Deserialize)]
struct InboxDoc {
    #[serde(rename = "_id")]
    user: String,
    expires: i64,
}

/// Bodies of which some may have expired, without their payloads.
#[derive(Debug, Deserialize)]
struct BodiesDoc {
    #[serde(rename = "_id")]
    id: String,
    u: String,
    e: i64,
    messages: Vec<MessageDoc>,
}

/// What was found of one user.
struct Found {
    /// When the first of it expired.
    first: i64,
    bodies: Vec<BodiesDoc>,
}

/// Settles what has expired.
pub(super) async fn expire(
    database: &Database,
    share: &Share,
    queue: &Queue,
    now_us: u64,
    limit: usize,
) -> Result<Expired, StoreError> {
    let limit = limit.max(1);
    let (found, mut more) = find(database, share, now_us, limit).await?;
    if found.is_empty() {
        return Ok(Expired { settled: 0, more });
    }
    let mut users: Vec<(String, Found)> = found.into_iter().collect();
    users.sort_unstable_by(|one, other| (one.1.first, &one.0).cmp(&(other.1.first, &other.0)));
    more |= users.len() > limit;
    users.truncate(limit);
    let each = limit.div_ceil(users.len()).min(MAX_REPORTED);
    let answers = join_all(users.iter().map(|(user, found)| settle(queue, user, found, now_us, each))).await;
    let (mut settled, mut looked, mut failure) = (0, Vec::new(), None);
    for ((_, found), answer) in users.iter().zip(&answers) {
        match answer {
            Ok(acked) => {
                let ended = acked.messages.len() + acked.failed.len();
                settled += ended;
                more |= ended >= each;
                if ended < each {
                    looked.extend(found.bodies.iter().map(|bodies| (bodies, acked.refused > 0)));
                }
            }
            // It is found again.
            Err(error) => failure = Some(error.clone()),
        }
    }
    put_off(database, &looked, now_us).await?;
    match failure {
        Some(error) if settled == 0 => Err(error),
        failure => Ok(Expired { settled, more: more || failure.is_some() }),
    }
}

/// Finds where something has expired; and whether there may be more.
async fn find(
    database: &Database,
    share: &Share,
    now_us: u64,
    limit: usize,
) -> Result<(HashMap<String, Found>, bool), StoreError> {
    let mut found: HashMap<String, Found> = HashMap::new();
    let (mut inboxes, mut bodies) = (0, 0);
    let most_bodies = limit.min(MAX_BODIES);
    let mut note = |user: String, expires: i64, bodies: Option<BodiesDoc>| {
        let found = found.entry(user).or_insert(Found { first: expires, bodies: Vec::new() });
        found.first = found.first.min(expires);
        found.bodies.extend(bodies);
    };
    for look in share.looks(database, now_us).await {
        if inboxes < limit {
            let options = options("expires", limit - inboxes, doc! { "expires": 1 });
            let some: Vec<InboxDoc> = database.find_due(look.filter("expires"), options).await?;
            inboxes += some.len();
            some.into_iter().for_each(|inbox| note(inbox.user, inbox.expires, None));
        }
        if bodies < most_bodies {
            let fields = doc! { "u": 1, "e": 1, "messages.n": 1, "messages.i": 1, "messages.h": 1 };
            let options = options("e", most_bodies - bodies, fields);
            let filter = look.filter("e");
            let some: Vec<BodiesDoc> = database.find_beside(StoreOperation::Claim, filter, options).await?;
            bodies += some.len();
            for some in some.into_iter().filter(|some| look.is_new(&some.u)) {
                note(some.u.clone(), some.e, Some(some));
            }
        }
    }
    Ok((found, inboxes >= limit || bodies >= most_bodies))
}

fn options(by: &str, limit: usize, fields: Document) -> FindOptions {
    FindOptions::builder()
        .sort(doc! { by: 1 })
        .projection(fields)
        .limit(i64::try_from(limit).unwrap_or(i64::MAX))
        .build()
}

/// Has up to `limit` messages of a user settled.
async fn settle(
    queue: &Queue,
    user: &str,
    found: &Found,
    now_us: u64,
    limit: usize,
) -> Result<Acked, StoreError> {
    let mut beside = BTreeMap::new();
    for message in found.bodies.iter().flat_map(|bodies| &bodies.messages) {
        let expires_us = message.header()?.expires_us;
        if has_expired(expires_us, now_us) {
            beside.insert(message.seq(), expires_us);
        }
    }
    let beside = beside.into_iter().map(|(seq, expires_us)| (expires_us, seq)).collect();
    let (call, answered) = Call::new(1, queue.places(1, 0)?);
    let ack = Ack::expiring(user.to_owned(), Expiring { now_us, limit, beside }, call, 0);
    queue.submit(user.to_owned(), Work::Ack(ack));
    answered.await.map_err(|_| gone())?.pop().unwrap_or_else(|| Err(gone()))
}

/// Says of bodies whose expired messages were looked at when the next of them expires; `true` when some are to be tried
/// again. A body that is settled by then costs one more look.
async fn put_off(database: &Database, looked: &[(&BodiesDoc, bool)], now_us: u64) -> Result<(), StoreError> {
    let mut models: Vec<WriteModel> = Vec::with_capacity(looked.len());
    for (bodies, again) in looked {
        let mut next_us = again.then_some(now_us.saturating_add(AGAIN_US));
        for message in &bodies.messages {
            let expires_us = Some(message.header()?.expires_us).filter(|us| *us > now_us);
            next_us = next_us.into_iter().chain(expires_us).min();
        }
        let update = match next_us {
            Some(us) => doc! { "$set": { "e": us.cast_signed() } },
            None => doc! { "$unset": { "e": "", "h": "" } },
        };
        let filter = doc! { "_id": &bodies.id, "u": &bodies.u, "e": bodies.e };
        models.push(update_of(database.beside.namespace(), filter, update, false));
    }
    let outcomes = database.write(StoreOperation::Claim, models).await;
    let failed = outcomes.into_iter().find_map(|outcome| match outcome {
        Outcome::Unknown(problem) => Some(problem),
        Outcome::Done | Outcome::Missed => None,
    });
    // Those are found again.
    if let Some(error) = failed {
        tracing::warn!(error, "when bodies expire was not noted; they are looked at again");
    }
    Ok(())
}
