//! The spans of a router. `docs/tracing.md` lists them with those of the other roles.
//!
//! A message whose trace is not recorded costs a look at two characters of it. No user's name is in any span.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use sanjay_proto::{client::v1::Publication, edge::v1::InboxHint, router::v1::NewPublication};
use sanjay_runtime::trace::{
    Value, carry, count, describe, fail, is_sampled, link, messaging, set_parent, under_way,
};
use tracing::{Span, info_span};
use uuid::Uuid;

use crate::{errors::Coded as _, publish::PublishError, registry::Assigned};

/// Of how many relayed messages the first `relay` span is remembered, for links of later ones.
const MAX_FIRST: usize = 4_096;

const INBOX: &str = "inbox/{user}";
const CHANNEL: &str = "channel/{channel}";

/// A publication that gets its offset: continues its trace, and has what follows continue under the new span, which
/// lasts until the registry has answered.
pub(crate) fn publish(new: &mut NewPublication) -> Span {
    if !is_sampled(&new.trace) {
        return Span::none();
    }
    let span = info_span!(parent: None, "publish", otel.kind = "consumer");
    set_parent(&span, &new.trace);
    messaging(&span, "publish", "process", CHANNEL);
    describe(
        &span,
        [
            ("messaging.message.id", id(&new.message_id)),
            ("messaging.destination.name", new.channel.clone().into()),
        ],
    );
    carry(&span, &mut new.trace);
    span
}

/// Says of a publication's span where the publication stands, or why it has no place.
pub(crate) fn assigned(span: &Span, answer: Result<&Option<Assigned>, &PublishError>) {
    if span.is_none() {
        return;
    }
    match answer {
        Ok(Some(assigned)) => {
            let offset = i64::try_from(assigned.at.offset).unwrap_or(i64::MAX);
            describe(span, [("sanjay.channel.offset", offset.into())]);
        }
        Ok(None) => {}
        Err(error) => fail(span, error.code().as_str()),
    }
}

/// A publication that goes to the edges of this router which hold its channel. `None` when its trace is not recorded;
/// otherwise the span, and the publication as it goes on under it.
pub(crate) fn fan_out(publication: &Arc<Publication>) -> Option<(Span, Arc<Publication>)> {
    if !is_sampled(&publication.trace) {
        return None;
    }
    let span = info_span!(parent: None, "relay", otel.kind = "producer");
    set_parent(&span, &publication.trace);
    messaging(&span, "relay", "send", CHANNEL);
    describe(
        &span,
        [
            ("messaging.message.id", id(&publication.message_id)),
            ("messaging.destination.name", publication.channel.clone().into()),
        ],
    );
    let mut publication = Publication::clone(publication);
    carry(&span, &mut publication.trace);
    Some((span, Arc::new(publication)))
}

/// Says of a `relay` span how many edges it went to.
pub(crate) fn relayed(span: &Span, edges: usize) {
    if !span.is_none() {
        describe(span, [("sanjay.edges", count(edges))]);
    }
}

/// The `relay` spans of inbox hints.
#[derive(Default)]
pub(crate) struct Relays(Mutex<First>);

/// The first `relay` span of recent messages, by message id; the oldest go.
#[derive(Default)]
struct First {
    spans: HashMap<Uuid, String>,
    order: VecDeque<Uuid>,
}

impl Relays {
    /// A hint on its way to the edges that hold its user: continues the message's trace, and has what follows continue
    /// under the new span. That began `ago`, with the search for the user. A hint of redelivery links the span of the
    /// first one, as long as this router remembers it.
    pub(crate) fn relay(&self, hint: &mut InboxHint, ago: Duration) -> Span {
        let Some(message) = hint.message.as_mut().filter(|message| is_sampled(&message.trace)) else {
            return Span::none();
        };
        let span = info_span!(parent: None, "relay", otel.kind = "producer");
        set_parent(&span, &message.trace);
        under_way(&span, ago);
        messaging(&span, "relay", "send", INBOX);
        describe(&span, [("messaging.message.id", id(&message.message_id))]);
        if hint.attempt > 0 {
            describe(&span, [("sanjay.redelivery.attempt", i64::from(hint.attempt).into())]);
        }
        carry(&span, &mut message.trace);
        if let Ok(id) = Uuid::from_slice(&message.message_id)
            && let Some(first) = self.first_or(id, &message.trace)
        {
            link(&span, &first);
        }
        span
    }

    /// The first `relay` span of the message. When none is remembered, `own` is it.
    fn first_or(&self, id: Uuid, own: &str) -> Option<String> {
        let mut first = self.0.lock();
        if let Some(span) = first.spans.get(&id) {
            return Some(span.clone());
        }
        first.spans.insert(id, own.to_owned());
        first.order.push_back(id);
        if first.order.len() > MAX_FIRST
            && let Some(oldest) = first.order.pop_front()
        {
            first.spans.remove(&oldest);
        }
        None
    }
}

fn id(message_id: &[u8]) -> Value {
    Uuid::from_slice(message_id).unwrap_or_default().to_string().into()
}

#[cfg(test)]
mod tests {
    use sanjay_proto::client::v1::InboxMessage;

    use super::*;

    const TRACE: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn the_first_relay_is_remembered_and_the_memory_is_bounded() {
        let relays = Relays::default();
        for number in 0..=MAX_FIRST as u128 {
            assert_eq!(relays.first_or(Uuid::from_u128(number), TRACE), None);
        }
        assert_eq!(relays.first_or(Uuid::from_u128(1), "other").as_deref(), Some(TRACE));
        assert_eq!(relays.first_or(Uuid::from_u128(0), "other"), None, "the oldest was forgotten");
        let first = relays.0.lock();
        assert_eq!((first.spans.len(), first.order.len()), (MAX_FIRST, MAX_FIRST));
    }

    #[test]
    fn what_is_not_recorded_gets_no_span_and_travels_on_as_it_is() {
        let unsampled = TRACE.replace("-01", "-00");
        for trace in ["", unsampled.as_str()] {
            let mut new = NewPublication { trace: trace.to_owned(), ..NewPublication::default() };
            assert!(publish(&mut new).is_none());
            assert_eq!(new.trace, trace);
            let publication = Publication { trace: trace.to_owned(), ..Publication::default() };
            assert!(fan_out(&Arc::new(publication)).is_none());
            let message = InboxMessage { trace: trace.to_owned(), ..InboxMessage::default() };
            let mut hint = InboxHint { message: Some(message), ..InboxHint::default() };
            let relays = Relays::default();
            assert!(relays.relay(&mut hint, Duration::ZERO).is_none());
            assert!(relays.0.lock().spans.is_empty());
        }
    }
}
