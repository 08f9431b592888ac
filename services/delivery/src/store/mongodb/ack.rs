//! Settling: one write for all acks of a user that wait together. It takes the bodies out of the inbox, adds the
//! receipts and raises the counters at once. Its condition is the count of such writes.

use std::collections::VecDeque;

use mongodb::bson::{Bson, Document, doc, serialize_to_bson};
use uuid::Uuid;

use super::{
    documents::{self, ReceiptDoc, SettlerDoc},
    inbox::Inbox,
    plan::{Attempt, Kind, Rules, Step},
    work::{Ack, Queued, Work},
};
use crate::{
    message::State,
    store::{Settled, SettledMessage, StoreError},
};

/// Most acks of one write.
const MAX_RUN: usize = 64;

/// Most messages that one write settles; an ack of more takes several.
const MAX_SETTLED: u64 = 512;

/// What a write does, and what each of its acks is answered.
pub(super) struct Plan {
    settled: Settled,
    written: u64,
    /// Seqs that it settles, ascending.
    fresh: Vec<u64>,
    /// For each ack: what it settled, and its refused ranges when it is complete.
    parts: Vec<Part>,
}

struct Part {
    fresh: Vec<u64>,
    messages: Vec<SettledMessage>,
    /// The mark after it, and how many ranges were refused; `None` when more of it is to come.
    end: Option<(u64, usize)>,
}

/// Answers what changes nothing, and makes the write for the acks at the front of the queue.
pub(super) fn plan(rules: &Rules<'_>, user: &str, queue: &mut VecDeque<Queued>, inbox: &Inbox) -> Step {
    let Some(mut plan) = settle(queue, inbox) else { return Step::Read };
    let missing: Vec<u64> = plan.fresh.iter().copied().filter(|seq| inbox.message(*seq).is_none()).collect();
    if let (Some(first), Some(last)) = (missing.first(), missing.last()) {
        if !inbox.looked_beside {
            return Step::Beside(*first, *last);
        }
        if !inbox.fresh {
            return Step::Read;
        }
        tracing::error!(seqs = ?missing, "bodies of unsettled messages are missing in the database; they are settled without receipts");
    }
    plan.name(inbox);
    if plan.fresh.is_empty() && plan.written <= inbox.written {
        plan.answer(queue);
        return Step::Again;
    }
    match model(rules, user, &plan, inbox) {
        Ok(model) => Step::Write(Box::new(Attempt {
            batch: rules.batch,
            model,
            bytes: 0,
            kind: Kind::Ack { settles: inbox.settles, plan },
        })),
        Err(error) => Step::Fail(plan.parts.len(), error),
    }
}

/// Works out what the acks at the front come to; `None` when the inbox must be read for it.
fn settle(queue: &VecDeque<Queued>, inbox: &Inbox) -> Option<Plan> {
    let mut plan =
        Plan { settled: inbox.settled.clone(), written: inbox.written, fresh: Vec::new(), parts: Vec::new() };
    let mut budget = MAX_SETTLED;
    for queued in queue.iter().take(MAX_RUN) {
        let Work::Ack(ack) = &queued.work else { break };
        if ack.settle.epoch != inbox.epoch {
            plan.parts.push(Part { fresh: vec![], messages: vec![], end: Some((plan.settled.mark(), 0)) });
            continue;
        }
        let highest = ack.ranges.iter().map(|range| range.1).max().unwrap_or(0).max(ack.settle.written);
        if highest > inbox.head && !inbox.fresh {
            if plan.parts.is_empty() {
                return None;
            }
            break;
        }
        plan.written = plan.written.max(ack.settle.written.min(inbox.head));
        let part = settle_one(ack, inbox.head, &mut plan.settled, &mut budget);
        let cut = part.end.is_none();
        plan.fresh.extend(&part.fresh);
        plan.parts.push(part);
        if cut {
            break;
        }
    }
    plan.fresh.sort_unstable();
    Some(plan)
}

fn settle_one(ack: &Ack, head: u64, settled: &mut Settled, budget: &mut u64) -> Part {
    let (mut fresh, mut refused) = (Vec::new(), 0);
    for &(from, to) in &ack.ranges {
        let to = to.min(head);
        let mut trial = settled.clone();
        let Ok(parts) = trial.settle(from, to) else {
            refused += 1;
            continue;
        };
        let count: u64 = parts.iter().map(|(from, to)| to - from + 1).sum();
        let seqs = parts.into_iter().flat_map(|(from, to)| from..=to).take(*budget as usize);
        fresh.extend(seqs);
        if count <= *budget {
            (*settled, *budget) = (trial, *budget - count);
            continue;
        }
        // As far as the budget goes; the rest is settled by the next write.
        if let Some(last) = fresh.last().copied().filter(|_| *budget > 0)
            && settled.settle(from, last).is_err()
        {
            fresh.retain(|seq| !(from..=last).contains(seq));
            refused += 1;
            continue;
        }
        *budget = 0;
        return Part { fresh, messages: Vec::new(), end: None };
    }
    Part { fresh, messages: Vec::new(), end: Some((settled.mark(), refused)) }
}

impl Plan {
    /// How many messages it settles.
    pub(super) fn count(&self) -> usize {
        self.fresh.len()
    }

    /// Names the messages of each part.
    fn name(&mut self, inbox: &Inbox) {
        for part in &mut self.parts {
            part.messages = part
                .fresh
                .iter()
                .filter_map(|seq| inbox.message(*seq))
                .map(|open| SettledMessage {
                    seq: open.seq,
                    message_id: Uuid::from_bytes(open.id.bytes()),
                    accepted_us: open.time_us,
                    trace: open.trace.clone(),
                })
                .collect();
        }
    }

    /// Answers the acks at the front of the queue, which are those of this plan.
    pub(super) fn answer(self, queue: &mut VecDeque<Queued>) {
        for part in self.parts {
            let Some(Queued { work: Work::Ack(ack), .. }) = queue.front_mut() else { return };
            ack.settled(part.messages);
            let Some(end) = part.end else { return };
            if let Some(Queued { work: Work::Ack(ack), .. }) = queue.pop_front() {
                ack.answer(Ok(end));
            }
        }
    }

    /// Takes over a write that is durable.
    pub(super) fn apply(&self, inbox: &mut Inbox) {
        inbox.settled = self.settled.clone();
        inbox.written = self.written;
        if self.fresh.is_empty() {
            return;
        }
        inbox.settles += 1;
        inbox.terminal += self.fresh.len() as u64;
        inbox.receipts += self.fresh.len();
        inbox.open.retain(|open| self.fresh.binary_search(&open.seq).is_err());
    }
}

fn model(
    rules: &Rules<'_>,
    user: &str,
    plan: &Plan,
    inbox: &Inbox,
) -> Result<mongodb::options::WriteModel, StoreError> {
    let mut filter = doc! { "_id": user, "epoch": inbox.epoch.cast_signed() };
    let mut update = doc! { "$max": { "written": plan.written.cast_signed() } };
    let mut set = Document::new();
    if !plan.fresh.is_empty() {
        filter.insert("settles", inbox.settles);
        set.insert("mark", plan.settled.mark().cast_signed());
        set.insert("settled", documents::ranges(&plan.settled));
        let settler = SettlerDoc { w: rules.database.node.to_string(), b: rules.batch };
        set.insert("settler", bson(&settler)?);
        update.insert("$inc", doc! { "settles": 1_i64, "acked": plan.fresh.len() as i64 });
        update.insert("$push", doc! { "receipts": { "$each": receipts(rules, plan, inbox)? } });
        if let Some(pull) = pull(plan, inbox) {
            update.insert("$pull", doc! { "messages": { "n": pull } });
        }
    }
    if plan.written.max(plan.settled.mark()) >= inbox.head {
        // Nothing waits to be written, unless something was appended meanwhile.
        filter.insert("seq", inbox.head.cast_signed());
        set.insert("attempt", 0_i64);
        update.insert("$unset", doc! { "due": "" });
    }
    if !set.is_empty() {
        update.insert("$set", set);
    }
    Ok(rules.database.update(filter, update, false))
}

/// Which bodies leave the document.
fn pull(plan: &Plan, inbox: &Inbox) -> Option<Bson> {
    let inside = |seq: &u64| inbox.open.binary_search_by_key(seq, |open| open.seq).is_ok();
    let seqs: Vec<i64> = plan.fresh.iter().filter(|seq| inside(seq)).map(|seq| seq.cast_signed()).collect();
    let mark = plan.settled.mark().cast_signed();
    match seqs.last() {
        None => None,
        Some(last) if *last <= mark => Some(doc! { "$lte": mark }.into()),
        Some(_) => Some(doc! { "$in": seqs }.into()),
    }
}

fn receipts(rules: &Rules<'_>, plan: &Plan, inbox: &Inbox) -> Result<Vec<Bson>, StoreError> {
    let messages = plan.fresh.iter().filter_map(|seq| inbox.message(*seq));
    let receipt = |open: &super::inbox::Open| ReceiptDoc {
        i: open.id,
        n: open.seq.cast_signed(),
        s: State::Acked.number(),
        a: open.time_us.cast_signed(),
        t: rules.now_us.cast_signed(),
    };
    messages.map(|open| bson(&receipt(open))).collect()
}

fn bson(value: &impl serde::Serialize) -> Result<Bson, StoreError> {
    serialize_to_bson(value).map_err(|error| StoreError::Unavailable(error.to_string()))
}
