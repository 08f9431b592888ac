//! What was accepted and what arrived, and the check of one against the other.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
};

/// Examples of each kind of fault that a report names.
const EXAMPLES: usize = 5;

/// A recorded run. A *stream* is what a promise of order is made for, such as an inbox, or a channel for one
/// subscriber. Within it each message has a number and an identity.
#[derive(Debug, Default)]
pub struct History {
    accepted: HashMap<String, BTreeMap<u64, String>>,
    events: HashMap<String, Vec<Event>>,
}

#[derive(Debug)]
enum Event {
    Received(u64, String),
    Applied(u64, String),
}

impl History {
    /// The server promised this message. Saying the same twice, as after a retry, says nothing new.
    pub fn accepted(&mut self, stream: &str, number: u64, id: &str) {
        self.accepted.entry(stream.to_owned()).or_default().insert(number, id.to_owned());
    }

    /// It reached a client. It may do so again.
    pub fn received(&mut self, stream: &str, number: u64, id: &str) {
        self.record(stream, Event::Received(number, id.to_owned()));
    }

    /// It took effect, which is to happen once.
    pub fn applied(&mut self, stream: &str, number: u64, id: &str) {
        self.record(stream, Event::Applied(number, id.to_owned()));
    }

    fn record(&mut self, stream: &str, event: Event) {
        self.events.entry(stream.to_owned()).or_default().push(event);
    }

    /// Adds what another recorder saw, behind what this one saw.
    pub fn merge(&mut self, other: History) {
        for (stream, messages) in other.accepted {
            self.accepted.entry(stream).or_default().extend(messages);
        }
        for (stream, events) in other.events {
            self.events.entry(stream).or_default().extend(events);
        }
    }

    /// Compares.
    #[must_use]
    pub fn check(&self) -> Report {
        let mut report =
            Report { accepted: self.accepted.values().map(BTreeMap::len).sum(), ..Report::default() };
        let nothing = BTreeMap::new();
        for (stream, events) in &self.events {
            report.check_stream(stream, self.accepted.get(stream).unwrap_or(&nothing), events);
        }
        for (stream, messages) in &self.accepted {
            if !self.events.contains_key(stream) {
                report.lost.extend(messages.keys().map(|number| (stream.clone(), *number)));
            }
        }
        report
    }
}

/// What is wrong with a history: `(stream, number)` of each fault.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many messages were accepted.
    pub accepted: usize,
    /// How many took effect.
    pub applied: usize,
    /// How often something arrived that had arrived before.
    pub redelivered: usize,
    /// Accepted, without an effect.
    pub lost: Vec<(String, u64)>,
    /// Received for the first time after a later one.
    pub out_of_sequence: Vec<(String, u64)>,
    /// Took effect more than once.
    pub duplicates: Vec<(String, u64)>,
    /// Received or applied, but never accepted under this number and identity.
    pub unexpected: Vec<(String, u64)>,
}

impl Report {
    fn check_stream(&mut self, stream: &str, accepted: &BTreeMap<u64, String>, events: &[Event]) {
        let mut newest = 0;
        let (mut received, mut applied) = (HashSet::new(), HashSet::new());
        for event in events {
            let (Event::Received(number, id) | Event::Applied(number, id)) = event;
            let at = || (stream.to_owned(), *number);
            if accepted.get(number) != Some(id) {
                self.unexpected.push(at());
            }
            match event {
                Event::Received(..) if received.insert(*number) => {
                    if *number < newest {
                        self.out_of_sequence.push(at());
                    }
                    newest = newest.max(*number);
                }
                Event::Received(..) => self.redelivered += 1,
                Event::Applied(..) if applied.insert(*number) => self.applied += 1,
                Event::Applied(..) => self.duplicates.push(at()),
            }
        }
        let lost = accepted.keys().filter(|number| !applied.contains(number));
        self.lost.extend(lost.map(|number| (stream.to_owned(), *number)));
    }

    /// Checks that nothing is wrong, and that at least `enough` messages were accepted for that to mean something.
    ///
    /// # Panics
    /// Otherwise; the text counts the faults and names the first of each kind.
    pub fn assert_clean(&self, enough: usize) {
        let clean = [&self.lost, &self.out_of_sequence, &self.duplicates, &self.unexpected];
        assert!(clean.iter().all(|faults| faults.is_empty()), "{self}");
        assert!(self.accepted >= enough, "too few messages to mean something: {self}");
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { accepted, applied, redelivered, .. } = self;
        write!(f, "{accepted} accepted, {applied} applied, {redelivered} redelivered")?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Ten messages of two users, each of which `arrive` turns into those that arrived.
    fn history(arrive: impl Fn(u64) -> Vec<u64>) -> History {
        let mut history = History::default();
        for user in ["ann", "bob"] {
            for number in 1..=10 {
                history.accepted(user, number, &format!("{user}-{number}"));
            }
            for number in (1..=10).flat_map(&arrive) {
                history.received(user, number, &format!("{user}-{number}"));
                history.applied(user, number, &format!("{user}-{number}"));
            }
        }
        history
    }

    fn both(number: u64) -> Vec<(String, u64)> {
        let mut both = vec![("ann".to_owned(), number), ("bob".to_owned(), number)];
        both.sort();
        both
    }

    fn sorted(mut faults: Vec<(String, u64)>) -> Vec<(String, u64)> {
        faults.sort();
        faults
    }

    #[test]
    fn a_perfect_history_is_clean() {
        let report = history(|number| vec![number]).check();
        assert_eq!(report, Report { accepted: 20, applied: 20, ..Report::default() });
        report.assert_clean(20);
    }

    #[test]
    fn a_lost_message_is_found() {
        let report = history(|number| if number == 7 { vec![] } else { vec![number] }).check();
        assert_eq!(sorted(report.lost), both(7));
        assert!(report.out_of_sequence.is_empty() && report.duplicates.is_empty());
    }

    #[test]
    fn a_stream_from_which_nothing_arrived_is_lost() {
        let mut history = history(|number| vec![number]);
        history.accepted("cat", 1, "cat-1");
        assert_eq!(history.check().lost, vec![("cat".to_owned(), 1)]);
    }

    #[test]
    fn a_doubled_effect_is_found() {
        let report = history(|number| if number == 3 { vec![3, 3] } else { vec![number] }).check();
        assert_eq!(sorted(report.duplicates), both(3));
        assert!(report.lost.is_empty() && report.out_of_sequence.is_empty());
    }

    #[test]
    fn swapped_messages_are_found() {
        let swap = |number| match number {
            4 => vec![5],
            5 => vec![4],
            other => vec![other],
        };
        let report = history(swap).check();
        assert_eq!(sorted(report.out_of_sequence), both(4));
        assert!(report.lost.is_empty() && report.duplicates.is_empty());
    }

    #[test]
    fn a_redelivery_is_neither_disorder_nor_an_effect() {
        let mut history = history(|number| vec![number]);
        history.received("ann", 3, "ann-3");
        let report = history.check();
        report.assert_clean(20);
        assert_eq!(report.redelivered, 1);
    }

    #[test]
    fn what_nobody_sent_is_found() {
        let mut history = history(|number| vec![number]);
        history.received("ann", 11, "ann-11");
        history.applied("bob", 2, "another message");
        let report = history.check();
        assert_eq!(sorted(report.unexpected.clone()), vec![("ann".to_owned(), 11), ("bob".to_owned(), 2)]);
        assert!(report.to_string().contains("2 unexpected"), "{report}");
    }

    #[test]
    #[should_panic(expected = "too few messages")]
    fn a_run_without_messages_proves_nothing() {
        History::default().check().assert_clean(1);
    }
}
