//! The publications that channels keep, bounded by their namespaces and, all together, in bytes.
//!
//! Invariant: what a log holds has no hole and ends at the channel's top, so that a reader who finds the first of what
//! it wants finds all of it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use prost::Message as _;
use sanjay_proto::client::v1::Publication;
use tokio::time::Instant;

use crate::registry::{
    Top,
    history::{HistoryPage, HistoryQuery, Keep},
};

/// What a kept publication costs beside its encoded size, about.
const OVERHEAD: usize = 256;

/// Publications of a stripe that one sweep removes for their age.
const SWEEP_STEP: usize = 1_024;

/// What one channel keeps, oldest first.
#[derive(Default)]
pub(super) struct Log {
    kept: VecDeque<Kept>,
}

struct Kept {
    publication: Arc<Publication>,
    at: Instant,
    /// When it goes at the latest.
    expires: Instant,
    bytes: usize,
    /// In the stripe's [`Order`].
    number: u64,
}

/// All kept publications of a stripe, oldest first, by their channels.
#[derive(Default)]
pub(super) struct Order {
    channels: BTreeMap<u64, (Instant, Arc<str>)>,
    last: u64,
}

impl Log {
    /// Adds the channel's newest publication.
    pub(super) fn push(
        &mut self,
        publication: Arc<Publication>,
        name: &Arc<str>,
        keep: Keep,
        now: Instant,
        order: &mut Order,
        total: &AtomicUsize,
    ) {
        while self.kept.len() >= keep.size.max(1) {
            self.drop_oldest(order, total);
        }
        let bytes = publication.encoded_len() + OVERHEAD;
        let expires = now + keep.ttl;
        order.last += 1;
        order.channels.insert(order.last, (expires, Arc::clone(name)));
        total.fetch_add(bytes, Ordering::Relaxed);
        self.kept.push_back(Kept { publication, at: now, expires, bytes, number: order.last });
    }

    pub(super) fn drop_oldest(&mut self, order: &mut Order, total: &AtomicUsize) {
        let Some(oldest) = self.kept.pop_front() else { return };
        order.channels.remove(&oldest.number);
        total.fetch_sub(oldest.bytes, Ordering::Relaxed);
    }

    pub(super) fn clear(&mut self, order: &mut Order, total: &AtomicUsize) {
        while !self.kept.is_empty() {
            self.drop_oldest(order, total);
        }
    }

    /// Whether something in it may still be read.
    pub(super) fn is_alive(&self, now: Instant) -> bool {
        self.kept.back().is_some_and(|newest| newest.expires > now)
    }

    /// Reads; what is too old or too much by now is not there.
    pub(super) fn read(&self, top: Top, query: &HistoryQuery, keep: Keep, now: Instant) -> HistoryPage {
        let surplus = self.kept.len().saturating_sub(keep.size);
        let old = self.kept.partition_point(|kept| now.duration_since(kept.at) >= keep.ttl);
        let kept = self.kept.range(surplus.max(old)..);
        let first = kept.clone().next().map_or(top.offset + 1, |kept| kept.publication.offset);
        match &query.since {
            Some(since) if since.epoch != top.epoch || since.offset > top.offset => {
                HistoryPage::empty(top, true)
            }
            Some(since) if since.offset + 1 < first => HistoryPage::empty(top, true),
            Some(since) => {
                let skip = usize::try_from(since.offset + 1 - first).unwrap_or(usize::MAX);
                let publications = take(kept.skip(skip), query);
                let last = publications.last().map_or(since.offset, |last| last.offset);
                HistoryPage { more: last < top.offset, publications, lost: false, top }
            }
            None => {
                let mut publications = take(kept.rev(), query);
                publications.reverse();
                HistoryPage { top, publications, lost: false, more: false }
            }
        }
    }
}

impl Order {
    /// The channel of the oldest publication.
    pub(super) fn oldest(&self) -> Option<Arc<str>> {
        self.channels.first_key_value().map(|(_, (_, name))| Arc::clone(name))
    }

    /// The channels of the oldest publications that are too old, as far as none that is not stands before them.
    pub(super) fn expired(&self, now: Instant) -> Vec<Arc<str>> {
        let old = self.channels.values().take(SWEEP_STEP).take_while(|(expires, _)| *expires <= now);
        old.map(|(_, name)| Arc::clone(name)).collect()
    }
}

fn take<'a>(kept: impl Iterator<Item = &'a Kept>, query: &HistoryQuery) -> Vec<Arc<Publication>> {
    let mut bytes = 0;
    let fits = |(at, kept): &(usize, &Kept)| {
        bytes += kept.bytes - OVERHEAD;
        *at == 0 || bytes <= query.bytes
    };
    let taken = kept.take(query.limit).enumerate().take_while(fits);
    taken.map(|(_, kept)| Arc::clone(&kept.publication)).collect()
}
