//! The registry in this process's memory: the embedded default, the twin of every other adapter in tests,
//! and one half of an adapter pair whose other half is [`MemoryBus`].

mod channels;
mod log;
mod sessions;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use parking_lot::RwLock;
use sanjay_proto::router::v1::NewPublication;
use sanjay_runtime::{SharedNamespaces, clock::SharedClock, random::SharedRandom};

use self::{channels::Channels, sessions::Sessions};
use super::{
    Assigned, Attachment, EdgeRef, HistoryPage, HistoryQuery, Location, Registry, RegistryError, Top,
    UserSession,
};
use crate::bus::{EdgeHint, Sink, memory::MemoryBus};

/// Sessions that are removed at a time: lookups get their turn in between.
const SWEEP_STEP: usize = 4_096;

/// Bounds of the memory registry.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most channels that have state at a time.
    pub channels: usize,
    /// Most dedupe keys that a channel remembers.
    pub dedupe_keys: usize,
    /// Most dedupe keys that are remembered in all. They are shared out among stripes of channels, so a key may
    /// go a little earlier than that; the oldest of a stripe goes first.
    pub total_dedupe_keys: usize,
    /// For how long a dedupe key is known.
    pub dedupe_window: Duration,
    /// How long the state of an unused channel is kept.
    pub idle: Duration,
    /// Most bytes that the histories of all channels may take; the oldest publications of a part of the channels go
    /// first.
    pub history_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            channels: 1_000_000,
            dedupe_keys: 4_096,
            // Who may publish everywhere chooses channels and keys: a few hundred bytes for each of them.
            total_dedupe_keys: 1_000_000,
            dedupe_window: Duration::from_secs(5 * 60),
            idle: Duration::from_secs(10 * 60),
            history_bytes: 256 * 1024 * 1024,
        }
    }
}

/// What registry and bus share. Several routers may use one, as simulations do.
pub struct Memory {
    channels: Channels,
    sessions: RwLock<Sessions>,
    routers: RwLock<HashMap<Arc<str>, Arc<dyn Sink>>>,
}

impl Memory {
    /// Empty; no channel keeps anything.
    #[must_use]
    pub fn new(limits: Limits, clock: SharedClock, random: SharedRandom) -> Arc<Self> {
        Self::keeping(limits, SharedNamespaces::default(), clock, random)
    }

    /// Empty; channels keep what their namespaces say.
    #[must_use]
    pub fn keeping(
        limits: Limits,
        namespaces: SharedNamespaces,
        clock: SharedClock,
        random: SharedRandom,
    ) -> Arc<Self> {
        Arc::new(Self {
            channels: Channels::new(limits, namespaces, clock, random),
            sessions: RwLock::default(),
            routers: RwLock::default(),
        })
    }

    /// The registry.
    #[must_use]
    pub fn registry(self: &Arc<Self>) -> MemoryRegistry {
        MemoryRegistry { memory: Arc::clone(self) }
    }

    /// The bus of one router.
    #[must_use]
    pub fn bus(self: &Arc<Self>, router: Arc<str>) -> MemoryBus {
        MemoryBus::new(Arc::clone(self), router)
    }

    pub(crate) fn add_router(&self, router: Arc<str>, sink: Arc<dyn Sink>) {
        self.routers.write().insert(router, sink);
    }

    pub(crate) fn remove_router(&self, router: &str) {
        self.routers.write().remove(router);
        self.channels.remove_router(router);
    }

    pub(crate) fn subscribe(
        &self,
        router: &Arc<str>,
        channel: &Arc<str>,
        sink: &Arc<dyn Sink>,
    ) -> Result<(), RegistryError> {
        self.channels.subscribe(router, channel, sink)
    }

    pub(crate) fn unsubscribe(&self, router: &str, channel: &str) {
        self.channels.unsubscribe(router, channel);
    }

    pub(crate) fn relay(&self, router: &str, hints: Vec<EdgeHint>) -> bool {
        let Some(sink) = self.routers.read().get(router).cloned() else { return false };
        hints.into_iter().for_each(|hint| sink.hint(hint));
        true
    }
}

/// [`Registry`] over [`Memory`].
pub struct MemoryRegistry {
    memory: Arc<Memory>,
}

impl MemoryRegistry {
    /// Removes what sessions are left over, a step at a time.
    async fn collect(&self) {
        while self.memory.sessions.write().collect(SWEEP_STEP) {
            tokio::task::yield_now().await;
        }
    }
}

#[async_trait]
impl Registry for MemoryRegistry {
    async fn publish(&self, publications: Vec<NewPublication>) -> Vec<Result<Assigned, RegistryError>> {
        publications.into_iter().map(|publication| self.memory.channels.publish(publication)).collect()
    }

    async fn tops(&self, channels: &[Arc<str>]) -> Vec<Result<Top, RegistryError>> {
        channels.iter().map(|channel| self.memory.channels.top(channel)).collect()
    }

    async fn history(&self, query: &HistoryQuery) -> Result<HistoryPage, RegistryError> {
        self.memory.channels.history(query)
    }

    async fn attach(&self, edge: &EdgeRef, router: &Arc<str>) -> Result<Attachment, RegistryError> {
        let attachment = self.memory.sessions.write().attach(edge, router);
        self.collect().await;
        Ok(attachment)
    }

    async fn detach(&self, attachment: &Attachment) -> Result<(), RegistryError> {
        self.memory.sessions.write().detach(attachment);
        Ok(())
    }

    async fn renew(&self, attachments: &[Attachment]) -> Vec<Result<(), RegistryError>> {
        let held = self.memory.sessions.read();
        attachments.iter().map(|attachment| held.renew(attachment)).collect()
    }

    async fn sweep(&self, attachment: &Attachment) -> Result<usize, RegistryError> {
        let mut removed = 0;
        loop {
            let step = self.memory.sessions.write().sweep(attachment, SWEEP_STEP);
            removed += step;
            if step < SWEEP_STEP {
                return Ok(removed);
            }
            tokio::task::yield_now().await;
        }
    }

    async fn open_sessions(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Vec<Result<(), RegistryError>> {
        let mut held = self.memory.sessions.write();
        sessions.iter().map(|session| held.open(attachment, session)).collect()
    }

    async fn close_sessions(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Result<(), RegistryError> {
        let mut held = self.memory.sessions.write();
        sessions.iter().for_each(|session| held.close(attachment, session));
        Ok(())
    }

    async fn locate(&self, users: &[Arc<str>]) -> Result<Vec<Vec<Location>>, RegistryError> {
        let held = self.memory.sessions.read();
        Ok(users.iter().map(|user| held.locate(user)).collect())
    }

    /// What this process forgets, it forgets with its router.
    fn is_settled(&self) -> bool {
        true
    }

    async fn maintain(&self) -> Result<(), RegistryError> {
        self.memory.channels.forget_idle();
        self.memory.sessions.write().collect(SWEEP_STEP);
        Ok(())
    }
}
