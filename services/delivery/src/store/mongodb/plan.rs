//! What a lane's writes are made of: bounds of an inbox, a write under way, what follows for a user.

use std::collections::VecDeque;

use mongodb::{bson::doc, options::WriteModel};
use sanjay_runtime::random::Random;

use super::{
    ack, append,
    database::Database,
    inbox::Inbox,
    receipts,
    work::{Queued, Work},
};
use crate::store::{FIRST_DUE, Overflow, StoreError};

/// Bounds of what an inbox holds itself; what is beyond is moved beside it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Messages, and bytes of their payloads.
    pub(super) messages: usize,
    pub(super) bytes: usize,
    /// How many of the newest messages stay when the others move.
    pub(super) keep: usize,
    pub(super) receipts: usize,
    pub(super) keys: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        // Each write rewrites the document, so it is kept to what a client that is there has not acknowledged yet.
        Self { messages: 16, bytes: 32 * 1024, keep: 4, receipts: 16, keys: 16 }
    }
}

/// By how much an inbox may exceed its bounds before nothing is appended until it was tidied.
const SLACK: usize = 8;

/// What the planning of writes goes by.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    pub(super) database: &'a Database,
    pub(super) now_us: u64,
    pub(super) max_unsettled: u64,
    pub(super) max_unsettled_bytes: u64,
    pub(super) overflow: Overflow,
    pub(super) keep_expired: bool,
    pub(super) max_attempts: u32,
    pub(super) random: &'a dyn Random,
    /// Number of the write that is being made.
    pub(super) batch: i64,
    /// Whether somebody hears of what is settled, and of inboxes that are filling.
    pub(super) watched: bool,
}

/// A write under way, or without an answer.
pub(super) struct Attempt {
    pub(super) batch: i64,
    pub(super) model: WriteModel,
    /// From when on the server does not do it any more, Unix time in microseconds; `None` for never.
    pub(super) until_us: Option<u64>,
    /// Bytes of payload.
    pub(super) bytes: usize,
    pub(super) kind: Kind,
}

pub(super) enum Kind {
    Append(append::Run),
    /// Acks at the front of the queue; how often something had been settled before.
    Ack {
        settles: i64,
        plan: ack::Plan,
    },
    /// So many wishes to arm the inbox, at the front of the queue.
    Arm(usize),
}

/// What follows for a user in this round.
pub(super) enum Step {
    Write(Box<Attempt>),
    /// The inbox must be read first.
    Read,
    /// Bodies beside the inbox must be read first.
    Beside(u64, u64),
    /// The dead letters of these dying messages must be written first.
    Bury(Vec<u64>),
    /// Something was answered without a write; plan what follows it.
    Again,
    /// The first so many cannot be done.
    Fail(usize, StoreError),
    /// Not in this round.
    Wait,
}

impl Attempt {
    /// Whether the server certainly does not do it any more.
    pub(super) fn is_late(&self, now_us: u64) -> bool {
        self.until_us.is_some_and(|until_us| now_us >= until_us.saturating_add(receipts::SLACK_US))
    }

    /// How many messages or acks it is for.
    pub(super) fn items(&self) -> usize {
        match &self.kind {
            Kind::Append(run) => run.count,
            Kind::Ack { plan, .. } => plan.count(),
            Kind::Arm(_) => 0,
        }
    }
}

/// Whether something is to be moved out of the inbox or removed beside it.
pub(super) fn untidy(inbox: &Inbox, bounds: &Bounds) -> bool {
    inbox.open.len() > bounds.messages
        || (inbox.bytes() > bounds.bytes && inbox.open.len() > 1)
        || inbox.receipts > bounds.receipts
        || inbox.keys.len() > bounds.keys
        || inbox.has_garbage()
}

/// Whether nothing more fits before the inbox is tidied.
pub(super) fn over(inbox: &Inbox, bounds: &Bounds) -> bool {
    inbox.open.len() > SLACK * bounds.messages
        || inbox.bytes() > SLACK * bounds.bytes
        || inbox.keys.len() > SLACK * bounds.keys
}

/// Arms an inbox that holds unwritten messages; the condition compares fields of the one document that it names.
pub(super) fn arm(rules: &Rules<'_>, user: &str, queue: &VecDeque<Queued>) -> Step {
    let count = queue.iter().take_while(|queued| matches!(queued.work, Work::Arm(_))).count();
    let unwritten = doc! { "$gt": ["$seq", { "$max": ["$mark", "$written"] }] };
    // As in `receipts::in_time`.
    let filter = doc! { "_id": user, "$and": [{ "$expr": unwritten }] };
    let due_us = rules.now_us + FIRST_DUE.as_micros() as u64;
    let update = doc! { "$inc": { "armed": 1_i64 }, "$min": { "due": due_us.cast_signed() } };
    let model = rules.database.update(filter, update, false);
    Step::Write(Box::new(Attempt {
        batch: rules.batch,
        model,
        until_us: None,
        bytes: 0,
        kind: Kind::Arm(count),
    }))
}
