//! What a shard does about tokens: who waits for a key, whose token has ended, and subscriptions that end with one.

use std::rc::Rc;

use sanjay_protocol::{CloseCode, ErrorBody};
use sanjay_websocket::Transport;

use super::{Shard, effects::Turn};
use crate::{
    connection::{Connection, Life, machine::Input},
    upstream::ConnKey,
};

/// Connections of a shard that may wait for the key of their token: with the largest tokens they hold 8 MiB.
const MAX_WAITING: usize = 2_048;

/// Tokens that are checked before other connections of the shard get their turn: each takes some 50 µs.
const CHECKS_A_TURN: usize = 64;

impl<T: Transport> Shard<T> {
    /// Has a connection told when keys were looked up; without room it is closed, to come back later.
    pub(super) fn await_keys(&self, key: ConnKey) -> Option<Input> {
        let mut waiting = self.awaiting_keys.borrow_mut();
        if waiting.len() >= MAX_WAITING {
            waiting.retain(|key| {
                self.connection(*key).is_some_and(|conn| conn.machine.borrow().is_looking_up())
            });
        }
        if waiting.len() >= MAX_WAITING {
            return Some(Input::NoRoomToWait);
        }
        waiting.push(key);
        None
    }

    /// Keys were looked up: whoever waits is answered.
    pub(super) async fn on_keys(self: &Rc<Self>) {
        let waiting = self.awaiting_keys.take();
        for keys in waiting.chunks(CHECKS_A_TURN) {
            for conn in keys.iter().filter_map(|key| self.connection(*key)) {
                if conn.life.get() == Life::Open {
                    Turn::once(self, &conn, Input::KeysLookedUp);
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Looks at the tokens of a connection. True: it is closed for one.
    pub(super) fn check_tokens(self: &Rc<Self>, conn: &Rc<Connection<T>>) -> bool {
        let now_s = self.common.clock.now_s();
        let (expires_s, grant_s) = {
            let machine = conn.machine.borrow();
            (machine.expires_s(), machine.first_grant_ends_s())
        };
        if grant_s.is_some_and(|grant_s| grant_s <= now_s) {
            Turn::once(self, conn, Input::GrantsEnded);
        }
        if expires_s > now_s {
            return false;
        }
        let closes_s = expires_s.saturating_add(self.common.config.token_grace_s);
        if closes_s <= now_s {
            self.common.metrics.tokens.expired.inc();
            self.close(conn, CloseCode::TokenExpired, "the token has expired; get a new one", false);
            return true;
        }
        if !conn.machine.borrow().is_expired() {
            Turn::once(self, conn, Input::TokenEnded { close_in_s: closes_s - now_s });
        }
        false
    }

    /// Seconds until the tokens of a connection are to be looked at.
    pub(super) fn tokens_due_s(&self, conn: &Connection<T>) -> u64 {
        let machine = conn.machine.borrow();
        let mut due_s = machine.expires_s();
        if machine.is_expired() {
            due_s = due_s.saturating_add(self.common.config.token_grace_s);
        }
        let due_s = machine.first_grant_ends_s().map_or(due_s, |grant_s| grant_s.min(due_s));
        due_s.saturating_sub(self.common.clock.now_s())
    }

    /// The channels of a connection, those that wait for the router too.
    pub(super) fn channels_of(&self, conn: &Connection<T>) -> Vec<Rc<str>> {
        self.hub.borrow().channels_of(conn.key.index)
    }
}

impl<T: Transport> Turn<'_, T> {
    /// Ends a subscription without the client's asking. One that was not confirmed yet fails instead.
    pub(super) fn end_subscription(&mut self, channel: String, error: ErrorBody) -> Option<Input> {
        match self.leave(None, &channel) {
            Input::Left(_, Ok(())) => Some(Input::Ended(channel, error)),
            _ => None,
        }
    }
}
