//! From one event of the control runtime to many sockets: channel messages, gaps, hints and announcements.

use std::{rc::Rc, sync::Arc};

use bytes::Bytes;
use sanjay_proto::{client::v1::Publication, edge::v1::InboxHint};
use sanjay_protocol::{
    CloseCode, ErrorBody, ErrorCode, Event, EventEnvelope,
    event::{Gap, Goaway, Subscribed},
    json,
};
use sanjay_runtime::metrics::seconds_between;
use sanjay_websocket::{Opcode, Transport, encode};

use super::{
    Common, Shard,
    effects::Turn,
    hub::{ConnIndex, Missed, Step, Top},
};
use crate::{
    connection::{Connection, MAX_WAITING_TO_READ, Wrote, machine::Input},
    spans::ChannelPush,
    upstream::{LinkRequest, link},
};

/// Sockets written before other connections of the shard get their turn: 10,000 in a row would hold it for 50 ms.
pub(super) const SOCKETS_A_TURN: usize = 256;

/// Sessions that a shard announces in a tick, 50,000 a second.
const SESSIONS_A_TICK: usize = 1_024;

/// Requests that may wait for the control runtime before a shard announces no more sessions.
const SESSIONS_AHEAD: usize = 1_024;

impl<T: Transport> Shard<T> {
    /// A channel message: encoded once, its bytes shared by every subscriber.
    pub(super) async fn fan_out(
        self: &Rc<Self>,
        publication: &Arc<Publication>,
        push: Option<Arc<ChannelPush>>,
    ) {
        let Publication { channel: name, epoch, offset, .. } = &**publication;
        self.common.metrics.publications.inc();
        let step = self.hub.borrow_mut().on_publication(name, epoch, *offset);
        let Step::Deliver { channel, missed } = step else { return };
        // Kept before others get their turn, and given to who recovers only after members have it.
        let sought = self.note_recent(publication);
        let mut frame = encode(Opcode::Text, &json::encode_publication(publication));
        if let Some(missed) = missed {
            // In one write with the message, so that who joins meanwhile gets neither.
            frame = [gap_frame(name, epoch, missed), frame].concat().into();
            self.common.metrics.gaps.inc();
        }
        let sockets = self.broadcast(channel, usize::MAX, &frame).await;
        if let Some(push) = push {
            push.wrote(sockets);
        }
        let Common { metrics, clock, .. } = &*self.common;
        metrics.deliveries.inc_by(sockets as u64);
        if sockets > 0 {
            metrics.channel_latency.observe(seconds_between(publication.time_us, clock.now_us()));
        }
        self.milestone(&publication.message_id, "written", format!("{sockets} sockets"));
        if sought {
            self.advance(name);
        }
    }

    /// Keeps a publication for those who recover in its channel, if anybody does.
    fn note_recent(&self, publication: &Arc<Publication>) -> bool {
        let mut all = self.recovering.borrow_mut();
        let recovering = if all.is_empty() { None } else { all.get_mut(publication.channel.as_str()) };
        if let Some(recovering) = recovering {
            recovering.note(publication);
            return true;
        }
        false
    }

    /// Publications were dropped on the way here.
    pub(super) async fn on_gap(self: &Rc<Self>, name: &str, epoch: &str, top: u64) {
        let gap = self.hub.borrow_mut().on_gap(name, epoch, top);
        if let Some((channel, missed)) = gap {
            self.tell_gap(channel, usize::MAX, name, epoch, missed).await;
            self.advance(name);
        }
    }

    /// A subscription was confirmed or refused.
    pub(super) async fn on_subscribed(
        self: &Rc<Self>,
        name: &str,
        result: Result<(Arc<str>, u64), ErrorBody>,
    ) {
        let (waiters, result, gap) = match result {
            Ok((epoch, offset)) => {
                let confirmed =
                    self.hub.borrow_mut().on_subscribed(name, Top { epoch: Arc::clone(&epoch), offset });
                let Some((channel, confirmed)) = confirmed else { return };
                let gap =
                    confirmed.missed.map(|missed| (channel, confirmed.earlier, Arc::clone(&epoch), missed));
                (confirmed.waiters, Ok((epoch, offset)), gap)
            }
            Err(error) => {
                let before = self.hub.borrow().channel_count();
                self.refuse_seekers(name, &error);
                let waiters = self.hub.borrow_mut().on_refused(name);
                if error.code != ErrorCode::Unavailable {
                    self.give_up(name);
                }
                if self.hub.borrow().channel_count() < before {
                    self.common.metrics.channels.dec();
                    // Whoever keeps a route for this shard may forget it.
                    self.upstream.link.send(LinkRequest::Unsubscribe(self.number, name.into()));
                }
                (waiters, Err(error), None)
            }
        };
        for (index, id) in waiters {
            let Some(conn) = self.at(index) else { continue };
            let result = result.clone().map(|(epoch, offset)| Subscribed {
                channel: name.to_owned(),
                epoch: epoch.to_string(),
                offset,
                ..Subscribed::default()
            });
            Turn::once(self, &conn, Input::Joined(id, result));
            if conn.has_backlog() {
                conn.wake();
            }
        }
        // Last, because it gives others their turn, in which who waited may be gone.
        if let Some((channel, earlier, epoch, missed)) = gap {
            self.tell_gap(channel, earlier, name, &epoch, missed).await;
        }
        self.advance(name);
    }

    /// The router will not hold a channel again that has members here. They come back and are answered for it,
    /// rather than to wait for messages that never come.
    fn give_up(&self, name: &str) {
        let members = self.hub.borrow().members_of(name);
        for conn in members.into_iter().filter_map(|index| self.at(index)) {
            self.close(&conn, CloseCode::TryAgainLater, "a channel of this connection is refused now", false);
        }
    }

    /// A message was committed to a user's inbox, or messages in it were settled.
    pub(super) fn on_hint(self: &Rc<Self>, hint: &InboxHint) {
        let users = self.users.borrow();
        let Some((user, connections)) = users.get_key_value(&*hint.user) else { return };
        match hint.sessions {
            0 => {}
            1 => drop(self.shared.borrow_mut().remove(user)),
            _ if self.shared.borrow().contains(user) => {}
            _ => drop(self.shared.borrow_mut().insert(Rc::clone(user))),
        }
        let connections = connections.clone();
        drop(users);
        for index in connections {
            let Some(conn) = self.at(index) else { continue };
            if !hint.settled.is_empty() {
                let ranges = hint.settled.iter().map(|range| (range.from, range.to)).collect();
                Turn::once(self, &conn, Input::Settled(hint.inbox_epoch, ranges));
            }
            let Some(message) = &hint.message else { continue };
            if hint.done.iter().any(|device| device == conn.machine.borrow().device()) {
                continue;
            }
            // Who is behind reads from the log when the socket has taken what waits.
            let behind = conn.waiting() > MAX_WAITING_TO_READ;
            let input = if behind { Input::Resync } else { Input::Hint(hint.inbox_epoch, message.clone()) };
            Turn::once(self, &conn, input);
        }
    }

    /// Hints were dropped: every inbox is read again.
    pub(super) async fn resync(self: &Rc<Self>) {
        self.for_each(|conn| Turn::once(self, conn, Input::Resync)).await;
    }

    /// Another stream to a router began: sessions are announced again, some with each tick.
    pub(super) fn announce(&self) {
        *self.announcing.borrow_mut() = self.all();
        self.announce_some();
    }

    /// Announces some of the sessions that are left, unless enough wait already: what clients ask for meanwhile
    /// is not to wait behind tens of thousands of sessions.
    pub(super) fn announce_some(&self) {
        let mut left = self.announcing.borrow_mut();
        for _ in 0..SESSIONS_A_TICK {
            if left.is_empty() {
                *left = Vec::new();
            }
            if self.upstream.link.waiting() >= SESSIONS_AHEAD {
                return;
            }
            let Some(key) = left.pop() else { return };
            // Who is gone by now is not announced, and who came has announced itself.
            let Some(conn) = self.connection(key) else { continue };
            let machine = conn.machine.borrow();
            if machine.is_identified() {
                self.upstream.link.send(LinkRequest::OpenSession {
                    conn: conn.key,
                    user: machine.user().to_string(),
                    session: machine.session(),
                    inbox: machine.inbox().is_some(),
                });
            }
        }
    }

    /// No router can be attached to: every client is told that channels rest.
    pub(super) async fn tell_away(self: &Rc<Self>) {
        self.for_each(|conn| Turn::once(self, conn, Input::SessionOpened(Err(link::away())))).await;
    }

    /// The edge shuts down: every client is told to come back elsewhere, spread over a while.
    pub(super) async fn drain(self: &Rc<Self>) {
        let code = CloseCode::Restart;
        let goaway = Goaway {
            code: code.code(),
            reason: code.reason().to_owned(),
            reconnect_after_ms: 0,
            spread_ms: self.common.config.reconnect_spread_ms,
        };
        let frame = push(Event::Goaway(goaway));
        self.for_each(|conn| {
            self.deliver(conn, &frame);
            self.close(conn, code, code.reason(), false);
        })
        .await;
    }

    /// Calls for each connection that exists now, with turns for others in between.
    async fn for_each(&self, mut call: impl FnMut(&Rc<Connection<T>>)) {
        for keys in self.all().chunks(SOCKETS_A_TURN) {
            for key in keys {
                if let Some(conn) = self.connection(*key) {
                    call(&conn);
                }
            }
            tokio::task::yield_now().await;
        }
    }

    async fn tell_gap(&self, channel: u32, first: usize, name: &str, epoch: &str, missed: Missed) {
        self.broadcast(channel, first, &gap_frame(name, epoch, missed)).await;
        self.common.metrics.gaps.inc();
    }

    /// Writes a frame to the first members of a channel. Returns how many took it.
    async fn broadcast(&self, channel: u32, first: usize, frame: &Bytes) -> usize {
        // Who joins during a turn of others has seen a later offset; who leaves may get this one still.
        let newest = self.generation.get();
        let members: Vec<ConnIndex> = {
            let hub = self.hub.borrow();
            let members = hub.members(channel);
            let members = &members[..members.len().min(first)];
            if members.len() <= SOCKETS_A_TURN {
                return self.write_to(members, newest, frame);
            }
            members.to_vec()
        };
        let mut told = 0;
        for members in members.chunks(SOCKETS_A_TURN) {
            told += self.write_to(members, newest, frame);
            tokio::task::yield_now().await;
        }
        told
    }

    fn write_to(&self, members: &[ConnIndex], newest: u32, frame: &Bytes) -> usize {
        let connections = self.connections.borrow();
        let mut told = 0;
        for index in members {
            // A later connection may have taken the index of one that ended.
            let conn = connections.get(*index as usize).filter(|conn| is_older(conn.key.generation, newest));
            let Some(conn) = conn else { continue };
            match self.hand_to(conn, frame) {
                Wrote::All => told += 1,
                Wrote::Waits => {
                    told += 1;
                    if conn.waiting() > self.common.config.max_outbox_bytes {
                        self.close(
                            conn,
                            CloseCode::SlowConsumer,
                            "more waits than a slow client may have",
                            true,
                        );
                    }
                }
                Wrote::Gone => {}
            }
        }
        self.common.metrics.sent_bytes.inc_by((told * frame.len()) as u64);
        told
    }
}

/// Whether a connection's generation is not above `newest`. Generations begin again after 2³²; half of that lies
/// behind the newest.
fn is_older(generation: u32, newest: u32) -> bool {
    newest.wrapping_sub(generation) <= u32::MAX / 2
}

fn gap_frame(name: &str, epoch: &str, Missed { from, to }: Missed) -> Bytes {
    push(Event::Gap(Gap { channel: name.to_owned(), epoch: epoch.to_owned(), from, to }))
}

pub(super) fn push(event: Event) -> Bytes {
    let mut envelope = Vec::new();
    json::encode(&EventEnvelope { id: None, event }, &mut envelope);
    encode(Opcode::Text, &envelope)
}
