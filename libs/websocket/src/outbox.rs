//! The bytes that a socket would not take yet, in order; nothing at all while the socket keeps up.

use crate::transport::Transport;
use bytes::{Buf, Bytes};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};

/// Frames in one vectored write: enough that the system call stops mattering, and a kilobyte of stack.
const MAX_SLICES: usize = 64;

/// What became of frames that were sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Sent {
    /// The transport took all of them.
    All,
    /// Some bytes wait in the outbox: call [`Outbox::flush`] when the transport is writable.
    Queued,
}

/// What a flush achieved.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Flushed {
    /// Bytes that the transport took.
    pub wrote: usize,
    /// Whether nothing is left. Otherwise the transport answered that it would block.
    pub empty: bool,
}

/// An ordered queue of encoded frames in front of a transport: one pointer, which is null while nothing waits.
///
/// The outbox sets no limit of its own; the owner compares [`Outbox::bytes`] with one after each send. After an
/// I/O error the connection is lost, and what the outbox holds with it.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: Option<Box<Queue>>,
}

#[derive(Debug, Default)]
struct Queue {
    /// Never empty, and no frame in it is.
    frames: VecDeque<Bytes>,
    bytes: usize,
    /// Whether a part of the first frame has been written already.
    begun: bool,
}

impl Outbox {
    /// An outbox with nothing in it.
    pub const fn new() -> Self {
        Self { queue: None }
    }

    /// Whether nothing waits.
    pub const fn is_empty(&self) -> bool {
        self.queue.is_none()
    }

    /// Bytes that wait.
    pub fn bytes(&self) -> usize {
        self.queue.as_ref().map_or(0, |queue| queue.bytes)
    }

    /// Writes whole frames at once when nothing is queued, and queues what the transport did not take.
    ///
    /// Behind frames that already wait it only queues, without a system call.
    pub fn send(&mut self, io: &impl Transport, frames: &[Bytes]) -> io::Result<Sent> {
        let mut rest = frames;
        let mut written = 0;
        if self.queue.is_none() {
            while !rest.is_empty() {
                let (batch, after) = rest.split_at(rest.len().min(MAX_SLICES));
                let size = batch.iter().map(Bytes::len).sum();
                written = write(io, batch.iter())?;
                if written < size {
                    break;
                }
                written = 0;
                rest = after;
            }
        }
        for frame in rest {
            let skip = written.min(frame.len());
            written -= skip;
            self.push(frame, skip);
        }
        Ok(self.state())
    }

    /// [`Outbox::send`] for one frame: the path of a fan-out, which allocates nothing while the transport keeps up.
    pub fn send_one(&mut self, io: &impl Transport, frame: &Bytes) -> io::Result<Sent> {
        let written =
            if self.queue.is_none() && !frame.is_empty() { attempt(|| io.try_write(frame))? } else { 0 };
        self.push(frame, written);
        Ok(self.state())
    }

    /// Writes until nothing is left or the transport would block.
    pub fn flush(&mut self, io: &impl Transport) -> io::Result<Flushed> {
        let mut wrote = 0;
        while let Some(queue) = &mut self.queue {
            let written = write(io, queue.frames.iter())?;
            if written == 0 {
                break;
            }
            wrote += written;
            queue.advance(written);
            if queue.frames.is_empty() {
                self.queue = None;
            }
        }
        Ok(Flushed { wrote, empty: self.queue.is_none() })
    }

    /// Drops every frame that has not begun to be written and keeps the rest of one that has, so that a close
    /// frame may follow where a frame may begin.
    pub fn truncate_to_boundary(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        if !queue.begun {
            self.queue = None;
            return;
        }
        queue.frames.truncate(1);
        queue.frames.shrink_to_fit();
        queue.bytes = queue.frames.iter().map(Bytes::len).sum();
    }

    /// Queues what is left of a frame after its first `written` bytes.
    fn push(&mut self, frame: &Bytes, written: usize) {
        if written == frame.len() {
            return;
        }
        let queue = self.queue.get_or_insert_default();
        if queue.frames.is_empty() {
            queue.begun = written > 0;
        }
        queue.bytes += frame.len() - written;
        queue.frames.push_back(frame.slice(written..));
    }

    const fn state(&self) -> Sent {
        if self.queue.is_none() { Sent::All } else { Sent::Queued }
    }
}

impl Queue {
    /// Removes bytes that were written.
    fn advance(&mut self, mut written: usize) {
        self.bytes -= written;
        while let Some(front) = self.frames.front_mut() {
            if written < front.len() {
                front.advance(written);
                self.begun |= written > 0;
                return;
            }
            written -= front.len();
            self.frames.pop_front();
            self.begun = false;
        }
    }
}

/// One vectored write of up to [`MAX_SLICES`] frames; 0 when the transport would block or there is nothing to write.
fn write<'a>(io: &impl Transport, frames: impl Iterator<Item = &'a Bytes>) -> io::Result<usize> {
    let mut slices = [IoSlice::new(&[]); MAX_SLICES];
    let mut count = 0;
    for (slice, frame) in slices.iter_mut().zip(frames.filter(|frame| !frame.is_empty())) {
        *slice = IoSlice::new(frame);
        count += 1;
    }
    match &slices[..count] {
        [] => Ok(0),
        [one] => attempt(|| io.try_write(one)),
        many => attempt(|| io.try_write_vectored(many)),
    }
}

/// Tries a write of at least one byte; 0 when it would block.
fn attempt(mut write: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match write() {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(written) => return Ok(written),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(0),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
