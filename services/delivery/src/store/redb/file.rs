//! The redb file: opens it, says in plain words why that failed, and opens it again after a failed write.

use std::{
    fs::{File, OpenOptions},
    io::ErrorKind,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use parking_lot::RwLock;
use redb::{Database, DatabaseError, ReadableDatabase, StorageError};
use sanjay_runtime::random::Random;

use super::tables;
use crate::store::StoreError;

/// Why the redb file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error(
        "{path} is in use by another sanjay process; stop that one first (`fuser {path}` shows its process id), or give this one a file of its own"
    )]
    Locked {
        /// The file.
        path: String,
    },
    /// There is no directory for it.
    #[error(
        "{path} cannot be created: the directory {directory} does not exist; create it, or name another file"
    )]
    NoDirectory {
        /// The file.
        path: String,
        /// The directory.
        directory: String,
    },
    /// It is not a store, or a damaged one.
    #[error(
        "{path} is not a readable inbox store: {error}; it was left as it is. Restore it from a backup, or move it away to begin with an empty store"
    )]
    Corrupt {
        /// The file.
        path: String,
        /// What redb found.
        error: String,
    },
    /// It was written by another version.
    #[error(
        "{path} has format {found}, but this build reads format {}; use the build that wrote it",
        tables::FORMAT
    )]
    Format {
        /// The file.
        path: String,
        /// Its format.
        found: u64,
    },
    /// Anything else, such as missing permissions or a full disk.
    #[error("{path} cannot be opened: {error}")]
    Other {
        /// The file.
        path: String,
        /// What the system said.
        error: String,
    },
}

/// Pages of the file that are kept in memory, in bytes. The library's own default is 1 GiB, more than a small
/// container has; the operating system caches the file as well.
const CACHE_BYTES: usize = 128 * 1024 * 1024;

/// The open database, which is away for a moment after a failed write.
pub(super) struct RedbFile {
    path: PathBuf,
    database: RwLock<Option<Arc<Database>>>,
}

impl RedbFile {
    /// Opens or creates the file. Returns it with its store's identity.
    pub(super) fn open(path: PathBuf, random: &dyn Random) -> Result<(Self, u64), OpenError> {
        let database = open_database(&path)?;
        let store_id = prepare(&path, &database, random)?;
        Ok((Self { path, database: RwLock::new(Some(Arc::new(database))) }, store_id))
    }

    /// The database.
    ///
    /// # Errors
    /// While it is closed after a failed write.
    pub(super) fn get(&self) -> Result<Arc<Database>, StoreError> {
        self.database.read().clone().ok_or_else(|| {
            StoreError::Unavailable(format!(
                "{} is being opened again after a failed write",
                self.path.display()
            ))
        })
    }

    /// Whether the database is open.
    pub(super) fn is_open(&self) -> bool {
        self.database.read().is_some()
    }

    /// Closes the database as soon as its readers are done: after a failed write redb refuses everything.
    pub(super) fn close(&self) {
        drop(self.database.write().take());
    }

    /// Opens the database again after [`RedbFile::close`].
    pub(super) fn reopen(&self) -> Result<(), OpenError> {
        let database = open_database(&self.path)?;
        *self.database.write() = Some(Arc::new(database));
        Ok(())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

fn open_database(path: &Path) -> Result<Database, OpenError> {
    let text = || path.display().to_string();
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory,
        _ => Path::new("."),
    };
    if !directory.is_dir() {
        return Err(OpenError::NoDirectory { path: text(), directory: directory.display().to_string() });
    }
    let io = |error: std::io::Error| OpenError::Other { path: text(), error: error.to_string() };
    let is_new = create_private(path).map_err(io)?;
    let shown = text();
    let database = Database::builder()
        .set_cache_size(CACHE_BYTES)
        .set_repair_callback(move |repair| {
            let percent = (repair.progress() * 100.0) as u32;
            tracing::warn!(path = shown, percent, "the inbox store was not closed cleanly; checking it");
        })
        .create(path)
        .map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch => {
                OpenError::Locked { path: text() }
            }
            DatabaseError::Storage(StorageError::Io(error)) if error.kind() != ErrorKind::InvalidData => {
                OpenError::Other { path: text(), error: error.to_string() }
            }
            DatabaseError::Storage(StorageError::PreviousIo) => {
                OpenError::Other { path: text(), error: "an earlier write failed".to_owned() }
            }
            error => OpenError::Corrupt { path: text(), error: error.to_string() },
        })?;
    if is_new {
        // The file's name must be as durable as its content.
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(io)?;
    }
    Ok(database)
}

/// Creates an empty file that its owner alone may read: it will hold every payload. Returns false, and leaves
/// the file as it is, when there is one.
fn create_private(path: &Path) -> std::io::Result<bool> {
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Checks the format, and in a new file creates the tables and the store's identity.
fn prepare(path: &Path, database: &Database, random: &dyn Random) -> Result<u64, OpenError> {
    let text = || path.display().to_string();
    let (format, store_id) = read_meta(database).map_err(|error| match error {
        redb::Error::Io(error) => OpenError::Other { path: text(), error: error.to_string() },
        error => OpenError::Corrupt { path: text(), error: error.to_string() },
    })?;
    match (format, store_id) {
        (Some(tables::FORMAT), Some(store_id)) => {
            add_tables(database)
                .and_then(|()| super::fanout::release_turns(database))
                .map_err(|error| OpenError::Other { path: text(), error: error.to_string() })?;
            Ok(store_id)
        }
        (Some(found), _) => Err(OpenError::Format { path: text(), found }),
        (None, _) => {
            let store_id = random.next_u64();
            create_tables(database, store_id)
                .map_err(|error| OpenError::Other { path: text(), error: error.to_string() })?;
            Ok(store_id)
        }
    }
}

fn read_meta(database: &Database) -> Result<(Option<u64>, Option<u64>), redb::Error> {
    let transaction = database.begin_read()?;
    let meta = match transaction.open_table(tables::META) {
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok((None, None)),
        meta => meta?,
    };
    let get = |key| -> Result<Option<u64>, redb::Error> { Ok(meta.get(key)?.map(|value| value.value())) };
    Ok((get("format")?, get("store_id")?))
}

fn create_tables(database: &Database, store_id: u64) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut meta = transaction.open_table(tables::META)?;
        meta.insert("format", tables::FORMAT)?;
        meta.insert("store_id", store_id)?;
        drop(meta);
        tables::create(&transaction)?;
    }
    transaction.commit()?;
    Ok(())
}

/// Gives a file of an earlier build the tables that came since.
fn add_tables(database: &Database) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    let before = transaction.list_tables()?.count();
    tables::create(&transaction)?;
    if transaction.list_tables()?.count() == before {
        transaction.abort()?;
    } else {
        transaction.commit()?;
    }
    Ok(())
}
