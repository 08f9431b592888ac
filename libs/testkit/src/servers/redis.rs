//! A Redis server as a process under test.

use std::{fmt::Write as _, fs, io, path::PathBuf, process::Command, time::Duration};

use tempfile::TempDir;
use tokio::time::timeout;

use super::{
    on_path,
    resp::{Connection, Reply},
};
use crate::{process::Process, settings::free_port, wait::eventually};

/// How long it may take to start, and to load what it has saved.
const START: Duration = Duration::from_secs(30);

/// How long it may take to answer one command.
const COMMAND: Duration = Duration::from_secs(10);

/// How a server is configured. Unless told otherwise it saves nothing by itself and lets everybody in.
#[derive(Debug, Clone, Default)]
pub struct RedisOptions {
    login: Option<(String, String)>,
    lines: Vec<String>,
}

impl RedisOptions {
    /// Only a user with this name and password may call it.
    #[must_use]
    pub fn user(mut self, name: &str, password: &str) -> Self {
        self.login = Some((name.to_owned(), password.to_owned()));
        self
    }

    /// Appends each write to a file, flushed before its answer: [`Redis::restart`] has it again.
    #[must_use]
    pub fn append_only(self) -> Self {
        self.config("appendonly yes").config("appendfsync always")
    }

    /// A line of `redis.conf`, such as `maxmemory 10mb`.
    #[must_use]
    pub fn config(mut self, line: &str) -> Self {
        self.lines.push(line.to_owned());
        self
    }
}

/// A server of its own for a test. Stopped when dropped.
#[derive(Debug)]
pub struct Redis {
    process: Process,
    port: u16,
    login: Option<(String, String)>,
    directory: TempDir,
}

/// What a server had in memory at one time.
#[derive(Debug, Clone)]
pub struct Snapshot(Vec<u8>);

impl Redis {
    /// Starts one that saves nothing by itself and asks nobody for a password.
    pub async fn start() -> Self {
        Self::start_with(RedisOptions::default()).await
    }

    /// Starts one.
    ///
    /// # Panics
    /// When Redis is not installed, or does not start.
    pub async fn start_with(options: RedisOptions) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let port = free_port();
        let mut config = format!("port {port}\nbind 127.0.0.1\ndir {:?}\n", directory.path());
        // A line of the caller comes later, and wins.
        config.push_str("save \"\"\nappendonly no\ndaemonize no\nenable-debug-command local\n");
        if let Some((name, password)) = &options.login {
            writeln!(config, "user default off\nuser {name} on {:?} ~* &* +@all", format!(">{password}"))
                .expect("writing to a string does not fail");
        }
        for line in &options.lines {
            config.push_str(line);
            config.push('\n');
        }
        fs::write(directory.path().join("redis.conf"), config).expect("a file can be written");
        let process = spawn(&directory);
        let mut server = Self { process, port, login: options.login, directory };
        server.ready().await;
        server
    }

    /// Its address, such as `redis://127.0.0.1:6379`, without a password.
    #[must_use]
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Its port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Name and password, where it asks for them.
    #[must_use]
    pub fn login(&self) -> Option<(&str, &str)> {
        self.login.as_ref().map(|(name, password)| (name.as_str(), password.as_str()))
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// SIGKILL. What it had not written to a file is gone.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// Kills it if it still runs, and starts it on the same port with what its files hold.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn restart(&mut self) {
        self.kill();
        self.process = spawn(&self.directory);
        self.ready().await;
    }

    /// Like [`restart`](Self::restart), without any data.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn restart_empty(&mut self) {
        self.kill();
        self.remove_data();
        self.restart().await;
    }

    /// Like [`restart`](Self::restart), with the data of an earlier time. For servers that are not append-only: those
    /// load their log instead.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn restart_from(&mut self, snapshot: &Snapshot) {
        self.kill();
        self.remove_data();
        fs::write(self.dump(), &snapshot.0).expect("a file can be written");
        self.restart().await;
    }

    /// Makes it save what it has to its file.
    ///
    /// # Panics
    /// When it refuses.
    pub async fn save(&self) {
        assert_eq!(self.command(&["SAVE"]).await, Reply::Status("OK".to_owned()));
    }

    /// What it has now. It is saved to its file too.
    ///
    /// # Panics
    /// When it cannot be saved.
    pub async fn snapshot(&self) -> Snapshot {
        self.save().await;
        Snapshot(fs::read(self.dump()).expect("what was saved can be read"))
    }

    /// SIGSTOP: its connections stay, and nobody answers.
    pub fn stop(&mut self) {
        self.process.pause();
    }

    /// SIGCONT.
    pub fn cont(&mut self) {
        self.process.signal(libc::SIGCONT);
    }

    /// One command, over a connection of its own. An error of Redis is a reply, too.
    ///
    /// # Panics
    /// When there is no reply within 10 s.
    pub async fn command<P: AsRef<[u8]>>(&self, parts: &[P]) -> Reply {
        self.try_command(parts).await.unwrap_or_else(|error| panic!("no reply from {}: {error}", self.url()))
    }

    /// One command, over a connection of its own.
    ///
    /// # Errors
    /// When there is no reply within 10 s.
    pub async fn try_command<P: AsRef<[u8]>>(&self, parts: &[P]) -> io::Result<Reply> {
        let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
        let call = async {
            let mut connection = Connection::open(self.port).await?;
            if let Some((name, password)) = &self.login {
                let answer = connection.call(&[b"AUTH", name.as_bytes(), password.as_bytes()]).await?;
                assert_eq!(answer, Reply::Status("OK".to_owned()), "the server knows its own user");
            }
            connection.call(&parts).await
        };
        timeout(COMMAND, call).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }

    async fn ready(&mut self) {
        let pong = Reply::Status("PONG".to_owned());
        eventually("redis-server answers", START, async || {
            if let Some(status) = self.process.ended() {
                panic!("redis-server ended: {status}\n{}", self.process.stdout());
            }
            (self.try_command(&["PING"]).await.ok()? == pong).then_some(())
        })
        .await;
    }

    fn dump(&self) -> PathBuf {
        self.directory.path().join("dump.rdb")
    }

    fn remove_data(&self) {
        let _ = fs::remove_file(self.dump());
        let _ = fs::remove_dir_all(self.directory.path().join("appendonlydir"));
    }
}

fn spawn(directory: &TempDir) -> Process {
    let program = on_path("redis-server").expect(
        "no redis-server on the PATH: install it (Debian: redis-server), or run tests/run, which does it by itself",
    );
    let mut command = Command::new(program);
    command.arg(directory.path().join("redis.conf")).current_dir(directory.path());
    Process::spawn("redis-server", command, directory.path())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ok() -> Reply {
        Reply::Status("OK".to_owned())
    }

    #[tokio::test]
    async fn a_restarted_server_has_what_it_saved_or_nothing() {
        let mut redis = Redis::start().await;
        assert_eq!(redis.command(&["SET", "a", "1"]).await, ok());
        let one = redis.snapshot().await;
        redis.command(&["SET", "a", "2"]).await;
        redis.save().await;
        redis.command(&["SET", "a", "3"]).await;
        redis.restart().await;
        assert_eq!(redis.command(&["GET", "a"]).await.text(), "2");
        redis.restart_from(&one).await;
        assert_eq!(redis.command(&["GET", "a"]).await.text(), "1");
        redis.restart_empty().await;
        assert_eq!(redis.command(&["GET", "a"]).await, Reply::Nil);
        redis.kill();
        assert!(redis.try_command(&["PING"]).await.is_err());
    }

    #[tokio::test]
    async fn an_append_only_server_loses_nothing_that_it_answered() {
        let mut redis = Redis::start_with(RedisOptions::default().append_only()).await;
        redis.command(&["RPUSH", "list", "a", "b"]).await;
        redis.restart().await;
        let list = redis.command(&["LRANGE", "list", "0", "-1"]).await;
        assert_eq!(list, Reply::Array(vec![Reply::Bytes(b"a".to_vec()), Reply::Bytes(b"b".to_vec())]));
        redis.restart_empty().await;
        assert_eq!(redis.command(&["EXISTS", "list"]).await.integer(), 0);
    }

    #[tokio::test]
    async fn a_server_with_a_user_lets_nobody_else_in() {
        let redis = Redis::start_with(RedisOptions::default().user("sanjay", "a secret")).await;
        assert_eq!(redis.command(&["ACL", "WHOAMI"]).await.text(), "sanjay");
        let mut stranger = Connection::open(redis.port()).await.unwrap();
        let answer = stranger.call(&[b"PING"]).await.unwrap();
        assert!(matches!(&answer, Reply::Error(text) if text.starts_with("NOAUTH")), "{answer:?}");
    }

    #[tokio::test]
    async fn a_stopped_server_is_silent_until_it_goes_on() {
        let mut redis = Redis::start().await;
        redis.stop();
        let mut connection = Connection::open(redis.port()).await.expect("the kernel still accepts");
        let ping: [&[u8]; 1] = [b"PING"];
        let mut answer = Box::pin(connection.call(&ping));
        assert!(timeout(Duration::from_millis(200), &mut answer).await.is_err());
        redis.cont();
        assert_eq!(answer.await.unwrap().text(), "PONG");
    }
}
