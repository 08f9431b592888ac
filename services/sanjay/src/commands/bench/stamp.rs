//! The payload of a bench's message: which run and which message it is, and when it was due.

use std::{fmt::Write as _, time::Duration};

use sanjay_client::protocol::Payload;

/// Smallest payload: a run, two numbers of 20 digits, the phase and spaces.
pub(super) const MIN_BYTES: usize = 64;

/// What a message tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Number of the message in its run.
    pub(super) index: u64,
    /// When it was due, since the run's own zero; whole microseconds.
    pub(super) due: Duration,
    /// Whether its latency counts; otherwise it belongs to the warm-up.
    pub(super) measured: bool,
}

impl Stamp {
    /// A payload of `size` bytes (at least [`MIN_BYTES`]). `run` is at most 16 bytes without spaces.
    pub(super) fn payload(&self, run: &str, size: usize) -> Payload {
        let mut text = String::with_capacity(size);
        let phase = if self.measured { 'm' } else { 'w' };
        let (index, due) = (self.index, self.due.as_micros());
        write!(text, "{run} {index} {due} {phase} ").expect("writing to a string does not fail");
        text.extend(std::iter::repeat_n('x', size.saturating_sub(text.len())));
        Payload::Text(text)
    }

    /// The stamp of a payload, when it is of this run.
    pub(super) fn read(payload: &Payload, run: &str) -> Option<Self> {
        let Payload::Text(text) = payload else { return None };
        let mut words = text.splitn(5, ' ');
        if words.next()? != run {
            return None;
        }
        let index = words.next()?.parse().ok()?;
        let due = Duration::from_micros(words.next()?.parse().ok()?);
        let measured = words.next()? == "m";
        Some(Self { index, due, measured })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_comes_back_from_a_payload_of_the_size() {
        for size in [MIN_BYTES, 128, 65_536] {
            for measured in [false, true] {
                let stamp = Stamp { index: u64::MAX, due: Duration::from_micros(u64::MAX / 4), measured };
                let payload = stamp.payload("0123456789abcdef", size);
                assert_eq!(payload.len(), size);
                assert_eq!(Stamp::read(&payload, "0123456789abcdef"), Some(stamp));
                assert_eq!(Stamp::read(&payload, "another"), None);
            }
        }
        assert_eq!(Stamp::read(&Payload::Text("run x".into()), "run"), None);
    }
}
