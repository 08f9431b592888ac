//! Publications of channels: what was published, what each subscription got, and what it was told to have missed.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::Report;

/// Holes are listed number by number up to this many at once.
const LISTED: u64 = 1_000;

/// A message of a channel with its place and its origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    /// The channel.
    pub channel: String,
    /// Names the sequence.
    pub epoch: String,
    /// Its position in it, from 1.
    pub offset: u64,
    /// Who published it.
    pub publisher: String,
    /// Counts the publisher's messages of the channel. A publisher that repeats one uses its number again.
    pub number: u64,
    /// Its id.
    pub id: String,
}

/// A recorded run over channels. A subscription may miss something only when it is told so.
#[derive(Debug, Default)]
pub struct Publications {
    channels: HashMap<String, Channel>,
    subscriptions: BTreeMap<(String, String), Vec<Event>>,
}

#[derive(Debug, Default)]
struct Channel {
    /// Channel, publisher and number of what was sent, whether it was answered or not.
    attempted: HashSet<(String, u64)>,
    /// The epochs in the order of their first answers.
    epochs: Vec<String>,
    /// What was answered, by epoch and offset.
    accepted: HashMap<String, BTreeMap<u64, Publication>>,
}

#[derive(Debug)]
enum Event {
    /// From here on everything is to come.
    At(String, u64),
    Received(Publication),
    Left,
}

impl Publications {
    /// A publish is sent. Its outcome may stay unknown, in which case it may be received or not.
    pub fn attempted(&mut self, channel: &str, publisher: &str, number: u64) {
        let channel = self.channels.entry(channel.to_owned()).or_default();
        channel.attempted.insert((publisher.to_owned(), number));
    }

    /// A publish was answered with this place.
    pub fn accepted(&mut self, publication: Publication) {
        self.attempted(&publication.channel, &publication.publisher, publication.number);
        let channel = self.channels.entry(publication.channel.clone()).or_default();
        if !channel.epochs.contains(&publication.epoch) {
            channel.epochs.push(publication.epoch.clone());
        }
        let epoch = channel.accepted.entry(publication.epoch.clone()).or_default();
        epoch.insert(publication.offset, publication);
    }

    /// A subscription was told where it stands: when it began, by a gap that ended there, or by a new epoch. What lies
    /// between the message before and this place is announced as missed.
    pub fn positioned(&mut self, subscriber: &str, channel: &str, epoch: &str, offset: u64) {
        self.record(subscriber, channel, Event::At(epoch.to_owned(), offset));
    }

    /// A subscription got a message.
    pub fn received(&mut self, subscriber: &str, publication: Publication) {
        let channel = publication.channel.clone();
        self.record(subscriber, &channel, Event::Received(publication));
    }

    /// A subscription ended: what comes after is not meant for it, until it is positioned again.
    pub fn left(&mut self, subscriber: &str, channel: &str) {
        self.record(subscriber, channel, Event::Left);
    }

    fn record(&mut self, subscriber: &str, channel: &str, event: Event) {
        self.subscriptions.entry((subscriber.to_owned(), channel.to_owned())).or_default().push(event);
    }

    /// Adds what another recorder saw, behind what this one saw.
    pub fn merge(&mut self, other: Publications) {
        for (name, channel) in other.channels {
            for (publisher, number) in channel.attempted {
                self.attempted(&name, &publisher, number);
            }
            let mut accepted = channel.accepted;
            for epoch in &channel.epochs {
                accepted.remove(epoch).into_iter().flatten().for_each(|(_, one)| self.accepted(one));
            }
        }
        for (subscription, events) in other.subscriptions {
            self.subscriptions.entry(subscription).or_default().extend(events);
        }
    }

    /// Compares: each subscription got what was published since it began, in order, once, or was told otherwise; and
    /// each publisher's messages of an epoch in their order.
    #[must_use]
    pub fn check(&self) -> Report {
        let mut report = Report::default();
        let nothing = Channel::default();
        for ((subscriber, name), events) in &self.subscriptions {
            let channel = self.channels.get(name).unwrap_or(&nothing);
            let stream = format!("{subscriber} on {name}");
            Checker { channel, stream, report: &mut report, place: None, newest: HashMap::new() }
                .check(events);
        }
        report.accepted = report.applied + report.missed + report.lost.len();
        report
    }
}

struct Checker<'a> {
    channel: &'a Channel,
    stream: String,
    report: &'a mut Report,
    /// Epoch and offset up to which everything has come or was announced.
    place: Option<(&'a str, u64)>,
    /// The newest number of each epoch and publisher.
    newest: HashMap<(&'a str, &'a str), u64>,
}

impl<'a> Checker<'a> {
    fn check(&mut self, events: &'a [Event]) {
        for event in events {
            match event {
                Event::At(epoch, offset) => self.at(epoch, *offset),
                Event::Received(publication) => self.received(publication),
                Event::Left => self.place = None,
            }
        }
        let Some((epoch, offset)) = self.place else { return };
        let lost =
            self.channel.after(epoch, offset).map(|publication| (self.stream.clone(), publication.offset));
        self.report.lost.extend(lost);
    }

    fn at(&mut self, epoch: &'a str, offset: u64) {
        if let Some((before, last)) = self.place {
            if before == epoch && offset < last {
                self.report.out_of_sequence.push((self.stream.clone(), offset));
            }
            let until = self.channel.after(epoch, offset).count();
            let missed = self.channel.after(before, last).count().saturating_sub(until);
            self.report.missed += missed;
        }
        self.place = Some((epoch, offset));
    }

    fn received(&mut self, publication: &'a Publication) {
        let Publication { epoch, offset, publisher, number, .. } = publication;
        let at = |number: u64| (self.stream.clone(), number);
        let answered = self.channel.accepted.get(epoch).and_then(|epoch| epoch.get(offset));
        let sent = self.channel.attempted.contains(&(publisher.clone(), *number));
        if !sent || answered.is_some_and(|answered| answered != publication) {
            self.report.unexpected.push(at(*offset));
        }
        match self.place {
            Some((place, last)) if place == epoch => {
                if *offset <= last {
                    self.report.duplicates.push(at(*offset));
                    return;
                }
                self.report.lost.extend((last + 1..*offset).take(LISTED as usize).map(at));
            }
            // Nobody said that the numbering would begin anew, or that there is a subscription.
            _ => self.report.out_of_sequence.push(at(*offset)),
        }
        self.report.applied += 1;
        self.place = Some((epoch, *offset));
        match self.newest.insert((epoch, publisher), *number) {
            Some(newest) if newest == *number => self.report.duplicates.push(at(*offset)),
            Some(newest) if newest > *number => self.report.out_of_sequence.push(at(*offset)),
            _ => {}
        }
    }
}

impl Channel {
    /// What was answered above a place, in its epoch and in those that began later.
    fn after(&self, epoch: &str, offset: u64) -> impl Iterator<Item = &Publication> {
        let begin = self.epochs.iter().position(|known| known == epoch);
        // An epoch of which nothing was answered: the others lie before it.
        let later = &self.epochs[begin.map_or(self.epochs.len(), |index| index + 1)..];
        let here = self.accepted.get(epoch).into_iter().flat_map(move |epoch| epoch.range(offset + 1..));
        let later = later.iter().filter_map(|epoch| self.accepted.get(epoch)).flatten();
        here.chain(later).map(|(_, publication)| publication)
    }
}

#[cfg(test)]
#[path = "publications_tests.rs"]
mod tests;
