//! What becomes of a connection's inbox messages: handed to the socket, taken by it, answered, or not answered in time;
//! and what delivery is told of it.

use std::{rc::Rc, time::Duration};

use sanjay_proto::edge::v1::{FailedAttempt, FailureKind};
use sanjay_websocket::Transport;

use super::{
    Shard,
    deadlines::{LOOK_AGAIN, after},
    effects::Turn,
    wheel::Tick,
};
use crate::{
    connection::{Connection, NEVER, Wrote, machine::Input},
    in_flight::Written,
    upstream::AckRequest,
};

/// How long after a push it is reported as written, unless an ack came first, which says more. Well below the
/// time after which delivery relays an unreported message again.
pub(super) const REPORT_AFTER: Duration = Duration::from_millis(500);

impl<T: Transport> Shard<T> {
    /// When an ack deadline that begins now ends: not before it is over, although this tick began a while ago.
    pub(super) fn ack_due(&self) -> Tick {
        after(self.now(), self.common.config.ack_deadline()).saturating_add(1)
    }

    /// A frame with so many inbox messages was handed to the socket.
    pub(super) fn on_handed(&self, conn: &Connection<T>, count: u64, wrote: Wrote) {
        let written = match wrote {
            Wrote::All => Written::Until(self.ack_due()),
            Wrote::Waits => Written::After(u32::try_from(conn.waiting()).unwrap_or(u32::MAX)),
            Wrote::Gone => return,
        };
        if count > 0
            && let Some(cursor) = conn.machine.borrow_mut().inbox_mut()
        {
            cursor.on_handed(count, written);
        }
    }

    /// The socket has taken bytes that waited for it.
    pub fn on_taken(&self, conn: &Connection<T>, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        let due = self.ack_due();
        let begun = conn.machine.borrow_mut().inbox_mut().is_some_and(|cursor| cursor.on_taken(bytes, due));
        if begun {
            self.schedule(conn);
        }
    }

    /// When to look at answers of which the first is due at `due`.
    pub(super) fn answers_due(&self, conn: &Connection<T>, due: Tick) -> Tick {
        if conn.has_backlog() {
            // The answer may be in it; whoever takes the last of it looks again.
            NEVER
        } else if !self.upstream.acks.has_room() {
            after(self.now(), LOOK_AGAIN)
        } else if due <= conn.heard.get() {
            self.now()
        } else if conn.pinged.get() == NEVER {
            due
        } else {
            // Whatever arrives has it looked at, and nothing does when the client is gone.
            NEVER
        }
    }

    /// Looks at the ack deadlines. A client that is silent has to show first that it lives: one that is not there, or
    /// whose answers lie unread in the socket, has failed at nothing.
    pub(super) fn check_answers(self: &Rc<Self>, conn: &Rc<Connection<T>>) {
        let due = conn.machine.borrow().inbox().and_then(|cursor| cursor.next_due());
        let Some(due) = due.filter(|due| self.answers_due(conn, *due) <= self.now()) else { return };
        let heard = conn.heard.get();
        if due <= heard {
            Turn::once(self, conn, Input::Alive(heard));
        } else {
            self.ping(conn);
        }
    }

    /// A client acknowledged messages.
    pub(super) fn ack(
        &self,
        conn: &Connection<T>,
        id: Option<u64>,
        epoch: u64,
        ranges: Vec<(u64, u64)>,
        trace: String,
    ) {
        // What was acked reached the client, whatever may wait for the socket now.
        let written = ranges.iter().map(|(_, to)| *to).max().unwrap_or_default();
        let waiter = Some((conn.key, id));
        let shared = self.is_shared(conn.machine.borrow().user());
        self.upstream.acks.send(AckRequest {
            waiter,
            ranges,
            written,
            trace,
            shared,
            ..request(conn, epoch)
        });
    }

    /// Deliveries failed. `id`: of the command that says so, which is answered; `None`: the ack deadline did.
    pub(super) fn fail(
        &self,
        conn: &Connection<T>,
        id: Option<Option<u64>>,
        epoch: u64,
        failed: Vec<FailedAttempt>,
    ) {
        let metrics = &self.common.metrics;
        for attempt in &failed {
            match attempt.kind() {
                FailureKind::Nak => metrics.naks.inc(),
                FailureKind::Term => metrics.terms.inc(),
                FailureKind::Deadline | FailureKind::Unspecified => metrics.ack_deadlines.inc(),
            };
        }
        // These reached the client, and so did what was pushed before them.
        let written = failed.iter().map(|attempt| attempt.seq).max().unwrap_or_default();
        let waiter = id.map(|id| (conn.key, id));
        self.upstream.acks.send(AckRequest { waiter, written, failed, ..request(conn, epoch) });
    }

    /// Tells delivery what reached the socket, so that it need not relay it again.
    pub(super) fn report_written(&self, conn: &Connection<T>) {
        conn.report_due.set(NEVER);
        if conn.waiting() > 0 {
            return conn.report_due.set(after(self.now(), LOOK_AGAIN));
        }
        let mut machine = conn.machine.borrow_mut();
        let Some((cursor, epoch)) = machine.inbox_mut().and_then(|cursor| {
            let epoch = cursor.epoch()?;
            Some((cursor, epoch))
        }) else {
            return;
        };
        let (last, rewritten) = (cursor.last(), cursor.rewritten());
        if last < conn.reported.get() {
            // Another inbox, which counts from 1 again.
            conn.reported.set(0);
        }
        let is_news = cursor.has_in_flight() && last > conn.reported.get();
        drop(machine);
        if is_news {
            conn.reported.set(last);
        }
        if is_news || !rewritten.is_empty() {
            let written = conn.reported.get();
            self.upstream.acks.send(AckRequest { written, rewritten, ..request(conn, epoch) });
        }
    }
}

/// A request that says nothing yet.
fn request<T>(conn: &Connection<T>, epoch: u64) -> AckRequest {
    let machine = conn.machine.borrow();
    AckRequest {
        waiter: None,
        user: machine.user().to_string(),
        device: machine.device().to_owned(),
        epoch,
        ranges: Vec::new(),
        written: 0,
        rewritten: Vec::new(),
        failed: Vec::new(),
        session: machine.session(),
        trace: String::new(),
        shared: false,
    }
}

#[cfg(test)]
#[path = "answers_tests.rs"]
mod tests;
