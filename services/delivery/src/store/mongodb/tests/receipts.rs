//! The log of receipts: writes that come late, several nodes, what lies where, and how it is found.

use std::{collections::BTreeSet, time::Duration};

use futures::future::join_all;
use mongodb::bson::{Bson, Document, doc};
use sanjay_runtime::clock::{Clock as _, SystemClock};
use sanjay_testkit::eventually;

use super::{
    shapes::{inbox_of, look},
    *,
};
use crate::store::{
    LogStart, LoggedReceipt,
    suite::{read_log, settle},
};

/// A write whose time has passed on the server does nothing, and its acks are settled by one with another time.
#[tokio::test]
async fn a_write_that_comes_late_does_nothing() {
    let case = Case::on(Mongo::shared().await).roomy();
    case.clock.set(SystemClock.now_us());
    let store = case.open().await;
    assert!(store.database.tells_now, "the server looks at its clock");
    let epoch = store.append(case.messages("bob", 1..=3)).await.remove(0).unwrap().epoch;
    // By the server's clock the time of what follows has passed long ago.
    case.clock.set(SystemClock.now_us() - 60_000_000);
    let late = store.ack(vec![settle("bob", epoch, &[(1, 2)], 0)]);
    let put_right = async {
        let collection = look(&case, "inbox").await;
        eventually("it was tried", Duration::from_secs(4), async || {
            (case.metrics.store_troubles().1 > 1).then_some(())
        })
        .await;
        let inbox = inbox_of(&collection, "bob").await;
        assert!(inbox.get_array("receipts").is_err() && inbox.get_array("messages").unwrap().len() == 3);
        case.clock.set(SystemClock.now_us());
    };
    let (acked, ()) = tokio::join!(late, put_right);
    assert_eq!(acked.into_iter().map(|acked| acked.unwrap().mark).collect::<Vec<_>>(), [2]);
    let kept = NewMessage { collapse_key: "k".into(), ..case.messages("bob", [4]).remove(0) };
    let newer = NewMessage { collapse_key: "k".into(), ..case.messages("bob", [5]).remove(0) };
    store.append(vec![kept]).await.remove(0).unwrap();
    case.clock.set(SystemClock.now_us() - 60_000_000);
    let late = store.append(vec![newer]);
    let before = case.metrics.store_troubles().1;
    let put_right = async {
        eventually("it was tried", Duration::from_secs(4), async || {
            (case.metrics.store_troubles().1 > before + 1).then_some(())
        })
        .await;
        case.clock.set(SystemClock.now_us());
    };
    let (appended, ()) = tokio::join!(late, put_right);
    assert_eq!(appended.into_iter().map(|appended| appended.unwrap().seq).collect::<Vec<_>>(), [5]);
    case.clock.set(SystemClock.now_us() + 1_000);
    let (all, _) = read_log(&store, LogStart::Oldest, 10).await;
    let ends: Vec<_> = all.iter().map(|receipt| receipt.message_id.as_u128()).collect();
    assert_eq!(ends, [1, 2, 4]);
    let now_us = SystemClock.now_us();
    assert!(all.iter().all(|receipt| now_us - receipt.receipt.settled_us < 30_000_000), "{all:?}");
}

/// Nodes settle at the same time, inboxes are tidied, and readers go on all the while: none misses a receipt, none gets
/// one twice, and all get them in one order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readers_that_follow_miss_none() {
    const USERS: u128 = 12;
    const ROUNDS: u128 = 25;
    let mut case = Case::on(Mongo::shared().await).roomy().small();
    // The server's clock, and what follows from it.
    (case.tuning.clock, case.tuning.log_lag_us) = (None, None);
    let (one, two) = (case.open().await, case.open().await);
    let settle_all = async |store: &MongoStore, node: u128| {
        for round in 0..ROUNDS {
            let users = (0..USERS).map(|user| {
                let case = &case;
                async move {
                    let name = format!("user-{user}");
                    let id = node * 100_000 + round * 100 + user;
                    let message = NewMessage {
                        collapse_key: format!("{}", round % 2),
                        ..case.messages(&name, [id]).remove(0)
                    };
                    let sent = store.append(vec![message]).await.remove(0).unwrap();
                    if round % 3 == 0 {
                        store
                            .ack(vec![settle(&name, sent.epoch, &[(1, sent.seq)], 0)])
                            .await
                            .remove(0)
                            .unwrap();
                    }
                }
            });
            join_all(users).await;
        }
        for user in 0..USERS {
            let name = format!("user-{user}");
            let page = suite::read_all(store, &name).await;
            store.ack(vec![settle(&name, page.epoch, &[(1, page.head)], 0)]).await.remove(0).unwrap();
        }
    };
    let expected = (2 * USERS * ROUNDS) as usize;
    let follow = async |store: &MongoStore, limit: usize| {
        let (mut all, mut from) = (Vec::<LoggedReceipt>::new(), LogStart::Oldest);
        while all.len() < expected {
            let page = store.receipts(from, limit).await.unwrap();
            all.extend(page.receipts);
            if page.tail && all.len() < expected {
                store.receipts_after(page.next.clone()).await;
            }
            from = LogStart::After(page.next);
        }
        all
    };
    let everything = async {
        let writers = async { tokio::join!(settle_all(&one, 1), settle_all(&two, 2)) };
        tokio::join!(writers, follow(&one, 7), follow(&two, 100))
    };
    let (_, first, second) =
        tokio::time::timeout(Duration::from_secs(90), everything).await.expect("all are read in time");
    let ids: BTreeSet<Uuid> = first.iter().map(|receipt| receipt.message_id).collect();
    assert_eq!((first.len(), ids.len()), (expected, expected));
    assert_eq!(first, second, "one order");
    let (again, _) = read_log(&one, LogStart::Oldest, 33).await;
    assert_eq!(first, again, "and the same later");
}

/// Each receipt has one entry that finds it, in the document where it lies.
#[tokio::test]
async fn each_receipt_has_its_entry() {
    let case = Case::on(Mongo::shared().await).roomy().small();
    let store = case.open().await;
    let epoch = store.append(case.messages("bob", 1..=40)).await.remove(0).unwrap().epoch;
    for seq in 1..=40 {
        store.ack(vec![settle("bob", epoch, &[(seq, seq)], 0)]).await.remove(0).unwrap();
        case.clock.advance(Duration::from_micros(1));
    }
    let (collection, beside) = (look(&case, "inbox").await, look(&case, "beside").await);
    let count = |document: &Document, name| document.get_array(name).map_or(0, Vec::len);
    eventually("most are beside the inbox", Duration::from_secs(20), async || {
        let inbox = inbox_of(&collection, "bob").await;
        assert_eq!(count(&inbox, "receipts"), count(&inbox, "log"));
        (count(&inbox, "receipts") <= 2).then_some(())
    })
    .await;
    let documents: Vec<Document> = {
        use futures::TryStreamExt as _;
        beside.find(doc! { "receipts": { "$exists": true } }).await.unwrap().try_collect().await.unwrap()
    };
    for document in &documents {
        let of = |name: &str| document.get_array(name).unwrap().clone();
        let entries: Vec<Bson> = of("receipts")
            .into_iter()
            .map(|receipt| {
                let receipt = receipt.as_document().unwrap().clone();
                let receipt: documents::ReceiptDoc =
                    mongodb::bson::deserialize_from_document(receipt).unwrap();
                receipt.entry().into()
            })
            .collect();
        assert_eq!(entries, of("log"));
    }
    assert!(documents.len() > 5, "{}", documents.len());
    assert_eq!(read_log(&store, LogStart::Oldest, 100).await.0.len(), 40);
}

/// What is settled as late as a write may be is behind no reader.
#[tokio::test]
async fn a_reader_waits_for_the_last_write_that_counts() {
    let mut case = Case::on(Mongo::shared().await).roomy();
    (case.tuning.clock, case.tuning.log_lag_us) = (None, None);
    let store = case.open().await;
    let before = store.receipts(LogStart::Oldest, 10).await.unwrap();
    assert!(before.tail && before.receipts.is_empty());
    let late_us = store.clock().now_us() - super::super::receipts::LIFETIME_US;
    let receipt = documents::ReceiptDoc {
        i: documents::id(Uuid::from_u128(7)),
        n: 1,
        s: 2,
        a: 5,
        t: late_us.cast_signed(),
        c: "shop".to_owned(),
        r: None,
    };
    let entry = receipt.entry();
    let inbox = doc! { "_id": "bob", "receipts": [documents::document(&receipt).unwrap()], "log": [entry] };
    look(&case, "inbox").await.insert_one(inbox).await.unwrap();
    let mut from = before.next;
    let found = eventually("it is in the log", Duration::from_secs(30), async || {
        store.receipts_after(from.clone()).await;
        let page = store.receipts(LogStart::After(from.clone()), 10).await.unwrap();
        from = page.next;
        page.receipts.into_iter().next()
    })
    .await;
    assert_eq!((found.user.as_str(), found.receipt.settled_us), ("bob", late_us));
}
