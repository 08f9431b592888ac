//! What was sent, accepted, delivered, given back, acknowledged and applied in a run, and the check of one against the
//! other. It knows nothing of servers or time: events in, a report out.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// Examples of each kind of fault that a report names.
const EXAMPLES: usize = 4;

/// Events of a message's story.
const STORY: usize = 30;

/// Something that happened to one user's messages. A *number* is the sender's name for a message, unique for the user;
/// `seq` and `id` are the server's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    /// Handed to the API. Until an answer says more it may be in the inbox or not.
    Sent { number: u64 },
    /// The answer was OK. `stream` names the stream on which it was asked for; `None` when its order says nothing: it
    /// was a repeat, or known already.
    Accepted { number: u64, seq: u64, id: String, stream: Option<u64> },
    /// The answer was that it is not, and will not be, in the inbox.
    Refused { number: u64 },
    /// A dead letter was sent again, as this message.
    Redriven { number: u64, seq: u64, id: String },
    /// A connection begins; deliveries up to the next one are its own.
    Connected,
    /// It reached a client, as attempt `delivery`, from 1.
    Delivered { number: u64, seq: u64, delivery: u32, id: String },
    /// A client said that a delivery failed.
    Failed { seq: u64 },
    /// A client was answered that its ack is durable.
    Acked { seq: u64 },
    /// It is a dead letter.
    Dead { number: u64, id: String },
    /// It took effect at the application.
    Applied { number: u64 },
}

impl Event {
    /// The seq that it is about.
    fn seq(&self) -> Option<u64> {
        match self {
            Event::Accepted { seq, .. }
            | Event::Redriven { seq, .. }
            | Event::Delivered { seq, .. }
            | Event::Failed { seq }
            | Event::Acked { seq } => Some(*seq),
            _ => None,
        }
    }
}

/// A recorded run.
#[derive(Debug, Default)]
pub(crate) struct History {
    users: BTreeMap<String, User>,
    /// How much had been accepted when each fault came.
    faults: Vec<usize>,
    accepted: usize,
}

#[derive(Debug, Default)]
struct User {
    events: Vec<Event>,
    accepted: BTreeSet<u64>,
    applied: BTreeSet<u64>,
    /// Numbers that may die.
    poison: BTreeSet<u64>,
}

impl History {
    /// Adds what has happened last.
    pub(crate) fn record(&mut self, user: &str, event: Event) {
        if !self.users.contains_key(user) {
            self.users.insert(user.to_owned(), User::default());
        }
        let Some(of) = self.users.get_mut(user) else { return };
        match event {
            Event::Accepted { number, .. } => self.accepted += usize::from(of.accepted.insert(number)),
            Event::Applied { number } => _ = of.applied.insert(number),
            _ => {}
        }
        of.events.push(event);
    }

    /// Says that the clients will not take this message, so that it may die.
    pub(crate) fn poison(&mut self, user: &str, number: u64) {
        self.users.entry(user.to_owned()).or_default().poison.insert(number);
    }

    /// Something was broken on purpose, and broke.
    pub(crate) fn fault(&mut self) {
        self.faults.push(self.accepted);
    }

    /// Users who have an inbox: something in it was accepted.
    pub(crate) fn inboxes(&self) -> usize {
        self.users.values().filter(|user| !user.accepted.is_empty()).count()
    }

    /// Messages that were accepted so far.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted
    }

    /// Accepted messages without an effect so far, those that may die left out.
    pub(crate) fn owed(&self) -> usize {
        let owed = |user: &User| {
            user.accepted.iter().filter(|n| !user.applied.contains(n) && !user.poison.contains(n)).count()
        };
        self.users.values().map(owed).sum()
    }

    /// Some of what is owed: (user, number).
    pub(crate) fn owed_examples(&self) -> Vec<(String, u64)> {
        let of = |(name, user): (&String, &User)| -> Vec<(String, u64)> {
            let open = user.accepted.iter().filter(|n| !user.applied.contains(n) && !user.poison.contains(n));
            open.map(|number| (name.clone(), *number)).collect()
        };
        self.users.iter().flat_map(of).take(EXAMPLES).collect()
    }

    /// What was recorded of a user's messages that have this seq or number, in order, as far as it is not too long.
    pub(crate) fn story(&self, user: &str, at: u64) -> Vec<String> {
        let events = self.users.get(user).map_or(&[][..], |user| &user.events);
        let about = |event: &&Event| match event {
            Event::Connected => true,
            Event::Sent { number } | Event::Refused { number } | Event::Applied { number } => *number == at,
            Event::Dead { number, .. } => *number == at,
            Event::Accepted { number, seq, .. }
            | Event::Redriven { number, seq, .. }
            | Event::Delivered { number, seq, .. } => [*number, *seq].contains(&at),
            Event::Failed { seq } | Event::Acked { seq } => *seq == at,
        };
        let mut story: Vec<&Event> = events.iter().filter(about).collect();
        // Connections without a delivery say nothing.
        story.dedup_by(|next, before| **next == Event::Connected && **before == Event::Connected);
        story.iter().take(STORY).map(|event| format!("{event:?}")).collect()
    }

    /// Accepted messages that may die and had no effect so far: (user, number).
    pub(crate) fn poisoned(&self) -> BTreeSet<(String, u64)> {
        let of = |(name, user): (&String, &User)| -> Vec<(String, u64)> {
            let numbers = user.accepted.intersection(&user.poison).filter(|n| !user.applied.contains(n));
            numbers.map(|&number| (name.clone(), number)).collect()
        };
        self.users.iter().flat_map(of).collect()
    }

    /// Whether a message took effect.
    pub(crate) fn is_applied(&self, user: &str, number: u64) -> bool {
        self.users.get(user).is_some_and(|user| user.applied.contains(&number))
    }

    /// By seq, what is known of a user's messages from answers: (number, id).
    pub(crate) fn answered(&self, user: &str) -> BTreeMap<u64, (u64, String)> {
        let events = self.users.get(user).map_or(&[][..], |user| &user.events);
        let answered = events.iter().filter_map(|event| match event {
            Event::Accepted { number, seq, id, .. } | Event::Redriven { number, seq, id } => {
                Some((*seq, (*number, id.clone())))
            }
            _ => None,
        });
        answered.collect()
    }

    /// Ids of the newest messages of each user that clients gave back, at most `count` in all.
    pub(crate) fn given_back(&self, count: usize) -> Vec<String> {
        let each = count.div_ceil(self.users.len().max(1));
        let of = |user: &User| -> Vec<String> {
            let failed = |event: &Event| matches!(event, Event::Failed { .. });
            let seqs: BTreeSet<u64> =
                user.events.iter().filter(|event| failed(event)).filter_map(Event::seq).collect();
            let known = user.events.iter().rev().filter_map(|event| match event {
                Event::Accepted { seq, id, .. } if seqs.contains(seq) => Some(id.clone()),
                _ => None,
            });
            known.take(each).collect()
        };
        self.users.values().flat_map(of).take(count).collect()
    }

    /// Whether a message was handed to the API at all.
    pub(crate) fn was_sent(&self, user: &str, number: u64) -> bool {
        let sent = Event::Sent { number };
        self.users.get(user).is_some_and(|user| user.events.contains(&sent))
    }

    /// Compares.
    pub(crate) fn check(&self) -> Report {
        let landed = self.faults.iter().filter(|&&count| 0 < count && count < self.accepted).count();
        let mut report = Report { accepted: self.accepted, faults: landed, ..Report::default() };
        for (name, user) in &self.users {
            Check::of(name, user).run(&mut report);
        }
        report
    }
}

/// A user, a seq or number of his, and what is wrong with it.
pub(crate) type Wrong = (String, u64, &'static str);

/// What the check found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Report {
    /// Messages that were accepted.
    pub(crate) accepted: usize,
    /// Deliveries beyond the first of a message.
    pub(crate) redelivered: usize,
    /// Dead letters.
    pub(crate) dead: usize,
    /// Faults with something accepted before and after them.
    pub(crate) faults: usize,
    /// Accepted, or given a seq, and gone.
    pub(crate) lost: Vec<Wrong>,
    /// What nobody sent, another message than the one that was answered, one that was settled, or a failure that none
    /// was.
    pub(crate) unexpected: Vec<Wrong>,
    /// Against the order of its stream, of the inbox or of its connection.
    pub(crate) out_of_order: Vec<Wrong>,
    /// Took effect more than once.
    pub(crate) duplicate_effects: Vec<Wrong>,
}

impl Report {
    /// Whether nothing is wrong.
    #[cfg(test)]
    pub(crate) fn is_clean(&self) -> bool {
        self.kinds().iter().all(|(_, wrong)| wrong.is_empty())
    }

    /// Adds another run's.
    pub(crate) fn add(&mut self, other: &Report) {
        self.accepted += other.accepted;
        self.redelivered += other.redelivered;
        self.dead += other.dead;
        self.faults += other.faults;
        self.lost.extend_from_slice(&other.lost);
        self.unexpected.extend_from_slice(&other.unexpected);
        self.out_of_order.extend_from_slice(&other.out_of_order);
        self.duplicate_effects.extend_from_slice(&other.duplicate_effects);
    }

    /// What is wrong, with examples; empty when nothing is.
    pub(crate) fn wrongs(&self) -> Vec<String> {
        let kinds = self.kinds().into_iter().filter(|(_, wrong)| !wrong.is_empty());
        let lines = kinds.map(|(kind, wrong)| {
            let examples = wrong.iter().take(EXAMPLES).map(|(user, at, why)| format!("{user} {at}: {why}"));
            let more = if wrong.len() > EXAMPLES { ", …" } else { "" };
            format!("{kind}: {}{more}", examples.collect::<Vec<_>>().join(", "))
        });
        lines.collect()
    }

    /// One example of each kind of wrong: user, and seq or number.
    pub(crate) fn examples(&self) -> Vec<(String, u64)> {
        let first = self.kinds().into_iter().filter_map(|(_, wrong)| wrong.first());
        first.map(|(user, at, _)| (user.clone(), *at)).collect()
    }

    fn kinds(&self) -> [(&'static str, &Vec<Wrong>); 4] {
        [
            ("lost", &self.lost),
            ("unexpected", &self.unexpected),
            ("out_of_order", &self.out_of_order),
            ("duplicate_effects", &self.duplicate_effects),
        ]
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "accepted={}", self.accepted)?;
        for (kind, wrong) in self.kinds() {
            write!(f, " {kind}={}", wrong.len())?;
        }
        write!(f, " redelivered={} dead={} faults={}", self.redelivered, self.dead, self.faults)
    }
}

/// The check of one user.
struct Check<'a> {
    name: &'a str,
    user: &'a User,
    /// By seq: number and id, from answers.
    answered: BTreeMap<u64, (u64, &'a str)>,
    /// By seq: number and id, from the first delivery; and how often it came.
    delivered: BTreeMap<u64, (u64, &'a str, usize)>,
    /// By number: the seq at which it was delivered.
    seqs: BTreeMap<u64, BTreeSet<u64>>,
    sent: BTreeSet<u64>,
    refused: BTreeSet<u64>,
    redriven: BTreeSet<u64>,
    dead: BTreeSet<u64>,
    applied: BTreeSet<u64>,
    report: Report,
}

/// What a connection has delivered.
#[derive(Default)]
struct Connection {
    /// The newest seq of a first attempt.
    newest: u64,
    /// By seq: the newest attempt.
    attempts: BTreeMap<u64, u32>,
}

impl<'a> Check<'a> {
    fn of(name: &'a str, user: &'a User) -> Self {
        Self {
            name,
            user,
            answered: BTreeMap::new(),
            delivered: BTreeMap::new(),
            seqs: BTreeMap::new(),
            sent: BTreeSet::new(),
            refused: BTreeSet::new(),
            redriven: BTreeSet::new(),
            dead: BTreeSet::new(),
            applied: BTreeSet::new(),
            report: Report::default(),
        }
    }

    fn run(mut self, report: &mut Report) {
        self.answers();
        self.deliveries();
        self.effects();
        self.losses();
        report.add(&self.report);
    }

    fn lost(&mut self, at: u64, why: &'static str) {
        self.report.lost.push((self.name.to_owned(), at, why));
    }

    fn unexpected(&mut self, at: u64, why: &'static str) {
        self.report.unexpected.push((self.name.to_owned(), at, why));
    }

    fn disorder(&mut self, at: u64, why: &'static str) {
        self.report.out_of_order.push((self.name.to_owned(), at, why));
    }

    /// What back ends were told, which may have been recorded later than the deliveries that it is about.
    fn answers(&mut self) {
        let mut accepted = BTreeMap::<u64, u64>::new();
        let mut newest = BTreeMap::<u64, u64>::new();
        for event in &self.user.events {
            match event {
                Event::Sent { number } => _ = self.sent.insert(*number),
                Event::Refused { number } => _ = self.refused.insert(*number),
                Event::Accepted { number, seq, id, stream } => {
                    if accepted.insert(*number, *seq).is_some_and(|before| before != *seq) {
                        self.unexpected(*number, "accepted twice, with two seqs");
                    }
                    self.answer(*number, *seq, id);
                    if let Some(stream) = stream
                        && newest.insert(*stream, *seq).is_some_and(|before| before >= *seq)
                    {
                        self.disorder(*seq, "accepted behind a later message of its stream");
                    }
                }
                Event::Redriven { number, seq, id } => {
                    self.redriven.insert(*number);
                    self.answer(*number, *seq, id);
                }
                Event::Dead { number, id } => {
                    if !self.dead.insert(*number) {
                        continue;
                    }
                    self.report.dead += 1;
                    let known = self.answered.values().find(|(of, _)| of == number);
                    if known.is_some_and(|(_, known)| known != id) {
                        self.unexpected(*number, "died under another id");
                    }
                    if !self.user.poison.contains(number) {
                        self.lost(*number, "became a dead letter though nobody refused it");
                    }
                }
                _ => {}
            }
        }
    }

    fn answer(&mut self, number: u64, seq: u64, id: &'a str) {
        if self.answered.insert(seq, (number, id)).is_some_and(|before| before != (number, id)) {
            self.unexpected(seq, "a seq of two messages");
        }
    }

    fn deliveries(&mut self) {
        let (mut newest, mut connection) = (0, Connection::default());
        let mut failed = BTreeMap::<u64, u32>::new();
        let mut acked = BTreeSet::new();
        for event in &self.user.events {
            match event {
                Event::Connected => connection = Connection::default(),
                Event::Failed { seq } => *failed.entry(*seq).or_default() += 1,
                Event::Acked { seq } => _ = acked.insert(*seq),
                Event::Delivered { number, seq, delivery, id } => {
                    let first = self.identity(*number, *seq, id);
                    // Of one that failed, the first deliveries may have gone past a client that was leaving.
                    if first && *delivery == 1 && *seq < newest {
                        self.disorder(*seq, "delivered for the first time behind a later one");
                    }
                    newest = newest.max(*seq);
                    if acked.contains(seq) {
                        self.unexpected(*seq, "delivered again after its ack was answered");
                    }
                    if !(1..=failed.get(seq).copied().unwrap_or(0) + 1).contains(delivery) {
                        self.unexpected(*seq, "an attempt was counted that nobody failed");
                    }
                    self.on_connection(&mut connection, *seq, *delivery);
                }
                _ => {}
            }
        }
    }

    /// Whether it is the one that it is to be, and whether it came for the first time.
    fn identity(&mut self, number: u64, seq: u64, id: &'a str) -> bool {
        if !self.sent.contains(&number) || self.refused.contains(&number) {
            self.unexpected(seq, "delivered, and never sent or refused");
        } else if self.answered.get(&seq).is_some_and(|answered| *answered != (number, id)) {
            self.unexpected(seq, "another message than the one that was accepted");
        }
        let seqs = self.seqs.entry(number).or_default();
        seqs.insert(seq);
        if seqs.len() > 1 + usize::from(self.redriven.contains(&number)) {
            self.unexpected(seq, "the message has another seq, too");
        }
        match self.delivered.get_mut(&seq) {
            None => {
                self.delivered.insert(seq, (number, id, 1));
                true
            }
            Some((of, known, times)) => {
                *times += 1;
                self.report.redelivered += 1;
                if (*of, *known) != (number, id) {
                    self.unexpected(seq, "another message than the time before");
                }
                false
            }
        }
    }

    fn on_connection(&mut self, connection: &mut Connection, seq: u64, delivery: u32) {
        let before = connection.attempts.insert(seq, delivery);
        if before.is_some_and(|before| before >= delivery) {
            self.disorder(seq, "delivered again on one connection without having failed");
        } else if delivery == 1 {
            if before.is_none() && seq < connection.newest {
                self.disorder(seq, "behind a later one on its connection");
            }
            connection.newest = connection.newest.max(seq);
        }
    }

    fn effects(&mut self) {
        for event in &self.user.events {
            let Event::Applied { number } = event else { continue };
            if !self.applied.insert(*number) {
                self.report.duplicate_effects.push((self.name.to_owned(), *number, "applied again"));
            }
            if !self.sent.contains(number) || self.refused.contains(number) {
                self.unexpected(*number, "applied, and never sent or refused");
            }
        }
    }

    fn losses(&mut self) {
        let settled = |number: &u64| {
            let died = self.dead.contains(number) && !self.redriven.contains(number);
            self.applied.contains(number) || died
        };
        let owed: Vec<u64> = self.user.accepted.iter().filter(|number| !settled(number)).copied().collect();
        owed.into_iter().for_each(|number| self.lost(number, "accepted, and without an effect"));
        // A seq that was given out is a message that exists.
        let known: BTreeSet<u64> = self.answered.keys().chain(self.delivered.keys()).copied().collect();
        let head = known.last().copied().unwrap_or(0);
        let holes: Vec<u64> = (1..=head).filter(|seq| !known.contains(seq)).collect();
        holes.into_iter().for_each(|seq| self.lost(seq, "a hole in the inbox"));
    }
}

#[cfg(test)]
#[path = "history_tests.rs"]
mod tests;
