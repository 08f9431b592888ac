//! From the connection's reader to the fan-out: bounded lanes, so that the reader never waits and a channel keeps
//! its order.
//!
//! Invariant: a message that found no room leaves a mark, and a mark goes only by being handed to the sink. While a
//! mark exists its lane is not empty, so the lane's worker will come and make room.

use std::{
    collections::HashSet,
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use sanjay_runtime::mailbox::{Receiver, Sender, mailbox};

use super::{
    envelope::{Content, decode},
    metrics::BusMetrics,
};
use crate::{
    bus::{Missed, Sink},
    outage::Outage,
    redis::keys::Keys,
};

/// Lanes, each with a worker. Decoding costs about as much as reading, so a few keep up with one connection.
pub(super) const LANES: usize = 4;

/// Channels of one lane that may be marked one by one; more are marked as all.
const MAX_MARKS: usize = 1_024;

/// Messages that a worker takes at a time.
const BATCH: usize = 256;

/// Bounds of one lane.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaneLimits {
    pub(super) messages: usize,
    pub(super) bytes: usize,
}

/// Large enough for a tenth of a second of what a connection carries at its fastest.
impl Default for LaneLimits {
    fn default() -> Self {
        Self { messages: 8_192, bytes: 16 * 1024 * 1024 }
    }
}

/// The reader's side.
pub(super) struct Inlet {
    lanes: Box<[Arc<Lane>]>,
    /// Keyed anew in each process: nobody can choose names that all fall on one lane.
    hasher: RandomState,
    own: Box<str>,
}

struct Lane {
    sender: Sender<Item>,
    /// Of the payloads that wait.
    bytes: AtomicUsize,
    limits: LaneLimits,
    marks: Mutex<Marks>,
    marked: AtomicBool,
    metrics: BusMetrics,
}

#[derive(Default)]
struct Marks {
    names: HashSet<Box<str>>,
    all: bool,
}

enum Item {
    Message { name: String, payload: Vec<u8> },
    Missed(Box<str>),
    MissedAll,
}

/// The side of the fan-out: one for each lane.
pub(super) struct Worker {
    lane: Arc<Lane>,
    receiver: Receiver<Item>,
    own: Box<str>,
    keys: Keys,
    sink: Arc<dyn Sink>,
    /// Of understanding what others send.
    understanding: Outage,
}

impl Inlet {
    /// Lanes to `sink`, and their workers. `own` is the name on which hints come.
    pub(super) fn new(
        own: &str,
        keys: &Keys,
        limits: LaneLimits,
        sink: &Arc<dyn Sink>,
        metrics: &BusMetrics,
    ) -> (Self, Vec<Worker>) {
        let mut workers = Vec::new();
        let lane = |_| {
            // The lane keeps its own sender, so the worker ends by its task's end and not by the mailbox's.
            let (sender, receiver) = mailbox(limits.messages);
            let lane = Arc::new(Lane {
                sender,
                bytes: AtomicUsize::new(0),
                limits,
                marks: Mutex::default(),
                marked: AtomicBool::new(false),
                metrics: metrics.clone(),
            });
            workers.push(Worker {
                lane: Arc::clone(&lane),
                receiver,
                own: own.into(),
                keys: keys.clone(),
                sink: Arc::clone(sink),
                understanding: Outage::default(),
            });
            lane
        };
        let lanes = (0..LANES).map(lane).collect();
        (Self { lanes, hasher: RandomState::new(), own: own.into() }, workers)
    }

    /// Takes a message as it came, or marks its channel. Never waits.
    pub(super) fn take(&self, name: String, payload: Vec<u8>) {
        let lane = if *name == *self.own { 0 } else { self.hasher.hash_one(&name) as usize % LANES };
        self.lanes[lane].take(name, payload);
    }
}

impl Lane {
    fn take(&self, name: String, payload: Vec<u8>) {
        self.flush_marks();
        let size = payload.len();
        // Only the reader adds, so the bound holds.
        if self.bytes.load(Ordering::Relaxed) + size > self.limits.bytes && !self.sender.is_empty() {
            return self.mark(&name);
        }
        self.bytes.fetch_add(size, Ordering::Relaxed);
        if let Err(refused) = self.sender.try_send(Item::Message { name, payload }) {
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            if let Item::Message { name, .. } = refused.into_inner() {
                self.mark(&name);
            }
        }
    }

    fn mark(&self, name: &str) {
        self.metrics.overflows.inc();
        let mut marks = self.marks.lock();
        if marks.names.len() < MAX_MARKS {
            marks.names.insert(name.into());
        } else {
            marks.all = true;
            marks.names.clear();
        }
        // The worker may have emptied the lane just now and not come again for a mark that it did not see.
        self.send_marks(&mut marks);
    }

    fn flush_marks(&self) {
        if self.marked.load(Ordering::Acquire) {
            self.send_marks(&mut self.marks.lock());
        }
    }

    fn send_marks(&self, marks: &mut Marks) {
        if marks.all && self.sender.try_send(Item::MissedAll).is_ok() {
            *marks = Marks::default();
        }
        while let Some(name) = marks.names.iter().next().cloned() {
            if self.sender.try_send(Item::Missed(name.clone())).is_err() {
                break;
            }
            marks.names.remove(&name);
        }
        self.marked.store(marks.all || !marks.names.is_empty(), Ordering::Release);
    }
}

impl Worker {
    /// Hands on what comes, for as long as it is polled.
    pub(super) async fn run(mut self) {
        let mut items = Vec::with_capacity(BATCH);
        while self.receiver.recv_many(&mut items, BATCH).await > 0 {
            self.lane.flush_marks();
            for item in items.drain(..) {
                match item {
                    Item::Message { name, payload } => {
                        let size = payload.len();
                        self.hand_on(&name, payload);
                        self.lane.bytes.fetch_sub(size, Ordering::Relaxed);
                    }
                    Item::Missed(name) => self.missed(&name),
                    Item::MissedAll => {
                        self.sink.missed(Missed::Channels);
                        self.sink.missed(Missed::Hints);
                    }
                }
            }
        }
    }

    fn hand_on(&self, name: &str, payload: Vec<u8>) {
        let problem = match decode(payload.into()) {
            Ok(Content::Publication(publication)) if self.is_of(name, &publication.channel) => {
                self.sink.publication(&Arc::new(publication));
                None
            }
            Ok(Content::Hints(hints)) if *name == *self.own => {
                hints.into_iter().for_each(|hint| self.sink.hint(hint));
                None
            }
            // Its arrival is all that matters, and the reader has noted that.
            Ok(Content::Probe) => return,
            Ok(Content::Publication(_) | Content::Hints(_)) => Some("it came on another name".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        match problem {
            None => {
                if self.understanding.ends() {
                    tracing::info!("messages on the bus are understood again");
                }
            }
            Some(problem) => {
                self.lane.metrics.undecodable.inc();
                if self.understanding.begins() {
                    tracing::warn!(
                        name,
                        problem,
                        "a message on the bus was not understood, and counts as lost"
                    );
                }
                self.missed(name);
            }
        }
    }

    fn is_of(&self, name: &str, channel: &str) -> bool {
        self.keys.published_channel(name) == Some(channel)
    }

    fn missed(&self, name: &str) {
        match self.keys.published_channel(name) {
            _ if *name == *self.own => self.sink.missed(Missed::Hints),
            Some(channel) => self.sink.missed(Missed::Channel(channel)),
            None => {}
        }
    }
}

#[cfg(test)]
#[path = "inlet_tests.rs"]
mod tests;
