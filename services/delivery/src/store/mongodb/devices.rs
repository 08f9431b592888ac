//! Devices that are gone: finds the inboxes in which one was not seen for long, and has their lanes forget it.

use futures::future::join_all;
use mongodb::{bson::doc, options::FindOptions};
use serde::Deserialize;

use super::{
    database::Database,
    due::Share,
    gone,
    queue::Queue,
    work::{Ack, Call, Seeing, Work},
};
use crate::store::{FORGET_AFTER, Forgotten, StoreError};

/// An inbox with a device to forget.
#[derive(Debug, Deserialize)]
struct InboxDoc {
    #[serde(rename = "_id")]
    user: String,
}

/// Forgets devices, of up to `limit` inboxes.
pub(super) async fn forget(
    database: &Database,
    share: &Share,
    queue: &Queue,
    now_us: u64,
    limit: usize,
) -> Result<Forgotten, StoreError> {
    let cutoff_us = now_us.saturating_sub(FORGET_AFTER.as_micros() as u64);
    let mut found: Vec<String> = Vec::new();
    for look in share.looks(database, cutoff_us).await {
        let options = FindOptions::builder()
            .sort(doc! { "seen": 1 })
            .projection(doc! { "_id": 1 })
            .limit(i64::try_from(limit).unwrap_or(i64::MAX))
            .build();
        let some: Vec<InboxDoc> = database.find_due(look.filter("seen"), options).await?;
        found.extend(some.into_iter().map(|inbox| inbox.user).filter(|user| look.is_new(user)));
    }
    found.truncate(limit);
    let more = found.len() == limit;
    let mut devices = 0;
    for answer in join_all(found.into_iter().map(|user| forget_in(queue, user, now_us))).await {
        devices += answer?;
    }
    Ok(Forgotten { devices, more })
}

/// Has the devices of one inbox forgotten; says how many.
async fn forget_in(queue: &Queue, user: String, now_us: u64) -> Result<usize, StoreError> {
    let (call, answered) = Call::new(1, queue.places(1, 0)?);
    let ack = Ack::seeing(user.clone(), Seeing::Gone(now_us), call, 0);
    queue.submit(user, Work::Ack(ack));
    let acked = answered.await.map_err(|_| gone())?.pop().unwrap_or_else(|| Err(gone()))?;
    Ok(acked.refused)
}
