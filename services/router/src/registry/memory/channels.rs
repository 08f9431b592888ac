//! Sequences, dedupe keys and subscribers of channels.
//!
//! Invariant: everything about a channel happens under the lock of its stripe, sinks included, so that
//! offset order is delivery order.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    hash::{BuildHasher as _, RandomState},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;
use sanjay_proto::{client::v1::Publication, router::v1::NewPublication};
use sanjay_runtime::{SharedNamespaces, clock::SharedClock, random::SharedRandom};
use tokio::time::Instant;

use super::{
    Limits,
    log::{self, Log},
};
use crate::{
    bus::Sink,
    registry::{
        Assigned, RegistryError, Top,
        history::{HistoryPage, HistoryQuery, Keep},
    },
};

/// Enough that threads seldom meet at one.
const STRIPES: usize = 64;

/// Channels of a stripe that one sweep looks at: 64 stripes a second are then 16,384 channels a second.
const IDLE_STEP: usize = 256;

pub(super) struct Channels {
    stripes: Box<[Mutex<Stripe>]>,
    /// Keyed anew in each process: nobody can choose names that all fall on one stripe.
    hasher: RandomState,
    limits: Limits,
    namespaces: SharedNamespaces,
    /// Bytes of everything that is kept.
    kept_bytes: AtomicUsize,
    clock: SharedClock,
    random: SharedRandom,
}

#[derive(Default)]
struct Stripe {
    channels: HashMap<Arc<str>, Channel>,
    /// When to look whether a channel is idle; one entry for each channel.
    idle: VecDeque<(Instant, Arc<str>)>,
    order: KeyOrder,
    kept: log::Order,
}

/// All dedupe keys of a stripe, oldest first.
#[derive(Default)]
struct KeyOrder {
    /// The channel of each key by the key's number.
    channels: BTreeMap<u64, Arc<str>>,
    /// Of the latest key.
    last: u64,
}

struct Channel {
    name: Arc<str>,
    epoch: Arc<str>,
    top: u64,
    used: Instant,
    first_answers: HashMap<Arc<str>, Assigned>,
    /// The keys of `first_answers`, oldest first.
    keys: VecDeque<Key>,
    sinks: Vec<(Arc<str>, Arc<dyn Sink>)>,
    /// Only where something is, or was, kept.
    log: Option<Box<Log>>,
}

struct Key {
    text: Arc<str>,
    expires: Instant,
    /// In the stripe's [`KeyOrder`].
    number: u64,
}

impl Channels {
    pub(super) fn new(
        limits: Limits,
        namespaces: SharedNamespaces,
        clock: SharedClock,
        random: SharedRandom,
    ) -> Self {
        let stripes = (0..STRIPES).map(|_| Mutex::default()).collect();
        let (hasher, kept_bytes) = (RandomState::new(), AtomicUsize::new(0));
        Self { stripes, hasher, limits, namespaces, kept_bytes, clock, random }
    }

    pub(super) fn publish(&self, new: NewPublication) -> Result<Assigned, RegistryError> {
        let now = Instant::now();
        let keep = Keep::from(self.namespaces.of(&new.channel));
        let mut stripe = self.stripe(&new.channel).lock();
        let (channel, order, kept) = self.channel(&mut stripe, &new.channel, now)?;
        if !new.dedupe_key.is_empty() {
            channel.expire_keys(now, order);
            if let Some(first) = channel.first_answers.get(new.dedupe_key.as_str()) {
                return Ok(Assigned { repeated: true, ..first.clone() });
            }
        }
        channel.top += 1;
        let assigned = Assigned {
            at: channel.position(),
            message_id: new.message_id.clone(),
            time_us: self.clock.now_us(),
            repeated: false,
        };
        if !new.dedupe_key.is_empty() {
            let number = order.push(Arc::clone(&channel.name));
            let key = Key { text: new.dedupe_key.into(), expires: now + self.limits.dedupe_window, number };
            channel.remember(key, assigned.clone(), order, &self.limits);
        }
        if keep.size == 0 {
            channel.forget_log(kept, &self.kept_bytes);
        }
        if !channel.sinks.is_empty() || keep.size > 0 {
            let publication = Arc::new(Publication {
                channel: new.channel,
                offset: assigned.at.offset,
                epoch: assigned.at.epoch.to_string(),
                message_id: new.message_id,
                payload: new.payload,
                publisher: new.publisher,
                time_us: assigned.time_us,
                trace: new.trace,
            });
            channel.sinks.iter().for_each(|(_, sink)| sink.publication(&publication));
            if keep.size > 0 {
                let log = channel.log.get_or_insert_default();
                log.push(publication, &channel.name, keep, now, kept, &self.kept_bytes);
            }
        }
        stripe.bound_keys(self.limits.total_dedupe_keys.div_ceil(STRIPES));
        stripe.bound_logs(self.limits.history_bytes, &self.kept_bytes);
        Ok(assigned)
    }

    pub(super) fn top(&self, channel: &str) -> Result<Top, RegistryError> {
        let mut stripe = self.stripe(channel).lock();
        Ok(self.channel(&mut stripe, channel, Instant::now())?.0.position())
    }

    pub(super) fn history(&self, query: &HistoryQuery) -> Result<HistoryPage, RegistryError> {
        let now = Instant::now();
        let keep = Keep::from(self.namespaces.of(&query.channel));
        let mut stripe = self.stripe(&query.channel).lock();
        let (channel, ..) = self.channel(&mut stripe, &query.channel, now)?;
        let (top, nothing) = (channel.position(), Log::default());
        Ok(channel.log.as_deref().unwrap_or(&nothing).read(top, query, keep, now))
    }

    pub(super) fn subscribe(
        &self,
        router: &Arc<str>,
        channel: &Arc<str>,
        sink: &Arc<dyn Sink>,
    ) -> Result<(), RegistryError> {
        let mut stripe = self.stripe(channel).lock();
        let (channel, ..) = self.channel(&mut stripe, channel, Instant::now())?;
        if channel.sinks.iter().all(|(other, _)| other != router) {
            channel.sinks.push((Arc::clone(router), Arc::clone(sink)));
        }
        Ok(())
    }

    pub(super) fn unsubscribe(&self, router: &str, channel: &str) {
        if let Some(channel) = self.stripe(channel).lock().channels.get_mut(channel) {
            channel.drop_router(router);
        }
    }

    pub(super) fn remove_router(&self, router: &str) {
        for stripe in &self.stripes {
            stripe.lock().channels.values_mut().for_each(|channel| channel.drop_router(router));
        }
    }

    /// Drops the state of channels that nobody used for a while; looks at a bounded number of them.
    pub(super) fn forget_idle(&self) {
        let now = Instant::now();
        for stripe in &self.stripes {
            stripe.lock().forget_idle(now, &self.limits, &self.kept_bytes);
        }
    }

    /// Has a channel lose what it keeps, as if that were too old, or all its state.
    #[cfg(test)]
    pub(super) fn lose(&self, channel: &str, all: bool) {
        let stripe = &mut *self.stripe(channel).lock();
        let Some(channel) = stripe.channels.get_mut(channel) else { return };
        channel.forget_log(&mut stripe.kept, &self.kept_bytes);
        if all {
            channel.forget_keys(&mut stripe.order);
            let (sinks, name) = (std::mem::take(&mut channel.sinks), Arc::clone(&channel.name));
            *channel = Channel { sinks, ..self.open(name, Instant::now()) };
        }
    }

    /// How many bytes are kept.
    #[cfg(test)]
    pub(super) fn kept_bytes(&self) -> usize {
        self.kept_bytes.load(Ordering::Relaxed)
    }

    /// How many dedupe keys are remembered.
    #[cfg(test)]
    pub(super) fn keys(&self) -> usize {
        self.stripes.iter().map(|stripe| stripe.lock().order.channels.len()).sum()
    }

    fn stripe(&self, channel: &str) -> &Mutex<Stripe> {
        let hash = self.hasher.hash_one(channel);
        &self.stripes[hash as usize % STRIPES]
    }

    /// The channel's state, made anew when it has none or when it is idle but not yet swept, and the orders of
    /// its stripe's keys and kept publications.
    fn channel<'a>(
        &self,
        stripe: &'a mut Stripe,
        name: &str,
        now: Instant,
    ) -> Result<(&'a mut Channel, &'a mut KeyOrder, &'a mut log::Order), RegistryError> {
        if let Some(known) = stripe.channels.get_mut(name) {
            if known.is_idle(now, &self.limits) {
                known.forget_keys(&mut stripe.order);
                known.forget_log(&mut stripe.kept, &self.kept_bytes);
                *known = self.open(Arc::clone(&known.name), now);
            }
        } else {
            if stripe.channels.len() >= self.limits.channels.div_ceil(STRIPES) {
                stripe.forget_idle(now, &self.limits, &self.kept_bytes);
                if stripe.channels.len() >= self.limits.channels.div_ceil(STRIPES) {
                    return Err(RegistryError::TooManyChannels { limit: self.limits.channels });
                }
            }
            let name: Arc<str> = name.into();
            stripe.idle.push_back((now + self.limits.idle, Arc::clone(&name)));
            stripe.channels.insert(Arc::clone(&name), self.open(name, now));
        }
        let channel = stripe.channels.get_mut(name).expect("it was there or was inserted above");
        channel.used = now;
        Ok((channel, &mut stripe.order, &mut stripe.kept))
    }

    fn open(&self, name: Arc<str>, now: Instant) -> Channel {
        let epoch = format!("{:016x}", self.random.next_u64()).into();
        Channel {
            name,
            epoch,
            top: 0,
            used: now,
            first_answers: HashMap::new(),
            keys: VecDeque::new(),
            sinks: Vec::new(),
            log: None,
        }
    }
}

impl Stripe {
    fn forget_idle(&mut self, now: Instant, limits: &Limits, kept_bytes: &AtomicUsize) {
        for name in self.kept.expired(now) {
            self.drop_oldest_of(&name, kept_bytes);
        }
        for _ in 0..IDLE_STEP {
            let Some((_, name)) = self.idle.pop_front_if(|(due, _)| *due <= now) else { return };
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            if channel.is_idle(now, limits) {
                channel.forget_keys(&mut self.order);
                channel.forget_log(&mut self.kept, kept_bytes);
                self.channels.remove(&name);
            } else {
                channel.expire_keys(now, &mut self.order);
                self.idle.push_back((now + limits.idle, name));
            }
        }
    }

    /// Forgets the oldest keys, whichever channel they belong to, until at most `most` are left.
    fn bound_keys(&mut self, most: usize) {
        while self.order.channels.len() > most.max(1) {
            let Some((_, name)) = self.order.channels.first_key_value() else { return };
            let name = Arc::clone(name);
            let channel =
                self.channels.get_mut(&name).expect("a channel takes its keys with it when it goes");
            channel.forget_oldest(&mut self.order);
        }
    }
}

impl Stripe {
    /// Forgets the oldest kept publications, whichever channel they belong to, while there is more than `most` of them
    /// in all stripes.
    fn bound_logs(&mut self, most: usize, kept_bytes: &AtomicUsize) {
        while kept_bytes.load(Ordering::Relaxed) > most {
            let Some(name) = self.kept.oldest() else { return };
            self.drop_oldest_of(&name, kept_bytes);
        }
    }

    fn drop_oldest_of(&mut self, name: &str, kept_bytes: &AtomicUsize) {
        let log = self.channels.get_mut(name).and_then(|channel| channel.log.as_deref_mut());
        log.expect("a channel takes what it keeps with it when it goes")
            .drop_oldest(&mut self.kept, kept_bytes);
    }
}

impl KeyOrder {
    /// Adds a key of the channel; returns its number.
    fn push(&mut self, channel: Arc<str>) -> u64 {
        self.last += 1;
        self.channels.insert(self.last, channel);
        self.last
    }
}

impl Channel {
    fn position(&self) -> Top {
        Top { epoch: Arc::clone(&self.epoch), offset: self.top }
    }

    fn is_idle(&self, now: Instant, limits: &Limits) -> bool {
        self.sinks.is_empty()
            && now.duration_since(self.used) >= limits.idle
            && self.log.as_deref().is_none_or(|log| !log.is_alive(now))
    }

    fn drop_router(&mut self, router: &str) {
        let before = self.sinks.len();
        self.sinks.retain(|(other, _)| &**other != router);
        if self.sinks.len() < before {
            self.used = Instant::now();
        }
    }

    fn expire_keys(&mut self, now: Instant, order: &mut KeyOrder) {
        while self.keys.front().is_some_and(|key| key.expires <= now) {
            self.forget_oldest(order);
        }
    }

    fn forget_oldest(&mut self, order: &mut KeyOrder) {
        let Some(key) = self.keys.pop_front() else { return };
        self.first_answers.remove(&key.text);
        order.channels.remove(&key.number);
    }

    fn forget_keys(&mut self, order: &mut KeyOrder) {
        while !self.keys.is_empty() {
            self.forget_oldest(order);
        }
    }

    fn forget_log(&mut self, kept: &mut log::Order, kept_bytes: &AtomicUsize) {
        if let Some(mut log) = self.log.take() {
            log.clear(kept, kept_bytes);
        }
    }

    fn remember(&mut self, key: Key, answer: Assigned, order: &mut KeyOrder, limits: &Limits) {
        while self.keys.len() >= limits.dedupe_keys.max(1) {
            self.forget_oldest(order);
        }
        self.first_answers.insert(Arc::clone(&key.text), answer);
        self.keys.push_back(key);
    }
}
