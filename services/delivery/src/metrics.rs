//! Everything that delivery counts and measures.

mod control;
mod devices;
mod fanout;
mod operations;

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Duration,
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

pub(crate) use devices::DeviceCounters;
pub(crate) use operations::StoreOperation;
use sanjay_protocol::ErrorCode;
use sanjay_resilience::Breakers;
use sanjay_runtime::{
    grpc::PeerMetrics,
    metrics::{Dependencies, Timer, latency, seconds_between},
};

use crate::{
    message::State,
    relay::Outcome,
    store::{DeadReason, FailureKind},
};

/// The role that a delivery node calls, as its peers' metrics name it.
pub(crate) const PEERS: [&str; 1] = ["router"];

/// The shared store, as metrics and logs name it.
pub(crate) const MONGODB: &str = "mongodb";

/// Upper bounds of the time until an ack, in seconds: users who are there take milliseconds, others come back days
/// later.
const SETTLE_BUCKETS: [f64; 16] = [
    0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0, 30.0, 60.0, 600.0, 3_600.0, 86_400.0,
    604_800.0,
];

/// What counts as a result beside the error codes.
const OK: &str = "ok";

/// An error code of the protocol, or `ok`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OperationLabel {
    operation: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

/// The metrics of one delivery node.
#[derive(Clone, Debug)]
pub struct Metrics {
    sends: Family<CodeLabel, Counter>,
    sent: Counter,
    send_seconds: Histogram,
    publishes: Family<CodeLabel, Counter>,
    published: Counter,
    publish_seconds: Histogram,
    appended: Counter,
    scheduled: Counter,
    waiting: Gauge,
    duplicates: Counter,
    group_items: Histogram,
    group_seconds: Histogram,
    acked: Counter,
    expired: Counter,
    superseded: Counter,
    settle_latency: Histogram,
    reads: Counter,
    relays: Family<OutcomeLabel, Counter>,
    /// The counters of `relays`, by [`Outcome`].
    relayed: Arc<[Counter; 5]>,
    redeliveries: Counter,
    notices: Family<OutcomeLabel, Counter>,
    pub(crate) devices: DeviceCounters,
    control: control::ControlCounters,
    failures: Family<KindLabel, Counter>,
    failures_lost: Counter,
    dead: Family<ReasonLabel, Counter>,
    redriven: Counter,
    receipts_read: Counter,
    events_missed: Counter,
    dead_letters: Gauge,
    armed: Gauge,
    unsettled: Gauge,
    oldest_undelivered: Gauge<f64, AtomicU64>,
    published_durably: Counter,
    publications_finished: Counter,
    fanned_out: Counter,
    unfinished: Gauge,
    oldest_unfinished: Gauge<f64, AtomicU64>,
    audit_difference: Gauge,
    audit_inboxes: Counter,
    store_errors: Counter,
    store_calls: Family<OperationLabel, Histogram>,
    store_failures: Family<OperationLabel, Counter>,
    store_unknown: Counter,
    store_conflicts: Counter,
    store_connections: Gauge,
    dependencies: Dependencies,
    /// Of what stands before the dependencies.
    pub(crate) breakers: Breakers,
    /// 1 while some router serves.
    pub(crate) router_up: Gauge,
}

impl Metrics {
    /// Makes the metrics and registers them.
    pub fn register(registry: &mut Registry) -> Self {
        let dependencies = Dependencies::register(registry, "delivery");
        let breakers = Breakers::register(registry, "delivery");
        let _series = breakers.state("router");
        let (sends, publishes) = (by_code(), by_code());
        let relays = Family::<OutcomeLabel, Counter>::default();
        let relayed = Outcome::ALL
            .map(|outcome| relays.get_or_create_owned(&OutcomeLabel { outcome: outcome.as_str() }));
        let metrics = Self {
            sent: sends.get_or_create_owned(&CodeLabel { code: OK }),
            sends,
            send_seconds: latency(),
            published: publishes.get_or_create_owned(&CodeLabel { code: OK }),
            publishes,
            publish_seconds: latency(),
            appended: Counter::default(),
            scheduled: Counter::default(),
            waiting: Gauge::default(),
            duplicates: Counter::default(),
            group_items: Histogram::new(exponential_buckets(1.0, 2.0, 13)),
            group_seconds: Histogram::new(exponential_buckets(0.000_1, 2.0, 15)),
            acked: Counter::default(),
            expired: Counter::default(),
            superseded: Counter::default(),
            settle_latency: Histogram::new(SETTLE_BUCKETS),
            reads: Counter::default(),
            relays,
            relayed: Arc::new(relayed),
            redeliveries: Counter::default(),
            notices: Family::default(),
            devices: DeviceCounters::default(),
            control: control::ControlCounters::default(),
            failures: Family::default(),
            failures_lost: Counter::default(),
            dead: Family::default(),
            redriven: Counter::default(),
            receipts_read: Counter::default(),
            events_missed: Counter::default(),
            dead_letters: Gauge::default(),
            armed: Gauge::default(),
            unsettled: Gauge::default(),
            oldest_undelivered: Gauge::default(),
            published_durably: Counter::default(),
            publications_finished: Counter::default(),
            fanned_out: Counter::default(),
            unfinished: Gauge::default(),
            oldest_unfinished: Gauge::default(),
            audit_difference: Gauge::default(),
            audit_inboxes: Counter::default(),
            store_errors: Counter::default(),
            store_calls: Family::new_with_constructor(|| {
                Histogram::new(exponential_buckets(0.000_1, 2.0, 16))
            }),
            store_failures: Family::default(),
            store_unknown: Counter::default(),
            store_conflicts: Counter::default(),
            store_connections: Gauge::default(),
            router_up: dependencies.of("router"),
            dependencies,
            breakers,
        };
        metrics.register_calls(registry);
        metrics.register_inboxes(registry);
        metrics.register_fan_out(registry);
        metrics.devices.register(registry);
        metrics.control.register(registry);
        metrics.register_failures(registry);
        metrics.register_readers(registry);
        metrics.register_store(registry);
        metrics.register_shared_store(registry);
        metrics
    }

    fn register_calls(&self, registry: &mut Registry) {
        registry.register("delivery_sends", "Sends, for each user, by ok or error code", self.sends.clone());
        let help = "Time from a send to its answer, which is after the message is durable; one observation for each \
                    call or item of a stream";
        registry.register_with_unit("delivery_send", help, Unit::Seconds, self.send_seconds.clone());
        registry.register("delivery_publishes", "Publishes by ok or error code", self.publishes.clone());
        let help = "Time from a publish to its answer";
        registry.register_with_unit("delivery_publish", help, Unit::Seconds, self.publish_seconds.clone());
        registry.register("delivery_inbox_reads", "Inbox pages read by edges", self.reads.clone());
        registry.register("delivery_acked", "Messages settled by acks", self.acked.clone());
        registry.register(
            "delivery_expired",
            "Messages settled because their time to live had passed",
            self.expired.clone(),
        );
        registry.register(
            "delivery_superseded",
            "Messages settled because a newer one with the same collapse key came",
            self.superseded.clone(),
        );
        let help = "Time from a message's acceptance to the ack that settled it; with users who were away it is long";
        registry.register_with_unit(
            "delivery_settle_latency",
            help,
            Unit::Seconds,
            self.settle_latency.clone(),
        );
        let help = "Inbox hints by what became of them; failed: no router answered, dropped: the queue was full, \
                    unknown: the router cannot say where the user is";
        registry.register("delivery_relays", help, self.relays.clone());
        let help = "Inbox hints relayed again because no edge reported the message written";
        registry.register("delivery_redeliveries", help, self.redeliveries.clone());
        for outcome in Outcome::ALL {
            let _series = self.notices.get_or_create(&OutcomeLabel { outcome: outcome.as_str() });
        }
        let help = "Hints to a user's sessions about what was settled elsewhere, or that there is another session, by what \
                    became of them";
        registry.register("delivery_notices", help, self.notices.clone());
    }

    fn register_inboxes(&self, registry: &mut Registry) {
        registry.register("delivery_appended", "Messages stored in inboxes", self.appended.clone());
        registry.register(
            "delivery_scheduled",
            "Messages stored until their time, outside the inboxes",
            self.scheduled.clone(),
        );
        registry.register(
            "delivery_waiting_scheduled",
            "Messages that wait for their time; where nodes share a store, each of them says how many all of it holds",
            self.waiting.clone(),
        );
        let help = "Sends and durable publishes recognised by their dedupe key";
        registry.register("delivery_dedupe_hits", help, self.duplicates.clone());
        let help = "Inboxes that wait for redelivery";
        registry.register("delivery_due_inboxes", help, self.armed.clone());
        let help =
            "Messages that wait for an ack; rising without end, somebody sends to users who never come";
        registry.register("delivery_unsettled_messages", help, self.unsettled.clone());
        let help = "Age of the oldest message that no edge reported written and whose user is not known to be \
                    offline; 0 when there is none. Looked for every few seconds among the inboxes that are due first \
                    and last";
        let oldest = self.oldest_undelivered.clone();
        registry.register_with_unit("delivery_oldest_undelivered", help, Unit::Seconds, oldest);
        let help = "Unsettled messages without a body, and bodies without an unsettled message, in the inboxes that \
                    this round of the audit or the last one looked at. Not 0 means that messages are lost";
        let messages = Unit::Other("messages".to_owned());
        let difference = self.audit_difference.clone();
        registry.register_with_unit("delivery_audit_difference", help, messages, difference);
        let help = "Inboxes that the audit looked at; a round takes a minute to an hour";
        registry.register("delivery_audit_inboxes", help, self.audit_inboxes.clone());
    }

    fn register_failures(&self, registry: &mut Registry) {
        for kind in [FailureKind::Nak(Duration::ZERO), FailureKind::Deadline, FailureKind::Term] {
            let _series = self.failures.get_or_create(&KindLabel { kind: kind.as_str() });
        }
        for reason in DeadReason::ALL {
            let _series = self.dead.get_or_create(&ReasonLabel { reason: reason.as_str() });
        }
        let help = "Failed attempts to deliver a message, by kind";
        registry.register("delivery_failed_attempts", help, self.failures.clone());
        let help = "Failed attempts that were not noted: their inboxes know of too many";
        registry.register("delivery_failures_not_noted", help, self.failures_lost.clone());
        registry.register("delivery_dead_letters", "Messages that became dead letters", self.dead.clone());
        let help = "Dead letters that were sent again";
        registry.register("delivery_redriven", help, self.redriven.clone());
        // A name of its own: a gauge and a counter of one name are one family twice.
        let help = "Dead letters in the store, those that were sent again included";
        registry.register("delivery_kept_dead_letters", help, self.dead_letters.clone());
    }

    fn register_readers(&self, registry: &mut Registry) {
        let help = "Receipts given to back ends that read the log of receipts";
        registry.register("delivery_receipts_read", help, self.receipts_read.clone());
        let help = "Live events that back ends missed because they read them too slowly";
        registry.register("delivery_events_missed", help, self.events_missed.clone());
    }

    fn register_store(&self, registry: &mut Registry) {
        let help = "Messages, acks and claims in one durable group commit";
        registry.register("delivery_group_commit_items", help, self.group_items.clone());
        let help = "Time of one durable group commit";
        registry.register_with_unit("delivery_group_commit", help, Unit::Seconds, self.group_seconds.clone());
        let help = "Failed transactions of the inbox store, and work that was given up; should stay 0";
        registry.register("delivery_store_errors", help, self.store_errors.clone());
    }

    fn register_shared_store(&self, registry: &mut Registry) {
        let help = "Time of one call to MongoDB";
        registry.register_with_unit("delivery_store_call", help, Unit::Seconds, self.store_calls.clone());
        let help = "Calls to MongoDB that failed or had no answer";
        registry.register("delivery_store_call_failures", help, self.store_failures.clone());
        let help = "Writes to an inbox whose outcome had to be looked up";
        registry.register("delivery_store_unknown_outcomes", help, self.store_unknown.clone());
        let help = "Writes to an inbox that another node had changed meanwhile";
        registry.register("delivery_store_conflicts", help, self.store_conflicts.clone());
        let help = "Connections to MongoDB that are in use";
        registry.register("delivery_store_connections", help, self.store_connections.clone());
    }

    /// Inboxes are in a shared store: what is known of it has a value from now on.
    pub(crate) fn shares_store(&self) {
        for operation in StoreOperation::ALL {
            let label = OperationLabel { operation: operation.as_str() };
            let _series = self.store_calls.get_or_create(&label);
            let _series = self.store_failures.get_or_create(&label);
        }
        let _series = (self.store_up(), self.breakers.of(MONGODB));
    }

    fn store_up(&self) -> Gauge {
        self.dependencies.of(MONGODB)
    }

    /// One user's result of a send; `code` is an error code or `ok`.
    pub(crate) fn send(&self, code: &'static str) {
        count(&self.sends, &self.sent, code);
    }

    /// Measures a send until it is dropped.
    pub(crate) fn send_timer(&self) -> Timer {
        Timer::start(&self.send_seconds)
    }

    /// One publish's result; `code` is an error code or `ok`.
    pub(crate) fn publish(&self, code: &'static str) {
        count(&self.publishes, &self.published, code);
    }

    /// Measures a publish until it is dropped.
    pub(crate) fn publish_timer(&self) -> Timer {
        Timer::start(&self.publish_seconds)
    }

    /// A message was appended, or found to be a duplicate.
    pub(crate) fn appended(&self, duplicate: bool) {
        if duplicate {
            self.duplicates.inc()
        } else {
            self.appended.inc()
        };
    }

    /// A message was scheduled, or found to be a duplicate.
    pub(crate) fn scheduled(&self, duplicate: bool) {
        if duplicate {
            self.duplicates.inc()
        } else {
            self.scheduled.inc()
        };
    }

    /// A transaction was committed; `items` is 0 when it held hints alone.
    pub(crate) fn group_commit(&self, items: usize, took: Duration) {
        if items > 0 {
            self.group_items.observe(items as f64);
            self.group_seconds.observe(took.as_secs_f64());
        }
    }

    /// A message was settled as expired or superseded, or because a device was forgotten.
    pub(crate) fn ended(&self, state: State) {
        match state {
            State::Acked => drop(self.acked.inc()),
            State::Expired => drop(self.expired.inc()),
            State::Superseded => drop(self.superseded.inc()),
            State::Scheduled | State::Accepted | State::Dead => {}
        }
    }

    /// Messages were settled as acked.
    pub(crate) fn acked(&self, count: usize) {
        self.acked.inc_by(count as u64);
    }

    /// A message that was accepted at one time was settled at another; both Unix time in microseconds.
    pub(crate) fn settled(&self, accepted_us: u64, now_us: u64) {
        self.settle_latency.observe(seconds_between(accepted_us, now_us));
    }

    /// An attempt failed, and that is noted.
    pub(crate) fn failed(&self, kind: FailureKind) {
        self.failures.get_or_create(&KindLabel { kind: kind.as_str() }).inc();
    }

    /// An attempt failed, and there was no room to note it.
    pub(crate) fn failure_lost(&self) {
        self.failures_lost.inc();
    }

    /// A message became a dead letter.
    pub(crate) fn dead(&self, reason: DeadReason) {
        self.dead.get_or_create(&ReasonLabel { reason: reason.as_str() }).inc();
    }

    /// A dead letter was sent again.
    pub(crate) fn redriven(&self) {
        self.redriven.inc();
    }

    /// Receipts were given to a back end.
    pub(crate) fn receipts_read(&self, count: usize) {
        self.receipts_read.inc_by(count as u64);
    }

    /// A watcher was too slow for so many events.
    pub(crate) fn events_missed(&self, count: u64) {
        self.events_missed.inc_by(count);
    }

    /// Pages were read for an edge.
    pub(crate) fn reads(&self, count: usize) {
        self.reads.inc_by(count as u64);
    }

    /// What became of hints.
    pub(crate) fn relayed(&self, outcome: Outcome, count: usize) {
        self.relayed[outcome as usize].inc_by(count as u64);
    }

    /// What became of hints about what was settled.
    pub(crate) fn told(&self, outcome: Outcome, count: usize) {
        self.notices.get_or_create(&OutcomeLabel { outcome: outcome.as_str() }).inc_by(count as u64);
    }

    /// Hints were relayed again.
    pub(crate) fn redelivered(&self, count: usize) {
        self.redeliveries.inc_by(count as u64);
    }

    /// What the store holds.
    pub(crate) fn store(&self, stats: crate::store::Stats) {
        self.armed.set(i64::try_from(stats.armed).unwrap_or(i64::MAX));
        self.unsettled.set(i64::try_from(stats.unsettled).unwrap_or(i64::MAX));
        self.dead_letters.set(i64::try_from(stats.dead_letters).unwrap_or(i64::MAX));
        self.waiting.set(i64::try_from(stats.scheduled).unwrap_or(i64::MAX));
    }

    /// When the oldest undelivered message was accepted, if there is one; both Unix time in microseconds.
    pub(crate) fn oldest_undelivered(&self, accepted_us: Option<u64>, now_us: u64) {
        self.oldest_undelivered.set(accepted_us.map_or(0.0, |at| seconds_between(at, now_us)));
    }

    /// Inboxes were audited.
    pub(crate) fn audited(&self, inboxes: usize) {
        self.audit_inboxes.inc_by(inboxes as u64);
    }

    /// What the audit found.
    pub(crate) fn audit_difference(&self, messages: u64) {
        self.audit_difference.set(i64::try_from(messages).unwrap_or(i64::MAX));
    }

    /// A transaction failed, or work for a shared store was given up.
    pub(crate) fn store_error(&self) {
        self.store_errors.inc();
    }

    /// A call to a shared store was answered or failed.
    pub(crate) fn store_call(&self, operation: StoreOperation, took: Duration, ok: bool) {
        let label = OperationLabel { operation: operation.as_str() };
        self.store_calls.get_or_create(&label).observe(took.as_secs_f64());
        if !ok {
            self.store_failures.get_or_create(&label).inc();
        }
        self.store_up().set(ok.into());
    }

    /// What became of a write to an inbox must be looked up.
    pub(crate) fn store_unknown(&self) {
        self.store_unknown.inc();
    }

    /// A write to an inbox met a change by another node.
    pub(crate) fn store_conflict(&self) {
        self.store_conflicts.inc();
    }

    /// A connection to the shared store was taken (1) or given back (-1).
    pub(crate) fn store_connection(&self, change: i64) {
        self.store_connections.inc_by(change);
    }
}

/// A family with all results there are.
fn by_code() -> Family<CodeLabel, Counter> {
    let family = Family::<CodeLabel, Counter>::default();
    for code in std::iter::once(OK).chain(ErrorCode::ALL.iter().map(|code| code.as_str())) {
        let _series = family.get_or_create(&CodeLabel { code });
    }
    family
}

/// Counts a result; `ok` is nearly all of them, and needs no look-up.
fn count(family: &Family<CodeLabel, Counter>, ok: &Counter, code: &'static str) {
    if code == OK {
        ok.inc();
    } else {
        family.get_or_create(&CodeLabel { code }).inc();
    }
}

/// Registers every metric that a delivery node can have, for documentation.
pub fn register_all(registry: &mut Registry) {
    Metrics::register(registry).shares_store();
    let _peers = PeerMetrics::register(registry, "delivery", &PEERS);
}

#[cfg(test)]
impl Metrics {
    /// How many outcomes were unknown, and how many writes met another node's.
    pub(crate) fn store_troubles(&self) -> (u64, u64) {
        (self.store_unknown.get(), self.store_conflicts.get())
    }

    /// What the audit found, and how many inboxes it looked at.
    pub(crate) fn audit(&self) -> (i64, u64) {
        (self.audit_difference.get(), self.audit_inboxes.get())
    }
}

#[cfg(test)]
pub(crate) fn for_tests() -> Metrics {
    Metrics::register(&mut Registry::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_outcome_has_a_counter_of_its_own() {
        let metrics = for_tests();
        for (times, outcome) in (1..).zip(Outcome::ALL) {
            metrics.relayed(outcome, times);
        }
        for (times, outcome) in (1..).zip(Outcome::ALL) {
            let label = OutcomeLabel { outcome: outcome.as_str() };
            assert_eq!(metrics.relays.get_or_create(&label).get(), times, "{outcome:?}");
        }
    }
}
