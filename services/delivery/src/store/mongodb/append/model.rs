//! The write of a run: what it asks of the inbox, and what it changes.

use mongodb::{
    bson::{Binary, Bson, Document, doc},
    options::WriteModel,
};

use super::{
    super::{
        documents::{self, MessageDoc, ReceiptDoc, WriterDoc, binary, bson, id},
        inbox::Inbox,
        plan::Rules,
        receipts::in_time,
        work::Append,
    },
    Run, key_doc,
    room::Ending,
};
use crate::{
    message::State,
    store::{FIRST_DUE, StoreError, due},
};

/// Most nodes that are remembered as writers of an inbox before those are forgotten that wrote long ago.
const MAX_WRITERS: usize = 8;

/// Since when a writer has been silent that is forgotten, in microseconds: far longer than it waits for an answer.
const IDLE_WRITER_US: i64 = 3_600 * 1_000_000;

/// What a run puts into the document.
struct Parts {
    messages: Vec<Bson>,
    keys: Vec<Bson>,
    collapse: Vec<Bson>,
    /// Publications whose payloads they share.
    shared: Vec<Bson>,
    /// When the first of its messages expires.
    expires: Option<i64>,
    writer: Bson,
    /// How many bytes come to what counts for the quota.
    bytes: i64,
    due: i64,
}

pub(super) fn model<'a>(
    rules: &Rules<'_>,
    user: &str,
    appends: impl Iterator<Item = &'a Append>,
    run: &Run,
    inbox: &Inbox,
) -> Result<(WriteModel, Option<u64>), StoreError> {
    let parts = parts(rules, appends, run, inbox)?;
    let mut filter = doc! { "_id": user, "seq": inbox.head.cast_signed() };
    if let Some(plans) = run.plans {
        filter.insert("plans", documents::counted(plans));
    }
    if let Some(settles) = run.settles {
        filter.insert("settles", settles);
    }
    match &run.ending {
        Some(ending) if !ending.superseded.is_empty() => {
            let update = replacing(rules, parts, run, ending, inbox)?;
            let until_us = in_time(rules, &mut filter);
            Ok((rules.database.update(filter, update, false), until_us))
        }
        ending => {
            let update = adding(rules, user, parts, run, ending.as_deref(), inbox);
            Ok((rules.database.update(filter, update, !inbox.exists), None))
        }
    }
}

fn parts<'a>(
    rules: &Rules<'_>,
    appends: impl Iterator<Item = &'a Append>,
    run: &Run,
    inbox: &Inbox,
) -> Result<Parts, StoreError> {
    let (mut messages, mut keys, mut expires_us) = (Vec::with_capacity(run.count), Vec::new(), None);
    let mut shared = Vec::new();
    for (append, seq) in appends.zip(run.first..) {
        messages.push(bson(&MessageDoc::new(&append.message, seq))?);
        shared.extend(append.message.shared.map(|publication| Bson::from(id(publication))));
        if let Some(key) = key_doc(append, seq) {
            keys.push(bson(&key)?);
        }
        expires_us = due::earliest(expires_us, Some(append.message.expires_us).filter(|us| *us != 0));
    }
    Ok(Parts {
        messages,
        keys,
        collapse: run.collapse.iter().map(bson).collect::<Result<_, _>>()?,
        shared,
        expires: expires_us.map(|us| i64::try_from(us).unwrap_or(i64::MAX)),
        writer: bson(&WriterDoc { b: rules.batch, t: rules.now_us.cast_signed() })?,
        bytes: run.held_bytes.saturating_sub(inbox.held_bytes),
        due: (rules.now_us + FIRST_DUE.as_micros() as u64).cast_signed(),
    })
}

/// The update that settles nothing.
fn adding(
    rules: &Rules<'_>,
    user: &str,
    parts: Parts,
    run: &Run,
    ending: Option<&Ending>,
    inbox: &Inbox,
) -> Document {
    let seq = inbox.head.cast_signed() + run.count as i64;
    let node = &rules.database.node;
    let mut set = doc! { "seq": seq, "attempt": 0_i64, format!("writers.{node}"): parts.writer };
    let mut increments = doc! { "armed": 1_i64, "bytes": parts.bytes };
    let mut least = doc! { "due": parts.due };
    let mut push = doc! { "messages": { "$each": parts.messages } };
    for (name, items) in [("keys", parts.keys), ("collapse", parts.collapse), ("shared", parts.shared)] {
        if !items.is_empty() {
            push.insert(name, doc! { "$each": items });
        }
    }
    if let Some(expires) = parts.expires {
        least.insert("expires", expires);
    }
    if let Some(ending) = ending {
        set.insert("attempts", attempts(ending));
        increments.insert("settles", 1_i64);
    }
    let mut update = doc! { "$set": set, "$inc": increments, "$min": least, "$push": push };
    if !inbox.exists {
        let mut new = documents::new_inbox(user, inbox.epoch);
        if ending.is_some() {
            // It counts itself.
            new.remove("settles");
        }
        update.insert("$setOnInsert", new);
    }
    let idle = idle_writers(rules, inbox);
    if !idle.is_empty() {
        let fields = idle.into_iter().map(|field| (field, Bson::from("")));
        update.insert("$unset", fields.collect::<Document>());
    }
    update
}

/// The update that settles what the run replaces. As it takes from the arrays to which it adds, it is a pipeline.
fn replacing(
    rules: &Rules<'_>,
    parts: Parts,
    run: &Run,
    ending: &Ending,
    inbox: &Inbox,
) -> Result<Vec<Document>, StoreError> {
    let literal = |value: Bson| doc! { "$literal": value };
    let add = |name: &str, n: i64| doc! { "$add": [{ "$ifNull": [format!("${name}"), 0_i64] }, n] };
    let append = |name: &str, items: Vec<Bson>| {
        doc! { "$concatArrays": [{ "$ifNull": [format!("${name}"), []] }, literal(items.into())] }
    };
    let replaced: Vec<i64> = ending.superseded.iter().map(|(seq, _)| seq.cast_signed()).collect();
    let stay = doc! { "$not": [{ "$in": ["$$message.n", &replaced] }] };
    let others = doc! { "$filter": { "input": "$messages", "as": "message", "cond": stay } };
    // The condition of the write holds both numbers by which this list changes.
    let mut collapse = Vec::new();
    for entry in inbox.collapse.iter().filter(|entry| !ending.settled.holds(entry.n.cast_unsigned())) {
        collapse.push(bson(entry)?);
    }
    collapse.extend(parts.collapse);
    let receipts = receipts(rules, ending);
    let log = receipts.iter().map(|receipt| receipt.entry().into()).collect();
    let receipts = receipts.iter().map(bson).collect::<Result<_, _>>()?;
    let mut set = doc! {
        "seq": inbox.head.cast_signed() + run.count as i64,
        "attempt": 0_i64,
        format!("writers.{}", rules.database.node): literal(parts.writer),
        "armed": add("armed", 1),
        "bytes": add("bytes", parts.bytes),
        "due": { "$min": ["$due", parts.due] },
        "messages": { "$concatArrays": [others, literal(parts.messages.into())] },
        "collapse": literal(collapse.into()),
        "settles": inbox.settles + 1,
        "mark": ending.settled.mark().cast_signed(),
        "settled": literal(documents::ranges(&ending.settled).into()),
        "receipts": append("receipts", receipts),
        "log": append("log", log),
        "superseded": add("superseded", replaced.len() as i64),
    };
    if !parts.keys.is_empty() {
        set.insert("keys", append("keys", parts.keys));
    }
    if let Some(expires) = parts.expires {
        set.insert("expires", doc! { "$min": ["$expires", expires] });
    }
    let gone: Vec<Bson> =
        ending.superseded.iter().filter_map(|(_, open)| open.as_ref()?.shared).map(Bson::from).collect();
    if !gone.is_empty() || !parts.shared.is_empty() {
        let stay = doc! { "$not": [{ "$in": ["$$shared", literal(gone.into())] }] };
        let before = doc! { "$ifNull": ["$shared", []] };
        let others = doc! { "$filter": { "input": before, "as": "shared", "cond": stay } };
        set.insert("shared", doc! { "$concatArrays": [others, literal(parts.shared.into())] });
    }
    let mut unset = idle_writers(rules, inbox);
    if ending.attempts.is_empty() {
        unset.push("attempts".to_owned());
    } else {
        set.insert("attempts", literal(attempts(ending).into()));
    }
    let mut update = vec![doc! { "$set": set }];
    if !unset.is_empty() {
        update.push(doc! { "$unset": unset });
    }
    Ok(update)
}

fn attempts(ending: &Ending) -> Binary {
    binary(ending.attempts.encode())
}

fn receipts(rules: &Rules<'_>, ending: &Ending) -> Vec<ReceiptDoc> {
    let known = ending.superseded.iter().filter_map(|(_, open)| open.as_ref());
    known.map(|open| ReceiptDoc::new(open, State::Superseded, rules.now_us)).collect()
}

/// The fields of writers that wrote long ago, when there are many.
fn idle_writers(rules: &Rules<'_>, inbox: &Inbox) -> Vec<String> {
    if inbox.writers.len() <= MAX_WRITERS {
        return Vec::new();
    }
    let idle = |writer: &WriterDoc| writer.t < rules.now_us.cast_signed() - IDLE_WRITER_US;
    let others = inbox.writers.iter().filter(|(node, writer)| **node != *rules.database.node && idle(writer));
    others.map(|(node, _)| format!("writers.{node}")).collect()
}
