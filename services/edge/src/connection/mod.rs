//! One client's connection: its socket, what waits for the socket, and its protocol state.

pub mod machine;
pub mod session;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    io,
    task::Waker,
};

use bytes::Bytes;
use sanjay_protocol::{CloseCode, command::Envelope, json::Refused};
use sanjay_websocket::{Outbox, Sent, Transport, encode_close};

use self::machine::Machine;
use crate::{shard::wheel::Tick, upstream::ConnKey};

/// Bytes that may wait for a socket before its connection is not read any more: who does not take its answers
/// gets no further ones.
pub const MAX_WAITING_TO_READ: usize = 64 * 1024;

/// No deadline.
pub const NEVER: Tick = Tick::MAX;

/// Commands in the order in which they came.
pub type Backlog = VecDeque<Result<Envelope, Refused>>;

/// Where a connection is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Frames go both ways.
    Open,
    /// A close frame was sent: what still comes is not looked at.
    Closing,
    /// The client has closed too: only what waits is still written.
    Finishing,
    /// The socket failed, or its time is up.
    Dead,
}

/// A connection of a shard. Everything in it belongs to the shard's thread.
pub struct Connection<T> {
    /// Who it is.
    pub key: ConnKey,
    /// The socket.
    pub io: T,
    /// What the socket would not take yet.
    pub out: RefCell<Outbox>,
    /// The protocol's state.
    pub machine: RefCell<Machine>,
    /// Commands that the machine could not take yet. While there are any the socket is not read.
    pub backlog: RefCell<Option<Box<Backlog>>>,
    /// A read of the inbox that waits until the socket has taken what waits: (after, limit).
    pub deferred_read: Cell<Option<(Option<u64>, u32)>>,
    /// Whether the shard will look at the backlog again when there is room upstream.
    pub waits_for_room: Cell<bool>,
    /// The session's task.
    pub waker: RefCell<Option<Waker>>,
    /// Where it is in its life.
    pub life: Cell<Life>,
    /// When it was upgraded.
    pub opened: Tick,
    /// When the last byte arrived.
    pub heard: Cell<Tick>,
    /// When it was pinged without a byte since; [`NEVER`] otherwise.
    pub pinged: Cell<Tick>,
    /// When the socket last took something while something waited.
    pub progress: Cell<Tick>,
    /// When the inbox wants to be called; [`NEVER`] otherwise.
    pub inbox_due: Cell<Tick>,
    /// When what was written of the inbox is to be reported; [`NEVER`] otherwise.
    pub report_due: Cell<Tick>,
    /// What was reported.
    pub reported: Cell<u64>,
    /// When a closing connection is dropped; [`NEVER`] before.
    pub drop_due: Cell<Tick>,
    /// The earliest entry in the wheel.
    pub scheduled: Cell<Tick>,
    /// The next entry after it; [`NEVER`] when there is none.
    pub later: Cell<Tick>,
    /// The close code that was sent; 0 when none was.
    pub close_code: Cell<u16>,
}

/// What became of bytes for a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wrote {
    /// The socket took them.
    All,
    /// They wait: the connection's task must be woken and its progress watched.
    Waits,
    /// The connection takes none any more.
    Gone,
}

impl<T: Transport> Connection<T> {
    /// A connection that was just upgraded.
    pub fn new(key: ConnKey, io: T, machine: Machine, now: Tick) -> Self {
        Self {
            key,
            io,
            out: RefCell::new(Outbox::new()),
            machine: RefCell::new(machine),
            backlog: RefCell::new(None),
            deferred_read: Cell::new(None),
            waits_for_room: Cell::new(false),
            waker: RefCell::new(None),
            life: Cell::new(Life::Open),
            opened: now,
            heard: Cell::new(now),
            pinged: Cell::new(NEVER),
            progress: Cell::new(now),
            inbox_due: Cell::new(NEVER),
            report_due: Cell::new(NEVER),
            reported: Cell::new(0),
            drop_due: Cell::new(NEVER),
            scheduled: Cell::new(NEVER),
            later: Cell::new(NEVER),
            close_code: Cell::new(0),
        }
    }

    /// Writes a frame, or has it wait for the socket.
    pub fn send(&self, frame: &Bytes, now: Tick) -> Wrote {
        if self.life.get() != Life::Open {
            return Wrote::Gone;
        }
        self.write(frame, now)
    }

    fn write(&self, frame: &Bytes, now: Tick) -> Wrote {
        let mut out = self.out.borrow_mut();
        let waited = !out.is_empty();
        match out.send_one(&self.io, frame) {
            Ok(Sent::All) => Wrote::All,
            Ok(Sent::Queued) => {
                if !waited {
                    self.progress.set(now);
                }
                Wrote::Waits
            }
            Err(_) => {
                drop(out);
                self.die();
                Wrote::Gone
            }
        }
    }

    /// Writes what waits. Returns how many bytes the socket took.
    ///
    /// # Errors
    /// When the socket failed.
    pub fn flush(&self, now: Tick) -> io::Result<usize> {
        let flushed = self.out.borrow_mut().flush(&self.io)?;
        if flushed.wrote > 0 {
            self.progress.set(now);
        }
        Ok(flushed.wrote)
    }

    /// Bytes that wait for the socket.
    pub fn waiting(&self) -> usize {
        self.out.borrow().bytes()
    }

    /// Sends a close frame behind what waits, or, with `at_once`, instead of it.
    pub fn close(&self, code: CloseCode, why: &str, at_once: bool, now: Tick, drop_due: Tick) {
        if self.life.get() != Life::Open {
            return;
        }
        if at_once {
            self.out.borrow_mut().truncate_to_boundary();
        }
        self.close_code.set(code.code());
        self.life.set(Life::Closing);
        self.begin_close(&encode_close(code.code(), why), now, drop_due);
        self.wake();
    }

    /// Answers a client's close frame.
    pub fn answer_close(&self, frame: &Bytes, now: Tick, drop_due: Tick) {
        match self.life.get() {
            Life::Open => {
                self.life.set(Life::Finishing);
                self.begin_close(frame, now, drop_due);
            }
            Life::Closing => self.life.set(Life::Finishing),
            Life::Finishing | Life::Dead => {}
        }
    }

    fn begin_close(&self, frame: &Bytes, now: Tick, drop_due: Tick) {
        *self.backlog.borrow_mut() = None;
        self.drop_due.set(drop_due);
        self.write(frame, now);
    }

    /// The socket failed, or its time is up.
    pub fn die(&self) {
        self.life.set(Life::Dead);
        self.wake();
    }

    /// Has the session's task look again.
    pub fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Whether commands wait that the machine could not take yet.
    pub fn has_backlog(&self) -> bool {
        self.backlog.borrow().is_some()
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpStream;

    use super::*;

    /// What each idle connection costs beside its task and its file: growth here is paid 50,000 times.
    #[test]
    fn an_idle_connection_is_small() {
        let sizes = [
            ("machine", size_of::<Machine>(), 96),
            ("connection", size_of::<Connection<TcpStream>>(), 288),
            ("cursor", size_of::<crate::inbox::Cursor>(), 72),
        ];
        for (name, size, most) in sizes {
            assert!(size <= most, "{name}: {size} bytes, more than {most}");
        }
    }
}
