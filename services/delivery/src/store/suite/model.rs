//! Random operations on a store, beside a model of what it should be.

mod checks;
mod devices;
mod inbox;
mod log;
mod operations;
mod scheduled;

use std::collections::{BTreeMap, BTreeSet};

use inbox::{First, Kept, ModelInbox, body};
use log::LogModel;
pub(crate) use log::read_log;
use operations::{End, Failing, Item, Operation};
pub(crate) use operations::{Plan, operations};
use scheduled::Waiting;
pub(super) use scheduled::assert_same;

use super::{
    failing::{MAX_ATTEMPTS, failure},
    *,
};
use crate::store::{Verdict, due};

/// The store beside its model.
struct Pair<H> {
    harness: H,
    store: Option<Arc<dyn InboxStore>>,
    limits: Limits,
    heard: Arc<Heard>,
    model: BTreeMap<u8, ModelInbox>,
    waiting: Vec<Waiting>,
    /// Without payloads, in no order.
    letters: Vec<DeadLetter>,
    /// What the sink should have heard since it was last looked at.
    ended: Vec<EndedMessage>,
    /// Messages, as (user, id), whose records may have changed since they were last looked up.
    changed: Vec<(u8, Uuid)>,
    /// Users whose inboxes may have expired, replaced or killed something in the last operation.
    busy: BTreeSet<u8>,
    log: LogModel,
    next_id: u128,
}

fn name(user: u8) -> String {
    format!("user-{user}")
}

fn caller(caller: u8) -> String {
    format!("caller-{caller}")
}

/// Whether a dedupe key is still remembered.
fn holds(first: &First, now_us: u64) -> bool {
    first.time_us + DEDUPE_WINDOW.as_micros() as u64 >= now_us
}

/// Runs random operations on a store and on the model, comparing every answer.
pub(crate) async fn agrees_with_the_model<H: Harness>(mut harness: H, plan: Plan) {
    let heard = Arc::new(Heard::default());
    let limits = Limits { on_commit: heard.clone(), ..plan.limits };
    harness.set(limits.clone());
    let store = Some(harness.reopen().await);
    let mut pair = Pair {
        harness,
        store,
        limits,
        heard,
        model: BTreeMap::new(),
        waiting: Vec::new(),
        letters: Vec::new(),
        ended: Vec::new(),
        changed: Vec::new(),
        busy: BTreeSet::new(),
        log: LogModel::default(),
        next_id: 0,
    };
    for operation in plan.operations {
        pair.apply(operation).await;
        pair.audit().await;
        pair.audit_log().await;
    }
    pair.look_all_up().await;
    pair.audit_whole_log().await;
    pair.audit_deliveries().await;
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
            Operation::Expire(limit) => self.expire(limit).await,
            Operation::Schedule(items) => self.schedule(items).await,
            Operation::ClaimScheduled(limit, finish) => self.claim_scheduled(limit, finish).await,
            Operation::Unschedule(place) => self.unschedule(place).await,
            Operation::DeviceReads(user, device, after) => self.device_reads(user, device, after).await,
            Operation::DeviceAcks(user, device, range, written, fails) => {
                self.device_acks(user, device, range, written, fails).await;
            }
            Operation::ForgetDevices(days, limit) => {
                self.harness.clock().advance(Duration::from_secs(days * 86_400));
                self.forget_devices(limit).await;
            }
            Operation::Advance(seconds) => self.harness.clock().advance(Duration::from_secs(seconds)),
            Operation::Sweep => {
                self.store().sweep(self.harness.clock().now_us(), 3).await.unwrap();
            }
            Operation::Reopen => {
                self.store = None;
                self.store = Some(self.harness.reopen().await);
                self.look_all_up().await;
                self.audit_deliveries().await;
            }
        }
        for user in std::mem::take(&mut self.busy) {
            // What an append ended may follow its answer, and is done before what is submitted for the user after it.
            self.ack(user, &[], 0, true).await;
        }
    }

    /// A new message; `from_us` is when its life begins.
    fn message(&mut self, item: Item, from_us: u64) -> NewMessage {
        self.next_id += 1;
        let key = |key: u8| if key == 0 { String::new() } else { format!("key-{key}") };
        NewMessage {
            caller: caller(item.caller),
            payload: body(item.body),
            expires_us: item.ttl.map_or(0, |ttl| from_us + ttl * 1_000_000),
            collapse_key: key(item.collapse),
            ..message(&name(item.user), self.next_id, "", &key(item.key), self.harness.clock())
        }
    }

    async fn append(&mut self, items: Vec<Item>) {
        let now_us = self.harness.clock().now_us();
        let items = items.into_iter().map(|item| (item, self.message(item, now_us))).collect();
        self.append_messages(items).await;
    }

    /// Appends messages; returns which of them were taken.
    async fn append_messages(&mut self, items: Vec<(Item, NewMessage)>) -> Vec<bool> {
        let messages = items.iter().map(|(_, message)| message.clone()).collect();
        let results = self.store().append(messages).await;
        assert_eq!(results.len(), items.len());
        items
            .into_iter()
            .zip(results)
            .map(|((item, message), result)| self.appended(item, &message, result))
            .collect()
    }

    /// Compares the answer to one message with what the model says; whether it is taken.
    fn appended(&mut self, item: Item, message: &NewMessage, result: Result<Appended, AppendError>) -> bool {
        let now_us = self.harness.clock().now_us();
        let inbox = self.model.entry(item.user).or_default();
        let first = inbox.keys.get(&(item.caller, item.key)).filter(|first| holds(first, now_us));
        match first.filter(|_| !message.dedupe_key.is_empty()) {
            Some(first) if first.body == item.body => {
                let appended = result.unwrap();
                assert_eq!((appended.seq, appended.duplicate), (first.seq, true));
                assert_eq!((appended.message_id, appended.time_us), (first.id, first.time_us));
                return false;
            }
            Some(_) => {
                assert!(matches!(result, Err(AppendError::AlreadyExists { .. })), "{result:?}");
                return false;
            }
            None => {}
        }
        let replaced = inbox.replaced_by(item);
        let leave = match inbox.make_room(&self.limits, inbox::size(item.body), replaced) {
            Ok(leave) => leave,
            Err(error) => {
                assert_eq!(result, Err(error));
                return false;
            }
        };
        let appended = result.unwrap();
        if let Some(seq) = replaced {
            self.end(item.user, seq, State::Superseded);
        }
        for seq in leave {
            self.die(item.user, appended.epoch, seq, DeadReason::QueueFull);
        }
        let inbox = self.model.entry(item.user).or_default();
        inbox.messages.push(Kept {
            item,
            id: message.message_id,
            accepted_us: now_us,
            expires_us: message.expires_us,
            state: State::Accepted,
            settled_us: 0,
        });
        assert_eq!((appended.seq, appended.duplicate), (inbox.head(), false));
        assert_eq!((appended.message_id, appended.time_us), (message.message_id, now_us));
        if !message.dedupe_key.is_empty() {
            let first = First { body: item.body, seq: appended.seq, id: message.message_id, time_us: now_us };
            inbox.keys.insert((item.caller, item.key), first);
        }
        self.changed.push((item.user, message.message_id));
        true
    }

    /// Settles a message as expired or superseded.
    fn end(&mut self, user: u8, seq: u64, state: State) {
        let now_us = self.harness.clock().now_us();
        let inbox = self.model.entry(user).or_default();
        let kept = inbox.get(seq);
        let (message_id, accepted_us) = (kept.id, kept.accepted_us);
        let settled = SettledMessage { seq, message_id, accepted_us, trace: String::new() };
        assert_eq!(inbox.settle(seq, seq, state, now_us).len(), 1);
        self.ended.push((name(user), settled, state));
        self.changed.push((user, message_id));
        self.busy.insert(user);
    }

    /// Settles a message as dead.
    fn die(&mut self, user: u8, epoch: u64, seq: u64, reason: DeadReason) {
        let now_us = self.harness.clock().now_us();
        let inbox = self.model.entry(user).or_default();
        let letter = letter(user, epoch, seq, reason, inbox, now_us);
        assert_eq!(inbox.settle(seq, seq, State::Dead, now_us).len(), 1);
        self.changed.push((user, letter.message_id));
        self.letters.push(letter);
        self.busy.insert(user);
    }

    async fn expire(&mut self, limit: usize) {
        let now_us = self.harness.clock().now_us();
        let (mut settled, mut calls) = (0, 0);
        loop {
            let expired = self.store().expire(now_us, limit).await.unwrap();
            (settled, calls) = (settled + expired.settled, calls + 1);
            if !expired.more {
                break;
            }
            assert!(calls < 1_000, "there is always more");
        }
        let mut expected = 0;
        for user in self.model.keys().copied().collect::<Vec<u8>>() {
            let epoch = read_all(&**self.store(), &name(user)).await.epoch;
            let inbox = &self.model[&user];
            let mut seqs = inbox.unsettled();
            seqs.retain(|seq| inbox.get(*seq).expired(now_us));
            expected += seqs.len();
            for seq in seqs {
                if self.limits.keep_expired {
                    self.die(user, epoch, seq, DeadReason::Expired);
                } else {
                    self.end(user, seq, State::Expired);
                }
            }
        }
        assert_eq!(settled, expected);
    }

    async fn ack(&mut self, user: u8, ranges: &[(u64, u64)], written: u64, right: bool) {
        let ranges: Vec<_> = ranges.iter().map(|&(from, length)| (from, from + length)).collect();
        let epoch = read_all(&**self.store(), &name(user)).await.epoch;
        let epoch = if right { epoch } else { epoch.wrapping_add(1) };
        let acked =
            self.store().ack(vec![settle(&name(user), epoch, &ranges, written)]).await.remove(0).unwrap();
        let mut expected = BTreeSet::new();
        if right {
            let inbox = self.model.entry(user).or_default();
            inbox.written = inbox.written.max(written.min(inbox.head()));
            expected = self.acked(user, &ranges);
        }
        let inbox = self.model.entry(user).or_default();
        assert_eq!((acked.mark, acked.refused), (inbox.mark(), 0));
        assert_eq!(acked.messages.iter().map(|message| message.seq).collect::<BTreeSet<_>>(), expected);
    }

    /// Settles ranges as acked; returns what of them was not settled.
    fn acked(&mut self, user: u8, ranges: &[(u64, u64)]) -> BTreeSet<u64> {
        let now_us = self.harness.clock().now_us();
        let inbox = self.model.entry(user).or_default();
        let mut acks = BTreeSet::new();
        for &(from, to) in ranges {
            acks.extend(inbox.settle(from, to, State::Acked, now_us));
        }
        self.changed.extend(acks.iter().map(|seq| (user, inbox.get(*seq).id)));
        acks
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
        let acks = self.acked(user, &ranges);
        let inbox = self.model.entry(user).or_default();
        for &(seq, delivery) in &rewritten {
            inbox.attempts.rewritten(seq, delivery);
        }
        let mut verdicts = Vec::new();
        for failure in failed {
            let seq = failure.seq;
            if seq <= inbox.head() && !inbox.is_settled(seq) {
                let verdict = inbox.attempts.fail(failure, MAX_ATTEMPTS, 0.0);
                verdicts.extend(verdict.map(|verdict| (seq, verdict)));
            }
        }
        for (seq, verdict) in &verdicts {
            if let Verdict::Dead(reason) = verdict {
                self.die(user, epoch, *seq, *reason);
            }
        }
        let inbox = self.model.entry(user).or_default();
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
            assert_eq!(inbox.missed, model.missed());
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
}

/// The dead letter of a message that is dying.
fn letter(
    user: u8,
    epoch: u64,
    seq: u64,
    reason: DeadReason,
    inbox: &ModelInbox,
    died_us: u64,
) -> DeadLetter {
    let kept = inbox.get(seq);
    DeadLetter {
        user: name(user),
        message_id: kept.id,
        seq,
        epoch,
        caller: caller(kept.item.caller),
        reason,
        accepted_us: kept.accepted_us,
        died_us,
        failures: inbox.attempts.failures(seq).to_vec(),
        trace: String::new(),
        payload: None,
        payload_bytes: inbox::size(kept.item.body),
        redriven_as: None,
    }
}
