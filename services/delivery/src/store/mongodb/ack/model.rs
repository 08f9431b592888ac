//! The write of a plan: what it asks of the inbox, and what it changes.

use mongodb::{
    bson::{Bson, Document, doc},
    options::WriteModel,
};

use super::{
    super::{
        documents::{self, ReceiptDoc, SettlerDoc, binary, bson},
        inbox::Inbox,
        payloads,
        plan::Rules,
        rearm::{unless_attempts_changed, update_of_fields},
        receipts::in_time,
    },
    Plan,
};
use crate::{message::State, store::StoreError};

pub(super) fn model(
    rules: &Rules<'_>,
    user: &str,
    plan: &mut Plan,
    inbox: &Inbox,
) -> Result<(WriteModel, Option<u64>), StoreError> {
    if !inbox.exists && !plan.devices.is_empty() {
        return Ok((beginning(rules, user, plan, inbox)?, None));
    }
    let receipts = receipts(rules, plan, inbox);
    if rules.watched {
        plan.logged = receipts.iter().map(|receipt| receipt.logged(user)).collect::<Result<_, _>>()?;
    }
    let plan = &*plan;
    let mut until_us = None;
    let mut filter = doc! { "_id": user, "epoch": inbox.epoch.cast_signed() };
    let mut update = doc! { "$max": { "written": plan.written.cast_signed() } };
    let (mut set, mut unset) = (Document::new(), Document::new());
    if plan.settles() {
        filter.insert("settles", inbox.settles);
        let settler = SettlerDoc { w: rules.database.node.to_string(), b: rules.batch };
        set.insert("settler", bson(&settler)?);
        update.insert("$inc", counters(plan, inbox));
    }
    if plan.count() > 0 {
        set.insert("mark", plan.settled.mark().cast_signed());
        set.insert("settled", documents::ranges(&plan.settled));
        let log: Vec<String> = receipts.iter().map(ReceiptDoc::entry).collect();
        let receipts: Vec<Bson> = receipts.iter().map(bson).collect::<Result<_, _>>()?;
        update.insert("$push", doc! { "receipts": { "$each": receipts }, "log": { "$each": log } });
        until_us = in_time(rules, &mut filter);
        let pull = pull(plan, inbox);
        if !pull.is_empty() {
            update.insert("$pull", pull);
        }
    }
    expiry(plan, inbox, &mut filter, &mut set, &mut unset);
    match plan.attempts.is_empty() {
        _ if !plan.noted => {}
        true => drop(unset.insert("attempts", "")),
        false => drop(set.insert("attempts", binary(plan.attempts.encode()))),
    }
    devices(plan, inbox, &mut set, &mut unset);
    due(plan, inbox, &mut filter, &mut set, &mut unset, &mut update);
    update.extend(update_of_fields(set, unset));
    Ok((rules.database.update(filter, update, false), until_us))
}

/// The write that makes an inbox for its first device.
fn beginning(rules: &Rules<'_>, user: &str, plan: &Plan, inbox: &Inbox) -> Result<WriteModel, StoreError> {
    // It matches no inbox that there is.
    let filter = doc! { "_id": user, "epoch": { "$exists": false } };
    let mut new = documents::new_inbox(user, inbox.epoch);
    let settler = SettlerDoc { w: rules.database.node.to_string(), b: rules.batch };
    new.extend(doc! {
        "seq": 0_i64, "armed": 0_i64, "attempt": 0_i64, "settles": inbox.settles + 1, "settler": bson(&settler)?,
    });
    devices(plan, inbox, &mut new, &mut Document::new());
    Ok(rules.database.update(filter, doc! { "$setOnInsert": new }, true))
}

/// Its devices, when they changed.
fn devices(plan: &Plan, inbox: &Inbox, set: &mut Document, unset: &mut Document) {
    if plan.devices == inbox.devices {
        return;
    }
    match plan.devices.longest_unseen_us() {
        Some(seen_us) => {
            set.insert("devices", binary(plan.devices.encode()));
            set.insert("seen", seen_us.cast_signed());
        }
        None => unset.extend(doc! { "devices": "", "seen": "" }),
    }
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
    if inbox.shared {
        // Another node appends meanwhile, as likely as not, and a condition on its numbers would cost a look each time.
        // Due too early, the inbox is put right by its next claim.
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

/// From when on something in the document may have expired. An inbox without unsettled messages begins anew with that
/// and with what is counted of it.
fn expiry(plan: &Plan, inbox: &Inbox, filter: &mut Document, set: &mut Document, unset: &mut Document) {
    let expires_us = if plan.empties(inbox) {
        filter.insert("seq", inbox.head.cast_signed());
        if inbox.held_bytes != 0 {
            set.insert("bytes", 0_i64);
        }
        if !inbox.collapse.is_empty() {
            unset.insert("collapse", "");
        }
        Some(0).filter(|_| inbox.expires_us != 0)
    } else {
        plan.expires_us
    };
    let Some(expires_us) = expires_us else { return };
    // What comes meanwhile may expire earlier.
    filter.insert("seq", inbox.head.cast_signed());
    match expires_us {
        0 => drop(unset.insert("expires", "")),
        us => drop(set.insert("expires", us.cast_signed())),
    }
}

fn counters(plan: &Plan, inbox: &Inbox) -> Document {
    let mut counters = doc! { "settles": 1_i64 };
    for (name, seqs) in [("acked", &plan.fresh), ("expired", &plan.expired), ("dead", &plan.dead)] {
        if !seqs.is_empty() {
            counters.insert(name, seqs.len() as i64);
        }
    }
    if plan.bytes != 0 && !plan.empties(inbox) {
        counters.insert("bytes", -plan.bytes);
    }
    counters
}

/// What leaves the arrays of the document beside receipts and keys.
fn pull(plan: &Plan, inbox: &Inbox) -> Document {
    let mut pull = Document::new();
    if let Some(bodies) = bodies(plan, inbox) {
        pull.insert("messages", doc! { "n": bodies });
    }
    let shared = payloads::ids(plan.leaving().filter_map(|seq| inbox.message(seq)?.shared));
    if !shared.is_empty() {
        pull.insert("shared", doc! { "$in": shared });
    }
    if !inbox.collapse.is_empty() && !plan.empties(inbox) {
        let settled = |seq: &i64| plan.settled.holds(seq.cast_unsigned());
        let seqs: Vec<i64> = inbox.collapse.iter().map(|entry| entry.n).filter(settled).collect();
        if !seqs.is_empty() {
            pull.insert("collapse", doc! { "n": { "$in": seqs } });
        }
    }
    pull
}

/// Which bodies leave the document.
fn bodies(plan: &Plan, inbox: &Inbox) -> Option<Bson> {
    let inside = |seq: &u64| inbox.open.binary_search_by_key(seq, |open| open.seq).is_ok();
    let seqs: Vec<i64> = plan.leaving().filter(inside).map(u64::cast_signed).collect();
    let mark = plan.settled.mark().cast_signed();
    match seqs.iter().max() {
        None => None,
        Some(last) if *last <= mark => Some(doc! { "$lte": mark }.into()),
        Some(_) => Some(doc! { "$in": seqs }.into()),
    }
}

fn receipts<'a>(rules: &Rules<'_>, plan: &'a Plan, inbox: &Inbox) -> Vec<ReceiptDoc> {
    let in_state = |seqs: &'a [u64], state: State| seqs.iter().map(move |seq| (seq, state));
    let ends = in_state(&plan.fresh, State::Acked)
        .chain(in_state(&plan.expired, State::Expired))
        .chain(in_state(&plan.dead, State::Dead));
    let known = ends.filter_map(|(seq, state)| {
        let receipt = ReceiptDoc::new(inbox.message(*seq)?, state, rules.now_us);
        let death = inbox.attempts.death(*seq).filter(|_| state == State::Dead);
        Some(ReceiptDoc { r: death.map(|(reason, _)| reason.number()), ..receipt })
    });
    known.collect()
}
