//! Messages that wait for their time: lost answers, and nodes that do the same at once.

use std::{collections::BTreeSet, time::Duration};

use futures::future::join_all;
use mongodb::bson::{Document, doc};
use sanjay_testkit::servers::MongoOptions;

use super::{
    faults::{fail, stop_failing},
    shapes::{inbox_of, look},
    *,
};
use crate::{message::State, store::suite::audit::audit_all};

const HOUR_US: u64 = 3_600_000_000;

fn later(case: &Case, user: &str, id: u128, key: &str) -> Scheduled {
    let message = message(user, id, &format!("body-{}", id % 10), key, &case.clock);
    Scheduled { message, deliver_us: case.clock.now_us() + HOUR_US }
}

async fn claim(case: &Case, store: &MongoStore, limit: usize) -> Vec<u128> {
    let now_us = case.clock.now_us();
    let claimed = store.claim_scheduled(now_us, now_us + 30_000_000, limit).await.unwrap();
    claimed.into_iter().map(|scheduled| scheduled.message.message_id.as_u128()).collect()
}

/// A key and its message are there together or not at all, and once, whatever becomes of the answer.
#[tokio::test]
async fn what_became_of_a_scheduled_message_is_looked_up() {
    let mongo = Mongo::start_with(MongoOptions::default().test_commands()).await;
    let concern = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    let cases = [
        ("commit closed", 3, vec!["commitTransaction"], doc! { "closeConnection": true }),
        (
            "commit without a majority",
            1,
            vec!["commitTransaction"],
            doc! { "writeConcernError": concern.clone() },
        ),
        ("closed", 3, vec!["insert"], doc! { "closeConnection": true }),
        ("shutting down", 3, vec!["update"], doc! { "errorCode": 91 }),
        ("without a key", 3, vec!["bulkWrite"], doc! { "closeConnection": true }),
        ("without a majority", 1, vec!["bulkWrite"], doc! { "writeConcernError": concern }),
    ];
    for (name, times, commands, how) in cases {
        for known in [false, true] {
            let case = Case::on(&mongo).roomy();
            let store = case.open().await;
            if known {
                store.append(case.messages("bob", [1])).await.remove(0).unwrap();
            }
            fail(&mongo, doc! { "times": times }, &commands, how.clone()).await;
            let key = if commands == ["bulkWrite"] { "" } else { "k" };
            let first = later(&case, "bob", 2, key);
            let answer = store.schedule(vec![first.clone()]).await.remove(0);
            stop_failing(&mongo).await;
            let scheduled = ScheduledAt {
                message_id: first.message.message_id,
                deliver_us: first.deliver_us,
                duplicate: false,
                time_us: first.message.time_us,
            };
            assert_eq!(answer, Ok(scheduled.clone()), "{name}");
            let receipt = store.lookup("bob".to_owned(), Uuid::from_u128(2)).await.unwrap().unwrap();
            assert_eq!((receipt.seq, receipt.state), (0, State::Scheduled), "{name}");
            assert_eq!(store.stats().await.unwrap().scheduled, 1, "{name}");
            if !key.is_empty() {
                let again = store.schedule(vec![later(&case, "bob", 12, key)]).await.remove(0);
                assert_eq!(again, Ok(ScheduledAt { duplicate: true, ..scheduled }), "{name}");
                let mut sent = message("bob", 22, "body-2", key, &case.clock);
                let again = store.append(vec![sent.clone()]).await.remove(0).unwrap();
                assert_eq!((again.seq, again.message_id.as_u128(), again.duplicate), (0, 2, true), "{name}");
                sent.payload = suite::text("other");
                let other = store.append(vec![sent]).await.remove(0);
                assert_eq!(other, Err(AppendError::AlreadyExists { key: "k".to_owned() }), "{name}");
            }
            case.clock.advance(Duration::from_secs(3_600));
            assert_eq!(claim(&case, &store, 10).await, [2], "{name}");
            assert_eq!(audit_all(&store).await, (usize::from(known), vec![]), "{name}");
        }
    }
}

/// One that schedules and one that appends under the same key have one message between them.
#[tokio::test]
async fn one_key_is_one_message_now_or_later() {
    let mongo = Mongo::shared().await;
    for case in [Case::on(mongo).roomy(), Case::on(mongo).roomy().small()] {
        let (one, two) = (case.open().await, case.open().await);
        for round in 0..25_u128 {
            let (id, key) = (round * 100, format!("key-{round}"));
            let sends =
                (1..=3).map(|n| two.append(vec![message("bob", id + n * 10, "body-0", &key, &case.clock)]));
            let plans = (4..=6).map(|n| one.schedule(vec![later(&case, "bob", id + n * 10, &key)]));
            let (sent, planned) = tokio::join!(join_all(sends), join_all(plans));
            let mut all: Vec<(Uuid, bool)> = Vec::new();
            all.extend(
                sent.into_iter().flatten().map(|sent| sent.map(|s| (s.message_id, s.duplicate)).unwrap()),
            );
            all.extend(
                planned.into_iter().flatten().map(|at| at.map(|s| (s.message_id, s.duplicate)).unwrap()),
            );
            assert_eq!(all.iter().filter(|(_, duplicate)| !duplicate).count(), 1, "{round}: {all:?}");
            assert_eq!(all.iter().map(|(id, _)| *id).collect::<BTreeSet<_>>().len(), 1, "{round}: {all:?}");
        }
        let stats = one.stats().await.unwrap();
        assert_eq!(stats.unsettled + stats.scheduled, 25);
    }
}

/// Each message has one node that gets it, until its time is up.
#[tokio::test]
async fn nodes_claim_a_scheduled_message_once() {
    let mut case = Case::on(Mongo::shared().await).roomy();
    for sharing in [false, true] {
        case.tuning.sharing = sharing;
        let (one, two) = (case.open().await, case.open().await);
        let batch = (1..=60).map(|id| later(&case, &format!("user-{}", id % 20), id, "")).collect();
        one.schedule(batch).await.into_iter().for_each(|result| assert!(result.is_ok()));
        assert_eq!(claim(&case, &one, 100).await, [0_u128; 0]);
        case.clock.advance(Duration::from_secs(3_600));
        let mut claimed = Vec::new();
        for _ in 0..8 {
            let (first, second) = tokio::join!(claim(&case, &one, 20), claim(&case, &two, 20));
            claimed.extend(first.into_iter().chain(second));
        }
        if sharing {
            // What the other's part holds is anybody's after a while.
            case.clock.advance(Duration::from_secs(6));
            claimed.extend(claim(&case, &one, 100).await);
        }
        assert_eq!(claimed.len(), 60, "each once");
        assert_eq!(claimed.into_iter().collect::<BTreeSet<_>>(), (1..=60).collect());
        case.clock.advance(Duration::from_secs(36));
        assert_eq!(claim(&case, &two, 100).await.len(), 60, "they come again");
        let all = (1..=60).map(|id| (format!("user-{}", id % 20), Uuid::from_u128(id))).collect();
        assert_eq!(two.unschedule(all).await, Ok(60));
        case.clock.advance(Duration::from_secs(36));
        assert_eq!(claim(&case, &two, 100).await, [0_u128; 0]);
    }
}

/// The keys of scheduled messages leave the document like others, and are found beside it.
#[tokio::test]
async fn keys_of_scheduled_messages_do_not_gather() {
    let case = Case::on(Mongo::shared().await).roomy();
    let store = case.open().await;
    for id in 1..=40 {
        let answer = store.schedule(vec![later(&case, "bob", id, &format!("key-{id}"))]).await.remove(0);
        assert!(answer.is_ok(), "{answer:?}");
    }
    let inbox: Document = inbox_of(&look(&case, "inbox").await, "bob").await;
    assert!(inbox.get_array("keys").unwrap().len() <= Bounds::default().keys, "{inbox}");
    for id in 1..=40 {
        let again =
            store.schedule(vec![later(&case, "bob", id + 1_000, &format!("key-{id}"))]).await.remove(0);
        let again = again.unwrap();
        assert_eq!((again.message_id.as_u128(), again.duplicate), (id, true));
    }
}
