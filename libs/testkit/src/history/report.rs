//! What the check of a history found.

use std::fmt;

/// Examples of each kind of fault that a report names.
const EXAMPLES: usize = 5;

/// A stream and a number in it.
pub(super) type At = (String, u64);

/// What is wrong with a history: `(stream, number)` of each fault.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many messages were accepted; of publications, once for each subscription that they were for.
    pub accepted: usize,
    /// How many took effect; of publications, how many were received.
    pub applied: usize,
    /// How often something arrived that had arrived before.
    pub redelivered: usize,
    /// Publications that a subscription was told it had missed.
    pub missed: usize,
    /// How many disturbances came after something had been accepted, and had something accepted after them.
    pub disturbances: usize,
    /// Accepted, without an effect. Publications: neither received nor announced as missed.
    pub lost: Vec<At>,
    /// Received for the first time after a later one, or not in the order of one connection.
    pub out_of_sequence: Vec<At>,
    /// Took effect more than once.
    pub duplicates: Vec<At>,
    /// Received or applied, but never accepted under this number and identity.
    pub unexpected: Vec<At>,
}

impl Report {
    /// Checks that nothing is wrong, and that at least `enough` messages were accepted and took effect for that to mean
    /// something.
    ///
    /// # Panics
    /// Otherwise; the text counts the faults and names the first of each kind.
    pub fn assert_clean(&self, enough: usize) {
        let clean = [&self.lost, &self.out_of_sequence, &self.duplicates, &self.unexpected];
        assert!(clean.iter().all(|faults| faults.is_empty()), "{self}");
        let meaning = self.accepted.min(self.applied);
        assert!(meaning >= enough, "too few messages to mean something: {self}");
    }

    /// Checks that at least so many disturbances came while messages were being accepted.
    ///
    /// # Panics
    /// Otherwise.
    pub fn assert_disturbed(&self, times: usize) {
        assert!(self.disturbances >= times, "too few disturbances to mean something: {self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { accepted, applied, redelivered, missed, disturbances, .. } = self;
        write!(f, "{accepted} accepted, {applied} applied, {redelivered} redelivered, {missed} missed, ")?;
        write!(f, "{disturbances} disturbances")?;
        let kinds = [
            ("lost", &self.lost),
            ("out of sequence", &self.out_of_sequence),
            ("applied twice", &self.duplicates),
            ("unexpected", &self.unexpected),
        ];
        for (kind, faults) in kinds {
            write!(f, ", {} {kind}", faults.len())?;
            for (index, (stream, number)) in faults.iter().take(EXAMPLES).enumerate() {
                write!(f, "{}{stream} {number}", if index == 0 { " (" } else { ", " })?;
            }
            if !faults.is_empty() {
                f.write_str(if faults.len() > EXAMPLES { ", …)" } else { ")" })?;
            }
        }
        Ok(())
    }
}
