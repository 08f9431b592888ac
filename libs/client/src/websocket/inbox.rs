//! The user's inbox on this device: what is handed to the application, what it has processed, and the task
//! that stores this before anything is acked.

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use futures::Stream;
use sanjay_protocol::{
    Command,
    command::{Nak, Term, Working},
    event::{Inbox, InboxState},
};
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

/// Why a message was not acked, or not given back. It comes again.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AckError {
    /// That it was processed could not be stored.
    #[error("not acked: {0}")]
    Checkpoint(String),
    /// The client has stopped.
    #[error("not acked: the client has stopped")]
    Closed,
    /// The delay or the reason is out of bounds.
    #[error("not given back: {0}")]
    Invalid(String),
}

/// Answers one message. Dropped without an answer, the message stays unsettled and comes again: when the server's ack
/// deadline has passed, or on the next connection.
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

    /// Gives the message back: it is delivered again, not before `delay` (whole milliseconds, up to a day), and the
    /// server's schedule may take longer. As many failed attempts as the server allows make it a dead letter. `reason`,
    /// up to 200 bytes without control characters, is kept with the attempt.
    ///
    /// Returns when it waits to be sent. When the connection ends before the server has it, or there is none, the message
    /// comes again with the next one.
    ///
    /// # Errors
    /// When delay or reason is out of bounds, or the client has stopped.
    pub async fn nak(self, delay: Duration, reason: &str) -> Result<(), AckError> {
        let delay_ms = u32::try_from(delay.as_millis()).unwrap_or(u32::MAX);
        let (seq, reason) = (self.seq, reason.to_owned());
        self.answer(|delivery| Command::Nak(Nak { seq, delivery, delay_ms, reason })).await
    }

    /// Gives the message up: it becomes a dead letter and is not delivered again. Otherwise like [`nak`](Self::nak).
    ///
    /// # Errors
    /// When the reason is out of bounds, or the client has stopped.
    pub async fn term(self, reason: &str) -> Result<(), AckError> {
        let (seq, reason) = (self.seq, reason.to_owned());
        self.answer(|delivery| Command::Term(Term { seq, delivery, reason })).await
    }

    /// The message takes longer: the server's ack deadline begins anew. Returns when that waits to be sent.
    ///
    /// # Errors
    /// When the client has stopped.
    pub async fn working(&self) -> Result<(), AckError> {
        let seq = self.seq;
        self.answer(|delivery| Command::Working(Working { seq, delivery })).await
    }

    /// Answers the newest delivery: another one may have come since the application got the message.
    async fn answer(&self, command: impl FnOnce(u32) -> Command) -> Result<(), AckError> {
        // Of another inbox by now: nobody waits for the answer.
        let Some(delivery) = self.shared.delivery(self.generation, self.seq) else { return Ok(()) };
        let command = command(delivery);
        command.check().map_err(|error| AckError::Invalid(error.message))?;
        let answer = Answer { generation: self.generation, command };
        self.settle.send(Settle::Answer(answer)).await.map_err(|_| AckError::Closed)
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
    /// The next event; `None` once the client has stopped. Dropping the future loses nothing. A message that was settled
    /// elsewhere before the application came to it is left out.
    pub async fn next(&mut self) -> Option<InboxEvent> {
        loop {
            let event = self.events.recv().await?;
            if is_of_use(&event) {
                return Some(event);
            }
        }
    }
}

impl Stream for InboxStream {
    type Item = InboxEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<InboxEvent>> {
        loop {
            match self.events.poll_recv(cx) {
                Poll::Ready(Some(event)) if !is_of_use(&event) => {}
                other => return other,
            }
        }
    }
}

/// Whether the application is to get an event; a message is in its hands from now on.
fn is_of_use(event: &InboxEvent) -> bool {
    match event {
        InboxEvent::Message(InboxDelivery { acker, .. }) => {
            acker.shared.hand_out(acker.generation, acker.seq)
        }
        InboxEvent::Discontinuity(_) => true,
    }
}

/// What the settling task is told.
#[derive(Debug)]
pub(crate) enum Settle {
    /// The application processed a message.
    Processed { generation: u64, seq: u64, trace: String, stored: oneshot::Sender<Result<(), AckError>> },
    /// The application says something else of a message.
    Answer(Answer),
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

/// `nak`, `term` or `working`, for one generation of the inbox.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) generation: u64,
    pub(crate) command: Command,
}

/// What the connection is to tell the server.
#[derive(Debug)]
pub(crate) enum Ready {
    Acks(Settled),
    Answer(Answer),
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
    /// What the application has, or is about to get.
    held: BTreeMap<u64, Held>,
}

/// A message that has no answer yet.
#[derive(Debug)]
struct Held {
    /// Its newest delivery.
    delivery: u32,
    /// Whether the application has it: nothing can take it back then.
    out: bool,
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

    pub(crate) fn take(self: &Arc<Self>, message: &Inbox, settle: &mpsc::Sender<Settle>) -> Taken {
        let Inbox { seq, delivery, ref trace, .. } = *message;
        let mut inner = self.lock();
        if inner.processed.as_ref().is_some_and(|processed| processed.contains(seq)) {
            return Taken::Again;
        }
        if let Some(held) = inner.held.get_mut(&seq) {
            held.delivery = delivery;
            return Taken::Held;
        }
        inner.held.insert(seq, Held { delivery, out: false });
        let generation = inner.generation;
        let (shared, settle, trace) = (Arc::clone(self), settle.clone(), trace.clone());
        Taken::New(Acker { seq, trace, generation, held: true, shared, settle })
    }

    /// The newest delivery of a message that the application has.
    fn delivery(&self, generation: u64, seq: u64) -> Option<u32> {
        let inner = self.lock();
        inner.held.get(&seq).map(|held| held.delivery).filter(|_| inner.generation == generation)
    }

    /// The application gets a message; `false` when it needs not, as that was settled elsewhere. One of another inbox is
    /// handed out: the application hears of that before it.
    fn hand_out(&self, generation: u64, seq: u64) -> bool {
        let mut inner = self.lock();
        if inner.generation != generation {
            return true;
        }
        let held = inner.held.get_mut(&seq);
        held.map(|held| held.out = true).is_some()
    }

    /// Messages were settled elsewhere. What the application does not have counts as processed, and does not reach it;
    /// the server does not send it again. What it has stays its own: the answer changes nothing on the server.
    pub(crate) fn settled_elsewhere(&self, epoch: &str, ranges: &[(u64, u64)]) {
        let mut inner = self.lock();
        let Inner { processed: Some(processed), held, .. } = &mut *inner else { return };
        if processed.epoch() != epoch {
            return;
        }
        for &(from, to) in ranges.iter().filter(|(from, to)| from <= to) {
            let waiting: Vec<u64> =
                held.range(from..=to).filter(|(_, held)| !held.out).map(|(seq, _)| *seq).collect();
            for seq in waiting {
                held.remove(&seq);
                processed.insert(seq);
            }
        }
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
    ready: mpsc::Sender<Ready>,
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
                // Nothing of it is stored, so that it need not wait for what is.
                Settle::Answer(answer) => {
                    if ready.send(Ready::Answer(answer)).await.is_err() {
                        return;
                    }
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
                if !seqs.is_empty()
                    && ready.send(Ready::Acks(Settled { generation, seqs, trace })).await.is_err()
                {
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
