//! The ready file: where a started process can be reached, for scripts and for the client commands.

use std::{fs, io::ErrorKind, path::Path};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::secrets::write_private;

/// Name of the file in a data directory.
pub(crate) const FILE: &str = "ready.json";

/// What a started process says of itself. What it does not have is left out.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Ready {
    /// Where clients connect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) url: Option<String>,
    /// Where back ends call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) server: Option<String>,
    /// Where edges and delivery nodes call the router.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) router: Option<String>,
    /// The admin pages.
    pub(crate) admin: String,
    /// A development token for clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token: Option<String>,
    /// The development key for back ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) api_key: Option<String>,
}

impl Ready {
    /// Reads the file of a data directory; `None` when no server runs there.
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
        let ready = serde_json::from_str(&text);
        ready.map(Some).with_context(|| format!("{} is damaged; restart the server", path.display()))
    }

    /// Writes the file whole or not at all, readable by its owner alone.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        write_private(path, &serde_json::to_vec_pretty(self)?)
    }
}
