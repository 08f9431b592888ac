//! Remembers whether something works, so that an outage is logged when it begins and when it ends, and not with
//! every call in between.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether something fails at present.
#[derive(Debug, Default)]
pub(crate) struct Outage(AtomicBool);

impl Outage {
    /// Notes a failure. True when it is the first since the last success.
    pub(crate) fn begins(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }

    /// Notes a success. True when it is the first since a failure.
    pub(crate) fn ends(&self) -> bool {
        // Nearly always it works, and then nothing is written.
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_are_told() {
        let outage = Outage::default();
        assert!(!outage.ends());
        assert!(outage.begins());
        assert!(!outage.begins());
        assert!(outage.ends());
        assert!(!outage.ends());
    }
}
