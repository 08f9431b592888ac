//! Relays again what no edge reported written, as the last message of an inbox has no successor that would reveal its
//! loss; and messages whose delivery failed, once their next attempt is due.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use sanjay_proto::{client::v1::InboxMessage, edge::v1::InboxHint};
use sanjay_runtime::{
    clock::SharedClock,
    milestones::MilestoneRing,
    random::{SharedRandom, fraction},
};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use crate::{
    metrics::Metrics,
    relay::Outcome,
    retry,
    router::{self, Router},
    store::{DueInbox, InboxQuery, InboxStore, MAX_RETRIES, Next, Page, Rearm, StoreError},
};

/// How often due inboxes are looked for.
const SCAN_EVERY: Duration = Duration::from_millis(500);

/// How long the scan rests after the router did not answer, so that a router that is away is asked with one
/// claim a second and not with the whole backlog.
const REST: Duration = Duration::from_secs(1);

/// Most inboxes of one claim.
const MAX_CLAIM: usize = 128;

/// Most claims of one scan; what is left waits for the next.
const MAX_CLAIMS: usize = 64;

/// Most messages of one inbox that are relayed in one scan. The edge reads the rest from the log.
const MAX_MESSAGES: usize = 64;

/// How often an inbox is relayed again of which some device has everything: the others have missed it, or are away and
/// read it when they come.
const MISSED_ATTEMPTS: u32 = 3;

/// For how long a claim holds: longer than the calls that finish it may take together.
const CLAIM: Duration = Duration::from_secs(30);

/// How often the oldest undelivered message is looked for, and among how many inboxes at each end of those that are
/// due.
const MEASURE_EVERY: Duration = Duration::from_secs(3);
const MEASURED: usize = 128;

/// Why a scan stopped early.
#[derive(Debug, thiserror::Error)]
enum ScanError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Router(#[from] router::RouterError),
    #[error("no router serves, as far as this node can see")]
    NoRouter,
}

/// Relays due inboxes again.
pub(crate) struct Redelivery {
    pub(crate) store: Arc<dyn InboxStore>,
    pub(crate) router: Router,
    pub(crate) ring: Arc<MilestoneRing>,
    pub(crate) clock: SharedClock,
    pub(crate) random: SharedRandom,
    pub(crate) metrics: Metrics,
}

impl Redelivery {
    /// Runs until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut scan = tokio::time::interval(SCAN_EVERY);
        scan.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut resting = false;
        let mut measured: Option<Instant> = None;
        while stop.run_until_cancelled(scan.tick()).await.is_some() {
            if measured.is_none_or(|at| at.elapsed() >= MEASURE_EVERY) {
                measured = Some(Instant::now());
                self.measure().await;
            }
            match self.scan().await {
                Ok(()) => {
                    if std::mem::replace(&mut resting, false) {
                        tracing::info!("redelivery goes on");
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut resting, true) {
                        tracing::warn!(%error, "redelivery rests");
                    }
                    scan.reset_after(REST);
                }
            }
        }
    }

    /// Measures how old the oldest message is that waits to be written. Without an answer the last value stays; the
    /// scan says that the store is away.
    async fn measure(&self) {
        match self.store.oldest_undelivered(MEASURED).await {
            Ok(oldest) => self.metrics.oldest_undelivered(oldest, self.clock.now_us()),
            Err(error) => tracing::debug!(%error, "the oldest message was not looked for"),
        }
    }

    async fn scan(&self) -> Result<(), ScanError> {
        self.metrics.store(self.store.stats().await?);
        // What this node cannot relay it must not claim: another node that can takes it when it has been due for long.
        if !self.router.is_serving() {
            return Err(ScanError::NoRouter);
        }
        for _ in 0..MAX_CLAIMS {
            let now_us = self.clock.now_us();
            let claimed = self.store.claim_due(now_us, now_us + micros(CLAIM), MAX_CLAIM).await?;
            let last = claimed.len() < MAX_CLAIM;
            if !claimed.is_empty() {
                self.relay(claimed).await?;
            }
            if last {
                break;
            }
        }
        Ok(())
    }

    /// Relays the unwritten messages of claimed inboxes, and those whose next attempt is due, and says when they are due
    /// again.
    async fn relay(&self, claimed: Vec<DueInbox>) -> Result<(), ScanError> {
        let mut attempts = self.read(claimed).await;
        let hints: Vec<(usize, InboxHint)> = attempts
            .iter_mut()
            .enumerate()
            .flat_map(|(index, attempt)| attempt.hints().map(move |hint| (index, hint)))
            .collect();
        let mut failed = None;
        for call in router::split(hints, |(_, hint)| prost::Message::encoded_len(hint)) {
            let (indices, hints): (Vec<_>, Vec<_>) = call.into_iter().unzip();
            let ids: Vec<_> =
                hints.iter().filter_map(|hint| Some(hint.message.as_ref()?.message_id.clone())).collect();
            // After one failure the rest is not tried: it would wait as long.
            let outcomes = match &failed {
                None => self.router.relay(hints).await,
                Some(error) => Err(Clone::clone(error)),
            };
            match outcomes {
                Ok(outcomes) => {
                    for ((index, message_id), number) in indices.into_iter().zip(ids).zip(outcomes) {
                        let outcome = Outcome::from_number(number);
                        let stage = if outcome == Outcome::Offline { "parked" } else { "relayed" };
                        self.ring.record(&message_id, stage, format!("again, {}", outcome.as_str()));
                        self.metrics.relayed(outcome, 1);
                        self.metrics.redelivered(1);
                        attempts[index].note(outcome);
                    }
                }
                Err(error) => {
                    self.metrics.relayed(Outcome::Failed, indices.len());
                    indices.into_iter().for_each(|index| attempts[index].note(Outcome::Failed));
                    failed = Some(error);
                }
            }
        }
        self.store.rearm(attempts.into_iter().map(|attempt| self.rearm(attempt)).collect()).await?;
        failed.map_or(Ok(()), |error| Err(error.into()))
    }

    /// Reads what is to be relayed of claimed inboxes.
    async fn read(&self, claimed: Vec<DueInbox>) -> Vec<Attempt> {
        let unwritten = claimed.iter().map(|inbox| InboxQuery {
            user: inbox.user.clone(),
            after: Some(inbox.after),
            limit: MAX_MESSAGES,
            only: Vec::new(),
            device: None,
        });
        let retries = claimed.iter().filter(|inbox| !inbox.retries.is_empty()).map(|inbox| InboxQuery {
            user: inbox.user.clone(),
            after: None,
            limit: MAX_RETRIES,
            only: inbox.retries.iter().map(|(seq, _)| *seq).collect(),
            device: None,
        });
        let pages = self.store.read(unwritten.chain(retries).collect()).await;
        let mut pages = pages.into_iter();
        let unwritten: Vec<_> = pages.by_ref().take(claimed.len()).collect();
        let with_page = claimed.into_iter().zip(unwritten);
        with_page
            .map(|(inbox, page)| {
                let retries = if inbox.retries.is_empty() { None } else { pages.next() };
                Attempt::new(inbox, page, retries)
            })
            .collect()
    }

    fn rearm(&self, attempt: Attempt) -> Rearm {
        let soon = |count| Next::At {
            due_us: self.clock.now_us() + micros(retry::delay(count, fraction(&*self.random))),
            attempt: count,
        };
        let next = match attempt.result {
            // A router that is away says nothing about the user, so the schedule stays where it is.
            AttemptResult::NotTried => soon(attempt.inbox.attempt),
            AttemptResult::Tried if attempt.inbox.is_missed_in_vain() => Next::Parked,
            AttemptResult::Tried => soon(attempt.inbox.attempt.saturating_add(1)),
            AttemptResult::NothingToDo | AttemptResult::Offline => Next::Parked,
        };
        Rearm { user: attempt.inbox.user, armed: attempt.inbox.armed, next }
    }
}

impl DueInbox {
    /// Whether only devices can lack something that did not take it however often it was relayed.
    fn is_missed_in_vain(&self) -> bool {
        self.missed && self.retries.is_empty() && self.attempt + 1 >= MISSED_ATTEMPTS
    }
}

/// What relaying an inbox again came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AttemptResult {
    /// It was not read or not relayed.
    NotTried,
    /// Everything unwritten in it is settled, and so is what waited for an attempt.
    NothingToDo,
    /// The user has no session anywhere.
    Offline,
    /// Relayed, or it is not known where the user is.
    Tried,
}

struct Attempt {
    inbox: DueInbox,
    /// To relay, in ascending seq.
    messages: Vec<InboxMessage>,
    /// The devices that have acked one of them.
    acked_by: BTreeMap<u64, Vec<String>>,
    result: AttemptResult,
}

impl Attempt {
    /// Of what is unwritten, and of the messages whose next attempt is due where there are such.
    fn new(
        inbox: DueInbox,
        unwritten: Result<Page, StoreError>,
        retries: Option<Result<Page, StoreError>>,
    ) -> Self {
        let nothing = |page: &Result<Page, StoreError>| {
            page.as_ref().is_ok_and(|page| page.messages.is_empty() && page.covers >= page.head)
        };
        let no_retries =
            retries.as_ref().is_none_or(|page| page.as_ref().is_ok_and(|page| page.messages.is_empty()));
        let result = if nothing(&unwritten) && no_retries {
            AttemptResult::NothingToDo
        } else {
            AttemptResult::NotTried
        };
        let acked_by = retries.iter().flatten().flat_map(|page| page.acked_by.iter().cloned()).collect();
        // A redelivery may be unwritten too, when an edge never said that it wrote what failed.
        let messages: BTreeMap<u64, InboxMessage> = [Some(unwritten), retries]
            .into_iter()
            .flatten()
            .flat_map(|page| page.unwrap_or_default().messages)
            .map(|message| (message.seq, message))
            .collect();
        Self { inbox, messages: messages.into_values().collect(), acked_by, result }
    }

    fn hints(&mut self) -> impl Iterator<Item = InboxHint> + use<> {
        let (user, inbox_epoch) = (self.inbox.user.clone(), self.inbox.epoch);
        let attempt = self.inbox.attempt.saturating_add(1);
        let mut acked_by = std::mem::take(&mut self.acked_by);
        std::mem::take(&mut self.messages).into_iter().map(move |message| InboxHint {
            done: acked_by.remove(&message.seq).unwrap_or_default(),
            user: user.clone(),
            message: Some(message),
            inbox_epoch,
            attempt,
            ..InboxHint::default()
        })
    }

    /// Offline counts only when it is the answer for every message.
    fn note(&mut self, outcome: Outcome) {
        self.result = match (self.result, outcome) {
            (AttemptResult::Tried, _) | (_, Outcome::Relayed | Outcome::Unknown) => AttemptResult::Tried,
            (AttemptResult::Offline | AttemptResult::NotTried, Outcome::Offline) => AttemptResult::Offline,
            _ => AttemptResult::NotTried,
        };
    }
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}
