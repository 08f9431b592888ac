//! The development secrets of `standalone`: made once, kept in the data directory, readable by its owner alone.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{ErrorKind, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use sanjay_runtime::Random;
use serde::{Deserialize, Serialize};

/// Name of the file in the data directory.
pub(crate) const FILE: &str = "secrets.json";

/// The secrets of a data directory.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Secrets {
    /// Signs clients' tokens.
    pub(crate) token_secret: String,
    /// The back ends' key.
    pub(crate) api_key: String,
    /// What the roles show each other.
    pub(crate) cluster_key: String,
}

impl Secrets {
    /// Reads the secrets of a data directory; `None` when it has none.
    ///
    /// # Errors
    /// When the file cannot be read or is no such file.
    pub(crate) fn read(data_dir: &Path) -> anyhow::Result<Option<Self>> {
        let path = data_dir.join(FILE);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        };
        let secrets = serde_json::from_str(&text).with_context(|| {
            format!(
                "{} is damaged; remove it to have new secrets made (old tokens end with it)",
                path.display()
            )
        })?;
        Ok(Some(secrets))
    }

    /// Reads the secrets of a data directory, or makes them, and the directory, when there are none.
    ///
    /// # Errors
    /// When the directory cannot be used.
    pub(crate) fn read_or_make(data_dir: &Path, random: &dyn Random) -> anyhow::Result<Self> {
        let usable = || {
            format!("cannot use the data directory {}; choose another with --data-dir", data_dir.display())
        };
        DirBuilder::new().recursive(true).mode(0o700).create(data_dir).with_context(usable)?;
        if let Some(secrets) = Self::read(data_dir)? {
            return Ok(secrets);
        }
        let secrets = Self {
            token_secret: format!("{}{}", hex(random), hex(random)),
            api_key: format!("sk_{}", hex(random)),
            cluster_key: hex(random),
        };
        write_private(&data_dir.join(FILE), &serde_json::to_vec_pretty(&secrets)?).with_context(usable)?;
        Ok(secrets)
    }
}

/// 128 random bits.
fn hex(random: &dyn Random) -> String {
    format!("{:016x}{:016x}", random.next_u64(), random.next_u64())
}

/// Writes a file that only its owner can read, whole or not at all.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    let Some(name) = path.file_name() else { bail!("{} names no file", path.display()) };
    let mut partial = name.to_owned();
    partial.push(format!(".{}.partial", std::process::id()));
    let partial: PathBuf = path.with_file_name(partial);
    // One of our own may be left from a process that was killed and had the same id. What is made between this
    // and the next line, by whomever, is neither opened nor followed.
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot replace {}", partial.display()));
        }
        _ => {}
    }
    let written = (|| -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&partial, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
    written.with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn a_planted_link_is_replaced_and_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (path, victim) = (directory.path().join("pid"), directory.path().join("victim"));
        fs::write(&victim, "untouched").unwrap();
        symlink(&victim, directory.path().join(format!("pid.{}.partial", std::process::id()))).unwrap();
        write_private(&path, b"new").unwrap();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        let written = fs::symlink_metadata(&path).unwrap();
        assert!(written.is_file());
        assert_eq!(written.permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
    }
}
