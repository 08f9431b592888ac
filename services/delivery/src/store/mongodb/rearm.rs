//! When claimed inboxes are due again. An inbox without failed messages takes one blind write; one with them is read
//! first, as what is due in it depends on them.

use std::collections::HashMap;

use mongodb::{
    bson::{Binary, Document, doc},
    options::WriteModel,
};
use serde::Deserialize;

use super::{
    database::{Database, Outcome},
    documents::{self, binary},
};
use crate::{
    metrics::StoreOperation,
    store::{Attempts, Next, Rearm, StoreError, due},
};

/// How often an inbox is read when others change it meanwhile. After that its claim ends by itself.
const TRIES: usize = 3;

/// Narrows a filter to where the attempts still are what they were `before`, with the count of settling writes that they
/// were read with. Who acks what never failed does not get in the way.
pub(super) fn unless_attempts_changed(before: &Attempts, settles: i64, filter: &mut Document) {
    if before.is_empty() {
        filter.insert("attempts", doc! { "$exists": false });
    } else {
        filter.insert("settles", settles);
    }
}

/// The update that sets and unsets these fields, without an operator that has none.
pub(super) fn update_of_fields(set: Document, unset: Document) -> Document {
    let operators = [("$set", set), ("$unset", unset)].into_iter().filter(|(_, fields)| !fields.is_empty());
    operators.map(|(operator, fields)| (operator.to_owned(), fields.into())).collect()
}

/// A change of when an inbox is due, and of its attempts.
#[derive(Default)]
pub(super) struct Change {
    pub(super) set: Document,
    unset: Document,
    counted: bool,
}

impl Change {
    /// A change that is made only where the attempts still are what they were `before`.
    pub(super) fn new(before: &Attempts, settles: i64, filter: &mut Document) -> Self {
        unless_attempts_changed(before, settles, filter);
        Self::default()
    }

    /// Sets when the inbox is due.
    pub(super) fn due(&mut self, due_us: Option<u64>) {
        match due_us {
            Some(due_us) => drop(self.set.insert("due", due_us.cast_signed())),
            None => drop(self.unset.insert("due", "")),
        }
    }

    /// Sets the attempts, when they changed.
    pub(super) fn attempts(&mut self, before: &Attempts, attempts: &Attempts) {
        if before != attempts {
            self.counted = true;
            if attempts.is_empty() {
                self.unset.insert("attempts", "");
            } else {
                self.set.insert("attempts", binary(attempts.encode()));
            }
        }
    }

    /// The update; not empty.
    pub(super) fn update(self) -> Document {
        let mut update = update_of_fields(self.set, self.unset);
        if self.counted {
            update.insert("$inc", doc! { "settles": 1_i64 });
        }
        update
    }
}

/// What follows for a claimed inbox goes by this of it.
#[derive(Debug, Deserialize)]
struct ClaimedDoc {
    #[serde(rename = "_id")]
    user: String,
    seq: i64,
    mark: i64,
    settles: i64,
    written: i64,
    #[serde(default)]
    attempts: Option<Binary>,
}

/// Says what follows for claimed inboxes.
pub(super) async fn rearm(database: &Database, rearms: &[Rearm]) -> Result<(), StoreError> {
    // The last word about an inbox counts.
    let rearms: HashMap<&str, &Rearm> = rearms.iter().map(|rearm| (rearm.user.as_str(), rearm)).collect();
    let mut missed: Vec<&Rearm> = rearms.into_values().collect();
    let models = missed.iter().map(|rearm| simple(database, rearm)).collect();
    missed = write(database, missed, models).await?;
    for _ in 0..TRIES {
        if missed.is_empty() {
            break;
        }
        missed = again(database, missed).await?;
    }
    Ok(())
}

/// Writes, and returns those of which the condition did not hold.
async fn write<'a>(
    database: &Database,
    rearms: Vec<&'a Rearm>,
    models: Vec<WriteModel>,
) -> Result<Vec<&'a Rearm>, StoreError> {
    let mut missed = Vec::new();
    for (rearm, outcome) in rearms.into_iter().zip(database.write(StoreOperation::Claim, models).await) {
        match outcome {
            Outcome::Done => {}
            Outcome::Missed => missed.push(rearm),
            Outcome::Unknown(error) => return Err(StoreError::Unavailable(error)),
        }
    }
    Ok(missed)
}

/// Selects the inbox of a claim. One that was written or settled meanwhile is not armed any more, and stays so. One
/// that was armed afresh is due when that says.
fn claimed(rearm: &Rearm) -> Document {
    doc! { "_id": &rearm.user, "armed": rearm.armed.cast_signed(), "due": { "$gt": 0_i64 } }
}

/// The write for an inbox without failed messages.
fn simple(database: &Database, rearm: &Rearm) -> WriteModel {
    let mut filter = claimed(rearm);
    let mut change = Change::new(&Attempts::default(), 0, &mut filter);
    let (due_us, attempt) = match rearm.next {
        Next::At { due_us, attempt } => (Some(due_us), attempt),
        Next::Parked => (None, 0),
    };
    change.due(due_us);
    change.set.insert("attempt", i64::from(attempt));
    database.update(filter, change.update(), false)
}

/// Reads inboxes that have failed messages and writes what follows for them; returns those that changed meanwhile.
async fn again<'a>(database: &Database, rearms: Vec<&'a Rearm>) -> Result<Vec<&'a Rearm>, StoreError> {
    let users: Vec<String> = rearms.iter().map(|rearm| rearm.user.clone()).collect();
    let fields = doc! { "seq": 1, "mark": 1, "settles": 1, "written": 1, "attempts": 1 };
    let found: Vec<ClaimedDoc> = database.find_inboxes(StoreOperation::Claim, &users, fields).await?;
    let found: HashMap<&str, &ClaimedDoc> = found.iter().map(|inbox| (inbox.user.as_str(), inbox)).collect();
    let (mut tried, mut models) = (Vec::new(), Vec::new());
    for rearm in rearms {
        let Some(inbox) = found.get(rearm.user.as_str()) else { continue };
        let before = documents::attempts(&inbox.user, inbox.attempts.as_ref())?;
        if before.is_empty() {
            // It was armed afresh, or is not armed any more.
            continue;
        }
        let (mut attempts, mut filter) = (before.clone(), claimed(rearm));
        let unwritten = inbox.written.max(inbox.mark) < inbox.seq;
        let (due_us, attempt) = due::rearm(&mut attempts, unwritten, rearm.next);
        let mut change = Change::new(&before, inbox.settles, &mut filter);
        change.due(due_us);
        change.set.insert("attempt", i64::from(attempt));
        change.attempts(&before, &attempts);
        models.push(database.update(filter, change.update(), false));
        tried.push(rearm);
    }
    write(database, tried, models).await
}
