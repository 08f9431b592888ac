//! A bounded queue whose senders never wait, with two lanes of admission and one order.
//!
//! The droppable lane refuses when the mailbox is full, so that a slow reader costs messages rather than
//! memory. The reserved lane is for what must not be lost, such as a reply: it is never refused for
//! capacity, and the caller bounds it by what can be outstanding. Both lanes share one queue, so a reply
//! never overtakes what was sent before it.

use std::{
    collections::VecDeque,
    fmt,
    future::poll_fn,
    mem,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use parking_lot::Mutex;
use thiserror::Error;
use tokio::task::coop;
use tokio_util::sync::CancellationToken;

/// Makes a mailbox whose droppable lane is refused while `capacity` messages (of both lanes) wait.
#[must_use]
pub fn mailbox<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let shared = Arc::new(Shared {
        capacity,
        state: Mutex::new(State { queue: VecDeque::new(), senders: 1, closed: false, reader: None }),
        gone: CancellationToken::new(),
    });
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

struct Shared<T> {
    capacity: usize,
    state: Mutex<State<T>>,
    /// Cancelled when the receiver is dropped.
    gone: CancellationToken,
}

struct State<T> {
    queue: VecDeque<T>,
    senders: usize,
    closed: bool,
    reader: Option<Waker>,
}

/// Why a droppable message was not taken; it comes back.
#[derive(Error)]
pub enum TrySendError<T> {
    /// The reader is behind.
    #[error("the mailbox is full")]
    Full(T),
    /// The reader is gone.
    #[error("the mailbox is closed")]
    Closed(T),
}

impl<T> TrySendError<T> {
    /// The message.
    pub fn into_inner(self) -> T {
        match self {
            Self::Full(message) | Self::Closed(message) => message,
        }
    }

    /// Whether the reader is behind rather than gone.
    #[must_use]
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Full(_))
    }
}

impl<T> fmt::Debug for TrySendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_full() { "Full(..)" } else { "Closed(..)" })
    }
}

/// The reader is gone; the message comes back.
#[derive(Error)]
#[error("the mailbox is closed")]
pub struct Closed<T>(pub T);

impl<T> fmt::Debug for Closed<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Closed(..)")
    }
}

/// The sending side. Clones send to the same mailbox; it ends when all are dropped and all was read.
pub struct Sender<T>(Arc<Shared<T>>);

impl<T> Sender<T> {
    /// Sends on the droppable lane.
    ///
    /// # Errors
    /// [`TrySendError::Full`] while `capacity` messages wait, [`TrySendError::Closed`] once the reader is gone.
    pub fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
        let mut state = self.0.state.lock();
        if state.closed {
            return Err(TrySendError::Closed(message));
        }
        if state.queue.len() >= self.0.capacity {
            return Err(TrySendError::Full(message));
        }
        state.queue.push_back(message);
        wake(state.reader.take(), state);
        Ok(())
    }

    /// Sends on the reserved lane, whatever waits already. The caller must bound what can be outstanding.
    ///
    /// # Errors
    /// [`Closed`] once the reader is gone.
    pub fn send_reserved(&self, message: T) -> Result<(), Closed<T>> {
        let mut state = self.0.state.lock();
        if state.closed {
            return Err(Closed(message));
        }
        state.queue.push_back(message);
        wake(state.reader.take(), state);
        Ok(())
    }

    /// How many messages wait, of both lanes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.state.lock().queue.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many messages may wait before the droppable lane refuses.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.0.capacity
    }

    /// Whether the reader is gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.gone.is_cancelled()
    }

    /// Waits until the reader is gone.
    pub async fn closed(&self) {
        self.0.gone.cancelled().await;
    }
}

/// Wakes the reader after the lock is released, so that it does not run into it.
fn wake<G>(reader: Option<Waker>, state: G) {
    drop(state);
    if let Some(reader) = reader {
        reader.wake();
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.state.lock().senders += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.senders -= 1;
        if state.senders == 0 {
            wake(state.reader.take(), state);
        }
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").field("len", &self.len()).field("capacity", &self.0.capacity).finish()
    }
}

/// The reading side. Dropping it closes the mailbox and drops what waits.
pub struct Receiver<T>(Arc<Shared<T>>);

impl<T> Receiver<T> {
    /// Appends what waits to `buffer`, at most `limit` messages (0 counts as 1), and waits when nothing does.
    /// Returns how many; 0 once every sender is gone and all was read. Nothing is lost when the future is
    /// dropped.
    pub async fn recv_many(&mut self, buffer: &mut Vec<T>, limit: usize) -> usize {
        poll_fn(|cx| self.poll_recv_many(cx, buffer, limit)).await
    }

    /// [`Receiver::recv_many`] as a poll.
    pub fn poll_recv_many(&mut self, cx: &mut Context<'_>, buffer: &mut Vec<T>, limit: usize) -> Poll<usize> {
        // A mailbox that is always full must still let the task's neighbours run.
        let budget = std::task::ready!(coop::poll_proceed(cx));
        let mut state = self.0.state.lock();
        let taken = take(&mut state.queue, buffer, limit);
        if taken == 0 && state.senders > 0 {
            let stale = match &state.reader {
                Some(reader) if reader.will_wake(cx.waker()) => None,
                _ => state.reader.replace(cx.waker().clone()),
            };
            drop(state);
            drop(stale);
            return Poll::Pending;
        }
        drop(state);
        budget.made_progress();
        Poll::Ready(taken)
    }

    /// Appends what waits to `buffer`, at most `limit` messages (0 counts as 1), without waiting. Returns how
    /// many; 0 also while senders are there.
    pub fn try_recv_many(&mut self, buffer: &mut Vec<T>, limit: usize) -> usize {
        take(&mut self.0.state.lock().queue, buffer, limit)
    }

    /// How many messages wait, of both lanes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.state.lock().queue.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn take<T>(queue: &mut VecDeque<T>, buffer: &mut Vec<T>, limit: usize) -> usize {
    let taken = queue.len().min(limit.max(1));
    buffer.extend(queue.drain(..taken));
    taken
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.closed = true;
        state.reader = None;
        let left = mem::take(&mut state.queue);
        drop(state);
        // Messages may hold senders of this very mailbox: they are dropped outside the lock.
        drop(left);
        self.0.gone.cancel();
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").field("len", &self.len()).field("capacity", &self.0.capacity).finish()
    }
}

#[cfg(test)]
#[path = "mailbox_tests.rs"]
mod tests;
