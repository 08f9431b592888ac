//! Revocations: a document for each subject, also after it was taken back, so that nodes that look for changes find that.
//! The server removes it when it is over.

use mongodb::{
    bson::{DateTime, Document, doc},
    options::FindOptions,
};
use serde::{Deserialize, Serialize};

use super::{
    database::{Database, Outcome, update_of},
    documents::{date, document},
};
use crate::{
    metrics::StoreOperation,
    store::{Revocation, StoreError, Subject},
};

/// What is known of a subject.
#[derive(Debug, Serialize, Deserialize)]
struct RevokedDoc {
    /// [`Subject::key`].
    #[serde(rename = "_id")]
    key: String,
    /// Of a user: tokens that were made before this Unix second.
    before: i64,
    /// Times are Unix microseconds.
    at: i64,
    /// When it is over; the second time for the server, to the millisecond.
    expires: i64,
    x: DateTime,
    reason: String,
    caller: String,
    lifted: bool,
    changed: i64,
}

impl RevokedDoc {
    fn new(revocation: &Revocation) -> Self {
        Self {
            key: revocation.subject.key(),
            before: revocation.before_s.cast_signed(),
            at: revocation.revoked_us.cast_signed(),
            expires: revocation.expires_us.cast_signed(),
            x: date(revocation.expires_us),
            reason: revocation.reason.clone(),
            caller: revocation.caller.clone(),
            lifted: revocation.lifted,
            changed: revocation.changed_us.cast_signed(),
        }
    }

    fn revocation(self) -> Result<Revocation, StoreError> {
        let subject = Subject::from_key(&self.key).ok_or_else(|| {
            StoreError::Unavailable(format!("the revocation {:?} names nothing that is known", self.key))
        })?;
        Ok(Revocation {
            subject,
            before_s: self.before.cast_unsigned(),
            revoked_us: self.at.cast_unsigned(),
            expires_us: self.expires.cast_unsigned(),
            reason: self.reason,
            caller: self.caller,
            lifted: self.lifted,
            changed_us: self.changed.cast_unsigned(),
        })
    }
}

/// Writes what is known of a subject now.
pub(super) async fn set(database: &Database, revocation: &Revocation) -> Result<(), StoreError> {
    let mut fields = document(&RevokedDoc::new(revocation))?;
    let key = fields.remove("_id");
    let namespace = database.revoked.namespace();
    let write = update_of(namespace, doc! { "_id": key }, doc! { "$set": fields }, true);
    match database.write(StoreOperation::Write, vec![write]).await.pop() {
        Some(Outcome::Done) => Ok(()),
        Some(Outcome::Unknown(why)) => Err(StoreError::Unavailable(why)),
        // Two nodes that insert it at once: the other one's is there.
        Some(Outcome::Missed) | None => {
            Err(StoreError::Unavailable("another node wrote it just now".to_owned()))
        }
    }
}

/// Those whose subjects follow `after`, without those that are over.
pub(super) async fn list(
    database: &Database,
    after: Option<&Subject>,
    limit: usize,
) -> Result<Vec<Revocation>, StoreError> {
    let mut filter = doc! { "expires": { "$gt": database.clock.now_us().cast_signed() } };
    if let Some(after) = after {
        filter.insert("_id", doc! { "$gt": after.key() });
    }
    find(database, filter, doc! { "_id": 1 }, limit).await
}

/// Those that were changed at a time or later, the earliest first.
pub(super) async fn changed(
    database: &Database,
    since_us: u64,
    limit: usize,
) -> Result<Vec<Revocation>, StoreError> {
    let filter = doc! { "changed": { "$gte": since_us.cast_signed() } };
    find(database, filter, doc! { "changed": 1 }, limit).await
}

async fn find(
    database: &Database,
    filter: Document,
    sort: Document,
    limit: usize,
) -> Result<Vec<Revocation>, StoreError> {
    let options = FindOptions::builder().sort(sort).limit(i64::try_from(limit).unwrap_or(i64::MAX)).build();
    let found: Vec<RevokedDoc> = database.find_revoked(filter, options).await?;
    found.into_iter().map(RevokedDoc::revocation).collect()
}
