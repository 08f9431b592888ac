//! Starts a router, a delivery node and an edge as three processes. Everything that the bench knows of the
//! server's command line and configuration is here.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ring::digest;
use tempfile::TempDir;

use crate::{
    Options,
    process::{Core, Process},
    publisher::Publisher,
};

/// Secrets of a cluster that lives for a minute on loopback.
const CLUSTER_KEY: &str = "load-cluster-key-load-cluster-key";
const TOKEN_SECRET: &str = "load-token-secret-load-token-secret";
const API_KEY: &str = "load-api-key-load-api-key-load-api-key";

/// Three roles. They end with it.
pub(crate) struct Cluster {
    edge: Process,
    _delivery: Process,
    _router: Process,
    address: SocketAddr,
    server: String,
    directory: TempDir,
}

impl Cluster {
    /// Starts the roles and waits until the edge can do its work. It pings a connection after `heartbeat` of silence.
    pub(crate) fn start(options: &Options, heartbeat: Duration) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let binary = binary(options)?;
        let [edge, edge_admin, delivery, delivery_admin, router, router_admin] = free_addresses()?;
        let config = directory.path().join("sanjay.toml");
        let addresses = Addresses { edge, delivery, router };
        std::fs::write(&config, configuration(directory.path(), options, heartbeat, &addresses))?;
        let start = |role: &str, admin: SocketAddr, core| {
            let arguments =
                [role, "--config", &config.to_string_lossy(), "--admin-listen", &admin.to_string()]
                    .map(str::to_owned);
            let log = directory.path().join(format!("{role}.log"));
            let mut process = Process::start(role, &binary, &arguments, core, Stdio::null, &log)?;
            wait_ready(&mut process, admin, Duration::from_secs(options.step_seconds))
                .with_context(|| format!("{role}; its log ends:\n{}", tail(&log)))?;
            anyhow::Ok(process)
        };
        // Only the edge is measured; the others keep the client company.
        let router = start("router", router_admin, Core::Client)?;
        let delivery_process = start("delivery", delivery_admin, Core::Client)?;
        let edge_process = start("edge", edge_admin, Core::Server)?;
        Ok(Self {
            edge: edge_process,
            _delivery: delivery_process,
            _router: router,
            address: edge,
            server: format!("http://{delivery}"),
            directory,
        })
    }

    /// The edge's process id.
    pub(crate) fn edge_pid(&self) -> u32 {
        self.edge.id()
    }

    /// Where clients connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the edge checks tokens with.
    pub(crate) fn token_secret(&self) -> String {
        TOKEN_SECRET.to_owned()
    }

    /// A back end of this cluster.
    pub(crate) fn publisher(&self) -> anyhow::Result<Publisher> {
        Publisher::connect(&self.server, API_KEY)
    }

    /// Where logs go; removed with the cluster.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.directory.path().join(format!("{name}.log"))
    }
}

struct Addresses {
    edge: SocketAddr,
    delivery: SocketAddr,
    router: SocketAddr,
}

fn configuration(directory: &Path, options: &Options, heartbeat: Duration, addresses: &Addresses) -> String {
    let Addresses { edge, delivery, router } = addresses;
    let key: String = digest::digest(&digest::SHA256, API_KEY.as_bytes())
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let store = directory.join("inbox.redb");
    format!(
        r#"[cluster]
key = "{CLUSTER_KEY}"

[edge]
listen = "{edge}"
router = "http://{router}"
delivery = "http://{delivery}"
token_secret = "{TOKEN_SECRET}"
node = "edge-1"
shards = {shards}
heartbeat_ms = {heartbeat}

[delivery]
listen = "{delivery}"
router = "http://{router}"
store = "redb:{store}"
api_keys = [{{ name = "load", sha256 = "{key}" }}]

[router]
listen = "{router}"
node = "router-1"
"#,
        shards = options.shards,
        heartbeat = heartbeat.as_millis(),
        store = store.display(),
    )
}

/// The server that was named, or the one that was built beside this binary.
fn binary(options: &Options) -> anyhow::Result<PathBuf> {
    let binary = match &options.binary {
        Some(binary) => binary.clone(),
        None => std::env::current_exe()?.with_file_name("sanjay"),
    };
    anyhow::ensure!(
        binary.is_file(),
        "there is no server at {}; build it with `cargo build --release -p sanjay`, or name it with --binary",
        binary.display()
    );
    Ok(binary)
}

/// Ports that are free now. All are held until all are known, so that they differ.
fn free_addresses<const N: usize>() -> anyhow::Result<[SocketAddr; N]> {
    let listeners =
        (0..N).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).collect::<Result<Vec<_>, _>>()?;
    let addresses = listeners.iter().map(TcpListener::local_addr).collect::<Result<Vec<_>, _>>()?;
    addresses.try_into().map_err(|_| anyhow::anyhow!("as many addresses as listeners"))
}

fn wait_ready(process: &mut Process, admin: SocketAddr, limit: Duration) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let deadline = Instant::now() + limit;
    while !is_ready(admin) {
        process.check()?;
        anyhow::ensure!(Instant::now() < deadline, "not ready within {limit:?}");
        runtime.block_on(async { tokio::time::sleep(Duration::from_millis(50)).await });
    }
    Ok(())
}

fn is_ready(admin: SocketAddr) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&admin, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer)?;
        std::io::Result::Ok(answer)
    };
    ask().is_ok_and(|answer| &answer == b"HTTP/1.1 200")
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
