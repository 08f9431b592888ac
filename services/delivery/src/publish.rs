//! Publishes to channels: what is ready goes to the router in one call, in order.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use futures::{FutureExt, future::BoxFuture};
use sanjay_proto::{
    client::v1::Payload,
    router::v1::{NewPublication, PublishResult},
};
use sanjay_protocol::ErrorCode;
use sanjay_runtime::{
    clock::SharedClock,
    mailbox::{Receiver, Sender, mailbox},
    milestones::MilestoneRing,
    random::{SharedRandom, uuid_v7},
    trace::carry,
};
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::{
    router::{self, Router, RouterError},
    spans,
};

/// Most publishes that wait for the router.
const MAX_QUEUED: usize = 16_384;

/// Most bytes of payload that wait for the router.
const MAX_QUEUED_BYTES: usize = 32 * 1024 * 1024;

/// What a back end publishes; checked.
#[derive(Debug)]
pub(crate) struct Publish {
    pub(crate) channel: String,
    pub(crate) payload: Payload,
    pub(crate) dedupe_key: String,
    /// W3C `traceparent` of the caller, or empty.
    pub(crate) parent: String,
}

/// Where a publication got its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Published {
    /// Of the first publish under the dedupe key, when there was one.
    pub(crate) message_id: Uuid,
    pub(crate) epoch: String,
    pub(crate) offset: u64,
}

/// Why a publish failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PublishError {
    /// Too many wait already; nothing was published.
    #[error("too many publishes wait for the router; nothing was published, try again in a moment")]
    Busy,
    /// No router could be reached; nothing was published.
    #[error("{0}; nothing was published, try again in a moment")]
    NotSent(RouterError),
    /// It is unknown whether it was published.
    #[error("{0}; whether the message was published is unknown: publish it again with the same dedupe_key")]
    Router(RouterError),
    /// This node is ending.
    #[error("this node is shutting down; publish through another one")]
    Closing,
    /// The router said no.
    #[error("{message}")]
    Refused {
        /// Why.
        code: ErrorCode,
        /// Why, for a person.
        message: String,
    },
}

impl PublishError {
    /// The code of the protocol for it.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            PublishError::Busy => ErrorCode::RateLimited,
            PublishError::NotSent(_) | PublishError::Router(_) | PublishError::Closing => {
                ErrorCode::Unavailable
            }
            PublishError::Refused { code, .. } => *code,
        }
    }
}

impl From<RouterError> for PublishError {
    fn from(error: RouterError) -> Self {
        match &error {
            RouterError::Call(call) if call.is_not_sent() => PublishError::NotSent(error),
            _ => PublishError::Router(error),
        }
    }
}

struct Pending {
    publication: NewPublication,
    message_id: Uuid,
    size: usize,
    answer: oneshot::Sender<Result<Published, PublishError>>,
}

/// The queue toward the router.
#[derive(Clone)]
pub(crate) struct Publisher {
    pending: Sender<Pending>,
    bytes: Arc<AtomicUsize>,
    ring: Arc<MilestoneRing>,
    clock: SharedClock,
    random: SharedRandom,
}

/// Makes the queue and its other end.
pub(crate) fn queue(ring: Arc<MilestoneRing>, clock: SharedClock, random: SharedRandom) -> (Publisher, Lane) {
    let (pending, receiver) = mailbox(MAX_QUEUED);
    let bytes = Arc::new(AtomicUsize::new(0));
    (Publisher { pending, bytes: bytes.clone(), ring, clock, random }, Lane { receiver, bytes })
}

impl Publisher {
    /// Queues a publish when it is called; publishes that one task queues keep their order.
    pub(crate) fn publish(&self, publish: Publish) -> BoxFuture<'static, Result<Published, PublishError>> {
        let message_id = uuid_v7(&*self.clock, &*self.random);
        let span = spans::publish(&publish.parent, message_id, &publish.channel);
        let mut trace = publish.parent;
        carry(&span, &mut trace);
        self.ring.record(message_id.as_bytes(), "accepted", format!("channel {}", publish.channel));
        let size = prost::Message::encoded_len(&publish.payload);
        let publication = NewPublication {
            channel: publish.channel,
            payload: Some(publish.payload),
            publisher: String::new(),
            dedupe_key: publish.dedupe_key,
            message_id: message_id.as_bytes().to_vec().into(),
            trace,
        };
        let (answer, answered) = oneshot::channel();
        let queued = self.bytes.fetch_add(size, Ordering::Relaxed);
        let fits = queued + size <= MAX_QUEUED_BYTES;
        if !fits || self.pending.try_send(Pending { publication, message_id, size, answer }).is_err() {
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            spans::refused(&span, PublishError::Busy.code().as_str());
            return async { Err(PublishError::Busy) }.boxed();
        }
        async move {
            let result = answered.await.unwrap_or(Err(PublishError::Closing));
            if let Err(error) = &result {
                spans::refused(&span, error.code().as_str());
            }
            span.in_scope(|| tracing::debug!(accepted = result.is_ok(), "a publish is answered"));
            result
        }
        .boxed()
    }
}

/// Takes publishes off the queue, one call to the router at a time: that keeps their order.
pub(crate) struct Lane {
    receiver: Receiver<Pending>,
    bytes: Arc<AtomicUsize>,
}

impl Lane {
    /// Runs until every [`Publisher`] is gone.
    pub(crate) async fn run(mut self, router: Router) {
        let (mut ready, mut away) = (Vec::new(), false);
        while self.receiver.recv_many(&mut ready, router::MAX_ITEMS).await > 0 {
            for mut call in router::split(ready.drain(..), |pending| pending.size) {
                self.bytes.fetch_sub(call.iter().map(|pending| pending.size).sum(), Ordering::Relaxed);
                // Who is not waiting any more was told that the publish failed: it must not happen late.
                call.retain(|pending| !pending.answer.is_closed());
                if call.is_empty() {
                    continue;
                }
                let (publications, answers): (Vec<_>, Vec<_>) = call
                    .into_iter()
                    .map(|pending| (pending.publication, (pending.message_id, pending.answer)))
                    .unzip();
                let results = router.publish(publications).await;
                match results.iter().find_map(|result| result.as_ref().err()) {
                    Some(error) if !std::mem::replace(&mut away, true) => {
                        tracing::warn!(%error, "publishes fail");
                    }
                    None if std::mem::replace(&mut away, false) => tracing::info!("publishes succeed again"),
                    Some(_) | None => {}
                }
                for ((own, answer), result) in answers.into_iter().zip(results) {
                    drop(
                        answer.send(
                            result.map_err(PublishError::from).and_then(|result| published(result, own)),
                        ),
                    );
                }
            }
        }
    }
}

fn published(result: PublishResult, own: Uuid) -> Result<Published, PublishError> {
    if let Some(error) = result.error {
        return Err(PublishError::Refused {
            code: ErrorCode::from_text(&error.code),
            message: error.message,
        });
    }
    // The router names another id only where a dedupe key was used before.
    let message_id = Uuid::from_slice(&result.message_id).unwrap_or(own);
    Ok(Published { message_id, epoch: result.epoch, offset: result.offset })
}
