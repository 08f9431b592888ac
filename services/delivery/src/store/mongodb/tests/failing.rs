//! Messages that fail: nodes that disagree about them, lost answers, and crashes before a death is complete.

use std::{collections::BTreeSet, time::Duration};

use futures::future::join_all;
use mongodb::bson::doc;
use sanjay_testkit::{eventually, servers::MongoOptions};

use super::{
    faults::{all, fail, stop_failing},
    shapes::{inbox_of, look},
    *,
};
use crate::{
    message::State,
    store::{
        DeadReason, Failure, FailureKind, Verdict,
        suite::{
            failing::{self, NAK, failure},
            query, settle,
        },
    },
};

const WAIT: Duration = Duration::from_secs(20);

fn report(user: &str, epoch: u64, failed: Vec<Failure>) -> Settle {
    Settle { failed, ..settle(user, epoch, &[], 0) }
}

fn term(case: &Case, seq: u64) -> Failure {
    failure(seq, 1, FailureKind::Term, &case.clock)
}

async fn letters(store: &MongoStore) -> Vec<DeadLetter> {
    let mut page = store.dead_letters(DeadFilter::default(), None, 1_000).await.unwrap();
    assert_eq!(page.next, None);
    page.letters.sort_unstable_by_key(|letter| letter.seq);
    page.letters
}

async fn state(store: &MongoStore, id: u128) -> State {
    store.lookup("bob".to_owned(), Uuid::from_u128(id)).await.unwrap().unwrap().state
}

async fn claim(case: &Case, store: &MongoStore) -> Vec<DueInbox> {
    let now_us = case.clock.now_us();
    store.claim_due(now_us, now_us + 30_000_000, 10).await.unwrap()
}

/// An inbox to which several nodes wrote may be due too early: the next claim puts it right, and hands nothing out.
async fn is_due_no_more(case: &Case, store: &MongoStore) {
    case.clock.advance(Duration::from_secs(60));
    assert_eq!(claim(case, store).await, []);
    let inbox = inbox_of(&look(case, "inbox").await, "bob").await;
    assert!(inbox.get("due").is_none(), "{inbox}");
}

#[tokio::test]
async fn a_dying_message_waits_for_room() {
    for case in [Case::on(Mongo::shared().await).roomy(), Case::on(Mongo::shared().await).roomy().small()] {
        failing::dying_without_room(&case.open().await, &case.clock).await;
    }
}

/// Every message ends in one way, whoever acks it and whoever gives it up, and has a dead letter when that is its end.
#[tokio::test]
async fn nodes_that_ack_and_give_up_the_same_messages_agree() {
    let mongo = Mongo::shared().await;
    for case in [Case::on(mongo).roomy(), Case::on(mongo).roomy().small()] {
        let (one, two) = (case.open().await, case.open().await);
        let count = 60_u64;
        let epoch = one.append(case.messages("bob", 1..=u128::from(count))).await.remove(0).unwrap().epoch;
        let mut answers = Vec::new();
        for first in (1..=count).step_by(6) {
            // Two of these six are acked and given up at once.
            let acks = (first..first + 4).map(|seq| one.ack(vec![settle("bob", epoch, &[(seq, seq)], seq)]));
            let give_up = |seq| two.ack(vec![report("bob", epoch, vec![term(&case, seq)])]);
            let (acks, ends) = tokio::join!(join_all(acks), join_all((first + 2..first + 6).map(give_up)));
            answers.extend(acks.into_iter().chain(ends).flatten().map(Result::unwrap));
        }
        let (mut acked, mut dead) = (BTreeSet::new(), BTreeSet::new());
        for answer in answers {
            acked.extend(answer.messages.iter().map(|message| message.seq));
            dead.extend(answer.failed.iter().map(|(seq, _)| *seq));
        }
        assert!(acked.is_disjoint(&dead));
        assert_eq!(acked.len() + dead.len(), count as usize);
        let listed: BTreeSet<u64> = letters(&one).await.iter().map(|letter| letter.seq).collect();
        assert_eq!(listed, dead);
        for seq in 1..=count {
            let expected = if dead.contains(&seq) { State::Dead } else { State::Acked };
            assert_eq!(state(&two, u128::from(seq)).await, expected, "{seq}");
        }
        let inbox = inbox_of(&look(&case, "inbox").await, "bob").await;
        let counters = ["mark", "acked", "dead"].map(|name| inbox.get_i64(name).unwrap().cast_unsigned());
        assert_eq!(counters, [count, acked.len() as u64, dead.len() as u64]);
        assert!(inbox.get("attempts").is_none(), "{inbox}");
        is_due_no_more(&case, &one).await;
    }
}

/// Nodes that claim at once hand out an attempt once, and failures that come meanwhile are not lost.
#[tokio::test]
async fn an_attempt_is_claimed_once() {
    let case = Case::on(Mongo::shared().await).roomy();
    let (one, two) = (case.open().await, case.open().await);
    let epoch = failing::send(&one, &case.clock, 40).await;
    for seq in 1..=40_u64 {
        let failed = vec![failure(seq, 1, NAK, &case.clock)];
        let verdicts = one.ack(vec![report("bob", epoch, failed)]).await.remove(0).unwrap().failed;
        assert!(matches!(verdicts[..], [(_, Verdict::Again(_))]), "{verdicts:?}");
        // The one before is due by now.
        case.clock.advance(Duration::from_millis(400));
        let next = report("bob", epoch, vec![]);
        let (first, second, _) = tokio::join!(claim(&case, &one), claim(&case, &two), two.ack(vec![next]));
        let claimed: Vec<DueInbox> = first.into_iter().chain(second).collect();
        let retries: Vec<(u64, u32)> = claimed.iter().flat_map(|due| due.retries.clone()).collect();
        assert!(claimed.len() <= 1, "{claimed:?}");
        assert!(retries.iter().all(|retry| *retry == (seq - 1, 2)), "{seq}: {retries:?}");
        let written = Settle { rewritten: retries, ..settle("bob", epoch, &[], 0) };
        two.ack(vec![written]).await.remove(0).unwrap();
    }
    case.clock.advance(Duration::from_secs(60));
    claim(&case, &two).await;
    let page = one.read(vec![query("bob", None, 100)]).await.remove(0).unwrap();
    assert_eq!(page.messages.len(), 40);
    assert!(page.messages.iter().all(|message| message.delivery == 2), "each was handed out once more");
}

/// The failures of a lost answer count once.
#[tokio::test]
async fn a_failure_report_without_an_answer_is_looked_up() {
    let mongo = Mongo::start_with(MongoOptions::default().test_commands()).await;
    let concern = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    let cases = [
        ("closed", 3, doc! { "closeConnection": true }),
        ("shutting down", 3, doc! { "errorCode": 91 }),
        ("no majority", 1, doc! { "writeConcernError": concern }),
    ];
    for (name, times, how) in cases {
        let case = Case::on(&mongo).roomy();
        let store = case.open().await;
        let epoch = failing::send(&store, &case.clock, 4).await;
        let (before, _) = case.metrics.store_troubles();
        fail(&mongo, doc! { "times": times }, &["bulkWrite"], how.clone()).await;
        let failed = vec![failure(1, 1, NAK, &case.clock), term(&case, 3)];
        let acked = store.ack(vec![Settle { failed, ..settle("bob", epoch, &[(4, 4)], 0) }]).await.remove(0);
        let acked = acked.unwrap();
        let (after, _) = case.metrics.store_troubles();
        assert!(after > before, "{name}: the fault did not land");
        assert_eq!(acked.messages.len(), 1, "{name}");
        let dead = Verdict::Dead(DeadReason::Terminated);
        assert!(
            matches!(acked.failed[..], [(1, Verdict::Again(_)), (3, verdict)] if verdict == dead),
            "{name}"
        );
        let written = letters(&store).await;
        assert_eq!(written.iter().map(|letter| letter.seq).collect::<Vec<_>>(), [3], "{name}");
        assert_eq!(written[0].failures, [term(&case, 3)], "{name}");
        case.clock.advance(Duration::from_secs(1));
        assert_eq!(claim(&case, &store).await[0].retries, [(1, 2)], "{name}");
        assert_eq!(store.stats().await.unwrap().unsettled, 2, "{name}");
    }
}

/// A node that goes away after each of the steps of a death leaves what another node completes, once; until then nobody
/// gets the message, and an ack does not save it.
#[tokio::test]
async fn a_death_that_was_begun_is_completed() {
    let mongo = Mongo::start_with(MongoOptions::default().test_commands()).await;
    // Noted as dying; its dead letter is written, too. What completes it: another node's claim, or its next ack.
    for (steps, by_ack) in [(1, false), (2, false), (1, true), (2, true)] {
        for small in [false, true] {
            let case = Case::on(&mongo).roomy();
            let case = if small { case.small() } else { case };
            let (store, other) = (case.open().await, case.open().await);
            let epoch = failing::send(&store, &case.clock, 5).await;
            let died_us = case.clock.now_us();
            eventually("nothing is to be tidied", WAIT, async || {
                let inbox = inbox_of(&look(&case, "inbox").await, "bob").await;
                (!small || inbox.get_array("messages").unwrap().len() == 1).then_some(())
            })
            .await;
            fail(&mongo, doc! { "skip": steps }, &["bulkWrite"], doc! { "errorCode": 91 }).await;
            let failed = vec![term(&case, 2)];
            let answer = store.ack(vec![report("bob", epoch, failed.clone())]).await.remove(0);
            assert!(matches!(answer, Err(StoreError::Unavailable(_))), "{answer:?}");
            drop(store);
            stop_failing(&mongo).await;
            let what = format!("after {steps} steps, by an ack: {by_ack}");
            assert_eq!(letters(&other).await.len(), steps as usize - 1, "{what}");
            assert_eq!(state(&other, 2).await, State::Accepted, "{what}");
            let seqs: Vec<u64> = all(&other, "bob").await.iter().map(|(seq, _)| *seq).collect();
            assert_eq!(seqs, [1, 3, 4, 5], "{what}");
            case.clock.advance(Duration::from_secs(6));
            if by_ack {
                let acked = other.ack(vec![settle("bob", epoch, &[(1, 3)], 0)]).await.remove(0).unwrap();
                let seqs: Vec<u64> = acked.messages.iter().map(|message| message.seq).collect();
                assert_eq!((acked.mark, seqs), (3, vec![1, 3]), "{what}");
            } else {
                assert_eq!(claim(&case, &other).await, [], "{what}");
            }
            eventually("it is dead", WAIT, async || (state(&other, 2).await == State::Dead).then_some(()))
                .await;
            let written = letters(&other).await;
            assert_eq!(written.len(), 1, "{what}");
            assert_eq!(
                (written[0].seq, written[0].died_us, &written[0].failures),
                (2, died_us, &failed),
                "{what}"
            );
            let again = other.ack(vec![report("bob", epoch, failed)]).await.remove(0).unwrap();
            assert_eq!(again.failed, [], "{what}");
            assert_eq!(other.stats().await.unwrap().unsettled, if by_ack { 2 } else { 4 }, "{what}");
        }
    }
}

/// Bodies that lie beside the inbox reach their dead letters, many at a time.
#[tokio::test]
async fn many_messages_die_at_once() {
    let case = Case::on(Mongo::shared().await).roomy().small();
    let store = case.open().await;
    let count = 150_u64;
    let epoch = store.append(case.messages("bob", 1..=u128::from(count))).await.remove(0).unwrap().epoch;
    let failed: Vec<Failure> = (1..=count).filter(|seq| seq % 3 != 0).map(|seq| term(&case, seq)).collect();
    let dead = failed.len();
    let answer = store.ack(vec![report("bob", epoch, failed)]).await.remove(0).unwrap();
    assert_eq!(answer.failed.len(), dead);
    let written = letters(&store).await;
    assert_eq!(written.len(), dead);
    for letter in &written {
        let whole = store.dead_letter("bob".to_owned(), letter.message_id).await.unwrap().unwrap();
        assert_eq!(whole.payload, Some(suite::text(format!("body-{}", letter.seq))));
    }
    assert_eq!(all(&store, "bob").await.len(), count as usize - dead);
}

/// What a node of an earlier build leaves, which settles messages and not their attempts, goes with the next claim or
/// ack.
#[tokio::test]
async fn attempts_of_settled_messages_are_cleared() {
    for by_ack in [false, true] {
        let case = Case::on(Mongo::shared().await).roomy();
        let store = case.open().await;
        let epoch = failing::send(&store, &case.clock, 3).await;
        let failed = vec![failure(1, 1, NAK, &case.clock)];
        store.ack(vec![report("bob", epoch, failed)]).await.remove(0).unwrap();
        let collection = look(&case, "inbox").await;
        let attempts = inbox_of(&collection, "bob").await.get("attempts").unwrap().clone();
        store.ack(vec![settle("bob", epoch, &[(1, 1)], 0)]).await.remove(0).unwrap();
        assert!(inbox_of(&collection, "bob").await.get("attempts").is_none());
        let left = doc! { "$set": { "attempts": attempts, "due": 1_i64 }, "$inc": { "settles": 1_i64 } };
        collection.update_one(doc! { "_id": "bob" }, left).await.unwrap();
        case.clock.advance(Duration::from_secs(60));
        if by_ack {
            store.ack(vec![settle("bob", epoch, &[(2, 2)], 0)]).await.remove(0).unwrap();
        } else {
            assert_eq!(claim(&case, &store).await, []);
        }
        let inbox = inbox_of(&collection, "bob").await;
        assert!(inbox.get("attempts").is_none(), "{inbox}");
        is_due_no_more(&case, &store).await;
    }
}

/// A node that does not know yet of another's failure does not take the attempt off the clock.
#[tokio::test]
async fn a_report_of_what_was_written_keeps_the_attempts_time() {
    let case = Case::on(Mongo::shared().await).roomy();
    let (one, two) = (case.open().await, case.open().await);
    let epoch = two.append(case.messages("bob", 1..=2)).await.remove(0).unwrap().epoch;
    let failed = vec![failure(1, 1, NAK, &case.clock)];
    one.ack(vec![report("bob", epoch, failed)]).await.remove(0).unwrap();
    two.ack(vec![settle("bob", epoch, &[], 2)]).await.remove(0).unwrap();
    case.clock.advance(Duration::from_secs(1));
    let claimed = claim(&case, &two).await;
    assert_eq!((claimed[0].after, &claimed[0].retries), (2, &vec![(1, 2)]));
}
