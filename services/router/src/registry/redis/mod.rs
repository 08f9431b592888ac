//! The registry in Redis, which several routers share.
//!
//! Channels go over one connection, in lanes that keep their order; edges and sessions over a pool.
//! Epochs belong to the Redis process that assigns the offsets: see `scripts/channel.lua`.

mod history;
mod lanes;
mod line;
mod pool;
mod record;
mod server;
mod sessions;
mod sweeps;
#[cfg(test)]
mod tests;
mod watch;

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use async_trait::async_trait;
use redis::{Pipeline, from_redis_value};
use sanjay_proto::router::v1::NewPublication;
use sanjay_resilience::State;
use sanjay_runtime::{SharedNamespaces, clock::SharedClock, random::SharedRandom};
use tokio::time::timeout;

use self::{
    history::Reader,
    lanes::{Lanes, new_epoch},
    line::{Limits, Line},
    pool::{Pool, is_no_script},
    server::{Known, describe, timed_out},
    sessions::Sessions,
};
use super::{
    Assigned, Attachment, EdgeRef, HistoryPage, HistoryQuery, Location, Registry, RegistryError, Top,
    UserSession, history::Keep,
};
use crate::redis::{RedisConfig, keys::Keys, metrics::RedisMetrics};

/// Channels of one round trip.
const TOPS: usize = 512;

/// [`Registry`] in a Redis server. Clock and randomness stamp publications and name epochs.
pub struct RedisRegistry {
    known: Arc<Known>,
    line: Arc<Line>,
    lanes: Lanes,
    sessions: Sessions,
    reader: Reader,
    namespaces: SharedNamespaces,
    random: SharedRandom,
}

impl RedisRegistry {
    /// Connects when it is used first; channels keep what their namespaces say. `lease` is for how long an attachment lasts without being renewed.
    /// Must be called within a runtime.
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub(crate) fn new(
        config: RedisConfig,
        lease: Duration,
        clock: SharedClock,
        random: SharedRandom,
        metrics: RedisMetrics,
        namespaces: SharedNamespaces,
    ) -> anyhow::Result<Self> {
        let keys = config.keys();
        Self::with(config, keys, Limits::default(), lease, (clock, random, namespaces), metrics)
    }

    fn with(
        config: RedisConfig,
        keys: Keys,
        limits: Limits,
        lease: Duration,
        (clock, random, namespaces): (SharedClock, SharedRandom, SharedNamespaces),
        metrics: RedisMetrics,
    ) -> anyhow::Result<Self> {
        let known = Arc::new(Known::new(config, keys, metrics, lease));
        let line = Arc::new(Line::new(Arc::clone(&known), limits).context("cannot set up Redis")?);
        let pool = Pool::new(Arc::clone(&known)).context("cannot set up Redis")?;
        Ok(Self {
            lanes: Lanes::start(&line, &known, &clock, &random, &namespaces),
            reader: Reader::new(Arc::clone(&known), Arc::clone(&line)),
            namespaces,
            sessions: Sessions::new(pool, Arc::clone(&known)),
            known,
            line,
            random,
        })
    }

    /// The positions of at most [`TOPS`] channels, in one round trip.
    async fn some_tops(
        &self,
        channels: &[Arc<str>],
    ) -> Result<Vec<Result<Top, RegistryError>>, RegistryError> {
        let open = self.line.open().await?;
        let keys = &self.known.keys;
        let mut pipeline = Pipeline::with_capacity(channels.len());
        for channel in channels {
            let names = [keys.channel(channel), keys.dedupe(channel), keys.history(channel)];
            let mut call = open.top.call(&names);
            call.arg(new_epoch(&self.random));
            pipeline.add_command(call);
        }
        let mut answers = self.line.send(&open, "tops", &pipeline).await?;
        // Positions have no order to keep, so all are asked for again.
        let unknown = |answer: &redis::Value| matches!(answer.clone().extract_error(), Err(error) if is_no_script(&error));
        if answers.iter().any(unknown) {
            open.load().await.map_err(|error| self.known.failed(&describe(&error)))?;
            answers = self.line.send(&open, "tops", &pipeline).await?;
        }
        let top = |answer: redis::Value| {
            let answer = answer.extract_error().and_then(|answer| Ok(from_redis_value(answer)?));
            let (epoch, offset, opened): (String, u64, bool) =
                answer.map_err(|error| self.known.refused(&describe(&error)))?;
            if opened {
                self.known.metrics.epochs.inc();
            }
            Ok(Top { epoch: epoch.into(), offset })
        };
        let mut tops: Vec<_> = answers.into_iter().map(top).collect();
        tops.resize_with(channels.len(), || Err(self.known.unavailable("it gave too few answers")));
        Ok(tops)
    }
}

#[async_trait]
impl Registry for RedisRegistry {
    async fn publish(&self, publications: Vec<NewPublication>) -> Vec<Result<Assigned, RegistryError>> {
        self.lanes.publish(publications).await
    }

    async fn tops(&self, channels: &[Arc<str>]) -> Vec<Result<Top, RegistryError>> {
        let mut tops = Vec::with_capacity(channels.len());
        for step in channels.chunks(TOPS) {
            let asked = timeout(self.known.config.timeout, self.some_tops(step)).await;
            match asked.unwrap_or_else(|_| Err(self.known.failed(&describe(&timed_out())))) {
                Ok(answers) => tops.extend(answers),
                Err(error) => {
                    // The rest would fail too, each after its time-out.
                    tops.resize(channels.len(), Err(error));
                    break;
                }
            }
        }
        tops
    }

    async fn history(&self, query: &HistoryQuery) -> Result<HistoryPage, RegistryError> {
        let keep = Keep::from(self.namespaces.of(&query.channel));
        self.reader.read(&self.sessions.pool, query, keep, &self.random).await
    }

    async fn attach(&self, edge: &EdgeRef, router: &Arc<str>) -> Result<Attachment, RegistryError> {
        self.sessions.attach(edge, router).await
    }

    async fn detach(&self, attachment: &Attachment) -> Result<(), RegistryError> {
        self.sessions.detach(attachment).await
    }

    async fn renew(&self, attachments: &[Attachment]) -> Vec<Result<(), RegistryError>> {
        self.sessions.renew(attachments).await
    }

    async fn sweep(&self, attachment: &Attachment) -> Result<usize, RegistryError> {
        self.sessions.sweep(attachment).await
    }

    async fn open_sessions(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Vec<Result<(), RegistryError>> {
        self.sessions.open(attachment, sessions).await
    }

    async fn close_sessions(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Result<(), RegistryError> {
        self.sessions.close(attachment, sessions).await
    }

    async fn locate(&self, users: &[Arc<str>]) -> Result<Vec<Vec<Location>>, RegistryError> {
        self.sessions.locate(users).await
    }

    fn is_settled(&self) -> bool {
        self.known.is_settled()
    }

    async fn maintain(&self) -> Result<(), RegistryError> {
        if self.known.policy.state() != State::Closed {
            // The first finds out whether Redis is back; the second would only be refused meanwhile.
            self.line.probe().await?;
            return self.sessions.maintain().await;
        }
        let (probed, maintained) = tokio::join!(self.line.probe(), self.sessions.maintain());
        probed.and(maintained)
    }
}
