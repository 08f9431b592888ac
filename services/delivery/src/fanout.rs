//! Durable publications: accepts them, and puts them into the inboxes of their channels' members.
//!
//! A publication is claimed, applied page by page, and noted as finished. A node that dies in between leaves it to the
//! next claim, which goes on where the store says that it ended; what a member has already is not put there twice.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use sanjay_proto::client::v1::Payload;
use sanjay_protocol::ErrorCode;
use sanjay_runtime::{
    clock::SharedClock,
    failpoint,
    milestones::MilestoneRing,
    random::{SharedRandom, uuid_v7},
    trace::carry,
};
use tokio::{sync::Notify, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    metrics::Metrics,
    paced::paced_or_woken,
    spans,
    store::{
        Applied, InboxStore, JoinError, Membership, Numbered, Publication, PublicationError, StoreError, Turn,
    },
};

/// How often publications are looked for that another node accepted, or left unfinished.
const EVERY: Duration = Duration::from_millis(250);

/// Most publications that are applied at once, each of another channel.
const MAX_TURNS: usize = 8;

/// Most members of one step.
const MAX_STEP: usize = 500;

/// After how many steps a publication lets others have a turn.
const MAX_STEPS: usize = 8;

/// For how long a claim holds: longer than a step may take.
const CLAIM: Duration = Duration::from_secs(30);

/// How often it is measured what waits.
const MEASURE_EVERY: Duration = Duration::from_secs(3);

/// What a back end publishes durably; checked.
#[derive(Debug)]
pub(crate) struct DurablePublish {
    pub(crate) caller: Arc<str>,
    pub(crate) channel: String,
    pub(crate) payload: Payload,
    pub(crate) dedupe_key: String,
    /// W3C `traceparent` of the caller, or empty.
    pub(crate) parent: String,
    /// How long it may wait to be acknowledged; `None` leaves it to the configuration.
    pub(crate) ttl: Option<Duration>,
    /// Empty for none.
    pub(crate) collapse_key: String,
}

impl PublicationError {
    /// The code of the protocol for it.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            PublicationError::AlreadyExists { .. } => ErrorCode::AlreadyExists,
            PublicationError::Backlog => ErrorCode::QueueFull,
            PublicationError::Store(error) => error.code(),
        }
    }
}

impl JoinError {
    /// The code of the protocol for it.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            JoinError::Full { .. } => ErrorCode::LimitExceeded,
            JoinError::Store(error) => error.code(),
        }
    }
}

/// Channels with members.
#[derive(Clone)]
pub(crate) struct Channels {
    pub(crate) store: Arc<dyn InboxStore>,
    pub(crate) ring: Arc<MilestoneRing>,
    pub(crate) clock: SharedClock,
    pub(crate) random: SharedRandom,
    pub(crate) metrics: Metrics,
    /// Most time that a message waits to be acknowledged.
    pub(crate) max_age: Option<Duration>,
    /// How many members a channel may have.
    pub(crate) max_members: u64,
    /// Told of each publication.
    pub(crate) wake: Arc<Notify>,
}

impl Channels {
    /// Accepts a publication. Submits when it is called: publications of one task to one channel keep their order.
    pub(crate) fn publish(
        &self,
        publish: DurablePublish,
    ) -> BoxFuture<'static, Result<Numbered, PublicationError>> {
        let message_id = uuid_v7(&*self.clock, &*self.random);
        let span = spans::publish(&publish.parent, message_id, &publish.channel);
        let mut trace = publish.parent;
        carry(&span, &mut trace);
        let now_us = self.clock.now_us();
        let ttl = publish.ttl.into_iter().chain(self.max_age).min();
        let channel = publish.channel.clone();
        let publication = Publication {
            channel: publish.channel,
            message_id,
            caller: publish.caller.to_string(),
            payload: Arc::new(publish.payload),
            dedupe_key: publish.dedupe_key,
            time_us: now_us,
            trace,
            expires_us: ttl.map_or(0, |ttl| now_us.saturating_add(ttl.as_micros() as u64)),
            collapse_key: publish.collapse_key,
        };
        let accepting = self.store.publish_durable(publication);
        let this = self.clone();
        async move {
            let result = accepting.await;
            match &result {
                Ok(numbered) => {
                    this.metrics.published_durably(numbered.duplicate);
                    if !numbered.duplicate {
                        let detail = format!("channel {channel}, publication {}", numbered.number);
                        this.ring.record(message_id.as_bytes(), "accepted", detail);
                        this.wake.notify_one();
                    }
                }
                Err(error) => spans::refused(&tracing::Span::current(), error.code().as_str()),
            }
            result
        }
        .instrument(span)
        .boxed()
    }

    /// Makes users members.
    pub(crate) async fn join(&self, channel: String, users: Vec<String>) -> Result<Membership, JoinError> {
        self.store.join(channel, users, self.max_members).await
    }

    /// Ends memberships.
    pub(crate) async fn leave(&self, channel: String, users: Vec<String>) -> Result<Membership, StoreError> {
        self.store.leave(channel, users).await
    }

    /// The first members whose names follow `after`.
    pub(crate) async fn members(
        &self,
        channel: String,
        after: String,
        limit: usize,
    ) -> Result<Vec<String>, StoreError> {
        self.store.members(channel, after, limit).await
    }
}

/// Applies publications.
pub(crate) struct FanOut {
    pub(crate) store: Arc<dyn InboxStore>,
    pub(crate) ring: Arc<MilestoneRing>,
    pub(crate) clock: SharedClock,
    pub(crate) metrics: Metrics,
    /// Told of what this node accepts.
    pub(crate) wake: Arc<Notify>,
}

impl FanOut {
    /// Runs until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let wake = self.wake.clone();
        let what = "durable publications wait to be put into inboxes";
        paced_or_woken(EVERY, &wake, what, stop.clone(), || self.step(&stop)).await;
    }

    /// Measures what waits, until `stop`. Without an answer the last value stays.
    pub(crate) async fn measure(
        store: Arc<dyn InboxStore>,
        metrics: Metrics,
        clock: SharedClock,
        stop: CancellationToken,
    ) {
        let mut ticks = tokio::time::interval_at(Instant::now() + MEASURE_EVERY, MEASURE_EVERY);
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            match store.backlog().await {
                Ok(backlog) => metrics.backlog(backlog, clock.now_us()),
                Err(error) => tracing::debug!(%error, "what waits to be put into inboxes was not counted"),
            }
        }
    }

    /// Applies some of what waits; says whether there may be more.
    async fn step(&self, stop: &CancellationToken) -> Result<bool, StoreError> {
        let turns = self.store.claim_publications(self.now(), self.until(), MAX_TURNS).await?;
        if turns.is_empty() {
            return Ok(false);
        }
        let turns = stream::iter(turns).map(|turn| self.take(turn, stop)).buffer_unordered(MAX_TURNS);
        let results: Vec<Result<(), StoreError>> = turns.collect().await;
        results.into_iter().collect::<Result<(), StoreError>>().map(|()| true)
    }

    /// Applies some steps of a publication.
    async fn take(&self, mut turn: Turn, stop: &CancellationToken) -> Result<(), StoreError> {
        for step in 1..=MAX_STEPS {
            // With the last step of a turn, the claim ends.
            let last = step == MAX_STEPS || stop.is_cancelled();
            let until_us = if last { self.now() } else { self.until() };
            let id = turn.message_id;
            let applied = self.store.apply(turn.clone(), until_us, MAX_STEP).await?;
            failpoint::hit("delivery.fan_out");
            match applied {
                Applied::More(next, count) => {
                    self.metrics.fanned_out(count);
                    turn = next;
                }
                Applied::Finished(count) => {
                    self.metrics.fanned_out(count);
                    self.metrics.publication_finished();
                    let detail = format!("channel {}, publication {}", turn.channel, turn.number);
                    self.ring.record(id.as_bytes(), "fanned_out", detail);
                    break;
                }
                Applied::Lost => break,
            }
            if last {
                break;
            }
        }
        Ok(())
    }

    fn now(&self) -> u64 {
        self.clock.now_us()
    }

    fn until(&self) -> u64 {
        self.now() + CLAIM.as_micros() as u64
    }
}
