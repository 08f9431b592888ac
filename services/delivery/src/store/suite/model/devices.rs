//! Devices: what they should lack, and what is done with them.

use super::{super::failing::NAK, *};

/// A device of a user.
#[derive(Debug)]
pub(super) struct ModelDevice {
    name: u8,
    seen_us: u64,
    written: u64,
    acked: BTreeSet<u64>,
}

fn device(name: u8) -> String {
    format!("device-{name}")
}

fn older(seen_us: u64, than: Duration, now_us: u64) -> bool {
    seen_us + than.as_micros() as u64 <= now_us
}

impl ModelInbox {
    fn device(&mut self, name: u8) -> Option<&mut ModelDevice> {
        self.devices.iter_mut().find(|device| device.name == name)
    }

    /// A device is there.
    fn see(&mut self, name: u8, now_us: u64) {
        self.met = true;
        let begins = if self.devices.is_empty() { self.mark() } else { self.head() };
        match self.device(name) {
            Some(device) if older(device.seen_us, SEEN_EVERY, now_us) => device.seen_us = now_us,
            Some(_) => {}
            None => {
                let acked = (1..=begins).collect();
                self.devices.push(ModelDevice { name, seen_us: now_us, written: begins, acked });
            }
        }
        self.note_written();
    }

    fn note_written(&mut self) {
        let all = self.devices.iter().map(|device| device.written).min();
        self.written = self.written.max(all.unwrap_or(0));
    }

    /// What is unsettled and no device lacks.
    fn acked_by_all(&self) -> Vec<u64> {
        let mut seqs = self.unsettled();
        let all = |seq: &u64| self.devices.iter().all(|device| device.acked.contains(seq));
        seqs.retain(|seq| !self.devices.is_empty() && all(seq));
        seqs
    }

    /// Whether all of it was written to some device.
    pub(super) fn missed(&self) -> bool {
        self.devices.iter().any(|device| device.written >= self.head())
    }
}

impl<H: Harness> Pair<H> {
    /// A device reads, and is registered when it is not.
    pub(super) async fn device_reads(&mut self, user: u8, name: u8, after: Option<u64>) {
        let now_us = self.harness.clock().now_us();
        let query =
            InboxQuery { device: Some(device(name)), ..query(&super::name(user), after, MAX_PAGE_MESSAGES) };
        let before = self.store().read(vec![query.clone()]).await.remove(0).unwrap();
        let known = match self.model.entry(user).or_default().device(name) {
            None => Known::Unknown,
            Some(device) if older(device.seen_us, SEEN_EVERY, now_us) => Known::LongAgo,
            Some(_) => Known::Lately,
        };
        assert_eq!(before.device, known);
        if known == Known::Unknown {
            assert_eq!(before.messages, []);
        }
        let seen = self.store().register(vec![(super::name(user), device(name))]).await;
        assert_eq!(seen, [Ok(())]);
        let inbox = self.model.entry(user).or_default();
        inbox.see(name, now_us);
        let deliverable = inbox.deliverable(now_us);
        let (unsettled, head) = (inbox.unsettled(), inbox.head());
        let acked = &inbox.device(name).expect("it was registered").acked;
        let mark =
            (1..=head).take_while(|seq| acked.contains(seq) || !unsettled.contains(seq)).count() as u64;
        let above = after.unwrap_or(mark);
        let lacks = |(seq, _): &(u64, u32)| *seq > above && !acked.contains(seq);
        let expected: Vec<_> = deliverable.into_iter().filter(lacks).collect();
        let page = self.store().read(vec![query]).await.remove(0).unwrap();
        assert_eq!((page.device, page.mark, page.head, page.covers), (Known::Lately, mark, head, head));
        assert_eq!(deliveries(&page), expected);
    }

    /// A device acks, and reports failures of what it names.
    pub(super) async fn device_acks(
        &mut self,
        user: u8,
        name: u8,
        range: (u64, u64),
        written: u64,
        fails: u64,
    ) {
        let clock = self.harness.clock().clone();
        let now_us = clock.now_us();
        let (from, to) = (range.0, range.0 + range.1);
        let epoch = read_all(&**self.store(), &super::name(user)).await.epoch;
        let newest = self.model.entry(user).or_default().attempts.newest(fails).unwrap_or(1);
        let failed = failure(fails, newest, NAK, &clock);
        let report = Settle {
            device: Some(device(name)),
            failed: vec![failed.clone()],
            ..settle(&super::name(user), epoch, &[(from, to)], written)
        };
        let acked = self.store().ack(vec![report]).await.remove(0).unwrap();
        let inbox = self.model.entry(user).or_default();
        let head = inbox.head();
        if head == 0 {
            assert_eq!(acked, Acked::default());
            return;
        }
        inbox.see(name, now_us);
        let one = inbox.device(name).expect("it was registered");
        one.acked.extend(from..=to.min(head));
        one.written = one.written.max(written.min(head));
        inbox.note_written();
        let all = inbox.acked_by_all();
        for seq in &all {
            self.changed.push((user, inbox.get(*seq).id));
            inbox.settle(*seq, *seq, State::Acked, now_us);
        }
        let lacks = !inbox.device(name).expect("it is registered").acked.contains(&fails);
        let mut verdicts = Vec::new();
        if fails <= head && !inbox.is_settled(fails) && lacks {
            let verdict = inbox.attempts.fail(failed, MAX_ATTEMPTS, 0.0);
            verdicts.extend(verdict.map(|verdict| (fails, verdict)));
        }
        for (seq, verdict) in &verdicts {
            if let Verdict::Dead(reason) = verdict {
                self.die(user, epoch, *seq, *reason);
            }
        }
        assert_eq!(acked.failed, verdicts);
        assert_eq!(acked.messages.iter().map(|message| message.seq).collect::<Vec<_>>(), all);
        assert_eq!((acked.mark, acked.refused), (self.model[&user].mark(), 0));
    }

    /// Forgets the devices that are gone, so many inboxes at a time.
    pub(super) async fn forget_devices(&mut self, limit: usize) {
        let now_us = self.harness.clock().now_us();
        let (mut forgotten, mut calls) = (0, 0);
        loop {
            let step = self.store().forget_devices(now_us, limit).await.unwrap();
            (forgotten, calls) = (forgotten + step.devices, calls + 1);
            if !step.more {
                break;
            }
            assert!(calls < 100, "there is always more");
        }
        let mut expected = 0;
        for user in self.model.keys().copied().collect::<Vec<u8>>() {
            let inbox = self.model.entry(user).or_default();
            let before = inbox.devices.len();
            inbox.devices.retain(|device| !older(device.seen_us, FORGET_AFTER, now_us));
            if before == inbox.devices.len() {
                continue;
            }
            expected += before - inbox.devices.len();
            inbox.note_written();
            for seq in inbox.acked_by_all() {
                self.end(user, seq, State::Acked);
            }
        }
        assert_eq!(forgotten, expected);
    }
}
