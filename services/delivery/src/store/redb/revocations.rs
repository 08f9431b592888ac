//! Revocations: one record for each subject, also after it was taken back, so that whoever looks for changes finds that.

use prost::Message as _;
use redb::{Database, ReadableDatabase, ReadableTable as _, Table, TableDefinition, WriteTransaction};

use super::{tables, transaction::Tables};
use crate::store::{Revocation, Subject};

/// [`Subject::key`] → [`Record`].
const REVOKED: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("revoked");

/// (changed_us, key) of each.
const REVOKED_AT: TableDefinition<'static, (u64, &str), ()> = TableDefinition::new("revoked_at");

#[derive(Clone, PartialEq, prost::Message)]
struct Record {
    #[prost(uint64, tag = "1")]
    before_s: u64,
    #[prost(uint64, tag = "2")]
    revoked_us: u64,
    #[prost(uint64, tag = "3")]
    expires_us: u64,
    #[prost(string, tag = "4")]
    reason: String,
    #[prost(string, tag = "5")]
    caller: String,
    #[prost(bool, tag = "6")]
    lifted: bool,
    #[prost(uint64, tag = "7")]
    changed_us: u64,
}

impl Record {
    fn of(key: &str, bytes: &[u8]) -> Result<Revocation, redb::Error> {
        let damaged = || redb::Error::Corrupted(format!("the key {key:?} of table revoked"));
        let subject = Subject::from_key(key).ok_or_else(damaged)?;
        let Record { before_s, revoked_us, expires_us, reason, caller, lifted, changed_us } =
            tables::decode("revoked", bytes)?;
        Ok(Revocation { subject, before_s, revoked_us, expires_us, reason, caller, lifted, changed_us })
    }
}

/// Creates the tables that a file does not have.
pub(super) fn create(transaction: &WriteTransaction) -> Result<(), redb::Error> {
    RevocationTables::open(transaction).map(|_| ())
}

/// The tables of one write transaction.
pub(super) struct RevocationTables<'txn> {
    revoked: Table<'txn, &'static str, &'static [u8]>,
    revoked_at: Table<'txn, (u64, &'static str), ()>,
}

impl<'txn> RevocationTables<'txn> {
    pub(super) fn open(txn: &'txn WriteTransaction) -> Result<Self, redb::Error> {
        Ok(Self { revoked: txn.open_table(REVOKED)?, revoked_at: txn.open_table(REVOKED_AT)? })
    }

    /// Removes those that are over, of the `limit` that were changed longest ago.
    pub(super) fn sweep(&mut self, now_us: u64, limit: usize) -> Result<(), redb::Error> {
        let mut over = Vec::new();
        for entry in self.revoked_at.iter()?.take(limit) {
            let (at, _) = entry?;
            let (changed_us, key) = at.value();
            let Some(bytes) = self.revoked.get(key)? else { continue };
            if Record::of(key, bytes.value())?.expires_us <= now_us {
                over.push((changed_us, key.to_owned()));
            }
        }
        for (changed_us, key) in over {
            self.revoked_at.remove((changed_us, key.as_str()))?;
            self.revoked.remove(key.as_str())?;
        }
        Ok(())
    }
}

impl Tables<'_> {
    /// Writes what is known of a subject now.
    pub(super) fn revoke(&mut self, revocation: &Revocation) -> Result<(), redb::Error> {
        let key = revocation.subject.key();
        let before = match self.revocations.revoked.get(key.as_str())? {
            Some(bytes) => Some(Record::of(&key, bytes.value())?),
            None => None,
        };
        if let Some(before) = before {
            self.revocations.revoked_at.remove((before.changed_us, key.as_str()))?;
        }
        let Revocation { before_s, revoked_us, expires_us, reason, caller, lifted, changed_us, .. } =
            revocation.clone();
        let record = Record { before_s, revoked_us, expires_us, reason, caller, lifted, changed_us };
        self.revocations.revoked.insert(key.as_str(), record.encode_to_vec().as_slice())?;
        self.revocations.revoked_at.insert((changed_us, key.as_str()), ())?;
        self.must_sync = true;
        Ok(())
    }
}

/// Those whose subjects follow `after`, without those that are over.
pub(super) fn list(
    database: &Database,
    after: Option<&Subject>,
    limit: usize,
    now_us: u64,
) -> Result<Vec<Revocation>, redb::Error> {
    let revoked = database.begin_read()?.open_table(REVOKED)?;
    let after = after.map(Subject::key).unwrap_or_default();
    let mut found = Vec::new();
    for entry in revoked.range(after.as_str()..)? {
        let (key, bytes) = entry?;
        let revocation = Record::of(key.value(), bytes.value())?;
        if key.value() != after && revocation.expires_us > now_us {
            found.push(revocation);
        }
        if found.len() >= limit {
            break;
        }
    }
    Ok(found)
}

/// Those that were changed at a time or later, the earliest first.
pub(super) fn changed(
    database: &Database,
    since_us: u64,
    limit: usize,
) -> Result<Vec<Revocation>, redb::Error> {
    let transaction = database.begin_read()?;
    let (revoked, at) = (transaction.open_table(REVOKED)?, transaction.open_table(REVOKED_AT)?);
    let mut found = Vec::new();
    for entry in at.range((since_us, "")..)?.take(limit) {
        let (at, _) = entry?;
        let key = at.value().1;
        if let Some(bytes) = revoked.get(key)? {
            found.push(Record::of(key, bytes.value())?);
        }
    }
    Ok(found)
}
