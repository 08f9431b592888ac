//! The bus over Redis' pub/sub.
//!
//! ```text
//! Redis ══▶ reader ──▶ lanes, by name ──▶ workers ──▶ sink
//!             │
//!             └─ confirmations ─▶ wanted ◀─ subscribe, unsubscribe
//!                                   │
//! Redis ◀══ session ◀─── due ───────┘
//! ```
//!
//! One task lives through one session after another. What is wanted outlives them all, so a new session is made
//! equal to it, and each channel that was confirmed before is then told to the sink as missed.

pub(crate) mod envelope;
mod inlet;
pub(crate) mod metrics;
mod session;
mod wanted;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use redis::{
    Client, Pipeline, RedisResult, Value,
    aio::{ConnectionLike as _, MultiplexedConnection},
};
use sanjay_runtime::{Lifecycle, random::SharedRandom};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use self::{
    envelope::encode_hints,
    inlet::{Inlet, LaneLimits},
    metrics::BusMetrics,
    session::{Session, SessionError},
    wanted::Wanted,
};
use super::{Bus, BusError, EdgeHint, Missed, Sink};
use crate::{
    outage::Outage,
    redis::{PubSub, RedisConfig, keys::Keys},
};

/// Between two probes. A connection that died is given up within two of them.
const PROBE_EVERY: Duration = Duration::from_secs(1);

/// Longest wait between two attempts to connect, and the bound of the first wait.
const BACKOFF_CAP: Duration = Duration::from_secs(1);
const BACKOFF_BASE: Duration = Duration::from_millis(50);

/// [`Bus`] over Redis.
pub struct RedisBus {
    shared: Arc<Shared>,
    lifecycle: Lifecycle,
    random: SharedRandom,
    lanes: LaneLimits,
    /// Cancelled when the bus is dropped.
    gone: CancellationToken,
}

/// What the bus, its sessions and their readers share.
struct Shared {
    config: RedisConfig,
    client: Client,
    keys: Keys,
    /// The pub/sub name of this router.
    own: Arc<str>,
    wanted: Wanted,
    /// Set by the one call of `listen`.
    inlet: OnceLock<Inlet>,
    /// Where to publish, while a session lasts.
    publisher: Mutex<Option<(MultiplexedConnection, PubSub)>>,
    connected: watch::Sender<bool>,
    metrics: BusMetrics,
}

impl RedisBus {
    /// The bus of the router of that name. It connects when it is listened to; its tasks belong to `lifecycle`
    /// and end when the bus is dropped.
    ///
    /// # Errors
    /// When the configuration names no server.
    pub(crate) fn new(
        config: RedisConfig,
        router: &str,
        lifecycle: Lifecycle,
        random: SharedRandom,
        metrics: BusMetrics,
    ) -> RedisResult<Self> {
        let keys = config.keys();
        Self::with_keys(config, keys, router, lifecycle, random, metrics)
    }

    /// Like [`Self::new`], under other names.
    pub(crate) fn with_keys(
        config: RedisConfig,
        keys: Keys,
        router: &str,
        lifecycle: Lifecycle,
        random: SharedRandom,
        metrics: BusMetrics,
    ) -> RedisResult<Self> {
        let shared = Arc::new(Shared {
            client: config.client()?,
            own: keys.router(router).into(),
            wanted: Wanted::new(config.timeout, metrics.clone()),
            inlet: OnceLock::new(),
            publisher: Mutex::new(None),
            connected: watch::Sender::new(false),
            metrics,
            config,
            keys,
        });
        let gone = lifecycle.soft().child_token();
        Ok(Self { shared, lifecycle, random, lanes: LaneLimits::default(), gone })
    }

    fn unavailable(&self, why: impl std::fmt::Display) -> BusError {
        BusError::Unavailable(format!("{why}; check Redis at {}", self.shared.config.address()))
    }
}

impl Drop for RedisBus {
    fn drop(&mut self) {
        self.gone.cancel();
    }
}

#[async_trait]
impl Bus for RedisBus {
    async fn listen(&self, sink: Arc<dyn Sink>) -> Result<(), BusError> {
        let shared = &self.shared;
        let (inlet, workers) = Inlet::new(&shared.own, &shared.keys, self.lanes, &sink, &shared.metrics);
        shared.inlet.set(inlet).map_err(|_| BusError::Listener)?;
        for worker in workers {
            let gone = self.gone.clone();
            let run = async move { _ = gone.run_until_cancelled(worker.run()).await };
            self.lifecycle.spawn("bus worker", run);
        }
        let (gone, live) = (self.gone.clone(), live(Arc::clone(shared), sink, Arc::clone(&self.random)));
        self.lifecycle.spawn("bus subscriber", async move { _ = gone.run_until_cancelled(live).await });
        let mut connected = shared.connected.subscribe();
        match timeout(shared.config.timeout, connected.wait_for(|connected| *connected)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(self.unavailable("Redis does not answer")),
        }
    }

    async fn subscribe(&self, channels: &[Arc<str>]) -> Vec<Result<(), BusError>> {
        if self.shared.inlet.get().is_none() {
            return channels.iter().map(|_| Err(BusError::Listener)).collect();
        }
        let answers = self.shared.wanted.subscribe(channels).await;
        answers.into_iter().map(|answer| answer.map_err(|error| self.unavailable(error))).collect()
    }

    async fn unsubscribe(&self, channels: &[Arc<str>]) -> Result<(), BusError> {
        self.shared.wanted.unsubscribe(channels);
        Ok(())
    }

    async fn relay(&self, router: &str, hints: Vec<EdgeHint>) -> Result<bool, BusError> {
        let publisher = self.shared.publisher.lock().clone();
        let Some((mut connection, pub_sub)) = publisher else {
            return Err(self.unavailable("there is no connection to Redis"));
        };
        let name = self.shared.keys.router(router);
        let envelopes = encode_hints(hints);
        let mut pipeline = Pipeline::with_capacity(envelopes.len());
        for envelope in &envelopes {
            pipeline.cmd(pub_sub.publish()).arg(&name).arg(envelope);
        }
        if envelopes.is_empty() {
            return Ok(true);
        }
        let replies = connection.req_packed_commands(&pipeline, 0, envelopes.len()).await;
        let replies = replies.map_err(|error| self.unavailable(error))?;
        let mut heard = true;
        for reply in replies {
            match reply.extract_error().map_err(|error| self.unavailable(error))? {
                Value::Int(receivers) => heard &= receivers > 0,
                _ => return Err(self.unavailable("Redis gave a reply out of turn")),
            }
        }
        Ok(heard)
    }
}

/// One session after another, for as long as it is polled.
async fn live(shared: Arc<Shared>, sink: Arc<dyn Sink>, random: SharedRandom) {
    let outage = Outage::default();
    let address = shared.config.address();
    let (mut attempt, mut before) = (0, false);
    loop {
        let error = match Session::open(&shared, &sink).await {
            Ok(session) => {
                attempt = 0;
                shared.metrics.connects.inc();
                if outage.ends() {
                    tracing::info!(address, "the bus is connected to Redis again");
                }
                if std::mem::replace(&mut before, true) {
                    sink.missed(Missed::Hints);
                }
                live_session(&shared, session).await
            }
            Err(error) => error,
        };
        if outage.begins() {
            tracing::warn!(%error, address, "the bus is not connected to Redis");
        }
        sleep(sanjay_runtime::random::full_jitter(&*random, attempt, BACKOFF_BASE, BACKOFF_CAP)).await;
        attempt += 1;
    }
}

async fn live_session(shared: &Shared, session: Session) -> SessionError {
    *shared.publisher.lock() = Some(session.publisher());
    shared.wanted.connected();
    shared.connected.send_replace(true);
    // Also when the task is cancelled.
    let mut ended = Ended { shared, silent: false };
    let error = session.run(PROBE_EVERY).await;
    ended.silent = error.is_silence();
    error
}

/// Takes back what a session offered, when it ends.
struct Ended<'a> {
    shared: &'a Shared,
    silent: bool,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        *self.shared.publisher.lock() = None;
        self.shared.wanted.disconnected(self.silent);
        self.shared.connected.send_replace(false);
    }
}

#[cfg(test)]
mod heal_tests;
#[cfg(test)]
mod tests;
