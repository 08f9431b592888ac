//! Random operations on a store, beside a model of what it should be.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use proptest::prelude::*;

use super::{
    failing::{MAX_ATTEMPTS, NAK, failure},
    *,
};
use crate::store::{FailureKind, Verdict, due};

/// A random operation.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    /// (user, payload, dedupe key; 0 for none) of each message.
    Append(Vec<(u8, u8, u8)>),
    /// User, ranges as (from, length), written, right epoch.
    Ack(u8, Vec<(u64, u64)>, u64, bool),
    Read(u8, Option<u64>, usize),
    Arm(u8),
    /// User, failures, seqs of redeliveries that were written, a range that is acked in the same call.
    Fail(u8, Vec<Failing>, Vec<u64>, Option<(u64, u64)>),
    /// Claims, and says what follows for what it gets.
    Claim(End),
    /// Sends again or purges a dead letter, told by its place among all.
    Redriven(usize),
    Purge(usize),
    Advance(u64),
    Sweep,
    Reopen,
}

/// What follows for a claimed inbox; nothing after a crash.
#[derive(Debug, Clone, Copy)]
pub(crate) enum End {
    Park,
    Again,
    Crash,
}

/// A failure: its seq, its kind, and by how much its delivery is not the newest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Failing(u64, FailureKind, u32);

fn one_failing() -> impl Strategy<Value = Failing> {
    let kind = prop_oneof![
        5 => Just(NAK),
        1 => Just(FailureKind::Nak(Duration::from_secs(100_000))),
        2 => Just(FailureKind::Deadline),
        1 => Just(FailureKind::Term),
    ];
    let off = prop_oneof![5 => Just(0_u32), 1 => 1..3_u32];
    (1..24_u64, kind, off).prop_map(|(seq, kind, off)| Failing(seq, kind, off))
}

fn end() -> impl Strategy<Value = End> {
    prop_oneof![Just(End::Park), Just(End::Again), Just(End::Crash)]
}

pub(crate) fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        6 => prop::collection::vec((0..3u8, 0..2u8, 0..4u8), 1..6).prop_map(Operation::Append),
        5 => (0..3u8, prop::collection::vec((1..40u64, 0..6u64), 0..4), 0..40u64, prop::bool::weighted(0.9))
            .prop_map(|(user, ranges, written, right)| Operation::Ack(user, ranges, written, right)),
        4 => (0..3u8, prop::option::of(0..40u64), 0..12usize)
            .prop_map(|(user, after, limit)| Operation::Read(user, after, limit)),
        1 => (0..3u8).prop_map(Operation::Arm),
        6 => (
            0..3u8,
            prop::collection::vec(one_failing(), 0..6),
            prop::collection::vec(1..24_u64, 0..4),
            prop::option::weighted(0.3, (1..24_u64, 0..4_u64)),
        )
            .prop_map(|(user, failed, rewritten, range)| Operation::Fail(user, failed, rewritten, range)),
        5 => end().prop_map(Operation::Claim),
        1 => any::<usize>().prop_map(Operation::Redriven),
        1 => any::<usize>().prop_map(Operation::Purge),
        2 => (0..200_000u64).prop_map(Operation::Advance),
        2 => (0..5u64).prop_map(Operation::Advance),
        1 => Just(Operation::Sweep),
        1 => Just(Operation::Reopen),
    ];
    prop::collection::vec(operation, 1..60)
}

/// What an inbox should be.
#[derive(Default)]
struct ModelInbox {
    /// Payload and id by seq − 1.
    messages: Vec<(u8, Uuid)>,
    /// When each was accepted.
    accepted: Vec<u64>,
    settled: BTreeSet<u64>,
    dead: BTreeSet<u64>,
    attempts: Attempts,
    /// Until when a claim holds that came to nothing.
    held_us: u64,
    written: u64,
    /// Key → (payload, seq, accepted_us).
    keys: HashMap<u8, (u8, u64, u64)>,
}

impl ModelInbox {
    fn head(&self) -> u64 {
        self.messages.len() as u64
    }

    fn mark(&self) -> u64 {
        (1..=self.head()).take_while(|seq| self.settled.contains(seq)).count() as u64
    }

    fn unsettled(&self) -> Vec<u64> {
        (1..=self.head()).filter(|seq| !self.settled.contains(seq)).collect()
    }

    /// What a reader gets, as (seq, delivery).
    fn deliverable(&self) -> Vec<(u64, u32)> {
        let delivery = |seq| Some((seq, self.attempts.delivery(seq)?));
        self.unsettled().into_iter().filter_map(delivery).collect()
    }

    /// Settles seqs; returns those that were not.
    fn settle(&mut self, from: u64, to: u64) -> BTreeSet<u64> {
        let to = to.min(self.head());
        self.attempts.settle(from, to);
        (from.max(1)..=to).filter(|seq| self.settled.insert(*seq)).collect()
    }

    fn has_unwritten(&self) -> bool {
        self.written.max(self.mark()) < self.head()
    }
}

/// The store beside its model.
struct Pair<H> {
    harness: H,
    store: Option<Arc<dyn InboxStore>>,
    model: BTreeMap<u8, ModelInbox>,
    /// Without payloads, in no order.
    letters: Vec<DeadLetter>,
    next_id: u128,
}

fn name(user: u8) -> String {
    format!("user-{user}")
}

/// Runs random operations on a store and on the model, comparing every answer.
pub(crate) async fn agrees_with_the_model<H: Harness>(mut harness: H, operations: Vec<Operation>) {
    let store = Some(harness.reopen().await);
    let mut pair = Pair { harness, store, model: BTreeMap::new(), letters: Vec::new(), next_id: 0 };
    for operation in operations {
        pair.apply(operation).await;
        pair.audit().await;
    }
}

impl<H: Harness> Pair<H> {
    fn store(&self) -> &Arc<dyn InboxStore> {
        self.store.as_ref().expect("it is open between operations")
    }

    async fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Append(items) => self.append(items).await,
            Operation::Ack(user, ranges, written, right) => self.ack(user, &ranges, written, right).await,
            Operation::Read(user, after, limit) => self.read(user, after, limit).await,
            Operation::Arm(user) => {
                self.store().arm(vec![name(user)]);
                // The hint is not awaited, but it is done before what is submitted for the user after it.
                self.ack(user, &[], 0, true).await;
            }
            Operation::Fail(user, failed, rewritten, range) => {
                self.fail(user, failed, rewritten, range).await;
            }
            Operation::Claim(end) => self.claim(end).await,
            Operation::Redriven(place) => self.redriven(place).await,
            Operation::Purge(place) => self.purge(place).await,
            Operation::Advance(seconds) => self.harness.clock().advance(Duration::from_secs(seconds)),
            Operation::Sweep => {
                self.store().sweep(self.harness.clock().now_us(), 3).await.unwrap();
            }
            Operation::Reopen => {
                self.store = None;
                self.store = Some(self.harness.reopen().await);
            }
        }
    }

    async fn append(&mut self, items: Vec<(u8, u8, u8)>) {
        let clock = self.harness.clock().clone();
        let mut messages = Vec::new();
        for (user, body, key) in &items {
            self.next_id += 1;
            let key = if *key == 0 { String::new() } else { format!("key-{key}") };
            messages.push(message(&name(*user), self.next_id, &format!("body-{body}"), &key, &clock));
        }
        let results = self.store().append(messages.clone()).await;
        for (((user, body, key), message), result) in items.into_iter().zip(messages).zip(results) {
            let inbox = self.model.entry(user).or_default();
            let window = DEDUPE_WINDOW.as_micros() as u64;
            match inbox.keys.get(&key).filter(|(.., at)| at + window >= clock.now_us()) {
                Some((first, seq, _)) if *first == body => {
                    let appended = result.unwrap();
                    assert_eq!((appended.seq, appended.duplicate), (*seq, true));
                    assert_eq!(appended.message_id, inbox.messages[*seq as usize - 1].1);
                }
                Some(_) => assert!(matches!(result, Err(AppendError::AlreadyExists { .. }))),
                None if inbox.unsettled().len() as u64 >= MAX_UNSETTLED => {
                    assert!(matches!(result, Err(AppendError::QueueFull { .. })));
                }
                None => {
                    inbox.messages.push((body, message.message_id));
                    inbox.accepted.push(clock.now_us());
                    let appended = result.unwrap();
                    assert_eq!((appended.seq, appended.duplicate), (inbox.head(), false));
                    if key != 0 {
                        inbox.keys.insert(key, (body, inbox.head(), clock.now_us()));
                    }
                }
            }
        }
    }

    async fn ack(&mut self, user: u8, ranges: &[(u64, u64)], written: u64, right: bool) {
        let ranges: Vec<_> = ranges.iter().map(|&(from, length)| (from, from + length)).collect();
        let epoch = read_all(&**self.store(), &name(user)).await.epoch;
        let epoch = if right { epoch } else { epoch.wrapping_add(1) };
        let acked =
            self.store().ack(vec![settle(&name(user), epoch, &ranges, written)]).await.remove(0).unwrap();
        let inbox = self.model.entry(user).or_default();
        let mut expected = BTreeSet::new();
        if right {
            inbox.written = inbox.written.max(written.min(inbox.head()));
            for (from, to) in ranges {
                expected.extend(inbox.settle(from, to));
            }
        }
        assert_eq!((acked.mark, acked.refused), (inbox.mark(), 0));
        assert_eq!(acked.messages.iter().map(|message| message.seq).collect::<BTreeSet<_>>(), expected);
    }

    async fn fail(&mut self, user: u8, failed: Vec<Failing>, rewritten: Vec<u64>, range: Option<(u64, u64)>) {
        let clock = self.harness.clock().clone();
        let epoch = read_all(&**self.store(), &name(user)).await.epoch;
        let inbox = self.model.entry(user).or_default();
        let newest = |seq| inbox.attempts.newest(seq).unwrap_or(1);
        let rewritten: Vec<(u64, u32)> = rewritten.into_iter().map(|seq| (seq, newest(seq))).collect();
        let failed: Vec<_> = failed
            .into_iter()
            .map(|Failing(seq, kind, off)| failure(seq, newest(seq) + off, kind, &clock))
            .collect();
        let ranges: Vec<(u64, u64)> = range.map(|(from, length)| (from, from + length)).into_iter().collect();
        let report = Settle {
            rewritten: rewritten.clone(),
            failed: failed.clone(),
            ..settle(&name(user), epoch, &ranges, 0)
        };
        let acked = self.store().ack(vec![report]).await.remove(0).unwrap();
        let inbox = self.model.entry(user).or_default();
        let acks: BTreeSet<u64> = ranges.iter().flat_map(|&(from, to)| inbox.settle(from, to)).collect();
        for &(seq, delivery) in &rewritten {
            inbox.attempts.rewritten(seq, delivery);
        }
        let mut verdicts = Vec::new();
        for failure in failed {
            let seq = failure.seq;
            if seq <= inbox.head() && !inbox.settled.contains(&seq) {
                let verdict = inbox.attempts.fail(failure, MAX_ATTEMPTS, 0.0);
                verdicts.extend(verdict.map(|verdict| (seq, verdict)));
            }
        }
        for (seq, verdict) in &verdicts {
            if let Verdict::Dead(reason) = verdict {
                self.letters.push(letter(user, epoch, *seq, *reason, inbox, clock.now_us()));
                inbox.settle(*seq, *seq);
                inbox.dead.insert(*seq);
            }
        }
        assert_eq!(acked.failed, verdicts);
        assert_eq!((acked.mark, acked.refused), (inbox.mark(), 0));
        assert_eq!(acked.messages.iter().map(|message| message.seq).collect::<BTreeSet<_>>(), acks);
    }

    async fn redriven(&mut self, place: usize) {
        if self.letters.is_empty() {
            return;
        }
        let place = place % self.letters.len();
        let (user, id) = (self.letters[place].user.clone(), self.letters[place].message_id);
        let sent_as = Uuid::from_u128(u128::MAX);
        assert_eq!(self.store().redriven(user, id, sent_as).await, Ok(true));
        self.letters[place].redriven_as = Some(sent_as);
    }

    async fn purge(&mut self, place: usize) {
        if self.letters.is_empty() {
            return;
        }
        let gone = self.letters.remove(place % self.letters.len());
        let gone = (gone.user, gone.message_id);
        assert_eq!(self.store().purge(vec![gone.clone(), gone.clone()]).await, Ok(1));
        assert_eq!(self.store().redriven(gone.0, gone.1, Uuid::nil()).await, Ok(false));
    }

    async fn read(&mut self, user: u8, after: Option<u64>, limit: usize) {
        let page = self.store().read(vec![query(&name(user), after, limit)]).await.remove(0).unwrap();
        let only = InboxQuery { only: (1..=limit as u64).collect(), ..query(&name(user), after, limit) };
        let some = self.store().read(vec![only]).await.remove(0).unwrap();
        let inbox = self.model.entry(user).or_default();
        let after = after.unwrap_or(inbox.mark());
        let above: Vec<_> = inbox.deliverable().into_iter().filter(|(seq, _)| *seq > after).collect();
        let expected: Vec<_> = above.iter().copied().take(limit).collect();
        assert_eq!(deliveries(&page), expected);
        let covers = if expected.len() == above.len() {
            inbox.head()
        } else {
            expected.last().map_or(after, |(seq, _)| *seq)
        };
        assert_eq!((page.mark, page.head, page.covers), (inbox.mark(), inbox.head(), covers));
        if limit > 0 {
            let newest = |seq| Some((seq, inbox.attempts.newest(seq)?)).filter(|_| seq <= limit as u64);
            let expected: Vec<_> = inbox.unsettled().into_iter().filter_map(newest).collect();
            assert_eq!(deliveries(&some), expected);
        }
        for message in page.messages.into_iter().chain(some.messages) {
            let (body, id) = inbox.messages[message.seq as usize - 1];
            assert_eq!(message.payload, Some((*text(format!("body-{body}"))).clone()));
            assert_eq!(message.message_id[..], id.as_bytes()[..]);
        }
    }

    async fn claim(&mut self, end: End) {
        let now_us = self.harness.clock().now_us();
        let until_us = now_us + 30_000_000;
        let due = |inbox: &ModelInbox| {
            inbox.held_us <= now_us && inbox.attempts.next_due_us().is_some_and(|due_us| due_us <= now_us)
        };
        let mut expected: BTreeSet<String> =
            self.model.iter().filter(|(_, inbox)| due(inbox)).map(|(user, _)| name(*user)).collect();
        let claimed = self.store().claim_due(now_us, until_us, 10).await.unwrap();
        let mut rearms = Vec::new();
        for inbox in claimed {
            let (_, model) =
                self.model.iter_mut().find(|(user, _)| name(**user) == inbox.user).expect("it has messages");
            let unwritten = model.has_unwritten();
            let claim = due::claim(&mut model.attempts, unwritten, now_us, until_us);
            assert!(claim.relay);
            assert_eq!(inbox.retries, claim.retries);
            assert_eq!(inbox.after, model.written.max(model.mark()));
            expected.remove(&inbox.user);
            model.held_us = if matches!(end, End::Crash) { until_us } else { 0 };
            let next = match end {
                End::Crash => continue,
                End::Park => Next::Parked,
                End::Again => Next::At { due_us: now_us + 1, attempt: inbox.attempt + 1 },
            };
            due::rearm(&mut model.attempts, unwritten, next);
            rearms.push(Rearm { user: inbox.user, armed: inbox.armed, next });
        }
        assert_eq!(expected, BTreeSet::new(), "attempts were due");
        self.store().rearm(rearms).await.unwrap();
    }

    /// Accepted minus settled is what the inbox holds, and every receipt agrees.
    async fn audit(&self) {
        let mut unsettled = 0;
        for (user, inbox) in &self.model {
            let page = read_all(&**self.store(), &name(*user)).await;
            assert_eq!(deliveries(&page), inbox.deliverable());
            unsettled += inbox.unsettled().len() as u64;
            if let Some((_, id)) = inbox.messages.last() {
                let receipt = self.store().lookup(name(*user), *id).await.unwrap();
                let settled = inbox.settled.contains(&inbox.head());
                match receipt {
                    Some(receipt) => {
                        assert_eq!(receipt.state.is_terminal(), settled);
                        assert_eq!(receipt.state == State::Dead, inbox.dead.contains(&inbox.head()));
                    }
                    // Its receipt may have been swept.
                    None => assert!(settled),
                }
            }
        }
        let stats = self.store().stats().await.unwrap();
        assert_eq!((stats.unsettled, stats.dead_letters), (unsettled, self.letters.len() as u64));
        self.audit_letters().await;
        let inboxes = self.model.values().filter(|inbox| inbox.head() > 0).count();
        assert_eq!(audit::audit_all(&**self.store()).await, (inboxes, vec![]));
    }

    /// The dead letters are those of the model, in their order, page by page.
    async fn audit_letters(&self) {
        let mut expected: Vec<&DeadLetter> = self.letters.iter().collect();
        expected.sort_unstable_by_key(|letter| std::cmp::Reverse(letter.position()));
        for redriven in [true, false] {
            let filter = DeadFilter { redriven, ..DeadFilter::default() };
            let (mut found, mut after) = (Vec::new(), None);
            loop {
                let page = self.store().dead_letters(filter.clone(), after, 3).await.unwrap();
                found.extend(page.letters);
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
            let expected: Vec<&DeadLetter> =
                expected.iter().copied().filter(|letter| filter.matches(letter)).collect();
            assert_eq!(found.iter().collect::<Vec<_>>(), expected);
        }
    }
}

/// The dead letter of a message that just failed for good.
fn letter(
    user: u8,
    epoch: u64,
    seq: u64,
    reason: DeadReason,
    inbox: &ModelInbox,
    died_us: u64,
) -> DeadLetter {
    let (body, message_id) = inbox.messages[seq as usize - 1];
    let payload = text(format!("body-{body}"));
    DeadLetter {
        user: name(user),
        message_id,
        seq,
        epoch,
        caller: "shop".to_owned(),
        reason,
        accepted_us: inbox.accepted[seq as usize - 1],
        died_us,
        failures: inbox.attempts.failures(seq).to_vec(),
        trace: String::new(),
        payload: None,
        payload_bytes: prost::Message::encoded_len(&*payload) as u64,
        redriven_as: None,
    }
}
