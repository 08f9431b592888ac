//! The MongoDB adapter: the shared suite, several nodes on one database, and faults.

use std::sync::Arc;

use ::mongodb::bson::doc;
use proptest::prelude::*;
use sanjay_runtime::{
    Secret,
    clock::{Clock, ManualClock},
};
use sanjay_testkit::servers::Mongo;

use super::*;
use crate::{
    metrics::{self, Metrics},
    store::{
        self, CommitSink, Location,
        suite::{
            self, Harness, MAX_UNSETTLED,
            failing::{MAX_ATTEMPTS, random},
            message, operations,
        },
    },
};

mod away;
mod devices;
mod ending;
mod failing;
mod fanout;
mod faults;
mod random;
mod receipts;
mod scheduled;
mod shapes;
mod sharding;

/// The clocks of tests begin in the year 2100: the server, which has the real time, must not find anything past
/// its time.
const BEGIN_US: u64 = 4_102_444_800_000_000;

/// A database of its own on the server that the tests share.
struct Case {
    location: store::Database,
    clock: Arc<ManualClock>,
    tuning: Tuning,
    max_unsettled: u64,
    max_unsettled_bytes: u64,
    overflow: store::Overflow,
    keep_expired: bool,
    metrics: Metrics,
    on_commit: Arc<dyn CommitSink>,
}

fn location(uri: &str, login: Option<(&str, &str)>) -> store::Database {
    let (name, password) = login.unwrap_or_default();
    match uri.parse::<Location>().unwrap().with_credentials(name, &Secret::new(password)) {
        Location::Mongodb(database) => database,
        Location::Redb(_) => panic!("{uri} is no MongoDB"),
    }
}

impl Case {
    fn at(location: store::Database) -> Self {
        let clock = Arc::new(ManualClock::new(BEGIN_US));
        let tuning = Tuning {
            clock: Some(clock.clone()),
            sharing: false,
            old_stats: false,
            log_lag_us: Some(1),
            ..Tuning::default()
        };
        Self {
            location,
            clock,
            tuning,
            max_unsettled: MAX_UNSETTLED,
            max_unsettled_bytes: u64::MAX,
            overflow: store::Overflow::Reject,
            keep_expired: false,
            metrics: metrics::for_tests(),
            on_commit: Arc::new(()),
        }
    }

    fn on(mongo: &Mongo) -> Self {
        Self::at(location(&mongo.uri(&mongo.database()), mongo.login()))
    }

    /// So small inboxes that nearly everything moves out of them.
    fn small(mut self) -> Self {
        self.tuning.bounds = Bounds { messages: 3, bytes: 100_000, keep: 1, receipts: 2, keys: 1 };
        self
    }

    fn options(&self) -> StoreOptions {
        StoreOptions {
            max_unsettled: self.max_unsettled,
            max_unsettled_bytes: self.max_unsettled_bytes,
            overflow: self.overflow,
            keep_expired: self.keep_expired,
            max_attempts: MAX_ATTEMPTS,
            clock: self.clock.clone(),
            random: random(),
            metrics: self.metrics.clone(),
            on_commit: self.on_commit.clone(),
        }
    }

    /// One message for each id.
    fn messages(&self, user: &str, ids: impl IntoIterator<Item = u128>) -> Vec<NewMessage> {
        ids.into_iter().map(|id| message(user, id, &format!("body-{id}"), "", &self.clock)).collect()
    }

    /// With room for everything that a test sends.
    fn roomy(mut self) -> Self {
        self.max_unsettled = 100_000;
        self
    }

    async fn open(&self) -> MongoStore {
        MongoStore::open_with(&self.location, self.options(), self.tuning.clone()).await.unwrap()
    }
}

impl Harness for Case {
    const SWEPT_BY_DATABASE: bool = true;

    fn clock(&self) -> &Arc<ManualClock> {
        &self.clock
    }

    fn set(&mut self, limits: suite::Limits) {
        let suite::Limits { max_unsettled, max_unsettled_bytes, overflow, keep_expired, on_commit } = limits;
        (self.max_unsettled, self.max_unsettled_bytes) = (max_unsettled, max_unsettled_bytes);
        (self.overflow, self.keep_expired, self.on_commit) = (overflow, keep_expired, on_commit);
    }

    async fn reopen(&mut self) -> Arc<dyn InboxStore> {
        Arc::new(self.open().await)
    }

    async fn lose_body(&mut self, store: Arc<dyn InboxStore>, user: &str, seq: u64) -> Arc<dyn InboxStore> {
        let Database { inbox, beside, .. } = self.open().await.database.clone();
        let lose = doc! { "$pull": { "messages": { "n": seq.cast_signed() } } };
        let inside = inbox.update_one(doc! { "_id": user }, lose.clone()).await.unwrap();
        let beside =
            beside.update_many(doc! { "u": user, "messages.n": seq.cast_signed() }, lose).await.unwrap();
        assert!(inside.modified_count + beside.modified_count > 0, "there was a body {seq}");
        store
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 64, ..ProptestConfig::default() })]

    #[test]
    fn durable_publications_agree_with_the_model(operations in suite::fanout::operations(), small: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let case = Case::on(Mongo::shared().await);
            let case = if small { case.small() } else { case };
            suite::fanout::agrees_with_the_model(case, operations).await;
        });
    }
}

#[tokio::test]
async fn fixed_cases() {
    let mongo = Mongo::shared().await;
    suite::fixed_cases(|| Case::on(mongo)).await;
}

#[tokio::test]
async fn fixed_cases_beside_the_inbox() {
    let mongo = Mongo::shared().await;
    suite::fixed_cases(|| Case::on(mongo).small()).await;
}

#[tokio::test]
async fn revocations() {
    let mongo = Mongo::shared().await;
    suite::revocations::fixed_cases(&|| Case::on(mongo)).await;
}

proptest! {
    // Each case takes some hundred calls to a server.
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 64, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_the_model(operations in operations(), small: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let case = Case::on(Mongo::shared().await);
            let case = if small { case.small() } else { case };
            suite::agrees_with_the_model(case, operations).await;
        });
    }
}
