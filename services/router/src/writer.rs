//! The stream of answers to one edge: whatever is ready goes into one message, and nothing waits for more.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures::Stream;
use prost::Message as _;
use sanjay_proto::edge::v1::{AttachResponse, RouterEvent, RouterHello};
use sanjay_runtime::mailbox::Receiver;
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::downlink::{Down, Downlink, End};

/// Most events of one message.
const BATCH_EVENTS: usize = 512;

/// A message is closed at this size in bytes: large enough to spread a header's cost, small enough that its
/// events are not held up by encoding, and below every decoder's limit even with one more payload.
const BATCH_BYTES: usize = 256 * 1024;

/// Yields messages until the edge's link ends and everything in its mailbox is taken.
pub(crate) struct Writer {
    hello: Option<RouterHello>,
    link: Arc<Downlink>,
    receiver: Receiver<Down>,
    /// Taken from the mailbox, not yet sent: at most one batch.
    taken: Vec<Down>,
    ready: VecDeque<RouterEvent>,
    ended: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Writer {
    pub(crate) fn new(hello: RouterHello, link: Arc<Downlink>, receiver: Receiver<Down>) -> Self {
        let ended = Box::pin(link.ended.clone().cancelled_owned());
        Self { hello: Some(hello), link, receiver, taken: Vec::new(), ready: VecDeque::new(), ended }
    }

    /// Why the stream ended, once it did.
    pub(crate) fn reason(&self) -> Option<&End> {
        self.link.reason()
    }

    /// Takes what the mailbox has; false when it is empty and the link has ended.
    fn poll_take(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        match self.receiver.poll_recv_many(cx, &mut self.taken, BATCH_EVENTS) {
            Poll::Ready(0) => return Poll::Ready(false),
            Poll::Ready(_) => {}
            Poll::Pending => {
                ready!(self.ended.as_mut().poll(cx));
                return Poll::Ready(false);
            }
        }
        self.link.flush_marks();
        let replies = self.taken.iter().filter(|down| matches!(down, Down::Reply(_))).count();
        self.link.release(replies);
        self.ready.extend(self.taken.drain(..).map(RouterEvent::from));
        Poll::Ready(true)
    }

    fn batch(&mut self) -> Vec<RouterEvent> {
        let mut bytes = 0;
        let fits = |event: &RouterEvent| {
            let room = bytes < BATCH_BYTES;
            bytes += event.encoded_len();
            room
        };
        let events = self.ready.iter().map(fits).take_while(|fits| *fits).count();
        self.ready.drain(..events).collect()
    }
}

impl Stream for Writer {
    type Item = AttachResponse;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<AttachResponse>> {
        if let Some(hello) = self.hello.take() {
            return Poll::Ready(Some(AttachResponse { hello: Some(hello), events: Vec::new() }));
        }
        if self.ready.is_empty() && !ready!(self.poll_take(cx)) {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(AttachResponse { hello: None, events: self.batch() }))
    }
}

/// The edge is gone: nobody needs what waits.
impl Drop for Writer {
    fn drop(&mut self) {
        self.link.end(End::Edge);
    }
}
