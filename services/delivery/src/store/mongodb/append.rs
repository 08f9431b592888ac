//! Appending: one write for all messages of a user that wait together. Its condition is the head from which the
//! seqs count on, so that no two writes give out the same seq, whoever makes them.

use std::collections::{HashMap, VecDeque};

use mongodb::bson::{Bson, Document, doc};

use super::{
    database::Database,
    documents::{self, KeyDoc, MessageDoc, WriterDoc, binary, bson, id},
    inbox::{Inbox, Open},
    plan::{Attempt, Kind, Rules, Step},
    work::{Append, Queued, Work},
};
use crate::store::{AppendError, Appended, CommitSink, DEDUPE_WINDOW, FIRST_DUE, StoreError};

/// Most messages of one write.
const MAX_RUN: usize = 64;

/// Most bytes of payload in one write, unless its first message alone is larger.
const MAX_RUN_BYTES: usize = 256 * 1024;

/// Most nodes that are remembered as writers of an inbox before those are forgotten that wrote long ago.
const MAX_WRITERS: usize = 8;

/// Since when a writer has been silent that is forgotten, in microseconds: far longer than it waits for an answer.
const IDLE_WRITER_US: i64 = 3_600 * 1_000_000;

/// The dedupe keys that were looked for beside inboxes in this round, by their `_id`.
pub(super) type KeysBeside = HashMap<String, Option<KeyDoc>>;

/// What a message's dedupe key says about it.
enum Verdict {
    /// It is to be appended.
    New,
    /// It has its answer.
    Answer(Result<Appended, AppendError>),
    /// Its key has not been looked for yet.
    NotLooked,
}

/// The keys of the messages at the front that must be looked for beside the inbox, as `_id`s.
pub(super) fn keys_to_look_for(user: &str, queue: &VecDeque<Queued>, inbox: &Inbox) -> Vec<String> {
    queue
        .iter()
        .take(MAX_RUN)
        .map_while(|queued| match &queued.work {
            Work::Append(append) => Some(append),
            Work::Ack(_) | Work::Arm(_) => None,
        })
        .filter_map(|append| append.key.as_ref())
        .filter(|(digest, _)| !inbox.keys.iter().any(|key| key.k.bytes == *digest))
        .map(|(digest, _)| documents::key_id(user, digest))
        .collect()
}

fn verdict(append: &Append, user: &str, inbox: &Inbox, beside: &KeysBeside) -> Verdict {
    let Some((digest, sha256)) = &append.key else { return Verdict::New };
    let at = append.message.time_us;
    let window = DEDUPE_WINDOW.as_micros() as u64;
    let holds = |key: &&KeyDoc| key.t.cast_unsigned().saturating_add(window) >= at;
    // The newest use of a key comes last.
    let inside = inbox.keys.iter().rev().find(|key| key.k.bytes == *digest);
    let first = match inside {
        Some(key) => Some(key).filter(holds),
        None => match beside.get(&documents::key_id(user, digest)) {
            Some(found) => found.as_ref().filter(holds),
            None => return Verdict::NotLooked,
        },
    };
    let Some(first) = first else { return Verdict::New };
    Verdict::Answer(if first.h.bytes == *sha256 {
        Ok(Appended {
            seq: first.n.cast_unsigned(),
            message_id: uuid::Uuid::from_bytes(first.i.bytes()),
            epoch: inbox.epoch,
            duplicate: true,
            time_us: first.t.cast_unsigned(),
        })
    } else {
        Err(AppendError::AlreadyExists { key: append.message.dedupe_key.clone() })
    })
}

/// Answers what needs no write, and makes the write for what follows at the front of the queue.
pub(super) fn plan(
    rules: &Rules<'_>,
    user: &str,
    queue: &mut VecDeque<Queued>,
    inbox: &Inbox,
    beside: &KeysBeside,
) -> Step {
    let (mut count, mut bytes, mut keys) = (0, 0, Vec::new());
    while let Some(Queued { work: Work::Append(append), .. }) = queue.get(count) {
        let unsettled = inbox.unsettled() + count as u64;
        let answer = match verdict(append, user, inbox, beside) {
            Verdict::NotLooked => break,
            Verdict::Answer(answer) => Some(answer),
            Verdict::New if unsettled < rules.max_unsettled => None,
            // Others may have acked since the inbox was read.
            Verdict::New if !inbox.fresh => {
                if count == 0 {
                    return Step::Read;
                }
                break;
            }
            Verdict::New => Some(Err(AppendError::QueueFull { unsettled })),
        };
        if let Some(answer) = answer {
            if count > 0 {
                break;
            }
            if let Some(Queued { work: Work::Append(append), .. }) = queue.pop_front() {
                append.answer(answer);
            }
            continue;
        }
        let size = prost::Message::encoded_len(&*append.message.payload);
        let repeated = append.key.as_ref().is_some_and(|(digest, _)| keys.contains(digest));
        if count == MAX_RUN || (count > 0 && bytes + size > MAX_RUN_BYTES) || repeated {
            break;
        }
        keys.extend(append.key.as_ref().map(|(digest, _)| digest.clone()));
        (count, bytes) = (count + 1, bytes + size);
    }
    if count == 0 {
        return Step::Again;
    }
    let appends = queue.iter().take(count).filter_map(|queued| match &queued.work {
        Work::Append(append) => Some(append),
        Work::Ack(_) | Work::Arm(_) => None,
    });
    match model(rules, user, appends, count, inbox) {
        Ok(model) => {
            let (batch, first) = (rules.batch, inbox.head + 1);
            Step::Write(Box::new(Attempt { batch, model, bytes, kind: Kind::Append { first, count } }))
        }
        Err(error) => Step::Fail(count, error),
    }
}

fn model<'a>(
    rules: &Rules<'_>,
    user: &str,
    appends: impl Iterator<Item = &'a Append>,
    count: usize,
    inbox: &Inbox,
) -> Result<mongodb::options::WriteModel, StoreError> {
    let (mut messages, mut keys) = (Vec::with_capacity(count), Vec::new());
    for (append, seq) in appends.zip(inbox.head + 1..) {
        messages.push(bson(&MessageDoc::new(&append.message, seq))?);
        if let Some(key) = key_doc(append, seq) {
            keys.push(bson(&key)?);
        }
    }
    let Rules { database, now_us, batch, .. } = *rules;
    let (head, count) = (inbox.head.cast_signed(), count as i64);
    let writer = WriterDoc { b: batch, t: now_us.cast_signed() };
    let mut push = doc! { "messages": { "$each": messages } };
    if !keys.is_empty() {
        push.insert("keys", doc! { "$each": keys });
    }
    let mut update = doc! {
        "$set": { "seq": head + count, "attempt": 0_i64, format!("writers.{}", database.node): bson(&writer)? },
        "$inc": { "armed": 1_i64 },
        "$min": { "due": (now_us + FIRST_DUE.as_micros() as u64).cast_signed() },
        "$push": push,
    };
    if !inbox.exists {
        update.insert("$setOnInsert", new_inbox(user, inbox));
    }
    let idle = idle_writers(rules, inbox);
    if !idle.is_empty() {
        update.insert("$unset", idle);
    }
    let filter = doc! { "_id": user, "seq": head };
    Ok(database.update(filter, update, !inbox.exists))
}

fn key_doc(append: &Append, seq: u64) -> Option<KeyDoc> {
    let (digest, sha256) = append.key.as_ref()?;
    Some(KeyDoc {
        k: binary(digest.clone()),
        h: binary(sha256.clone()),
        n: seq.cast_signed(),
        i: id(append.message.message_id),
        t: append.message.time_us.cast_signed(),
    })
}

/// What an inbox has from its first message on, beside what the write gives it anyway.
fn new_inbox(user: &str, inbox: &Inbox) -> Document {
    doc! {
        "h": documents::user_hash(user), "epoch": inbox.epoch.cast_signed(),
        "mark": 0_i64, "settles": 0_i64, "written": 0_i64,
    }
}

fn idle_writers(rules: &Rules<'_>, inbox: &Inbox) -> Document {
    if inbox.writers.len() <= MAX_WRITERS {
        return Document::new();
    }
    let idle = |writer: &WriterDoc| writer.t < rules.now_us.cast_signed() - IDLE_WRITER_US;
    let others = inbox.writers.iter().filter(|(node, writer)| **node != *rules.database.node && idle(writer));
    others.map(|(node, _)| (format!("writers.{node}"), Bson::from(""))).collect()
}

/// Takes over a write that is durable: what is known of the inbox, the sink, the answers.
pub(super) fn committed(
    database: &Database,
    sink: &dyn CommitSink,
    queue: &mut VecDeque<Queued>,
    inbox: &mut Inbox,
    attempt: &Attempt,
    first: u64,
    count: usize,
) {
    // After a fresh look it is all there already.
    let known = inbox.head >= first;
    for seq in first..first + count as u64 {
        let Some(Queued { work: Work::Append(append), .. }) = queue.pop_front() else { return };
        if !known {
            inbox.open.push(Open {
                seq,
                id: id(append.message.message_id),
                time_us: append.message.time_us,
                trace: append.message.trace.clone(),
                bytes: prost::Message::encoded_len(&*append.message.payload),
            });
            inbox.keys.extend(key_doc(&append, seq));
            (inbox.head, inbox.exists) = (seq, true);
        }
        let appended = Appended {
            seq,
            message_id: append.message.message_id,
            epoch: inbox.epoch,
            duplicate: false,
            time_us: append.message.time_us,
        };
        sink.committed(&append.message, &appended);
        append.answer(Ok(appended));
    }
    let writer = WriterDoc { b: attempt.batch, t: i64::MAX };
    inbox.writers.insert(database.node.to_string(), writer);
}
