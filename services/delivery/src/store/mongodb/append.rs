//! Appending: one write for all messages of a user that wait together. Its condition is the head from which the
//! seqs count on, so that no two writes give out the same seq, whoever makes them.
//!
//! A write that replaces messages, or lets the oldest die for room, does so in the same step. It holds the count of what
//! settles as well as the head, so that it does to the inbox what it was planned for, or nothing.

mod model;
mod room;

use std::collections::{HashMap, VecDeque};

use room::{Draft, Ending, Fit};

use super::{
    database::Database,
    documents::{self, CollapseDoc, KeyDoc, ReceiptDoc, WriterDoc, binary, id},
    inbox::{Inbox, Open},
    plan::{Attempt, Kind, Rules, Step},
    work::{Append, Queued, Work},
};
use crate::{
    message::State,
    store::{AppendError, Appended, CommitSink, DEDUPE_WINDOW, DeadReason, StoreError},
};

/// Most messages of one write.
const MAX_RUN: usize = 64;

/// Most bytes of payload in one write, unless its first message alone is larger.
const MAX_RUN_BYTES: usize = 256 * 1024;

/// The dedupe keys that were looked for beside inboxes in this round, by their `_id`.
pub(super) type KeysBeside = HashMap<String, Option<KeyDoc>>;

/// Digests of a message's dedupe key and of its payload.
pub(super) type Key = (Vec<u8>, Vec<u8>);

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

/// Whether the use of a key still holds for a message that is accepted at this time.
pub(super) fn holds(key: &KeyDoc, time_us: u64) -> bool {
    key.t.cast_unsigned().saturating_add(DEDUPE_WINDOW.as_micros() as u64) >= time_us
}

fn verdict(append: &Append, user: &str, inbox: &Inbox, beside: &KeysBeside) -> Verdict {
    let Some((digest, sha256)) = &append.key else { return Verdict::New };
    let holds = |key: &&KeyDoc| holds(key, append.message.time_us);
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

/// A write of messages at the front of the queue.
pub(super) struct Run {
    pub(super) first: u64,
    pub(super) count: usize,
    /// What it holds of the inbox beside the head: how often something had been settled, when it ends messages itself,
    /// and how often something had been scheduled, when it has dedupe keys.
    settles: Option<i64>,
    plans: Option<i64>,
    /// Bytes that count for the quota after it.
    held_bytes: i64,
    collapse: Vec<CollapseDoc>,
    ending: Option<Box<Ending>>,
    /// What the inbox holds after it, messages and bytes, when that makes it one that is filling and somebody wants to hear
    /// of it.
    filling: Option<(u64, u64)>,
    /// Seqs of members' messages for which there is no room: they die in it.
    refused: Vec<u64>,
}

impl Run {
    /// Whether the write can still be done; each of the numbers only rises.
    pub(super) fn may_match(&self, inbox: &Inbox) -> bool {
        inbox.head + 1 == self.first
            && self.settles.is_none_or(|settles| settles == inbox.settles)
            && self.plans.is_none_or(|plans| plans == inbox.plans)
    }
}

/// Answers what needs no write, and makes the write for what follows at the front of the queue. While acks wait, only the
/// first message, which came before them, ends others.
pub(super) fn plan(
    rules: &Rules<'_>,
    user: &str,
    queue: &mut VecDeque<Queued>,
    acks_wait: bool,
    inbox: &Inbox,
    beside: &KeysBeside,
) -> Step {
    let (mut count, mut bytes, mut keys) = (0, 0, Vec::new());
    let mut draft = Draft::new(inbox, acks_wait);
    let was_filling = draft.is_filling(rules);
    while let Some(Queued { work: Work::Append(append), .. }) = queue.get(count) {
        let answer = match verdict(append, user, inbox, beside) {
            Verdict::NotLooked => break,
            Verdict::Answer(answer) => answer,
            Verdict::New => {
                let size = append.own_bytes();
                let repeated = append.key.as_ref().is_some_and(|(digest, _)| keys.contains(digest));
                if count == MAX_RUN || (count > 0 && bytes + size > MAX_RUN_BYTES) || repeated {
                    break;
                }
                match draft.put(rules, append, inbox.head + count as u64 + 1) {
                    Fit::In => {
                        keys.extend(append.key.as_ref().map(|(digest, _)| digest.clone()));
                        (count, bytes) = (count + 1, bytes + size);
                        continue;
                    }
                    Fit::Refused(error) => Err(error),
                    _ if count > 0 => break,
                    // Others may have acked since the inbox was read.
                    Fit::Read => return Step::Read,
                    Fit::Beside(from, to) => return Step::Beside(from, to),
                    Fit::Later => return Step::Fail(1, damaged(user)),
                }
            }
        };
        if count > 0 {
            break;
        }
        if let Some(Queued { work: Work::Append(append), .. }) = queue.pop_front() {
            append.answer(answer);
        }
    }
    if count == 0 {
        return Step::Again;
    }
    let run = Run {
        first: inbox.head + 1,
        count,
        settles: draft.ending.is_some().then_some(inbox.settles),
        plans: (!keys.is_empty()).then_some(inbox.plans),
        held_bytes: draft.held_bytes,
        filling: draft.filling().filter(|_| rules.watched && !was_filling && draft.is_filling(rules)),
        collapse: draft.collapse,
        ending: draft.ending,
        refused: draft.refused,
    };
    let appends = queue.iter().take(count).filter_map(|queued| match &queued.work {
        Work::Append(append) => Some(append),
        Work::Ack(_) | Work::Arm(_) => None,
    });
    match model::model(rules, user, appends, &run, inbox) {
        Ok((model, until_us)) => Step::Write(Box::new(Attempt {
            batch: rules.batch,
            model,
            until_us,
            bytes,
            kind: Kind::Append(run),
        })),
        Err(error) => Step::Fail(count, error),
    }
}

/// What no write leads to: it holds messages by its counters, and none by what is settled.
fn damaged(user: &str) -> StoreError {
    StoreError::Unavailable(format!("the counters of inbox {user:?} in the database are damaged"))
}

pub(super) fn key_doc(append: &Append, seq: u64) -> Option<KeyDoc> {
    let (digest, sha256) = append.key.as_ref()?;
    Some(KeyDoc {
        k: binary(digest.clone()),
        h: binary(sha256.clone()),
        n: seq.cast_signed(),
        i: id(append.message.message_id),
        t: append.message.time_us.cast_signed(),
    })
}

/// Takes over a write that is durable: what is known of the inbox, the sink, the answers. Returns what is to be done next
/// for the inbox.
pub(super) fn committed(
    database: &Database,
    sink: &dyn CommitSink,
    user: &str,
    queue: &mut VecDeque<Queued>,
    inbox: &mut Inbox,
    batch: i64,
    run: Run,
) -> Option<Queued> {
    let mut next = None;
    // After a fresh look it is all there already.
    let known = inbox.head >= run.first;
    for seq in run.first..run.first + run.count as u64 {
        let Some(Queued { work: Work::Append(append), .. }) = queue.pop_front() else { return next };
        if !known {
            let open = Open::appended(&append.message, seq);
            if open.expires_us != 0 {
                let earliest = Some(inbox.expires_us).filter(|us| *us != 0);
                inbox.expires_us = earliest.map_or(open.expires_us, |us| us.min(open.expires_us));
            }
            inbox.open.push(open);
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
        if !run.refused.contains(&seq) {
            sink.committed(&append.message, &appended);
        }
        append.answer(Ok(appended));
    }
    if !known {
        inbox.held_bytes = run.held_bytes;
        inbox.collapse.extend(run.collapse);
    }
    if let Some((messages, bytes)) = run.filling {
        sink.filling(user, messages, bytes);
    }
    if let Some(ending) = run.ending {
        for open in ending.superseded.iter().filter_map(|(_, open)| open.as_ref()) {
            sink.ended(user, &open.settled(), State::Superseded);
            if sink.watches()
                && let Ok(receipt) =
                    ReceiptDoc::new(open, State::Superseded, database.clock.now_us()).logged(user)
            {
                sink.settled(&receipt);
            }
            sink.gone(user, inbox.epoch, &[open.seq]);
        }
        if ending.killed > 0 {
            sink.died(DeadReason::QueueFull, ending.killed);
            // Their dead letters follow at once.
            next = Some(Queued::finishing(user, inbox.epoch));
        }
        if !known {
            ending.apply(inbox);
        }
    }
    let writer = WriterDoc { b: batch, t: i64::MAX };
    inbox.writers.insert(database.node.to_string(), writer);
    next
}
