//! The user's inbox on this device: what is handed to the application, what it has processed, and the task
//! that stores this before anything is acked.

use std::{
    collections::BTreeSet,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};

use futures::Stream;
use sanjay_protocol::event::{Inbox, InboxState};
use tokio::sync::{mpsc, oneshot};

use super::{
    checkpoint::Checkpoint,
    dedup::{Discontinuity, Processed},
    machine::Request,
};

/// Most processed messages that one store and one ack stand for.
const BATCH: usize = 256;

/// What happens in the inbox.
#[derive(Debug)]
pub enum InboxEvent {
    /// A message that this device has not processed.
    Message(InboxDelivery),
    /// The inbox is not the one that this device knew: reload what was derived from it.
    Discontinuity(Discontinuity),
}

/// A message with the means to ack it.
#[derive(Debug)]
pub struct InboxDelivery {
    /// The message.
    pub message: Inbox,
    /// To be used once the application has processed the message.
    pub acker: Acker,
}

/// Why a message was not acked. It comes again.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AckError {
    /// That it was processed could not be stored.
    #[error("not acked: {0}")]
    Checkpoint(String),
    /// The client has stopped.
    #[error("not acked: the client has stopped")]
    Closed,
}

/// Acks one message. Dropped without [`ack`](Self::ack), the message stays unsettled and comes again, at the
/// latest on the next connection.
#[derive(Debug)]
pub struct Acker {
    seq: u64,
    /// Goes back with the ack; empty when the message is not recorded.
    trace: String,
    generation: u64,
    held: bool,
    shared: Arc<Shared>,
    settle: mpsc::Sender<Settle>,
}

impl Acker {
    /// Records that the message was processed and returns once that is stored; the ack to the server follows,
    /// in a range with others that are ready. If it gets lost, the redelivery is acked without the application.
    ///
    /// # Errors
    /// When it could not be stored, or the client has stopped.
    pub async fn ack(mut self) -> Result<(), AckError> {
        let (stored, done) = oneshot::channel();
        let trace = std::mem::take(&mut self.trace);
        let settle = Settle::Processed { generation: self.generation, seq: self.seq, trace, stored };
        self.settle.send(settle).await.map_err(|_| AckError::Closed)?;
        self.held = false;
        done.await.unwrap_or(Err(AckError::Closed))
    }
}

impl Drop for Acker {
    fn drop(&mut self) {
        if self.held {
            self.shared.release(self.generation, [self.seq]);
        }
    }
}

/// The inbox's events in order. Dropped, further messages stay unsettled.
#[derive(Debug)]
pub struct InboxStream {
    pub(crate) events: mpsc::Receiver<InboxEvent>,
    /// Keeps the connection as long as somebody listens.
    pub(crate) _requests: mpsc::Sender<Request>,
}

impl InboxStream {
    /// The next event; `None` once the client has stopped. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<InboxEvent> {
        self.events.recv().await
    }
}

impl Stream for InboxStream {
    type Item = InboxEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<InboxEvent>> {
        self.events.poll_recv(cx)
    }
}

/// What the settling task is told.
#[derive(Debug)]
pub(crate) enum Settle {
    /// The application processed a message.
    Processed { generation: u64, seq: u64, trace: String, stored: oneshot::Sender<Result<(), AckError>> },
    /// The device met its inbox: keep where it began.
    Begin,
    /// Answer once everything before is stored and handed on.
    Flush(oneshot::Sender<()>),
}

/// Seqs to ack, of one generation of the inbox.
#[derive(Debug)]
pub(crate) struct Settled {
    pub(crate) generation: u64,
    pub(crate) seqs: Vec<u64>,
    /// The trace of the message with the highest of `seqs`; may be empty.
    pub(crate) trace: String,
}

/// What becomes of a delivery.
#[derive(Debug)]
pub(crate) enum Taken {
    /// To the application.
    New(Acker),
    /// The application has it and has not answered yet.
    Held,
    /// It was processed: ack it again.
    Again,
}

/// What the connection, the ackers and the settling task know together.
#[derive(Debug, Default)]
pub(crate) struct Shared(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    processed: Option<Processed>,
    /// Counts the inboxes that were met: numbers of an earlier one mean other messages.
    generation: u64,
    held: BTreeSet<u64>,
}

impl Shared {
    pub(crate) fn new(processed: Option<Processed>) -> Self {
        Self(Mutex::new(Inner { processed, ..Inner::default() }))
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is complete before anything that could panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the inbox's state after a connect. The flag says that the device met an inbox for the first time.
    pub(crate) fn observe(&self, state: &InboxState) -> (Option<Discontinuity>, bool) {
        let mut inner = self.lock();
        let Some(processed) = &mut inner.processed else {
            inner.processed = Some(Processed::begin(state));
            return (None, true);
        };
        let discontinuity = processed.observe(state);
        if discontinuity.is_some() {
            inner.generation += 1;
            inner.held.clear();
        }
        (discontinuity, false)
    }

    pub(crate) fn take(self: &Arc<Self>, seq: u64, trace: &str, settle: &mpsc::Sender<Settle>) -> Taken {
        let mut inner = self.lock();
        if inner.processed.as_ref().is_some_and(|processed| processed.contains(seq)) {
            return Taken::Again;
        }
        if !inner.held.insert(seq) {
            return Taken::Held;
        }
        let generation = inner.generation;
        let (shared, settle, trace) = (Arc::clone(self), settle.clone(), trace.to_owned());
        Taken::New(Acker { seq, trace, generation, held: true, shared, settle })
    }

    pub(crate) fn is_current(&self, generation: u64) -> bool {
        self.lock().generation == generation
    }

    fn release(&self, generation: u64, seqs: impl IntoIterator<Item = u64>) {
        let mut inner = self.lock();
        if inner.generation == generation {
            for seq in seqs {
                inner.held.remove(&seq);
            }
        }
    }

    /// The generation, and the state as it will be once `seqs` count as processed.
    fn staged(&self, batch: &[(u64, u64)]) -> (u64, Option<Processed>, Vec<u64>) {
        let inner = self.lock();
        let current = batch.iter().filter(|(generation, _)| *generation == inner.generation);
        let seqs: Vec<u64> = current.map(|&(_, seq)| seq).collect();
        let mut processed = inner.processed.clone();
        if let Some(processed) = &mut processed {
            seqs.iter().for_each(|&seq| processed.insert(seq));
        }
        (inner.generation, processed, seqs)
    }

    fn commit(&self, generation: u64, seqs: &[u64]) {
        let mut inner = self.lock();
        if inner.generation == generation {
            for seq in seqs {
                inner.held.remove(seq);
                if let Some(processed) = &mut inner.processed {
                    processed.insert(*seq);
                }
            }
        }
    }
}

/// Stores what was processed and hands it on to be acked, in this order, until every sender is gone.
pub(crate) async fn settle(
    mut requests: mpsc::Receiver<Settle>,
    shared: Arc<Shared>,
    checkpoint: Arc<dyn Checkpoint>,
    ready: mpsc::Sender<Settled>,
) {
    let mut requested = Vec::with_capacity(BATCH);
    while requests.recv_many(&mut requested, BATCH).await > 0 {
        let (mut batch, mut waiting, mut flushes) = (Vec::new(), Vec::new(), Vec::new());
        let mut traces = Vec::new();
        for request in requested.drain(..) {
            match request {
                Settle::Processed { generation, seq, trace, stored } => {
                    batch.push((generation, seq));
                    traces.push(trace);
                    waiting.push(stored);
                }
                Settle::Begin => {}
                Settle::Flush(done) => flushes.push(done),
            }
        }
        let (generation, processed, seqs) = shared.staged(&batch);
        let result = match &processed {
            Some(processed) => checkpoint.store(processed).await,
            None => Ok(()),
        };
        match &result {
            Ok(()) => {
                shared.commit(generation, &seqs);
                let newest = (0..batch.len()).filter(|&at| batch[at].0 == generation);
                let newest = newest.max_by_key(|&at| batch[at].1);
                let trace = newest.map(|at| std::mem::take(&mut traces[at])).unwrap_or_default();
                if !seqs.is_empty() && ready.send(Settled { generation, seqs, trace }).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, messages = seqs.len(), "inbox messages are not acked");
                shared.release(generation, seqs);
            }
        }
        for stored in waiting {
            // Whoever stopped waiting does not need the answer.
            let _ = stored
                .send(result.as_ref().map_err(|error| AckError::Checkpoint(error.to_string())).copied());
        }
        for done in flushes {
            let _ = done.send(());
        }
    }
}
