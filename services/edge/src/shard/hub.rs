//! Which of a shard's connections are subscribed to which channel, and where each channel stands.
//!
//! Invariant: a connection is in a channel's `members` (or `waiters`) if and only if its own list names the
//! channel with the place where it stands there, so that leaving costs no search through the members.

use std::{collections::HashMap, sync::Arc};

use slab::Slab;
use smallvec::SmallVec;

/// Index of a connection in its shard.
pub type ConnIndex = u32;

/// Place of a membership that is not confirmed yet.
const WAITING: u32 = u32::MAX;

/// The channels of one shard.
#[derive(Default)]
pub struct Hub {
    by_name: HashMap<Arc<str>, u32>,
    channels: Slab<Channel>,
    /// The memberships of each connection, by its index.
    of: Vec<SmallVec<[Membership; 2]>>,
}

struct Channel {
    name: Arc<str>,
    /// `None` until the router confirmed the subscription.
    top: Option<Top>,
    members: Vec<ConnIndex>,
    waiters: Vec<(ConnIndex, Option<u64>)>,
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
    /// The connection is a member.
    Member(Top),
    /// The router is asked first. `ask`: nobody did so yet.
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
    /// How many channels have members or waiters.
    pub fn channel_count(&self) -> usize {
        self.channels.len()
    }

    /// The members of a channel by its name: those whom a refusal leaves without messages.
    pub fn members_of(&self, name: &str) -> Vec<ConnIndex> {
        self.by_name.get(name).map_or_else(Vec::new, |index| self.members(*index).to_vec())
    }

    /// Who is subscribed.
    pub fn members(&self, channel: u32) -> &[ConnIndex] {
        self.channels.get(channel as usize).map_or(&[], |channel| &channel.members)
    }

    /// Subscribes a connection; `id` is that of its command.
    pub fn join(&mut self, conn: ConnIndex, id: Option<u64>, name: &str) -> Join {
        if self.of.len() <= conn as usize {
            self.of.resize_with(conn as usize + 1, SmallVec::new);
        }
        let Some(&index) = self.by_name.get(name) else {
            let name: Arc<str> = name.into();
            let channel = Channel {
                name: Arc::clone(&name),
                top: None,
                members: Vec::new(),
                waiters: vec![(conn, id)],
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
        let channel = &mut self.channels[membership.channel as usize];
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

    fn forget_if_empty(&mut self, index: u32) -> Option<Arc<str>> {
        let channel = self.channels.get(index as usize)?;
        if !channel.members.is_empty() || !channel.waiters.is_empty() {
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
