//! From a channel to the edges that hold it, and from an edge to its stream.
//!
//! Invariant: everything about a channel happens under the lock of its stripe, and the bus hands over one
//! publication of a channel at a time, so every mailbox gets them in offset order. No call leaves this
//! module with a lock held but the mailboxes' own, which never wait.

use std::{
    collections::{HashMap, HashSet},
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, atomic::Ordering},
};

use parking_lot::{Mutex, RwLock};
use sanjay_proto::{
    client::v1::Publication,
    edge::v1::{Subscribed, router_event::Event},
};
use sanjay_runtime::MilestoneRing;
use tokio::sync::Notify;

use crate::{
    bus::{EdgeHint, Missed, Sink},
    downlink::{Downlink, End, position},
    metrics::{DropReason, Metrics},
    registry::{EdgeRef, Top},
    spans,
};

/// Enough that threads seldom meet at one.
const STRIPES: usize = 64;

/// Publications kept for an edge whose subscription is being made; more become a gap.
const MAX_KEPT: usize = 1_024;

/// Channels that may be suspected one by one; more are suspected all together.
const MAX_SUSPECTS: usize = 4_096;

type Channels = HashMap<Arc<str>, Interest>;

/// Which channels may have lost publications on the bus.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) enum Suspects {
    /// None.
    #[default]
    Nothing,
    /// These.
    Some(HashSet<Arc<str>>),
    /// Any.
    All,
}

/// Which edges are attached, and which hold a channel.
pub(crate) struct Fanout {
    stripes: Box<[Mutex<Channels>]>,
    /// Keyed anew in each process: nobody can choose names that all fall on one stripe.
    hasher: RandomState,
    edges: RwLock<HashMap<Arc<str>, Arc<Downlink>>>,
    suspects: Mutex<Suspects>,
    suspected: Notify,
    milestones: Arc<MilestoneRing>,
    metrics: Metrics,
}

#[derive(Default)]
struct Interest {
    members: Vec<Member>,
    /// Whether the bus was asked for the channel.
    on_bus: bool,
    /// The newest position that was handed on, given up as lost, or known when the first edge joined.
    last: Option<Top>,
    /// The epoch before that of `last`. What comes of it now is too late.
    former: Option<Arc<str>>,
}

struct Member {
    link: Arc<Downlink>,
    state: State,
}

enum State {
    /// The top is not known yet. Publications are kept until it is.
    Waiting { kept: Vec<Arc<Publication>>, lost: Option<Top> },
    /// Everything above `from` is sent.
    Live { from: Top },
}

impl Fanout {
    pub(crate) fn new(milestones: Arc<MilestoneRing>, metrics: Metrics) -> Self {
        Self {
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            hasher: RandomState::new(),
            edges: RwLock::default(),
            suspects: Mutex::default(),
            suspected: Notify::new(),
            milestones,
            metrics,
        }
    }

    /// Makes `link` the stream of its edge and ends the older one. When a newer one is there already, it is
    /// `link` that ends.
    pub(crate) fn attach(&self, link: &Arc<Downlink>) {
        let mut edges = self.edges.write();
        let edge = &link.attachment.edge;
        match edges.get(&edge.id) {
            Some(newer) if newer.attachment.number > link.attachment.number => link.end(End::Replaced),
            _ => {
                if let Some(older) = edges.insert(Arc::clone(&edge.id), Arc::clone(link)) {
                    older.end(End::Replaced);
                }
            }
        }
        self.metrics.edges.set(edges.len() as i64);
    }

    /// The opposite; without effect when another stream of the edge took over.
    pub(crate) fn detach(&self, link: &Downlink) {
        let mut edges = self.edges.write();
        let id = &link.attachment.edge.id;
        if edges.get(id).is_some_and(|held| held.attachment.number == link.attachment.number) {
            edges.remove(id);
        }
        self.metrics.edges.set(edges.len() as i64);
    }

    /// The stream of this start of an edge.
    pub(crate) fn link(&self, edge: &EdgeRef) -> Option<Arc<Downlink>> {
        let edges = self.edges.read();
        edges.get(&edge.id).filter(|link| link.attachment.edge == *edge).cloned()
    }

    /// The streams of all edges.
    pub(crate) fn links(&self) -> Vec<Arc<Downlink>> {
        self.edges.read().values().cloned().collect()
    }

    /// Adds the edge to a channel and keeps the channel's publications for it until [`Self::go_live`]. True
    /// when the bus was not asked for the channel yet.
    pub(crate) fn join(&self, channel: &Arc<str>, link: &Arc<Downlink>) -> bool {
        let mut channels = self.stripe(channel).lock();
        let before = channels.len();
        let interest = channels.entry(Arc::clone(channel)).or_default();
        let state = State::Waiting { kept: Vec::new(), lost: None };
        match interest.members.iter_mut().find(|member| member.is(link)) {
            Some(member) => member.state = state,
            None => interest.members.push(Member { link: Arc::clone(link), state }),
        }
        let ask = !interest.on_bus;
        self.metrics.channels.inc_by((channels.len() - before) as i64);
        ask
    }

    /// Notes that the bus delivers the channel now.
    pub(crate) fn set_on_bus(&self, channel: &str) {
        if let Some(interest) = self.stripe(channel).lock().get_mut(channel) {
            interest.on_bus = true;
        }
    }

    /// Answers the subscription and sends everything above `top`: what was kept now, the rest as it comes.
    pub(crate) fn go_live(&self, channel: &Arc<str>, link: &Arc<Downlink>, top: Top) {
        let mut channels = self.stripe(channel).lock();
        let Some(interest) = channels.get_mut(channel) else { return };
        let Some(member) = interest.members.iter_mut().find(|member| member.is(link)) else { return };
        // What comes of others while one joins is not known to have come yet.
        interest.last.get_or_insert_with(|| top.clone());
        let live = State::Live { from: top.clone() };
        let State::Waiting { kept, lost } = std::mem::replace(&mut member.state, live) else { return };
        link.reply(Event::Subscribed(Subscribed {
            channel: channel.to_string(),
            epoch: top.epoch.to_string(),
            offset: top.offset,
            error: None,
        }));
        self.send_kept(channel, link, &top, &kept);
        if let Some(lost) = lost
            && (lost.epoch != top.epoch || lost.offset > top.offset)
        {
            link.gap(channel, &lost);
        }
    }

    /// Removes the edge from a channel. True when no edge holds it any more and the bus need not deliver it.
    pub(crate) fn leave(&self, channel: &str, link: &Arc<Downlink>) -> bool {
        let mut channels = self.stripe(channel).lock();
        let Some(interest) = channels.get_mut(channel) else { return false };
        interest.members.retain(|member| !member.is(link));
        link.unmark(channel);
        if !interest.members.is_empty() {
            return false;
        }
        let on_bus = interest.on_bus;
        channels.remove(channel);
        self.metrics.channels.dec();
        on_bus
    }

    /// Signals that publications of a channel up to `top` are lost, to the edges that wait for them. False when
    /// they were handed on meanwhile, or nobody holds the channel.
    pub(crate) fn lost(&self, channel: &Arc<str>, top: &Top) -> bool {
        let mut channels = self.stripe(channel).lock();
        let Some(interest) = channels.get_mut(channel) else { return false };
        if !interest.is_behind(top) {
            return false;
        }
        interest.move_to(&top.epoch, top.offset);
        for member in &mut interest.members {
            match &mut member.state {
                State::Waiting { lost, .. } => *lost = Some(top.clone()),
                State::Live { from } if from.epoch == top.epoch && from.offset >= top.offset => {}
                State::Live { .. } => member.link.gap(channel, top),
            }
        }
        true
    }

    /// Whether an edge holds the channel and less than `top` of it was handed on.
    pub(crate) fn is_behind(&self, channel: &str, top: &Top) -> bool {
        self.stripe(channel).lock().get(channel).is_some_and(|interest| interest.is_behind(top))
    }

    /// Whether the bus delivers the channel.
    pub(crate) fn holds(&self, channel: &str) -> bool {
        self.stripe(channel).lock().get(channel).is_some_and(|interest| interest.on_bus)
    }

    /// How many parts [`Self::held`] has.
    pub(crate) const PARTS: usize = STRIPES;

    /// The channels of one part that the bus delivers.
    pub(crate) fn held(&self, part: usize) -> Vec<Arc<str>> {
        let channels = self.stripes[part].lock();
        let held = channels.iter().filter(|(_, interest)| interest.on_bus);
        held.map(|(channel, _)| Arc::clone(channel)).collect()
    }

    /// Takes the channels that the bus may have lost something of, and waits while there are none.
    pub(crate) async fn suspects(&self) -> Suspects {
        loop {
            let suspects = std::mem::take(&mut *self.suspects.lock());
            if suspects != Suspects::Nothing {
                return suspects;
            }
            self.suspected.notified().await;
        }
    }

    /// Adds to what [`Self::suspects`] gives.
    pub(crate) fn suspect(&self, more: Suspects) {
        let mut suspects = self.suspects.lock();
        *suspects = match (std::mem::take(&mut *suspects), more) {
            (Suspects::Nothing, more) => more,
            (some, Suspects::Nothing) => some,
            (Suspects::Some(mut some), Suspects::Some(more)) => {
                some.extend(more);
                if some.len() > MAX_SUSPECTS { Suspects::All } else { Suspects::Some(some) }
            }
            (Suspects::All, _) | (_, Suspects::All) => Suspects::All,
        };
        drop(suspects);
        self.suspected.notify_one();
    }

    /// Tells every edge that hints for it may be lost.
    fn resync(&self) {
        self.edges.read().values().for_each(|link| link.resync());
    }

    /// Brings the gauges up to date that nothing else updates.
    pub(crate) fn measure(&self) {
        let edges = self.edges.read();
        let sessions: usize = edges.values().map(|link| link.sessions.load(Ordering::Relaxed)).sum();
        let deepest = edges.values().map(|link| link.waiting()).max().unwrap_or(0);
        self.metrics.sessions.set(sessions as i64);
        self.metrics.deepest_mailbox.set(deepest as i64);
    }

    /// A publication of another epoch than the top's came before the top's first one, or it began after the
    /// top was read. When none of the top's epoch tells which, the edge is told of a gap rather than of a
    /// wrong publication.
    fn send_kept(&self, channel: &Arc<str>, link: &Downlink, top: &Top, kept: &[Arc<Publication>]) {
        match kept.iter().position(|publication| *publication.epoch == *top.epoch) {
            Some(first) => {
                for publication in kept[first..].iter().filter(|publication| is_above(publication, top)) {
                    self.send(channel, link, publication);
                }
            }
            None => {
                if let Some(last) = kept.last() {
                    link.gap(channel, &position(last));
                }
            }
        }
    }

    fn send(&self, channel: &Arc<str>, link: &Downlink, publication: &Arc<Publication>) -> bool {
        let sent = link.publication(channel, publication);
        if sent {
            self.metrics.deliveries.inc();
        }
        sent
    }

    fn stripe(&self, channel: &str) -> &Mutex<Channels> {
        let hash = self.hasher.hash_one(channel);
        &self.stripes[hash as usize % STRIPES]
    }
}

impl Sink for Fanout {
    fn publication(&self, publication: &Arc<Publication>) {
        let mut channels = self.stripe(&publication.channel).lock();
        let Some((channel, _)) = channels.get_key_value(publication.channel.as_str()) else {
            return self.metrics.dropped(DropReason::NoInterest);
        };
        let channel = Arc::clone(channel);
        let Some(interest) = channels.get_mut(&channel) else { return };
        if !interest.is_news(&publication.epoch, publication.offset) {
            return self.metrics.dropped(DropReason::Repeated);
        }
        interest.move_to(&publication.epoch, publication.offset);
        let traced = spans::fan_out(publication);
        let publication = traced.as_ref().map_or(publication, |(_, traced)| traced);
        let mut edges = 0_usize;
        for member in &mut interest.members {
            match &mut member.state {
                State::Waiting { kept, .. } if kept.len() < MAX_KEPT => kept.push(Arc::clone(publication)),
                State::Waiting { lost, .. } => *lost = Some(position(publication)),
                State::Live { from } if !is_above(publication, from) => {}
                State::Live { .. } => edges += usize::from(self.send(&channel, &member.link, publication)),
            }
        }
        drop(channels);
        if let Some((span, _)) = &traced {
            spans::relayed(span, edges);
        }
        let detail = if edges == 1 { "1 edge".into() } else { format!("{edges} edges") };
        self.milestones.record(&publication.message_id, "fanned_out", detail);
    }

    fn hint(&self, hint: EdgeHint) {
        match self.link(&hint.edge) {
            Some(link) => _ = link.hint(&hint.hint),
            None => self.metrics.dropped(DropReason::NoInterest),
        }
    }

    fn missed(&self, what: Missed<'_>) {
        match what {
            Missed::Channel(channel) => self.suspect(Suspects::Some([channel.into()].into())),
            Missed::Channels => self.suspect(Suspects::All),
            Missed::Hints => self.resync(),
        }
    }
}

impl Interest {
    /// Whether this position is news. Offsets say so within an epoch; an epoch that is not the former one is a
    /// newer one.
    fn is_news(&self, epoch: &str, offset: u64) -> bool {
        match &self.last {
            Some(last) if *last.epoch == *epoch => offset > last.offset,
            Some(_) => self.former.as_deref() != Some(epoch),
            None => true,
        }
    }

    fn move_to(&mut self, epoch: &str, offset: u64) {
        match &mut self.last {
            Some(last) if *last.epoch == *epoch => last.offset = offset,
            last => {
                let former = last.replace(Top { epoch: epoch.into(), offset });
                self.former = former.map(|former| former.epoch).or(self.former.take());
            }
        }
    }

    /// Whether less than `top` was handed on. Nothing can be said before an edge has joined.
    fn is_behind(&self, top: &Top) -> bool {
        self.last.is_some() && self.is_news(&top.epoch, top.offset)
    }
}

impl Member {
    fn is(&self, link: &Downlink) -> bool {
        self.link.attachment.number == link.attachment.number
    }
}

fn is_above(publication: &Publication, from: &Top) -> bool {
    *publication.epoch != *from.epoch || publication.offset > from.offset
}

#[cfg(test)]
#[path = "fanout_tests.rs"]
mod tests;
