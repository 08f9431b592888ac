//! Who watches connections: edges send what happens to theirs while somebody does, and nobody waits for a watcher.

use std::sync::Arc;

use parking_lot::Mutex;
use sanjay_proto::edge::v1::{ConnectionEvent, ConnectionEventKind, ConnectionEvents};
use sanjay_runtime::SharedClock;
use tokio::sync::broadcast::{self, error::RecvError};

use crate::{downlink::Downlink, fanout::Fanout, registry::SessionId};

/// Messages of edges that wait for the slowest watcher; each has at most some hundred events.
const MAX_WAITING: usize = 1_024;

/// Most watchers of one router: a delivery node has one for each of its own.
const MAX_WATCHERS: usize = 256;

/// Where events are told, and watched.
pub(crate) struct Watchers {
    fanout: Arc<Fanout>,
    events: broadcast::Sender<Arc<ConnectionEvents>>,
    /// Held while edges are told whether somebody watches, so that the newest word is the last.
    telling: Mutex<()>,
    clock: SharedClock,
}

/// There are as many watchers as a router has room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_WATCHERS} streams of connection events are open at this router, which is its limit; end one")]
pub(crate) struct TooManyWatchers;

impl Watchers {
    pub(crate) fn new(fanout: Arc<Fanout>, clock: SharedClock) -> Self {
        Self { fanout, events: broadcast::Sender::new(MAX_WAITING), telling: Mutex::default(), clock }
    }

    /// Hears of everything from when the edges have heard that somebody watches.
    pub(crate) fn watch(self: &Arc<Self>) -> Result<Watcher, TooManyWatchers> {
        if self.events.receiver_count() >= MAX_WATCHERS {
            return Err(TooManyWatchers);
        }
        let watcher = Watcher { receiver: Some(self.events.subscribe()), watchers: Arc::clone(self) };
        self.tell_all();
        Ok(watcher)
    }

    fn is_watched(&self) -> bool {
        self.events.receiver_count() > 0
    }

    /// Tells every edge whether somebody watches.
    fn tell_all(&self) {
        let _telling = self.telling.lock();
        let watched = self.is_watched();
        self.fanout.links().iter().for_each(|link| link.watch(watched));
    }

    /// An edge attached.
    pub(crate) fn came(&self, link: &Downlink) {
        let _telling = self.telling.lock();
        if self.is_watched() {
            link.watch(true);
            // It may have been elsewhere before, and what happened in between was told to nobody.
            let _nobody = self.events.send(Arc::new(ConnectionEvents { events: Vec::new(), missed: 1 }));
        }
    }

    /// An edge tells what happened.
    pub(crate) fn tell(&self, edge_id: &str, mut events: ConnectionEvents) {
        for event in &mut events.events {
            edge_id.clone_into(&mut event.edge_id);
        }
        let _nobody = self.events.send(Arc::new(events));
    }

    /// An edge is gone for good, with these sessions, and could not say so.
    pub(crate) fn gone(&self, edge_id: &str, sessions: impl IntoIterator<Item = (SessionId, Arc<str>)>) {
        if !self.is_watched() {
            return;
        }
        let time_us = self.clock.now_us();
        let offline = |(session, user): (SessionId, Arc<str>)| ConnectionEvent {
            kind: ConnectionEventKind::Offline.into(),
            time_us,
            user: user.to_string(),
            session: session.to_vec().into(),
            edge_id: edge_id.to_owned(),
            ..ConnectionEvent::default()
        };
        let all: Vec<ConnectionEvent> = sessions.into_iter().map(offline).collect();
        for some in all.chunks(256) {
            let _nobody = self.events.send(Arc::new(ConnectionEvents { events: some.to_vec(), missed: 0 }));
        }
    }
}

/// Somebody who hears of events.
pub(crate) struct Watcher {
    /// Taken when it is dropped.
    receiver: Option<broadcast::Receiver<Arc<ConnectionEvents>>>,
    watchers: Arc<Watchers>,
}

impl Watcher {
    /// What happened next; a number when so much was passed by. `None` when the router is gone.
    pub(crate) async fn next(&mut self) -> Option<Result<Arc<ConnectionEvents>, u64>> {
        match self.receiver.as_mut()?.recv().await {
            Ok(events) => Some(Ok(events)),
            Err(RecvError::Lagged(missed)) => Some(Err(missed)),
            Err(RecvError::Closed) => None,
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        drop(self.receiver.take());
        if !self.watchers.is_watched() {
            self.watchers.tell_all();
        }
    }
}
