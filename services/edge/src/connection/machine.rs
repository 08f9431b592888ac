//! The protocol state of one connection: what happened goes in, what to do comes out.
//!
//! Pure: no socket, no clock and no randomness of its own, so that tests drive it with any sequence of inputs.
//! The shard carries the effects out (`shard/effects.rs`) and feeds the answers back in.

mod answers;
mod channels;
mod control;
mod tokens;

use std::{borrow::Cow, rc::Rc, time::Duration};

use sanjay_proto::{
    client::v1::InboxMessage,
    edge::v1::{FailedAttempt, InboxPage},
};
use sanjay_protocol::{
    CloseCode, Command, ErrorBody, ErrorCode, Event, EventEnvelope,
    command::{Envelope, Hello, Publish},
    event::{Degraded, Empty, InboxState, Limits, Published, Subscribed, Unsubscribed, Welcome},
    json::Refused,
    limits,
    recovery::{History, Position as Place, ReadHistory},
    token::Capabilities,
};
use sanjay_runtime::Namespace;
use uuid::Uuid;

use self::control::More;
use crate::{
    inbox::{Cursor, Position, Step},
    revocations::Held,
    shard::{hub::BY_SERVER, wheel::Tick},
    verifier::TokenVerifier,
};

/// What a machine may ask of its surroundings.
pub trait Surroundings {
    /// Checks tokens.
    fn verifier(&self) -> &dyn TokenVerifier;
    /// Unix seconds.
    fn now_s(&self) -> u64;
    /// A new session id.
    fn session_id(&self) -> Uuid;
    /// Random, in [0, 1).
    fn fraction(&self) -> f64;
    /// One shared copy of equal capabilities: most connections of an edge have the same.
    fn intern(&self, capabilities: Capabilities) -> Rc<Capabilities>;
    /// What `welcome` says of this edge.
    fn terms(&self) -> Terms;
    /// When an ack deadline that begins now ends.
    fn ack_due(&self) -> Tick;
    /// The settings of a channel.
    fn namespace(&self, channel: &str) -> Namespace;
    /// Why a token is refused although it is good: it was revoked.
    fn revoked(&self, _: &Held<'_>) -> Option<&'static str> {
        None
    }
}

/// What `welcome` says of an edge.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// The edge pings after so much silence.
    pub heartbeat: Duration,
    /// First delay after an unexpected close is random up to this.
    pub reconnect_spread: Duration,
}

/// What happened.
#[derive(Debug)]
pub enum Input {
    /// An envelope arrived.
    Command(Envelope),
    /// Something that is no command arrived.
    Refused(Refused),
    /// Answers [`Effect::OpenSession`].
    SessionOpened(Result<(), ErrorBody>),
    /// Answers [`Effect::ReadInbox`].
    Page(Result<InboxPage, ErrorBody>),
    /// Answers [`Effect::Join`].
    Joined(Option<u64>, Result<Subscribed, ErrorBody>),
    /// Answers [`Effect::Recover`]; what was found has been sent.
    Recovered(u64, Result<(), ErrorBody>),
    /// Answers [`Effect::ReadHistory`].
    History(u64, Result<History, ErrorBody>),
    /// Answers [`Effect::Leave`].
    Left(Option<u64>, Result<(), ErrorBody>),
    /// Answers [`Effect::Leave`] of a channel whose subscription had not been confirmed; its `subscribe` was
    /// answered before.
    LeftUnconfirmed(Option<u64>),
    /// A back end ended a subscription; with the id of its `subscribe` when that had no answer yet.
    Unsubscribed(Option<Option<u64>>, Unsubscribed),
    /// Answers [`Effect::Publish`].
    Published(Option<u64>, Result<Published, ErrorBody>),
    /// Answers [`Effect::Ack`] and [`Effect::Fail`] with the same id.
    Acked(Option<u64>, Result<(), ErrorBody>),
    /// A message was committed to the inbox with this epoch, or is to be delivered again.
    Hint(u64, InboxMessage),
    /// Messages of the inbox with this epoch were settled, as ascending ranges.
    Settled(u64, Vec<(u64, u64)>),
    /// The client was alive at this time, and everything that it had sent by then was taken.
    Alive(Tick),
    /// Hints may have been lost.
    Resync,
    /// The time of [`Effect::ArmInbox`] has passed.
    InboxTimer,
    /// Answers [`Effect::AwaitKeys`]: the keys of tokens were looked up, well or not.
    KeysLookedUp,
    /// Answers [`Effect::AwaitKeys`]: too many wait already.
    NoRoomToWait,
    /// The token has ended; without another one the connection is closed after so many seconds.
    TokenEnded {
        /// Seconds until then.
        close_in_s: u64,
    },
    /// Some subscription token has ended.
    GrantsEnded,
    /// Answers [`Effect::ListChannels`].
    Channels(Vec<Rc<str>>),
    /// Answers [`Effect::EndSubscription`]: the subscription was there, and is not any more.
    Ended(String, ErrorBody),
}

/// What to do.
#[derive(Debug, PartialEq)]
pub enum Effect {
    /// Send a reply or a push.
    Send(EventEnvelope),
    /// Send an inbox message.
    PushInbox(InboxMessage),
    /// Register the session; answered by [`Input::SessionOpened`].
    OpenSession {
        /// Whether the session takes part in the user's inbox.
        inbox: bool,
    },
    /// Read the inbox; answered by [`Input::Page`].
    ReadInbox {
        /// Where to begin; `None`: from the mark.
        after: Option<u64>,
        /// Most messages.
        limit: u32,
    },
    /// Call with [`Input::InboxTimer`] after this.
    ArmInbox(Duration),
    /// Subscribe; answered by [`Input::Joined`] with the same id.
    Join(Option<u64>, String),
    /// Subscribe and go on from a place; answered by [`Input::Recovered`] with the same id.
    Recover(u64, String, Place),
    /// Read a part of a channel's history; answered by [`Input::History`] with the same id.
    ReadHistory(u64, ReadHistory),
    /// Unsubscribe; answered by [`Input::Left`] with the same id.
    Leave(Option<u64>, String),
    /// Publish; answered by [`Input::Published`] with the same id.
    Publish(Option<u64>, Publish),
    /// Settle inbox messages; answered by [`Input::Acked`] with the same id.
    Ack {
        /// The command's id.
        id: Option<u64>,
        /// The inbox.
        epoch: u64,
        /// What was pushed and acked.
        ranges: Vec<(u64, u64)>,
        /// What the client returned of the newest one's trace; empty when that is not recorded.
        trace: String,
    },
    /// Have an inbox message delivered again, or given up; answered by [`Input::Acked`] with the same id.
    Fail {
        /// The command's id.
        id: Option<u64>,
        /// The inbox.
        epoch: u64,
        /// What failed.
        failed: FailedAttempt,
    },
    /// The ack deadlines of these deliveries have passed.
    Overdue {
        /// The inbox.
        epoch: u64,
        /// What failed.
        failed: Vec<FailedAttempt>,
    },
    /// End the connection.
    Close(CloseCode, Cow<'static, str>),
    /// Wait until the keys of tokens were looked up; answered by [`Input::KeysLookedUp`] or [`Input::NoRoomToWait`].
    AwaitKeys,
    /// Another token was taken.
    Refreshed,
    /// Say which channels are subscribed; answered by [`Input::Channels`].
    ListChannels,
    /// End a subscription for this reason; answered by [`Input::Ended`] when there was one.
    EndSubscription(String, ErrorBody),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing but `hello` is taken.
    AwaitHello,
    /// The key of the token that `hello` had is being looked up.
    LookingUp,
    /// The session is being registered.
    Registering,
    /// The inbox is being read for the first time.
    Reading,
    /// Everything is taken.
    Ready,
    /// Nothing is taken any more.
    Closed,
}

/// The protocol state of one connection.
pub struct Machine {
    phase: Phase,
    outstanding: u8,
    subscriptions: u16,
    /// No router holds the session.
    without_channels: bool,
    /// The last read of the inbox failed.
    without_inbox: bool,
    /// The token has ended: only another one is waited for.
    expired: bool,
    session: Uuid,
    user: Rc<str>,
    capabilities: Option<Rc<Capabilities>>,
    expires_s: u64,
    /// When the token was made, in Unix seconds; 0 when it does not say.
    issued_s: u64,
    inbox: Option<Box<Cursor>>,
    /// Kept until `welcome`.
    opening: Option<Box<Opening>>,
    /// What of `hello` and the token is rarely given.
    more: Option<Box<More>>,
    /// Of subscription tokens; rarely set.
    #[expect(clippy::box_collection, reason = "a connection pays for a pointer and not for a list")]
    grants: Option<Box<Vec<tokens::Grant>>>,
}

/// What is needed only until `welcome` was sent.
#[derive(Default)]
struct Opening {
    token: Option<String>,
    hello_id: Option<u64>,
    /// Kept while the token's key is looked up.
    hello: Option<Hello>,
}

impl Machine {
    /// A connection that was just upgraded; `token` is the one that the handshake carried.
    #[must_use]
    pub fn new(token: Option<String>, nobody: Rc<str>) -> Self {
        Self {
            phase: Phase::AwaitHello,
            outstanding: 0,
            subscriptions: 0,
            without_channels: false,
            without_inbox: false,
            expired: false,
            session: Uuid::nil(),
            user: nobody,
            capabilities: None,
            expires_s: u64::MAX,
            issued_s: 0,
            inbox: None,
            opening: Some(Box::new(Opening { token, hello_id: None, hello: None })),
            more: None,
            grants: None,
        }
    }

    /// Whether a command can be taken now. Otherwise the connection keeps it, and is not read, until one of
    /// those that are under way is answered.
    #[must_use]
    pub fn takes_commands(&self) -> bool {
        matches!(self.phase, Phase::AwaitHello | Phase::Ready)
            && usize::from(self.outstanding) < limits::MAX_OUTSTANDING_COMMANDS
    }

    /// Whether `hello` was accepted.
    #[must_use]
    pub fn is_identified(&self) -> bool {
        !matches!(self.phase, Phase::AwaitHello | Phase::LookingUp) && !self.session.is_nil()
    }

    /// The session's id; nil before `hello`.
    #[must_use]
    pub fn session(&self) -> Uuid {
        self.session
    }

    /// The user of the token; empty before `hello`.
    #[must_use]
    pub fn user(&self) -> &Rc<str> {
        &self.user
    }

    /// The device that `hello` named.
    #[must_use]
    pub fn device(&self) -> &str {
        self.more.as_ref().map_or("", |more| &more.device)
    }

    /// When the token ends, in Unix seconds.
    #[must_use]
    pub fn expires_s(&self) -> u64 {
        self.expires_s
    }

    /// The inbox of this connection, when it takes part in one.
    #[must_use]
    pub fn inbox(&self) -> Option<&Cursor> {
        self.inbox.as_deref()
    }

    /// The same, for whoever knows what became of its messages.
    #[must_use]
    pub fn inbox_mut(&mut self) -> Option<&mut Cursor> {
        self.inbox.as_deref_mut()
    }

    /// Takes what happened and appends what to do.
    pub fn on(&mut self, input: Input, around: &dyn Surroundings, effects: &mut Vec<Effect>) {
        if self.phase == Phase::Closed {
            return;
        }
        match input {
            Input::Command(Envelope { id, command }) => self.on_command(id, command, around, effects),
            Input::Refused(Refused::Malformed(why)) => self.close(CloseCode::BadFrame, why, effects),
            Input::Refused(Refused::Command { id, error }) if self.phase == Phase::AwaitHello => {
                let _ = id;
                self.close(CloseCode::BadFrame, format!("hello comes first: {}", error.message), effects);
            }
            Input::Refused(Refused::Command { id, error }) => send(id, Event::Error(error), effects),
            Input::SessionOpened(result) => self.on_session_opened(result, effects, around),
            Input::Page(page) => self.on_page(page, around, effects),
            Input::Joined(BY_SERVER, result) => self.on_joined_by_server(result, effects),
            Input::Unsubscribed(cancelled, unsubscribed) => {
                self.on_unsubscribed(cancelled, unsubscribed, effects);
            }
            Input::Joined(id, result) => {
                self.answered();
                if result.is_err() {
                    self.subscriptions = self.subscriptions.saturating_sub(1);
                }
                reply(id, result.map(Event::Subscribed), effects);
            }
            Input::Recovered(id, result) => self.on_recovered(id, result, effects),
            Input::History(id, result) => self.on_history(id, result, effects),
            Input::Left(id, result) => {
                self.answered();
                if result.is_ok() {
                    self.subscriptions = self.subscriptions.saturating_sub(1);
                }
                reply(id, result.map(|()| Event::Ok(Empty {})), effects);
            }
            Input::LeftUnconfirmed(id) => {
                self.answered();
                reply(id, Ok(Event::Ok(Empty {})), effects);
            }
            Input::Published(id, result) => {
                self.answered();
                reply(id, result.map(Event::Published), effects);
            }
            Input::Acked(id, result) => {
                self.answered();
                reply(id, result.map(|()| Event::Ok(Empty {})), effects);
            }
            Input::Hint(epoch, message) => {
                self.with_inbox(around, effects, |cursor, steps| cursor.on_hint(epoch, message, steps));
            }
            Input::Settled(epoch, ranges) => self.on_settled(epoch, &ranges, around, effects),
            Input::Alive(now) => self.on_alive(now, around, effects),
            Input::Resync => self.with_inbox(around, effects, Cursor::resync),
            Input::InboxTimer => self.with_inbox(around, effects, Cursor::on_timer),
            Input::KeysLookedUp => self.on_keys_looked_up(around, effects),
            Input::NoRoomToWait => {
                let why = "too many wait for the keys of their tokens; try again in a few seconds";
                self.close(CloseCode::TryAgainLater, why, effects);
            }
            Input::TokenEnded { close_in_s } => self.on_token_ended(close_in_s, effects),
            Input::GrantsEnded => self.on_grants_ended(around, effects),
            Input::Channels(channels) => self.on_channels(&channels, around, effects),
            Input::Ended(channel, error) => self.on_ended(channel, error, effects),
        }
    }

    /// Ends the connection.
    pub fn close(&mut self, code: CloseCode, why: impl Into<Cow<'static, str>>, effects: &mut Vec<Effect>) {
        if self.phase != Phase::Closed {
            self.phase = Phase::Closed;
            effects.push(Effect::Close(code, why.into()));
        }
    }

    fn on_command(
        &mut self,
        id: Option<u64>,
        command: Command,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        match (self.phase, command) {
            // Without an id it answers a heartbeat: an answer to the answer would go on forever.
            (_, Command::Ping) if id.is_none() => {}
            (_, Command::Ping) => send(id, Event::Ping, effects),
            (Phase::AwaitHello, Command::Hello(hello)) => self.on_hello(id, hello, around, effects),
            (Phase::AwaitHello, _) => {
                self.close(CloseCode::BadFrame, "hello must be the first command", effects)
            }
            (_, Command::Hello(_)) => {
                let error = ErrorBody::new(ErrorCode::BadRequest, "hello was said already; it comes once");
                send(id, Event::Error(error), effects);
            }
            (_, Command::Subscribe(subscribe)) => self.on_subscribe(id, subscribe, around, effects),
            (_, Command::Unsubscribe(unsubscribe)) => {
                self.outstanding += 1;
                self.drop_grant(&unsubscribe.channel);
                effects.push(Effect::Leave(id, unsubscribe.channel));
            }
            (_, Command::Publish(publish)) => self.on_publish(id, publish, around, effects),
            (_, Command::Ack(ack)) => self.on_ack(id, ack, around, effects),
            (_, Command::Nak(nak)) => self.on_nak(id, nak, around, effects),
            (_, Command::Term(term)) => self.on_term(id, term, around, effects),
            (_, Command::Working(working)) => self.on_working(id, working, around, effects),
            (_, Command::History(read)) => self.on_read_history(id, read, around, effects),
            (_, Command::Credit(credit)) => self.on_credit(id, credit, around, effects),
            (_, Command::Refresh(refresh)) => self.on_refresh(id, refresh, around, effects),
        }
    }

    fn on_hello(
        &mut self,
        id: Option<u64>,
        mut hello: Hello,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        let opening = self.opening.get_or_insert_default();
        opening.hello_id = id;
        let Some(token) = hello.token.take().or_else(|| opening.token.take()) else {
            let why =
                "no token: put one in hello, in the Authorization header or in the token query parameter";
            return self.close(CloseCode::Unauthorized, why, effects);
        };
        opening.token = None;
        let verified = around.verifier().verify(&token, around.now_s());
        self.identify(verified, token, hello, around, effects);
    }

    fn on_session_opened(
        &mut self,
        result: Result<(), ErrorBody>,
        effects: &mut Vec<Effect>,
        around: &dyn Surroundings,
    ) {
        let before = std::mem::replace(&mut self.without_channels, result.is_err());
        if self.phase == Phase::Ready && before != self.without_channels {
            self.tell_degraded(None, effects);
        }
        match (self.phase, &self.inbox) {
            // Registered first, read then: a message that is committed in between is hinted or read.
            (Phase::Registering, Some(_)) => {
                self.phase = Phase::Reading;
                self.with_inbox(around, effects, Cursor::resync);
            }
            (Phase::Registering, None) => self.welcome(None, around, effects),
            // Announced again to another router: hints may have been lost in between.
            (Phase::Ready, Some(_)) if !self.without_channels => {
                self.with_inbox(around, effects, Cursor::resync)
            }
            _ => {}
        }
    }

    fn on_page(
        &mut self,
        page: Result<InboxPage, ErrorBody>,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
    ) {
        if let Err(error) = &page
            && error.code == ErrorCode::LimitExceeded
        {
            // There is no room for this device, and none will come in a while.
            return self.close(CloseCode::Forbidden, error.message.clone(), effects);
        }
        let before = std::mem::replace(&mut self.without_inbox, page.is_err());
        if self.phase == Phase::Reading && page.is_err() {
            self.welcome(None, around, effects);
        } else if self.phase == Phase::Ready && before != self.without_inbox && self.knows_inbox() {
            self.tell_degraded(None, effects);
        }
        match page {
            Ok(page) => self.with_inbox(around, effects, |cursor, steps| cursor.on_page(page, steps)),
            Err(_) => {
                let fraction = around.fraction();
                self.with_inbox(around, effects, |cursor, steps| cursor.on_read_failed(fraction, steps));
            }
        }
    }

    /// Calls the cursor and turns its steps into effects.
    fn with_inbox(
        &mut self,
        around: &dyn Surroundings,
        effects: &mut Vec<Effect>,
        call: impl FnOnce(&mut Cursor, &mut Vec<Step>),
    ) {
        let Some(cursor) = self.inbox.as_deref_mut() else { return };
        let mut steps = Vec::new();
        call(cursor, &mut steps);
        for step in steps {
            match step {
                Step::Push(message) => effects.push(Effect::PushInbox(message)),
                Step::Read { after, limit } => effects.push(Effect::ReadInbox { after, limit }),
                Step::Arm(after) => effects.push(Effect::ArmInbox(after)),
                Step::Known(position) if self.phase == Phase::Reading => {
                    self.welcome(Some(state(position)), around, effects);
                }
                Step::Known(position) => self.tell_degraded(Some(state(position)), effects),
            }
        }
    }

    fn welcome(&mut self, inbox: Option<InboxState>, around: &dyn Surroundings, effects: &mut Vec<Effect>) {
        self.phase = Phase::Ready;
        let id = self.opening.take().and_then(|opening| opening.hello_id);
        let terms = around.terms();
        let welcome = Welcome {
            session: self.session.to_string(),
            user: self.user.to_string(),
            features: self.reduced(),
            inbox,
            heartbeat_ms: millis(terms.heartbeat),
            token_ttl_s: self.expires_s.saturating_sub(around.now_s()),
            limits: Limits {
                message_bytes: limits::MAX_CLIENT_MESSAGE_BYTES as u64,
                payload_bytes: limits::MAX_PAYLOAD_BYTES as u64,
                subscriptions: limits::MAX_SUBSCRIPTIONS as u64,
                credit: limits::MAX_CREDIT,
            },
            reconnect_spread_ms: millis(terms.reconnect_spread),
        };
        send(id, Event::Welcome(Box::new(welcome)), effects);
    }

    fn knows_inbox(&self) -> bool {
        self.inbox().is_some_and(|cursor| cursor.epoch().is_some())
    }

    fn tell_degraded(&self, inbox: Option<InboxState>, effects: &mut Vec<Effect>) {
        send(None, Event::Degraded(Degraded { features: self.reduced(), inbox }), effects);
    }

    /// What is reduced for this connection.
    fn reduced(&self) -> Vec<String> {
        let mut features = Vec::new();
        if self.without_channels {
            features.push("channels".to_owned());
        }
        if self.without_inbox {
            features.push("inbox".to_owned());
        }
        features
    }

    fn answered(&mut self) {
        self.outstanding = self.outstanding.saturating_sub(1);
    }
}

fn state(position: Position) -> InboxState {
    InboxState { epoch: format!("{:016x}", position.epoch), mark: position.mark, head: position.head }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn send(id: Option<u64>, event: Event, effects: &mut Vec<Effect>) {
    effects.push(Effect::Send(EventEnvelope { id, event }));
}

/// A command without an id hears only of its failure.
fn reply(id: Option<u64>, result: Result<Event, ErrorBody>, effects: &mut Vec<Effect>) {
    match result {
        Ok(event) if id.is_some() => send(id, event, effects),
        Ok(_) => {}
        Err(error) => send(id, Event::Error(error), effects),
    }
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
