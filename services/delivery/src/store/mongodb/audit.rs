//! The audit of inboxes: an inbox document says in one step what must be there, and what lies beside it is looked up.

use mongodb::{bson::doc, options::FindOptions};
use serde::Deserialize;

use super::{
    database::Database,
    documents::{bodies_between, settled_of},
};
use crate::{
    metrics::StoreOperation,
    store::{
        Settled, StoreError,
        audit::{self, AuditPage, Finding, MAX_AUDITED_BODIES},
    },
};

/// How often an inbox is looked at again when it changes meanwhile. One that still does is left for the next round.
const TRIES: usize = 4;

/// What the audit needs of an inbox.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct AuditDoc {
    #[serde(rename = "_id")]
    user: String,
    epoch: i64,
    seq: i64,
    mark: i64,
    settled: Vec<i64>,
    settles: i64,
    spilled: i64,
    messages: Vec<NumberDoc>,
}

/// The number of a body.
#[derive(Debug, Clone, Copy, Deserialize)]
struct NumberDoc {
    n: i64,
}

/// The numbers of bodies beside an inbox.
#[derive(Debug, Deserialize)]
struct NumbersDoc {
    messages: Vec<NumberDoc>,
}

impl AuditDoc {
    fn fields() -> mongodb::bson::Document {
        doc! { "epoch": 1, "seq": 1, "mark": 1, "settled": 1, "settles": 1, "spilled": 1, "messages.n": 1 }
    }

    /// Changes with everything that takes bodies away or moves them.
    fn version(&self) -> (i64, i64, i64) {
        (self.seq, self.settles, self.spilled)
    }

    fn settled(&self) -> Settled {
        settled_of(self.mark, &self.settled)
    }
}

/// Audits up to `limit` inboxes whose users' names follow `after`.
pub(super) async fn audit(database: &Database, after: &str, limit: usize) -> Result<AuditPage, StoreError> {
    let inboxes: Vec<AuditDoc> = database.find_after(after, limit, AuditDoc::fields()).await?;
    let more = inboxes.len() >= limit;
    let mut page = AuditPage::default();
    let mut looked_at = 0;
    let count = inboxes.len();
    for inbox in inboxes {
        let user = inbox.user.clone();
        let (finding, bodies) = check(database, inbox).await?;
        page.findings.extend(finding);
        page.inboxes += 1;
        looked_at += bodies;
        if (more && page.inboxes == count) || (looked_at >= MAX_AUDITED_BODIES && page.inboxes < count) {
            page.next = Some(user);
            break;
        }
    }
    Ok(page)
}

/// What is wrong with an inbox, and how many bodies were looked at.
async fn check(database: &Database, mut inbox: AuditDoc) -> Result<(Option<Finding>, usize), StoreError> {
    let mut looked_at = 0;
    for _ in 0..TRIES {
        let bodies = bodies(database, &inbox).await?;
        looked_at += bodies.len();
        let (epoch, head) = (inbox.epoch.cast_unsigned(), inbox.seq.cast_unsigned());
        let Some(finding) = audit::compare(epoch, head, &inbox.settled(), bodies) else {
            return Ok((None, looked_at));
        };
        // What was beside the inbox when it was read may have been settled and removed before that was looked at.
        let users = [inbox.user.clone()];
        let found = database.find_inboxes(StoreOperation::Audit, &users, AuditDoc::fields()).await?.pop();
        let again: AuditDoc = found.unwrap_or_default();
        if again.version() == inbox.version() {
            return Ok((Some(finding), looked_at));
        }
        inbox = again;
    }
    Ok((None, looked_at))
}

/// The seqs of the bodies in the inbox and beside it, ascending. Beside it may lie some that are settled: they stay
/// until all in their document are.
async fn bodies(database: &Database, inbox: &AuditDoc) -> Result<Vec<u64>, StoreError> {
    let mut seqs: Vec<u64> = inbox.messages.iter().map(|message| message.n.cast_unsigned()).collect();
    let (mark, spilled) = (inbox.mark.cast_unsigned(), inbox.spilled.cast_unsigned());
    if spilled > mark {
        let filter = bodies_between(&inbox.user, mark + 1, spilled);
        let options = FindOptions::builder().projection(doc! { "messages.n": 1 }).build();
        let beside: Vec<NumbersDoc> = database.find_beside(StoreOperation::Audit, filter, options).await?;
        let settled = inbox.settled();
        let beside = beside.iter().flat_map(|bodies| &bodies.messages).map(|body| body.n.cast_unsigned());
        seqs.extend(beside.filter(|seq| !settled.holds(*seq)));
    }
    seqs.sort_unstable();
    Ok(seqs)
}
