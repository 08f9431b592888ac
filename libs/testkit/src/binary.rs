//! Where the binary under test is, and commands of it that run to their end.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use tempfile::TempDir;

use crate::{process::Process, wait::eventually};

/// The `sanjay` binary: `SANJAY_BIN`, or the one beside this test's executable.
///
/// # Panics
/// When there is none; the text says how to build it.
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(path) = env::var_os("SANJAY_BIN") {
        return PathBuf::from(path);
    }
    let test = env::current_exe().expect("a process knows its executable");
    // target/debug/deps/it-…
    let built = test.ancestors().skip(1).map(|folder| folder.join("sanjay")).find(|path| path.is_file());
    built.expect("no sanjay binary beside the tests: run `cargo build -p sanjay`, or set SANJAY_BIN")
}

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The exit status; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Checks that it succeeded, and gives its output.
    ///
    /// # Panics
    /// When it failed.
    #[must_use]
    pub fn succeeded(self) -> String {
        assert_eq!(self.code, Some(0), "failed: {self:#?}");
        self.stdout
    }

    /// Checks that it failed, and that its error text holds each of `parts`.
    ///
    /// # Panics
    /// Otherwise.
    pub fn failed_with(&self, parts: &[&str]) {
        assert!(self.code.is_some_and(|code| code != 0), "did not fail: {self:#?}");
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is missing: {self:#?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
    }
}

/// A `sanjay` command that is to be run in an empty directory, without any `SANJAY_…` variable of this process.
pub struct Sanjay {
    command: Command,
    name: String,
    directory: TempDir,
}

impl Sanjay {
    /// With these arguments.
    pub fn new<A: AsRef<str>>(arguments: impl IntoIterator<Item = A>) -> Self {
        Self::launched(&[], arguments)
    }

    /// With these arguments, started by another program, such as a shell that sets limits: a command line to which the
    /// binary and its arguments are added.
    pub(crate) fn launched<A: AsRef<str>>(
        launcher: &[String],
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let mut command = match launcher {
            [] => Command::new(binary()),
            [program, first @ ..] => {
                let mut command = Command::new(program);
                command.args(first).arg(binary());
                command
            }
        };
        command.current_dir(directory.path());
        for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SANJAY_")) {
            command.env_remove(name);
        }
        let mut name = String::new();
        for argument in arguments {
            let argument = argument.as_ref();
            if name.is_empty() {
                argument.clone_into(&mut name);
            }
            command.arg(argument);
        }
        Self { command, name, directory }
    }

    /// With a variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.command.env(name, value.into());
        self
    }

    /// Called this in messages and log files.
    #[must_use]
    pub(crate) fn named(mut self, name: String) -> Self {
        self.name = name;
        self
    }

    /// In another directory.
    #[must_use]
    pub fn directory(mut self, path: &Path) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Starts it, to run on beside the test.
    #[must_use]
    pub fn spawn(self) -> Process {
        let logs = self.directory.path().to_owned();
        Process::spawn(&self.name, self.command, &logs).keeping(self.directory)
    }

    /// Starts it like [`spawn`](Self::spawn), with its output in `logs`.
    #[must_use]
    pub(crate) fn spawn_into(self, logs: &Path) -> Process {
        Process::spawn(&self.name, self.command, logs)
    }

    /// Runs it to its end, at most 30 s.
    pub async fn run(self) -> Finished {
        let mut process = self.spawn();
        let what = format!("`sanjay {}` ends", process.name());
        let code = eventually(&what, Duration::from_secs(30), async || process.ended()).await;
        Finished { code: code.code(), stdout: process.stdout(), stderr: process.stderr() }
    }
}
