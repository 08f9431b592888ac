//! The recent milestones of messages, kept in memory so that someone can ask where a message is.

use std::{borrow::Cow, collections::VecDeque};

use parking_lot::Mutex;
use sanjay_proto::edge::v1::Milestone;

use crate::clock::SharedClock;

/// How many bytes of a reported service or stage are kept.
const MAX_WORD: usize = 32;
/// How many bytes of a detail are kept.
const MAX_DETAIL: usize = 256;

/// A ring of recent milestones: the newest push the oldest out.
pub struct MilestoneRing {
    capacity: usize,
    service: &'static str,
    clock: SharedClock,
    entries: Mutex<VecDeque<Entry>>,
}

struct Entry {
    message_id: [u8; 16],
    time_us: u64,
    service: Cow<'static, str>,
    stage: Cow<'static, str>,
    detail: Cow<'static, str>,
}

impl MilestoneRing {
    /// A ring of at most `capacity` milestones (65,536 in production: about 6 MiB) seen by `service`.
    #[must_use]
    pub fn new(capacity: usize, service: &'static str, clock: SharedClock) -> Self {
        Self { capacity: capacity.max(1), service, clock, entries: Mutex::default() }
    }

    /// Notes that a message reached `stage` now. An id that is not 16 bytes is ignored.
    pub fn record(&self, message_id: &[u8], stage: &'static str, detail: impl Into<Cow<'static, str>>) {
        let Ok(message_id) = message_id.try_into() else { return };
        self.push(Entry {
            message_id,
            time_us: self.clock.now_us(),
            service: Cow::Borrowed(self.service),
            stage: Cow::Borrowed(stage),
            detail: bounded(detail.into(), MAX_DETAIL),
        });
    }

    /// Takes over what other processes saw, with their times. Long text is cut, odd ids are ignored.
    pub fn absorb(&self, milestones: Vec<Milestone>) {
        for milestone in milestones {
            let Ok(message_id) = milestone.message_id[..].try_into() else { continue };
            self.push(Entry {
                message_id,
                time_us: milestone.time_us,
                service: bounded(milestone.service.into(), MAX_WORD),
                stage: bounded(milestone.stage.into(), MAX_WORD),
                detail: bounded(milestone.detail.into(), MAX_DETAIL),
            });
        }
    }

    /// The milestones of one message that are still here, by time.
    #[must_use]
    pub fn of(&self, message_id: &[u8]) -> Vec<Milestone> {
        let entries = self.entries.lock();
        let mut found: Vec<_> =
            entries.iter().filter(|entry| entry.message_id[..] == *message_id).map(Entry::to_proto).collect();
        drop(entries);
        found.sort_by_key(|milestone| milestone.time_us);
        found
    }

    fn push(&self, entry: Entry) {
        let mut entries = self.entries.lock();
        let oldest = if entries.len() >= self.capacity { entries.pop_front() } else { None };
        entries.push_back(entry);
        drop(entries);
        drop(oldest);
    }
}

impl std::fmt::Debug for MilestoneRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MilestoneRing").field("service", &self.service).finish_non_exhaustive()
    }
}

impl Entry {
    fn to_proto(&self) -> Milestone {
        Milestone {
            message_id: self.message_id.to_vec().into(),
            time_us: self.time_us,
            service: self.service.to_string(),
            stage: self.stage.to_string(),
            detail: self.detail.to_string(),
        }
    }
}

fn bounded(text: Cow<'static, str>, max: usize) -> Cow<'static, str> {
    if text.len() <= max {
        return text;
    }
    let end = text.floor_char_boundary(max);
    Cow::Owned(text[..end].to_owned())
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;
    use crate::clock::ManualClock;

    fn ring(capacity: usize) -> (MilestoneRing, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::new(10));
        (MilestoneRing::new(capacity, "edge", clock.clone()), clock)
    }

    #[test]
    fn milestones_come_back_by_time() {
        let (ring, clock) = ring(10);
        let id = [7; 16];
        ring.record(&id, "received", "1 socket");
        clock.advance(Duration::from_micros(5));
        ring.record(&id, "written", format!("{} sockets", 3));
        ring.record(&[8; 16], "written", "");
        ring.record(b"short", "written", "");
        let reported = Milestone {
            message_id: id.to_vec().into(),
            time_us: 12,
            service: "router".into(),
            stage: "assigned".into(),
            detail: "é".repeat(MAX_DETAIL),
        };
        ring.absorb(vec![reported]);
        let found = ring.of(&id);
        let seen: Vec<_> = found.iter().map(|m| (m.service.as_str(), m.stage.as_str(), m.time_us)).collect();
        assert_eq!(seen, [("edge", "received", 10), ("router", "assigned", 12), ("edge", "written", 15)]);
        assert_eq!(found[1].detail.len(), MAX_DETAIL);
        assert!(ring.of(b"short").is_empty());
    }

    #[test]
    fn the_newest_push_the_oldest_out() {
        let (ring, _) = ring(2);
        for id in 1..=3_u8 {
            ring.record(&[id; 16], "received", "");
        }
        assert!(ring.of(&[1; 16]).is_empty());
        assert_eq!(ring.of(&[2; 16]).len() + ring.of(&[3; 16]).len(), 2);
    }
}
