//! Inboxes whose messages each device has to ack: which devices there are, and what they have acked.

use redb::{ReadableDatabase, ReadableTable};

use super::{
    tables::{self, InboxRecord},
    transaction::{Ended, Tables},
};
use crate::{
    message::State,
    store::{Devices, FORGET_AFTER, Forgotten, RegisterError, Settle, Settled},
};

impl InboxRecord {
    /// The inbox's devices.
    ///
    /// # Errors
    /// When they are damaged.
    pub(super) fn devices(&self) -> Result<Devices, redb::Error> {
        Devices::decode(&self.devices)
            .map_err(|error| redb::Error::Corrupted(format!("the devices of an inbox: {error}")))
    }

    /// Notes devices that changed, and what they have made of what is written.
    pub(super) fn set_devices(&mut self, devices: &Devices) {
        self.devices = devices.encode();
        self.seen_us = devices.longest_unseen_us().unwrap_or(0);
        self.written = self.written.max(devices.written_to_all().unwrap_or(0));
    }
}

/// What a device's ack comes to.
pub(super) struct DeviceAck {
    /// What no device lacks any more; some of it may be settled.
    pub(super) ranges: Vec<(u64, u64)>,
    /// How many of its ranges the device has no room for.
    pub(super) refused: usize,
    /// Those of its failures that count; `None` for all.
    pub(super) report: Option<Settle>,
}

impl Tables<'_> {
    /// Notes that a device is there.
    pub(super) fn register(
        &mut self,
        user: &str,
        device: &str,
    ) -> Result<Result<(), RegisterError>, redb::Error> {
        let now_us = self.rules.now_us;
        let inbox = self.inbox(user)?;
        let before = inbox.record.devices()?;
        let (mut devices, settled) = (before.clone(), inbox.record.settled());
        let seen = devices.see(device, &settled, inbox.record.head, now_us);
        if seen.is_ok() && devices != before {
            self.change_devices(user, &devices)?;
        }
        Ok(seen)
    }

    /// Forgets devices, of up to `limit` inboxes.
    pub(super) fn forget_devices(&mut self, now_us: u64, limit: usize) -> Result<Forgotten, redb::Error> {
        let cutoff_us = now_us.saturating_sub(FORGET_AFTER.as_micros() as u64);
        let mut users: Vec<String> = Vec::new();
        for entry in self.seen.range((0, "")..(cutoff_us.saturating_add(1), ""))?.take(limit) {
            users.push(entry?.0.value().1.to_owned());
        }
        let mut forgotten = Forgotten { devices: 0, more: users.len() == limit };
        for user in users {
            let mut devices = self.inbox(&user)?.record.devices()?;
            forgotten.devices += devices.forget(now_us);
            self.change_devices(&user, &devices)?;
        }
        Ok(forgotten)
    }

    /// Notes other devices, and settles what waited for those that are gone.
    fn change_devices(&mut self, user: &str, devices: &Devices) -> Result<(), redb::Error> {
        let inbox = self.inbox(user)?;
        inbox.record.set_devices(devices);
        inbox.changed = true;
        let head = inbox.record.head;
        let (mut settled, attempts) = (inbox.record.settled(), inbox.record.attempts()?);
        let mut ended = Ended::new(State::Acked, attempts);
        for (from, to) in fresh(&mut settled, &devices.acked_by_all(head)).0 {
            self.remove_bodies(user, from, to, &mut ended)?;
        }
        let inbox = self.inbox(user)?;
        if ended.count + ended.dead > 0 {
            inbox.record.set_settled(&settled);
            ended.note(&mut inbox.record);
            inbox.record.attempts = ended.attempts.encode();
        }
        inbox.record.disarm_when_done()?;
        self.must_sync = true;
        Ok(())
    }

    /// Takes an ack of one device. `None`: it is not registered, and there is no room for it.
    pub(super) fn ack_by_device(
        &mut self,
        settle: &Settle,
        device: &str,
    ) -> Result<Option<DeviceAck>, redb::Error> {
        let now_us = self.rules.now_us;
        let inbox = self.inbox(&settle.user)?;
        let (head, settled) = (inbox.record.head, inbox.record.settled());
        let before = inbox.record.devices()?;
        let mut devices = before.clone();
        if head == 0 || devices.see(device, &settled, head, now_us).is_err() {
            return Ok(None);
        }
        let mut ranges: Vec<_> = settle.ranges.iter().map(|range| (range.from, range.to)).collect();
        ranges.sort_unstable();
        let refused = devices.ack(device, &ranges, head, &settled);
        devices.write(device, settle.written.min(head));
        if devices != before {
            inbox.record.set_devices(&devices);
            inbox.changed = true;
            self.must_sync |= !ranges.is_empty();
        }
        let is_done = |seq: u64| devices.has_acked(device, seq);
        let report = settle.failed.iter().any(|failure| is_done(failure.seq)).then(|| {
            let failed = settle.failed.iter().filter(|failure| !is_done(failure.seq)).cloned().collect();
            Settle { failed, ..settle.clone() }
        });
        Ok(Some(DeviceAck { ranges: devices.acked_by_all(head), refused, report }))
    }
}

/// Settles ranges; returns what of them was not settled, and how many were refused.
pub(super) fn fresh(settled: &mut Settled, ranges: &[(u64, u64)]) -> (Vec<(u64, u64)>, usize) {
    let (mut fresh, mut refused) = (Vec::new(), 0);
    for &(from, to) in ranges {
        match settled.settle(from, to) {
            Ok(parts) => fresh.extend(parts),
            Err(_) => refused += 1,
        }
    }
    (fresh, refused)
}

/// Whether a device was not seen for so long that it is to be forgotten.
pub(super) fn anyone_to_forget(database: &redb::Database, now_us: u64) -> Result<bool, redb::Error> {
    let seen = database.begin_read()?.open_table(tables::SEEN)?;
    let first = seen.first()?;
    let cutoff_us = now_us.saturating_sub(FORGET_AFTER.as_micros() as u64);
    Ok(first.is_some_and(|(key, _)| key.value().0 <= cutoff_us))
}
