//! Connections that go on in a channel from a position: `subscribe` with `recover`, and `history`.

use std::{rc::Rc, sync::Arc};

use sanjay_proto::client::v1::Publication;
use sanjay_protocol::{
    ErrorBody, ErrorCode,
    limits::{MAX_HISTORY_BYTES, MAX_HISTORY_LIMIT},
    recovery::{Position, ReadHistory, encode_recovered},
};
use sanjay_websocket::Transport;

use super::{
    Shard,
    effects::{Turn, full},
    hub::{Leave, Seek, Top},
    recovery::{Found, Next},
};
use crate::{
    connection::machine::Input,
    metrics::Recovery,
    upstream::{ConnKey, LinkRequest, history::HistoryRead},
};

impl<T: Transport> Turn<'_, T> {
    /// Subscribes a connection and has it go on from a position. Returns the answer when there is one at once.
    pub(super) fn recover(&mut self, id: u64, channel: &str, since: &Position) -> Option<Input> {
        let (shard, key) = (Rc::clone(self.shard), self.conn.key);
        let namespace = shard.common.namespaces.of(channel);
        let seek = shard.hub.borrow_mut().seek(namespace.max_subscribers, key.index, channel);
        let since = Top { epoch: since.epoch.as_str().into(), offset: since.offset };
        let ask = match seek {
            Seek::Already => {
                let why = format!("\"{channel}\" is subscribed already on this connection");
                return Some(Input::Recovered(id, Err(ErrorBody::new(ErrorCode::AlreadySubscribed, why))));
            }
            Seek::Full => {
                let error = full(channel, namespace.max_subscribers);
                return Some(Input::Recovered(id, Err(error)));
            }
            Seek::Known(top) if since == top => return Some(self.go_on(id, channel, &top, true)),
            Seek::Known(top) if since.epoch != top.epoch || namespace.history_size == 0 => {
                return Some(self.go_on(id, channel, &top, false));
            }
            Seek::Known(_) => None,
            Seek::Waits { ask } => ask,
        };
        shard.recovering.borrow_mut().entry(channel.into()).or_default().add(since, key, id);
        if let Some(name) = ask {
            shard.common.metrics.channels.inc();
            shard.upstream.link.send(LinkRequest::Subscribe(shard.number, name));
        } else {
            shard.advance(channel);
        }
        None
    }

    /// Makes a member of a connection that needs no read, and answers it.
    fn go_on(&mut self, id: u64, channel: &str, top: &Top, recovered: bool) -> Input {
        self.shard.hub.borrow_mut().admit(self.conn.key.index, channel);
        let at = Position { epoch: top.epoch.to_string(), offset: top.offset };
        let empty = recovered.then_some(&[][..]);
        self.append(id, &encode_recovered(channel, &at, empty));
        self.shard.common.metrics.recovery(if recovered { Recovery::Recovered } else { Recovery::Lost });
        self.shard.note_recovered(self.conn, channel);
        Input::Recovered(id, Ok(()))
    }
}

impl<T: Transport> Shard<T> {
    /// The history was read for those who go on from `since`.
    pub(super) fn on_found(
        self: &Rc<Self>,
        channel: &str,
        since: &Top,
        from: u64,
        found: Result<Found, ErrorBody>,
    ) {
        match found {
            Ok(found) => {
                if let Some(recovering) = self.recovering.borrow_mut().get_mut(channel) {
                    recovering.found(since, from, &found);
                }
                self.advance(channel);
            }
            Err(error) => {
                let seekers = {
                    let mut all = self.recovering.borrow_mut();
                    let Some(recovering) = all.get_mut(channel) else { return };
                    let seekers = recovering.failed(since);
                    if recovering.is_empty() {
                        all.remove(channel);
                    }
                    seekers
                };
                for (key, id) in seekers {
                    self.refuse_seeker(channel, key, id, &error);
                }
            }
        }
    }

    /// The router refused the channel: so are those who wait to go on in it. Their places are given back, and whether
    /// anybody is left is for the caller to see.
    pub(super) fn refuse_seekers(self: &Rc<Self>, channel: &str, error: &ErrorBody) {
        let Some(mut recovering) = self.recovering.borrow_mut().remove(channel) else { return };
        for (key, id) in recovering.drain() {
            if self.connection(key).is_some() {
                self.hub.borrow_mut().leave(key.index, channel);
            }
            self.answer_seeker(key, Input::Recovered(id, Err(error.clone())));
        }
    }

    /// Takes out somebody who waits to go on in a channel; the id of the command, which the caller answers.
    pub(super) fn cancel_seek(&self, channel: &str, key: ConnKey) -> Option<u64> {
        let mut all = self.recovering.borrow_mut();
        let recovering = all.get_mut(channel)?;
        let id = recovering.cancel(key);
        if recovering.is_empty() {
            all.remove(channel);
        }
        id
    }

    fn refuse_seeker(self: &Rc<Self>, channel: &str, key: ConnKey, id: u64, error: &ErrorBody) {
        if self.connection(key).is_none() {
            return;
        }
        let left = self.hub.borrow_mut().leave(key.index, channel);
        if let Leave::Left { last: Some(name), .. } = left {
            self.common.metrics.channels.dec();
            self.upstream.link.send(LinkRequest::Unsubscribe(self.number, name));
        }
        self.common.metrics.recovery(Recovery::Failed);
        self.answer_seeker(key, Input::Recovered(id, Err(error.clone())));
    }

    fn answer_seeker(self: &Rc<Self>, key: ConnKey, input: Input) {
        if let Some(conn) = self.connection(key) {
            Turn::once(self, &conn, input);
            if conn.has_backlog() {
                conn.wake();
            }
        }
    }

    /// Goes on with those who recover in a channel, now that its members were handed everything up to its top.
    pub(super) fn advance(self: &Rc<Self>, channel: &str) {
        let Some(top) = self.hub.borrow().top_of(channel) else { return };
        let steps = {
            let mut all = self.recovering.borrow_mut();
            let Some(recovering) = all.get_mut(channel) else { return };
            let steps = recovering.advance(&top);
            if recovering.is_empty() {
                all.remove(channel);
            }
            steps
        };
        // Whether the router keeps something is known here, too, so that nobody reads in vain.
        let keeps = self.common.namespaces.of(channel).history_size > 0;
        for (since, step) in steps {
            match step {
                Next::Read(from) if !keeps => self.on_found(channel, &since, from.offset, Ok(Found::lost())),
                Next::Read(from) => self.upstream.histories.send(HistoryRead::Recover {
                    shard: self.number,
                    channel: channel.into(),
                    since,
                    from: from.offset,
                }),
                Next::Answer { seekers, missed } => self.answer_seekers(channel, &top, &seekers, missed),
            }
        }
    }

    /// Makes members of those who went on from one position, and gives them what they missed: encoded once for all.
    fn answer_seekers(
        self: &Rc<Self>,
        channel: &str,
        top: &Top,
        seekers: &[(ConnKey, u64)],
        missed: Option<Vec<Arc<Publication>>>,
    ) {
        let at = Position { epoch: top.epoch.to_string(), offset: top.offset };
        let most = MAX_HISTORY_BYTES.min(self.common.config.max_outbox_bytes / 2);
        let missed = missed.filter(|missed| missed.len() <= MAX_HISTORY_LIMIT);
        let mut shared = encode_recovered(channel, &at, missed.as_deref());
        let mut recovered = missed.is_some();
        if shared.len() > most {
            recovered = false;
            shared = encode_recovered(channel, &at, None);
        }
        for &(key, id) in seekers {
            let Some(conn) = self.connection(key) else { continue };
            if !self.hub.borrow_mut().admit(key.index, channel) {
                continue;
            }
            self.common.metrics.recovery(if recovered { Recovery::Recovered } else { Recovery::Lost });
            let mut turn = Turn::new(self, &conn);
            turn.append(id, &shared);
            turn.on(Input::Recovered(id, Ok(())));
            turn.end();
            self.note_recovered(&conn, channel);
            if conn.has_backlog() {
                conn.wake();
            }
        }
    }

    /// Reads a part of a channel's history for a client.
    pub(super) fn read_history(&self, key: ConnKey, id: u64, read: ReadHistory) {
        self.upstream.histories.send(HistoryRead::Page(key, id, read));
    }
}
