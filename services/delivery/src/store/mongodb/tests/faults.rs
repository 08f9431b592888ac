//! Several nodes on one database, and a database that fails.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::future::join_all;
use mongodb::bson::{Document, doc};
use parking_lot::Mutex;
use sanjay_testkit::{
    eventually,
    proxy::{Direction, Mode, Proxy},
    servers::MongoOptions,
};

use super::*;
use crate::message::State;
use crate::store::{
    DeadReason, MAX_PAGE_MESSAGES, SettledMessage,
    suite::{query, read_all, settle},
};

/// Everything that is unsettled, page by page.
pub(super) async fn all(store: &MongoStore, user: &str) -> Vec<(u64, Uuid)> {
    let (mut messages, mut after) = (Vec::new(), None);
    loop {
        let page = store.read(vec![query(user, after, MAX_PAGE_MESSAGES)]).await.remove(0).unwrap();
        messages.extend(
            page.messages.iter().map(|message| (message.seq, Uuid::from_slice(&message.message_id).unwrap())),
        );
        if page.covers == page.head {
            return messages;
        }
        after = Some(page.covers);
    }
}

/// Remembers what was told to be committed, in order.
#[derive(Default)]
struct Told(Mutex<BTreeMap<String, Vec<u64>>>);

impl CommitSink for Told {
    fn died(&self, _: DeadReason, _: usize) {}

    fn ended(&self, _: &str, _: &SettledMessage, _: State) {}

    fn committed(&self, message: &NewMessage, appended: &Appended) {
        self.0.lock().entry(message.user.clone()).or_default().push(appended.seq);
    }
}

/// Appends one by one from several tasks; returns what was accepted.
async fn send_from_tasks(case: &Case, store: &MongoStore, first: u128) -> Vec<(String, u64, Uuid)> {
    let tasks = (0..6_u128).map(|task| async move {
        let mut accepted = Vec::new();
        for n in 0..12 {
            let user = format!("user-{}", (task + n) % 3);
            let id = first + task * 100 + n;
            let appended = store.append(case.messages(&user, [id])).await.remove(0).unwrap();
            accepted.push((user, appended.seq, appended.message_id));
        }
        accepted
    });
    join_all(tasks).await.into_iter().flatten().collect()
}

#[tokio::test]
async fn nodes_that_send_to_the_same_users_leave_no_gap() {
    let mongo = Mongo::shared().await;
    let (one_told, two_told) = (Arc::new(Told::default()), Arc::new(Told::default()));
    let mut case = Case::on(mongo).roomy();
    case.on_commit = one_told.clone();
    let one = case.open().await;
    case.on_commit = two_told.clone();
    let two = case.open().await;
    let (mut sent, more) =
        tokio::join!(send_from_tasks(&case, &one, 1_000), send_from_tasks(&case, &two, 5_000));
    sent.extend(more);
    for user in ["user-0", "user-1", "user-2"] {
        let mut expected: Vec<(u64, Uuid)> =
            sent.iter().filter(|(to, ..)| to == user).map(|&(_, seq, id)| (seq, id)).collect();
        expected.sort_unstable();
        let seqs: Vec<u64> = expected.iter().map(|(seq, _)| *seq).collect();
        assert_eq!(seqs, (1..=48).collect::<Vec<u64>>());
        assert_eq!(all(&one, user).await, expected);
        // Each node tells of its own in order, and of each once.
        let told = [&one_told, &two_told].map(|told| told.0.lock()[user].clone());
        assert!(told.iter().all(|seqs| seqs.is_sorted()), "{told:?}");
        assert_eq!(told.into_iter().flatten().collect::<BTreeSet<u64>>().len(), 48);
    }
    let (unknown, conflicts) = case.metrics.store_troubles();
    assert!(unknown == 0 && conflicts > 0, "{unknown} unknown, {conflicts} conflicts: they met");
}

#[tokio::test]
async fn one_key_on_two_nodes_is_one_message() {
    let mongo = Mongo::shared().await;
    for case in [Case::on(mongo).roomy(), Case::on(mongo).roomy().small()] {
        let (one, two) = (case.open().await, case.open().await);
        let send = |store: &MongoStore, id: u128| {
            let key = format!("key-{}", id % 10);
            store.append(vec![message("bob", id, "x", &key, &case.clock)])
        };
        let answers = join_all((0..40).map(|n| send(if n % 2 == 0 { &one } else { &two }, n))).await;
        let mut seqs = BTreeMap::<u64, Vec<bool>>::new();
        for appended in answers.into_iter().flatten() {
            let appended = appended.unwrap();
            seqs.entry(appended.seq).or_default().push(appended.duplicate);
        }
        assert_eq!(seqs.keys().copied().collect::<Vec<u64>>(), (1..=10).collect::<Vec<u64>>());
        for (seq, duplicates) in seqs {
            assert_eq!(duplicates.iter().filter(|duplicate| !**duplicate).count(), 1, "seq {seq}");
        }
    }
}

#[tokio::test]
async fn a_node_settles_what_another_appended() {
    let mongo = Mongo::shared().await;
    for case in [Case::on(mongo).roomy(), Case::on(mongo).roomy().small()] {
        let (one, two) = (case.open().await, case.open().await);
        for round in 0..8_u128 {
            let ids = round * 10..round * 10 + 10;
            let first = round as u64 * 10 + 1;
            let epoch = one.append(case.messages("bob", ids)).await.remove(0).unwrap().epoch;
            // Half on each node, at the same time.
            let halves = tokio::join!(
                one.ack(vec![settle("bob", epoch, &[(first, first + 4)], 0)]),
                two.ack(vec![settle("bob", epoch, &[(first + 5, first + 9)], first + 9)]),
            );
            let settled: usize =
                [halves.0, halves.1].into_iter().flatten().map(|acked| acked.unwrap().messages.len()).sum();
            assert_eq!(settled, 10);
        }
        let page = read_all(&one, "bob").await;
        assert_eq!((page.mark, page.head, page.messages.len()), (80, 80, 0));
        for id in 0..80 {
            let receipt = two.lookup("bob".to_owned(), Uuid::from_u128(id)).await.unwrap().unwrap();
            assert_eq!((receipt.seq, receipt.state.is_terminal()), (id as u64 + 1, true));
        }
    }
}

/// Makes commands of a kind fail, some of the next by `mode`.
pub(super) async fn fail(mongo: &Mongo, mode: Document, commands: &[&str], how: Document) {
    let mut data = doc! { "failCommands": commands };
    data.extend(how);
    let command = doc! { "configureFailPoint": "failCommand", "mode": mode, "data": data };
    mongo.command("admin", command).await;
}

pub(super) async fn stop_failing(mongo: &Mongo) {
    mongo.command("admin", doc! { "configureFailPoint": "failCommand", "mode": "off" }).await;
}

#[tokio::test]
async fn what_became_of_a_failed_write_is_looked_up() {
    let mongo = Mongo::start_with(MongoOptions::default().test_commands()).await;
    let concern = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    let cases = [
        // More often than the driver tries.
        ("closed", 3, vec!["bulkWrite"], doc! { "closeConnection": true }),
        (
            "no primary",
            3,
            vec!["bulkWrite"],
            doc! { "errorCode": 10107, "errorLabels": ["RetryableWriteError"] },
        ),
        ("shutting down", 3, vec!["bulkWrite"], doc! { "errorCode": 91 }),
        ("no majority", 1, vec!["bulkWrite"], doc! { "writeConcernError": concern }),
        ("no look-up", 4, vec!["bulkWrite", "find"], doc! { "closeConnection": true }),
    ];
    for (name, times, commands, how) in cases {
        let case = Case::on(&mongo).roomy();
        let store = case.open().await;
        let epoch = store.append(case.messages("bob", [1])).await.remove(0).unwrap().epoch;
        let (before, _) = case.metrics.store_troubles();
        fail(&mongo, doc! { "times": times }, &commands, how.clone()).await;
        let pending: Vec<_> = (2..8).map(|id| store.append(case.messages("bob", [id]))).collect();
        for (pending, seq) in pending.into_iter().zip(2..) {
            assert_eq!(pending.await.remove(0).unwrap().seq, seq, "{name}");
        }
        let ids: Vec<u128> = all(&store, "bob").await.iter().map(|(_, id)| id.as_u128()).collect();
        assert_eq!(ids, (1..8).collect::<Vec<u128>>(), "{name}");
        let (after, _) = case.metrics.store_troubles();
        assert!(after > before, "{name}: the fault did not land");
        // Acks are looked up likewise.
        fail(&mongo, doc! { "times": times }, &commands, how).await;
        let acked = store.ack(vec![settle("bob", epoch, &[(1, 5)], 0)]).await.remove(0).unwrap();
        assert_eq!((acked.mark, acked.messages.len()), (5, 5), "{name}");
        let (last, _) = case.metrics.store_troubles();
        assert!(last > after, "{name}: the second fault did not land");
        assert_eq!(store.stats().await.unwrap().unsettled, 2, "{name}");
    }
}

#[tokio::test]
async fn a_lost_answer_does_not_double_a_message() {
    let mongo = Mongo::start().await;
    let proxy = Proxy::to_port(mongo.port()).await;
    let uri = format!("mongodb://127.0.0.1:{}/lost?directConnection=true", proxy.port());
    let case = Case::at(location(&uri, None)).roomy();
    let store = case.open().await;
    store.append(case.messages("bob", [1])).await.remove(0).unwrap();
    for id in 2..6 {
        proxy.cut_after_request_holding(b"bulkWrite", 0);
        let (appended, ()) = tokio::join!(store.append(case.messages("bob", [id])), async {
            proxy.until_cut().await;
            // It is there, and its sender does not know.
            eventually("it was committed", Duration::from_secs(10), async || {
                let find = doc! { "find": "inbox", "filter": { "_id": "bob", "seq": id as i64 } };
                let found = mongo.command("lost", find).await;
                let batch = found.get_document("cursor").unwrap().get_array("firstBatch").unwrap();
                (!batch.is_empty()).then_some(())
            })
            .await;
            proxy.pass();
        });
        assert_eq!(appended[0].as_ref().unwrap().seq, id as u64);
    }
    let ids: Vec<u128> = all(&store, "bob").await.iter().map(|(_, id)| id.as_u128()).collect();
    assert_eq!(ids, [1, 2, 3, 4, 5]);
}

/// A write arrives after its sender has given it up and written again.
#[tokio::test]
async fn a_late_write_does_not_double_a_message() {
    let mongo = Mongo::start().await;
    let proxy = Proxy::to_port(mongo.port()).await;
    let uri = format!("mongodb://127.0.0.1:{}/late?directConnection=true", proxy.port());
    let case = Case::at(location(&uri, None)).roomy();
    let store = case.open().await;
    store.append(case.messages("bob", [1])).await.remove(0).unwrap();
    let late = database::CALL + Duration::from_millis(300);
    proxy.set(Direction::Request, Mode::Delay(late));
    let (second, ()) = tokio::join!(store.append(case.messages("bob", [2])), async {
        tokio::time::sleep(database::CALL + Duration::from_millis(50)).await;
        proxy.pass();
    });
    let third = eventually("the store is back", Duration::from_secs(20), async || {
        store.append(case.messages("bob", [3])).await.remove(0).ok()
    })
    .await;
    // By now the late write is there, too.
    tokio::time::sleep(late).await;
    let messages = all(&store, "bob").await;
    let ids: Vec<u128> = messages.iter().map(|(_, id)| id.as_u128()).collect();
    match second.into_iter().next().unwrap() {
        Ok(_) => assert_eq!(ids, [1, 2, 3]),
        Err(_) => assert!(ids == [1, 3] || ids == [1, 2, 3] || ids == [1, 3, 2], "{ids:?}"),
    }
    assert_eq!(messages.iter().find(|(_, id)| id.as_u128() == 3).unwrap().0, third.seq);
    let (unknown, _) = case.metrics.store_troubles();
    assert!(unknown > 0, "the fault did not land");
}

#[tokio::test]
async fn a_silent_database_answers_nobody_and_loses_nothing() {
    let mut mongo = Mongo::start().await;
    let case = Case::on(&mongo).roomy();
    let store = case.open().await;
    store.append(case.messages("bob", [1])).await.remove(0).unwrap();
    mongo.stop();
    let failed = store.append(case.messages("bob", [2])).await.remove(0);
    assert!(matches!(failed, Err(AppendError::Store(StoreError::Unavailable(_)))), "{failed:?}");
    let unread = store.read(vec![query("bob", None, 1)]).await.remove(0);
    assert!(matches!(unread, Err(StoreError::Unavailable(_))), "{unread:?}");
    mongo.cont();
    // The same store goes on by itself.
    let appended = eventually("the store is back", Duration::from_secs(20), async || {
        store.append(case.messages("bob", [3])).await.remove(0).ok()
    })
    .await;
    let messages = all(&store, "bob").await;
    let ids: Vec<u128> = messages.iter().map(|(_, id)| id.as_u128()).collect();
    // The message without an answer is there once or not at all.
    assert!(ids == [1, 3] || ids == [1, 2, 3], "{ids:?}");
    assert_eq!(messages.last().unwrap().0, appended.seq);
}

#[tokio::test]
async fn a_killed_database_has_all_that_was_answered() {
    let mut mongo = Mongo::start_with(MongoOptions::default().sync_on_commit()).await;
    let case = Case::on(&mongo).roomy();
    let store = case.open().await;
    let mut accepted = Vec::new();
    for round in 0..2_u128 {
        let first = round * 1_000 + 1;
        let sending = async {
            let mut last = first;
            loop {
                let mut batch = case.messages("bob", [last]);
                batch.extend(case.messages("eve", [last]));
                let answers = store.append(batch).await;
                for (answer, user) in answers.into_iter().zip(["bob", "eve"]) {
                    match answer {
                        Ok(appended) => accepted.push((user, appended.seq, appended.message_id)),
                        // It was killed.
                        Err(_) => return,
                    }
                }
                last += 1;
            }
        };
        tokio::join!(sending, async {
            tokio::time::sleep(Duration::from_millis(400)).await;
            mongo.kill();
        });
        mongo.restart().await;
        eventually("the store is back", Duration::from_secs(20), async || {
            store.read(vec![query("bob", None, 0)]).await.remove(0).ok()
        })
        .await;
    }
    assert!(accepted.len() > 20, "only {} were accepted", accepted.len());
    for user in ["bob", "eve"] {
        let stored = all(&store, user).await;
        let seqs: Vec<u64> = stored.iter().map(|(seq, _)| *seq).collect();
        assert_eq!(seqs, (1..=seqs.len() as u64).collect::<Vec<u64>>());
        let ids: BTreeSet<Uuid> = stored.iter().map(|(_, id)| *id).collect();
        assert_eq!(ids.len(), stored.len(), "a message is there twice");
        let stored: BTreeMap<u64, Uuid> = stored.into_iter().collect();
        for (_, seq, id) in accepted.iter().filter(|(to, ..)| *to == user) {
            assert_eq!(stored.get(seq), Some(id), "{user} lost {seq}");
        }
    }
}

#[tokio::test]
async fn a_queue_that_is_full_refuses() {
    let case = Case::on(Mongo::shared().await);
    let store = case.open().await;
    let all = store.queue.queued.clone().try_acquire_many_owned(queue::MAX_QUEUED as u32).unwrap();
    let busy = store.append(case.messages("bob", [1])).await.remove(0);
    assert_eq!(busy, Err(AppendError::Store(StoreError::Busy)));
    assert_eq!(store.ack(vec![settle("bob", 1, &[(1, 1)], 0)]).await, [Err(StoreError::Busy)]);
    store.arm(vec!["bob".to_owned()]);
    drop(all);
    assert_eq!(store.append(case.messages("bob", [1])).await.remove(0).unwrap().seq, 1);
}
