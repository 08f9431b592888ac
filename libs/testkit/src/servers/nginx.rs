//! nginx with the project's own configuration, in front of edges and delivery nodes under test.

use std::{
    collections::BTreeSet,
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use super::on_path;
use crate::{
    binary::Finished,
    cluster::{Cluster, Role},
    process::Process,
    settings::free_port,
    wait::eventually,
    wire::Wire,
};

/// How long it may take to start, to reload and to end.
const PATIENCE: Duration = Duration::from_secs(20);

/// Its listeners: the file of each in `listen/`, and the port that is written there.
const LISTENERS: [(&str, u16); 5] =
    [("websocket", 8080), ("websocket_tls", 8443), ("grpc", 8082), ("grpc_tls", 8482), ("status", 8090)];

/// Its workers, wherever it runs: several, as in production, and no more than a test needs.
const WORKERS: usize = 2;

/// What differs from the project's configuration beside addresses.
#[derive(Debug, Clone, Default)]
pub struct NginxOptions {
    edits: Vec<(String, String, String)>,
    copies: Vec<(String, String)>,
    program: Option<PathBuf>,
}

impl NginxOptions {
    /// Another nginx than the one on the `PATH`.
    #[must_use]
    pub fn program(mut self, path: PathBuf) -> Self {
        self.program = Some(path);
        self
    }

    /// Replaces a text in a file, such as `proxy_read_timeout 75s` in `conf/websocket.conf`. It must be there.
    #[must_use]
    pub fn edit(mut self, file: &str, old: &str, new: &str) -> Self {
        self.edits.push((file.to_owned(), old.to_owned(), new.to_owned()));
        self
    }

    /// Copies a file of the configuration over another one, before the edits.
    #[must_use]
    pub fn copy(mut self, from: &str, to: &str) -> Self {
        self.copies.push((from.to_owned(), to.to_owned()));
        self
    }
}

/// A running nginx: its master and its workers. Stopped when dropped.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
    /// Ends the workers when this process dies: the kernel would end their master only.
    guard: Child,
    program: PathBuf,
    ports: [u16; LISTENERS.len()],
    directory: TempDir,
}

impl Nginx {
    /// Starts one in front of these addresses.
    pub async fn start(edges: &[SocketAddr], deliveries: &[SocketAddr]) -> Self {
        Self::start_with(NginxOptions::default(), edges, deliveries).await
    }

    /// Starts one in front of the edges and the delivery nodes of a cluster.
    pub async fn before(cluster: &Cluster) -> Self {
        Self::before_with(NginxOptions::default(), cluster).await
    }

    /// Likewise, with options.
    pub async fn before_with(options: NginxOptions, cluster: &Cluster) -> Self {
        let of = |role| -> Vec<SocketAddr> {
            let nodes = cluster.nodes().into_iter().filter(|node| node.role == role);
            nodes.map(|node| local(cluster.port(node))).collect()
        };
        Self::start_with(options, &of(Role::Edge), &of(Role::Delivery)).await
    }

    /// Starts one with options.
    ///
    /// # Panics
    /// When nginx or openssl is not installed, the configuration is not as expected, or nginx does not start.
    pub async fn start_with(options: NginxOptions, edges: &[SocketAddr], deliveries: &[SocketAddr]) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let ports = LISTENERS.map(|_| free_port());
        let program = options.program.clone().unwrap_or_else(program);
        render(directory.path(), options, edges, deliveries, &ports);
        make_certificate(directory.path());
        let mut command = command(&program, directory.path());
        command.args(["-g", "daemon off;"]).process_group(0);
        let process = Process::spawn("nginx", command, directory.path());
        let guard = guard(process.id());
        let mut nginx = Self { process, guard, program, ports, directory };
        nginx.ready().await;
        nginx
    }

    /// Where clients connect.
    #[must_use]
    pub fn url(&self) -> String {
        format!("ws://127.0.0.1:{}/v1/ws", self.ports[0])
    }

    /// Where clients connect with TLS.
    #[must_use]
    pub fn tls_url(&self) -> String {
        format!("wss://localhost:{}/v1/ws", self.ports[1])
    }

    /// Where back ends call the delivery nodes.
    #[must_use]
    pub fn server(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[2])
    }

    /// Likewise, with TLS.
    #[must_use]
    pub fn tls_server(&self) -> String {
        format!("https://localhost:{}", self.ports[3])
    }

    /// The listener for health checks.
    #[must_use]
    pub fn status(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[4])
    }

    /// The certificate of its TLS listeners, for `localhost` and signed by itself.
    #[must_use]
    pub fn certificate(&self) -> PathBuf {
        self.directory.path().join("tls_cert")
    }

    /// Where its configuration is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// What it and its workers have written to standard error.
    #[must_use]
    pub fn log(&self) -> String {
        self.process.stderr()
    }

    /// The lines of its access log, as text.
    #[must_use]
    pub fn access_log(&self) -> String {
        self.process.stdout()
    }

    /// The lines of its access log.
    ///
    /// # Panics
    /// When one is no JSON.
    #[must_use]
    pub fn requests(&self) -> Vec<Value> {
        let log = self.access_log();
        // The last line may be half written.
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        let line = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
        whole.lines().map(line).collect()
    }

    /// Replaces a text in a file of its configuration; [`reload`](Self::reload) makes it count.
    pub fn edit(&self, file: &str, old: &str, new: &str) {
        edit(&self.directory.path().join(file), old, new);
    }

    /// Replaces the certificate by another one; [`reload`](Self::reload) makes it count.
    pub fn renew_certificate(&self) {
        make_certificate(self.directory.path());
    }

    /// Whether nginx would take its configuration as it is now: `nginx -t`.
    pub async fn test(&self) -> Finished {
        let logs = tempfile::tempdir().expect("a temporary directory can be made");
        test(&self.program, self.directory.path(), logs.path(), None).await
    }

    /// Reloads the configuration, and waits until new workers have taken over. Old ones keep their connections.
    ///
    /// # Panics
    /// When the configuration is no good, or the workers do not change.
    pub async fn reload(&mut self) {
        let _ = self.test().await.succeeded();
        let old = self.workers();
        self.ask_to_reload();
        eventually("new workers have taken over", PATIENCE, async || {
            let serving = self.workers();
            (serving.is_disjoint(&old) && serving.len() == WORKERS).then_some(())
        })
        .await;
    }

    /// SIGHUP, whatever the configuration is like.
    pub fn ask_to_reload(&mut self) {
        self.process.signal(libc::SIGHUP);
    }

    /// The workers that accept connections, without those that only keep what they have.
    #[must_use]
    pub fn workers(&self) -> BTreeSet<u32> {
        let serves = |id: &u32| title(*id).is_some_and(|title| title == "nginx: worker process");
        children(self.process.id()).into_iter().filter(serves).collect()
    }

    async fn ready(&mut self) {
        let health = format!("{}/healthz", self.status());
        eventually("nginx answers", PATIENCE, async || {
            if let Some(status) = self.process.ended() {
                panic!("nginx ended: {status}\n{}", self.log());
            }
            (Wire::get(&health).await.status == 200 && self.workers().len() == WORKERS).then_some(())
        })
        .await;
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // The whole group at once. Its leader has not been waited for unless it ended, so that the number is ours.
        if self.process.ended().is_none() {
            kill_group(self.process.id());
        }
        let _ = self.guard.kill();
        let _ = self.guard.wait();
    }
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// Where nginx is. Debian puts it where only root's `PATH` looks.
fn program() -> PathBuf {
    let places = ["/usr/sbin/nginx", "/usr/local/sbin/nginx"].map(PathBuf::from);
    on_path("nginx")
        .or_else(|| places.into_iter().find(|path| super::is_program(path)))
        .expect("no nginx on the PATH: install it (Debian: nginx), or run tests/run, which does it by itself")
}

/// nginx with a configuration.
fn command(program: &Path, directory: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("-p").arg(format!("{}/", directory.display())).args(["-c", "nginx.conf"]);
    command
}

/// `nginx -t`, with its output in `logs`; as another user when one is given.
async fn test(program: &Path, directory: &Path, logs: &Path, user: Option<u32>) -> Finished {
    let mut command = command(program, directory);
    command.arg("-t");
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    let mut process = Process::spawn("test", command, logs);
    let status = process.wait(PATIENCE).await;
    Finished { code: status.code(), stdout: process.stdout(), stderr: process.stderr() }
}

/// Copies the project's configuration, with other addresses.
fn render(
    directory: &Path,
    options: NginxOptions,
    edges: &[SocketAddr],
    deliveries: &[SocketAddr],
    ports: &[u16],
) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../nginx");
    copy(&source, directory).unwrap_or_else(|error| panic!("{}: {error}", source.display()));
    for (from, to) in options.copies {
        fs::copy(directory.join(&from), directory.join(to)).unwrap_or_else(|e| panic!("{from}: {e}"));
    }
    for name in ["tls_cert", "tls_key"] {
        let (there, here) = (format!("/run/secrets/{name}"), directory.join(name).display().to_string());
        edit(&directory.join("conf/tls.conf"), &there, &here);
    }
    edit(&directory.join("nginx.conf"), "worker_processes auto;", &format!("worker_processes {WORKERS};"));
    for ((name, port), own) in LISTENERS.into_iter().zip(ports) {
        let file = directory.join(format!("listen/{name}.conf"));
        edit(&file, &format!("*:{port}"), &format!("127.0.0.1:{own}"));
    }
    replace_servers(&directory.join("upstreams/edges.conf"), "edge-", edges);
    replace_servers(&directory.join("upstreams/deliveries.conf"), "delivery-", deliveries);
    for (file, old, new) in options.edits {
        edit(&directory.join(file), &old, &new);
    }
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let place = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &place)?;
        } else {
            fs::copy(entry.path(), place)?;
        }
    }
    Ok(())
}

fn edit(file: &Path, old: &str, new: &str) {
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    assert!(text.contains(old), "there is no {old:?} in {}:\n{text}", file.display());
    fs::write(file, text.replace(old, new)).expect("a file can be written");
}

/// Puts these servers into an upstream in the place of those whose names begin with `prefix`, with the parameters of
/// the first of those. An upstream must have a server, so without any there is one where nobody listens.
fn replace_servers(file: &Path, prefix: &str, servers: &[SocketAddr]) {
    let nobody = [local(free_port())];
    let servers = if servers.is_empty() { &nobody } else { servers };
    let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let begin = format!("server {prefix}");
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let is_server = |line: &String| line.trim_start().starts_with(&begin);
    let first =
        lines.iter().position(is_server).unwrap_or_else(|| panic!("no {begin} in {}", file.display()));
    let (_, parameters) = lines[first].trim_start()[begin.len()..].split_once(' ').unwrap_or(("", ";"));
    let server = |address: &SocketAddr| format!("    server {address} {parameters}");
    let ours: Vec<String> = servers.iter().map(server).collect();
    lines.retain(|line| !is_server(line));
    lines.splice(first..first, ours);
    fs::write(file, lines.join("\n") + "\n").expect("a file can be written");
}

/// Makes `tls_cert` and `tls_key` for `localhost`.
fn make_certificate(directory: &Path) {
    let openssl = on_path("openssl").expect("no openssl on the PATH: install it, or run tests/run");
    let mut command = Command::new(openssl);
    command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]);
    command.args(["-days", "1", "-subj", "/CN=localhost"]);
    command.args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]);
    command.arg("-keyout").arg(directory.join("tls_key")).arg("-out").arg(directory.join("tls_cert"));
    let output = command.output().expect("openssl runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A process that ends the group of `master` when its input ends, which is when we end.
fn guard(master: u32) -> Child {
    let mut shell = Command::new("sh");
    shell.args(["-c", r#"trap '' INT; read -r _; kill -s KILL -- "-$1""#, "guard", &master.to_string()]);
    shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    shell.spawn().expect("there is a shell")
}

#[expect(unsafe_code, reason = "there is no safe call that sends a signal to a group")]
fn kill_group(leader: u32) {
    let group = libc::pid_t::try_from(leader).expect("a process id fits");
    // SAFETY: takes two numbers. The group is that of our child, which was not waited for.
    let _ = unsafe { libc::kill(-group, libc::SIGKILL) };
}

/// The processes that a process has started and that live.
fn children(parent: u32) -> Vec<u32> {
    let is_child = |id: &u32| {
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        // Behind the name, which may hold anything: state, parent, …
        let fields = stat.rsplit_once(") ").map(|(_, rest)| rest.split(' ').collect::<Vec<_>>());
        fields.is_some_and(|fields| fields[0] != "Z" && fields[1] == parent.to_string())
    };
    let entries = fs::read_dir("/proc").expect("there is /proc").filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

/// What a process calls itself.
fn title(id: u32) -> Option<String> {
    let line = fs::read(format!("/proc/{id}/cmdline")).ok()?;
    Some(String::from_utf8_lossy(&line).trim_end_matches(['\0', ' ']).to_owned())
}

#[cfg(test)]
#[path = "nginx_tests.rs"]
mod tests;
