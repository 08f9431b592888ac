//! Edges, routers and delivery nodes as processes under test.

mod builder;

use std::{
    collections::BTreeMap,
    fmt, fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

pub use builder::ClusterBuilder;

use crate::{
    binary::Sanjay,
    process::{Addresses, Process},
    servers::{Mongo, Redis},
    settings::{Settings, free_port},
};

/// A role with processes of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Clients' sockets.
    Edge,
    /// Channels and routes.
    Router,
    /// Back ends' API and inboxes.
    Delivery,
}

impl Role {
    /// Every role.
    pub const ALL: [Role; 3] = [Role::Edge, Role::Router, Role::Delivery];

    /// The subcommand.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Role::Edge => "edge",
            Role::Router => "router",
            Role::Delivery => "delivery",
        }
    }
}

/// One process of a cluster: its role, and which of that role, from 0. A role alone is the first of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node {
    /// What it does.
    pub role: Role,
    /// Which one.
    pub index: usize,
}

impl From<Role> for Node {
    fn from(role: Role) -> Self {
        Self { role, index: 0 }
    }
}

impl From<(Role, usize)> for Node {
    fn from((role, index): (Role, usize)) -> Self {
        Self { role, index }
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.role.name(), self.index)
    }
}

/// A node's port, and its process once it was started.
struct Member {
    port: u16,
    process: Option<Process>,
    addresses: Option<Addresses>,
    environment: Vec<(String, String)>,
    launcher: Vec<String>,
}

/// Processes of all roles, each with a configuration, a ready file and a log of its own. Each can be killed and started
/// again alone, on the same port.
pub struct Cluster {
    members: BTreeMap<Node, Member>,
    redis: Option<Redis>,
    mongo: Option<Mongo>,
    directory: TempDir,
}

impl Cluster {
    /// A cluster of any size, on any store.
    #[must_use]
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder::default()
    }

    /// Starts one process of each role with the usual settings, on embedded stores.
    pub async fn start() -> Self {
        Self::builder().start().await
    }

    /// Starts one process of each role, on embedded stores.
    ///
    /// # Panics
    /// When one does not become ready.
    pub async fn start_with(settings: Settings) -> Self {
        Self::builder().settings(settings).start().await
    }

    async fn launch(mut builder: ClusterBuilder, redis: Option<Redis>, mongo: Option<Mongo>) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let mut members = BTreeMap::new();
        for (role, more) in Role::ALL.into_iter().zip(builder.more) {
            for index in 0..=more {
                let node = Node { role, index };
                let environment = builder.environment.remove(&node).unwrap_or_default();
                let launcher = builder.launchers.remove(&node).unwrap_or_default();
                let (process, addresses) = (None, None);
                let member = Member { port: free_port(), process, addresses, environment, launcher };
                members.insert(node, member);
            }
        }
        assert!(builder.environment.is_empty(), "variables for nobody: {:?}", builder.environment);
        assert!(builder.launchers.is_empty(), "launchers of nobody: {:?}", builder.launchers);
        let mut cluster = Self { members, redis, mongo, directory };
        cluster.configure(builder.settings);
        // In any order: each waits for those that it needs.
        for node in cluster.nodes() {
            cluster.spawn(node);
        }
        for node in cluster.nodes() {
            cluster.ready(node).await;
        }
        cluster
    }

    /// Writes a configuration for each process.
    fn configure(&self, settings: Settings) {
        let store = format!("redb:{}", self.directory.path().join("inbox.redb").display());
        let settings = settings
            .set_default("edge.router", self.endpoints(Role::Router))
            .set_default("edge.delivery", self.endpoints(Role::Delivery))
            .set_default("delivery.router", self.endpoints(Role::Router))
            .set_default("delivery.store", format!("{store:?}"))
            .set("admin.listen", "\"127.0.0.1:0\"");
        for (node, member) in &self.members {
            let listen = format!("{}.listen", node.role.name());
            let mut settings = settings.clone().set(&listen, format!("\"127.0.0.1:{}\"", member.port));
            if node.role == Role::Router {
                // Routers that meet in Redis are told apart by their names.
                settings = settings.set("router.node", format!("\"{node}\""));
            }
            fs::write(self.file(*node, "toml"), settings.to_toml()).expect("a file can be written");
        }
    }

    /// Where the processes of a role are, as a TOML value.
    fn endpoints(&self, role: Role) -> String {
        let endpoints: Vec<String> =
            self.ports(role).map(|port| format!("\"http://127.0.0.1:{port}\"")).collect();
        match endpoints.as_slice() {
            [one] => one.clone(),
            several => format!("[{}]", several.join(", ")),
        }
    }

    fn ports(&self, role: Role) -> impl Iterator<Item = u16> {
        self.members.iter().filter(move |(node, _)| node.role == role).map(|(_, member)| member.port)
    }

    fn member(&self, node: Node) -> &Member {
        self.members.get(&node).unwrap_or_else(|| panic!("there is no {node}"))
    }

    fn member_mut(&mut self, node: Node) -> &mut Member {
        self.members.get_mut(&node).unwrap_or_else(|| panic!("there is no {node}"))
    }

    fn file(&self, node: Node, kind: &str) -> PathBuf {
        self.directory.path().join(format!("{node}.{kind}"))
    }

    fn spawn(&mut self, node: Node) {
        let [config, ready] = ["toml", "json"].map(|kind| self.file(node, kind).display().to_string());
        let arguments = [node.role.name(), "--config", &config, "--ready-file", &ready];
        let mut command = Sanjay::launched(&self.member(node).launcher, arguments);
        for (name, value) in &self.member(node).environment {
            command = command.env(name, value);
        }
        let directory = self.directory.path();
        let process = command.named(node.to_string()).directory(directory).spawn_into(directory);
        self.member_mut(node).process = Some(process);
    }

    /// Waits until a process that was spawned accepts work.
    ///
    /// # Panics
    /// When it does not in time.
    pub async fn ready(&mut self, node: impl Into<Node>) {
        let node = node.into();
        let file = self.file(node, "json");
        let addresses = self.process(node).ready(&file).await;
        self.member_mut(node).addresses = Some(addresses);
    }

    /// Every process of the cluster.
    #[must_use]
    pub fn nodes(&self) -> Vec<Node> {
        self.members.keys().copied().collect()
    }

    /// A process.
    ///
    /// # Panics
    /// When there is no such node; likewise below.
    pub fn process(&mut self, node: impl Into<Node>) -> &mut Process {
        self.member_mut(node.into()).process.as_mut().expect("every node was started")
    }

    /// SIGKILL for one process.
    pub fn kill(&mut self, node: impl Into<Node>) {
        let node = node.into();
        self.process(node).kill();
        let _ = fs::remove_file(self.file(node, "json"));
    }

    /// Starts a process again after it was killed, on the same port, and waits until it is ready.
    ///
    /// # Panics
    /// When it does not become ready.
    pub async fn restart(&mut self, node: impl Into<Node>) {
        let node = node.into();
        self.respawn(node);
        self.ready(node).await;
    }

    /// Starts a process again where it was, after a SIGKILL if it runs; [`Cluster::ready`] waits for it.
    pub fn respawn(&mut self, node: impl Into<Node>) {
        let node = node.into();
        self.kill(node);
        self.spawn(node);
    }

    /// Whether a process has been ready since its last start.
    #[must_use]
    pub fn is_ready(&self, node: impl Into<Node>) -> bool {
        self.file(node.into(), "json").exists()
    }

    /// SIGSTOP for one process: its connections stay, and nobody answers.
    pub fn stop(&mut self, node: impl Into<Node>) {
        self.process(node).pause();
    }

    /// SIGCONT for one process.
    pub fn cont(&mut self, node: impl Into<Node>) {
        self.process(node).signal(libc::SIGCONT);
    }

    /// The lines of an edge's log that say to which router it attached, in order.
    #[must_use]
    pub fn attachments(&self, edge: usize) -> Vec<String> {
        let log = self.log((Role::Edge, edge));
        let attached = log.lines().filter(|line| line.contains("attached to a router"));
        attached.map(str::to_owned).collect()
    }

    /// To which router an edge attached last.
    ///
    /// # Panics
    /// When it never did.
    #[must_use]
    pub fn router_of(&self, edge: usize) -> usize {
        let last = self.attachments(edge).pop().expect("a ready edge has attached");
        let routers = self.members.keys().filter(|node| node.role == Role::Router);
        let is_last = |node: &&Node| last.contains(&format!("127.0.0.1:{}\"", self.port(**node)));
        routers.into_iter().find(is_last).expect("it is one of the cluster's").index
    }

    /// What one process has logged, of all its runs.
    #[must_use]
    pub fn log(&self, node: impl Into<Node>) -> String {
        let log = fs::read(self.file(node.into(), "err")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// From its next start on, a process has only the usual environment, and no launcher.
    pub fn forget_environment(&mut self, node: impl Into<Node>) {
        let member = self.member_mut(node.into());
        member.environment.clear();
        member.launcher.clear();
    }

    /// Where configuration, data and logs are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Where clients connect to the first edge.
    #[must_use]
    pub fn url(&self) -> String {
        self.urls().swap_remove(0)
    }

    /// Where clients connect to each edge.
    #[must_use]
    pub fn urls(&self) -> Vec<String> {
        self.ports(Role::Edge).map(|port| format!("ws://127.0.0.1:{port}/v1/ws")).collect()
    }

    /// Where back ends call the first delivery node.
    #[must_use]
    pub fn server(&self) -> String {
        self.servers().swap_remove(0)
    }

    /// Where back ends call each delivery node.
    #[must_use]
    pub fn servers(&self) -> Vec<String> {
        self.ports(Role::Delivery).map(|port| format!("http://127.0.0.1:{port}")).collect()
    }

    /// A process's port for clients, edges or back ends, by its role.
    #[must_use]
    pub fn port(&self, node: impl Into<Node>) -> u16 {
        self.member(node.into()).port
    }

    /// A process's admin pages, such as `http://127.0.0.1:8081`, since its last start.
    ///
    /// # Panics
    /// When it never became ready.
    #[must_use]
    pub fn admin(&self, node: impl Into<Node>) -> &str {
        self.member(node.into()).addresses.as_ref().expect("the node was ready").get("admin")
    }

    /// The cluster's own Redis.
    ///
    /// # Panics
    /// When it has none.
    pub fn redis(&mut self) -> &mut Redis {
        self.redis.as_mut().expect("the cluster has a Redis of its own")
    }

    /// The cluster's own MongoDB.
    ///
    /// # Panics
    /// When it has none; a [shared](Mongo::shared) one is not its own.
    pub fn mongo(&mut self) -> &mut Mongo {
        self.mongo.as_mut().expect("the cluster has a MongoDB of its own")
    }
}
