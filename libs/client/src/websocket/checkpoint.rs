//! Where a device keeps which inbox messages it has processed.

use std::{
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use async_trait::async_trait;

use super::dedup::Processed;

/// Why the state of a device could not be loaded or stored.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The store failed.
    #[error("the checkpoint {place} cannot be {doing}: {reason}")]
    Store {
        /// Where it is kept.
        place: String,
        /// `read` or `written`.
        doing: &'static str,
        /// What the system said.
        reason: String,
    },
    /// What was stored is not a checkpoint.
    #[error(
        "{place} is no checkpoint: {reason}; remove it to start anew, which may repeat messages that are not acked"
    )]
    Corrupt {
        /// Where it is kept.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Keeps the state of one user's device. The client calls it from one task at a time.
#[async_trait]
pub trait Checkpoint: Send + Sync + 'static {
    /// The state that was stored last; `None` on a new device.
    ///
    /// # Errors
    /// When it cannot be read. The client then does not start, because it would repeat effects.
    async fn load(&self) -> Result<Option<Processed>, CheckpointError>;

    /// Replaces the state as a whole. Once this returns, [`load`](Self::load) gives the new state whatever
    /// happens to the process; if it fails, the old or the new one.
    ///
    /// # Errors
    /// When it could not be stored. The messages that it stands for are then not acked.
    async fn store(&self, state: &Processed) -> Result<(), CheckpointError>;
}

/// Keeps the state in memory: it lives as long as the process.
#[derive(Debug, Default)]
pub struct MemoryCheckpoint(Mutex<Option<Processed>>);

#[async_trait]
impl Checkpoint for MemoryCheckpoint {
    async fn load(&self) -> Result<Option<Processed>, CheckpointError> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    async fn store(&self, state: &Processed) -> Result<(), CheckpointError> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(state.clone());
        Ok(())
    }
}

/// Keeps the state in a file, replaced in one step and flushed to the disk before each ack. One process at a
/// time may use a file.
#[derive(Debug, Clone)]
pub struct FileCheckpoint {
    path: PathBuf,
}

impl FileCheckpoint {
    /// Keeps the state at `path`; its directory must exist.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, CheckpointError> {
        let path = self.path.clone();
        let done = tokio::task::spawn_blocking(move || work(&path)).await;
        done.map_err(io::Error::other).flatten().map_err(|error| CheckpointError::Store {
            place: self.path.display().to_string(),
            doing,
            reason: error.to_string(),
        })
    }
}

#[async_trait]
impl Checkpoint for FileCheckpoint {
    async fn load(&self) -> Result<Option<Processed>, CheckpointError> {
        let read = |path: &Path| match fs::read(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            other => other.map(Some),
        };
        let Some(bytes) = self.blocking("read", read).await? else { return Ok(None) };
        let corrupt =
            |reason: String| CheckpointError::Corrupt { place: self.path.display().to_string(), reason };
        let state: Processed = serde_json::from_slice(&bytes).map_err(|error| corrupt(error.to_string()))?;
        if !state.is_valid() {
            return Err(corrupt("its ranges are not in order".to_owned()));
        }
        Ok(Some(state))
    }

    async fn store(&self, state: &Processed) -> Result<(), CheckpointError> {
        let bytes = serde_json::to_vec(state).expect("a state consists of numbers and a string");
        self.blocking("written", move |path| replace(path, &bytes)).await
    }
}

/// Writes beside `path`, then renames over it: a crash leaves the old or the new file whole.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut file = fs::File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    // The rename itself is durable once the directory is.
    fs::File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sanjay_protocol::event::InboxState;

    #[tokio::test]
    async fn a_file_keeps_the_state_and_a_damaged_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device.json");
        let checkpoint = FileCheckpoint::new(&path);
        assert_eq!(checkpoint.load().await.unwrap(), None);
        let mut state = Processed::begin(&InboxState { epoch: "00ff".into(), mark: 3, head: 9 });
        state.insert(7);
        checkpoint.store(&state).await.unwrap();
        state.insert(5);
        checkpoint.store(&state).await.unwrap();
        assert_eq!(FileCheckpoint::new(&path).load().await.unwrap(), Some(state));

        for damaged in ["{\"epoch\":", r#"{"epoch":"a","floor":9,"ranges":[[4,5]]}"#] {
            fs::write(&path, damaged).unwrap();
            let error = checkpoint.load().await.unwrap_err();
            assert!(error.to_string().contains("device.json is no checkpoint"), "{error}");
        }
        let nowhere = FileCheckpoint::new(directory.path().join("missing/device.json"));
        let state = Processed::begin(&InboxState { epoch: String::new(), mark: 0, head: 0 });
        assert!(matches!(nowhere.store(&state).await, Err(CheckpointError::Store { doing: "written", .. })));
    }
}
