//! What happens to a shard's connections, for back ends that watch: nothing is noted while nobody does.

use std::rc::Rc;

use sanjay_proto::edge::v1::{ConnectionEvent, ConnectionEventKind as Kind};
use sanjay_websocket::Transport;

use super::Shard;
use crate::{
    connection::{
        Connection,
        machine::{Input, Machine},
    },
    upstream::LinkRequest,
};

/// Events that wait to be sent; more are dropped.
const MAX_WAITING: usize = 1_024;

/// What happened to a connection.
pub(super) enum Happened<'a> {
    /// It was welcomed.
    Online,
    /// It ended, after this close code of the edge; 0 for none.
    Offline(u16),
    /// It is subscribed to this channel.
    Subscribed(&'a str),
    /// It is not any more.
    Unsubscribed(&'a str),
}

impl<T: Transport> Shard<T> {
    /// Notes what happened, for whoever watches.
    pub(super) fn note(&self, machine: &Machine, happened: Happened<'_>) {
        let mut waiting = self.happened.borrow_mut();
        if waiting.events.len() >= MAX_WAITING {
            waiting.missed += 1;
            return;
        }
        let mut event = ConnectionEvent {
            time_us: self.common.clock.now_us(),
            user: machine.user().to_string(),
            session: machine.session().as_bytes().to_vec().into(),
            ..ConnectionEvent::default()
        };
        let kind = match happened {
            Happened::Online => {
                machine.device().clone_into(&mut event.device);
                machine.client().clone_into(&mut event.client);
                Kind::Online
            }
            Happened::Offline(code) => {
                event.code = code.into();
                Kind::Offline
            }
            Happened::Subscribed(channel) => {
                channel.clone_into(&mut event.channel);
                Kind::Subscribed
            }
            Happened::Unsubscribed(channel) => {
                channel.clone_into(&mut event.channel);
                Kind::Unsubscribed
            }
        };
        event.set_kind(kind);
        waiting.events.push(event);
    }

    /// Notes what an input says, while somebody watches.
    pub(super) fn note_input(&self, conn: &Rc<Connection<T>>, input: &Input) {
        let machine = conn.machine.borrow();
        match input {
            Input::Joined(_, Ok(subscribed)) => {
                self.note(&machine, Happened::Subscribed(&subscribed.channel));
            }
            Input::Unsubscribed(None, unsubscribed) => {
                self.note(&machine, Happened::Unsubscribed(&unsubscribed.channel));
            }
            _ => {}
        }
    }

    /// Notes that a connection goes on in a channel, while somebody watches.
    pub(super) fn note_recovered(&self, conn: &Connection<T>, channel: &str) {
        if self.watched.get() {
            self.note(&conn.machine.borrow(), Happened::Subscribed(channel));
        }
    }

    /// Sends what was noted, as far as there is room.
    pub(super) fn report_connections(&self) {
        let mut waiting = self.happened.borrow_mut();
        if waiting.events.is_empty() && waiting.missed == 0 {
            return;
        }
        if !self.watched.get() {
            *waiting = Default::default();
        } else if self.upstream.link.has_room() {
            self.upstream.link.send(LinkRequest::Connections(std::mem::take(&mut *waiting)));
        } else {
            waiting.missed += waiting.events.len() as u64;
            waiting.events.clear();
        }
    }
}
