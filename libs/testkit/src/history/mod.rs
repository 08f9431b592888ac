//! What was accepted and what arrived, and the check of one against the other.

mod publications;
mod report;

use std::collections::{BTreeMap, HashMap, HashSet};

pub use publications::{Publication, Publications};
pub use report::Report;

/// A recorded run. A *stream* is what a promise of order is made for, such as an inbox, or a channel for one
/// subscriber. Within it each message has a number and an identity.
#[derive(Debug, Default)]
pub struct History {
    accepted: HashMap<String, BTreeMap<u64, String>>,
    accepted_count: usize,
    events: HashMap<String, Vec<Event>>,
    /// How much had been accepted when each disturbance came.
    disturbances: Vec<usize>,
}

#[derive(Debug)]
enum Event {
    Connected,
    Received(u64, String),
    Applied(u64, String),
}

impl History {
    /// The server promised this message. Saying the same twice, as after a retry, says nothing new.
    pub fn accepted(&mut self, stream: &str, number: u64, id: &str) {
        let before = self.accepted.entry(stream.to_owned()).or_default().insert(number, id.to_owned());
        self.accepted_count += usize::from(before.is_none());
    }

    /// How many messages were accepted so far.
    #[must_use]
    pub fn accepted_count(&self) -> usize {
        self.accepted_count
    }

    /// A connection of the stream begins. What one connection receives is to ascend strictly, where connections are
    /// recorded at all.
    pub fn connected(&mut self, stream: &str) {
        self.record(stream, Event::Connected);
    }

    /// It reached a client. It may do so again.
    pub fn received(&mut self, stream: &str, number: u64, id: &str) {
        self.record(stream, Event::Received(number, id.to_owned()));
    }

    /// It took effect, which is to happen once.
    pub fn applied(&mut self, stream: &str, number: u64, id: &str) {
        self.record(stream, Event::Applied(number, id.to_owned()));
    }

    /// Something was broken on purpose.
    pub fn disturbed(&mut self) {
        self.disturbances.push(self.accepted_count);
    }

    fn record(&mut self, stream: &str, event: Event) {
        self.events.entry(stream.to_owned()).or_default().push(event);
    }

    /// Adds what another recorder saw, behind what this one saw.
    pub fn merge(&mut self, other: History) {
        self.disturbances.extend(other.disturbances.iter().map(|count| self.accepted_count + count));
        for (stream, messages) in other.accepted {
            for (number, id) in messages {
                self.accepted(&stream, number, &id);
            }
        }
        for (stream, events) in other.events {
            self.events.entry(stream).or_default().extend(events);
        }
    }

    /// Compares.
    #[must_use]
    pub fn check(&self) -> Report {
        let mut report = Report { accepted: self.accepted_count, ..Report::default() };
        let landed = self.disturbances.iter().filter(|&&count| 0 < count && count < self.accepted_count);
        report.disturbances = landed.count();
        let nothing = BTreeMap::new();
        for (stream, events) in &self.events {
            check_stream(&mut report, stream, self.accepted.get(stream).unwrap_or(&nothing), events);
        }
        for (stream, messages) in &self.accepted {
            if !self.events.contains_key(stream) {
                report.lost.extend(messages.keys().map(|number| (stream.clone(), *number)));
            }
        }
        report
    }
}

fn check_stream(report: &mut Report, stream: &str, accepted: &BTreeMap<u64, String>, events: &[Event]) {
    let mut newest = 0;
    // The newest of the connection; none until one is recorded.
    let mut connection = None;
    let (mut received, mut applied) = (HashSet::new(), HashSet::new());
    for event in events {
        let (Event::Received(number, id) | Event::Applied(number, id)) = event else {
            connection = Some(0);
            continue;
        };
        let at = || (stream.to_owned(), *number);
        if accepted.get(number) != Some(id) {
            report.unexpected.push(at());
        }
        if let (Event::Applied(..), first) = (event, applied.contains(number)) {
            applied.insert(*number);
            if first {
                report.duplicates.push(at())
            } else {
                report.applied += 1
            }
            continue;
        }
        let first = received.insert(*number);
        report.redelivered += usize::from(!first);
        let late = first && *number < newest;
        if late || connection.is_some_and(|newest| *number <= newest) {
            report.out_of_sequence.push(at());
        }
        newest = newest.max(*number);
        connection = connection.map(|newest: u64| newest.max(*number));
    }
    let lost = accepted.keys().filter(|number| !applied.contains(number));
    report.lost.extend(lost.map(|number| (stream.to_owned(), *number)));
}

#[cfg(test)]
mod tests;
