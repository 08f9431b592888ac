//! The client's protocol state without I/O: requests and events in, frames and deliveries out. It outlives
//! connections, so that subscriptions and the inbox go on with the next one.

mod channels;
mod tokens;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use sanjay_protocol::{
    Command, Envelope, ErrorBody, ErrorCode, Event, EventEnvelope, Position,
    command::{Ack, Publish, Subscribe, Unsubscribe},
    event::{Broadcast, InboxState, Published, Welcome},
    json,
    limits::{MAX_ACK_RANGES, MAX_CLIENT_MESSAGE_BYTES, MAX_OUTSTANDING_COMMANDS, MAX_SUBSCRIPTIONS},
};
use tokio::{
    sync::{broadcast, mpsc, oneshot, watch},
    time::Instant,
};

pub(crate) use self::tokens::TokenNews;
use super::{
    backlog::{Backlog, Delivery},
    error::{ConnectionError, PublishError, SubscribeError},
    inbox::{Answer, InboxDelivery, InboxEvent, Ready, Settle, Settled, Shared, Taken},
    position::{self, Verdict},
    ranges::Ranges,
    subscription::{ChannelEvent, SubscriptionState},
};
use crate::{Jitter, backoff};

/// Acks under way at once; what becomes ready meanwhile is joined into the next.
const MAX_UNANSWERED_ACKS: usize = 8;
/// Answers beside acks that wait to be sent; beyond it the application waits.
const MAX_ANSWERS: usize = 256;
const RETRY_BASE: Duration = Duration::from_millis(500);
const RETRY_CAP: Duration = Duration::from_secs(20);

/// What a handle asks of the task.
#[derive(Debug)]
pub(crate) enum Request {
    Subscribe(NewSubscription),
    /// With an id only that subscription, without one whichever the channel has.
    Unsubscribe {
        channel: String,
        id: Option<u64>,
    },
    Publish(Publish, oneshot::Sender<Result<Published, NotPublished>>),
}

#[derive(Debug)]
pub(crate) struct NewSubscription {
    pub(crate) id: u64,
    pub(crate) channel: String,
    pub(crate) events: mpsc::Sender<ChannelEvent>,
    pub(crate) state: watch::Sender<SubscriptionState>,
    pub(crate) accepted: oneshot::Sender<Result<(), SubscribeError>>,
    /// Where the application stands already.
    pub(crate) position: Option<Position>,
}

/// Why a publish got no answer.
#[derive(Debug)]
pub(crate) enum NotPublished {
    /// It was not sent, as there was no connection.
    Offline,
    Failed(PublishError),
}

#[derive(Debug)]
struct Entry {
    id: u64,
    events: mpsc::Sender<ChannelEvent>,
    state: watch::Sender<SubscriptionState>,
    position: Option<Position>,
    /// `subscribe` went out on this connection.
    sent: bool,
    /// and was answered.
    subscribed: bool,
    refusals: u32,
}

enum Pending {
    Subscribe { channel: String, id: u64 },
    Unsubscribe,
    Publish(oneshot::Sender<Result<Published, NotPublished>>),
    Ack(Vec<(u64, u64)>),
    Answer,
    Refresh(String),
}

impl std::fmt::Debug for Pending {
    /// Without what it holds: a token is a secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pending")
    }
}

/// The machine's side of the inbox.
#[derive(Debug)]
pub(crate) struct InboxPort {
    pub(crate) shared: Arc<Shared>,
    pub(crate) settle: mpsc::Sender<Settle>,
}

pub(crate) struct Machine {
    inbox: InboxPort,
    jitter: Jitter,
    features: watch::Sender<Vec<String>>,
    broadcasts: broadcast::Sender<Broadcast>,
    online: bool,
    next_id: u64,
    subscriptions: HashMap<String, Entry>,
    /// Channels whose `subscribe` waits until fewer commands are outstanding.
    unsent: VecDeque<String>,
    /// Refused subscriptions with the time to try again.
    retries: Vec<(Instant, String)>,
    /// Commands without an answer, by id and thus by age.
    pending: BTreeMap<u64, (Instant, Pending)>,
    frames: VecDeque<Vec<u8>>,
    pong: bool,
    /// To be acked.
    acks: Ranges,
    /// The highest seq of `acks` so far, with the trace of its message.
    newest_ack: (u64, String),
    /// Acks without an answer, which comes once they are durable.
    unanswered_acks: usize,
    /// `nak`, `term` and `working`, to be sent.
    answers: VecDeque<Command>,
    /// No ack before this time, as the server refused the last one for now.
    acks_wait: Option<Instant>,
    backlog: Backlog,
    goaway: Option<Instant>,
    token_news: Vec<TokenNews>,
}

impl Machine {
    pub(crate) fn new(
        inbox: InboxPort,
        backlog: Backlog,
        jitter: Jitter,
        features: watch::Sender<Vec<String>>,
        broadcasts: broadcast::Sender<Broadcast>,
    ) -> Self {
        Self {
            inbox,
            jitter,
            features,
            broadcasts,
            online: false,
            // 0 is the id of `hello`.
            next_id: 1,
            subscriptions: HashMap::new(),
            unsent: VecDeque::new(),
            retries: Vec::new(),
            pending: BTreeMap::new(),
            frames: VecDeque::new(),
            pong: false,
            acks: Ranges::default(),
            newest_ack: (0, String::new()),
            unanswered_acks: 0,
            answers: VecDeque::new(),
            acks_wait: None,
            backlog,
            goaway: None,
            token_news: Vec::new(),
        }
    }

    pub(crate) fn connected(&mut self, welcome: &Welcome) {
        self.online = true;
        self.features.send_replace(welcome.features.clone());
        if let Some(inbox) = &welcome.inbox {
            self.met_inbox(inbox);
        }
        self.unsent = self.subscriptions.keys().cloned().collect();
    }

    pub(crate) fn disconnected(&mut self) {
        self.online = false;
        for (_, (_, pending)) in std::mem::take(&mut self.pending) {
            if let Pending::Publish(answer) = pending {
                let _ = answer.send(Err(NotPublished::Failed(PublishError::Disconnected)));
            }
        }
        for entry in self.subscriptions.values_mut() {
            (entry.sent, entry.subscribed) = (false, false);
            entry.state.send_replace(SubscriptionState::Subscribing);
        }
        self.unsent.clear();
        self.retries.clear();
        self.frames.clear();
        self.acks.clear();
        self.newest_ack = (0, String::new());
        self.unanswered_acks = 0;
        // Of deliveries of that connection; on the next one they come again.
        self.answers.clear();
        self.acks_wait = None;
        self.pong = false;
        self.goaway = None;
        self.token_news.clear();
    }

    /// Whether another request may be taken: a server stops reading when too many are unanswered.
    pub(crate) fn takes_requests(&self) -> bool {
        self.pending.len() < MAX_OUTSTANDING_COMMANDS
    }

    pub(crate) fn request(&mut self, request: Request, now: Instant) {
        match request {
            Request::Subscribe(new) => self.subscribe(new, now),
            Request::Unsubscribe { channel, id } => self.unsubscribe(&channel, id, now),
            Request::Publish(_, answer) if !self.online => {
                let _ = answer.send(Err(NotPublished::Offline));
            }
            Request::Publish(publish, answer) => {
                let frame = self.encode(Command::Publish(publish));
                if frame.len() > MAX_CLIENT_MESSAGE_BYTES {
                    let text = format!(
                        "the payload takes {} bytes as JSON; a message of at most {MAX_CLIENT_MESSAGE_BYTES} is allowed",
                        frame.len()
                    );
                    let refused = PublishError::Refused(ErrorBody::new(ErrorCode::PayloadTooLarge, text));
                    let _ = answer.send(Err(NotPublished::Failed(refused)));
                } else {
                    self.push(frame, Pending::Publish(answer), now);
                }
            }
        }
    }

    fn subscribe(&mut self, new: NewSubscription, now: Instant) {
        let NewSubscription { id, channel, events, state, accepted, position } = new;
        match self.subscriptions.get(&channel) {
            // Its handle is gone; the request that says so was lost or comes later.
            Some(entry) if entry.events.is_closed() => self.unsubscribe(&channel, None, now),
            Some(_) => {
                let text = format!("channel {channel:?} has a subscription already; share or drop that one");
                let error = ErrorBody::new(ErrorCode::AlreadySubscribed, text);
                let _ = accepted.send(Err(SubscribeError::Refused(error)));
                return;
            }
            None if self.subscriptions.len() >= MAX_SUBSCRIPTIONS => {
                let text = format!("a connection has at most {MAX_SUBSCRIPTIONS} subscriptions");
                let _ = accepted
                    .send(Err(SubscribeError::Refused(ErrorBody::new(ErrorCode::LimitExceeded, text))));
                return;
            }
            None => {}
        }
        if accepted.send(Ok(())).is_err() {
            return;
        }
        let entry = Entry { id, events, state, position, sent: false, subscribed: false, refusals: 0 };
        if self.online {
            self.unsent.push_back(channel.clone());
        }
        self.subscriptions.insert(channel, entry);
    }

    fn unsubscribe(&mut self, channel: &str, id: Option<u64>, now: Instant) {
        if self.subscriptions.get(channel).is_none_or(|entry| id.is_some_and(|id| entry.id != id)) {
            return;
        }
        let Some(entry) = self.subscriptions.remove(channel) else { return };
        entry.state.send_replace(SubscriptionState::Unsubscribed(None));
        self.retries.retain(|(_, waiting)| waiting != channel);
        if entry.sent {
            let frame = self.encode(Command::Unsubscribe(Unsubscribe { channel: channel.to_owned() }));
            self.push(frame, Pending::Unsubscribe, now);
        }
    }

    /// An envelope under the id that [`push`](Self::push) gives out next.
    fn encode(&self, command: Command) -> Vec<u8> {
        let mut frame = Vec::new();
        json::encode(&Envelope { id: Some(self.next_id), command }, &mut frame);
        frame
    }

    fn push(&mut self, frame: Vec<u8>, pending: Pending, now: Instant) {
        self.frames.push_back(frame);
        self.pending.insert(self.next_id, (now, pending));
        self.next_id += 1;
    }

    /// Sends the subscriptions that are due as far as commands may be outstanding, and ends the wait of acks.
    pub(crate) fn advance(&mut self, now: Instant) {
        self.acks_wait = self.acks_wait.filter(|&until| until > now);
        for (_, channel) in self.retries.extract_if(.., |(due, _)| *due <= now) {
            self.unsent.push_back(channel);
        }
        while self.takes_requests()
            && let Some(channel) = self.unsent.pop_front()
        {
            let (id, recover) = match self.subscriptions.get_mut(&channel) {
                Some(entry) if !entry.sent => {
                    entry.sent = true;
                    (entry.id, entry.position.clone())
                }
                _ => continue,
            };
            let subscribe = Subscribe { channel: channel.clone(), recover, ..Subscribe::default() };
            let frame = self.encode(Command::Subscribe(subscribe));
            self.push(frame, Pending::Subscribe { channel, id }, now);
        }
    }

    /// When [`advance`](Self::advance) has something to do.
    pub(crate) fn next_retry(&self) -> Option<Instant> {
        self.retries.iter().map(|&(due, _)| due).chain(self.acks_wait).min()
    }

    /// When the oldest command without an answer was sent.
    pub(crate) fn oldest_pending(&self) -> Option<Instant> {
        self.pending.first_key_value().map(|(_, &(sent, _))| sent)
    }

    /// When a `goaway` wants this connection to be left.
    pub(crate) fn goaway(&self) -> Option<Instant> {
        self.goaway
    }

    /// Whether more of what the application says may be taken.
    pub(crate) fn takes_answers(&self) -> bool {
        self.answers.len() < MAX_ANSWERS
    }

    pub(crate) fn ready(&mut self, ready: Ready) {
        match ready {
            Ready::Acks(settled) => self.settled(settled),
            Ready::Answer(Answer { generation, command }) => {
                if self.online && self.inbox.shared.is_current(generation) {
                    self.answers.push_back(command);
                }
            }
        }
    }

    fn settled(&mut self, settled: Settled) {
        if self.online && self.inbox.shared.is_current(settled.generation) {
            let newest = settled.seqs.iter().copied().max().unwrap_or_default();
            settled.seqs.iter().for_each(|&seq| self.acks.insert(seq, seq));
            self.remember_newest(newest, settled.trace);
        }
    }

    fn remember_newest(&mut self, seq: u64, trace: String) {
        if seq >= self.newest_ack.0 {
            self.newest_ack = (seq, trace);
        }
    }

    /// The next text message to write: as many waiting frames as fit.
    pub(crate) fn compose(&mut self, now: Instant) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        if std::mem::take(&mut self.pong) {
            // Under an id, so that a server which answers every envelope does not take it for a ping.
            json::encode(&Envelope { id: Some(self.next_id), command: Command::Ping }, &mut out);
            self.next_id += 1;
        }
        if self.may_ack() {
            let ranges = self.acks.take(MAX_ACK_RANGES);
            let newest = std::mem::take(&mut self.newest_ack);
            let is_in = ranges.last().is_some_and(|&(_, to)| to == newest.0);
            let trace = if is_in { newest.1 } else { String::new() };
            let frame = self.encode(Command::Ack(Ack { ranges: ranges.clone(), trace }));
            self.unanswered_acks += 1;
            self.push(frame, Pending::Ack(ranges), now);
        }
        while self.takes_requests()
            && let Some(command) = self.answers.pop_front()
        {
            let frame = self.encode(command);
            self.push(frame, Pending::Answer, now);
        }
        while let Some(frame) = self.frames.front() {
            if !out.is_empty() && out.len() + 1 + frame.len() > MAX_CLIENT_MESSAGE_BYTES {
                break;
            }
            if !out.is_empty() {
                out.push(b'\n');
            }
            out.extend_from_slice(frame);
            self.frames.pop_front();
        }
        (!out.is_empty()).then_some(out)
    }

    fn may_ack(&self) -> bool {
        !self.acks.is_empty()
            && self.unanswered_acks < MAX_UNANSWERED_ACKS
            && self.takes_requests()
            && self.acks_wait.is_none()
    }

    /// Whether the server has every ack, and what else the application said of messages, durable.
    pub(crate) fn acks_are_durable(&self) -> bool {
        let is_answer = |pending: &Pending| matches!(pending, Pending::Ack(_) | Pending::Answer);
        self.acks.is_empty()
            && self.answers.is_empty()
            && !self.pending.values().any(|(_, pending)| is_answer(pending))
    }

    /// Takes a text message of the server.
    pub(crate) fn input(&mut self, text: &str, now: Instant) -> Result<(), ConnectionError> {
        for envelope in json::decode_events(text) {
            let envelope = envelope.map_err(|error| ConnectionError::Protocol(error.to_string()))?;
            self.event(envelope, now)?;
        }
        Ok(())
    }

    pub(crate) fn event(&mut self, envelope: EventEnvelope, now: Instant) -> Result<(), ConnectionError> {
        if let Some(id) = envelope.id {
            return match self.pending.remove(&id) {
                Some((_, pending)) => self.reply(pending, envelope.event, now),
                None => Ok(()),
            };
        }
        match envelope.event {
            Event::Ping => self.pong = true,
            Event::Message(message) => {
                if let Some(entry) = self.subscriptions.get_mut(&message.channel)
                    && entry.subscribed
                {
                    let before = match position::message(&mut entry.position, &message) {
                        Verdict::Repeated => return Ok(()),
                        Verdict::Deliver => None,
                        Verdict::DeliverAfter(event) => Some(event),
                    };
                    let events = entry.events.clone();
                    for event in before.into_iter().chain([ChannelEvent::Message(message)]) {
                        self.queue(Delivery::Channel(events.clone(), event));
                    }
                }
            }
            Event::Gap(gap) => {
                if let Some(entry) = self.subscriptions.get_mut(&gap.channel)
                    && entry.subscribed
                    && let Some(event) = position::gap(&mut entry.position, gap)
                {
                    let events = entry.events.clone();
                    self.queue(Delivery::Channel(events, event));
                }
            }
            Event::Inbox(message) => match self.inbox.shared.take(&message, &self.inbox.settle) {
                Taken::New(acker) => {
                    self.queue(Delivery::Inbox(InboxEvent::Message(InboxDelivery {
                        message: *message,
                        acker,
                    })));
                }
                Taken::Again => {
                    self.acks.insert(message.seq, message.seq);
                    self.remember_newest(message.seq, message.trace);
                }
                Taken::Held => {}
            },
            Event::Settled(settled) => {
                self.inbox.shared.settled_elsewhere(&settled.epoch, &settled.ranges);
            }
            Event::Degraded(degraded) => {
                self.features.send_replace(degraded.features);
                if let Some(inbox) = &degraded.inbox {
                    self.met_inbox(inbox);
                }
            }
            Event::Broadcast(broadcast) => drop(self.broadcasts.send(*broadcast)),
            Event::Goaway(goaway) => {
                let fraction = self.jitter.fraction();
                let delay = backoff::goaway(goaway.reconnect_after_ms, goaway.spread_ms, fraction);
                tracing::info!(code = goaway.code, reason = goaway.reason, ?delay, "the server goes away");
                self.goaway = Some(now + delay);
            }
            Event::TokenExpired(_) => self.token_news.push(TokenNews::Expired),
            Event::Unsubscribed(unsubscribed) => self.unsubscribed(unsubscribed, now),
            Event::Error(error) => {
                tracing::warn!(code = error.code.as_str(), error.message, "the server refused a command")
            }
            // Replies without an id, and what a newer server says.
            _ => {}
        }
        Ok(())
    }

    fn met_inbox(&mut self, state: &InboxState) {
        let (discontinuity, first) = self.inbox.shared.observe(state);
        if first {
            // When the queue is full, the next ack stores it.
            let _ = self.inbox.settle.try_send(Settle::Begin);
        }
        if let Some(discontinuity) = discontinuity {
            self.acks.clear();
            self.answers.clear();
            self.queue(Delivery::Inbox(InboxEvent::Discontinuity(discontinuity)));
        }
    }

    fn reply(&mut self, pending: Pending, event: Event, now: Instant) -> Result<(), ConnectionError> {
        match (pending, event) {
            (Pending::Subscribe { channel, id }, Event::Subscribed(subscribed)) => {
                self.subscribed(&channel, id, subscribed);
            }
            (Pending::Subscribe { channel, id }, Event::Error(error)) => {
                self.refused(&channel, id, error, now)
            }
            (Pending::Publish(answer), Event::Published(published)) => {
                let _ = answer.send(Ok(published));
            }
            (Pending::Publish(answer), Event::Error(error)) => {
                let _ = answer.send(Err(NotPublished::Failed(PublishError::Refused(error))));
            }
            (Pending::Ack(ranges), answer) => self.ack_answered(&ranges, answer, now),
            (Pending::Answer, Event::Error(error)) => {
                // Most likely another delivery is in flight by now.
                tracing::debug!(error.message, "the server refused the answer to a message");
            }
            (Pending::Refresh(token), Event::Refreshed(refreshed)) => {
                let ttl = Duration::from_secs(refreshed.token_ttl_s);
                self.token_news.push(TokenNews::Refreshed { token, ttl });
            }
            (Pending::Refresh(_), Event::Error(error)) => self.token_news.push(TokenNews::Refused(error)),
            (Pending::Answer | Pending::Unsubscribe, _) => {}
            (Pending::Subscribe { .. } | Pending::Publish(_) | Pending::Refresh(_), _) => {
                return Err(ConnectionError::Protocol("a reply that does not fit its command".to_owned()));
            }
        }
        Ok(())
    }

    fn ack_answered(&mut self, ranges: &[(u64, u64)], answer: Event, now: Instant) {
        self.unanswered_acks -= 1;
        match answer {
            Event::Error(error) if error.retryable => {
                let hint = error.retry_after_ms.map(|ms| Duration::from_millis(ms.into()));
                let delay = backoff::retry(1, hint, RETRY_BASE, RETRY_CAP, self.jitter.fraction());
                self.acks_wait = Some(now + delay);
                ranges.iter().for_each(|&(from, to)| self.acks.insert(from, to));
            }
            // What stays unsettled is delivered again, and then acked again.
            Event::Error(error) => tracing::warn!(error.message, "the server refused an ack"),
            _ => self.acks_wait = None,
        }
    }

    fn queue(&mut self, delivery: Delivery) {
        self.backlog.push(delivery);
    }

    /// Hands over what the application has room for, in order.
    pub(crate) fn deliver(&mut self, now: Instant) {
        if self.backlog.deliver() {
            let dropped = self.subscriptions.iter().filter(|(_, entry)| entry.events.is_closed());
            let dropped: Vec<String> = dropped.map(|(channel, _)| channel.clone()).collect();
            dropped.iter().for_each(|channel| self.unsubscribe(channel, None, now));
        }
    }

    /// Drops what the application has no room for; for a connection that is left.
    pub(crate) fn discard_backlog(&mut self) {
        self.backlog.clear();
    }

    /// Whether the socket may be read: not while the application is behind, unless a reply is awaited, so that an
    /// application that publishes between two messages gets its answer.
    pub(crate) fn wants_input(&self) -> bool {
        self.backlog.is_empty() || (!self.pending.is_empty() && !self.backlog.is_full())
    }

    /// Waits until the application has room for what comes first; for ever when nothing waits.
    pub(crate) fn room(&self) -> impl Future<Output = ()> + Send + use<> {
        self.backlog.room()
    }
}
