//! One process under test: spawned, watched, killed by its id.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{spawn::spawn, wait::eventually};

/// How long a server may take to accept work.
const START: Duration = Duration::from_secs(30);

/// Lines of a failed test's servers that are shown.
const TAIL: usize = 40;

/// A child process, killed when dropped. Its output goes to files; when the test panics, the end of its standard
/// error is printed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    status: Option<ExitStatus>,
    _directory: Option<TempDir>,
}

impl Process {
    /// Starts `command`; its output goes to `NAME.out` and `NAME.err` in `logs`, behind that of earlier ones.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn spawn(name: &str, mut command: Command, logs: &Path) -> Self {
        let open = |path: &Path| -> File {
            let file = File::options().create(true).append(true).open(path);
            file.expect("a log file can be made")
        };
        let name = if name.is_empty() { "sanjay" } else { name };
        let (stdout, stderr) = (logs.join(format!("{name}.out")), logs.join(format!("{name}.err")));
        command.stdin(Stdio::null()).stdout(open(&stdout)).stderr(open(&stderr));
        let shown = format!("{command:?}");
        let child = spawn(command).unwrap_or_else(|error| panic!("{shown} does not start: {error}"));
        Self { name: name.to_owned(), child, stdout, stderr, status: None, _directory: None }
    }

    /// Keeps a directory as long as the process.
    #[must_use]
    pub(crate) fn keeping(mut self, directory: TempDir) -> Self {
        self._directory = Some(directory);
        self
    }

    /// What it is called in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has printed, of every run into the same directory.
    #[must_use]
    pub fn stdout(&self) -> String {
        fs::read_to_string(&self.stdout).unwrap_or_default()
    }

    /// What it has logged, of every run into the same directory.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }

    /// How it ended, once it has.
    ///
    /// # Panics
    /// When it cannot be asked.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().expect("a child can be asked for its status");
        }
        self.status
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it lasts longer than `limit`.
    pub async fn wait(&mut self, limit: Duration) -> ExitStatus {
        let what = format!("{} ends", self.name);
        eventually(&what, limit, async || self.ended()).await
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            self.status = self.child.wait().ok();
        }
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When the process has ended.
    #[expect(unsafe_code, reason = "there is no safe call that sends a signal to a process")]
    pub fn signal(&mut self, signal: i32) {
        assert!(self.ended().is_none(), "{} has ended", self.name);
        let id = libc::pid_t::try_from(self.child.id()).expect("a process id fits");
        // SAFETY: takes two numbers; the id is that of a child that was not waited for, so that it is not reused.
        let sent = unsafe { libc::kill(id, signal) };
        assert_eq!(sent, 0, "signal {signal} to {}", self.name);
    }

    /// SIGSTOP, and waits until no thread of the process runs any more: on a busy machine that takes a while, in which
    /// it would still answer.
    ///
    /// # Panics
    /// When the process has ended, or does not stop.
    pub fn pause(&mut self) {
        self.signal(libc::SIGSTOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        let began = std::time::Instant::now();
        while !all_stopped(&tasks) {
            assert!(began.elapsed() < Duration::from_secs(10), "{} does not stop", self.name);
            std::thread::yield_now();
        }
    }

    /// SIGTERM, and waits for the exit.
    ///
    /// # Panics
    /// When it lasts longer than `limit`.
    pub async fn terminate(&mut self, limit: Duration) -> ExitStatus {
        self.signal(libc::SIGTERM);
        self.wait(limit).await
    }

    /// Memory that it holds now, in KiB.
    ///
    /// # Panics
    /// When the process has ended.
    #[must_use]
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).expect("the process lives");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it has memory");
        line.trim().trim_end_matches(" kB").parse().expect("a number")
    }

    /// Waits until the server has written its ready file.
    ///
    /// # Panics
    /// When it ends before, or takes longer than 30 s.
    pub async fn ready(&mut self, file: &Path) -> Addresses {
        let what = format!("{} is ready", self.name);
        eventually(&what, START, async || {
            if let Some(status) = self.ended() {
                panic!("{} ended before it was ready: {status}", self.name);
            }
            let text = fs::read(file).ok()?;
            Some(Addresses(serde_json::from_slice(&text).expect("the ready file is written whole")))
        })
        .await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.stderr();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
            #[expect(clippy::print_stderr, reason = "for whoever looks into the failed test")]
            {
                eprintln!("--- {} ({}), the end of its log:\n{tail}\n---", self.name, self.id());
            }
        }
    }
}

/// What a server's ready file says.
#[derive(Debug, Clone)]
pub struct Addresses(pub Value);

impl Addresses {
    /// A field, such as `url`.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn get(&self, field: &str) -> &str {
        self.0[field].as_str().unwrap_or_else(|| panic!("the ready file has no {field}: {}", self.0))
    }
}

/// Whether every thread listed in a `/proc/PID/task` is stopped.
fn all_stopped(tasks: &str) -> bool {
    let stopped = |entry: fs::DirEntry| {
        // A thread that ended meanwhile runs no more either.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
    };
    fs::read_dir(tasks).is_ok_and(|mut entries| entries.all(|entry| entry.is_ok_and(stopped)))
}
