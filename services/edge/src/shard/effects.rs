//! Carries out what a connection's machine wants done, and feeds the answers back.
//!
//! Everything that a connection is to be sent in one turn leaves in one message and one write.

use std::{collections::VecDeque, rc::Rc, time::Duration};

use bytes::Bytes;
use sanjay_proto::{client::v1::InboxMessage, edge::v1::Milestone};
use sanjay_protocol::{
    Command, ErrorBody, ErrorCode, Event,
    command::{Envelope, Publish, Subscribe},
    event::Subscribed,
    json::{self, Refused},
    recovery::with_id,
    token::Capabilities,
};
use sanjay_runtime::{
    Namespace,
    metrics::seconds_between,
    random::{fraction, uuid_v4, uuid_v7},
};
use sanjay_websocket::{Opcode, Transport, encode};
use tracing::Span;
use uuid::Uuid;

use super::{
    Needs, Shard,
    answers::REPORT_AFTER,
    events::Happened,
    hub::{Join, Leave, Top},
    wheel::{Tick, Wheel},
};
use crate::{
    connection::{
        Connection, Life, MAX_WAITING_TO_READ, NEVER, Wrote,
        machine::{Effect, Input, Surroundings, Terms},
    },
    revocations::Held,
    spans::{self, Origin},
    upstream::{ClientPublish, ConnKey, LinkRequest, ReadRequest, ShardEvent},
    verifier::TokenVerifier,
};

/// Envelopes are put into one message up to this size.
const MESSAGE_BYTES: usize = 32 * 1024;

/// Output buffers up to this size are kept for the next turn.
const SPARE_BYTES: usize = 64 * 1024;

/// Milestones that wait to be reported; more are dropped.
const MAX_MILESTONES: usize = 4_096;

/// Inputs for one connection that are handled together.
pub struct Turn<'a, T: Transport> {
    /// The shard.
    pub shard: &'a Rc<Shard<T>>,
    /// The connection.
    pub conn: &'a Rc<Connection<T>>,
    /// Envelopes that go out together.
    out: Vec<u8>,
    effects: Vec<Effect>,
    /// Spans of inbox messages in `out`; of those alone that are recorded.
    pushes: Vec<Span>,
    /// How many inbox messages are in `out`.
    pushed: u64,
    /// Where inbox messages come from that the present input has pushed.
    from: Origin,
    /// Time stamp of an inbox message in `out` whose first hint this is.
    hinted_us: Option<u64>,
}

impl<'a, T: Transport> Turn<'a, T> {
    /// Begins a turn; [`Turn::end`] sends what came together.
    pub fn new(shard: &'a Rc<Shard<T>>, conn: &'a Rc<Connection<T>>) -> Self {
        let out = shard.spare.take();
        Self {
            shard,
            conn,
            out,
            effects: Vec::new(),
            pushes: Vec::new(),
            pushed: 0,
            from: Origin::Hint,
            hinted_us: None,
        }
    }

    /// A turn with one input.
    pub fn once(shard: &'a Rc<Shard<T>>, conn: &'a Rc<Connection<T>>, input: Input) {
        let mut turn = Turn::new(shard, conn);
        turn.on(input);
        turn.end();
    }

    /// A command arrived: takes it, or keeps it until it can be taken.
    pub fn on_command(&mut self, command: Result<Envelope, Refused>) {
        if self.conn.life.get() != Life::Open {
            return;
        }
        if !self.conn.has_backlog() && self.can_take(&command) {
            return self.take(command);
        }
        self.conn.backlog.borrow_mut().get_or_insert_default().push_back(command);
    }

    fn take(&mut self, command: Result<Envelope, Refused>) {
        self.shard.common.metrics.commands.inc();
        self.on(command.map_or_else(Input::Refused, Input::Command));
    }

    fn can_take(&self, command: &Result<Envelope, Refused>) -> bool {
        if !self.conn.machine.borrow().takes_commands() {
            return false;
        }
        let has_room = self.shard.upstream.has_room_for(needs(command));
        if !has_room {
            self.shard.wait_for_room(self.conn);
        }
        has_room
    }

    /// Gives the machine an input and carries out what it wants done.
    pub fn on(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        let mut effects = std::mem::take(&mut self.effects);
        while let Some(input) = inputs.pop_front() {
            // Nothing else than these two pushes.
            self.from = if matches!(input, Input::Page(_)) { Origin::Read } else { Origin::Hint };
            if self.shard.watched.get() {
                self.shard.note_input(self.conn, &input);
            }
            self.conn.machine.borrow_mut().on(input, &**self.shard, &mut effects);
            for effect in effects.drain(..) {
                inputs.extend(self.carry_out(effect));
            }
        }
        self.effects = effects;
    }

    /// Returns the answer when there is one at once.
    fn carry_out(&mut self, effect: Effect) -> Option<Input> {
        match effect {
            Effect::Send(envelope) => {
                if matches!(envelope.event, Event::Settled(_)) {
                    self.shard.common.metrics.settled_pushes.inc();
                }
                if self.shard.watched.get() && matches!(envelope.event, Event::Welcome(_)) {
                    self.shard.note(&self.conn.machine.borrow(), Happened::Online);
                }
                json::encode(&envelope, &mut self.out);
                self.flush_if_large();
            }
            Effect::PushInbox(message) => self.push_inbox(message),
            Effect::OpenSession { inbox } => self.open_session(inbox),
            Effect::ReadInbox { after, limit } => {
                self.flush();
                // A page may be large: who has not taken the last one gets none yet.
                if self.conn.waiting() > MAX_WAITING_TO_READ {
                    self.conn.deferred_read.set(Some((after, limit)));
                } else {
                    self.shard.read_inbox(self.conn, after, limit);
                }
            }
            Effect::ArmInbox(after) => self.conn.inbox_due.set(self.after(after)),
            Effect::Join(id, channel) => return self.join(id, channel),
            Effect::Recover(id, channel, place) => return self.recover(id, &channel, &place),
            Effect::ReadHistory(id, read) => self.shard.read_history(self.conn.key, id, read),
            Effect::Leave(id, channel) => return Some(self.leave(id, &channel)),
            Effect::Publish(id, publish) => self.publish(id, publish),
            Effect::AwaitKeys => return self.shard.await_keys(self.conn.key),
            Effect::Refreshed => drop(self.shard.common.metrics.tokens.refreshes.inc()),
            Effect::ListChannels => return Some(Input::Channels(self.shard.channels_of(self.conn))),
            Effect::EndSubscription(channel, error) => return self.end_subscription(channel, error),
            Effect::Ack { id, epoch, ranges, trace } => {
                self.shard.ack(self.conn, id, epoch, ranges, trace);
            }
            Effect::Fail { id, epoch, failed } => {
                self.shard.fail(self.conn, Some(id), epoch, vec![failed]);
            }
            Effect::Overdue { epoch, failed } => self.shard.fail(self.conn, None, epoch, failed),
            Effect::Close(code, why) => {
                self.flush();
                self.shard.close(self.conn, code, &why, false);
            }
        }
        None
    }

    fn open_session(&mut self, inbox: bool) {
        let machine = self.conn.machine.borrow();
        if inbox {
            let mut users = self.shard.users.borrow_mut();
            users.entry(Rc::clone(machine.user())).or_default().push(self.conn.key.index);
        }
        self.shard.upstream.link.send(LinkRequest::OpenSession {
            conn: self.conn.key,
            user: machine.user().to_string(),
            session: machine.session(),
            inbox,
        });
    }

    fn join(&mut self, id: Option<u64>, channel: String) -> Option<Input> {
        let most = self.shard.common.namespaces.of(&channel).max_subscribers;
        let joined = self.shard.hub.borrow_mut().join_within(most, self.conn.key.index, id, &channel);
        match joined {
            Join::Already => {
                let why = format!("\"{channel}\" is subscribed already on this connection");
                Some(Input::Joined(id, Err(ErrorBody::new(ErrorCode::AlreadySubscribed, why))))
            }
            Join::Full => Some(Input::Joined(id, Err(full(&channel, most)))),
            Join::Member(Top { epoch, offset }) => Some(Input::Joined(
                id,
                Ok(Subscribed { channel, epoch: epoch.to_string(), offset, ..Subscribed::default() }),
            )),
            Join::Waits { ask } => {
                if let Some(name) = ask {
                    self.shard.common.metrics.channels.inc();
                    self.shard.upstream.link.send(LinkRequest::Subscribe(self.shard.number, name));
                }
                None
            }
        }
    }

    pub(super) fn leave(&mut self, id: Option<u64>, channel: &str) -> Input {
        let sought = self.shard.cancel_seek(channel, self.conn.key);
        let left = self.shard.hub.borrow_mut().leave(self.conn.key.index, channel);
        match left {
            Leave::NotSubscribed => {
                let why = format!("\"{channel}\" is not subscribed on this connection");
                Input::Left(id, Err(ErrorBody::new(ErrorCode::NotSubscribed, why)))
            }
            Leave::Left { cancelled, last } => {
                self.shard.forget_channel(last);
                let unconfirmed = sought.is_some() || cancelled.is_some();
                if !unconfirmed && self.shard.watched.get() {
                    self.shard.note(&self.conn.machine.borrow(), Happened::Unsubscribed(channel));
                }
                if unconfirmed {
                    let why = "unsubscribed before the subscription was confirmed";
                    let error = ErrorBody::new(ErrorCode::NotSubscribed, why);
                    let failed = match sought {
                        Some(id) => Input::Recovered(id, Err(error)),
                        None => Input::Joined(cancelled.flatten(), Err(error)),
                    };
                    self.conn.machine.borrow_mut().on(failed, &**self.shard, &mut self.effects);
                    for effect in std::mem::take(&mut self.effects) {
                        self.carry_out(effect);
                    }
                    // The failed subscribe gave its place back already.
                    return Input::LeftUnconfirmed(id);
                }
                Input::Left(id, Ok(()))
            }
        }
    }

    fn publish(&mut self, id: Option<u64>, Publish { channel, payload, dedupe }: Publish) {
        let common = &self.shard.common;
        let message_id = uuid_v7(&*common.clock, &*common.random);
        let trace = spans::publish(message_id, &channel);
        self.shard.milestone(message_id.as_bytes(), "received", String::new());
        self.shard.upstream.link.send(LinkRequest::Publish(Box::new(ClientPublish {
            conn: self.conn.key,
            id,
            channel,
            payload: payload.into(),
            publisher: self.conn.machine.borrow().user().to_string(),
            dedupe_key: dedupe,
            message_id,
            trace,
        })));
    }

    fn push_inbox(&mut self, mut message: InboxMessage) {
        self.pushes.extend(spans::push(&mut message, self.from));
        json::encode_inbox(&message, &mut self.out);
        self.pushed += 1;
        let metrics = &self.shard.common.metrics;
        metrics.inbox_deliveries.inc();
        if matches!(self.from, Origin::Hint) && message.delivery <= 1 {
            self.hinted_us = Some(message.time_us);
        }
        let mut detail = "1 socket".to_owned();
        if message.delivery > 1 {
            metrics.redeliveries.inc();
            detail = format!("1 socket, delivery {}", message.delivery);
        }
        self.shard.milestone(&message.message_id, "written", detail);
        if self.conn.report_due.get() == NEVER {
            self.conn.report_due.set(self.after(REPORT_AFTER));
        }
        self.flush_if_large();
    }

    /// Sends a frame behind the envelopes that came together so far.
    pub fn send_frame(&mut self, frame: &Bytes) {
        self.flush();
        self.shard.deliver(self.conn, frame);
    }

    /// Adds an answer that others get too, but for its id.
    pub(super) fn append(&mut self, id: u64, shared: &[u8]) {
        with_id(id, shared, &mut self.out);
        self.flush_if_large();
    }

    fn flush_if_large(&mut self) {
        if self.out.len() >= MESSAGE_BYTES {
            self.flush();
        }
    }

    /// Sends what came together so far.
    pub fn flush(&mut self) {
        if !self.out.is_empty() {
            let frame = encode(Opcode::Text, &self.out);
            self.out.clear();
            let wrote = self.shard.deliver(self.conn, &frame);
            spans::pushed(&mut self.pushes, wrote);
            if let Some(time_us) = self.hinted_us.take() {
                let common = &self.shard.common;
                common.metrics.inbox_latency.observe(seconds_between(time_us, common.clock.now_us()));
            }
            self.shard.on_handed(self.conn, std::mem::take(&mut self.pushed), wrote);
        }
    }

    /// Ends the turn.
    pub fn end(mut self) {
        self.flush();
        self.shard.schedule(self.conn);
        if self.out.capacity() <= SPARE_BYTES {
            self.shard.spare.replace(self.out);
        }
    }

    fn after(&self, time: Duration) -> u32 {
        Wheel::<ConnKey>::after(self.shard.now(), time)
    }
}

/// Why a channel takes no further subscriber.
pub(super) fn full(channel: &str, most: u32) -> ErrorBody {
    let why = format!("\"{channel}\" has {most} subscribers on this edge, as many as its namespace allows");
    ErrorBody::new(ErrorCode::LimitExceeded, why)
}

/// Which lane a command goes through.
fn needs(command: &Result<Envelope, Refused>) -> Needs {
    match command.as_ref().map(|envelope| &envelope.command) {
        Ok(Command::Ack(_) | Command::Nak(_) | Command::Term(_)) => Needs::Acks,
        Ok(Command::Ping | Command::Working(_) | Command::Credit(_)) | Err(_) => Needs::Nothing,
        Ok(Command::Subscribe(Subscribe { recover: Some(_), .. }) | Command::History(_)) => Needs::Histories,
        Ok(
            Command::Hello(_)
            | Command::Subscribe(_)
            | Command::Unsubscribe(_)
            | Command::Publish(_)
            | Command::Refresh(_),
        ) => Needs::Router,
    }
}

impl<T: Transport> Shard<T> {
    /// Takes the commands that a connection kept, as far as they can be taken now.
    pub fn take_backlog(self: &Rc<Self>, conn: &Rc<Connection<T>>) {
        let mut turn = Turn::new(self, conn);
        loop {
            let next = conn.backlog.borrow_mut().as_mut().and_then(|backlog| backlog.pop_front());
            let Some(command) = next else {
                *conn.backlog.borrow_mut() = None;
                break;
            };
            if !turn.can_take(&command) {
                if let Some(backlog) = &mut *conn.backlog.borrow_mut() {
                    backlog.push_front(command);
                }
                break;
            }
            turn.take(command);
        }
        turn.end();
    }

    /// Whether the first command that a connection kept has room upstream now.
    pub(super) fn could_take(&self, conn: &Connection<T>) -> bool {
        let backlog = conn.backlog.borrow();
        let first = backlog.as_ref().and_then(|backlog| backlog.front());
        first.is_none_or(|command| self.upstream.has_room_for(needs(command)))
    }

    /// Asks delivery for a page of the connection's inbox.
    pub fn read_inbox(&self, conn: &Connection<T>, after: Option<u64>, limit: u32) {
        let machine = conn.machine.borrow();
        let (user, device) = (machine.user().to_string(), machine.device().to_owned());
        self.upstream.reads.send(ReadRequest { conn: conn.key, user, device, after, limit });
    }

    /// An answer of the control runtime to a connection's request.
    pub(super) fn on_answer(self: &Rc<Self>, event: ShardEvent) {
        let (key, input) = match event {
            ShardEvent::SessionOpened(key, result) => (key, Input::SessionOpened(result)),
            ShardEvent::Published(key, id, result) => (key, Input::Published(id, result)),
            ShardEvent::Page(key, page) => (key, Input::Page(page)),
            ShardEvent::Acked(key, id, result) => (key, Input::Acked(id, result)),
            ShardEvent::History(key, id, result) => (key, Input::History(id, result)),
            _ => return,
        };
        if let Some(conn) = self.connection(key) {
            Turn::once(self, &conn, input);
            if conn.has_backlog() {
                conn.wake();
            }
        }
    }

    /// Writes a frame to a connection. What its socket does not take waits. Fan-out closes a connection for
    /// which too much waits; replies and inbox pages are bounded by themselves.
    pub(super) fn deliver(&self, conn: &Connection<T>, frame: &Bytes) -> Wrote {
        let wrote = self.hand_to(conn, frame);
        if wrote != Wrote::Gone {
            self.common.metrics.sent_bytes.inc_by(frame.len() as u64);
        }
        wrote
    }

    /// Like [`Self::deliver`], for a fan-out, which counts its bytes all together.
    pub(super) fn hand_to(&self, conn: &Connection<T>, frame: &Bytes) -> Wrote {
        let wrote = conn.send(frame, self.now());
        if wrote == Wrote::Waits {
            conn.wake();
            self.schedule(conn);
        }
        wrote
    }

    /// Remembers what was seen of a recent message.
    pub(super) fn milestone(&self, message_id: &[u8], stage: &str, detail: String) {
        let mut milestones = self.milestones.borrow_mut();
        if milestones.len() < MAX_MILESTONES {
            milestones.push(Milestone {
                message_id: message_id.to_vec().into(),
                time_us: self.common.clock.now_us(),
                service: "edge".to_owned(),
                stage: stage.to_owned(),
                detail,
            });
        }
    }
}

impl<T: Transport> Surroundings for Shard<T> {
    fn verifier(&self) -> &dyn TokenVerifier {
        &*self.common.verifier
    }

    fn now_s(&self) -> u64 {
        self.common.clock.now_s()
    }

    fn session_id(&self) -> Uuid {
        uuid_v4(&*self.common.random)
    }

    fn fraction(&self) -> f64 {
        fraction(&*self.common.random)
    }

    fn intern(&self, capabilities: Capabilities) -> Rc<Capabilities> {
        let mut known = self.capabilities.borrow_mut();
        if let Some(shared) = known.get(&capabilities) {
            return Rc::clone(shared);
        }
        // Sets that nobody uses any more go when the number of those in use could have doubled.
        if known.len().is_power_of_two() {
            known.retain(|shared| Rc::strong_count(shared) > 1);
        }
        let shared = Rc::new(capabilities);
        known.insert(Rc::clone(&shared));
        shared
    }

    fn terms(&self) -> Terms {
        let config = &self.common.config;
        Terms { heartbeat: config.heartbeat(), reconnect_spread: config.reconnect_spread() }
    }

    fn ack_due(&self) -> Tick {
        Shard::ack_due(self)
    }

    fn namespace(&self, channel: &str) -> Namespace {
        self.common.namespaces.of(channel)
    }

    fn revoked(&self, held: &Held<'_>) -> Option<&'static str> {
        self.is_revoked(held)
    }
}
