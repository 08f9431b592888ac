//! Tells the router about committed messages, as fast as it takes them. Nothing waits for this queue, and what
//! does not fit is dropped: redelivery finds it.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use sanjay_proto::{
    client::v1::{InboxMessage, Payload},
    edge::v1::InboxHint,
    router::v1::RelayOutcome,
};
use sanjay_runtime::{
    mailbox::{Receiver, Sender, mailbox},
    milestones::MilestoneRing,
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    events::{EventKind, Events},
    metrics::Metrics,
    router,
};

/// Most hints that wait.
const MAX_QUEUED: usize = 16_384;

/// Most bytes of payload that wait.
const MAX_QUEUED_BYTES: usize = 32 * 1024 * 1024;

/// What became of a hint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Handed to an edge.
    Relayed,
    /// The user has no session anywhere.
    Offline,
    /// The router does not know where the user is.
    Unknown,
    /// The router did not answer.
    Failed,
    /// The queue was full.
    Dropped,
}

impl Outcome {
    /// Every outcome, in the order of their numbers.
    pub(crate) const ALL: [Self; 5] =
        [Self::Relayed, Self::Offline, Self::Unknown, Self::Failed, Self::Dropped];

    /// One word, for metrics.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Outcome::Relayed => "relayed",
            Outcome::Offline => "offline",
            Outcome::Unknown => "unknown",
            Outcome::Failed => "failed",
            Outcome::Dropped => "dropped",
        }
    }

    /// Reads a number of the router; one that this build does not know says nothing about the user.
    pub(crate) fn from_number(number: i32) -> Self {
        match RelayOutcome::try_from(number) {
            Ok(RelayOutcome::Relayed) => Outcome::Relayed,
            Ok(RelayOutcome::Offline) => Outcome::Offline,
            Ok(RelayOutcome::Unspecified) | Err(_) => Outcome::Unknown,
        }
    }
}

/// A committed message on its way to the router; the payload is shared with the other users of a send.
#[derive(Debug, Clone)]
pub(crate) struct Hint {
    pub(crate) user: String,
    pub(crate) epoch: u64,
    pub(crate) seq: u64,
    pub(crate) message_id: Uuid,
    pub(crate) payload: Arc<Payload>,
    pub(crate) time_us: u64,
    pub(crate) trace: String,
}

impl Hint {
    fn size(&self) -> usize {
        prost::Message::encoded_len(&*self.payload)
    }
}

impl From<Hint> for InboxHint {
    fn from(hint: Hint) -> Self {
        let message = InboxMessage {
            seq: hint.seq,
            message_id: hint.message_id.as_bytes().to_vec().into(),
            payload: Some((*hint.payload).clone()),
            time_us: hint.time_us,
            delivery: 1,
            trace: hint.trace,
        };
        InboxHint { user: hint.user, message: Some(message), inbox_epoch: hint.epoch, ..InboxHint::default() }
    }
}

/// The queue toward the router.
#[derive(Clone)]
pub(crate) struct RelayQueue {
    hints: Sender<Hint>,
    bytes: Arc<AtomicUsize>,
    metrics: Metrics,
}

/// Makes the queue and its other end.
pub(crate) fn queue(metrics: Metrics) -> (RelayQueue, Relay) {
    let (hints, receiver) = mailbox(MAX_QUEUED);
    let bytes = Arc::new(AtomicUsize::new(0));
    (RelayQueue { hints, bytes: bytes.clone(), metrics: metrics.clone() }, Relay { receiver, bytes, metrics })
}

impl RelayQueue {
    /// Queues a hint, or drops it when the queue is full.
    pub(crate) fn offer(&self, hint: Hint) {
        let size = hint.size();
        let queued = self.bytes.fetch_add(size, Ordering::Relaxed);
        if queued + size > MAX_QUEUED_BYTES || self.hints.try_send(hint).is_err() {
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            self.metrics.relayed(Outcome::Dropped, 1);
        }
    }
}

/// Takes hints off the queue.
pub(crate) struct Relay {
    receiver: Receiver<Hint>,
    bytes: Arc<AtomicUsize>,
    metrics: Metrics,
}

impl Relay {
    /// Relays what is ready, in as few calls as possible, until every [`RelayQueue`] is gone. After `stop` a
    /// router that does not answer is not asked again.
    pub(crate) async fn run(
        mut self,
        router: router::Router,
        ring: Arc<MilestoneRing>,
        events: Events,
        stop: CancellationToken,
    ) {
        let (mut ready, mut away) = (Vec::new(), false);
        while self.receiver.recv_many(&mut ready, router::MAX_ITEMS).await > 0 {
            for call in router::split(ready.drain(..), Hint::size) {
                let size: usize = call.iter().map(Hint::size).sum();
                self.bytes.fetch_sub(size, Ordering::Relaxed);
                if away && stop.is_cancelled() {
                    continue;
                }
                let ids: Vec<Uuid> = call.iter().map(|hint| hint.message_id).collect();
                let watched = call.iter().filter(|_| events.watched());
                let places: Vec<_> = watched.map(|hint| (hint.user.clone(), hint.seq)).collect();
                match router.relay(call.into_iter().map(InboxHint::from).collect()).await {
                    Ok(outcomes) => {
                        tell(&events, &places, &ids, &outcomes);
                        self.note(&ring, &ids, outcomes);
                        if std::mem::replace(&mut away, false) {
                            tracing::info!("hints are relayed again");
                        }
                    }
                    Err(error) => {
                        self.metrics.relayed(Outcome::Failed, ids.len());
                        if !std::mem::replace(&mut away, true) {
                            tracing::warn!(%error, "hints are not relayed; redelivery follows when the router is back");
                        }
                    }
                }
            }
        }
    }

    fn note(&self, ring: &MilestoneRing, ids: &[Uuid], outcomes: Vec<i32>) {
        for (message_id, outcome) in ids.iter().zip(outcomes.into_iter().map(Outcome::from_number)) {
            let stage = if outcome == Outcome::Offline { "parked" } else { "relayed" };
            ring.record(message_id.as_bytes(), stage, outcome.as_str());
            self.metrics.relayed(outcome, 1);
        }
    }
}

/// Tells of hints that were handed to an edge; `places` has the user and the seq of each, or nothing when nobody watched.
fn tell(events: &Events, places: &[(String, u64)], ids: &[Uuid], outcomes: &[i32]) {
    for (((user, seq), id), outcome) in places.iter().zip(ids).zip(outcomes) {
        if Outcome::from_number(*outcome) == Outcome::Relayed {
            events.tell(EventKind::Relayed, user, Some(*id), *seq);
        }
    }
}
