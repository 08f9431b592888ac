//! The control runtime's way to the shards: it never waits, and what a full shard missed is marked and told
//! as soon as there is room.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
};

use sanjay_proto::{client::v1::Publication, edge::v1::InboxHint};
use sanjay_runtime::mailbox;

use super::{ConnKey, ShardEvent};
use crate::{metrics::Metrics, spans::ChannelPush};

/// The senders to every shard, without the marks; for answers.
#[derive(Clone)]
pub struct Replies(Arc<[mailbox::Sender<ShardEvent>]>);

impl Replies {
    /// For shards in the order of their numbers.
    pub fn new(shards: Vec<mailbox::Sender<ShardEvent>>) -> Self {
        Self(shards.into())
    }

    /// Answers a connection's request. Bounded by the commands that a connection may have outstanding.
    pub fn reply(&self, conn: ConnKey, event: ShardEvent) {
        self.tell(conn.shard, event);
    }

    /// Tells one shard. A shard that is gone has no connection left that could want it.
    pub fn tell(&self, shard: u16, event: ShardEvent) {
        if let Some(sender) = self.0.get(usize::from(shard)) {
            let _ = sender.send_reserved(event);
        }
    }

    /// How many shards there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Tells every shard.
    pub fn tell_all(&self, mut event: impl FnMut() -> ShardEvent) {
        for sender in self.0.iter() {
            let _ = sender.send_reserved(event());
        }
    }
}

/// The droppable ways to every shard, with what each missed.
pub struct Shards {
    replies: Replies,
    missed: Vec<Marks>,
    metrics: Arc<Metrics>,
}

/// What one shard missed. Bounded by the channels that it holds.
#[derive(Default)]
struct Marks {
    channels: HashMap<Arc<str>, (Arc<str>, u64)>,
    hints: bool,
}

impl Shards {
    /// Nothing was missed yet.
    pub fn new(replies: Replies, metrics: Arc<Metrics>) -> Self {
        let missed = replies.0.iter().map(|_| Marks::default()).collect();
        Self { replies, missed, metrics }
    }

    /// The undroppable ways.
    pub fn replies(&self) -> &Replies {
        &self.replies
    }

    /// Hands a publication to the shards in `mask` (bit n: shard n).
    pub fn publish(&mut self, mask: u64, name: &Arc<str>, mut publication: Publication) {
        let push = ChannelPush::begin(&mut publication);
        let publication = Arc::new(publication);
        for shard in shards_of(mask).map(usize::from) {
            let Some(sender) = self.replies.0.get(shard) else { continue };
            let marks = &mut self.missed[shard];
            if let Some((epoch, top)) = marks.channels.get(name) {
                // The gap must be told before what follows it; while it cannot be, it grows.
                if sender.try_send(ShardEvent::Gap(Arc::clone(name), Arc::clone(epoch), *top)).is_ok() {
                    marks.channels.remove(name);
                }
            }
            match marks.channels.entry(Arc::clone(name)) {
                Entry::Occupied(mut mark) => {
                    mark.insert((publication.epoch.as_str().into(), publication.offset));
                    self.metrics.dropped_publications.inc();
                }
                Entry::Vacant(mark) => {
                    let event = ShardEvent::Publication(Arc::clone(&publication), push.clone());
                    if sender.try_send(event).is_err() {
                        mark.insert((publication.epoch.as_str().into(), publication.offset));
                        self.metrics.dropped_publications.inc();
                    }
                }
            }
        }
    }

    /// Tells the shards in `mask` of a gap that the router signalled.
    pub fn gap(&mut self, mask: u64, name: &Arc<str>, epoch: &Arc<str>, top: u64) {
        for shard in shards_of(mask).map(usize::from) {
            if let Some(marks) = self.missed.get_mut(shard) {
                marks.channels.insert(Arc::clone(name), (Arc::clone(epoch), top));
            }
        }
        self.flush();
    }

    /// Hands a hint to every shard; any may hold the user.
    pub fn hint(&mut self, hint: &Arc<InboxHint>) {
        for (sender, marks) in self.replies.0.iter().zip(&mut self.missed) {
            if sender.try_send(ShardEvent::Hint(Arc::clone(hint))).is_err() {
                // Of what was settled elsewhere nobody needs to hear.
                marks.hints |= hint.message.is_some();
                self.metrics.dropped_hints.inc();
            }
        }
    }

    /// Has every shard read the inboxes of all users that it holds.
    pub fn resync(&mut self) {
        self.missed.iter_mut().for_each(|marks| marks.hints = true);
        self.flush();
    }

    /// Whether some shard is to be told what it missed.
    pub fn has_marks(&self) -> bool {
        self.missed.iter().any(|marks| marks.hints || !marks.channels.is_empty())
    }

    /// Tells the shards what they missed, as far as they have room.
    pub fn flush(&mut self) {
        for (sender, marks) in self.replies.0.iter().zip(&mut self.missed) {
            flush(sender, marks);
        }
    }
}

fn flush(sender: &mailbox::Sender<ShardEvent>, marks: &mut Marks) {
    if marks.hints && sender.try_send(ShardEvent::Resync).is_ok() {
        marks.hints = false;
    }
    if marks.channels.is_empty() {
        return;
    }
    marks.channels.retain(|name, (epoch, top)| {
        sender.try_send(ShardEvent::Gap(Arc::clone(name), Arc::clone(epoch), *top)).is_err()
    });
    if marks.channels.is_empty() {
        marks.channels = HashMap::new();
    }
}

/// The shards of a mask.
pub(super) fn shards_of(mask: u64) -> impl Iterator<Item = u16> {
    (0..64).filter(move |shard| mask & (1 << shard) != 0)
}
