//! Sequences, dedupe keys and subscribers of channels.
//!
//! Invariant: everything about a channel happens under the lock of its stripe, sinks included, so that
//! offset order is delivery order.

use std::{
    collections::{HashMap, VecDeque},
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    sync::Arc,
};

use parking_lot::Mutex;
use sanjay_proto::{client::v1::Publication, router::v1::NewPublication};
use sanjay_runtime::{clock::SharedClock, random::SharedRandom};
use tokio::time::Instant;

use super::Limits;
use crate::{
    bus::Sink,
    registry::{Assigned, RegistryError, Top},
};

/// Enough that threads seldom meet at one.
const STRIPES: usize = 64;

/// Channels of a stripe that one sweep looks at: 64 stripes a second are then 16,384 channels a second.
const IDLE_STEP: usize = 256;

pub(super) struct Channels {
    stripes: Box<[Mutex<Stripe>]>,
    limits: Limits,
    clock: SharedClock,
    random: SharedRandom,
}

#[derive(Default)]
struct Stripe {
    channels: HashMap<Arc<str>, Channel>,
    /// When to look whether a channel is idle; one entry for each channel.
    idle: VecDeque<(Instant, Arc<str>)>,
}

struct Channel {
    epoch: Arc<str>,
    top: u64,
    used: Instant,
    first_answers: HashMap<Arc<str>, Assigned>,
    /// The keys of `first_answers`, oldest first, with when they expire.
    keys: VecDeque<(Instant, Arc<str>)>,
    sinks: Vec<(Arc<str>, Arc<dyn Sink>)>,
}

impl Channels {
    pub(super) fn new(limits: Limits, clock: SharedClock, random: SharedRandom) -> Self {
        let stripes = (0..STRIPES).map(|_| Mutex::default()).collect();
        Self { stripes, limits, clock, random }
    }

    pub(super) fn publish(&self, new: NewPublication) -> Result<Assigned, RegistryError> {
        let now = Instant::now();
        let mut stripe = self.stripe(&new.channel).lock();
        let channel = self.channel(&mut stripe, &new.channel, now)?;
        if !new.dedupe_key.is_empty() {
            channel.expire_keys(now);
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
            channel.remember(new.dedupe_key.into(), assigned.clone(), now, &self.limits);
        }
        if !channel.sinks.is_empty() {
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
        }
        Ok(assigned)
    }

    pub(super) fn top(&self, channel: &str) -> Result<Top, RegistryError> {
        let mut stripe = self.stripe(channel).lock();
        Ok(self.channel(&mut stripe, channel, Instant::now())?.position())
    }

    pub(super) fn subscribe(
        &self,
        router: &Arc<str>,
        channel: &Arc<str>,
        sink: &Arc<dyn Sink>,
    ) -> Result<(), RegistryError> {
        let mut stripe = self.stripe(channel).lock();
        let channel = self.channel(&mut stripe, channel, Instant::now())?;
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
            stripe.lock().forget_idle(now, &self.limits);
        }
    }

    fn stripe(&self, channel: &str) -> &Mutex<Stripe> {
        let hash = BuildHasherDefault::<DefaultHasher>::default().hash_one(channel);
        &self.stripes[hash as usize % STRIPES]
    }

    /// The channel's state, made anew when it has none or when it is idle but not yet swept.
    fn channel<'a>(
        &self,
        stripe: &'a mut Stripe,
        name: &str,
        now: Instant,
    ) -> Result<&'a mut Channel, RegistryError> {
        if let Some(known) = stripe.channels.get_mut(name) {
            if known.is_idle(now, &self.limits) {
                *known = self.open(now);
            }
        } else {
            if stripe.channels.len() >= self.limits.channels.div_ceil(STRIPES) {
                stripe.forget_idle(now, &self.limits);
                if stripe.channels.len() >= self.limits.channels.div_ceil(STRIPES) {
                    return Err(RegistryError::TooManyChannels { limit: self.limits.channels });
                }
            }
            let name: Arc<str> = name.into();
            stripe.idle.push_back((now + self.limits.idle, Arc::clone(&name)));
            stripe.channels.insert(name, self.open(now));
        }
        let channel = stripe.channels.get_mut(name).expect("it was there or was inserted above");
        channel.used = now;
        Ok(channel)
    }

    fn open(&self, now: Instant) -> Channel {
        let epoch = format!("{:016x}", self.random.next_u64()).into();
        Channel {
            epoch,
            top: 0,
            used: now,
            first_answers: HashMap::new(),
            keys: VecDeque::new(),
            sinks: Vec::new(),
        }
    }
}

impl Stripe {
    fn forget_idle(&mut self, now: Instant, limits: &Limits) {
        for _ in 0..IDLE_STEP {
            let Some((_, name)) = self.idle.pop_front_if(|(due, _)| *due <= now) else { return };
            let Some(channel) = self.channels.get_mut(&name) else { continue };
            if channel.is_idle(now, limits) {
                self.channels.remove(&name);
            } else {
                channel.expire_keys(now);
                self.idle.push_back((now + limits.idle, name));
            }
        }
    }
}

impl Channel {
    fn position(&self) -> Top {
        Top { epoch: Arc::clone(&self.epoch), offset: self.top }
    }

    fn is_idle(&self, now: Instant, limits: &Limits) -> bool {
        self.sinks.is_empty() && now.duration_since(self.used) >= limits.idle
    }

    fn drop_router(&mut self, router: &str) {
        let before = self.sinks.len();
        self.sinks.retain(|(other, _)| &**other != router);
        if self.sinks.len() < before {
            self.used = Instant::now();
        }
    }

    fn expire_keys(&mut self, now: Instant) {
        while let Some((_, key)) = self.keys.pop_front_if(|(expires, _)| *expires <= now) {
            self.first_answers.remove(&key);
        }
    }

    fn remember(&mut self, key: Arc<str>, answer: Assigned, now: Instant, limits: &Limits) {
        while self.keys.len() >= limits.dedupe_keys.max(1) {
            let Some((_, oldest)) = self.keys.pop_front() else { break };
            self.first_answers.remove(&oldest);
        }
        self.keys.push_back((now + limits.dedupe_window, Arc::clone(&key)));
        self.first_answers.insert(key, answer);
    }
}
