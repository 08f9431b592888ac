//! What a write does for the devices of an inbox.

use std::borrow::Cow;

use super::{
    super::{
        inbox::Inbox,
        plan::Rules,
        work::{Ack, Seeing},
    },
    Part, Plan, settle_ranges,
};
use crate::store::Settle;

impl Plan {
    /// Notes that a device is there, or forgets those that are gone. The answer counts those that found no room, or those
    /// that were forgotten.
    pub(super) fn see(
        &mut self,
        rules: &Rules<'_>,
        seeing: &Seeing,
        inbox: &Inbox,
        budget: &mut u64,
    ) -> Part {
        let count = match seeing {
            Seeing::Device(name) => {
                let seen = self.devices.see(name, &self.settled, inbox.head, rules.now_us);
                usize::from(seen.is_err())
            }
            Seeing::Gone(now_us) => self.devices.forget(*now_us),
        };
        self.written = self.written.max(self.devices.written_to_all().unwrap_or(0));
        let released = self.devices.acked_by_all(inbox.head);
        let mut part = settle_ranges(&released, inbox.head, &mut self.settled, budget);
        self.take_over(&mut part, inbox);
        part.sees = true;
        part.end = part.end.map(|(mark, _)| (mark, count));
        part
    }

    /// Takes an ack of one device: settles what no device lacks any more. `None`: it is not registered, and there is no
    /// room for it.
    pub(super) fn ack_by(
        &mut self,
        rules: &Rules<'_>,
        ack: &Ack,
        device: &str,
        inbox: &Inbox,
        budget: &mut u64,
    ) -> Option<Part> {
        let head = inbox.head;
        if head == 0 || self.devices.see(device, &self.settled, head, rules.now_us).is_err() {
            return None;
        }
        let refused = self.devices.ack(device, &ack.ranges, head, &self.settled);
        self.devices.write(device, ack.settle.written.min(head));
        self.written = self.written.max(self.devices.written_to_all().unwrap_or(0));
        let mut part = settle_ranges(&self.devices.acked_by_all(head), head, &mut self.settled, budget);
        part.end = part.end.map(|(mark, _)| (mark, refused));
        Some(part)
    }

    /// What an ack reports of attempts, without what its device has acked.
    pub(super) fn reported<'a>(&self, settle: &'a Settle) -> Cow<'a, Settle> {
        let Some(device) = &settle.device else { return Cow::Borrowed(settle) };
        let is_done = |seq: u64| self.devices.has_acked(device, seq);
        if !settle.failed.iter().any(|failure| is_done(failure.seq)) {
            return Cow::Borrowed(settle);
        }
        let failed = settle.failed.iter().filter(|failure| !is_done(failure.seq)).cloned().collect();
        Cow::Owned(Settle { failed, ..settle.clone() })
    }
}
