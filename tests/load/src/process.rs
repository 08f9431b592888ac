//! Processes that the bench starts: pinned, with as many files as the machine allows, and ended on drop.

use std::{
    fs::File,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::Context as _;
use serde::{Serialize, de::DeserializeOwned};

/// Where a process runs, on a machine with two cores or more.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Core {
    /// What is measured.
    Server,
    /// What loads it.
    Client,
}

/// A process that ends with its owner.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts `program` with its standard error appended to `log`.
    pub(crate) fn start(
        name: &str,
        program: &Path,
        arguments: &[String],
        core: Core,
        stdio: fn() -> Stdio,
        log: &Path,
    ) -> anyhow::Result<Self> {
        let log = File::options().create(true).append(true).open(log).context("the log file")?;
        // A shell raises the soft limit of open files and execs, so that the id is the program's own.
        let mut command = Command::new("sh");
        command.arg("-c").arg("ulimit -n \"$(ulimit -Hn)\" && exec \"$@\"").arg("sh");
        if can_pin() {
            let core = match core {
                Core::Server => "0",
                Core::Client => "1",
            };
            command.args(["taskset", "-c", core]);
        }
        command.arg(program).args(arguments).stdin(stdio()).stdout(stdio()).stderr(log);
        let child = command.spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { child, name: name.to_owned() })
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Fails when it has ended.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => anyhow::bail!("{} ended: {status}", self.name),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether processes are pinned: there is `taskset`, and a core for each side.
pub(crate) fn can_pin() -> bool {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let taskset =
        Command::new("taskset").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    cores >= 2 && taskset.is_ok_and(|status| status.success())
}

/// A part of this binary in a process of its own, which takes orders and answers them.
#[derive(Debug)]
pub(crate) struct Part<Answer> {
    process: Process,
    orders: ChildStdin,
    answers: mpsc::Receiver<Answer>,
}

impl<Answer: DeserializeOwned + Send + 'static> Part<Answer> {
    /// Starts this binary as the part that `arguments` name.
    pub(crate) fn start(name: &str, arguments: &[&str], core: Core, log: &Path) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
        let mut process = Process::start(name, &program, &arguments, core, Stdio::piped, log)?;
        let orders = process.child.stdin.take().context("its input")?;
        let output = process.child.stdout.take().context("its output")?;
        let (sender, answers) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let Ok(answer) = serde_json::from_str(&line) else { return };
                if sender.send(answer).is_err() {
                    return;
                }
            }
        });
        Ok(Self { process, orders, answers })
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Gives an order.
    pub(crate) fn order(&mut self, order: &impl Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(order)?;
        line.push(b'\n');
        self.orders.write_all(&line).with_context(|| format!("{} takes no order", self.process.name))
    }

    /// Waits for the next answer.
    pub(crate) fn answer(&mut self, limit: Duration) -> anyhow::Result<Answer> {
        match self.answers.recv_timeout(limit) {
            Ok(answer) => Ok(answer),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                anyhow::bail!("{} did not answer within {limit:?}", self.process.name)
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                self.process.check()?;
                anyhow::bail!("{} closed its output", self.process.name)
            }
        }
    }
}
