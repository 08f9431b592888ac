//! Events on their way to the application, in order, while it has no room for them.

use std::collections::VecDeque;

use tokio::sync::mpsc::{
    Sender,
    error::TrySendError::{Closed, Full},
};

use super::{inbox::InboxEvent, subscription::ChannelEvent};

/// How much may wait while a reply is awaited; otherwise the socket is not read as soon as anything waits.
const MAX_BYTES: usize = 4 * 1024 * 1024;
/// What an event costs beside its payload, about.
const EVENT_BYTES: usize = 512;

/// An event with where it goes.
#[derive(Debug)]
pub(crate) enum Delivery {
    Channel(Sender<ChannelEvent>, ChannelEvent),
    Inbox(InboxEvent),
}

impl Delivery {
    fn size(&self) -> usize {
        let payload = match self {
            Delivery::Channel(_, ChannelEvent::Message(message)) => message.payload.len(),
            Delivery::Inbox(InboxEvent::Message(delivery)) => delivery.message.payload.len(),
            _ => 0,
        };
        EVENT_BYTES + payload
    }
}

/// What waits for the application.
#[derive(Debug)]
pub(crate) struct Backlog {
    inbox: Sender<InboxEvent>,
    waiting: VecDeque<Delivery>,
    bytes: usize,
}

impl Backlog {
    pub(crate) fn new(inbox: Sender<InboxEvent>) -> Self {
        Self { inbox, waiting: VecDeque::new(), bytes: 0 }
    }

    pub(crate) fn push(&mut self, delivery: Delivery) {
        self.bytes += delivery.size();
        self.waiting.push_back(delivery);
    }

    /// Hands over what there is room for; says whether a subscription was found whose handle is gone.
    pub(crate) fn deliver(&mut self) -> bool {
        let mut gone = false;
        while let Some(delivery) = self.waiting.pop_front() {
            let size = delivery.size();
            let full = match delivery {
                Delivery::Channel(events, event) => match events.try_send(event) {
                    Ok(()) => None,
                    Err(Full(event)) => Some(Delivery::Channel(events, event)),
                    Err(Closed(_)) => {
                        gone = true;
                        None
                    }
                },
                Delivery::Inbox(event) => match self.inbox.try_send(event) {
                    Err(Full(event)) => Some(Delivery::Inbox(event)),
                    // Nobody listens: dropping the acker leaves the message unsettled.
                    Ok(()) | Err(Closed(_)) => None,
                },
            };
            if let Some(delivery) = full {
                self.waiting.push_front(delivery);
                break;
            }
            self.bytes -= size;
        }
        gone
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.bytes >= MAX_BYTES
    }

    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
        self.bytes = 0;
    }

    /// Waits until there is room for what comes first; for ever when nothing waits.
    pub(crate) fn room(&self) -> impl Future<Output = ()> + Send + use<> {
        let first = self.waiting.front().map(|delivery| match delivery {
            Delivery::Channel(events, _) => Ok(events.clone()),
            Delivery::Inbox(_) => Err(self.inbox.clone()),
        });
        async move {
            match first {
                // A receiver that is gone counts as room: its events go nowhere.
                Some(Ok(events)) => drop(events.reserve().await),
                Some(Err(events)) => drop(events.reserve().await),
                None => std::future::pending().await,
            }
        }
    }
}
