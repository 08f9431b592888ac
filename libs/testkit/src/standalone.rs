//! `sanjay standalone` as a process under test.

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use tempfile::TempDir;

use crate::{
    binary::Sanjay,
    process::{Addresses, Process},
    settings::{Settings, free_port},
};

/// A standalone server with a directory of its own. It can be killed and started again on the same ports and data.
pub struct Standalone {
    /// The process.
    pub process: Process,
    addresses: Addresses,
    arguments: Vec<String>,
    ready: PathBuf,
    directory: TempDir,
}

impl Standalone {
    /// Starts one with the usual settings.
    pub async fn start() -> Self {
        Self::start_with(Settings::default()).await
    }

    /// Starts one.
    ///
    /// # Panics
    /// When it does not become ready.
    pub async fn start_with(settings: Settings) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let path = |name: &str| directory.path().join(name);
        fs::write(path("config.toml"), settings.to_toml()).expect("a file can be written");
        let mut arguments = vec!["standalone".to_owned()];
        let mut flag = |flag: &str, value: String| arguments.extend([flag.to_owned(), value]);
        flag("--config", path("config.toml").display().to_string());
        flag("--data-dir", path("data").display().to_string());
        flag("--ready-file", path("ready.json").display().to_string());
        for listener in ["--listen", "--delivery-listen", "--router-listen", "--admin-listen"] {
            flag(listener, format!("127.0.0.1:{}", free_port()));
        }
        let ready = path("ready.json");
        let mut process = spawn(&arguments, directory.path());
        let addresses = process.ready(&ready).await;
        Self { process, addresses, arguments, ready, directory }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
        // What was ready is not any more; the next start writes it anew.
        let _ = fs::remove_file(&self.ready);
    }

    /// Starts it again, on the same ports and data, after it was killed or has ended.
    pub async fn restart(&mut self) {
        self.kill();
        self.process = spawn(&self.arguments, self.directory.path());
        self.addresses = self.process.ready(&self.ready).await;
    }

    /// SIGTERM, and waits for the exit.
    pub async fn terminate(&mut self) -> ExitStatus {
        let status = self.process.terminate(Duration::from_secs(15)).await;
        let _ = fs::remove_file(&self.ready);
        status
    }

    /// Where clients connect.
    #[must_use]
    pub fn url(&self) -> &str {
        self.addresses.get("url")
    }

    /// Where back ends call.
    #[must_use]
    pub fn server(&self) -> &str {
        self.addresses.get("server")
    }

    /// Where the roles find the router.
    #[must_use]
    pub fn router(&self) -> &str {
        self.addresses.get("router")
    }

    /// The key that it made for itself.
    #[must_use]
    pub fn api_key(&self) -> &str {
        self.addresses.get("api_key")
    }

    /// The token that it made for its developer.
    #[must_use]
    pub fn token(&self) -> &str {
        self.addresses.get("token")
    }

    /// The admin pages.
    #[must_use]
    pub fn admin(&self) -> &str {
        self.addresses.get("admin")
    }

    /// Where it keeps everything.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    /// A client command that finds this server through its variables.
    pub fn cli<A: AsRef<str>>(&self, arguments: impl IntoIterator<Item = A>) -> Sanjay {
        Sanjay::new(arguments)
            .env("SANJAY_URL", self.url())
            .env("SANJAY_TOKEN", self.token())
            .env("SANJAY_SERVER", self.server())
            .env("SANJAY_API_KEY", self.api_key())
    }
}

fn spawn(arguments: &[String], directory: &Path) -> Process {
    Sanjay::new(arguments).directory(directory).spawn_into(directory)
}
