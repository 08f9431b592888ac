//! What back ends ask of a shard's connections, and what becomes of those whose tokens are revoked.

use std::{collections::BTreeMap, rc::Rc};

use sanjay_proto::edge::v1::{
    self as pb, Answer, Broadcast, ChannelCount, ListChannels, Question, question::Question as Asked,
};
use sanjay_protocol::{
    CloseCode, ErrorBody, ErrorCode, Event,
    event::{self, Goaway, Unsubscribed},
};
use sanjay_runtime::control::{MAX_CONNECTIONS, limit_of};
use sanjay_websocket::Transport;

use super::{
    Shard,
    effects::{Turn, full},
    fanout::{SOCKETS_A_TURN, push},
    hub::{BY_SERVER, Join, Leave},
    wheel::TICK,
};
use crate::{
    connection::{Connection, Life, MAX_WAITING_TO_READ, Wrote, machine::Input},
    revocations::Held,
    upstream::LinkRequest,
};

/// Connections or channels that are looked at before others of the shard get their turn: that takes well below a
/// millisecond.
const LOOKS_A_TURN: usize = 4_096;

impl<T: Transport> Shard<T> {
    /// Does what a back end asks, and says what came of it.
    pub(super) async fn on_ask(self: &Rc<Self>, question: &Question) -> Answer {
        let answer = Answer { complete: true, ..Answer::default() };
        match &question.question {
            Some(Asked::Disconnect(disconnect)) => self.disconnect(disconnect, answer).await,
            Some(Asked::ListConnections(list)) => self.list_connections(&list.user, answer).await,
            Some(Asked::Subscribe(subscribe)) => {
                self.subscribe_user(&subscribe.user, &subscribe.channel, answer).await
            }
            Some(Asked::Unsubscribe(unsubscribe)) => self.unsubscribe_user(unsubscribe, answer).await,
            Some(Asked::ListChannels(list)) => self.list_channels(list, limit_of(question), answer).await,
            Some(Asked::Broadcast(broadcast)) => self.tell_everyone(broadcast, answer).await,
            Some(Asked::Describe(_)) | None => answer,
        }
    }

    /// The connections of a user that have said hello and are not closing.
    async fn connections_of(&self, user: &str) -> Vec<Rc<Connection<T>>> {
        let mut found = Vec::new();
        let is_of = |conn: &Connection<T>| {
            let machine = conn.machine.borrow();
            machine.is_identified() && **machine.user() == *user && conn.life.get() == Life::Open
        };
        self.look(|conn| {
            if is_of(conn) {
                found.push(Rc::clone(conn));
            }
        })
        .await;
        found
    }

    /// Looks at each connection, with turns for others in between. The call must not add or remove any.
    async fn look(&self, mut call: impl FnMut(&Rc<Connection<T>>)) {
        let mut from = 0;
        loop {
            let left = {
                let connections = self.connections.borrow();
                let to = from + LOOKS_A_TURN;
                (from..to).filter_map(|index| connections.get(index)).for_each(&mut call);
                from = to;
                from < connections.capacity()
            };
            if !left {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    async fn disconnect(self: &Rc<Self>, disconnect: &pb::Disconnect, mut answer: Answer) -> Answer {
        let mut connections = self.connections_of(&disconnect.user).await;
        if !disconnect.session.is_empty() {
            let is_it =
                |conn: &Connection<T>| conn.machine.borrow().session().as_bytes()[..] == disconnect.session;
            connections.retain(|conn| is_it(conn));
        }
        let code = if disconnect.reconnect { CloseCode::Restart } else { CloseCode::Forbidden };
        let reason = match disconnect.reason.as_str() {
            "" => "disconnected by the application",
            reason => reason,
        };
        let goaway = disconnect.reconnect.then(|| {
            let spread_ms = self.common.config.reconnect_spread_ms;
            let reason = reason.to_owned();
            push(Event::Goaway(Goaway { code: code.code(), reason, reconnect_after_ms: 0, spread_ms }))
        });
        for conn in &connections {
            if let Some(goaway) = &goaway {
                self.deliver(conn, goaway);
            }
            self.close(conn, code, reason, false);
        }
        answer.sessions = connections.len() as u64;
        answer.changed = answer.sessions;
        answer
    }

    async fn list_connections(&self, user: &str, mut answer: Answer) -> Answer {
        let connections = self.connections_of(user).await;
        answer.sessions = connections.len() as u64;
        answer.more = connections.len() > MAX_CONNECTIONS;
        let now_us = self.common.clock.now_us();
        let describe = |conn: &Rc<Connection<T>>| {
            let machine = conn.machine.borrow();
            let ticks = u64::from(self.now().saturating_sub(conn.opened));
            pb::Connection {
                session: machine.session().as_bytes().to_vec().into(),
                edge_id: String::new(),
                device: machine.device().to_owned(),
                client: machine.client().to_owned(),
                since_us: now_us.saturating_sub(ticks * TICK.as_micros() as u64),
                channels: machine.subscriptions().into(),
            }
        };
        answer.connections = connections.iter().take(MAX_CONNECTIONS).map(describe).collect();
        answer
    }

    async fn subscribe_user(self: &Rc<Self>, user: &str, channel: &str, mut answer: Answer) -> Answer {
        let mut connections = self.connections_of(user).await;
        // Before its `welcome` a client is not connected.
        connections.retain(|conn| conn.machine.borrow().is_ready());
        answer.sessions = connections.len() as u64;
        for conn in &connections {
            let index = conn.key.index;
            if self.hub.borrow().holds(index, channel) {
                continue;
            }
            if !conn.machine.borrow_mut().begin_subscription() {
                answer.refused += 1;
                continue;
            }
            let most = self.common.namespaces.of(channel).max_subscribers;
            let joined = self.hub.borrow_mut().join_within(most, index, BY_SERVER, channel);
            if joined == Join::Full {
                answer.refused += 1;
                Turn::once(self, conn, Input::Joined(BY_SERVER, Err(full(channel, most))));
                continue;
            }
            answer.changed += 1;
            match joined {
                Join::Member(top) => {
                    let subscribed = event::Subscribed {
                        channel: channel.to_owned(),
                        epoch: top.epoch.to_string(),
                        offset: top.offset,
                        ..event::Subscribed::default()
                    };
                    Turn::once(self, conn, Input::Joined(BY_SERVER, Ok(subscribed)));
                }
                Join::Waits { ask: Some(name) } => {
                    self.common.metrics.channels.inc();
                    self.upstream.link.send(LinkRequest::Subscribe(self.number, name));
                }
                Join::Waits { ask: None } | Join::Already | Join::Full => {}
            }
        }
        answer
    }

    async fn unsubscribe_user(self: &Rc<Self>, ended: &pb::UnsubscribeUser, mut answer: Answer) -> Answer {
        let connections = self.connections_of(&ended.user).await;
        answer.sessions = connections.len() as u64;
        for conn in &connections {
            let sought = self.cancel_seek(&ended.channel, conn.key);
            let left = self.hub.borrow_mut().leave(conn.key.index, &ended.channel);
            let Leave::Left { cancelled, last } = left else { continue };
            answer.changed += 1;
            self.forget_channel(last);
            let reason = match ended.reason.as_str() {
                "" => "unsubscribed by the application",
                reason => reason,
            };
            if let Some(id) = sought {
                // Its `subscribe` has no answer yet.
                let error = ErrorBody::new(ErrorCode::Forbidden, reason);
                let error = ErrorBody { retryable: ended.retryable, ..error };
                Turn::once(self, conn, Input::Recovered(id, Err(error)));
                continue;
            }
            let unsubscribed = Unsubscribed {
                channel: ended.channel.clone(),
                code: ErrorCode::Forbidden,
                reason: reason.to_owned(),
                retryable: ended.retryable,
            };
            Turn::once(self, conn, Input::Unsubscribed(cancelled, unsubscribed));
        }
        answer
    }

    /// The first channels in the order of their names, with their members.
    async fn list_channels(&self, list: &ListChannels, limit: usize, mut answer: Answer) -> Answer {
        let mut first: BTreeMap<Box<str>, u64> = BTreeMap::new();
        let mut from = 0;
        loop {
            let left = self.hub.borrow().look(from, LOOKS_A_TURN, |name, members| {
                if members == 0 || !name.starts_with(list.prefix.as_str()) || *name <= *list.after.as_str() {
                    return;
                }
                if first.len() > limit && first.last_key_value().is_some_and(|(last, _)| **last <= *name) {
                    return;
                }
                first.insert(name.into(), members as u64);
                // One more than asked for tells that there are more.
                if first.len() > limit + 1 {
                    first.pop_last();
                }
            });
            if !left {
                break;
            }
            from += LOOKS_A_TURN;
            tokio::task::yield_now().await;
        }
        answer.more = first.len() > limit;
        let count =
            |(channel, subscribers): (Box<str>, u64)| ChannelCount { channel: channel.into(), subscribers };
        answer.channels = first.into_iter().take(limit).map(count).collect();
        answer
    }

    /// A message for every client: encoded once. Who reads too slowly is passed over.
    async fn tell_everyone(&self, broadcast: &Broadcast, mut answer: Answer) -> Answer {
        let frame = push(Event::Broadcast(Box::new(event::Broadcast {
            message_id: sanjay_protocol::json::message_id(&broadcast.message_id),
            payload: broadcast.payload.clone().into(),
            time_us: broadcast.time_us,
        })));
        for keys in self.all().chunks(SOCKETS_A_TURN) {
            for conn in keys.iter().filter_map(|key| self.connection(*key)) {
                if !conn.machine.borrow().is_ready() || conn.life.get() != Life::Open {
                    continue;
                }
                answer.sessions += 1;
                if conn.waiting() <= MAX_WAITING_TO_READ && self.deliver(&conn, &frame) != Wrote::Gone {
                    answer.changed += 1;
                }
            }
            tokio::task::yield_now().await;
        }
        answer
    }

    /// Closes the connections of those who are refused now.
    pub(super) async fn check_revoked(&self) {
        let set = self.common.revocations.now();
        if set.is_empty() {
            return;
        }
        let mut refused = Vec::new();
        self.look(|conn| {
            let machine = conn.machine.borrow();
            if let Some(held) = machine.held()
                && let Some(why) = set.refuses(&held)
            {
                refused.push((Rc::clone(conn), why));
            }
        })
        .await;
        for (conn, why) in refused {
            if conn.life.get() == Life::Open {
                self.common.metrics.revoked.inc();
                self.close(&conn, CloseCode::Unauthorized, why, false);
            }
        }
    }

    /// Unsubscribes upstream when nobody here holds a channel any more.
    pub(super) fn forget_channel(&self, last: Option<std::sync::Arc<str>>) {
        if let Some(name) = last {
            self.common.metrics.channels.dec();
            self.upstream.link.send(LinkRequest::Unsubscribe(self.number, name));
        }
    }

    /// Why a client that says hello is refused, if it is.
    pub(super) fn is_revoked(&self, held: &Held<'_>) -> Option<&'static str> {
        self.common.revocations.refuses(held)
    }
}
