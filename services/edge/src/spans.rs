//! The spans of an edge. `docs/tracing.md` lists them with those of the other roles.
//!
//! A message whose trace is not recorded costs a look at two characters of it, once for the edge: never one for each
//! socket. No user's name is in any span.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use sanjay_proto::client::v1::{InboxMessage, Publication};
use sanjay_runtime::trace::{
    Value, carry, count, describe, fail, is_sampled, messaging, set_parent, traceparent,
};
use tracing::{Span, info_span};
use uuid::Uuid;

use crate::connection::Wrote;

const INBOX: &str = "inbox/{user}";
const CHANNEL: &str = "channel/{channel}";

/// A client's publish, the first span of its trace. Returns the `traceparent` under which it goes on.
pub fn publish(message_id: Uuid, channel: &str) -> String {
    let span = info_span!(parent: None, "publish", otel.kind = "producer");
    let trace = traceparent(&span);
    if is_sampled(&trace) {
        messaging(&span, "publish", "send", CHANNEL);
        describe(
            &span,
            [
                ("messaging.message.id", message_id.to_string().into()),
                ("messaging.destination.name", channel.to_owned().into()),
            ],
        );
    }
    trace
}

/// The push of one channel message to all sockets of this edge. It lasts until the last shard has written it.
#[derive(Debug)]
pub struct ChannelPush {
    span: Span,
    sockets: AtomicUsize,
}

impl ChannelPush {
    /// A publication that arrived from the router: clients are to see it under the new span. `None` when its trace is
    /// not recorded.
    pub fn begin(publication: &mut Publication) -> Option<Arc<Self>> {
        if !is_sampled(&publication.trace) {
            return None;
        }
        let span = info_span!(parent: None, "push", otel.kind = "consumer");
        set_parent(&span, &publication.trace);
        messaging(&span, "push", "process", CHANNEL);
        describe(
            &span,
            [
                ("messaging.message.id", id(&publication.message_id)),
                ("messaging.destination.name", publication.channel.clone().into()),
            ],
        );
        carry(&span, &mut publication.trace);
        Some(Arc::new(Self { span, sockets: AtomicUsize::new(0) }))
    }

    /// A shard has written it to so many sockets.
    pub fn wrote(&self, sockets: usize) {
        self.sockets.fetch_add(sockets, Ordering::Relaxed);
    }
}

impl Drop for ChannelPush {
    fn drop(&mut self) {
        describe(&self.span, [("sanjay.sockets", count(*self.sockets.get_mut()))]);
    }
}

/// Where a pushed inbox message came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The router hinted it.
    Hint,
    /// It was read from the inbox.
    Read,
}

/// The push of an inbox message to one connection: the client is to see it under the new span. `None` when its trace
/// is not recorded.
pub fn push(message: &mut InboxMessage, from: Origin) -> Option<Span> {
    if !is_sampled(&message.trace) {
        return None;
    }
    let span = info_span!(parent: None, "push", otel.kind = "consumer");
    set_parent(&span, &message.trace);
    messaging(&span, "push", "process", INBOX);
    let from = match from {
        Origin::Hint => "hint",
        Origin::Read => "read",
    };
    describe(&span, [("messaging.message.id", id(&message.message_id)), ("sanjay.push.from", from.into())]);
    if message.delivery > 1 {
        describe(&span, [("sanjay.delivery", count(message.delivery as usize))]);
    }
    carry(&span, &mut message.trace);
    Some(span)
}

/// Says of pushes what became of the write that they were in, and ends them.
pub fn pushed(pushes: &mut Vec<Span>, wrote: Wrote) {
    for span in pushes.drain(..) {
        match wrote {
            Wrote::All => {}
            Wrote::Waits => describe(&span, [("sanjay.push.waits", true.into())]),
            Wrote::Gone => fail(&span, "gone"),
        }
    }
}

fn id(message_id: &[u8]) -> Value {
    Uuid::from_slice(message_id).unwrap_or_default().to_string().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_recorded_gets_no_span_and_travels_on_as_it_is() {
        for trace in ["", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00"] {
            let mut publication = Publication { trace: trace.to_owned(), ..Publication::default() };
            assert!(ChannelPush::begin(&mut publication).is_none());
            let mut message = InboxMessage { trace: trace.to_owned(), ..InboxMessage::default() };
            assert!(push(&mut message, Origin::Hint).is_none());
            assert_eq!((publication.trace.as_str(), message.trace.as_str()), (trace, trace));
        }
    }
}
