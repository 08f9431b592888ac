//! The queue from a shard to a task of the control runtime: bounded, in order, and never waited for by the shard.

use std::{cell::RefCell, collections::VecDeque};

use tokio::sync::mpsc::{self, error::TrySendError};

/// Room that must be left for a shard to take another command: one command makes at most a few requests.
const RESERVE: usize = 64;

/// A shard's end of the queue.
///
/// What finds the queue full waits here. That is bounded by a few requests for each connection: while anything
/// waits no command is taken, a connection has at most one read under way and one report due, and what is left
/// is said once, when it ends or when all sessions are announced again.
pub struct Lane<R> {
    queue: mpsc::Sender<R>,
    waiting: RefCell<VecDeque<R>>,
}

impl<R> Lane<R> {
    /// A lane into `queue`.
    pub fn new(queue: mpsc::Sender<R>) -> Self {
        Self { queue, waiting: RefCell::new(VecDeque::new()) }
    }

    /// Sends now, or as soon as there is room.
    pub fn send(&self, request: R) {
        let mut waiting = self.waiting.borrow_mut();
        if !waiting.is_empty() {
            return waiting.push_back(request);
        }
        match self.queue.try_send(request) {
            Ok(()) => {}
            Err(TrySendError::Full(request)) => waiting.push_back(request),
            // The control runtime has ended: the process is on its way out, and nobody could be asked.
            Err(TrySendError::Closed(_)) => {}
        }
    }

    /// Sends when there is room now; otherwise the request is dropped.
    pub fn send_or_drop(&self, request: R) {
        if self.has_room() {
            self.send(request);
        }
    }

    /// Whether another command may be taken.
    pub fn has_room(&self) -> bool {
        self.waiting.borrow().is_empty() && (self.queue.capacity() >= RESERVE || self.queue.is_closed())
    }

    /// How many requests wait, of all shards.
    pub fn waiting(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity() + self.waiting.borrow().len()
    }

    /// Sends what waits, as far as there is room.
    pub fn flush(&self) {
        let mut waiting = self.waiting.borrow_mut();
        while let Some(request) = waiting.pop_front() {
            if let Err(TrySendError::Full(request)) = self.queue.try_send(request) {
                waiting.push_front(request);
                return;
            }
        }
        if waiting.capacity() > 1024 {
            *waiting = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_is_lost_or_overtaken_when_the_queue_is_full() {
        let (sender, mut receiver) = mpsc::channel(RESERVE);
        let lane = Lane::new(sender);
        assert!(lane.has_room());
        (0..200).for_each(|n| lane.send(n));
        assert!(!lane.has_room());
        lane.send_or_drop(1_000);
        let mut got = Vec::new();
        while got.len() < 200 {
            got.push(receiver.recv().await.expect("the lane lives"));
            lane.flush();
        }
        assert_eq!(got, (0..200).collect::<Vec<_>>());
        assert!(lane.has_room());
    }
}
