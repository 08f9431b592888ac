//! What happens to messages at this node, for whoever watches. Nobody waits for a watcher: one that is too slow misses
//! events, and is told how many.

use std::sync::Arc;

use sanjay_runtime::clock::SharedClock;
use tokio::sync::broadcast::{self, error::RecvError};
use uuid::Uuid;

use crate::{
    message::State,
    metrics::Metrics,
    store::{DeadReason, Failure, LoggedReceipt},
};

/// Most events that wait for the slowest watcher.
const MAX_WAITING: usize = 4_096;

/// Most watchers of one node.
const MAX_WATCHERS: usize = 64;

/// What happened. The numbers are those of the back ends' API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EventKind {
    Accepted = 1,
    Scheduled = 2,
    Relayed = 3,
    Written = 4,
    Failing = 5,
    Acked = 6,
    Expired = 7,
    Superseded = 8,
    Dead = 9,
    Exhausted = 10,
    InboxFilling = 11,
}

/// Something that happened to a message, or to an inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) kind: EventKind,
    /// Unix time in microseconds.
    pub(crate) time_us: u64,
    pub(crate) user: String,
    /// `None` where it is not known, or there is none.
    pub(crate) message_id: Option<Uuid>,
    /// 0 where it is not known.
    pub(crate) seq: u64,
    /// Empty where it is not known.
    pub(crate) caller: String,
    pub(crate) detail: String,
}

/// Where events are told, and watched.
#[derive(Clone)]
pub(crate) struct Events {
    sender: broadcast::Sender<Arc<Event>>,
    clock: SharedClock,
    metrics: Metrics,
}

/// There are as many watchers as a node has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MAX_WATCHERS} streams of events are open at this node, which is its limit; end one, or ask another node"
)]
pub(crate) struct TooManyWatchers;

impl Events {
    pub(crate) fn new(clock: SharedClock, metrics: Metrics) -> Self {
        Self { sender: broadcast::channel(MAX_WAITING).0, clock, metrics }
    }

    /// Whether anybody watches: what only events need is not worked out otherwise.
    pub(crate) fn watched(&self) -> bool {
        self.sender.receiver_count() > 0
    }

    /// Hears of everything from now on.
    ///
    /// # Errors
    /// When too many do.
    pub(crate) fn watch(&self) -> Result<Watcher, TooManyWatchers> {
        if self.sender.receiver_count() >= MAX_WATCHERS {
            return Err(TooManyWatchers);
        }
        Ok(Watcher { receiver: self.sender.subscribe(), metrics: self.metrics.clone() })
    }

    /// Tells of a message, when somebody watches.
    pub(crate) fn tell(&self, kind: EventKind, user: &str, message: Option<Uuid>, seq: u64) {
        self.tell_with(kind, user, message, seq, "", String::new);
    }

    /// Likewise, with more about it.
    pub(crate) fn tell_with(
        &self,
        kind: EventKind,
        user: &str,
        message_id: Option<Uuid>,
        seq: u64,
        caller: &str,
        detail: impl FnOnce() -> String,
    ) {
        if !self.watched() {
            return;
        }
        let (user, caller, time_us) = (user.to_owned(), caller.to_owned(), self.clock.now_us());
        let event = Event { kind, time_us, user, message_id, seq, caller, detail: detail() };
        // The last watcher may just have gone.
        let _nobody = self.sender.send(Arc::new(event));
    }

    /// Tells how a message ended.
    pub(crate) fn settled(&self, receipt: &LoggedReceipt) {
        let kind = match (receipt.receipt.state, receipt.reason) {
            (State::Acked, _) => EventKind::Acked,
            (State::Expired, _) => EventKind::Expired,
            (State::Superseded, _) => EventKind::Superseded,
            (State::Dead, Some(DeadReason::MaxAttempts)) => EventKind::Exhausted,
            (State::Dead, _) => EventKind::Dead,
            (State::Scheduled | State::Accepted, _) => return,
        };
        let LoggedReceipt { user, message_id, caller, reason, .. } = receipt;
        let detail = || reason.map_or("", DeadReason::as_str).to_owned();
        self.tell_with(kind, user, Some(*message_id), receipt.receipt.seq, caller, detail);
    }

    /// Tells of a delivery that failed and is not the first.
    pub(crate) fn failing(&self, user: &str, message_id: Option<Uuid>, failure: &Failure) {
        if failure.delivery >= 2 {
            let detail = || format!("delivery {}, {}", failure.delivery, failure.kind.as_str());
            self.tell_with(EventKind::Failing, user, message_id, failure.seq, "", detail);
        }
    }
}

/// Somebody who hears of events.
pub(crate) struct Watcher {
    receiver: broadcast::Receiver<Arc<Event>>,
    metrics: Metrics,
}

/// What a watcher gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Heard {
    Event(Arc<Event>),
    /// So many events were passed by.
    Missed(u64),
}

impl Watcher {
    /// The next event; `None` when the node is gone.
    pub(crate) async fn next(&mut self) -> Option<Heard> {
        match self.receiver.recv().await {
            Ok(event) => Some(Heard::Event(event)),
            Err(RecvError::Lagged(count)) => {
                self.metrics.events_missed(count);
                Some(Heard::Missed(count))
            }
            Err(RecvError::Closed) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;
    use sanjay_runtime::clock::ManualClock;

    use super::*;
    use crate::metrics;

    #[tokio::test]
    async fn a_slow_watcher_is_told_what_it_missed_and_no_watcher_costs_nothing() {
        let events = Events::new(Arc::new(ManualClock::new(7)), metrics::for_tests());
        events.tell_with(EventKind::Acked, "bob", None, 1, "", || unreachable!("nobody watches"));
        let (mut slow, mut other) = (events.watch().unwrap(), events.watch().unwrap());
        for seq in 1..=MAX_WAITING as u64 + 10 {
            events.tell(EventKind::Accepted, "bob", Some(Uuid::nil()), seq);
            if seq % 100 == 0 {
                while other.next().now_or_never().is_some() {}
            }
        }
        assert_eq!(slow.next().await, Some(Heard::Missed(10)));
        let Some(Heard::Event(event)) = slow.next().await else { panic!("no event") };
        assert_eq!((event.seq, event.time_us, event.kind), (11, 7, EventKind::Accepted));
        while let Some(heard) = other.next().now_or_never() {
            assert!(matches!(heard, Some(Heard::Event(_))), "{heard:?}");
        }
        let many: Vec<Watcher> = (2..MAX_WATCHERS).map(|_| events.watch().unwrap()).collect();
        assert!(events.watch().is_err());
        drop(many);
        assert!(events.watch().is_ok());
    }
}
