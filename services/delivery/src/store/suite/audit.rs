//! What every adapter's looks at itself must find, and what they must not take for a finding.

use std::cell::Cell;

use super::*;

pub(super) async fn cases<H: Harness>(make: impl Fn() -> H) {
    a_lost_body_is_found(make()).await;
    a_busy_store_has_no_finding(make()).await;
    the_oldest_undelivered_message_is_known(make()).await;
}

/// Audits every inbox, few at a time; returns how many there were, and what was found.
pub(crate) async fn audit_all(store: &dyn InboxStore) -> (usize, Vec<Finding>) {
    let (mut inboxes, mut findings, mut after) = (0, Vec::new(), String::new());
    loop {
        let page = store.audit(after.clone(), 2).await.unwrap();
        assert!(page.inboxes <= 2);
        inboxes += page.inboxes;
        findings.extend(page.findings);
        match page.next {
            Some(next) => {
                assert!(next > after, "{next:?} does not follow {after:?}");
                after = next;
            }
            None => return (inboxes, findings),
        }
    }
}

async fn a_lost_body_is_found<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    assert_eq!(audit_all(&*store).await, (0, vec![]));
    let mut epochs = Vec::new();
    for user in ["ann", "bob", "cat", "dan", "eve"] {
        let batch: Vec<_> = (1..=8).map(|id| message(user, id, "x", "", &clock)).collect();
        let epoch = store.append(batch).await.remove(0).unwrap().epoch;
        store.ack(vec![settle(user, epoch, &[(1, 2), (5, 5)], 0)]).await.remove(0).unwrap();
        epochs.push(epoch);
    }
    assert_eq!(audit_all(&*store).await, (5, vec![]));
    let store = harness.lose_body(store, "bob", 4).await;
    let store = harness.lose_body(store, "dan", 8).await;
    let store = harness.lose_body(store, "dan", 3).await;
    let lost =
        |epoch, seqs: Vec<u64>| Finding { epoch, head: 8, missing: seqs.len() as u64, excess: 0, seqs };
    let (inboxes, findings) = audit_all(&*store).await;
    assert_eq!(inboxes, 5);
    assert_eq!(findings, [lost(epochs[1], vec![4]), lost(epochs[3], vec![3, 8])]);
}

async fn a_busy_store_has_no_finding<H: Harness>(mut harness: H) {
    const ROUNDS: u64 = 30;
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let users = ["ann", "bob", "cat"];
    let busy = async |user: &str| {
        for round in 0..ROUNDS {
            let batch: Vec<_> =
                (1..=4).map(|id| message(user, u128::from(round) * 4 + id, "x", "", &clock)).collect();
            let results = store.append(batch).await;
            let last = results.into_iter().map(Result::unwrap).next_back().unwrap();
            // The third of each four is settled a round later, so that there are always ranges above the mark.
            let (top, before) = (last.seq, last.seq.saturating_sub(5));
            let ranges = [(before, before), (top - 3, top - 2), (top, top)];
            store.ack(vec![settle(user, last.epoch, &ranges, top)]).await.remove(0).unwrap();
        }
    };
    let done = Cell::new(false);
    let working = async {
        tokio::join!(busy(users[0]), busy(users[1]), busy(users[2]));
        done.set(true);
    };
    let auditing = async {
        let mut rounds = 0;
        while !done.get() {
            assert_eq!(audit_all(&*store).await.1, []);
            rounds += 1;
            tokio::task::yield_now().await;
        }
        assert!(rounds > 1, "the audit ran beside the work");
    };
    tokio::join!(working, auditing);
    assert_eq!(audit_all(&*store).await, (3, vec![]));
    for user in users {
        assert_eq!(seqs(&read_all(&*store, user).await), [ROUNDS * 4 - 1]);
    }
}

async fn the_oldest_undelivered_message_is_known<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let oldest = |limit| store.oldest_undelivered(limit);
    assert_eq!(oldest(10).await, Ok(None));
    let mut epochs = Vec::new();
    let mut times = Vec::new();
    for user in ["ann", "bob", "cat"] {
        times.push(clock.now_us());
        let batch = vec![message(user, 1, "x", "", &clock)];
        epochs.push(store.append(batch).await.remove(0).unwrap().epoch);
        clock.advance(Duration::from_secs(1));
    }
    times.push(clock.now_us());
    store.append(vec![message("ann", 2, "x", "", &clock)]).await.remove(0).unwrap();
    assert_eq!(oldest(10).await, Ok(Some(times[0])));
    assert_eq!(oldest(1).await, Ok(Some(times[0])));
    // What was reported written is delivered; what was relayed again is due last, and not forgotten.
    store.ack(vec![settle("ann", epochs[0], &[], 1)]).await.remove(0).unwrap();
    clock.advance(FIRST_DUE);
    let claimed = store.claim_due(clock.now_us(), clock.now_us() + 60_000_000, 10).await.unwrap();
    assert_eq!(claimed.len(), 3);
    let again = |index: usize, seconds: u64| Rearm {
        user: claimed[index].user.clone(),
        armed: claimed[index].armed,
        next: Next::At { due_us: clock.now_us() + seconds * 1_000_000, attempt: 5 },
    };
    let position = |user: &str| claimed.iter().position(|inbox| inbox.user == user).unwrap();
    let (ann, bob, cat) = (position("ann"), position("bob"), position("cat"));
    store.rearm(vec![again(ann, 1), again(cat, 2), again(bob, 3)]).await.unwrap();
    assert_eq!(oldest(10).await, Ok(Some(times[1])));
    assert_eq!(oldest(1).await, Ok(Some(times[1])));
    // Settled is delivered too, and so is, for now, what waits for a user who is offline.
    store.ack(vec![settle("bob", epochs[1], &[(1, 1)], 0)]).await.remove(0).unwrap();
    assert_eq!(oldest(10).await, Ok(Some(times[2])));
    let park = |index: usize| Rearm { next: Next::Parked, ..again(index, 0) };
    store.rearm(vec![park(cat)]).await.unwrap();
    assert_eq!(oldest(10).await, Ok(Some(times[3])));
    store.rearm(vec![park(ann)]).await.unwrap();
    assert_eq!(oldest(10).await, Ok(None));
}
