//! Edge, router and delivery as three processes under test.

use std::{
    fs,
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use crate::{
    binary::Sanjay,
    process::Process,
    settings::{Settings, free_port},
};

/// A role with a process of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Clients' sockets.
    Edge,
    /// Channels and routes.
    Router,
    /// Back ends' API and inboxes.
    Delivery,
}

impl Role {
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

/// The three roles with one configuration file. Each can be killed and started again alone, on the same port.
pub struct Cluster {
    edge: Option<Process>,
    router: Option<Process>,
    delivery: Option<Process>,
    ports: [u16; 3],
    directory: TempDir,
}

impl Cluster {
    /// Starts the three with the usual settings.
    pub async fn start() -> Self {
        Self::start_with(Settings::default()).await
    }

    /// Starts the three.
    ///
    /// # Panics
    /// When one does not become ready.
    pub async fn start_with(settings: Settings) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        let ports = [free_port(), free_port(), free_port()];
        let [edge, router, delivery] = ports.map(|port| format!("127.0.0.1:{port}"));
        let store = format!("redb:{}", directory.path().join("inbox.redb").display());
        let settings = settings
            .set("edge.listen", format!("{edge:?}"))
            .set("edge.router", format!("\"http://{router}\""))
            .set("edge.delivery", format!("\"http://{delivery}\""))
            .set("router.listen", format!("{router:?}"))
            .set("delivery.listen", format!("{delivery:?}"))
            .set("delivery.router", format!("\"http://{router}\""))
            .set("delivery.store", format!("{store:?}"))
            .set("admin.listen", "\"127.0.0.1:0\"");
        fs::write(directory.path().join("config.toml"), settings.to_toml()).expect("a file can be written");
        let mut cluster = Self { edge: None, router: None, delivery: None, ports, directory };
        // In any order: each waits for those that it needs.
        for role in [Role::Edge, Role::Delivery, Role::Router] {
            cluster.spawn(role);
        }
        for role in [Role::Edge, Role::Delivery, Role::Router] {
            cluster.ready(role).await;
        }
        cluster
    }

    fn slot(&mut self, role: Role) -> &mut Option<Process> {
        match role {
            Role::Edge => &mut self.edge,
            Role::Router => &mut self.router,
            Role::Delivery => &mut self.delivery,
        }
    }

    fn ready_file(&self, role: Role) -> PathBuf {
        self.directory.path().join(format!("{}.json", role.name()))
    }

    fn spawn(&mut self, role: Role) {
        let directory = self.directory.path();
        let ready = self.ready_file(role).display().to_string();
        let config = directory.join("config.toml").display().to_string();
        let command = Sanjay::new([role.name(), "--config", &config, "--ready-file", &ready]);
        let process = command.directory(directory).spawn_into(directory);
        *self.slot(role) = Some(process);
    }

    /// Waits until a role that was spawned accepts work.
    async fn ready(&mut self, role: Role) {
        let file = self.ready_file(role);
        self.process(role).ready(&file).await;
    }

    /// The process of a role.
    ///
    /// # Panics
    /// When it was never started.
    pub fn process(&mut self, role: Role) -> &mut Process {
        self.slot(role).as_mut().expect("every role was started")
    }

    /// SIGKILL for one role.
    pub fn kill(&mut self, role: Role) {
        self.process(role).kill();
        let _ = fs::remove_file(self.ready_file(role));
    }

    /// Starts a role again after it was killed, on the same port, and waits until it is ready.
    pub async fn restart(&mut self, role: Role) {
        self.kill(role);
        self.spawn(role);
        self.ready(role).await;
    }

    /// Where configuration, data and logs are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Where clients connect.
    #[must_use]
    pub fn url(&self) -> String {
        format!("ws://127.0.0.1:{}/v1/ws", self.ports[0])
    }

    /// Where back ends call.
    #[must_use]
    pub fn server(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports[2])
    }
}
