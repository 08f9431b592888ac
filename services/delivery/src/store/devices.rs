//! The devices of an inbox whose messages each of them has to acknowledge: what each has, and what waits for none of them.
//!
//! Pure; both adapters keep the encoded [`Devices`] with the inbox, and change them in the step that changes the inbox.

use std::time::Duration;

use prost::Message as _;

use super::{Settled, StoreError};

/// Most devices of an inbox.
pub const MAX_DEVICES: usize = 16;

/// How long a device may be away before it is forgotten.
pub const FORGET_AFTER: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// How long ago a device may have been noted as seen before that is noted again.
pub const SEEN_EVERY: Duration = Duration::from_secs(60 * 60);

/// Why a device is not registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// The inbox has [`MAX_DEVICES`] others.
    #[error(
        "the user has {MAX_DEVICES} other devices, the most there may be; they are forgotten after 30 days, or say credit 0"
    )]
    TooMany,
    /// The store could not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What the store knows of a device that reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Known {
    /// All that is needed; also when the query names no device.
    #[default]
    Lately,
    /// It is registered, and was not noted as seen for [`SEEN_EVERY`].
    LongAgo,
    /// It is not registered: the page has no messages.
    Unknown,
}

/// What [`super::InboxStore::forget_devices`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// Devices that it forgot.
    pub devices: usize,
    /// Whether there may be more.
    pub more: bool,
}

/// The devices of one inbox, in the order in which they were registered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices(Vec<Device>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    name: String,
    /// When it was last noted that it is there, Unix time in microseconds.
    seen_us: u64,
    /// Everything up to it was written to one of its sockets.
    written: u64,
    /// What it has acked, or was before its time. What the inbox has settled may be missing.
    acked: Settled,
}

impl Devices {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn get(&self, name: &str) -> Option<&Device> {
        self.0.iter().find(|device| device.name == name)
    }

    /// What is known of a device at `now_us`.
    #[must_use]
    pub fn known(&self, name: &str, now_us: u64) -> Known {
        match self.get(name) {
            None => Known::Unknown,
            Some(device) if is_older(device.seen_us, SEEN_EVERY, now_us) => Known::LongAgo,
            Some(_) => Known::Lately,
        }
    }

    /// Whether a device has acked a message; no device that is not registered has.
    #[must_use]
    pub fn has_acked(&self, name: &str, seq: u64) -> bool {
        self.get(name).is_some_and(|device| device.acked.holds(seq))
    }

    /// The devices that have acked a message.
    #[must_use]
    pub fn acked_by(&self, seq: u64) -> Vec<String> {
        self.0.iter().filter(|device| device.acked.holds(seq)).map(|device| device.name.clone()).collect()
    }

    /// Everything up to it is settled, or acked by this device.
    #[must_use]
    pub fn mark(&self, name: &str, settled: &Settled) -> u64 {
        let Some(Device { acked, .. }) = self.get(name) else { return settled.mark() };
        let mut mark = settled.mark().max(acked.mark());
        loop {
            let mut ranges = settled.ranges().iter().chain(acked.ranges());
            let Some((_, to)) = ranges.find(|(from, to)| *from <= mark + 1 && *to > mark) else {
                return mark;
            };
            mark = *to;
        }
    }

    /// Notes that a device is there, and registers it when it is new. The first one begins at the mark of what is
    /// `settled`: what came before it is for it; the others begin at `head`. Those that are to be forgotten leave room.
    ///
    /// # Errors
    /// When there are [`MAX_DEVICES`] others.
    pub fn see(
        &mut self,
        name: &str,
        settled: &Settled,
        head: u64,
        now_us: u64,
    ) -> Result<(), RegisterError> {
        if let Some(device) = self.0.iter_mut().find(|device| device.name == name) {
            if is_older(device.seen_us, SEEN_EVERY, now_us) {
                device.seen_us = now_us;
            }
            return Ok(());
        }
        if self.0.len() >= MAX_DEVICES {
            self.forget(now_us);
        }
        if self.0.len() >= MAX_DEVICES {
            return Err(RegisterError::TooMany);
        }
        let begins = if self.0.is_empty() { settled.mark() } else { head };
        let acked = Settled::new(begins, Vec::new());
        self.0.push(Device { name: name.to_owned(), seen_us: now_us, written: begins, acked });
        Ok(())
    }

    /// Forgets the devices that were not seen for [`FORGET_AFTER`]; says how many.
    pub fn forget(&mut self, now_us: u64) -> usize {
        let before = self.0.len();
        self.0.retain(|device| !is_older(device.seen_us, FORGET_AFTER, now_us));
        before - self.0.len()
    }

    /// A registered device acks ranges, up to `head`. Says how many of them were refused, as the device would have too many
    /// ranges above its mark.
    pub fn ack(&mut self, name: &str, ranges: &[(u64, u64)], head: u64, settled: &Settled) -> usize {
        let Some(device) = self.0.iter_mut().find(|device| device.name == name) else { return 0 };
        if ranges.is_empty() {
            return 0;
        }
        // What is settled needs no room of its own, and joins what lies around it.
        let known = [(1, settled.mark())].into_iter().chain(settled.ranges().iter().copied());
        for (from, to) in known {
            let _no_room = device.acked.settle(from, to);
        }
        let refused = ranges.iter().filter(|(from, to)| device.acked.settle(*from, (*to).min(head)).is_err());
        refused.count()
    }

    /// A device has everything up to `written` on a socket.
    pub fn write(&mut self, name: &str, written: u64) {
        if let Some(device) = self.0.iter_mut().find(|device| device.name == name) {
            device.written = device.written.max(written);
        }
    }

    /// Everything up to it was written to a socket of each device; `None` without devices.
    #[must_use]
    pub fn written_to_all(&self) -> Option<u64> {
        self.0.iter().map(|device| device.written).min()
    }

    /// Whether some device has everything up to `head` on a socket.
    #[must_use]
    pub fn has_written(&self, head: u64) -> bool {
        self.0.iter().any(|device| device.written >= head)
    }

    /// When the device was last seen that is away for longest, Unix time in microseconds.
    #[must_use]
    pub fn longest_unseen_us(&self) -> Option<u64> {
        self.0.iter().map(|device| device.seen_us).min()
    }

    /// What all devices have acked of the messages up to `head`, as ascending ranges: it waits for nobody. Nothing when
    /// there are no devices.
    #[must_use]
    pub fn acked_by_all(&self, head: u64) -> Vec<(u64, u64)> {
        let Some((first, others)) = self.0.split_first() else { return Vec::new() };
        let clip = |device: &Device| -> Vec<(u64, u64)> {
            let low = [(1, device.acked.mark())].into_iter().filter(|(from, to)| from <= to);
            let all = low.chain(device.acked.ranges().iter().copied());
            all.map(|(from, to)| (from, to.min(head))).filter(|(from, to)| from <= to).collect()
        };
        others.iter().fold(clip(first), |common, device| intersect(&common, &clip(device)))
    }

    /// As it is stored; empty when there are none.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let record = |device: &Device| DeviceRecord {
            name: device.name.clone(),
            seen_us: device.seen_us,
            written: device.written,
            mark: device.acked.mark(),
            acked: device.acked.ranges().iter().flat_map(|&(from, to)| [from, to]).collect(),
        };
        DevicesRecord { devices: self.0.iter().map(record).collect() }.encode_to_vec()
    }

    /// What [`Devices::encode`] gave.
    ///
    /// # Errors
    /// When the bytes are something else.
    pub fn decode(bytes: &[u8]) -> Result<Self, prost::DecodeError> {
        let DevicesRecord { devices } = DevicesRecord::decode(bytes)?;
        let device = |DeviceRecord { name, seen_us, written, mark, acked }| {
            let ranges = acked.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
            Device { name, seen_us, written, acked: Settled::new(mark, ranges) }
        };
        Ok(Self(devices.into_iter().map(device).collect()))
    }
}

fn is_older(seen_us: u64, than: Duration, now_us: u64) -> bool {
    seen_us.saturating_add(than.as_micros() as u64) <= now_us
}

/// What is in both lists of ascending ranges.
fn intersect(one: &[(u64, u64)], other: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let (mut both, mut at, mut beside) = (Vec::new(), 0, 0);
    while let (Some(&(from, to)), Some(&(other_from, other_to))) = (one.get(at), other.get(beside)) {
        let (low, high) = (from.max(other_from), to.min(other_to));
        if low <= high {
            both.push((low, high));
        }
        if to < other_to { at += 1 } else { beside += 1 }
    }
    both
}

#[derive(Clone, PartialEq, prost::Message)]
struct DevicesRecord {
    #[prost(message, repeated, tag = "1")]
    devices: Vec<DeviceRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct DeviceRecord {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(uint64, tag = "2")]
    seen_us: u64,
    #[prost(uint64, tag = "3")]
    written: u64,
    #[prost(uint64, tag = "4")]
    mark: u64,
    /// from, to, from, to, …
    #[prost(uint64, repeated, tag = "5")]
    acked: Vec<u64>,
}

#[cfg(test)]
#[path = "devices_tests.rs"]
mod tests;
