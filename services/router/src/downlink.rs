//! What waits to be sent to one edge: a bounded mailbox, and marks for what did not fit.
//!
//! Invariant: a mark is taken back only by putting its signal into the mailbox, before any later
//! publication of the channel. While a mark exists the mailbox is not empty, so the writer will come and
//! make room.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use sanjay_proto::{
    client::v1::Publication,
    edge::v1::{Ask, ChannelGap, InboxHint, Resync, RouterEvent, WatchConnections, router_event::Event},
};
use sanjay_runtime::mailbox::{Receiver, Sender, mailbox};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::{DropReason, Metrics},
    registry::{Attachment, Top},
};

/// Replies to one edge that may wait; beyond it the router stops reading what the edge asks.
pub(crate) const MAX_WAITING_REPLIES: usize = 4_096;

/// One event for an edge. What goes to many edges is shared until it is written.
#[derive(Debug, Clone)]
pub(crate) enum Down {
    /// The answer to one event of the edge.
    Reply(Event),
    /// A publication of a channel that the edge holds.
    Publication(Arc<Publication>),
    /// A hint for a user that the edge holds.
    Hint(Arc<InboxHint>),
    /// Publications up to `top` were dropped.
    Gap { channel: Arc<str>, top: Top },
    /// Hints were dropped.
    Resync,
    /// A question of a back end.
    Ask(Ask),
    /// Whether somebody watches connections.
    Watch(bool),
}

impl From<Down> for RouterEvent {
    fn from(down: Down) -> Self {
        let event = match down {
            Down::Reply(event) => event,
            Down::Publication(publication) => Event::Publication(Arc::unwrap_or_clone(publication)),
            Down::Hint(hint) => Event::Inbox(Arc::unwrap_or_clone(hint)),
            Down::Gap { channel, top } => Event::Gap(ChannelGap {
                channel: channel.to_string(),
                epoch: top.epoch.to_string(),
                top: top.offset,
            }),
            Down::Resync => Event::Resync(Resync {}),
            Down::Ask(ask) => Event::Ask(ask),
            Down::Watch(on) => Event::WatchConnections(WatchConnections { on }),
        };
        RouterEvent { event: Some(event) }
    }
}

/// Why a stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The edge ended it, or the connection broke.
    Edge,
    /// A newer stream of the edge took over.
    Replaced,
    /// The registry does not know the attachment any more: the edge must announce everything again.
    Superseded,
    /// The router shuts down.
    Shutdown,
    /// The edge broke the protocol; the text says how.
    Protocol(String),
}

/// The sending side toward one edge's stream.
pub(crate) struct Downlink {
    pub(crate) attachment: Attachment,
    /// Cancelled when the stream ends, for whatever reason.
    pub(crate) ended: CancellationToken,
    /// Sessions that the edge announced on this stream.
    pub(crate) sessions: AtomicUsize,
    end: OnceLock<End>,
    sender: Sender<Down>,
    replies: Semaphore,
    marks: Mutex<Marks>,
    marked: AtomicBool,
    /// Whether the edge was told that somebody watches connections.
    watched: AtomicBool,
    metrics: Metrics,
}

#[derive(Default)]
struct Marks {
    gaps: BTreeMap<Arc<str>, Top>,
    resync: bool,
}

impl Downlink {
    pub(crate) fn new(
        attachment: Attachment,
        capacity: usize,
        metrics: Metrics,
    ) -> (Arc<Self>, Receiver<Down>) {
        let (sender, receiver) = mailbox(capacity);
        let downlink = Self {
            attachment,
            ended: CancellationToken::new(),
            sessions: AtomicUsize::new(0),
            end: OnceLock::new(),
            sender,
            replies: Semaphore::new(MAX_WAITING_REPLIES),
            marks: Mutex::default(),
            marked: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            metrics,
        };
        (Arc::new(downlink), receiver)
    }

    /// Ends the stream; the first reason stays.
    pub(crate) fn end(&self, end: End) {
        let _ = self.end.set(end);
        self.ended.cancel();
    }

    /// Why the stream ended, once it did.
    pub(crate) fn reason(&self) -> Option<&End> {
        self.end.get()
    }

    /// Events that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.sender.len()
    }

    /// Waits until there is room for so many replies, at most [`MAX_WAITING_REPLIES`]. False when the
    /// stream ended.
    pub(crate) async fn reserve(&self, replies: usize) -> bool {
        let replies = u32::try_from(replies.min(MAX_WAITING_REPLIES)).unwrap_or(u32::MAX);
        match self.ended.run_until_cancelled(self.replies.acquire_many(replies)).await {
            Some(Ok(permit)) => {
                permit.forget();
                true
            }
            Some(Err(_)) | None => false,
        }
    }

    /// Gives back the room of replies that were taken from the mailbox, or were not needed.
    pub(crate) fn release(&self, replies: usize) {
        self.replies.add_permits(replies);
    }

    /// Sends a reply; the caller reserved room for it.
    pub(crate) fn reply(&self, event: Event) {
        // A stream that is gone needs no reply: the edge asks again on its next one.
        let _ = self.sender.send_reserved(Down::Reply(event));
    }

    /// Asks the edge; there are only so many questions under way.
    pub(crate) fn ask(&self, ask: Ask) {
        // A stream that is gone gives no answer, and the asker sees that.
        let _ = self.sender.send_reserved(Down::Ask(ask));
    }

    /// Says whether somebody watches connections; that changes seldom.
    pub(crate) fn watch(&self, on: bool) {
        if self.watched.swap(on, Ordering::Relaxed) != on {
            let _ = self.sender.send_reserved(Down::Watch(on));
        }
    }

    /// Sends a publication, or marks its channel when there is no room; false when it was not sent.
    ///
    /// Of one channel, calls come one after another, in the order of its publications.
    pub(crate) fn publication(&self, channel: &Arc<str>, publication: &Arc<Publication>) -> bool {
        if self.marked.load(Ordering::Acquire) {
            let mut marks = self.marks.lock();
            self.send_marks(&mut marks);
            if let Some(top) = marks.gaps.get_mut(channel) {
                *top = position(publication);
                drop(marks);
                self.metrics.dropped(DropReason::Full);
                return false;
            }
        }
        match self.sender.try_send(Down::Publication(Arc::clone(publication))) {
            Ok(()) => true,
            Err(refused) if refused.is_full() => {
                self.metrics.dropped(DropReason::Full);
                self.gap(channel, &position(publication));
                false
            }
            Err(_) => {
                self.metrics.dropped(DropReason::Gone);
                false
            }
        }
    }

    /// Signals that publications of a channel up to `top` are lost, as soon as there is room.
    pub(crate) fn gap(&self, channel: &Arc<str>, top: &Top) {
        let mut marks = self.marks.lock();
        marks.gaps.insert(Arc::clone(channel), top.clone());
        // The writer may have emptied the mailbox just now and not come again for a mark that it did not see.
        self.send_marks(&mut marks);
    }

    /// Sends a hint, or marks the edge for a resync when it was about a message; false when it was not sent.
    pub(crate) fn hint(&self, hint: &Arc<InboxHint>) -> bool {
        match self.sender.try_send(Down::Hint(Arc::clone(hint))) {
            Ok(()) => true,
            Err(refused) if refused.is_full() => {
                self.metrics.dropped(DropReason::Full);
                if hint.message.is_some() {
                    self.resync();
                }
                false
            }
            Err(_) => {
                self.metrics.dropped(DropReason::Gone);
                false
            }
        }
    }

    /// Signals that hints are lost, as soon as there is room: once, however many.
    pub(crate) fn resync(&self) {
        let mut marks = self.marks.lock();
        marks.resync = true;
        self.send_marks(&mut marks);
    }

    /// Signals what was marked, as far as there is room; the writer calls it whenever it made some.
    pub(crate) fn flush_marks(&self) {
        if self.marked.load(Ordering::Acquire) {
            self.send_marks(&mut self.marks.lock());
        }
    }

    /// Forgets the mark of a channel that the edge no longer holds.
    pub(crate) fn unmark(&self, channel: &str) {
        if self.marked.load(Ordering::Acquire) {
            self.marks.lock().gaps.remove(channel);
        }
    }

    fn send_marks(&self, marks: &mut Marks) {
        if marks.resync && self.sender.try_send(Down::Resync).is_ok() {
            marks.resync = false;
            self.metrics.resyncs.inc();
        }
        while let Some((channel, top)) = marks.gaps.pop_first() {
            let gap = Down::Gap { channel: Arc::clone(&channel), top: top.clone() };
            if self.sender.try_send(gap).is_err() {
                marks.gaps.insert(channel, top);
                break;
            }
            self.metrics.gaps.inc();
        }
        self.marked.store(marks.resync || !marks.gaps.is_empty(), Ordering::Release);
    }
}

/// Where a publication stands in its channel.
pub(crate) fn position(publication: &Publication) -> Top {
    Top { epoch: publication.epoch.as_str().into(), offset: publication.offset }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::EdgeRef;

    fn downlink(capacity: usize) -> (Arc<Downlink>, Receiver<Down>) {
        let edge = EdgeRef { id: "e1".into(), incarnation: 1 };
        let attachment = Attachment { edge, router: "r1".into(), number: 1 };
        Downlink::new(attachment, capacity, Metrics::default())
    }

    fn publication(offset: u64) -> Arc<Publication> {
        Arc::new(Publication { channel: "news".into(), offset, epoch: "a".into(), ..Publication::default() })
    }

    fn take(receiver: &mut Receiver<Down>, limit: usize) -> Vec<String> {
        let mut taken = Vec::new();
        receiver.try_recv_many(&mut taken, limit);
        let text = |down| match down {
            Down::Reply(_) => "reply".into(),
            Down::Publication(publication) => format!("{}", publication.offset),
            Down::Hint(_) => "hint".into(),
            Down::Gap { channel, top } => format!("gap {channel} {}", top.offset),
            Down::Resync => "resync".into(),
            Down::Ask(ask) => format!("ask {}", ask.request),
            Down::Watch(on) => format!("watch {on}"),
        };
        taken.into_iter().map(text).collect()
    }

    #[test]
    fn a_gap_comes_before_the_next_publication_and_names_the_newest_dropped() {
        let (link, mut receiver) = downlink(2);
        let channel = Arc::from("news");
        for offset in 1..=4 {
            assert_eq!(link.publication(&channel, &publication(offset)), offset <= 2);
        }
        assert_eq!(take(&mut receiver, 1), ["1"]);
        assert!(!link.publication(&channel, &publication(5)), "the room went to the gap, and 5 found none");
        assert_eq!(take(&mut receiver, 9), ["2", "gap news 4"]);
        link.flush_marks();
        assert!(link.publication(&channel, &publication(6)));
        assert_eq!(take(&mut receiver, 9), ["gap news 5", "6"]);
    }

    #[test]
    fn an_idle_channel_gets_its_gap_when_the_writer_made_room() {
        let (link, mut receiver) = downlink(1);
        link.publication(&"news".into(), &publication(1));
        link.publication(&"news".into(), &publication(2));
        assert_eq!(take(&mut receiver, 9), ["1"]);
        link.flush_marks();
        assert_eq!(take(&mut receiver, 9), ["gap news 2"]);
        link.flush_marks();
        assert!(take(&mut receiver, 9).is_empty());
    }

    #[test]
    fn dropped_hints_become_one_resync() {
        let (link, mut receiver) = downlink(1);
        let message = Some(sanjay_proto::client::v1::InboxMessage::default());
        let hint = Arc::new(InboxHint { message, ..InboxHint::default() });
        assert!(link.hint(&hint));
        assert!(!link.hint(&hint) && !link.hint(&hint));
        assert_eq!(take(&mut receiver, 9), ["hint"]);
        link.flush_marks();
        assert_eq!(take(&mut receiver, 9), ["resync"]);
        // Of what was settled elsewhere nobody needs to hear.
        let settled = Arc::new(InboxHint { newcomer: true, ..InboxHint::default() });
        assert!(link.hint(&settled) && !link.hint(&settled));
        assert_eq!(take(&mut receiver, 9), ["hint"]);
        link.flush_marks();
        assert!(take(&mut receiver, 9).is_empty());
    }

    #[test]
    fn replies_are_never_refused_and_a_mark_outlives_them() {
        let (link, mut receiver) = downlink(1);
        for _ in 0..3 {
            link.reply(Event::Resync(Resync {}));
        }
        assert!(!link.publication(&"news".into(), &publication(1)));
        assert_eq!(take(&mut receiver, 2), ["reply", "reply"]);
        link.flush_marks();
        assert_eq!(take(&mut receiver, 9), ["reply"]);
        link.flush_marks();
        assert_eq!(take(&mut receiver, 9), ["gap news 1"]);
    }

    #[test]
    fn a_channel_that_was_left_needs_no_gap() {
        let (link, mut receiver) = downlink(1);
        link.publication(&"news".into(), &publication(1));
        link.publication(&"news".into(), &publication(2));
        link.unmark("news");
        assert_eq!(take(&mut receiver, 9), ["1"]);
        link.flush_marks();
        assert!(take(&mut receiver, 9).is_empty());
    }
}
