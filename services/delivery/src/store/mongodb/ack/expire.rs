//! What a write settles because its time has passed.

use std::collections::BTreeSet;

use super::{
    super::{
        documents::has_expired,
        inbox::{Inbox, Open},
        plan::Rules,
        work::{Ack, Expiring},
    },
    Part, Plan,
};
use crate::store::{DeadReason, Verdict};

/// When a message is tried again that could not be settled, in microseconds: room comes with somebody's ack.
pub(in super::super) const AGAIN_US: u64 = 60_000_000;

impl Plan {
    /// Settles messages whose time has passed, or notes them as dying where they are kept.
    pub(super) fn expire(
        &mut self,
        rules: &Rules<'_>,
        ack: &Ack,
        expiring: &Expiring,
        inbox: &Inbox,
        budget: &mut u64,
    ) -> Part {
        let inside = inbox.open.iter().filter(|open| has_expired(open.expires_us, expiring.now_us));
        let inside = inside.map(|open| (open.expires_us, open.seq));
        let beside = expiring.beside.iter().copied().filter(|(_, seq)| *seq <= inbox.head);
        let mut seqs: Vec<(u64, u64)> = inside.chain(beside).collect();
        seqs.retain(|(_, seq)| !self.settled.holds(*seq) && self.attempts.death(*seq).is_none());
        seqs.sort_unstable();
        // A body that is just being moved is in both places.
        seqs.dedup();
        seqs.truncate(expiring.limit.saturating_sub(ack.done.len()));
        let mut seqs: Vec<u64> = seqs.into_iter().map(|(_, seq)| seq).collect();
        // What is noted as dying is settled by later writes.
        let cut = !rules.keep_expired && seqs.len() as u64 > *budget;
        if cut {
            seqs.truncate(*budget as usize);
        }
        // In ascending order, what moves the mark comes before what needs a range of its own.
        seqs.sort_unstable();
        let (mut part, mut refused) = (Part::default(), BTreeSet::new());
        for seq in seqs {
            if rules.keep_expired {
                if self.attempts.kill(seq, DeadReason::Expired, rules.now_us) {
                    part.failed.push((seq, Verdict::Dead(DeadReason::Expired)));
                } else {
                    refused.insert(seq);
                }
            } else if self.settled.settle(seq, seq).is_ok() {
                self.attempts.settle(seq, seq);
                part.expired.push(seq);
                *budget -= 1;
            } else {
                refused.insert(seq);
            }
        }
        self.expired.extend(&part.expired);
        let next_us = self.next_expiry(inbox, expiring, &refused);
        self.expires_us = Some(next_us).filter(|us| *us != inbox.expires_us);
        if !part.failed.is_empty() {
            // Not complete before they are settled as dead.
            (part.noted, part.refused) = (true, refused.len());
        } else if !cut {
            part.end = Some((self.settled.mark(), refused.len()));
        }
        part
    }

    /// Before when none of the messages that stay in the document expires; 0 when none does.
    fn next_expiry(&self, inbox: &Inbox, expiring: &Expiring, refused: &BTreeSet<u64>) -> u64 {
        let stays = |open: &&Open| {
            open.expires_us != 0 && !self.settled.holds(open.seq) && self.attempts.death(open.seq).is_none()
        };
        let next = |open: &Open| {
            if refused.contains(&open.seq) {
                expiring.now_us.saturating_add(AGAIN_US)
            } else {
                open.expires_us
            }
        };
        inbox.open.iter().filter(stays).map(next).min().unwrap_or(0)
    }
}
