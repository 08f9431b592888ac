//! What ends without an ack: lost answers, nodes that do the same at once, and what lies in the database.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use futures::future::join_all;
use mongodb::bson::{Document, doc};
use parking_lot::Mutex;
use sanjay_testkit::{eventually, servers::MongoOptions};

use super::{
    faults::{all, fail},
    shapes::{inbox_of, look},
    *,
};
use crate::{
    message::State,
    store::{
        DeadReason, MAX_SETTLED_RANGES, Overflow, Quota, SettledMessage,
        suite::{audit::audit_all, settle},
    },
};

const WAIT: Duration = Duration::from_secs(20);
const SECOND_US: u64 = 1_000_000;

/// Remembers what was told to have ended.
#[derive(Default)]
pub(super) struct Ended(pub(super) Mutex<BTreeMap<u128, Vec<State>>>);

impl CommitSink for Ended {
    fn committed(&self, _: &NewMessage, _: &Appended) {}

    fn died(&self, _: DeadReason, _: usize) {}

    fn ended(&self, _: &str, message: &SettledMessage, state: State) {
        self.0.lock().entry(message.message_id.as_u128()).or_default().push(state);
    }
}

/// A case whose sink remembers.
pub(super) fn told(mut case: Case) -> (Case, Arc<Ended>) {
    let ended = Arc::new(Ended::default());
    case.on_commit = ended.clone();
    (case, ended)
}

fn keyed(case: &Case, id: u128, key: &str) -> NewMessage {
    let sent = message("bob", id, &format!("body-{id}"), "", &case.clock);
    NewMessage { collapse_key: key.to_owned(), ..sent }
}

/// Expires so many seconds from now.
fn mortal(case: &Case, user: &str, id: u128, seconds: u64) -> NewMessage {
    let sent = message(user, id, &format!("body-{id}"), "", &case.clock);
    NewMessage { expires_us: case.clock.now_us() + seconds * SECOND_US, ..sent }
}

async fn state(store: &MongoStore, id: u128) -> State {
    store.lookup("bob".to_owned(), Uuid::from_u128(id)).await.unwrap().unwrap().state
}

async fn ids(store: &MongoStore) -> Vec<u128> {
    all(store, "bob").await.iter().map(|(_, id)| id.as_u128()).collect()
}

/// What the document counts, absent as 0.
async fn counts(case: &Case, names: &[&str]) -> Vec<i64> {
    let inbox = inbox_of(&look(case, "inbox").await, "bob").await;
    names.iter().map(|name| inbox.get_i64(name).unwrap_or_default()).collect()
}

/// Expires until nothing more is due; returns how many.
async fn expire_all(case: &Case, store: &MongoStore, limit: usize) -> usize {
    let mut settled = 0;
    for _ in 0..200 {
        let expired = store.expire(case.clock.now_us(), limit).await.unwrap();
        settled += expired.settled;
        if !expired.more {
            return settled;
        }
    }
    panic!("it does not come to an end");
}

fn faults() -> [(&'static str, i32, Document); 3] {
    let concern = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    [
        ("closed", 3, doc! { "closeConnection": true }),
        ("shutting down", 3, doc! { "errorCode": 91 }),
        ("no majority", 1, doc! { "writeConcernError": concern }),
    ]
}

/// An append that replaces, or makes room, is done once when its answer is lost.
#[tokio::test]
async fn what_became_of_a_replacing_append_is_looked_up() {
    let mongo = Mongo::start_with(MongoOptions::default().test_commands()).await;
    for (name, times, how) in faults() {
        let (mut case, ended) = told(Case::on(&mongo));
        (case.max_unsettled, case.overflow) = (3, Overflow::DeadLetterOldest);
        let store = case.open().await;
        let batch = vec![keyed(&case, 1, ""), keyed(&case, 2, "k"), keyed(&case, 3, "l")];
        store.append(batch).await.into_iter().for_each(|result| assert!(result.is_ok(), "{name}"));
        let (before, _) = case.metrics.store_troubles();
        fail(&mongo, doc! { "times": times }, &["bulkWrite"], how.clone()).await;
        assert_eq!(store.append(vec![keyed(&case, 4, "k")]).await.remove(0).unwrap().seq, 4, "{name}");
        let (after, _) = case.metrics.store_troubles();
        assert!(after > before, "{name}: the fault did not land");
        assert_eq!(ids(&store).await, [1, 3, 4], "{name}");
        assert_eq!(state(&store, 2).await, State::Superseded, "{name}");
        assert_eq!(counts(&case, &["seq", "superseded", "bytes"]).await, [4, 1, 24], "{name}");
        // The oldest dies for the next.
        fail(&mongo, doc! { "times": times }, &["bulkWrite"], how).await;
        assert_eq!(store.append(vec![keyed(&case, 5, "")]).await.remove(0).unwrap().seq, 5, "{name}");
        let (last, _) = case.metrics.store_troubles();
        assert!(last > after, "{name}: the second fault did not land");
        eventually("it is dead", WAIT, async || (state(&store, 1).await == State::Dead).then_some(())).await;
        assert_eq!(ids(&store).await, [3, 4, 5], "{name}");
        let letter = store.dead_letter("bob".to_owned(), Uuid::from_u128(1)).await.unwrap().unwrap();
        assert_eq!((letter.reason, letter.seq), (DeadReason::QueueFull, 1), "{name}");
        assert_eq!(counts(&case, &["mark", "dead", "superseded", "bytes"]).await, [2, 1, 1, 24], "{name}");
        assert_eq!(*ended.0.lock(), BTreeMap::from([(2, vec![State::Superseded])]), "{name}");
        assert_eq!(audit_all(&store).await, (1, vec![]), "{name}");
    }
}

#[tokio::test]
async fn what_became_of_an_expiry_is_looked_up() {
    let mongo = Mongo::start_with(MongoOptions::default().test_commands()).await;
    for (name, times, how) in faults() {
        for small in [false, true] {
            let (case, ended) = told(Case::on(&mongo));
            let case = if small { case.small() } else { case };
            let store = case.open().await;
            let batch = (1..=8).map(|id| mortal(&case, "bob", id, if id % 2 == 0 { 5 } else { 500 }));
            store.append(batch.collect()).await.into_iter().for_each(|result| assert!(result.is_ok()));
            eventually("it is tidy", WAIT, async || {
                let inbox = inbox_of(&look(&case, "inbox").await, "bob").await;
                (!small || inbox.get_array("messages").unwrap().len() == 1).then_some(())
            })
            .await;
            case.clock.advance(Duration::from_secs(5));
            assert_eq!(ids(&store).await, [1, 3, 5, 7], "{name}");
            let (before, _) = case.metrics.store_troubles();
            fail(&mongo, doc! { "times": times }, &["bulkWrite"], how.clone()).await;
            assert_eq!(expire_all(&case, &store, 100).await, 4, "{name}");
            let (after, _) = case.metrics.store_troubles();
            assert!(after > before, "{name}: the fault did not land");
            for id in 1..=8 {
                let expected = if id % 2 == 0 { State::Expired } else { State::Accepted };
                assert_eq!(state(&store, id).await, expected, "{name}");
            }
            assert_eq!(counts(&case, &["expired", "bytes"]).await, [4, 32], "{name}");
            let once = [2, 4, 6, 8].map(|id| (id, vec![State::Expired]));
            assert_eq!(*ended.0.lock(), BTreeMap::from(once), "{name}");
            assert_eq!(audit_all(&store).await, (1, vec![]), "{name}");
        }
    }
}

/// Nodes that send under the same keys leave the newest of each key, and lose nothing.
#[tokio::test]
async fn nodes_that_replace_the_same_message_agree() {
    let mongo = Mongo::shared().await;
    for case in [Case::on(mongo).roomy(), Case::on(mongo).roomy().small()] {
        let (mut case, first) = told(case);
        let one = case.open().await;
        let second = Arc::new(Ended::default());
        case.on_commit = second.clone();
        let two = case.open().await;
        let send = |store: &MongoStore, id: u128| {
            store.append(vec![keyed(&case, id, ["k", "l", ""][id as usize % 3])])
        };
        let sends = (1..=60).map(|id| send(if id % 2 == 0 { &one } else { &two }, id));
        let answers = join_all(sends).await.into_iter().flatten().map(Result::unwrap);
        let mut by_seq: Vec<(u64, u128)> =
            answers.map(|appended| (appended.seq, appended.message_id.as_u128())).collect();
        by_seq.sort_unstable();
        assert!(by_seq.iter().map(|(seq, _)| *seq).eq(1..=60));
        let newest = |key: u128| by_seq.iter().rev().find(|(_, id)| id % 3 == key).unwrap().1;
        let stay: BTreeSet<u128> =
            (1..=60).filter(|id| id % 3 == 2 || [newest(0), newest(1)].contains(id)).collect();
        assert_eq!(ids(&one).await.into_iter().collect::<BTreeSet<_>>(), stay);
        for id in 1..=60 {
            let expected = if stay.contains(&id) { State::Accepted } else { State::Superseded };
            assert_eq!(state(&two, id).await, expected, "{id}");
        }
        let inbox = inbox_of(&look(&case, "inbox").await, "bob").await;
        assert_eq!(inbox.get_array("collapse").unwrap().len(), 2);
        assert_eq!(inbox.get_i64("superseded").unwrap(), 38);
        let mut ended = first.0.lock().clone();
        second.0.lock().iter().for_each(|(id, states)| ended.entry(*id).or_default().extend(states));
        assert!(ended.values().all(|states| *states == [State::Superseded]), "{ended:?}");
        assert_eq!(ended.len(), 38);
        assert_eq!(audit_all(&one).await, (1, vec![]));
        let (_, conflicts) = case.metrics.store_troubles();
        assert!(conflicts > 0, "they did not meet");
    }
}

/// Nodes that expire, and one that acks, settle each message once.
#[tokio::test]
async fn nodes_that_expire_the_same_inboxes_agree() {
    let mongo = Mongo::shared().await;
    for keep in [false, true] {
        for small in [false, true] {
            let (mut case, ended) = told(Case::on(mongo).roomy());
            case.keep_expired = keep;
            let case = if small { case.small() } else { case };
            let (one, two) = (case.open().await, case.open().await);
            let batch = (1..=40).map(|id| mortal(&case, "bob", id, 1));
            let batch =
                batch.chain((1..=12).map(|user| mortal(&case, &format!("user-{user}"), 100 + user, 1)));
            let epoch = one.append(batch.collect()).await.remove(0).unwrap().epoch;
            case.clock.advance(Duration::from_secs(1));
            let (first, second, acked) = tokio::join!(
                expire_all(&case, &one, 7),
                expire_all(&case, &two, 7),
                two.ack(vec![settle("bob", epoch, &[(11, 20)], 0)]),
            );
            let acked: BTreeSet<u128> =
                acked[0].as_ref().unwrap().messages.iter().map(|m| m.message_id.as_u128()).collect();
            let rest = expire_all(&case, &one, 100).await;
            let what = format!("keep {keep}, small {small}");
            assert_eq!(first + second + rest + acked.len(), 52, "{what}");
            for id in 1..=40 {
                let expected = match () {
                    () if acked.contains(&id) => State::Acked,
                    () if keep => State::Dead,
                    () => State::Expired,
                };
                assert_eq!(state(&one, id).await, expected, "{what}: {id}");
            }
            let told = ended.0.lock().clone();
            assert!(told.values().all(|states| *states == [State::Expired]), "{what}: {told:?}");
            assert_eq!(told.len(), if keep { 0 } else { 52 - acked.len() }, "{what}");
            let stats = one.stats().await.unwrap();
            let letters = if keep { 52 - acked.len() } else { 0 };
            assert_eq!((stats.unsettled, stats.dead_letters), (0, letters as u64), "{what}");
            let inbox = inbox_of(&look(&case, "inbox").await, "bob").await;
            assert!(
                inbox.get("expires").is_none() && inbox.get_i64("bytes").unwrap() == 0,
                "{what}: {inbox}"
            );
            assert_eq!(audit_all(&one).await, (13, vec![]), "{what}");
        }
    }
}

/// Nodes that fill one inbox keep the newest and give up the others, each with a dead letter.
#[tokio::test]
async fn nodes_that_overflow_an_inbox_agree() {
    let mongo = Mongo::shared().await;
    for small in [false, true] {
        let mut case = Case::on(mongo);
        case.overflow = Overflow::DeadLetterOldest;
        let case = if small { case.small() } else { case };
        let (one, two) = (case.open().await, case.open().await);
        let send = |store: &MongoStore, id: u128| store.append(vec![keyed(&case, id, "")]);
        let answers = join_all((1..=80).map(|id| send(if id % 2 == 0 { &one } else { &two }, id))).await;
        let mut seqs: Vec<u64> =
            answers.into_iter().flatten().map(|appended| appended.unwrap().seq).collect();
        seqs.sort_unstable();
        assert!(seqs.into_iter().eq(1..=80));
        assert_eq!(ids(&one).await.len() as u64, MAX_UNSETTLED);
        eventually("the others are dead", WAIT, async || {
            (one.stats().await.unwrap().dead_letters == 80 - MAX_UNSETTLED).then_some(())
        })
        .await;
        eventually("they are settled", WAIT, async || {
            (one.stats().await.unwrap().unsettled == MAX_UNSETTLED).then_some(())
        })
        .await;
        let (mut live, mut dead) = (0, 0);
        for id in 1..=80 {
            match state(&two, id).await {
                State::Accepted => live += 1,
                State::Dead => dead += 1,
                other => panic!("{id} is {other:?}"),
            }
        }
        assert_eq!((live, dead), (MAX_UNSETTLED, 80 - MAX_UNSETTLED));
        assert_eq!(audit_all(&one).await, (1, vec![]));
    }
}

/// Where nothing expires any more nothing is found again, in the inbox and beside it.
#[tokio::test]
async fn expiry_leaves_nothing_to_look_at() {
    let case = Case::on(Mongo::shared().await).roomy().small();
    let store = case.open().await;
    let (inboxes, beside) = (look(&case, "inbox").await, look(&case, "beside").await);
    // Two of three expire, at ever later times.
    for id in 1..=30_u128 {
        let sent = if id % 3 == 0 { keyed(&case, id, "") } else { mortal(&case, "bob", id, id as u64) };
        store.append(vec![sent]).await.remove(0).unwrap();
    }
    eventually("it is tidy", WAIT, async || {
        (inbox_of(&inboxes, "bob").await.get_array("messages").unwrap().len() <= 3).then_some(())
    })
    .await;
    assert!(beside.count_documents(doc! { "e": { "$gt": 0_i64 } }).await.unwrap() > 2);
    let mut settled = 0;
    for second in 1..=30_u128 {
        case.clock.advance(Duration::from_secs(1));
        let alive: Vec<u128> = (1..=30).filter(|id| id % 3 == 0 || *id > second).collect();
        assert_eq!(ids(&store).await, alive);
        let expected = usize::from(second % 3 != 0);
        assert_eq!(expire_all(&case, &store, 4).await, expected, "second {second}");
        settled += expected as i64;
        assert_eq!(counts(&case, &["expired"]).await, [settled]);
    }
    let some = doc! { "$or": [{ "e": { "$exists": true } }, { "expires": { "$exists": true } }] };
    assert_eq!(beside.count_documents(some.clone()).await.unwrap(), 0);
    assert_eq!(inboxes.count_documents(some).await.unwrap(), 0);
    assert_eq!(audit_all(&store).await, (1, vec![]));
}

/// What cannot be settled for want of ranges is tried again in a minute, and keeps nobody else back.
#[tokio::test]
async fn an_expiry_without_room_waits() {
    for (keep, small) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut case = Case::on(Mongo::shared().await).roomy();
        case.keep_expired = keep;
        let case = if small { case.small() } else { case };
        let store = case.open().await;
        let count = 2 * MAX_SETTLED_RANGES as u128 + 2;
        let batch = (1..=count)
            .map(|id| if id == count { mortal(&case, "bob", id, 1) } else { keyed(&case, id, "") });
        let epoch = store.append(batch.collect()).await.remove(0).unwrap().epoch;
        store.append(vec![mortal(&case, "eve", 1, 2)]).await.remove(0).unwrap();
        let even: Vec<(u64, u64)> = (1..=MAX_SETTLED_RANGES as u64).map(|n| (n * 2, n * 2)).collect();
        assert_eq!(store.ack(vec![settle("bob", epoch, &even, 0)]).await.remove(0).unwrap().refused, 0);
        case.clock.advance(Duration::from_secs(2));
        let what = format!("keep {keep}, small {small}");
        // With dead letters it is noted, and is settled with what makes room.
        let settled = usize::from(keep) + 1;
        assert_eq!(expire_all(&case, &store, 10).await, settled, "{what}");
        assert_eq!(state(&store, count).await, State::Accepted, "{what}");
        assert_eq!(ids(&store).await.len(), count as usize - 1 - MAX_SETTLED_RANGES, "{what}");
        assert_eq!(expire_all(&case, &store, 10).await, 0, "{what}");
        store.ack(vec![settle("bob", epoch, &[(1, 1)], 0)]).await.remove(0).unwrap();
        case.clock.advance(Duration::from_secs(60));
        assert_eq!(expire_all(&case, &store, 10).await, usize::from(!keep), "{what}");
        // What is dying ends with the next ack.
        store.ack(vec![settle("bob", epoch, &[], 0)]).await.remove(0).unwrap();
        let expected = if keep { State::Dead } else { State::Expired };
        assert_eq!(state(&store, count).await, expected, "{what}");
        assert_eq!(audit_all(&store).await, (2, vec![]), "{what}");
    }
}

/// Inboxes of an earlier build, whose bytes nobody counted, go on, and are counted when they were empty once.
#[tokio::test]
async fn an_inbox_of_before_is_counted_from_when_it_is_empty() {
    let mut case = Case::on(Mongo::shared().await);
    case.max_unsettled_bytes = 20;
    let store = case.open().await;
    let epoch = store.append(case.messages("bob", 1..=2)).await.remove(0).unwrap().epoch;
    let inboxes = look(&case, "inbox").await;
    inboxes.update_one(doc! { "_id": "bob" }, doc! { "$unset": { "bytes": "" } }).await.unwrap();
    drop(store);
    let store = case.open().await;
    let full = AppendError::QueueFull { quota: Quota::Bytes, held: 16 };
    for id in 3..=4 {
        store.append(case.messages("bob", [id])).await.remove(0).unwrap();
    }
    assert_eq!(store.append(case.messages("bob", [5])).await, [Err(full.clone())]);
    store.ack(vec![settle("bob", epoch, &[(1, 3)], 0)]).await.remove(0).unwrap();
    assert_eq!(counts(&case, &["bytes"]).await, [-8]);
    store.ack(vec![settle("bob", epoch, &[(4, 4)], 0)]).await.remove(0).unwrap();
    assert_eq!(counts(&case, &["bytes"]).await, [0]);
    for id in 6..=7 {
        store.append(case.messages("bob", [id])).await.remove(0).unwrap();
    }
    assert_eq!(store.append(case.messages("bob", [8])).await, [Err(full)]);
}
