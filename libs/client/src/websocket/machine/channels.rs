//! What the server says of subscriptions: that they are there, that they are refused, that they have ended.

use std::time::Duration;

use sanjay_protocol::{
    ErrorBody,
    event::{Subscribed, Unsubscribed},
};
use tokio::time::Instant;

use super::{Machine, RETRY_BASE, RETRY_CAP};
use crate::{
    backoff,
    websocket::{
        backlog::Delivery,
        position::{self, Verdict},
        subscription::{ChannelEvent, SubscriptionState},
    },
};

impl Machine {
    /// A subscription is there, with what was missed.
    pub(super) fn subscribed(&mut self, channel: &str, id: u64, mut subscribed: Subscribed) {
        if let Some(entry) = self.subscriptions.get_mut(channel)
            && entry.id == id
        {
            (entry.subscribed, entry.refusals) = (true, 0);
            entry.state.send_replace(SubscriptionState::Subscribed);
            let mut recovered = Vec::new();
            for message in std::mem::take(&mut subscribed.messages) {
                match position::message(&mut entry.position, &message) {
                    Verdict::Repeated => continue,
                    Verdict::Deliver => {}
                    Verdict::DeliverAfter(event) => recovered.push(event),
                }
                recovered.push(ChannelEvent::Message(Box::new(message)));
            }
            let missed = position::subscribed(&mut entry.position, &subscribed);
            let events = entry.events.clone();
            let now = ChannelEvent::Subscribed { epoch: subscribed.epoch, offset: subscribed.offset };
            for event in recovered.into_iter().chain(missed).chain([now]) {
                self.queue(Delivery::Channel(events.clone(), event));
            }
        }
    }

    /// A subscription is refused: it is tried again later, or ends.
    pub(super) fn refused(&mut self, channel: &str, id: u64, error: ErrorBody, now: Instant) {
        let Some(entry) = self.subscriptions.get_mut(channel).filter(|entry| entry.id == id) else { return };
        entry.sent = false;
        if error.retryable {
            let hint = error.retry_after_ms.map(|ms| Duration::from_millis(ms.into()));
            let delay = backoff::retry(entry.refusals, hint, RETRY_BASE, RETRY_CAP, self.jitter.fraction());
            entry.refusals = entry.refusals.saturating_add(1);
            self.retries.push((now + delay, channel.to_owned()));
        } else if let Some(entry) = self.subscriptions.remove(channel) {
            entry.state.send_replace(SubscriptionState::Unsubscribed(Some(error.clone())));
            self.queue(Delivery::Channel(entry.events, ChannelEvent::Unsubscribed(error)));
        }
    }

    /// The edge ended a subscription, for what a token allows now or because a back end wants it.
    pub(super) fn unsubscribed(&mut self, unsubscribed: Unsubscribed, now: Instant) {
        let Unsubscribed { channel, code, reason, retryable } = unsubscribed;
        let Some(entry) = self.subscriptions.get_mut(&channel).filter(|entry| entry.subscribed) else {
            return;
        };
        entry.subscribed = false;
        entry.state.send_replace(SubscriptionState::Subscribing);
        let id = entry.id;
        self.refused(&channel, id, ErrorBody { retryable, ..ErrorBody::new(code, reason) }, now);
    }
}
