//! Configuration in layers, each of which overrides the one before: defaults, a TOML file, `SANJAY_…`
//! variables, flags. What is wrong is named with its key, where it came from, and what would be right.
//!
//! A variable whose name ends with `_FILE` gives a path, and the setting's value is the content of that file.

mod files;
mod layers;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use thiserror::Error;

pub use files::{FILE_SUFFIX, MAX_FILE_BYTES, given_twice, read_value};
pub use layers::Layers;

/// The sections that can be set through the environment.
pub const SECTIONS: [&str; 7] = ["edge", "router", "delivery", "namespaces", "telemetry", "admin", "cluster"];

/// What the names of variables begin with. Clients read variables of this prefix too (`SANJAY_URL`), so only
/// names with a section and `__` are looked at.
pub const PREFIX: &str = "SANJAY_";

/// Settings that can be wrong together.
pub trait Validate {
    /// Checks ranges and combinations that types cannot express.
    ///
    /// # Errors
    /// The first setting that is wrong.
    fn validate(&self) -> Result<(), ConfigError>;
}

/// A setting that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("`{key}` {problem}; {fix}")]
pub struct ConfigError {
    /// The key with its path, such as `edge.heartbeat_ms`.
    pub key: String,
    /// What is wrong, as a predicate: `is 5, below the minimum of 1000`.
    pub problem: String,
    /// What would be right, as a demand: `set it between 1000 and 60000`.
    pub fix: String,
}

impl ConfigError {
    /// An error about `key`: what is wrong and what would be right.
    #[must_use]
    pub fn new(key: impl Into<String>, problem: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { key: key.into(), problem: problem.into(), fix: fix.into() }
    }
}

/// Why the configuration could not be loaded.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The file is not there or not readable.
    #[error("cannot read the configuration file `{}`; check the path and its permissions", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file is no TOML.
    #[error("the configuration file `{}` is not valid TOML at line {line}: {problem}", path.display())]
    NotToml {
        /// The file.
        path: PathBuf,
        /// Where, from 1.
        line: usize,
        /// What is wrong there.
        problem: String,
    },
    /// The name of an environment variable fits no section.
    #[error(
        "environment variable `{0}` names no setting; it must look like SANJAY_SECTION__KEY, where SECTION is one \
         of {sections}",
        sections = SECTIONS.map(str::to_uppercase).join(", ")
    )]
    UnknownVariable(String),
    /// The value of an environment variable is no text.
    #[error("environment variable `{0}` is not valid UTF-8; set it to plain text")]
    NotUnicode(String),
    /// A variable that names a file is wrong, or the same setting was given in two ways.
    #[error(transparent)]
    Variable(#[from] ConfigError),
    /// There is no such setting.
    #[error("`{key}` ({source_name}) is not a setting; {}", known(expected))]
    UnknownKey {
        /// The key with its path.
        key: String,
        /// Where it was set.
        source_name: String,
        /// What is known at this place.
        expected: Vec<String>,
    },
    /// The value does not fit the setting.
    #[error("`{key}` ({source_name}): {problem}")]
    WrongValue {
        /// The key with its path.
        key: String,
        /// Where it was set.
        source_name: String,
        /// What was found and what was expected.
        problem: String,
    },
    /// The settings fit their types but not each other, or not their bounds.
    #[error("{error} (now: {source_name})")]
    Invalid {
        /// What is wrong.
        error: ConfigError,
        /// Where it was set.
        source_name: String,
    },
}

fn known(expected: &[String]) -> String {
    if expected.is_empty() { "remove it".to_owned() } else { format!("known here: {}", expected.join(", ")) }
}
