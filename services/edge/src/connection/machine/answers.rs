//! What a client answers to inbox messages: `ack`, `nak`, `term`, `working`, or nothing in time; and how many it takes.

use sanjay_proto::edge::v1::FailureKind;
use sanjay_protocol::{
    command::{Ack, Credit, Nak, Term, Working},
    event::Settled,
};
use sanjay_runtime::trace::{TRACEPARENT_LEN, is_sampled};

use super::*;
use crate::inbox::Stale;

impl Machine {
    pub(super) fn on_ack(
        &mut self,
        id: Option<u64>,
        ack: Ack,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let Some(epoch) = self.inbox.as_ref().and_then(|cursor| cursor.epoch()) else {
            let why = "nothing to ack: this connection has no inbox (credit 0), or the inbox is away";
            return send(id, Event::Error(ErrorBody::new(ErrorCode::BadRequest, why)), effects);
        };
        let mut ranges = Vec::new();
        let mut forward = Vec::new();
        std::mem::swap(effects, &mut forward);
        self.with_inbox(around, &mut forward, |cursor, steps| ranges = cursor.on_ack(&ack.ranges, steps));
        std::mem::swap(effects, &mut forward);
        if !ranges.is_empty() {
            self.outstanding += 1;
            // A client's text goes no further unless it is what the edge gave it.
            let trace = if is_sampled(&ack.trace) && ack.trace.len() == TRACEPARENT_LEN {
                ack.trace
            } else {
                String::new()
            };
            effects.push(Effect::Ack { id, epoch, ranges, trace });
        } else if id.is_some() {
            let why = "nothing in these ranges was sent on this connection; ack what it was sent";
            send(id, Event::Error(ErrorBody::new(ErrorCode::BadRequest, why)), effects);
        }
        effects.append(&mut forward);
    }

    pub(super) fn on_nak(
        &mut self,
        id: Option<u64>,
        Nak { seq, delivery, delay_ms, reason }: Nak,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let failed = failure(seq, delivery, FailureKind::Nak, delay_ms, reason);
        self.on_failure(id, failed, around, effects);
    }

    pub(super) fn on_term(
        &mut self,
        id: Option<u64>,
        Term { seq, delivery, reason }: Term,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let failed = failure(seq, delivery, FailureKind::Term, 0, reason);
        self.on_failure(id, failed, around, effects);
    }

    fn on_failure(
        &mut self,
        id: Option<u64>,
        failed: FailedAttempt,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let Some(epoch) = self.inbox.as_ref().and_then(|cursor| cursor.epoch()) else {
            return refuse(Some(id), NO_INBOX.to_owned(), effects);
        };
        let (seq, delivery) = (failed.seq, failed.delivery);
        let mut taken = Ok(());
        let mut forward = Vec::new();
        self.with_inbox(around, &mut forward, |cursor, steps| taken = cursor.on_failed(seq, delivery, steps));
        match taken {
            Ok(()) => {
                self.outstanding += 1;
                effects.push(Effect::Fail { id, epoch, failed });
                effects.append(&mut forward);
            }
            Err(stale) => refuse(id.map(Some), explain(stale, seq, delivery), effects),
        }
    }

    pub(super) fn on_working(
        &mut self,
        id: Option<u64>,
        Working { seq, delivery }: Working,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let Some(cursor) = self.inbox.as_deref_mut().filter(|cursor| cursor.epoch().is_some()) else {
            return refuse(Some(id), NO_INBOX.to_owned(), effects);
        };
        match cursor.on_working(seq, delivery, around.ack_due()) {
            Ok(()) => reply(id, Ok(Event::Ok(Empty {})), effects),
            Err(stale) => refuse(id.map(Some), explain(stale, seq, delivery), effects),
        }
    }

    pub(super) fn on_credit(
        &mut self,
        id: Option<u64>,
        credit: Credit,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        if self.inbox.is_none() {
            let why = "this connection takes no part in the inbox: hello said credit 0";
            return send(id, Event::Error(ErrorBody::new(ErrorCode::BadRequest, why)), effects);
        }
        self.with_inbox(around, effects, |cursor, steps| cursor.on_credit(credit.n, steps));
        if id.is_some() {
            send(id, Event::Ok(Empty {}), effects);
        }
    }

    /// Messages were settled elsewhere: the client hears of those that it has and has not answered.
    pub(super) fn on_settled(
        &mut self,
        epoch: u64,
        ranges: &[(u64, u64)],
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let mut told = Vec::new();
        let mut forward = Vec::new();
        self.with_inbox(around, &mut forward, |cursor, steps| told = cursor.on_settled(epoch, ranges, steps));
        if !told.is_empty() {
            let settled = Settled { epoch: format!("{epoch:016x}"), ranges: told };
            send(None, Event::Settled(settled), effects);
        }
        effects.append(&mut forward);
    }

    /// What a client that was alive then should have answered has failed.
    pub(super) fn on_alive(&mut self, now: Tick, around: &dyn Surroundings, effects: &mut Vec<Effect>) {
        let Some(epoch) = self.inbox.as_ref().and_then(|cursor| cursor.epoch()) else { return };
        let mut overdue = Vec::new();
        let mut forward = Vec::new();
        self.with_inbox(around, &mut forward, |cursor, steps| overdue = cursor.on_overdue(now, steps));
        if !overdue.is_empty() {
            let failed = |(seq, delivery)| failure(seq, delivery, FailureKind::Deadline, 0, String::new());
            effects.push(Effect::Overdue { epoch, failed: overdue.into_iter().map(failed).collect() });
        }
        effects.append(&mut forward);
    }
}

const NO_INBOX: &str =
    "there is no delivery to answer: this connection has no inbox (credit 0), or the inbox is away";

/// Answers a command that changes nothing. `None`: who gave no id and is merely late hears nothing of it.
fn refuse(id: Option<Option<u64>>, why: String, effects: &mut Vec<Effect>) {
    if let Some(id) = id {
        send(id, Event::Error(ErrorBody::new(ErrorCode::BadRequest, why)), effects);
    }
}

fn explain(stale: Stale, seq: u64, delivery: u32) -> String {
    match stale {
        Stale::NotSent => {
            format!(
                "seq {seq} was not sent on this connection; give back seq and delivery of a message that was"
            )
        }
        Stale::NotInFlight => format!(
            "seq {seq} is not in flight on this connection: it was acknowledged or settled, or failed and was not sent \
             again here yet"
        ),
        Stale::Failed(newest) if delivery > newest => format!(
            "delivery {delivery} of seq {seq} was not sent on this connection: the newest here, {newest}, failed already"
        ),
        Stale::Failed(failed) => format!(
            "delivery {delivery} of seq {seq} is over: delivery {failed} failed already, by nak, term or the ack \
             deadline; a later one has a higher number"
        ),
        Stale::Other(newest) => {
            format!(
                "delivery {delivery} of seq {seq} is not the one in flight, which is {newest}; give that back"
            )
        }
    }
}

fn failure(seq: u64, delivery: u32, kind: FailureKind, delay_ms: u32, reason: String) -> FailedAttempt {
    FailedAttempt { seq, delivery, kind: kind.into(), delay_ms, reason }
}
