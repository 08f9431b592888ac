//! A subscription as the application holds it.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::Stream;
use sanjay_protocol::{
    ErrorBody,
    event::{Gap, Message},
};
use tokio::sync::{mpsc, watch};

use super::{
    error::{ClosedError, SubscribeError},
    machine::Request,
};

/// What happens on a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChannelEvent {
    /// The subscription is in force, at first or again after a reconnect: every message above `offset`
    /// follows, or a gap is reported. What a reconnect missed came before it where the channel keeps it, or is a gap.
    Subscribed {
        /// Names the sequence.
        epoch: String,
        /// The newest offset before the subscription.
        offset: u64,
    },
    /// A message.
    Message(Box<Message>),
    /// Messages that this subscription missed.
    Gap(Gap),
    /// The numbering began anew, so that it is unknown what was missed: reload what was derived from the channel.
    Discontinuity {
        /// Names the new sequence.
        epoch: String,
        /// The newest offset in it that may have been missed.
        offset: u64,
    },
    /// The server refused the subscription; the last event.
    Unsubscribed(ErrorBody),
}

/// Where a subscription stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SubscriptionState {
    /// It ended: on request, with the client, or because the server refused it.
    Unsubscribed(Option<ErrorBody>),
    /// It waits for the connection or the server's answer.
    Subscribing,
    /// It is in force.
    Subscribed,
}

/// A channel's events in order. Dropping it unsubscribes. While its buffer is full the client reads nothing,
/// so that the server sees a slow consumer.
#[derive(Debug)]
pub struct Subscription {
    pub(crate) id: u64,
    pub(crate) channel: String,
    pub(crate) events: mpsc::Receiver<ChannelEvent>,
    pub(crate) state: watch::Receiver<SubscriptionState>,
    pub(crate) requests: mpsc::Sender<Request>,
}

impl Subscription {
    /// The channel.
    #[must_use]
    pub fn channel(&self) -> &str {
        &self.channel
    }

    /// The next event; `None` once the subscription ended. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Option<ChannelEvent> {
        self.events.recv().await
    }

    /// Where the subscription stands now.
    #[must_use]
    pub fn state(&self) -> SubscriptionState {
        self.state.borrow().clone()
    }

    /// Observes where the subscription stands.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<SubscriptionState> {
        self.state.clone()
    }

    /// Waits until the subscription is in force.
    ///
    /// # Errors
    /// When the server refused it, or it ended otherwise.
    pub async fn subscribed(&self) -> Result<(), SubscribeError> {
        let mut state = self.state.clone();
        match state.wait_for(|state| *state != SubscriptionState::Subscribing).await.as_deref() {
            Ok(SubscriptionState::Unsubscribed(Some(error))) => Err(SubscribeError::Refused(error.clone())),
            Ok(SubscriptionState::Unsubscribed(None)) | Err(_) => Err(ClosedError::ByApplication.into()),
            Ok(_) => Ok(()),
        }
    }
}

impl Stream for Subscription {
    type Item = ChannelEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<ChannelEvent>> {
        self.events.poll_recv(cx)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // When the queue is full, the next event for this subscription finds nobody and unsubscribes instead.
        let channel = std::mem::take(&mut self.channel);
        let _ = self.requests.try_send(Request::Unsubscribe { channel, id: Some(self.id) });
    }
}
