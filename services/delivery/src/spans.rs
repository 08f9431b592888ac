//! The spans of a delivery node. `docs/tracing.md` lists them with those of the other roles.
//!
//! User names are in none of them: a message is found by its id.

use std::time::Duration;

use sanjay_runtime::trace::{
    carry, count, describe, event, fail, is_same_trace, is_sampled, is_unsampled, link, messaging,
    set_parent, traceparent, under_way,
};
use tracing::{Span, info_span};
use uuid::Uuid;

use crate::store::{DeadLetter, NewMessage, SettledMessage};

/// Most links of one span; what OpenTelemetry keeps of them.
const MAX_LINKS: usize = 128;

const INBOX: &str = "inbox/{user}";
const CHANNEL: &str = "channel/{channel}";

/// A back end's send to some users, under the caller's trace when it has one. Of a trace that the caller does not
/// record there is no span.
pub(crate) fn send(parent: &str, ids: &[Uuid]) -> Span {
    if is_unsampled(parent) {
        return Span::none();
    }
    let span = info_span!(parent: None, "send", otel.kind = "producer");
    set_parent(&span, parent);
    if is_sampled(&traceparent(&span)) {
        messaging(&span, "send", "send", INBOX);
        match ids {
            [id] => describe(&span, [("messaging.message.id", id.to_string().into())]),
            _ => describe(&span, [("messaging.batch.message_count", count(ids.len()))]),
        }
    }
    span
}

/// A dead letter that is sent again: a trace of its own, with a link to the one in which it died.
pub(crate) fn redrive(letter: &DeadLetter, message_id: Uuid) -> Span {
    let span = send("", &[message_id]);
    if is_sampled(&traceparent(&span)) {
        link(&span, &letter.trace);
    }
    span
}

/// One message of a send on its way to the disk; the parent of everything that follows.
pub(crate) fn process(trace: &mut String, message_id: Uuid, bytes: usize) -> Span {
    if !is_sampled(trace) {
        return Span::none();
    }
    let span = info_span!(parent: None, "process", otel.kind = "consumer");
    set_parent(&span, trace);
    messaging(&span, "process", "process", INBOX);
    describe(
        &span,
        [
            ("messaging.message.id", message_id.to_string().into()),
            ("messaging.message.body.size", count(bytes)),
        ],
    );
    carry(&span, trace);
    span
}

/// A group commit that holds several recorded messages: a trace of its own with links to them. The store keeps it
/// until the commit is durable.
pub(crate) fn commit<'a>(messages: impl Iterator<Item = &'a NewMessage> + Clone) -> Span {
    let mut recorded =
        messages.clone().map(|message| message.trace.as_str()).filter(|trace| is_sampled(trace));
    let (Some(first), Some(second)) = (recorded.next(), recorded.next()) else { return Span::none() };
    let span = info_span!(parent: None, "commit", otel.kind = "internal");
    for trace in [first, second].into_iter().chain(recorded).take(MAX_LINKS) {
        link(&span, trace);
    }
    messaging(&span, "commit", "process", INBOX);
    describe(&span, [("messaging.batch.message_count", count(messages.count()))]);
    span
}

/// A back end's publish, like [`send`].
pub(crate) fn publish(parent: &str, message_id: Uuid, channel: &str) -> Span {
    if is_unsampled(parent) {
        return Span::none();
    }
    let span = info_span!(parent: None, "publish", otel.kind = "producer");
    set_parent(&span, parent);
    if is_sampled(&traceparent(&span)) {
        messaging(&span, "publish", "send", CHANNEL);
        describe(
            &span,
            [
                ("messaging.message.id", message_id.to_string().into()),
                ("messaging.destination.name", channel.to_owned().into()),
            ],
        );
    }
    span
}

/// Says of a span that its message was refused.
pub(crate) fn refused(span: &Span, code: &'static str) {
    if !span.is_none() {
        fail(span, code);
    }
}

/// The trace that came back with an ack: that of the message with the highest seq in it.
#[derive(Debug, Clone, Default)]
pub(crate) struct AckTrace {
    /// The highest seq of the ack.
    pub(crate) seq: u64,
    /// W3C `traceparent` of the span that pushed it, as the client returned it; or empty.
    pub(crate) trace: String,
}

/// The settled messages of one inbox, once that is durable; storing it took `took`. Each recorded message gets a span
/// in its own trace, below its push when the client said which that was. Several are a batch, which gets a trace of
/// its own and links in both directions.
pub(crate) fn settled(messages: &[SettledMessage], ack: &AckTrace, took: Duration) {
    let mut recorded = messages.iter().filter(|message| is_sampled(&message.trace)).peekable();
    let Some(first) = recorded.next() else { return };
    let batch = recorded.peek().is_some().then(|| batch(messages, took));
    for message in std::iter::once(first).chain(recorded) {
        let returned = message.seq == ack.seq && is_same_trace(&ack.trace, &message.trace);
        let parent = if returned { &ack.trace } else { &message.trace };
        let span = settle(parent, message.message_id, took);
        if let Some(batch) = &batch {
            link(&span, batch);
        }
    }
}

/// The end of one message's way, below `parent`.
fn settle(parent: &str, message_id: Uuid, took: Duration) -> Span {
    let span = info_span!(parent: None, "settle", otel.kind = "consumer");
    set_parent(&span, parent);
    under_way(&span, took);
    messaging(&span, "settle", "settle", INBOX);
    describe(&span, [("messaging.message.id", message_id.to_string().into())]);
    span
}

/// A message that became a dead letter, once that is durable; storing it took `took`. Its failed attempts are events of
/// the span. What a client said is not among them: it may name people.
pub(crate) fn died(letter: &DeadLetter, took: Duration) {
    if !is_sampled(&letter.trace) {
        return;
    }
    let span = settle(&letter.trace, letter.message_id, took);
    for failure in &letter.failures {
        let attributes = [
            ("sanjay.delivery", i64::from(failure.delivery).into()),
            ("sanjay.failure.kind", failure.kind.as_str().into()),
        ];
        event(&span, "delivery failed", failure.time_us, attributes);
    }
    fail(&span, letter.reason.as_str());
}

fn batch(messages: &[SettledMessage], took: Duration) -> String {
    let span = info_span!(parent: None, "settle batch", otel.kind = "consumer");
    under_way(&span, took);
    for message in messages.iter().filter(|message| is_sampled(&message.trace)).take(MAX_LINKS) {
        link(&span, &message.trace);
    }
    messaging(&span, "settle", "settle", INBOX);
    describe(&span, [("messaging.batch.message_count", count(messages.len()))]);
    traceparent(&span)
}
