//! A database that is known to be away: what is new is refused at once, what is under way is brought to its end.

use std::time::Duration;

use futures::future::join_all;
use sanjay_resilience::State;
use sanjay_testkit::{eventually, proxy::Proxy};

use super::{faults::all, *};
use crate::store::suite::{query, settle};

#[tokio::test]
async fn an_unknown_outcome_is_resolved_after_new_work_was_refused() {
    let mongo = Mongo::start().await;
    let proxy = Proxy::to_port(mongo.port()).await;
    let uri = format!("mongodb://127.0.0.1:{}/away?directConnection=true", proxy.port());
    let case = Case::at(location(&uri, None)).roomy();
    let store = case.open().await;
    let epoch = store.append(case.messages("bob", [1])).await.remove(0).unwrap().epoch;

    // The write is carried out, its answer is lost, and nobody can be asked.
    proxy.cut_after_request_holding(b"bulkWrite", 0);
    let meanwhile = async {
        proxy.until_cut().await;
        let reads = join_all((0..4).map(|_| store.read(vec![query("bob", None, 1)])));
        assert!(reads.await.into_iter().all(|pages| pages[0].is_err()));
        assert_ne!(store.database.policy.state(), State::Closed);
        let began = Instant::now();
        let refused = store.append(case.messages("bob", [3])).await.remove(0);
        let Err(AppendError::Store(StoreError::Away { retry_after })) = refused else {
            panic!("{refused:?}")
        };
        assert!(retry_after > Duration::ZERO && retry_after <= Duration::from_millis(500), "{retry_after:?}");
        let acked = store.ack(vec![settle("bob", epoch, &[(1, 1)], 0)]).await.remove(0);
        assert!(matches!(acked, Err(StoreError::Away { .. })), "{acked:?}");
        let unread = store.read(vec![query("bob", None, 1)]).await.remove(0);
        assert!(matches!(unread, Err(StoreError::Unavailable(_))), "{unread:?}");
        assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
        proxy.pass();
    };
    let (second, ()) = tokio::join!(store.append(case.messages("bob", [2])), meanwhile);
    assert_eq!(second[0].as_ref().expect("it is found").seq, 2);
    let third = eventually("the store takes work again", Duration::from_secs(5), async || {
        store.append(case.messages("bob", [3])).await.remove(0).ok()
    })
    .await;
    assert_eq!(third.seq, 3);
    let ids: Vec<u128> = all(&store, "bob").await.iter().map(|(_, id)| id.as_u128()).collect();
    assert_eq!(ids, [1, 2, 3], "nothing is doubled, and what was refused was not done");
}

/// The database answers, and says no: that is no outage, however often it happens.
#[tokio::test]
async fn answers_that_refuse_are_no_outage() {
    let case = Case::on(Mongo::shared().await);
    let store = case.open().await;
    let database = &store.database;
    database.inbox.insert_one(doc! { "_id": "twice" }).await.unwrap();
    for _ in 0..20 {
        let twice = database.call(metrics::StoreOperation::Read, async {
            database.inbox.insert_one(doc! { "_id": "twice" }).await
        });
        assert!(twice.await.is_err());
    }
    assert_eq!(database.policy.state(), State::Closed);
}
