//! The write of a plan: what it asks of the inbox, and what it changes.

use mongodb::{
    bson::{Bson, Document, doc},
    options::WriteModel,
};

use super::{
    super::{
        documents::{self, ReceiptDoc, SettlerDoc, binary, bson},
        inbox::{Inbox, Open},
        plan::Rules,
        rearm::{unless_attempts_changed, update_of_fields},
    },
    Plan,
};
use crate::{message::State, store::StoreError};

pub(super) fn model(
    rules: &Rules<'_>,
    user: &str,
    plan: &Plan,
    inbox: &Inbox,
) -> Result<WriteModel, StoreError> {
    let mut filter = doc! { "_id": user, "epoch": inbox.epoch.cast_signed() };
    let mut update = doc! { "$max": { "written": plan.written.cast_signed() } };
    let (mut set, mut unset) = (Document::new(), Document::new());
    if plan.settles() {
        filter.insert("settles", inbox.settles);
        let settler = SettlerDoc { w: rules.database.node.to_string(), b: rules.batch };
        set.insert("settler", bson(&settler)?);
        update.insert("$inc", counters(plan));
    }
    if plan.count() > 0 {
        set.insert("mark", plan.settled.mark().cast_signed());
        set.insert("settled", documents::ranges(&plan.settled));
        update.insert("$push", doc! { "receipts": { "$each": receipts(rules, plan, inbox)? } });
        if let Some(pull) = pull(plan, inbox) {
            update.insert("$pull", doc! { "messages": { "n": pull } });
        }
    }
    match plan.attempts.is_empty() {
        _ if !plan.noted => {}
        true => drop(unset.insert("attempts", "")),
        false => drop(set.insert("attempts", binary(plan.attempts.encode()))),
    }
    due(plan, inbox, &mut filter, &mut set, &mut unset, &mut update);
    update.extend(update_of_fields(set, unset));
    Ok(rules.database.update(filter, update, false))
}

/// When the inbox is due after this.
fn due(
    plan: &Plan,
    inbox: &Inbox,
    filter: &mut Document,
    set: &mut Document,
    unset: &mut Document,
    update: &mut Document,
) {
    let next = plan.attempts.next_due_us().map(u64::cast_signed);
    if plan.fails {
        set.insert("attempt", 0_i64);
    }
    if plan.written.max(plan.settled.mark()) < inbox.head {
        // Something waits to be written; what is due by the attempts is due no later.
        if let Some(next) = next.filter(|_| plan.noted) {
            update.insert("$min", doc! { "due": next });
        }
        return;
    }
    // Nothing waits to be written, unless something was appended or failed meanwhile.
    filter.insert("seq", inbox.head.cast_signed());
    unless_attempts_changed(&inbox.attempts, inbox.settles, filter);
    match next {
        Some(next) => drop(set.insert("due", next)),
        None => {
            set.insert("attempt", 0_i64);
            unset.insert("due", "");
        }
    }
}

fn counters(plan: &Plan) -> Document {
    let mut counters = doc! { "settles": 1_i64 };
    for (name, seqs) in [("acked", &plan.fresh), ("dead", &plan.dead)] {
        if !seqs.is_empty() {
            counters.insert(name, seqs.len() as i64);
        }
    }
    counters
}

/// Which bodies leave the document.
fn pull(plan: &Plan, inbox: &Inbox) -> Option<Bson> {
    let inside = |seq: &u64| inbox.open.binary_search_by_key(seq, |open| open.seq).is_ok();
    let seqs: Vec<i64> = plan.leaving().filter(inside).map(u64::cast_signed).collect();
    let mark = plan.settled.mark().cast_signed();
    match seqs.iter().max() {
        None => None,
        Some(last) if *last <= mark => Some(doc! { "$lte": mark }.into()),
        Some(_) => Some(doc! { "$in": seqs }.into()),
    }
}

fn receipts(rules: &Rules<'_>, plan: &Plan, inbox: &Inbox) -> Result<Vec<Bson>, StoreError> {
    let receipt = |open: &Open, state: State| ReceiptDoc {
        i: open.id,
        n: open.seq.cast_signed(),
        s: state.number(),
        a: open.time_us.cast_signed(),
        t: rules.now_us.cast_signed(),
    };
    let acked = plan.fresh.iter().map(|seq| (seq, State::Acked));
    let dead = plan.dead.iter().map(|seq| (seq, State::Dead));
    let known = acked.chain(dead).filter_map(|(seq, state)| Some(receipt(inbox.message(*seq)?, state)));
    known.map(|receipt| bson(&receipt)).collect()
}
