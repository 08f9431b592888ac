//! What waits for a lane, and where its answers go.

use std::sync::Arc;

use parking_lot::Mutex;
use sanjay_proto::client::v1::SeqRange;
use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::Instant,
};

use super::DEADLINE;
use crate::store::{
    Acked, AppendError, Appended, MAX_REPORTED, NewMessage, Settle, SettledMessage, StoreError, Verdict,
};

/// Answers of one call, complete when each of its parts has one. It holds the call's places in the queue.
pub(super) struct Call<R> {
    answers: Mutex<Answers<R>>,
    _permits: Vec<OwnedSemaphorePermit>,
}

struct Answers<R> {
    slots: Vec<Option<R>>,
    missing: usize,
    sender: Option<oneshot::Sender<Vec<R>>>,
}

impl<R> Call<R> {
    /// A call of so many parts, at least one.
    pub(super) fn new(
        parts: usize,
        permits: Vec<OwnedSemaphorePermit>,
    ) -> (Arc<Self>, oneshot::Receiver<Vec<R>>) {
        let (sender, receiver) = oneshot::channel();
        let slots = std::iter::repeat_with(|| None).take(parts).collect();
        let answers = Mutex::new(Answers { slots, missing: parts, sender: Some(sender) });
        (Arc::new(Self { answers, _permits: permits }), receiver)
    }

    fn answer(&self, part: usize, answer: R) {
        let mut answers = self.answers.lock();
        if answers.slots[part].replace(answer).is_none() {
            answers.missing -= 1;
        }
        if answers.missing == 0
            && let Some(sender) = answers.sender.take()
        {
            // Who asked may have gone away, which is no concern of the lane.
            let _gone = sender.send(std::mem::take(&mut answers.slots).into_iter().flatten().collect());
        }
    }
}

/// A message to append.
pub(super) struct Append {
    pub(super) message: NewMessage,
    /// Digest of its dedupe key and of its payload; `None` without a key.
    pub(super) key: Option<(Vec<u8>, Vec<u8>)>,
    /// Digest of its collapse key; `None` without one.
    pub(super) collapse: Option<Vec<u8>>,
    pub(super) call: Arc<Call<Result<Appended, AppendError>>>,
    pub(super) part: usize,
}

impl Append {
    /// Length of its payload.
    pub(super) fn bytes(&self) -> u64 {
        prost::Message::encoded_len(&*self.message.payload) as u64
    }

    /// Bytes of payload that are written with it.
    pub(super) fn own_bytes(&self) -> usize {
        if self.message.shared.is_some() { 0 } else { prost::Message::encoded_len(&*self.message.payload) }
    }

    pub(super) fn answer(self, result: Result<Appended, AppendError>) {
        self.call.answer(self.part, result);
    }
}

/// Something to settle or to note.
pub(super) struct Ack {
    pub(super) settle: Settle,
    /// Ascending; what was settled in earlier writes for this ack is in `done`.
    pub(super) ranges: Vec<(u64, u64)>,
    pub(super) done: Vec<SettledMessage>,
    /// What follows from the failures that were taken.
    failed: Vec<(u64, Verdict)>,
    /// How many messages could not be noted.
    refused: usize,
    /// Whether it is there to have dying messages settled, of which little may be known yet.
    finishes: bool,
    /// What it has settled as expired; `None` also when that is done.
    pub(super) expiring: Option<Expiring>,
    /// What it notes of devices; `None` for an ack.
    pub(super) seeing: Option<Seeing>,
    pub(super) call: Arc<Call<Result<Acked, StoreError>>>,
    pub(super) part: usize,
}

/// What is to be settled as expired in one inbox.
#[derive(Debug)]
pub(super) struct Expiring {
    /// Unix time in microseconds.
    pub(super) now_us: u64,
    /// Most messages; at most [`MAX_REPORTED`].
    pub(super) limit: usize,
    /// Messages beside the inbox that have expired, as (when, seq); those in it are found there.
    pub(super) beside: Vec<(u64, u64)>,
}

/// What is to be noted of the devices of one inbox.
#[derive(Debug)]
pub(super) enum Seeing {
    /// This one is there.
    Device(String),
    /// Those are to be forgotten that were not seen for long at this Unix time in microseconds.
    Gone(u64),
}

impl Ack {
    pub(super) fn new(settle: Settle, call: Arc<Call<Result<Acked, StoreError>>>, part: usize) -> Self {
        let mut ranges: Vec<(u64, u64)> =
            settle.ranges.iter().map(|&SeqRange { from, to }| (from, to)).collect();
        // In ascending order, what moves the mark comes before what needs a range of its own.
        ranges.sort_unstable();
        let (done, failed) = (Vec::new(), Vec::new());
        Self {
            settle,
            ranges,
            done,
            failed,
            refused: 0,
            finishes: false,
            expiring: None,
            seeing: None,
            call,
            part,
        }
    }

    /// Nobody's ack: has the dying messages of an inbox settled, which happens with any.
    pub(super) fn finishing(user: String, epoch: u64, places: Vec<OwnedSemaphorePermit>) -> Self {
        let settle = Settle { user, epoch, ..Settle::default() };
        let (call, _unheard) = Call::new(1, places);
        Self { finishes: true, ..Self::new(settle, call, 0) }
    }

    /// Nobody's ack: settles messages whose time has passed.
    pub(super) fn expiring(
        user: String,
        expiring: Expiring,
        call: Arc<Call<Result<Acked, StoreError>>>,
        part: usize,
    ) -> Self {
        let settle = Settle { user, ..Settle::default() };
        Self { expiring: Some(expiring), ..Self::new(settle, call, part) }
    }

    /// Nobody's ack: notes something of devices. Its answer counts as refused what found no room, or was forgotten.
    pub(super) fn seeing(
        user: String,
        seeing: Seeing,
        call: Arc<Call<Result<Acked, StoreError>>>,
        part: usize,
    ) -> Self {
        let settle = Settle { user, ..Settle::default() };
        Self { seeing: Some(seeing), ..Self::new(settle, call, part) }
    }

    /// Whether it must be planned by what the database says now.
    pub(super) fn needs_fresh(&self) -> bool {
        self.finishes
            || self.expiring.is_some()
            || self.seeing.is_some()
            || !self.settle.failed.is_empty()
            || !self.settle.rewritten.is_empty()
    }

    /// Notes that its failures were looked at, and what follows from those that were taken.
    pub(super) fn noted(&mut self, failed: Vec<(u64, Verdict)>, refused: usize) {
        self.failed.extend(failed);
        self.refused += refused;
        self.settle.failed.clear();
        self.settle.rewritten.clear();
        self.expiring = None;
    }

    /// Notes what was settled for it.
    pub(super) fn settled(&mut self, messages: Vec<SettledMessage>) {
        let room = MAX_REPORTED - self.done.len();
        self.done.extend(messages.into_iter().take(room));
    }

    pub(super) fn answer(self, result: Result<(u64, usize), StoreError>) {
        let Self { done: messages, failed, refused: before, .. } = self;
        let acked = result.map(|(mark, refused)| Acked { mark, messages, refused: refused + before, failed });
        self.call.answer(self.part, acked);
    }
}

/// What waits for a lane.
pub(super) enum Work {
    Append(Append),
    Ack(Ack),
    /// Arms the inbox; keeps its place in the queue until it is dropped.
    Arm(#[expect(dead_code, reason = "it is held, not read")] Vec<OwnedSemaphorePermit>),
}

impl Work {
    pub(super) fn fail(self, error: &StoreError) {
        match self {
            Work::Append(append) => append.answer(Err(error.clone().into())),
            Work::Ack(ack) => ack.answer(Err(error.clone())),
            Work::Arm(_) => {}
        }
    }
}

/// Work in a lane's queue.
pub(super) struct Queued {
    pub(super) user: String,
    pub(super) work: Work,
    /// When it is answered that it could not be done.
    pub(super) deadline: Instant,
}

impl Queued {
    pub(super) fn new(user: String, work: Work) -> Self {
        Self { user, work, deadline: Instant::now() + DEADLINE }
    }

    /// Has the dying messages of an inbox settled: what a lane asks of itself, which needs no place in the queue.
    pub(super) fn finishing(user: &str, epoch: u64) -> Self {
        Self::new(user.to_owned(), Work::Ack(Ack::finishing(user.to_owned(), epoch, Vec::new())))
    }
}
