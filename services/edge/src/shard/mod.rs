//! A shard: one thread that owns its connections outright, with a hub, a timing wheel and no locks.

mod answers;
mod control;
pub mod deadlines;
pub mod effects;
mod events;
pub mod fanout;
pub mod hub;
pub mod recovery;
mod seek;
pub mod subscribers;
mod tokens;
pub mod wheel;

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, HashMap, HashSet},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use sanjay_proto::edge::v1::{ConnectionEvents, Milestone};
use sanjay_protocol::{CloseCode, token::Capabilities};
use sanjay_runtime::{SharedClock, SharedNamespaces, SharedRandom, mailbox};
use sanjay_websocket::Transport;
use slab::Slab;
use smallvec::SmallVec;
use tokio::time::Instant;

use self::{
    events::Happened,
    hub::{ConnIndex, Hub},
    recovery::Recovering,
    subscribers::Subscribers,
    wheel::{Tick, Wheel},
};
use crate::{
    Config,
    connection::{Connection, Life, NEVER, machine::Machine},
    metrics::{CloseLabel, Metrics},
    revocations::Revocations,
    upstream::{AckRequest, ConnKey, LinkRequest, ReadRequest, ShardEvent, history::HistoryRead, lane::Lane},
    verifier::TokenVerifier,
};

/// Bytes that are read from a socket at once.
const SCRATCH_BYTES: usize = 16 * 1024;

/// Events taken from the mailbox at once.
const EVENTS_A_TURN: usize = 256;

/// How long a closing connection may take to say goodbye.
const LINGER: Duration = Duration::from_secs(2);

/// What all shards of an edge share.
pub struct Common {
    /// The configuration.
    pub config: Config,
    /// Wall clock.
    pub clock: SharedClock,
    /// Ids and jitter.
    pub random: SharedRandom,
    /// Checks tokens.
    pub verifier: Arc<dyn TokenVerifier>,
    /// What happens here.
    pub metrics: Arc<Metrics>,
    /// What back ends have revoked.
    pub revocations: Revocations,
    /// Connections of all shards.
    pub connections: AtomicUsize,
    /// Settings of channels.
    pub namespaces: SharedNamespaces,
    /// Of channels whose namespace bounds them.
    pub subscribers: Arc<Subscribers>,
}

/// The ways from a shard to the control runtime.
pub struct Upstream {
    /// To the router.
    pub link: Lane<LinkRequest>,
    /// Reads of inboxes.
    pub reads: Lane<ReadRequest>,
    /// Acks of inboxes.
    pub acks: Lane<AckRequest>,
    /// Reads of channels' histories.
    pub histories: Lane<HistoryRead>,
}

impl Upstream {
    /// Whether a command of this kind may be taken: one lane that is full does not hold up the others.
    fn has_room_for(&self, needs: Needs) -> bool {
        match needs {
            Needs::Nothing => true,
            Needs::Router => self.link.has_room(),
            Needs::Acks => self.acks.has_room(),
            Needs::Histories => self.histories.has_room() && self.link.has_room(),
        }
    }

    fn flush(&self) {
        self.link.flush();
        self.reads.flush();
        self.acks.flush();
        self.histories.flush();
    }
}

/// Which lane a command goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    Router,
    Acks,
    Histories,
}

/// One thread's connections. `T`: the sockets.
pub struct Shard<T> {
    /// Its number.
    pub number: u16,
    /// What all shards share.
    pub common: Arc<Common>,
    /// To the control runtime.
    pub upstream: Upstream,
    /// What sockets are read into.
    pub scratch: RefCell<Box<[u8]>>,
    connections: RefCell<Slab<Rc<Connection<T>>>>,
    generation: Cell<u32>,
    hub: RefCell<Hub>,
    /// Channels in which somebody goes on from a position.
    recovering: RefCell<HashMap<Arc<str>, Recovering>>,
    /// Connections that take part in a user's inbox.
    users: RefCell<HashMap<Rc<str>, SmallVec<[ConnIndex; 2]>>>,
    /// Those of `users` of whom the router last said that other sessions take part in the inbox, too.
    shared: RefCell<HashSet<Rc<str>>>,
    wheel: RefCell<Wheel<ConnKey>>,
    now: Cell<Tick>,
    capabilities: RefCell<BTreeSet<Rc<Capabilities>>>,
    milestones: RefCell<Vec<Milestone>>,
    /// Whether somebody watches connections.
    watched: Cell<bool>,
    /// What happened to them meanwhile.
    happened: RefCell<ConnectionEvents>,
    /// Connections whose sessions the new router has not been told of yet.
    announcing: RefCell<Vec<ConnKey>>,
    /// Connections with a backlog, to be looked at again when there is room upstream.
    congested: RefCell<Vec<ConnKey>>,
    /// Connections whose `hello` waits for the key of its token.
    awaiting_keys: RefCell<Vec<ConnKey>>,
    nobody: Rc<str>,
    /// An output buffer to use again.
    spare: RefCell<Vec<u8>>,
}

impl<T: Transport> Shard<T> {
    /// A shard without connections.
    pub fn new(number: u16, common: Arc<Common>, upstream: Upstream) -> Rc<Self> {
        let hub = Hub::new(Arc::clone(&common.subscribers));
        Rc::new(Self {
            number,
            common,
            upstream,
            scratch: RefCell::new(vec![0; SCRATCH_BYTES].into_boxed_slice()),
            connections: RefCell::default(),
            generation: Cell::new(0),
            hub: RefCell::new(hub),
            recovering: RefCell::default(),
            users: RefCell::default(),
            shared: RefCell::default(),
            wheel: RefCell::new(Wheel::new(Instant::now())),
            now: Cell::new(0),
            capabilities: RefCell::default(),
            milestones: RefCell::default(),
            watched: Cell::new(false),
            happened: RefCell::default(),
            announcing: RefCell::default(),
            congested: RefCell::default(),
            awaiting_keys: RefCell::default(),
            nobody: Rc::from(""),
            spare: RefCell::default(),
        })
    }

    /// Handles what the control runtime tells, until it is gone.
    pub async fn run(self: Rc<Self>, mut events: mailbox::Receiver<ShardEvent>) {
        let mut batch = Vec::new();
        while events.recv_many(&mut batch, EVENTS_A_TURN).await > 0 {
            for event in batch.drain(..) {
                self.on_event(event).await;
            }
            self.report_milestones();
            self.report_connections();
        }
    }

    async fn on_event(self: &Rc<Self>, event: ShardEvent) {
        match event {
            ShardEvent::Publication(publication, push) => self.fan_out(&publication, push).await,
            ShardEvent::Gap(channel, epoch, top) => self.on_gap(&channel, &epoch, top).await,
            ShardEvent::Subscribed(channel, result) => self.on_subscribed(&channel, result).await,
            ShardEvent::Found(channel, since, from, found) => self.on_found(&channel, &since, from, found),
            ShardEvent::Hint(hint) => self.on_hint(&hint),
            ShardEvent::Resync => self.resync().await,
            ShardEvent::Attached => self.announce(),
            ShardEvent::Away => self.tell_away().await,
            ShardEvent::Drain => self.drain().await,
            ShardEvent::Ask(question, answer) => {
                // Who asks has a place for each shard, or has gone.
                let _gone = answer.try_send(self.on_ask(&question).await);
            }
            ShardEvent::Revoked => self.check_revoked().await,
            ShardEvent::Watch(on) => self.watched.set(on),
            ShardEvent::KeysLookedUp => self.on_keys().await,
            ShardEvent::SessionOpened(..)
            | ShardEvent::Published(..)
            | ShardEvent::Page(..)
            | ShardEvent::History(..)
            | ShardEvent::Acked(..) => self.on_answer(event),
        }
    }

    /// Takes in a socket that was just upgraded; `token` is the one that its handshake carried.
    pub fn add(&self, io: T, token: Option<String>) -> Rc<Connection<T>> {
        let generation = self.generation.get().wrapping_add(1);
        self.generation.set(generation);
        let mut connections = self.connections.borrow_mut();
        let entry = connections.vacant_entry();
        let index = u32::try_from(entry.key()).expect("fewer than 2³² sockets fit a process");
        let key = ConnKey { shard: self.number, index, generation };
        let machine = Machine::new(token, Rc::clone(&self.nobody));
        let conn = Rc::new(Connection::new(key, io, machine, self.now()));
        entry.insert(Rc::clone(&conn));
        self.common.metrics.connections.inc();
        drop(connections);
        self.schedule(&conn);
        conn
    }

    /// Forgets a connection that has ended.
    pub fn remove(&self, conn: &Connection<T>) {
        let index = conn.key.index;
        if self.connections.borrow_mut().try_remove(index as usize).is_none() {
            return;
        }
        let metrics = &self.common.metrics;
        metrics.connections.dec();
        metrics.closed.get_or_create(&CloseLabel { code: conn.close_code.get() }).inc();
        self.common.connections.fetch_sub(1, Ordering::Relaxed);
        let before = self.hub.borrow().channel_count();
        for channel in self.hub.borrow_mut().leave_all(index) {
            self.recovering.borrow_mut().remove(&channel);
            self.upstream.link.send(LinkRequest::Unsubscribe(self.number, channel));
        }
        metrics.channels.dec_by((before - self.hub.borrow().channel_count()) as i64);
        let machine = conn.machine.borrow();
        if machine.is_identified() {
            if self.watched.get() && machine.was_welcomed() {
                self.note(&machine, Happened::Offline(conn.close_code.get()));
            }
            if machine.inbox().is_some() {
                self.forget_user(machine.user(), index);
            }
            let (user, session) = (machine.user().to_string(), machine.session());
            self.upstream.link.send(LinkRequest::CloseSession { user, session });
        }
    }

    fn forget_user(&self, user: &Rc<str>, index: ConnIndex) {
        let mut users = self.users.borrow_mut();
        if let Some(connections) = users.get_mut(user) {
            connections.retain(|other| *other != index);
            if connections.is_empty() {
                users.remove(user);
                self.shared.borrow_mut().remove(user);
            }
        }
    }

    /// Whether another session may have in flight what this user's has.
    fn is_shared(&self, user: &Rc<str>) -> bool {
        self.shared.borrow().contains(user)
            || self.users.borrow().get(user).is_some_and(|here| here.len() > 1)
    }

    /// Whether no connection is left.
    pub fn is_empty(&self) -> bool {
        self.connections.borrow().is_empty()
    }

    /// Sends a close frame, behind what waits or, with `at_once`, instead of it.
    pub fn close(&self, conn: &Connection<T>, code: CloseCode, why: &str, at_once: bool) {
        if conn.life.get() == Life::Open {
            tracing::debug!(code = code.code(), why, session = %conn.machine.borrow().session(), "closing");
        }
        conn.close(code, why, at_once, self.now(), self.linger());
        self.schedule(conn);
    }

    /// When a connection that begins to close now is dropped.
    pub fn linger(&self) -> Tick {
        Wheel::<ConnKey>::after(self.now(), LINGER)
    }

    /// Coarse time; moved on by the shard's ticker.
    pub fn now(&self) -> Tick {
        self.now.get()
    }

    /// The connection with this key, unless it has ended.
    fn connection(&self, key: ConnKey) -> Option<Rc<Connection<T>>> {
        let connections = self.connections.borrow();
        connections.get(key.index as usize).filter(|conn| conn.key == key).cloned()
    }

    fn at(&self, index: ConnIndex) -> Option<Rc<Connection<T>>> {
        self.connections.borrow().get(index as usize).cloned()
    }

    /// Every connection, now.
    fn all(&self) -> Vec<ConnKey> {
        self.connections.borrow().iter().map(|(_, conn)| conn.key).collect()
    }

    /// Has another look at the connections that wait for room upstream.
    fn relieve(&self) {
        self.upstream.flush();
        for key in self.congested.take() {
            if let Some(conn) = self.connection(key) {
                conn.waits_for_room.set(false);
                if self.could_take(&conn) {
                    conn.wake();
                } else {
                    self.wait_for_room(&conn);
                }
            }
        }
    }

    /// Looks at the connection again when there is room upstream.
    fn wait_for_room(&self, conn: &Connection<T>) {
        if !conn.waits_for_room.replace(true) {
            self.congested.borrow_mut().push(conn.key);
        }
    }

    fn report_milestones(&self) {
        let milestones = self.milestones.take();
        if !milestones.is_empty() {
            self.upstream.link.send_or_drop(LinkRequest::Milestones(milestones));
        }
    }

    /// Has a deadline of the connection looked at, when it comes before what is in the wheel.
    fn schedule(&self, conn: &Connection<T>) {
        let next = self.next_deadline(conn);
        if next < conn.scheduled.get() && next != NEVER {
            // The entry that is overtaken stays in the wheel, and serves when the nearer one was handed out: a
            // timer of milliseconds does not leave another heartbeat entry behind each time.
            conn.later.set(conn.later.get().min(conn.scheduled.get()));
            let mut wheel = self.wheel.borrow_mut();
            conn.scheduled.set(wheel.insert(next, conn.key));
        }
    }
}
