use proptest::prelude::*;

use super::*;

fn failure(seq: u64, delivery: u32, kind: FailureKind, time_us: u64) -> Failure {
    Failure {
        seq,
        delivery,
        kind,
        time_us,
        edge: "edge-1".to_owned(),
        session: Some(Uuid::from_u128(7)),
        reason: "no room".to_owned(),
    }
}

const NAK: FailureKind = FailureKind::Nak(Duration::ZERO);

#[test]
fn a_message_fails_until_it_may_not_any_more() {
    let mut attempts = Attempts::default();
    let mut now_us = 1_000_000;
    for delivery in 1..3 {
        let verdict = attempts.fail(failure(5, delivery, NAK, now_us), 3, 0.0).unwrap();
        let Verdict::Again(due_us) = verdict else { panic!("{verdict:?}") };
        assert_eq!(attempts.next_due_us(), Some(due_us));
        // Reported again, by another lane of the edge or after a lost answer: nothing changes.
        assert_eq!(attempts.fail(failure(5, delivery, NAK, now_us + 1), 3, 0.0), None);
        assert_eq!(attempts.delivery(5), None, "it waits");
        assert_eq!(attempts.claim(due_us - 1, due_us + 9, 10), []);
        assert_eq!(attempts.claim(due_us, due_us + 9, 10), [(5, delivery + 1)]);
        assert_eq!(attempts.delivery(5), Some(delivery + 1), "a reader may take it over");
        // Nobody wrote it: it comes again under the same number.
        assert_eq!(attempts.claim(due_us + 9, due_us + 99, 10), [(5, delivery + 1)]);
        assert!(!attempts.rewritten(5, delivery), "that is an older one");
        assert!(attempts.rewritten(5, delivery + 1) && !attempts.rewritten(5, delivery + 1));
        assert_eq!(attempts.claim(u64::MAX, u64::MAX, 10), []);
        now_us = due_us + 99;
    }
    assert_eq!(attempts.fail(failure(5, 2, NAK, now_us), 3, 0.0), None, "stale");
    let dead = Verdict::Dead(DeadReason::MaxAttempts);
    assert_eq!(attempts.fail(failure(5, 3, FailureKind::Deadline, now_us), 3, 0.0), Some(dead));
    let deliveries: Vec<u32> = attempts.failures(5).iter().map(|failure| failure.delivery).collect();
    assert_eq!(deliveries, [1, 2, 3]);
    assert!(attempts.settle(1, 9) && attempts.is_empty());
}

#[test]
fn a_nak_waits_for_the_longer_of_schedule_and_delay_and_term_for_nothing() {
    let mut attempts = Attempts::default();
    let long = FailureKind::Nak(Duration::from_secs(100));
    assert_eq!(attempts.fail(failure(1, 1, long, 5), 8, 0.9), Some(Verdict::Again(100_000_005)));
    let Some(Verdict::Again(due_us)) = attempts.fail(failure(2, 1, NAK, 5), 8, 0.0) else { panic!() };
    assert!(due_us > 5);
    let dead = Verdict::Dead(DeadReason::Terminated);
    assert_eq!(attempts.fail(failure(3, 1, FailureKind::Term, 5), 8, 0.0), Some(dead));
}

#[test]
fn an_offline_user_parks_what_was_claimed_and_a_reader_gets_it() {
    let mut attempts = Attempts::default();
    attempts.fail(failure(1, 1, NAK, 5), 8, 0.0);
    attempts.fail(failure(2, 1, FailureKind::Nak(Duration::from_secs(3_600)), 5), 8, 0.0);
    let now_us = 60_000_000;
    assert_eq!(attempts.claim(now_us, now_us + 1, 10), [(1, 2)]);
    assert!(attempts.park());
    assert_eq!((attempts.delivery(1), attempts.delivery(2)), (Some(2), None));
    assert_eq!(attempts.next_due_us(), Some(3_600_000_005));
    // The reader's delivery fails like any other.
    assert!(matches!(attempts.fail(failure(1, 2, NAK, now_us), 8, 0.0), Some(Verdict::Again(_))));
}

#[test]
fn too_many_failed_messages_are_not_noted() {
    let mut attempts = Attempts::default();
    for seq in 1..=MAX_FAILED as u64 {
        assert!(matches!(attempts.fail(failure(seq, 1, NAK, 5), 8, 0.0), Some(Verdict::Again(_))));
    }
    let before = attempts.clone();
    assert_eq!(attempts.fail(failure(5_000, 1, NAK, 5), 8, 0.0), Some(Verdict::Full));
    assert_eq!(attempts, before);
}

proptest! {
    #[test]
    fn what_is_stored_comes_back(
        steps in prop::collection::vec((1..9u64, 1..4u32, 0..3u8, 0..50u64, any::<bool>()), 0..40)
    ) {
        let mut attempts = Attempts::default();
        for (seq, delivery, kind, time_us, claim) in steps {
            let kind = [NAK, FailureKind::Deadline, FailureKind::Term][usize::from(kind)];
            attempts.fail(failure(seq, delivery, kind, time_us), 100, 0.5);
            if claim {
                let claimed = attempts.claim(u64::MAX, u64::MAX, 3);
                prop_assert!(claimed.is_sorted());
            }
            let stored = Attempts::decode(&attempts.encode()).unwrap();
            prop_assert_eq!(&stored, &attempts);
            for seq in 1..9 {
                let failures = attempts.failures(seq);
                let stored = decode_failures(seq, &encode_failures(failures)).unwrap();
                prop_assert_eq!(stored.as_slice(), failures);
                // One failure for each delivery, none twice, and none above the newest.
                prop_assert!(failures.windows(2).all(|pair| pair[0].delivery < pair[1].delivery));
            }
        }
    }
}

#[test]
fn a_dying_message_is_nobodys_until_it_is_settled() {
    let mut attempts = Attempts::default();
    attempts.fail(failure(4, 1, FailureKind::Term, 1_000), 8, 0.0);
    assert_eq!(attempts.dying().collect::<Vec<u64>>(), [4]);
    assert_eq!(attempts.death(4), Some((DeadReason::Terminated, 1_000)));
    assert_eq!((attempts.delivery(4), attempts.newest(4), attempts.death(5)), (None, None, None));
    assert_eq!(attempts.fail(failure(4, 1, FailureKind::Term, 2_000), 8, 0.0), None);
    assert!(!attempts.rewritten(4, 1) && !attempts.park());
    // It is due by itself, in case whoever noted it is gone; a claim hands out nothing, and it is due again after it.
    let due_us = attempts.next_due_us().unwrap();
    assert!(due_us > 1_000);
    assert_eq!(attempts.claim(due_us, due_us + 9, 10), []);
    assert_eq!(attempts.next_due_us(), Some(due_us + 9));
    assert!(attempts.settle(4, 4) && attempts.is_empty());
}

#[test]
fn a_message_can_be_killed_that_never_failed() {
    let mut attempts = Attempts::default();
    attempts.fail(failure(5, 1, NAK, 500), 8, 0.0);
    assert!(attempts.kill(4, DeadReason::QueueFull, 1_000) && attempts.kill(5, DeadReason::Expired, 2_000));
    assert_eq!(attempts.death(4), Some((DeadReason::QueueFull, 1_000)));
    // What failed of it is kept; nothing more does, and nobody gets it.
    assert_eq!((attempts.failures(4).len(), attempts.failures(5).len()), (0, 1));
    assert_eq!(attempts.fail(failure(4, 1, FailureKind::Term, 3_000), 8, 0.0), None);
    assert_eq!((attempts.newest(4), attempts.newest(5), attempts.delivery(6)), (None, None, Some(1)));
    assert_eq!(attempts.claim(u64::MAX, u64::MAX, 9), []);
    // Only once: the first reason stays.
    assert!(!attempts.kill(4, DeadReason::Expired, 9_000));
    assert_eq!(attempts.death(4), Some((DeadReason::QueueFull, 1_000)));
    assert_eq!(Attempts::decode(&attempts.encode()).unwrap(), attempts);
    // It comes by itself, in case whoever noted it is gone.
    let mut killed = Attempts::default();
    assert!(killed.kill(1, DeadReason::QueueFull, 1_000));
    assert_eq!(killed.next_due_us(), Some(1_000 + DYING_US));
    assert!(killed.settle(1, 1) && killed.is_empty());
}

#[test]
fn where_too_many_failed_only_those_can_be_killed() {
    let mut attempts = Attempts::default();
    for seq in 1..=MAX_FAILED as u64 {
        attempts.fail(failure(seq, 1, NAK, 5), 8, 0.0);
    }
    let before = attempts.clone();
    assert!(!attempts.kill(5_000, DeadReason::QueueFull, 9));
    assert_eq!(attempts, before);
    assert!(attempts.kill(7, DeadReason::QueueFull, 9));
}

#[test]
fn the_newest_failures_are_kept() {
    let (mut attempts, count) = (Attempts::default(), MAX_FAILURES as u32 + 5);
    for delivery in 1..=count {
        let due = attempts.fail(failure(1, delivery, NAK, u64::from(delivery)), u32::MAX, 0.0);
        assert!(matches!(due, Some(Verdict::Again(_))), "{delivery}");
        assert_eq!(attempts.claim(u64::MAX, u64::MAX, 1), [(1, delivery + 1)]);
    }
    let kept: Vec<u32> = attempts.failures(1).iter().map(|failure| failure.delivery).collect();
    assert_eq!(kept, (6..=count).collect::<Vec<u32>>());
    // The schedule and the limit go on counting all of them.
    let dead = Verdict::Dead(DeadReason::MaxAttempts);
    assert_eq!(attempts.fail(failure(1, count + 1, NAK, 9), count + 1, 0.0), Some(dead));
}

#[test]
fn what_was_handed_out_can_be_moved_and_what_waits_cannot() {
    let mut attempts = Attempts::default();
    attempts.fail(failure(1, 1, NAK, 5), 8, 0.0);
    attempts.fail(failure(2, 1, FailureKind::Nak(Duration::from_secs(60)), 5), 8, 0.0);
    attempts.claim(1_000_000, 9_000_000, 10);
    attempts.reschedule(2_000_000);
    assert_eq!(attempts.next_due_us(), Some(2_000_000));
    attempts.rewritten(1, 2);
    attempts.reschedule(2_000_000);
    assert_eq!(attempts.next_due_us(), Some(60_000_005));
}
