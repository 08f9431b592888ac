//! What a shard does when time passes: heartbeats, time-outs, and what waits for a moment.

use std::{rc::Rc, time::Duration};

use sanjay_protocol::{CloseCode, Event, EventEnvelope, json};
use sanjay_websocket::{Opcode, Transport, encode_into};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{
    Shard,
    effects::Turn,
    wheel::{TICK, Tick, Wheel},
};
use crate::{
    connection::{Connection, Life, MAX_WAITING_TO_READ, NEVER, machine::Input},
    inbox::Cursor,
    upstream::ConnKey,
};

/// How often the wall clock is looked at for tokens that end.
const TOKEN_CHECK: Duration = Duration::from_secs(1);

/// How often what is waited for (an outbox that empties) is looked at again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(500);

impl<T: Transport> Shard<T> {
    /// Moves the shard's time on. Never ends.
    pub async fn tick(self: Rc<Self>) {
        let mut ticker = interval(TICK);
        ticker.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut due = Vec::new();
        loop {
            ticker.tick().await;
            let now = self.wheel.borrow().tick(Instant::now());
            self.now.set(now);
            self.wheel.borrow_mut().advance(now, &mut due);
            for key in due.drain(..) {
                if let Some(conn) = self.connection(key) {
                    self.on_due(&conn);
                }
            }
            self.relieve();
            self.announce_some();
            self.report_milestones();
            self.report_connections();
        }
    }

    fn on_due(self: &Rc<Self>, conn: &Rc<Connection<T>>) {
        if conn.scheduled.get() > self.now() {
            // An entry that nobody counts on any more.
            return;
        }
        conn.scheduled.set(conn.later.replace(NEVER));
        match conn.life.get() {
            Life::Open => self.check_open(conn),
            Life::Closing | Life::Finishing if conn.drop_due.get() <= self.now() => conn.die(),
            Life::Closing | Life::Finishing => {}
            Life::Dead => return,
        }
        self.schedule(conn);
    }

    fn check_open(self: &Rc<Self>, conn: &Rc<Connection<T>>) {
        let now = self.now();
        let config = &self.common.config;
        let (identified, looking_up) = {
            let machine = conn.machine.borrow();
            (machine.is_identified(), machine.is_looking_up())
        };
        if looking_up && after(conn.opened, config.hello_timeout()) <= now {
            let why = "the token's key could not be looked up in time; try again in a few seconds";
            return self.close(conn, CloseCode::TryAgainLater, why, false);
        }
        if !identified && after(conn.opened, config.hello_timeout()) <= now {
            return self.close(conn, CloseCode::TooSlow, "no hello in time", false);
        }
        if identified && self.check_tokens(conn) {
            return;
        }
        if conn.waiting() > 0 && after(conn.progress.get(), config.stall_timeout()) <= now {
            let why = "nothing that waits was read for too long";
            return self.close(conn, CloseCode::SlowConsumer, why, true);
        }
        if conn.pinged.get() != NEVER {
            if after(conn.pinged.get(), config.heartbeat_grace()) <= now {
                if !conn.has_backlog() && conn.waiting() <= MAX_WAITING_TO_READ {
                    return self.close(conn, CloseCode::TooSlow, "no answer to a heartbeat", true);
                }
                // It is not read while its commands wait, or while it takes what waits for it, so that its answer
                // may lie unread. The client is to see that the edge lives; one that takes nothing stalls.
                self.ping(conn);
            }
        } else if after(conn.heard.get(), config.heartbeat()) <= now {
            self.ping(conn);
        }
        self.check_answers(conn);
        if conn.inbox_due.get() <= now {
            conn.inbox_due.set(NEVER);
            Turn::once(self, conn, Input::InboxTimer);
        }
        if conn.report_due.get() <= now {
            self.report_written(conn);
        }
    }

    /// Both kinds of ping in one write: browsers see only the envelope, other clients answer only the frame.
    pub(super) fn ping(&self, conn: &Connection<T>) {
        let mut frames = Vec::with_capacity(8);
        let mut envelope = Vec::with_capacity(2);
        json::encode(&EventEnvelope { id: None, event: Event::Ping }, &mut envelope);
        encode_into(Opcode::Text, &envelope, &mut frames);
        encode_into(Opcode::Ping, &[], &mut frames);
        conn.pinged.set(self.now());
        self.common.metrics.sent_bytes.inc_by(frames.len() as u64);
        conn.send(&frames.into(), self.now());
        if conn.waiting() > 0 {
            conn.wake();
        }
    }

    /// When the connection must be looked at next.
    pub(super) fn next_deadline(&self, conn: &Connection<T>) -> Tick {
        let config = &self.common.config;
        match conn.life.get() {
            Life::Open => {}
            Life::Closing | Life::Finishing => return conn.drop_due.get(),
            Life::Dead => return NEVER,
        }
        let machine = conn.machine.borrow();
        let mut next = match conn.pinged.get() {
            NEVER => after(conn.heard.get(), config.heartbeat()),
            pinged => after(pinged, config.heartbeat_grace()),
        };
        if !machine.is_identified() {
            next = next.min(after(conn.opened, config.hello_timeout()));
        } else {
            let left_s = self.tokens_due_s(conn);
            next = next.min(after(self.now(), Duration::from_secs(left_s).max(TOKEN_CHECK)));
        }
        if conn.waiting() > 0 {
            next = next.min(after(conn.progress.get(), config.stall_timeout()));
        }
        if let Some(due) = machine.inbox().and_then(Cursor::next_due) {
            next = next.min(self.answers_due(conn, due));
        }
        next.min(conn.inbox_due.get()).min(conn.report_due.get())
    }
}

pub(super) fn after(tick: Tick, time: Duration) -> Tick {
    Wheel::<ConnKey>::after(tick, time)
}
