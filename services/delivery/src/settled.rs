//! Tells the sessions of a user what was settled without them: by the ack of another one, or because a message expired, was
//! superseded or died. Hints like those of `relay.rs`: nothing waits for them, and what does not fit is dropped. A session
//! that hears of nothing answers the message, which changes nothing.

use sanjay_proto::{client::v1::SeqRange, edge::v1::InboxHint};
use sanjay_runtime::mailbox::{Receiver, Sender, mailbox};
use tokio_util::sync::CancellationToken;

use crate::{metrics::Metrics, relay::Outcome, router};

/// Most notices that wait.
const MAX_QUEUED: usize = 16_384;

/// Most notices that are looked at together; those of one user become one hint.
const MAX_BATCH: usize = 4 * router::MAX_ITEMS;

/// Most ranges of one hint: what a session may have in flight.
const MAX_RANGES: usize = 256;

/// What the sessions of a user are told.
#[derive(Debug)]
pub(crate) struct Notice {
    pub(crate) user: String,
    /// Of the inbox that `seqs` belong to.
    pub(crate) epoch: u64,
    /// What was settled. Empty when a session took up an inbox in which something waits.
    pub(crate) seqs: Vec<u64>,
}

/// The queue toward the router.
#[derive(Clone)]
pub(crate) struct Notices {
    queue: Sender<Notice>,
    metrics: Metrics,
}

/// Makes the queue and its other end.
pub(crate) fn queue(metrics: Metrics) -> (Notices, Telling) {
    let (queue, receiver) = mailbox(MAX_QUEUED);
    (Notices { queue, metrics: metrics.clone() }, Telling { receiver, metrics })
}

impl Notices {
    /// Queues a notice, or drops it when the queue is full.
    pub(crate) fn offer(&self, notice: Notice) {
        if self.queue.try_send(notice).is_err() {
            self.metrics.told(Outcome::Dropped, 1);
        }
    }
}

/// Takes notices off the queue.
pub(crate) struct Telling {
    receiver: Receiver<Notice>,
    metrics: Metrics,
}

impl Telling {
    /// Relays what is ready, in as few hints as possible, until every [`Notices`] is gone. After `stop` the router is not
    /// asked any more.
    pub(crate) async fn run(mut self, router: router::Router, stop: CancellationToken) {
        let mut ready = Vec::new();
        while self.receiver.recv_many(&mut ready, MAX_BATCH).await > 0 {
            for hints in router::split(hints(ready.drain(..)), prost::Message::encoded_len) {
                if stop.is_cancelled() {
                    continue;
                }
                let count = hints.len();
                match router.relay(hints).await {
                    Ok(outcomes) => {
                        for outcome in outcomes {
                            self.metrics.told(Outcome::from_number(outcome), 1);
                        }
                    }
                    Err(error) => {
                        tracing::debug!(%error, "what was settled elsewhere is not told");
                        self.metrics.told(Outcome::Failed, count);
                    }
                }
            }
        }
    }
}

/// One hint for each inbox, or more when it has too many ranges.
fn hints(notices: impl Iterator<Item = Notice>) -> Vec<InboxHint> {
    let mut notices: Vec<Notice> = notices.collect();
    notices.sort_by(|one, other| (&one.user, one.epoch).cmp(&(&other.user, other.epoch)));
    let mut hints = Vec::new();
    for same in notices.chunk_by(|one, other| (&one.user, one.epoch) == (&other.user, other.epoch)) {
        let newcomer = same.iter().any(|notice| notice.seqs.is_empty());
        let hint = |settled: Vec<SeqRange>, newcomer| InboxHint {
            user: same[0].user.clone(),
            inbox_epoch: same[0].epoch,
            settled,
            newcomer,
            ..InboxHint::default()
        };
        let ranges = ranges(same.iter().flat_map(|notice| notice.seqs.iter().copied()).collect());
        if ranges.is_empty() {
            hints.push(hint(Vec::new(), newcomer));
        }
        hints.extend(ranges.chunks(MAX_RANGES).map(|ranges| hint(ranges.to_vec(), newcomer)));
    }
    hints
}

/// Seqs as ranges, ascending.
fn ranges(mut seqs: Vec<u64>) -> Vec<SeqRange> {
    seqs.sort_unstable();
    let mut ranges: Vec<SeqRange> = Vec::new();
    for seq in seqs {
        match ranges.last_mut() {
            Some(last) if seq <= last.to + 1 => last.to = seq,
            _ => ranges.push(SeqRange { from: seq, to: seq }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    fn notice(user: &str, epoch: u64, seqs: &[u64]) -> Notice {
        Notice { user: user.into(), epoch, seqs: seqs.to_vec() }
    }

    #[test]
    fn an_inbox_gets_one_hint_of_what_is_ready() {
        let notices = [
            notice("bob", 1, &[4, 2]),
            notice("ann", 1, &[7]),
            notice("bob", 2, &[9]),
            notice("bob", 1, &[3, 8]),
        ];
        let told: Vec<_> = hints(notices.into_iter())
            .into_iter()
            .map(|hint| {
                let ranges: Vec<_> = hint.settled.iter().map(|range| (range.from, range.to)).collect();
                (hint.user, hint.inbox_epoch, ranges, hint.newcomer)
            })
            .collect();
        let expected = [
            ("ann".to_owned(), 1, vec![(7, 7)], false),
            ("bob".to_owned(), 1, vec![(2, 4), (8, 8)], false),
            ("bob".to_owned(), 2, vec![(9, 9)], false),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn a_newcomer_needs_no_ranges_and_a_hint_has_a_bounded_number_of_them() {
        let told = hints([notice("bob", 1, &[])].into_iter());
        assert!(told.len() == 1 && told[0].newcomer && told[0].settled.is_empty());
        let odd: Vec<u64> = (0..=MAX_RANGES as u64).map(|n| 2 * n + 1).collect();
        let told = hints([notice("bob", 1, &odd), notice("bob", 1, &[])].into_iter());
        assert_eq!(told.iter().map(|hint| hint.settled.len()).collect::<Vec<_>>(), [MAX_RANGES, 1]);
        assert!(told.iter().all(|hint| hint.newcomer));
    }
}
