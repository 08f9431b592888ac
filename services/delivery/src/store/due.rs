//! When an inbox is due: at the earliest of what is unwritten in it and of its messages' next attempts.
//!
//! Pure; each adapter keeps the one number with the inbox and finds due inboxes by it. An inbox that is due too early
//! costs a claim that puts it right; one that is due too late would keep a message back, so nothing here makes that.

use super::{Attempts, MAX_RETRIES, Next};

/// What a claim makes of an inbox.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Claimed {
    /// When it is due next, Unix time in microseconds; `None` for never.
    pub(super) due_us: Option<u64>,
    /// Messages whose attempt is due, as (seq, delivery).
    pub(super) retries: Vec<(u64, u32)>,
    /// Whether something is to be relayed.
    pub(super) relay: bool,
}

/// Claims an inbox until `until_us`; `unwritten` says whether messages wait for their first delivery.
pub(super) fn claim(attempts: &mut Attempts, unwritten: bool, now_us: u64, until_us: u64) -> Claimed {
    let retries = attempts.claim(now_us, until_us, MAX_RETRIES);
    let relay = unwritten || !retries.is_empty();
    // A claim holds for all of it, also for attempts that it had no room for.
    let due_us = if relay { Some(until_us) } else { attempts.next_due_us() };
    Claimed { due_us, retries, relay }
}

/// Applies what follows for a claimed inbox; returns when it is due, and the attempt count to keep.
pub(super) fn rearm(attempts: &mut Attempts, unwritten: bool, next: Next) -> (Option<u64>, u32) {
    match next {
        Next::At { due_us, attempt } => {
            // What was handed out goes by the same schedule.
            attempts.reschedule(due_us);
            (earliest(unwritten.then_some(due_us), attempts.next_due_us()), attempt)
        }
        Next::Parked => {
            attempts.park();
            (attempts.next_due_us(), 0)
        }
    }
}

/// The earlier of two times.
pub(super) fn earliest(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    one.into_iter().chain(other).min()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::{Failure, FailureKind};

    fn failed(seq: u64, delay_us: u64) -> Failure {
        Failure {
            seq,
            delivery: 1,
            kind: FailureKind::Nak(Duration::from_micros(delay_us)),
            time_us: 1_000,
            edge: "edge-1".to_owned(),
            session: None,
            reason: String::new(),
        }
    }

    #[test]
    fn a_claim_holds_until_its_end_and_what_had_no_room_follows() {
        let mut attempts = Attempts::default();
        let count = MAX_RETRIES as u64 + 3;
        for seq in 1..=count {
            attempts.fail(failed(seq, 2_000_000), 8, 0.0);
        }
        let (now_us, until_us) = (5_000_000, 35_000_000);
        let claimed = claim(&mut attempts, false, now_us, until_us);
        assert_eq!(
            (claimed.due_us, claimed.retries.len(), claimed.relay),
            (Some(until_us), MAX_RETRIES, true)
        );
        let at = Next::At { due_us: 9_000_000, attempt: 2 };
        assert_eq!(rearm(&mut attempts, false, at), (Some(2_001_000), 2));
        let rest = claim(&mut attempts, false, now_us, until_us);
        assert_eq!(rest.retries, [(count - 2, 2), (count - 1, 2), (count, 2)]);
        // Relayed, and written by nobody: they come by the schedule with the same number.
        assert_eq!(rearm(&mut attempts, false, at), (Some(9_000_000), 2));
        assert_eq!(claim(&mut attempts, false, 9_000_000, until_us).retries[0], (1, 2));
    }

    #[test]
    fn nothing_to_relay_puts_the_time_right() {
        let mut attempts = Attempts::default();
        assert_eq!(
            claim(&mut attempts, false, 5, 9),
            Claimed { due_us: None, retries: vec![], relay: false }
        );
        assert_eq!(
            claim(&mut attempts, true, 5, 9),
            Claimed { due_us: Some(9), retries: vec![], relay: true }
        );
        attempts.fail(failed(1, 60_000_000), 8, 0.0);
        let later = Claimed { due_us: Some(60_001_000), retries: vec![], relay: false };
        assert_eq!(claim(&mut attempts, false, 5, 9), later);
        assert_eq!(rearm(&mut attempts, true, Next::Parked), (Some(60_001_000), 0));
        assert_eq!(rearm(&mut attempts, true, Next::At { due_us: 7, attempt: 1 }), (Some(7), 1));
        assert_eq!(rearm(&mut attempts, false, Next::At { due_us: 7, attempt: 1 }), (Some(60_001_000), 1));
    }
}
