//! Which of a shard's connections are subscribed to which channel, and where each channel stands.
//!
//! Invariant: a connection is in a channel's `members` (or `waiters`) if and only if its own list names the
//! channel with the place where it stands there, so that leaving costs no search through the members.

use std::{collections::HashMap, rc::Rc, sync::Arc};

use slab::Slab;
use smallvec::SmallVec;

use super::subscribers::Subscribers;

/// Index of a connection in its shard.
pub type ConnIndex = u32;

/// Stands for the id of a `subscribe` where a back end subscribes: no client has an id so large.
pub const BY_SERVER: Option<u64> = Some(u64::MAX);

/// Place of a membership that is not confirmed yet.
const WAITING: u32 = u32::MAX;

/// Place of a connection that holds the channel, and becomes a member when it has what it missed.
const SEEKING: u32 = u32::MAX - 1;

/// The channels of one shard.
#[derive(Default)]
pub struct Hub {
    by_name: HashMap<Arc<str>, u32>,
    channels: Slab<Channel>,
    /// The memberships of each connection, by its index.
    of: Vec<SmallVec<[Membership; 2]>>,
    /// Where members of bounded channels are counted.
    subscribers: Arc<Subscribers>,
}

struct Channel {
    name: Arc<str>,
    /// `None` until the router confirmed the subscription.
    top: Option<Top>,
    members: Vec<ConnIndex>,
    waiters: Vec<(ConnIndex, Option<u64>)>,
    /// How many hold the channel and are no members yet.
    seekers: u32,
    /// Whether those who hold it are counted across shards.
    counted: bool,
}

/// Where a channel stands on this shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Top {
    /// Names the sequence.
    pub epoch: Arc<str>,
    /// The newest offset that was handed to members.
    pub offset: u64,
}

#[derive(Clone, Copy)]
struct Membership {
    channel: u32,
    place: u32,
}

/// What became of a [`Hub::join`].
#[derive(Debug, PartialEq, Eq)]
pub enum Join {
    /// The connection is a member already, or waits to be.
    Already,
    /// The channel has as many as it may.
    Full,
    /// The connection is a member.
    Member(Top),
    /// The router is asked first. `ask`: nobody did so yet.
    Waits {
        /// Subscribe upstream.
        ask: Option<Arc<str>>,
    },
}

/// What became of a [`Hub::seek`].
#[derive(Debug, PartialEq, Eq)]
pub enum Seek {
    /// The connection is a member already, or waits to be.
    Already,
    /// The channel has as many as it may.
    Full,
    /// The connection holds the channel, which stands here.
    Known(Top),
    /// The same, and the router is asked first. `ask`: nobody did so yet.
    Waits {
        /// Subscribe upstream.
        ask: Option<Arc<str>>,
    },
}

/// What became of a [`Hub::leave`].
#[derive(Debug, PartialEq, Eq)]
pub enum Leave {
    /// It was no member.
    NotSubscribed,
    /// It left. `cancelled`: the id of its `subscribe`, when that had no answer yet.
    Left {
        /// The unanswered `subscribe`.
        cancelled: Option<Option<u64>>,
        /// Nobody is left: unsubscribe upstream.
        last: Option<Arc<str>>,
    },
}

/// What a confirmed subscription changes.
#[derive(Debug, PartialEq, Eq)]
pub struct Confirmed {
    /// Who waited for it, with the id of each `subscribe`.
    pub waiters: Vec<(ConnIndex, Option<u64>)>,
    /// What earlier members missed.
    pub missed: Option<Missed>,
    /// How many of the members were members before.
    pub earlier: usize,
}

/// Offsets that members were not given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missed {
    /// The first; 0 when the epoch changed.
    pub from: u64,
    /// The last.
    pub to: u64,
}

/// What to do with a publication.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Nobody here wants it, or it was handed out already.
    Skip,
    /// Hand it to the channel's members, after telling them what they missed.
    Deliver {
        /// For [`Hub::members`].
        channel: u32,
        /// What they missed before it.
        missed: Option<Missed>,
    },
}

impl Hub {
    /// No channels; those of bounded ones are counted in `subscribers`.
    pub fn new(subscribers: Arc<Subscribers>) -> Self {
        Self { subscribers, ..Self::default() }
    }

    /// How many channels have members or waiters.
    pub fn channel_count(&self) -> usize {
        self.channels.len()
    }

    /// The members of a channel by its name: those whom a refusal leaves without messages.
    pub fn members_of(&self, name: &str) -> Vec<ConnIndex> {
        self.by_name.get(name).map_or_else(Vec::new, |index| self.members(*index).to_vec())
    }

    /// Whether a connection is a member of a channel, or waits to be.
    pub fn holds(&self, conn: ConnIndex, name: &str) -> bool {
        let memberships = self.of.get(conn as usize);
        self.by_name.get(name).is_some_and(|index| {
            memberships.is_some_and(|held| held.iter().any(|membership| membership.channel == *index))
        })
    }

    /// Looks at the channels of `count` places from `from` on: name and number of members. False when there are no more
    /// places.
    pub fn look(&self, from: usize, count: usize, mut call: impl FnMut(&str, usize)) -> bool {
        let channels = (from..from + count).filter_map(|index| self.channels.get(index));
        channels.for_each(|channel| call(&channel.name, channel.members.len()));
        from + count < self.channels.capacity()
    }

    /// The channels of a connection, those that are not confirmed yet too.
    pub fn channels_of(&self, conn: ConnIndex) -> Vec<Rc<str>> {
        let memberships = self.of.get(conn as usize).into_iter().flatten();
        let channels = memberships.filter_map(|membership| self.channels.get(membership.channel as usize));
        channels.map(|channel| Rc::from(&*channel.name)).collect()
    }

    /// Who is subscribed.
    pub fn members(&self, channel: u32) -> &[ConnIndex] {
        self.channels.get(channel as usize).map_or(&[], |channel| &channel.members)
    }

    /// Subscribes a connection; `id` is that of its command.
    pub fn join(&mut self, conn: ConnIndex, id: Option<u64>, name: &str) -> Join {
        self.join_within(0, conn, id, name)
    }

    /// The same, while the channel has less than `most` subscribers on the edge; 0: however many it has.
    pub fn join_within(&mut self, most: u32, conn: ConnIndex, id: Option<u64>, name: &str) -> Join {
        if self.of.len() <= conn as usize {
            self.of.resize_with(conn as usize + 1, SmallVec::new);
        }
        let Some(&index) = self.by_name.get(name) else {
            let name: Arc<str> = name.into();
            if most > 0 && !self.subscribers.add(&name, most) {
                return Join::Full;
            }
            let channel = Channel {
                name: Arc::clone(&name),
                top: None,
                members: Vec::new(),
                waiters: vec![(conn, id)],
                seekers: 0,
                counted: most > 0,
            };
            let index =
                u32::try_from(self.channels.insert(channel)).expect("fewer than 2³² channels fit memory");
            self.by_name.insert(Arc::clone(&name), index);
            self.of[conn as usize].push(Membership { channel: index, place: WAITING });
            return Join::Waits { ask: Some(name) };
        };
        if self.of[conn as usize].iter().any(|membership| membership.channel == index) {
            return Join::Already;
        }
        if !self.count_one(index, most) {
            return Join::Full;
        }
        let channel = &mut self.channels[index as usize];
        match &channel.top {
            Some(top) => {
                let place = channel.members.len() as u32;
                channel.members.push(conn);
                self.of[conn as usize].push(Membership { channel: index, place });
                Join::Member(top.clone())
            }
            None => {
                channel.waiters.push((conn, id));
                self.of[conn as usize].push(Membership { channel: index, place: WAITING });
                Join::Waits { ask: None }
            }
        }
    }

    /// Has a connection hold a channel without being a member, within `most` as in [`Self::join_within`]: until
    /// [`Self::admit`] or [`Self::leave`].
    pub fn seek(&mut self, most: u32, conn: ConnIndex, name: &str) -> Seek {
        let ask = match self.join_within(most, conn, None, name) {
            Join::Already => return Seek::Already,
            Join::Full => return Seek::Full,
            Join::Member(_) => None,
            Join::Waits { ask } => ask,
        };
        let index = self.by_name[name];
        let memberships = &mut self.of[conn as usize];
        let own = memberships.iter().position(|membership| membership.channel == index);
        let membership = memberships.swap_remove(own.expect("it joined just now"));
        self.take_out(conn, membership);
        self.of[conn as usize].push(Membership { channel: index, place: SEEKING });
        let channel = &mut self.channels[index as usize];
        channel.seekers += 1;
        match &channel.top {
            Some(top) => Seek::Known(top.clone()),
            None => Seek::Waits { ask },
        }
    }

    /// Makes a member of a connection that [`Self::seek`]s; false when it does not, or the channel is not confirmed.
    pub fn admit(&mut self, conn: ConnIndex, name: &str) -> bool {
        let Some(&index) = self.by_name.get(name) else { return false };
        let channel = &mut self.channels[index as usize];
        let Some(memberships) = self.of.get_mut(conn as usize) else { return false };
        let own = memberships.iter_mut().find(|own| own.channel == index && own.place == SEEKING);
        let (Some(own), Some(_)) = (own, &channel.top) else { return false };
        own.place = channel.members.len() as u32;
        channel.members.push(conn);
        channel.seekers -= 1;
        true
    }

    /// Where a channel stands, once the router confirmed it.
    pub fn top_of(&self, name: &str) -> Option<Top> {
        let index = self.by_name.get(name)?;
        self.channels[*index as usize].top.clone()
    }

    /// Unsubscribes a connection.
    pub fn leave(&mut self, conn: ConnIndex, name: &str) -> Leave {
        let Some(&index) = self.by_name.get(name) else { return Leave::NotSubscribed };
        let memberships = self.of.get_mut(conn as usize);
        let Some((memberships, at)) = memberships.and_then(|memberships| {
            memberships.iter().position(|membership| membership.channel == index).map(|at| (memberships, at))
        }) else {
            return Leave::NotSubscribed;
        };
        let membership = memberships.swap_remove(at);
        let cancelled = self.remove(conn, membership);
        Leave::Left { cancelled, last: self.forget_if_empty(index) }
    }

    /// Ends every membership of a connection. Returns the channels that nobody here holds any more.
    pub fn leave_all(&mut self, conn: ConnIndex) -> Vec<Arc<str>> {
        let Some(memberships) = self.of.get_mut(conn as usize) else { return Vec::new() };
        let mut emptied = Vec::new();
        for membership in std::mem::take(memberships) {
            self.remove(conn, membership);
            emptied.extend(self.forget_if_empty(membership.channel));
        }
        emptied
    }

    /// The router confirmed a subscription: everything above `top` follows.
    pub fn on_subscribed(&mut self, name: &str, top: Top) -> Option<(u32, Confirmed)> {
        let &index = self.by_name.get(name)?;
        let channel = &mut self.channels[index as usize];
        let earlier = channel.members.len();
        let waiters = std::mem::take(&mut channel.waiters);
        for &(conn, _) in &waiters {
            let place = channel.members.len() as u32;
            channel.members.push(conn);
            let memberships = &mut self.of[conn as usize];
            let own = memberships.iter_mut().find(|membership| membership.channel == index);
            own.expect("a waiter has a membership").place = place;
        }
        let missed =
            channel.top.as_ref().and_then(|before| missed_between(before, &top.epoch, top.offset + 1));
        channel.top = Some(top);
        Some((index, Confirmed { waiters, missed, earlier }))
    }

    /// The router refused a subscription. Returns who waited for it; members from before stay.
    pub fn on_refused(&mut self, name: &str) -> Vec<(ConnIndex, Option<u64>)> {
        let Some(&index) = self.by_name.get(name) else { return Vec::new() };
        let waiters = std::mem::take(&mut self.channels[index as usize].waiters);
        for &(conn, _) in &waiters {
            self.of[conn as usize].retain(|membership| membership.channel != index);
            self.uncount_one(index);
        }
        self.forget_if_empty(index);
        waiters
    }

    /// A publication arrived: moves the channel on.
    pub fn on_publication(&mut self, name: &str, epoch: &str, offset: u64) -> Step {
        let Some(&index) = self.by_name.get(name) else { return Step::Skip };
        let Some(top) = &mut self.channels[index as usize].top else { return Step::Skip };
        if *top.epoch == *epoch && offset <= top.offset {
            return Step::Skip;
        }
        let missed = missed_between(top, epoch, offset);
        top.offset = offset;
        if *top.epoch != *epoch {
            top.epoch = epoch.into();
        }
        Step::Deliver { channel: index, missed }
    }

    /// Publications up to `to` were dropped on the way. Says what members missed, if anything.
    pub fn on_gap(&mut self, name: &str, epoch: &str, to: u64) -> Option<(u32, Missed)> {
        match self.on_publication(name, epoch, to) {
            Step::Skip => None,
            Step::Deliver { channel, missed } => {
                let from = missed.map_or(to, |missed| missed.from);
                Some((channel, Missed { from, to }))
            }
        }
    }

    /// Takes a connection out of its place; the last member moves into it. Returns the id of its `subscribe`
    /// when that had no answer yet.
    fn remove(&mut self, conn: ConnIndex, membership: Membership) -> Option<Option<u64>> {
        self.uncount_one(membership.channel);
        self.take_out(conn, membership)
    }

    fn take_out(&mut self, conn: ConnIndex, membership: Membership) -> Option<Option<u64>> {
        let channel = &mut self.channels[membership.channel as usize];
        if membership.place == SEEKING {
            channel.seekers -= 1;
            return None;
        }
        if membership.place == WAITING {
            let at = channel.waiters.iter().position(|(waiter, _)| *waiter == conn)?;
            return Some(channel.waiters.swap_remove(at).1);
        }
        let place = membership.place as usize;
        channel.members.swap_remove(place);
        if channel.members.len() < channel.members.capacity() / 4 {
            channel.members.shrink_to(channel.members.len() * 2);
        }
        if let Some(&moved) = channel.members.get(place) {
            let memberships = &mut self.of[moved as usize];
            let own = memberships.iter_mut().find(|other| other.channel == membership.channel);
            own.expect("a member has a membership").place = membership.place;
        }
        None
    }

    /// Counts one more who holds the channel, if that is bounded. The bound may be younger than the channel.
    fn count_one(&mut self, index: u32, most: u32) -> bool {
        let channel = &mut self.channels[index as usize];
        if most == 0 && !channel.counted {
            return true;
        }
        if !channel.counted {
            channel.counted = true;
            let here = channel.members.len() + channel.waiters.len() + channel.seekers as usize;
            self.subscribers.add_all(&channel.name, here as u32);
        }
        self.subscribers.add(&channel.name, if most == 0 { u32::MAX } else { most })
    }

    fn uncount_one(&self, index: u32) {
        let channel = &self.channels[index as usize];
        if channel.counted {
            self.subscribers.remove(&channel.name);
        }
    }

    fn forget_if_empty(&mut self, index: u32) -> Option<Arc<str>> {
        let channel = self.channels.get(index as usize)?;
        if !channel.members.is_empty() || !channel.waiters.is_empty() || channel.seekers > 0 {
            return None;
        }
        let channel = self.channels.remove(index as usize);
        self.by_name.remove(&channel.name);
        Some(channel.name)
    }
}

/// What lies between the newest offset that was handed out and the next one.
fn missed_between(top: &Top, epoch: &str, next: u64) -> Option<Missed> {
    if *top.epoch != *epoch {
        // A gap may say that an epoch began of which nothing was published yet.
        return Some(Missed { from: 0, to: next.saturating_sub(1) });
    }
    (next > top.offset + 1).then(|| Missed { from: top.offset + 1, to: next - 1 })
}

#[cfg(test)]
#[path = "hub_tests.rs"]
mod tests;
