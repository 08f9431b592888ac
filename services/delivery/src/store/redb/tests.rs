//! The redb adapter: the shared suite, crashes, and files that cannot be opened.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Stdio},
    time::Duration,
};

use proptest::prelude::*;
use redb::ReadableTable as _;
use sanjay_runtime::{
    clock::{Clock as _, ManualClock, SystemClock},
    random::OsRandom,
};
use tempfile::TempDir;

use super::*;
use crate::{
    metrics,
    store::{
        FailureKind, Quota,
        suite::{
            self, Harness, Limits,
            failing::{self, MAX_ATTEMPTS, random},
            message, operations, query, read_all, settle,
        },
    },
};

mod fanout;

struct Redb {
    directory: TempDir,
    clock: Arc<ManualClock>,
    limits: Limits,
}

impl Redb {
    fn new() -> Self {
        // The wall clock of the suite begins late enough for every retention to lie in the past.
        Self {
            directory: tempfile::tempdir().unwrap(),
            clock: Arc::new(ManualClock::new(1_700_000_000_000_000)),
            limits: Limits::default(),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("inbox.redb")
    }

    async fn open(&self) -> Result<RedbStore, OpenError> {
        RedbStore::open(self.path(), self.options()).await
    }

    fn options(&self) -> StoreOptions {
        let Limits { max_unsettled, max_unsettled_bytes, overflow, keep_expired, on_commit } =
            self.limits.clone();
        StoreOptions {
            max_unsettled,
            max_unsettled_bytes,
            overflow,
            keep_expired,
            max_attempts: MAX_ATTEMPTS,
            clock: self.clock.clone(),
            random: random(),
            metrics: metrics::for_tests(),
            on_commit,
        }
    }
}

impl Harness for Redb {
    fn clock(&self) -> &Arc<ManualClock> {
        &self.clock
    }

    fn set(&mut self, limits: Limits) {
        self.limits = limits;
    }

    async fn reopen(&mut self) -> Arc<dyn InboxStore> {
        Arc::new(self.open().await.unwrap())
    }

    async fn lose_body(&mut self, store: Arc<dyn InboxStore>, user: &str, seq: u64) -> Arc<dyn InboxStore> {
        drop(store);
        let database = redb::Database::open(self.path()).unwrap();
        let transaction = database.begin_write().unwrap();
        let lost = transaction.open_table(tables::BODIES).unwrap().remove((user, seq)).unwrap().is_some();
        assert!(lost, "there was a body {seq}");
        transaction.commit().unwrap();
        drop(database);
        self.reopen().await
    }
}

#[tokio::test]
async fn fixed_cases() {
    suite::fixed_cases(Redb::new).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn agrees_with_the_model(operations in operations()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(suite::agrees_with_the_model(Redb::new(), operations));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn durable_publications_agree_with_the_model(operations in suite::fanout::operations()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(suite::fanout::agrees_with_the_model(Redb::new(), operations));
    }
}

/// The counters in the file, which the port does not show, add up.
#[tokio::test]
async fn counters_add_up() {
    let redb = Redb::new();
    let store = redb.open().await.unwrap();
    let batch: Vec<_> = (1..=10).map(|id| message("bob", id, "x", "", &redb.clock)).collect();
    let epoch = store.append(batch).await.remove(0).unwrap().epoch;
    store.ack(vec![settle("bob", epoch, &[(2, 3), (7, 90)], 5)]).await.remove(0).unwrap();
    drop(store);
    let database = redb::Database::open(redb.path()).unwrap();
    let inboxes = redb::ReadableDatabase::begin_read(&database).unwrap().open_table(tables::INBOXES).unwrap();
    let record: tables::InboxRecord =
        tables::decode("inboxes", inboxes.get("bob").unwrap().unwrap().value()).unwrap();
    assert_eq!((record.head, record.acked, record.unsettled(), record.written), (10, 6, 4, 5));
    assert_eq!(record.settled, [2, 3, 7, 10]);
}

#[tokio::test]
async fn ranges_beyond_the_bound_stay_unsettled() {
    let redb = Redb::new();
    let store =
        RedbStore::open(redb.path(), StoreOptions { max_unsettled: 10_000, ..redb.options() }).await.unwrap();
    let batch: Vec<_> = (1..=600).map(|id| message("bob", id, "x", "", &redb.clock)).collect();
    let epoch = store.append(batch).await.remove(0).unwrap().epoch;
    let even: Vec<(u64, u64)> = (1..=300).map(|n| (n * 2, n * 2)).collect();
    let acked = store.ack(vec![settle("bob", epoch, &even, 0)]).await.remove(0).unwrap();
    assert_eq!((acked.mark, acked.refused, acked.messages.len()), (0, 300 - 256, 256));
    assert_eq!(store.stats().await.unwrap().unsettled, 600 - 256);
    let acked = store.ack(vec![settle("bob", epoch, &[(1, 599)], 0)]).await.remove(0).unwrap();
    assert_eq!((acked.mark, acked.refused), (599, 0));
    assert_eq!(store.stats().await.unwrap().unsettled, 1);
}

#[tokio::test]
async fn a_dying_message_waits_for_room() {
    let redb = Redb::new();
    let options = StoreOptions { max_unsettled: 10_000, ..redb.options() };
    let store = RedbStore::open(redb.path(), options).await.unwrap();
    failing::dying_without_room(&store, &redb.clock).await;
}

/// A file of a build that knew no dead letters gets their tables.
#[tokio::test]
async fn a_file_without_dead_letters_is_read() {
    let redb = Redb::new();
    let store = redb.open().await.unwrap();
    let epoch = failing::send(&store, &redb.clock, 2).await;
    drop(store);
    let database = redb::Database::open(redb.path()).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.delete_table(tables::DEAD).unwrap();
    transaction.delete_table(tables::DEAD_BODIES).unwrap();
    transaction.delete_table(tables::DEAD_AT).unwrap();
    transaction.delete_table(tables::DEAD_OF).unwrap();
    delete_what_ends_messages(&transaction);
    transaction.commit().unwrap();
    drop(database);
    let store = redb.open().await.unwrap();
    assert_eq!(store.dead_letters(DeadFilter::default(), None, 9).await, Ok(DeadPage::default()));
    let failed = vec![failing::failure(1, 1, FailureKind::Term, &redb.clock)];
    let report = Settle { failed, ..settle("bob", epoch, &[], 0) };
    assert_eq!(store.ack(vec![report]).await.remove(0).unwrap().failed.len(), 1);
    assert_eq!(store.stats().await.unwrap().dead_letters, 1);
}

/// Deletes the tables of messages that end without an ack, or are scheduled.
fn delete_what_ends_messages(transaction: &redb::WriteTransaction) {
    transaction.delete_table(tables::EXPIRES).unwrap();
    transaction.delete_table(tables::COLLAPSE).unwrap();
    transaction.delete_table(tables::SCHEDULED).unwrap();
    transaction.delete_table(tables::SCHEDULED_DUE).unwrap();
    transaction.delete_table(tables::SCHEDULED_AT).unwrap();
    transaction.delete_table(tables::RECEIPT_LOG).unwrap();
}

/// Makes of a file one of a build that knew nothing of what ends messages without an ack.
fn age(path: PathBuf) {
    let database = redb::Database::open(path).unwrap();
    let transaction = database.begin_write().unwrap();
    delete_what_ends_messages(&transaction);
    {
        let mut inboxes = transaction.open_table(tables::INBOXES).unwrap();
        let record = inboxes.get("bob").unwrap().unwrap().value().to_vec();
        let record: tables::InboxRecord = tables::decode("inboxes", &record).unwrap();
        assert!(record.bytes > 0, "it counts bytes");
        let record = tables::InboxRecord { bytes: 0, collapsing: 0, ..record };
        inboxes.insert("bob", prost::Message::encode_to_vec(&record).as_slice()).unwrap();
        let mut bodies = transaction.open_table(tables::BODIES).unwrap();
        for seq in 2..=4 {
            let body = bodies.get(("bob", seq)).unwrap().unwrap().value().to_vec();
            // What is not known is not kept.
            let body: sanjay_proto::client::v1::InboxMessage = tables::decode("bodies", &body).unwrap();
            bodies.insert(("bob", seq), prost::Message::encode_to_vec(&body).as_slice()).unwrap();
        }
    }
    transaction.commit().unwrap();
}

#[tokio::test]
async fn a_file_of_before_expiry_and_quotas_is_read() {
    let mut redb = Redb::new();
    let store = redb.open().await.unwrap();
    let epoch = failing::send(&store, &redb.clock, 4).await;
    store.ack(vec![settle("bob", epoch, &[(1, 1)], 0)]).await.remove(0).unwrap();
    let before = read_all(&store, "bob").await;
    drop(store);
    age(redb.path());
    let size = prost::Message::encoded_len(&*suite::text("body-2")) as u64;
    redb.limits = Limits { max_unsettled_bytes: 2 * size, ..Limits::default() };
    let store = redb.open().await.unwrap();
    assert_eq!(read_all(&store, "bob").await, before);
    let now_us = redb.clock.now_us();
    assert_eq!(store.expire(now_us, 9).await, Ok(Expired::default()));
    assert_eq!(store.claim_scheduled(now_us, now_us + 1, 9).await.unwrap().len(), 0);
    // Its messages count for the quota of messages alone, also when they are settled.
    let send = |id: u128| {
        let keyed = message("bob", id, "body-2", "", &redb.clock);
        let keyed = NewMessage { collapse_key: format!("key-{id}"), expires_us: now_us + 1, ..keyed };
        store.append(vec![keyed])
    };
    assert_eq!(send(5).await.remove(0).unwrap().seq, 5);
    store.ack(vec![settle("bob", epoch, &[(2, 3)], 0)]).await.remove(0).unwrap();
    assert_eq!(send(6).await.remove(0).unwrap().seq, 6);
    let full = AppendError::QueueFull { quota: Quota::Bytes, held: 2 * size };
    assert_eq!(send(7).await, [Err(full)]);
    redb.clock.advance(Duration::from_micros(1));
    assert_eq!(store.expire(redb.clock.now_us(), 9).await.unwrap().settled, 2);
    assert_eq!(read_all(&store, "bob").await.messages[..], before.messages[2..]);
    assert_eq!(suite::audit::audit_all(&store).await, (1, vec![]));
}

/// A copy that was made while the store was open has everything that was answered.
#[tokio::test]
async fn an_unclean_copy_has_everything_that_was_answered() {
    let redb = Redb::new();
    let store = redb.open().await.unwrap();
    for id in 1..=10 {
        store.append(vec![message("bob", id, "x", "", &redb.clock)]).await.remove(0).unwrap();
    }
    let epoch = read_all(&store, "bob").await.epoch;
    store.ack(vec![settle("bob", epoch, &[(1, 4)], 10)]).await.remove(0).unwrap();
    for (seq, kind) in [(5, FailureKind::Term), (6, failing::NAK)] {
        let failed = vec![failing::failure(seq, 1, kind, &redb.clock)];
        store.ack(vec![Settle { failed, ..settle("bob", epoch, &[], 0) }]).await.remove(0).unwrap();
    }
    let copy = Redb { directory: tempfile::tempdir().unwrap(), clock: redb.clock.clone(), ..Redb::new() };
    std::fs::copy(redb.path(), copy.path()).unwrap();
    let copied = copy.open().await.unwrap();
    assert_eq!(read_all(&copied, "bob").await, read_all(&store, "bob").await);
    assert_eq!(read_all(&copied, "bob").await.messages.len(), 4);
    let letters = copied.dead_letters(DeadFilter::default(), None, 9).await.unwrap().letters;
    assert_eq!(letters.iter().map(|letter| letter.seq).collect::<Vec<_>>(), [5]);
}

/// The child of the next test: sends until it is killed, and prints each seq after its answer.
#[tokio::test]
#[ignore = "run by killed_writers_lose_nothing"]
async fn child_that_sends() {
    let Ok(path) = std::env::var("SANJAY_TEST_STORE") else { return };
    let options = StoreOptions {
        max_unsettled: 1_000_000,
        max_unsettled_bytes: u64::MAX,
        overflow: crate::store::Overflow::Reject,
        keep_expired: false,
        max_attempts: MAX_ATTEMPTS,
        clock: Arc::new(SystemClock),
        random: Arc::new(OsRandom),
        metrics: metrics::for_tests(),
        on_commit: Arc::new(()),
    };
    let store = RedbStore::open(path.into(), options).await.unwrap();
    let clock = ManualClock::new(1);
    let first = read_all(&store, "bob").await.head as u128;
    for id in first + 1.. {
        let appended = store.append(vec![message("bob", id, "x", "", &clock)]).await.remove(0).unwrap();
        println!("\nseq {}", appended.seq);
    }
}

#[tokio::test]
async fn killed_writers_lose_nothing() {
    let redb = Redb::new();
    let mut answered = 0;
    for _ in 0..3 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "store::redb::tests::child_that_sends", "--ignored", "--nocapture"])
            .env("SANJAY_TEST_STORE", redb.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let target = answered + 50;
        while answered < target {
            let line = lines.next().expect("the child sends until it is killed").unwrap();
            if let Some(seq) = line.strip_prefix("seq ") {
                answered = seq.parse().unwrap();
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it printed between our last look and its death was answered too.
        for line in lines.map_while(Result::ok) {
            if let Some(seq) = line.strip_prefix("seq ").and_then(|seq| seq.parse().ok()) {
                answered = seq;
            }
        }
        let store = redb.open().await.unwrap();
        let page = read_all(&store, "bob").await;
        assert!(page.head >= answered && page.head <= answered + 1, "{} of {answered}", page.head);
        assert_eq!(page.messages.len() as u64, page.head.min(256));
        answered = page.head;
    }
}

#[tokio::test]
async fn a_file_in_use_is_named() {
    let redb = Redb::new();
    let _store = redb.open().await.unwrap();
    let error = redb.open().await.map(|_| ()).unwrap_err();
    assert!(matches!(error, OpenError::Locked { .. }), "{error}");
    assert!(error.to_string().contains("inbox.redb is in use by another sanjay process"));
}

#[tokio::test]
async fn a_new_file_is_for_its_owner_alone_and_an_old_one_keeps_its_mode() {
    use std::{fs::Permissions, os::unix::fs::PermissionsExt as _};
    let redb = Redb::new();
    let mode = || std::fs::metadata(redb.path()).unwrap().permissions().mode() & 0o777;
    drop(redb.open().await.unwrap());
    assert_eq!(mode(), 0o600);
    std::fs::set_permissions(redb.path(), Permissions::from_mode(0o640)).unwrap();
    drop(redb.open().await.unwrap());
    assert_eq!(mode(), 0o640);
}

#[tokio::test]
async fn a_file_that_is_no_store_is_left_alone() {
    let redb = Redb::new();
    for content in [b"not a database, and long enough for a header".repeat(200), b"short".to_vec()] {
        std::fs::write(redb.path(), &content).unwrap();
        let error = redb.open().await.map(|_| ()).unwrap_err();
        assert!(matches!(error, OpenError::Corrupt { .. }), "{error}");
        assert_eq!(std::fs::read(redb.path()).unwrap(), content);
    }
}

#[tokio::test]
async fn another_format_and_a_missing_directory_are_named() {
    let redb = Redb::new();
    drop(redb.open().await.unwrap());
    let database = redb::Database::open(redb.path()).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(tables::META).unwrap().insert("format", 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = redb.open().await.map(|_| ()).unwrap_err();
    assert!(matches!(error, OpenError::Format { found: 2, .. }), "{error}");

    let missing = redb.directory.path().join("nowhere").join("inbox.redb");
    let error = RedbStore::open(missing, redb.options()).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, OpenError::NoDirectory { .. }), "{error}");
}

/// After a failed write everything is refused until the file is open again, which happens by itself.
#[tokio::test]
async fn a_closed_file_is_opened_again() {
    let redb = Redb::new();
    let store = redb.open().await.unwrap();
    store.append(vec![message("bob", 1, "x", "", &redb.clock)]).await.remove(0).unwrap();
    store.file.close();
    let error = store.read(vec![query("bob", None, 1)]).await.remove(0).unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    let appended = store.append(vec![message("bob", 2, "x", "", &redb.clock)]).await.remove(0);
    assert_eq!(appended.unwrap().seq, 2);
}

#[tokio::test]
async fn a_queue_that_is_full_refuses() {
    let redb = Redb::new();
    let store = redb.open().await.unwrap();
    let all = store.queued_kib.clone().try_acquire_many_owned(MAX_QUEUED_KIB as u32).unwrap();
    let busy = store.append(vec![message("bob", 1, "x", "", &redb.clock)]).await.remove(0);
    assert_eq!(busy, Err(AppendError::Store(StoreError::Busy)));
    drop(all);
    let taken = tokio::time::timeout(
        Duration::from_secs(10),
        store.append(vec![message("bob", 1, "x", "", &redb.clock)]),
    );
    assert_eq!(taken.await.unwrap().remove(0).unwrap().seq, 1);
}
