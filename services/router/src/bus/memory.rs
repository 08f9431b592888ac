//! The bus in this process's memory: publishing calls the sinks of the routers that subscribed.

use std::sync::{Arc, OnceLock};

use async_trait::async_trait;

use super::{Bus, BusError, EdgeHint, Sink};
use crate::registry::memory::Memory;

/// [`Bus`] over the [`Memory`] that the registry publishes in.
pub struct MemoryBus {
    memory: Arc<Memory>,
    router: Arc<str>,
    sink: OnceLock<Arc<dyn Sink>>,
}

impl MemoryBus {
    pub(crate) fn new(memory: Arc<Memory>, router: Arc<str>) -> Self {
        Self { memory, router, sink: OnceLock::new() }
    }
}

/// A router that stops must not be called, and must not keep its channels from being forgotten.
impl Drop for MemoryBus {
    fn drop(&mut self) {
        if self.sink.get().is_some() {
            self.memory.remove_router(&self.router);
        }
    }
}

#[async_trait]
impl Bus for MemoryBus {
    async fn listen(&self, sink: Arc<dyn Sink>) -> Result<(), BusError> {
        self.sink.set(Arc::clone(&sink)).map_err(|_| BusError::Listener)?;
        self.memory.add_router(Arc::clone(&self.router), sink);
        Ok(())
    }

    async fn subscribe(&self, channels: &[Arc<str>]) -> Vec<Result<(), BusError>> {
        let subscribe = |channel| {
            let sink = self.sink.get().ok_or(BusError::Listener)?;
            let subscribed = self.memory.subscribe(&self.router, channel, sink);
            subscribed.map_err(|error| BusError::Unavailable(error.to_string()))
        };
        channels.iter().map(subscribe).collect()
    }

    async fn unsubscribe(&self, channels: &[Arc<str>]) -> Result<(), BusError> {
        channels.iter().for_each(|channel| self.memory.unsubscribe(&self.router, channel));
        Ok(())
    }

    async fn relay(&self, router: &str, hints: Vec<EdgeHint>) -> Result<bool, BusError> {
        Ok(self.memory.relay(router, hints))
    }

    /// It misses nothing.
    fn is_candid(&self) -> bool {
        true
    }
}
