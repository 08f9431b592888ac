//! Settling: one write for all acks of a user that wait together. It takes the bodies out of the inbox, adds the
//! receipts, raises the counters and notes what failed at once. Its condition is the count of such writes.
//!
//! A message that failed for good dies in two of them: the first notes it as dying, from when on nothing but that
//! becomes of it, then its dead letter is written, then the second settles it.

mod devices;
mod expire;
mod model;

use std::collections::VecDeque;

pub(super) use expire::AGAIN_US;

use super::{
    inbox::{Inbox, Open},
    plan::{Attempt, Kind, Rules, Step},
    work::{Ack, Queued, Work},
};
use crate::{
    message::State,
    store::{Attempts, CommitSink, DeadReason, Devices, LoggedReceipt, Settled, SettledMessage, Verdict},
};

/// Most acks of one write.
const MAX_RUN: usize = 64;

/// Most messages that one write settles; an ack of more takes several.
const MAX_SETTLED: u64 = 512;

/// What a write does, and what each of its acks is answered.
pub(super) struct Plan {
    settled: Settled,
    written: u64,
    /// Seqs that it settles as acked, ascending.
    fresh: Vec<u64>,
    /// Seqs that it settles as expired, ascending, and what is told of them.
    expired: Vec<u64>,
    ended: Vec<SettledMessage>,
    /// Dying messages that it settles as dead.
    dead: Vec<u64>,
    attempts: Attempts,
    devices: Devices,
    /// What is told of messages that it settles as acked because a device is gone.
    released: Vec<SettledMessage>,
    /// Bytes that count for the quota no longer.
    bytes: i64,
    /// Before when no message in the document expires after it, 0 when none does; `None` when that stays as it is.
    expires_us: Option<u64>,
    /// Whether it changes the attempts, and whether by a failure.
    noted: bool,
    fails: bool,
    /// For each ack: what it settled, and its refused ranges when it is complete.
    parts: Vec<Part>,
    /// What it settles, when somebody wants to hear of it.
    logged: Vec<LoggedReceipt>,
}

#[derive(Default)]
struct Part {
    /// Seqs that it settles, as acked or as expired.
    fresh: Vec<u64>,
    expired: Vec<u64>,
    messages: Vec<SettledMessage>,
    /// Whether it is nobody's ack, so that the sink is told of its messages.
    sees: bool,
    /// Whether its failures were looked at, and what follows from those that were taken.
    noted: bool,
    failed: Vec<(u64, Verdict)>,
    /// How many it could not note.
    refused: usize,
    /// The mark after it, and how many ranges were refused; `None` when more of it is to come.
    end: Option<(u64, usize)>,
}

/// Answers what changes nothing, and makes the write for the acks at the front of the queue.
pub(super) fn plan(rules: &Rules<'_>, user: &str, queue: &mut VecDeque<Queued>, inbox: &Inbox) -> Step {
    let Some(mut plan) = settle(rules, queue, inbox) else { return Step::Read };
    let missing: Vec<u64> =
        plan.leaving().chain(plan.killed(inbox)).filter(|seq| inbox.message(*seq).is_none()).collect();
    if let (Some(first), Some(last)) = (missing.iter().min(), missing.iter().max()) {
        if missing.iter().any(|seq| !inbox.looked_for(*seq)) {
            return Step::Beside(*first, *last);
        }
        if !inbox.fresh {
            return Step::Read;
        }
        tracing::error!(seqs = ?missing, "bodies of unsettled messages are missing in the database; they are settled without receipts");
    }
    let unburied: Vec<u64> = plan.dead.iter().copied().filter(|seq| !inbox.buried.contains(seq)).collect();
    if !unburied.is_empty() {
        return Step::Bury(unburied);
    }
    plan.name(inbox);
    if !plan.settles() && plan.written <= inbox.written && plan.expires_us.is_none() {
        plan.answer(queue);
        return Step::Again;
    }
    match model::model(rules, user, &mut plan, inbox) {
        Ok((model, until_us)) => Step::Write(Box::new(Attempt {
            batch: rules.batch,
            model,
            until_us,
            bytes: 0,
            kind: Kind::Ack { settles: inbox.settles, plan },
        })),
        Err(error) => Step::Fail(plan.parts.len(), error),
    }
}

/// Works out what the acks at the front come to; `None` when the inbox must be read for it.
fn settle(rules: &Rules<'_>, queue: &VecDeque<Queued>, inbox: &Inbox) -> Option<Plan> {
    let mut plan = Plan {
        settled: inbox.settled.clone(),
        written: inbox.written,
        fresh: Vec::new(),
        expired: Vec::new(),
        ended: Vec::new(),
        dead: Vec::new(),
        attempts: inbox.attempts.clone(),
        devices: inbox.devices.clone(),
        released: Vec::new(),
        bytes: 0,
        expires_us: None,
        noted: false,
        fails: false,
        parts: Vec::new(),
        logged: Vec::new(),
    };
    let mut budget = MAX_SETTLED;
    plan.bury(inbox, &mut budget);
    for queued in queue.iter().take(MAX_RUN) {
        let Work::Ack(ack) = &queued.work else { break };
        if ack.settle.epoch != inbox.epoch && ack.expiring.is_none() && ack.seeing.is_none() {
            plan.parts.push(Part { end: Some((plan.settled.mark(), 0)), ..Part::default() });
            continue;
        }
        let highest = ack.ranges.iter().map(|range| range.1).max().unwrap_or(0).max(ack.settle.written);
        // Claims hand out deliveries past what is known here.
        if (highest > inbox.head || ack.needs_fresh()) && !inbox.fresh {
            if plan.parts.is_empty() {
                return None;
            }
            break;
        }
        if let Some(expiring) = &ack.expiring {
            let part = plan.expire(rules, ack, expiring, inbox, &mut budget);
            plan.parts.push(part);
            continue;
        }
        if let Some(seeing) = &ack.seeing {
            let part = plan.see(rules, seeing, inbox, &mut budget);
            let cut = part.end.is_none();
            plan.parts.push(part);
            if cut {
                break;
            }
            continue;
        }
        let part = match &ack.settle.device {
            Some(device) => plan.ack_by(rules, ack, device, inbox, &mut budget),
            None => {
                plan.written = plan.written.max(ack.settle.written.min(inbox.head));
                Some(settle_ranges(&ack.ranges, inbox.head, &mut plan.settled, &mut budget))
            }
        };
        let Some(mut part) = part else {
            plan.parts.push(Part { end: Some((plan.settled.mark(), 0)), ..Part::default() });
            continue;
        };
        plan.take_over(&mut part, inbox);
        if part.end.is_some() {
            plan.note(rules, ack, &mut part, inbox.head);
        }
        let cut = part.end.is_none();
        plan.parts.push(part);
        if cut {
            break;
        }
    }
    plan.fresh.sort_unstable();
    plan.expired.sort_unstable();
    plan.noted = plan.attempts != inbox.attempts || plan.devices != inbox.devices;
    Some(plan)
}

fn settle_ranges(ranges: &[(u64, u64)], head: u64, settled: &mut Settled, budget: &mut u64) -> Part {
    let (mut fresh, mut refused) = (Vec::new(), 0);
    for &(from, to) in ranges {
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
        return Part { fresh, ..Part::default() };
    }
    Part { fresh, end: Some((settled.mark(), refused)), ..Part::default() }
}

impl Plan {
    /// How many messages it settles.
    pub(super) fn count(&self) -> usize {
        self.fresh.len() + self.expired.len() + self.dead.len()
    }

    /// Whether it is among the writes that are counted.
    pub(super) fn settles(&self) -> bool {
        self.count() > 0 || self.noted
    }

    /// The seqs that it settles.
    fn leaving(&self) -> impl Iterator<Item = u64> + '_ {
        self.fresh.iter().chain(&self.expired).chain(&self.dead).copied()
    }

    /// The seqs that it notes as dying.
    fn killed(&self, inbox: &Inbox) -> impl Iterator<Item = u64> {
        self.attempts.dying().filter(|seq| inbox.attempts.death(*seq).is_none())
    }

    /// Whether it leaves nothing unsettled, as far as the inbox is known. One that another node writes to is not known so
    /// well.
    fn empties(&self, inbox: &Inbox) -> bool {
        !inbox.shared && self.count() > 0 && self.settled.mark() >= inbox.head
    }

    /// Settles what an earlier write noted as dying, as far as there is room for further settled ranges.
    fn bury(&mut self, inbox: &Inbox, budget: &mut u64) {
        // A node that does not know of attempts leaves those of what it settles.
        self.attempts.settle_by(|seq| inbox.settled.holds(seq));
        for seq in inbox.attempts.dying().take(*budget as usize) {
            if self.settled.settle(seq, seq).is_ok_and(|fresh| !fresh.is_empty()) {
                self.dead.push(seq);
                self.attempts.settle(seq, seq);
                *budget -= 1;
            }
        }
    }

    /// Takes over what a part settles. What is dying is dead, whatever somebody acked.
    fn take_over(&mut self, part: &mut Part, inbox: &Inbox) {
        let dying = part.fresh.extract_if(.., |seq| inbox.attempts.death(*seq).is_some());
        self.dead.extend(dying);
        self.fresh.extend(&part.fresh);
        if !inbox.attempts.is_empty() {
            let (attempts, settled) = (&mut self.attempts, &self.settled);
            attempts.settle_by(|seq| settled.holds(seq));
        }
    }

    /// Notes the written redeliveries and the failures of an ack. One that kills a message is not complete before that
    /// is settled.
    fn note(&mut self, rules: &Rules<'_>, ack: &Ack, part: &mut Part, head: u64) {
        part.noted = true;
        let report = self.reported(&ack.settle);
        let attempts = &mut self.attempts;
        part.failed = attempts.report(&report, head, &self.settled, rules.max_attempts, rules.random);
        self.fails |= part.failed.iter().any(|(_, verdict)| *verdict != Verdict::Full);
        if part.failed.iter().any(|(_, verdict)| matches!(verdict, Verdict::Dead(_))) {
            part.end = None;
        }
    }

    /// Names the messages of each part, and adds up what leaves.
    fn name(&mut self, inbox: &Inbox) {
        let name = |seq: &u64| inbox.message(*seq).map(Open::settled);
        for part in &mut self.parts {
            part.messages = part.fresh.iter().chain(&part.expired).filter_map(name).collect();
            if part.sees {
                self.released.append(&mut part.messages);
            }
        }
        self.ended = self.expired.iter().filter_map(name).collect();
        // What was dying before was taken off then.
        let released = self.fresh.iter().chain(&self.expired).copied().chain(self.killed(inbox));
        self.bytes = released.filter_map(|seq| inbox.message(seq)).map(|open| open.bytes as i64).sum();
    }

    /// Tells what it has ended, once that is durable.
    pub(super) fn tell(&self, sink: &dyn CommitSink, user: &str, epoch: u64) {
        self.ended.iter().for_each(|message| sink.ended(user, message, State::Expired));
        self.logged.iter().for_each(|receipt| sink.settled(receipt));
        self.released.iter().for_each(|message| sink.ended(user, message, State::Acked));
        let kept = Verdict::Dead(DeadReason::Expired);
        let failed = self.parts.iter().flat_map(|part| &part.failed);
        let kept = failed.filter(|(_, verdict)| *verdict == kept).count();
        if kept > 0 {
            sink.died(DeadReason::Expired, kept);
        }
        if self.expired.len() + self.dead.len() + self.released.len() > 0 {
            let released: Vec<u64> = self.released.iter().map(|message| message.seq).collect();
            sink.gone(user, epoch, &[&self.expired[..], &self.dead, &released].concat());
        }
    }

    /// Answers the acks at the front of the queue, which are those of this plan.
    pub(super) fn answer(self, queue: &mut VecDeque<Queued>) {
        for part in self.parts {
            let Some(Queued { work: Work::Ack(ack), .. }) = queue.front_mut() else { return };
            ack.settled(part.messages);
            if part.noted {
                ack.noted(part.failed, part.refused);
            }
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
        inbox.attempts = self.attempts.clone();
        // A device may have begun it.
        (inbox.devices, inbox.exists) = (self.devices.clone(), true);
        if let Some(expires_us) = self.expires_us {
            inbox.expires_us = expires_us;
        }
        if !self.settles() {
            return;
        }
        if self.empties(inbox) {
            (inbox.held_bytes, inbox.expires_us) = (0, 0);
        } else {
            inbox.held_bytes = inbox.held_bytes.saturating_sub(self.bytes);
        }
        if self.count() > 0 {
            inbox.drop_collapse_keys();
        }
        inbox.settles += 1;
        inbox.terminal += self.count() as u64;
        inbox.receipts += self.count();
        let leaves = |seq: &u64| {
            self.fresh.binary_search(seq).is_ok()
                || self.expired.binary_search(seq).is_ok()
                || self.dead.contains(seq)
        };
        inbox.open.retain(|open| !leaves(&open.seq));
    }
}
