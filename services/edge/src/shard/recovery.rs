//! Who waits to go on in a channel from a position, and what was found of it: everything behind the position or nothing.
//!
//! A client that recovers holds the channel from the moment it asks, and becomes a member when all that lies between its
//! position and the channel's top on this shard is at hand: read from the history, and what came since from the recent
//! publications that are kept meanwhile. So nothing reaches it twice, and nothing is left out.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use prost::Message as _;
use sanjay_proto::client::v1::Publication;

use super::hub::Top;
use crate::upstream::ConnKey;

/// Recent publications that are kept while somebody recovers; the oldest go first, and then the history is read on.
const MAX_RECENT: usize = 1_024;

/// Bytes of them.
const MAX_RECENT_BYTES: usize = 1024 * 1024;

/// Reads for one position, before it is given up: a channel that outruns them is faster than its history can be read.
const MAX_READS: u8 = 4;

/// The recoveries of one channel on a shard.
#[derive(Default)]
pub struct Recovering {
    searches: HashMap<(Arc<str>, u64), Search>,
    recent: VecDeque<Arc<Publication>>,
    bytes: usize,
}

/// Everybody who goes on from one position.
#[derive(Default)]
struct Search {
    seekers: Vec<(ConnKey, u64)>,
    /// What was read: everything above the position up to `reached`.
    found: Vec<Arc<Publication>>,
    reached: u64,
    reading: bool,
    reads: u8,
    /// The position cannot be continued.
    lost: bool,
}

/// What a read of the history gave.
#[derive(Debug, Clone)]
pub struct Found {
    /// Everything behind the position that was asked for, without holes, as much as fits.
    pub publications: Arc<[Arc<Publication>]>,
    /// The position cannot be continued from, or too much follows it.
    pub lost: bool,
}

impl Found {
    /// Nothing, and it cannot be told what that is.
    pub fn lost() -> Self {
        Self { publications: Arc::new([]), lost: true }
    }
}

/// What to do about a position.
#[derive(Debug, PartialEq)]
pub enum Next {
    /// Read what follows this offset.
    Read(Top),
    /// Answer these, with the command's id of each.
    Answer {
        /// Who.
        seekers: Vec<(ConnKey, u64)>,
        /// All that they missed; `None` when that cannot be told.
        missed: Option<Vec<Arc<Publication>>>,
    },
}

impl Recovering {
    /// Adds somebody who goes on from `since`.
    pub fn add(&mut self, since: Top, key: ConnKey, id: u64) {
        let search = self.searches.entry((since.epoch, since.offset)).or_default();
        search.seekers.push((key, id));
    }

    /// Whether nobody waits any more.
    pub fn is_empty(&self) -> bool {
        self.searches.is_empty()
    }

    /// A publication was handed to the channel's members.
    pub fn note(&mut self, publication: &Arc<Publication>) {
        if self.recent.back().is_some_and(|last| last.epoch != publication.epoch) {
            self.recent.clear();
            self.bytes = 0;
        }
        self.bytes += publication.encoded_len();
        self.recent.push_back(Arc::clone(publication));
        while self.recent.len() > MAX_RECENT || self.bytes > MAX_RECENT_BYTES {
            let Some(oldest) = self.recent.pop_front() else { return };
            self.bytes -= oldest.encoded_len();
        }
    }

    /// A read was answered that began at `from`, for the position `since`.
    pub fn found(&mut self, since: &Top, from: u64, found: &Found) {
        let Some(search) = self.searches.get_mut(&(Arc::clone(&since.epoch), since.offset)) else { return };
        search.reading = false;
        if search.reads == 0 || from != search.reached.max(since.offset) {
            // The answer to somebody who has gone; what it found is right all the same when it begins here.
            if from != since.offset {
                return;
            }
            search.found.clear();
        }
        search.reads = search.reads.max(1);
        search.lost |= found.lost;
        search.reached = from + found.publications.len() as u64;
        search.found.extend(found.publications.iter().cloned());
    }

    /// A read failed: takes out those who waited for it.
    pub fn failed(&mut self, since: &Top) -> Vec<(ConnKey, u64)> {
        let search = self.searches.remove(&(Arc::clone(&since.epoch), since.offset));
        search.map_or_else(Vec::new, |search| search.seekers)
    }

    /// Takes out one connection; the id of its command.
    pub fn cancel(&mut self, key: ConnKey) -> Option<u64> {
        let (since, at) = self.searches.iter().find_map(|(since, search)| {
            let at = search.seekers.iter().position(|(seeker, _)| *seeker == key)?;
            Some((since.clone(), at))
        })?;
        let search = self.searches.get_mut(&since)?;
        let (_, id) = search.seekers.swap_remove(at);
        if search.seekers.is_empty() {
            self.searches.remove(&since);
        }
        Some(id)
    }

    /// Takes out everybody.
    pub fn drain(&mut self) -> Vec<(ConnKey, u64)> {
        self.searches.drain().flat_map(|(_, search)| search.seekers).collect()
    }

    /// What to do now that members of the channel were handed everything up to `top`.
    pub fn advance(&mut self, top: &Top) -> Vec<(Top, Next)> {
        let mut next = Vec::new();
        let recent = &self.recent;
        self.searches.retain(|(epoch, offset), search| {
            let since = Top { epoch: Arc::clone(epoch), offset: *offset };
            let Some(step) = search.step(&since, top, recent) else { return true };
            let stays = matches!(step, Next::Read(_));
            next.push((since, step));
            stays
        });
        next
    }
}

impl Search {
    fn step(&mut self, since: &Top, top: &Top, recent: &VecDeque<Arc<Publication>>) -> Option<Next> {
        let answer = |search: &mut Self, missed| {
            Some(Next::Answer { seekers: std::mem::take(&mut search.seekers), missed })
        };
        if since.epoch != top.epoch || self.lost {
            return answer(self, None);
        }
        if since.offset == top.offset {
            return answer(self, Some(Vec::new()));
        }
        if self.reading {
            return None;
        }
        if self.reads == 0 {
            return self.read(since.offset, top);
        }
        if top.offset < since.offset {
            // It has seen what this shard has not got yet.
            return None;
        }
        if self.reached < top.offset && !self.extend(top.offset, recent) {
            return if self.reads < MAX_READS { self.read(self.reached, top) } else { answer(self, None) };
        }
        let mut missed = std::mem::take(&mut self.found);
        missed.truncate(usize::try_from(top.offset - since.offset).unwrap_or(usize::MAX));
        answer(self, Some(missed))
    }

    fn read(&mut self, from: u64, top: &Top) -> Option<Next> {
        (self.reading, self.reads) = (true, self.reads + 1);
        self.reached = from;
        Some(Next::Read(Top { epoch: Arc::clone(&top.epoch), offset: from }))
    }

    /// Adds what came since the read; false when some of it is not at hand.
    fn extend(&mut self, to: u64, recent: &VecDeque<Arc<Publication>>) -> bool {
        let begin = recent.partition_point(|publication| publication.offset <= self.reached);
        let rest = recent.range(begin..);
        let whole =
            rest.clone().zip(self.reached + 1..).all(|(publication, offset)| publication.offset == offset);
        if !whole || rest.len() as u64 != to - self.reached {
            return false;
        }
        self.found.extend(rest.cloned());
        self.reached = to;
        true
    }
}

#[cfg(test)]
#[path = "recovery_tests.rs"]
mod tests;
