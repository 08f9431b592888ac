//! A server that speaks MongoDB's protocol, as a process under test or as one that somebody runs for the tests.

use std::{
    env, io,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use bson::{Bson, Document, doc};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::OnceCell,
    time::timeout,
};

use super::{is_program, on_path};
use crate::{process::Process, settings::free_port, spawn::remove_at_exit, wait::eventually};

/// A MongoDB 8 that somebody runs for the tests: `mongodb://…` or `mongodb+srv://…`.
const URI: &str = "SANJAY_TEST_MONGODB_URI";

/// Where SecantusDB's Python server is, when it is not on the `PATH`.
const SECANTUS: &str = "SANJAY_SECANTUS";

/// How long a server may take to start, and to recover its files.
const START: Duration = Duration::from_secs(60);

/// How long it may take to answer one command.
const COMMAND: Duration = Duration::from_secs(10);

/// Longest reply that is read, in bytes.
const MAX_REPLY: usize = 48_000_000;

/// How a server of a test's own is started.
#[derive(Debug, Clone, Copy, Default)]
pub struct MongoOptions {
    sync_on_commit: bool,
    test_commands: bool,
}

impl MongoOptions {
    /// Each commit is on the disk before its answer. SecantusDB otherwise keeps what it answered in memory for a
    /// moment, so that its own death may lose it; `mongod` has it durable for writes that ask for the journal.
    #[must_use]
    pub fn sync_on_commit(mut self) -> Self {
        self.sync_on_commit = true;
        self
    }

    /// With the commands for tests, such as `configureFailPoint`.
    #[must_use]
    pub fn test_commands(mut self) -> Self {
        self.test_commands = true;
        self
    }
}

/// A server, stopped when dropped if it is ours.
#[derive(Debug)]
pub struct Mongo {
    place: Place,
}

#[derive(Debug)]
enum Place {
    Own(Box<Own>),
    /// The URI without database and credentials; name and password.
    Foreign(Address, Option<(String, String)>),
}

/// A URI up to the database, and what follows it.
#[derive(Debug, PartialEq, Eq)]
struct Address {
    hosts: String,
    options: String,
}

#[derive(Debug)]
struct Own {
    process: Process,
    program: Program,
    options: MongoOptions,
    port: u16,
    data: PathBuf,
    _directory: Option<TempDir>,
}

/// What is started.
#[derive(Debug, Clone)]
enum Program {
    Mongod(PathBuf),
    Secantus(PathBuf),
}

impl Mongo {
    /// Starts a server of its own with the usual options.
    pub async fn start() -> Self {
        Self::start_with(MongoOptions::default()).await
    }

    /// Starts a server of its own: `mongod`, else `secantusd-rs`, else SecantusDB's Python server (at
    /// `SANJAY_SECANTUS`, on the `PATH`, or in `tests/.venv`).
    ///
    /// # Panics
    /// When none of them is installed, or it does not start.
    pub async fn start_with(options: MongoOptions) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let data = directory.path().to_owned();
        Self { place: Place::Own(Box::new(Own::start(options, data, Some(directory)).await)) }
    }

    /// The server that the tests of one binary share: the one of `SANJAY_TEST_MONGODB_URI`, or one that runs until
    /// the binary ends. Each test is to take a [`database`](Self::database) of its own, and to leave the server
    /// running.
    ///
    /// # Panics
    /// When the URI is none, or a server cannot be started.
    pub async fn shared() -> &'static Self {
        static SHARED: OnceCell<Mongo> = OnceCell::const_new();
        SHARED
            .get_or_init(|| async {
                if let Ok(uri) = env::var(URI) {
                    let (address, login) = split(&uri);
                    return Self { place: Place::Foreign(address, login) };
                }
                let data = tempfile::tempdir().expect("a temporary directory can be made").keep();
                // Nothing drops what is static.
                remove_at_exit(&data);
                Self { place: Place::Own(Box::new(Own::start(MongoOptions::default(), data, None).await)) }
            })
            .await
    }

    /// A database's name that no other call gives.
    #[must_use]
    pub fn database(&self) -> String {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        format!("sanjay_test_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed))
    }

    /// The address of a database, without credentials.
    #[must_use]
    pub fn uri(&self, database: &str) -> String {
        match &self.place {
            Place::Own(own) => format!("mongodb://127.0.0.1:{}/{database}?directConnection=true", own.port),
            Place::Foreign(Address { hosts, options }, _) => format!("{hosts}/{database}{options}"),
        }
    }

    /// Name and password, where the server asks for them.
    #[must_use]
    pub fn login(&self) -> Option<(&str, &str)> {
        match &self.place {
            Place::Foreign(_, Some((name, password))) => Some((name, password)),
            _ => None,
        }
    }

    /// Whether the server is somebody else's, which cannot be killed, stopped or given commands.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        matches!(self.place, Place::Foreign(..))
    }

    /// What it is, for measurements.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.place {
            Place::Own(own) => {
                let mode = if own.options.sync_on_commit { ", synchronised on each commit" } else { "" };
                format!("{}{mode}", own.program.path().display())
            }
            Place::Foreign(address, _) => address.hosts.clone(),
        }
    }

    fn own(&self) -> &Own {
        match &self.place {
            Place::Own(own) => own,
            Place::Foreign(..) => panic!("the server of {URI} is not ours; start one with Mongo::start"),
        }
    }

    fn own_mut(&mut self) -> &mut Own {
        match &mut self.place {
            Place::Own(own) => own,
            Place::Foreign(..) => panic!("the server of {URI} is not ours; start one with Mongo::start"),
        }
    }

    /// Its port on 127.0.0.1.
    ///
    /// # Panics
    /// When the server is not ours; likewise below.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.own().port
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.own().process.id()
    }

    /// Where its files are.
    #[must_use]
    pub fn data(&self) -> &Path {
        &self.own().data
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.own_mut().process.kill();
    }

    /// Kills it if it still runs, and starts it on the same port and data.
    pub async fn restart(&mut self) {
        let own = self.own_mut();
        own.process.kill();
        own.process = own.program.spawn(own.port, own.options, &own.data);
        own.ready().await;
    }

    /// SIGSTOP: its connections stay, and nobody answers.
    pub fn stop(&mut self) {
        self.own_mut().process.pause();
    }

    /// SIGCONT.
    pub fn cont(&mut self) {
        self.own_mut().process.signal(libc::SIGCONT);
    }

    /// One command to a database, over a connection of its own.
    ///
    /// # Panics
    /// When it fails.
    pub async fn command(&self, database: &str, command: Document) -> Document {
        let name = command.keys().next().cloned().unwrap_or_default();
        let answer = call(self.own().port, database, command).await;
        let answer = answer.unwrap_or_else(|error| panic!("no answer to {name}: {error}"));
        assert!(is_ok(&answer), "{name} failed: {answer}");
        answer
    }
}

impl Own {
    async fn start(options: MongoOptions, data: PathBuf, directory: Option<TempDir>) -> Self {
        let (program, port) = (Program::find(), free_port());
        let process = program.spawn(port, options, &data);
        let mut own = Self { process, program, options, port, data, _directory: directory };
        own.ready().await;
        own
    }

    /// Waits until it takes writes.
    async fn ready(&mut self) {
        let what = format!("{} takes writes", self.program.path().display());
        let mut asked = false;
        eventually(&what, START, async || {
            if let Some(status) = self.process.ended() {
                panic!("{} ended: {status}\n{}", self.process.name(), self.process.stdout());
            }
            let hello = call(self.port, "admin", doc! { "hello": 1 }).await.ok()?;
            if hello.get_bool("isWritablePrimary").is_ok_and(|primary| primary) {
                return Some(());
            }
            if matches!(self.program, Program::Mongod(_)) && !asked {
                let member = doc! { "_id": 0, "host": format!("127.0.0.1:{}", self.port) };
                let config = doc! { "_id": "sanjay", "members": [member] };
                asked = call(self.port, "admin", doc! { "replSetInitiate": config }).await.is_ok();
            }
            None
        })
        .await;
    }
}

impl Program {
    fn find() -> Self {
        if let Some(path) = on_path("mongod") {
            return Self::Mongod(path);
        }
        // Beside the repository's tests, where tests/run installs it.
        let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/.venv/bin/secantusd-py");
        let found = on_path("secantusd-rs")
            .or_else(|| env::var_os(SECANTUS).map(PathBuf::from))
            .or_else(|| on_path("secantusd-py"))
            .or_else(|| is_program(&installed).then_some(installed));
        Self::Secantus(found.expect(
            "no server for MongoDB's protocol: install MongoDB 8 (mongod), or SecantusDB 0.7.0b3 with pip into \
             tests/.venv, which tests/run does by itself; or name one's address in SANJAY_TEST_MONGODB_URI",
        ))
    }

    fn path(&self) -> &Path {
        match self {
            Program::Mongod(path) | Program::Secantus(path) => path,
        }
    }

    fn spawn(&self, port: u16, options: MongoOptions, data: &Path) -> Process {
        let mut command = Command::new(self.path());
        command.current_dir(data).args(["--port", &port.to_string()]);
        match self {
            Program::Mongod(_) => {
                command.args(["--bind_ip", "127.0.0.1", "--replSet", "sanjay", "--dbpath"]).arg(data);
                if options.test_commands {
                    command.args(["--setParameter", "enableTestCommands=1"]);
                }
            }
            Program::Secantus(_) => {
                command.args(["--host", "127.0.0.1", "--storage-path"]).arg(data.join("data"));
                if options.sync_on_commit {
                    command.arg("--sync-on-commit");
                }
                if options.test_commands {
                    command.arg("--enable-test-commands");
                }
            }
        }
        let name = self.path().file_name().unwrap_or_default().to_string_lossy();
        Process::spawn(&name, command, data)
    }
}

/// Takes a URI apart: hosts and options, and whom to log in as.
///
/// # Panics
/// When it is none.
fn split(uri: &str) -> (Address, Option<(String, String)>) {
    let (scheme, rest) = uri.split_once("://").unwrap_or_else(|| panic!("{URI} is no URI"));
    let (before, options) = rest.split_once('?').map_or((rest, String::new()), |(b, o)| (b, format!("?{o}")));
    let (login, place) =
        before.rsplit_once('@').map_or((None, before), |(login, place)| (Some(login), place));
    let hosts = place.split_once('/').map_or(place, |(hosts, _)| hosts);
    let login = login.map(|login| {
        let (name, password) = login.split_once(':').unwrap_or((login, ""));
        (decode(name), decode(password))
    });
    (Address { hosts: format!("{scheme}://{hosts}"), options }, login)
}

/// Undoes percent-encoding.
fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escaped =
            tail.get(..2).and_then(|hex| u8::from_str_radix(std::str::from_utf8(hex).ok()?, 16).ok());
        match escaped {
            Some(byte) if *first == b'%' => (bytes.push(byte), rest = &tail[2..]).1,
            _ => (bytes.push(*first), rest = tail).1,
        }
    }
    String::from_utf8(bytes).expect("a name is UTF-8")
}

/// A field's number, whatever type the server chose for it.
fn number(answer: &Document, field: &str) -> Option<i64> {
    match answer.get(field)? {
        Bson::Int32(number) => Some(i64::from(*number)),
        Bson::Int64(number) => Some(*number),
        Bson::Double(number) => Some(*number as i64),
        _ => None,
    }
}

fn is_ok(answer: &Document) -> bool {
    number(answer, "ok") == Some(1)
}

/// One command in the form of `OP_MSG`.
async fn call(port: u16, database: &str, mut command: Document) -> io::Result<Document> {
    const OP_MSG: i32 = 2013;
    command.insert("$db", database);
    let body = command.to_vec().map_err(io::Error::other)?;
    let length = i32::try_from(16 + 4 + 1 + body.len()).map_err(io::Error::other)?;
    let mut request = Vec::new();
    // Length, request id, id of the request that is answered, kind of message; then no flags, and one body.
    for number in [length, 1, 0, OP_MSG, 0] {
        request.extend_from_slice(&number.to_le_bytes());
    }
    request.push(0);
    request.extend_from_slice(&body);
    let exchange = async {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
        socket.write_all(&request).await?;
        let length = usize::try_from(socket.read_i32_le().await?).map_err(io::Error::other)?;
        if !(21..=MAX_REPLY).contains(&length) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a reply of {length} bytes")));
        }
        let mut reply = vec![0; length - 4];
        socket.read_exact(&mut reply).await?;
        Document::from_reader(&reply[17..]).map_err(io::Error::other)
    };
    timeout(COMMAND, exchange).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
#[path = "mongo_tests.rs"]
mod tests;
