//! Inboxes as back ends and edges use them: store first, then relay.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream};
use sanjay_proto::{client::v1::Payload, edge::v1::Milestone};
use sanjay_protocol::ErrorCode;
use sanjay_runtime::{
    clock::SharedClock,
    failpoint,
    milestones::MilestoneRing,
    random::{SharedRandom, uuid_v7},
    trace::carry,
};
use tokio::time::Instant;
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::{
    events::{EventKind, Events},
    message::State,
    metrics::Metrics,
    path::{Recipients, SERVICE, attempt, recipient},
    relay::{Hint, RelayQueue},
    settled::{Notice, Notices},
    spans::{self, AckTrace},
    store::{
        Acked, AppendError, Appended, CommitSink, DeadFilter, DeadReason, Failure, InboxQuery, InboxStore,
        Known, LoggedReceipt, NewMessage, Page, Receipt, RegisterError, Scheduled, ScheduledAt, Settle,
        SettledMessage, StoreError, Verdict,
    },
};

/// Most lists of dead letters of one call of an edge that are read at once.
const MAX_LOOKS: usize = 16;

/// What a back end sends; checked.
#[derive(Debug)]
pub(crate) struct Send {
    /// The back end.
    pub(crate) caller: Arc<str>,
    pub(crate) users: Vec<String>,
    pub(crate) payload: Payload,
    pub(crate) dedupe_key: String,
    /// W3C `traceparent` of the caller, or empty.
    pub(crate) parent: String,
    /// How long it may wait to be acknowledged, from when it is in the inbox; `None` leaves it to the configuration.
    pub(crate) ttl: Option<Duration>,
    /// Empty for none.
    pub(crate) collapse_key: String,
    /// When it goes into the inbox, Unix time in microseconds; 0 for now.
    pub(crate) deliver_us: u64,
}

/// The result for one user of a send.
pub(crate) type SendResult = (String, Result<Accepted, AppendError>);

/// What became of a message that was accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Accepted {
    /// It is in the inbox.
    Appended(Appended),
    /// It waits for its time.
    Scheduled(ScheduledAt),
}

impl AppendError {
    /// The code of the protocol for it.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            AppendError::AlreadyExists { .. } => ErrorCode::AlreadyExists,
            AppendError::QueueFull { .. } => ErrorCode::QueueFull,
            AppendError::Store(error) => error.code(),
        }
    }
}

impl StoreError {
    /// The code of the protocol for it.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            StoreError::Busy => ErrorCode::RateLimited,
            StoreError::Away { .. } | StoreError::Unavailable(_) => ErrorCode::Unavailable,
        }
    }
}

impl RegisterError {
    /// The code of the protocol for it.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            RegisterError::TooMany => ErrorCode::LimitExceeded,
            RegisterError::Store(error) => error.code(),
        }
    }
}

/// Notes what was committed and hands it to the relay, in the order of the commits.
pub(crate) struct Committed {
    pub(crate) relay: RelayQueue,
    pub(crate) notices: Notices,
    pub(crate) ring: Arc<MilestoneRing>,
    pub(crate) events: Events,
    pub(crate) metrics: Metrics,
}

impl CommitSink for Committed {
    fn gone(&self, user: &str, epoch: u64, seqs: &[u64]) {
        self.notices.offer(Notice { user: user.to_owned(), epoch, seqs: seqs.to_vec() });
    }

    fn died(&self, reason: DeadReason, count: usize) {
        (0..count).for_each(|_| self.metrics.dead(reason));
    }

    fn watches(&self) -> bool {
        self.events.watched()
    }

    fn settled(&self, receipt: &LoggedReceipt) {
        self.events.settled(receipt);
    }

    fn filling(&self, user: &str, messages: u64, bytes: u64) {
        let detail = || format!("{messages} messages, {bytes} bytes");
        self.events.tell_with(EventKind::InboxFilling, user, None, 0, "", detail);
    }

    fn ended(&self, user: &str, message: &SettledMessage, state: State) {
        self.ring.record(message.message_id.as_bytes(), state.as_str(), recipient(user, message.seq));
        self.metrics.ended(state);
    }

    fn committed(&self, message: &NewMessage, appended: &Appended) {
        failpoint::hit("delivery.before_relay");
        let message_id = appended.message_id.as_bytes();
        self.ring.absorb(vec![Milestone {
            message_id: message_id.to_vec().into(),
            time_us: appended.time_us,
            service: SERVICE.to_owned(),
            stage: "accepted".to_owned(),
            detail: recipient(&message.user, appended.seq),
        }]);
        self.ring.record(message_id, "committed", "");
        let (id, caller) = (Some(appended.message_id), &message.caller);
        self.events.tell_with(EventKind::Accepted, &message.user, id, appended.seq, caller, String::new);
        self.relay.offer(Hint {
            user: message.user.clone(),
            epoch: appended.epoch,
            seq: appended.seq,
            message_id: appended.message_id,
            payload: message.payload.clone(),
            time_us: appended.time_us,
            trace: message.trace.clone(),
        });
    }
}

/// The inboxes of this node.
#[derive(Clone)]
pub(crate) struct Inbox {
    pub(crate) store: Arc<dyn InboxStore>,
    pub(crate) notices: Notices,
    pub(crate) ring: Arc<MilestoneRing>,
    pub(crate) recipients: Arc<Recipients>,
    pub(crate) events: Events,
    pub(crate) clock: SharedClock,
    pub(crate) random: SharedRandom,
    pub(crate) metrics: Metrics,
    /// Most time that a message waits to be acknowledged.
    pub(crate) max_age: Option<Duration>,
}

impl Inbox {
    /// Puts a message into each user's inbox. Submits when it is called: sends of one task keep their order.
    pub(crate) fn send(&self, send: Send) -> BoxFuture<'static, Vec<SendResult>> {
        let ids: Vec<Uuid> = send.users.iter().map(|_| uuid_v7(&*self.clock, &*self.random)).collect();
        let span = spans::send(&send.parent, &ids);
        let mut trace = send.parent;
        carry(&span, &mut trace);
        let size = prost::Message::encoded_len(&send.payload);
        let payload = Arc::new(send.payload);
        // One time for all of it.
        let now_us = self.clock.now_us();
        let deliver_us = Some(send.deliver_us).filter(|at| *at > now_us);
        let expires_us = self.expires_us(deliver_us.unwrap_or(now_us), send.ttl);
        let (messages, processing): (Vec<NewMessage>, Vec<Span>) = send
            .users
            .into_iter()
            .zip(ids)
            .map(|(user, message_id)| {
                let mut trace = trace.clone();
                let processing = spans::process(&mut trace, message_id, size);
                let message = NewMessage {
                    user,
                    caller: send.caller.to_string(),
                    message_id,
                    payload: payload.clone(),
                    dedupe_key: send.dedupe_key.clone(),
                    time_us: now_us,
                    trace,
                    expires_us,
                    collapse_key: send.collapse_key.clone(),
                    shared: None,
                };
                (message, processing)
            })
            .unzip();
        let users: Vec<String> = messages.iter().map(|message| message.user.clone()).collect();
        let accepting = span.in_scope(|| self.accept(messages, deliver_us));
        let this = self.clone();
        async move {
            let results = accepting.await;
            let results: Vec<SendResult> = users
                .into_iter()
                .zip(results)
                .zip(processing)
                .map(|((user, result), processing)| {
                    this.accepted(&user, &send.caller, &result);
                    if let Err(error) = &result {
                        spans::refused(&processing, error.code().as_str());
                    }
                    (user, result)
                })
                .collect();
            let refused = results.iter().filter(|(_, result)| result.is_err()).count();
            tracing::debug!(users = results.len(), refused, "a send is answered");
            results
        }
        .instrument(span)
        .boxed()
    }

    /// Appends messages, or keeps them until their time.
    fn accept(
        &self,
        messages: Vec<NewMessage>,
        deliver_us: Option<u64>,
    ) -> BoxFuture<'static, Vec<Result<Accepted, AppendError>>> {
        let Some(deliver_us) = deliver_us else {
            let appending = self.store.append(messages);
            let accepted = |result: Result<Appended, AppendError>| result.map(Accepted::Appended);
            return appending.map(move |results| results.into_iter().map(accepted).collect()).boxed();
        };
        let scheduled = messages.into_iter().map(|message| Scheduled { message, deliver_us }).collect();
        let scheduling = self.store.schedule(scheduled);
        let accepted = |result: Result<ScheduledAt, AppendError>| result.map(Accepted::Scheduled);
        scheduling.map(move |results| results.into_iter().map(accepted).collect()).boxed()
    }

    /// When a message expires that is in its inbox from `from_us` on, Unix time in microseconds; 0 for never.
    fn expires_us(&self, from_us: u64, ttl: Option<Duration>) -> u64 {
        let ttl = ttl.into_iter().chain(self.max_age).min();
        ttl.map_or(0, |ttl| from_us.saturating_add(ttl.as_micros() as u64))
    }

    /// Counts a result, and remembers whose message it is.
    fn accepted(&self, user: &str, caller: &str, result: &Result<Accepted, AppendError>) {
        match result {
            Ok(Accepted::Appended(appended)) => {
                self.metrics.send("ok");
                self.metrics.appended(appended.duplicate);
                self.recipients.learn(appended.message_id, &Arc::from(user), appended.seq);
            }
            Ok(Accepted::Scheduled(scheduled)) => {
                self.metrics.send("ok");
                self.metrics.scheduled(scheduled.duplicate);
                let detail = format!("user {user}, until {} µs", scheduled.deliver_us);
                if !scheduled.duplicate {
                    let (id, until) =
                        (Some(scheduled.message_id), || format!("until {} µs", scheduled.deliver_us));
                    self.events.tell_with(EventKind::Scheduled, user, id, 0, caller, until);
                }
                self.ring.record(scheduled.message_id.as_bytes(), State::Scheduled.as_str(), detail);
                self.recipients.learn(scheduled.message_id, &Arc::from(user), 0);
            }
            Err(error) => self.metrics.send(error.code().as_str()),
        }
    }

    /// Reads parts of inboxes for an edge, in the order of the queries.
    pub(crate) async fn read(&self, queries: Vec<InboxQuery>) -> Vec<Result<Page, RegisterError>> {
        let users: Vec<Arc<str>> = queries.iter().map(|query| Arc::from(query.user.as_str())).collect();
        let first: Vec<bool> = queries.iter().map(|query| query.after.is_none()).collect();
        let pages = self.pages(queries).await;
        self.metrics.reads(pages.len());
        let mut handed_out = Vec::new();
        for ((user, first), page) in users.iter().zip(first).zip(&pages) {
            let Ok(page) = page else { continue };
            if first && !page.messages.is_empty() {
                // Another session may have these in flight, and is to say so when it acks them.
                self.notices.offer(Notice { user: user.to_string(), epoch: page.epoch, seqs: Vec::new() });
            }
            for message in &page.messages {
                self.ring.record(&message.message_id, "read", recipient(user, message.seq));
                if let Ok(message_id) = Uuid::from_slice(&message.message_id) {
                    self.recipients.learn(message_id, user, message.seq);
                }
            }
            if !page.messages.is_empty() {
                handed_out.push(user.to_string());
            }
        }
        // The answer may get lost on the way: what nobody reports written is relayed again.
        if !handed_out.is_empty() {
            self.store.arm(handed_out);
        }
        pages
    }

    /// Reads, and registers the devices for which that is.
    async fn pages(&self, queries: Vec<InboxQuery>) -> Vec<Result<Page, RegisterError>> {
        let devices = queries.iter().any(|query| query.device.is_some());
        let by_device = if devices { queries.clone() } else { Vec::new() };
        let pages = self.store.read(queries).await;
        let mut pages: Vec<Result<Page, RegisterError>> =
            pages.into_iter().map(|page| page.map_err(RegisterError::from)).collect();
        let (mut places, mut seen) = (Vec::new(), Vec::new());
        for (place, (query, page)) in by_device.iter().zip(&pages).enumerate() {
            let (Some(device), Ok(page)) = (&query.device, page) else { continue };
            if page.device != Known::Lately {
                places.push((place, page.device));
                seen.push((query.user.clone(), device.clone()));
            }
        }
        if seen.is_empty() {
            return pages;
        }
        let results = self.store.register(seen).await;
        let mut again = Vec::new();
        for ((place, known), result) in places.into_iter().zip(results) {
            match result {
                // What it was to note can wait for the next read.
                _ if known == Known::LongAgo => {}
                Ok(()) => {
                    self.metrics.devices.registered.inc();
                    again.push(place);
                }
                Err(error) => {
                    if error == RegisterError::TooMany {
                        self.metrics.devices.refused.inc();
                    }
                    pages[place] = Err(error);
                }
            }
        }
        let read = self.store.read(again.iter().map(|place| by_device[*place].clone()).collect()).await;
        for (place, page) in again.into_iter().zip(read) {
            pages[place] = page.map_err(RegisterError::from);
        }
        pages
    }

    /// Settles messages and notes what was written and what failed, in the order of the entries; `traces` has what came
    /// back with each of them, and `shared` whether other sessions may have in flight what it settles.
    pub(crate) async fn ack(
        &self,
        settles: Vec<Settle>,
        traces: Vec<AckTrace>,
        shared: Vec<bool>,
        reported: Vec<Milestone>,
    ) -> Vec<Result<Acked, StoreError>> {
        self.ring.absorb(reported);
        let users: Vec<Arc<str>> = settles.iter().map(|settle| Arc::from(settle.user.as_str())).collect();
        let failures: Vec<Vec<Failure>> = settles.iter().map(|settle| settle.failed.clone()).collect();
        let epochs: Vec<u64> = settles.iter().map(|settle| settle.epoch).collect();
        settles.iter().for_each(|settle| self.written(settle));
        let began = Instant::now();
        failpoint::hit("delivery.before_ack");
        let results = self.store.ack(settles).await;
        let now_us = self.clock.now_us();
        let mut deaths = Vec::new();
        for (((user, trace), result), failures) in users.iter().zip(&traces).zip(&results).zip(failures) {
            let Ok(acked) = result else { continue };
            deaths.extend(self.failed(user, &failures, &acked.failed));
            self.metrics.acked(acked.messages.len());
            spans::settled(&acked.messages, trace, began.elapsed());
            for message in &acked.messages {
                self.metrics.settled(message.accepted_us, now_us);
                let message_id = message.message_id;
                self.ring.record(message_id.as_bytes(), "acked", recipient(user, message.seq));
                self.recipients.learn(message_id, user, message.seq);
            }
        }
        for (((user, epoch), shared), result) in users.iter().zip(epochs).zip(shared).zip(&results) {
            let Some(acked) = result.as_ref().ok().filter(|acked| shared && !acked.messages.is_empty())
            else {
                continue;
            };
            let seqs = acked.messages.iter().map(|message| message.seq).collect();
            self.notices.offer(Notice { user: user.to_string(), epoch, seqs });
        }
        let looks = stream::iter(deaths);
        looks.for_each_concurrent(MAX_LOOKS, |(filter, count)| self.died(filter, count, began)).await;
        results
    }

    /// Counts and remembers what became of failed attempts of one inbox; `taken` says which of them were noted. Gives
    /// the dead letters that came of them, and how many there are.
    fn failed(
        &self,
        user: &Arc<str>,
        failures: &[Failure],
        taken: &[(u64, Verdict)],
    ) -> Option<(DeadFilter, usize)> {
        let mut deaths = Vec::new();
        for (seq, verdict) in taken {
            let Some(failure) = failures.iter().find(|failure| failure.seq == *seq) else { continue };
            match verdict {
                Verdict::Again(_) => {}
                Verdict::Dead(reason) => {
                    self.metrics.dead(*reason);
                    deaths.push(failure.time_us);
                }
                Verdict::Full => {
                    self.metrics.failure_lost();
                    continue;
                }
            }
            self.metrics.failed(failure.kind);
            let message_id = self.recipients.at(user, *seq);
            if matches!(verdict, Verdict::Again(_)) {
                self.events.failing(user, message_id, failure);
            }
            if let Some(message_id) = message_id {
                self.ring.record(message_id.as_bytes(), "failed", attempt(failure));
            }
        }
        let filter = DeadFilter {
            user: Some(user.to_string()),
            from_us: Some(*deaths.iter().min()?),
            to_us: Some(deaths.iter().max()? + 1),
            ..DeadFilter::default()
        };
        Some((filter, deaths.len()))
    }

    /// Remembers messages that just became dead letters. It reads the letters: what is known of a message is there, and
    /// nowhere else any more.
    async fn died(&self, filter: DeadFilter, count: usize, began: Instant) {
        let letters = match self.store.dead_letters(filter, None, count).await {
            Ok(page) => page.letters,
            Err(error) => return tracing::debug!(%error, "what died was not looked at"),
        };
        for letter in letters {
            spans::died(&letter, began.elapsed());
            let detail = format!("{}, {}", recipient(&letter.user, letter.seq), letter.reason.as_str());
            self.ring.record(letter.message_id.as_bytes(), "dead", detail);
            self.recipients.learn(letter.message_id, &Arc::from(letter.user.as_str()), letter.seq);
        }
    }

    /// Tells of messages that an edge wrote to sockets of their user.
    fn written(&self, settle: &Settle) {
        if !self.events.watched() {
            return;
        }
        let user: Arc<str> = Arc::from(settle.user.as_str());
        let first = Some((settle.written, 1)).filter(|(seq, _)| *seq > 0);
        for (seq, delivery) in first.into_iter().chain(settle.rewritten.iter().copied()) {
            let (id, detail) = (self.recipients.at(&user, seq), || format!("delivery {delivery}"));
            self.events.tell_with(EventKind::Written, &user, id, seq, "", detail);
        }
    }

    /// The record of a message.
    pub(crate) async fn lookup(&self, user: String, message_id: Uuid) -> Result<Option<Receipt>, StoreError> {
        self.store.lookup(user, message_id).await
    }
}
