//! One edge's stream: takes its events in order, answers them, and leaves nothing behind when it ends.

use std::{
    collections::{HashMap, HashSet},
    fmt::Display,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures::{Stream, StreamExt};
use sanjay_proto::{
    LINK_VERSION,
    edge::v1::{
        AttachRequest, EdgeEvent, EdgeHello, LinkError, Publish, Published, RouterHello, SessionOpened,
        edge_event, router_event::Event,
    },
    router::v1::NewPublication,
};
use sanjay_protocol::names::{self, NameError};
use sanjay_runtime::{Lifecycle, MilestoneRing};

use crate::{
    asks::Asks,
    downlink::{Downlink, End},
    errors::link_error,
    fanout::Fanout,
    leases::sweep_after,
    metrics::Metrics,
    outage::Outage,
    publish::Publisher,
    registry::{Assigned, EdgeRef, Registry, RegistryError, SessionId, UserSession},
    subscriptions::{Subscriptions, refusal},
    watchers::Watchers,
    writer::Writer,
};

/// Events of one kind that are handled together.
const RUN: usize = 512;

/// Leases that an edge has, after it attached anew, to announce the sessions that it still holds.
const ANNOUNCE_LEASES: u32 = 6;

/// What every stream needs.
pub(crate) struct Links {
    pub(crate) fanout: Arc<Fanout>,
    pub(crate) subscriptions: Subscriptions,
    pub(crate) asks: Arc<Asks>,
    pub(crate) watchers: Arc<Watchers>,
    pub(crate) registry: Arc<dyn Registry>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) milestones: Arc<MilestoneRing>,
    pub(crate) metrics: Metrics,
    pub(crate) lifecycle: Lifecycle,
    pub(crate) router: Arc<str>,
    pub(crate) incarnation: u64,
    pub(crate) limits: LinkLimits,
    /// Of closing sessions.
    pub(crate) closing: Outage,
}

/// Bounds of a stream.
pub(crate) struct LinkLimits {
    pub(crate) mailbox: usize,
    pub(crate) channels: usize,
    pub(crate) sessions: usize,
    pub(crate) lease: Duration,
}

/// Why a stream could not begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AttachError {
    /// The two do not speak the same protocol.
    #[error(
        "the edge speaks link version {edge}, this router version {LINK_VERSION}; run builds that share one"
    )]
    Version {
        /// What the edge speaks.
        edge: u32,
    },
    /// The edge's name is no name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The registry would not take the edge.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// No new streams.
    #[error("this router is shutting down; attach to another")]
    Shutdown,
}

/// Why one event was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EventError {
    /// The channel or user has a bad name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Not a UUID.
    #[error("session has {0} bytes; it needs the 16 bytes of a UUID")]
    Session(usize),
    /// The edge holds as many channels as it may.
    #[error("the edge holds its {0} channels; unsubscribe some, or raise router.max_channels_per_edge")]
    TooManyChannels(usize),
    /// The edge holds as many sessions as it may.
    #[error("the edge holds its {0} sessions; close some, or raise router.max_sessions_per_edge")]
    TooManySessions(usize),
    /// The registry would not.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl Links {
    /// Begins the stream of an edge: what it sends is to be given to [`Link::run`], the writer is the answer.
    pub(crate) async fn open(self: &Arc<Self>, hello: EdgeHello) -> Result<(Link, Writer), AttachError> {
        if hello.version != LINK_VERSION {
            return Err(AttachError::Version { edge: hello.version });
        }
        names::check("hello.edge_id", &hello.edge_id)?;
        if self.lifecycle.is_shutting_down() {
            return Err(AttachError::Shutdown);
        }
        let edge = EdgeRef { id: hello.edge_id.into(), incarnation: hello.incarnation };
        let attachment = self.registry.attach(&edge, &self.router).await?;
        let (downlink, receiver) = Downlink::new(attachment, self.limits.mailbox, self.metrics.clone());
        self.fanout.attach(&downlink);
        self.asks.came(&downlink.attachment.edge);
        self.watchers.came(&downlink);
        tracing::info!(edge = %edge.id, incarnation = edge.incarnation, build = hello.build, "edge attached");
        let answer = RouterHello {
            version: LINK_VERSION,
            build: env!("CARGO_PKG_VERSION").into(),
            router_id: self.router.to_string(),
            incarnation: self.incarnation,
            lease_ms: u32::try_from(self.limits.lease.as_millis()).unwrap_or(u32::MAX),
        };
        let writer = Writer::new(answer, Arc::clone(&downlink), receiver);
        let link = Link {
            shared: Arc::clone(self),
            downlink,
            channels: HashSet::new(),
            sessions: HashMap::new(),
            run: Run::default(),
        };
        Ok((link, writer))
    }
}

/// The receiving side of one edge's stream.
pub(crate) struct Link {
    shared: Arc<Links>,
    downlink: Arc<Downlink>,
    channels: HashSet<Arc<str>>,
    /// With their users.
    sessions: HashMap<SessionId, Arc<str>>,
    run: Run,
}

/// Events of one kind that came one after another, at most [`RUN`] of them.
#[derive(Default)]
struct Run {
    kind: Option<Kind>,
    channels: Vec<Arc<str>>,
    sessions: Vec<UserSession>,
    publishes: Vec<Publish>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Subscribe,
    Unsubscribe,
    Open,
    Close,
    Publish,
}

impl Link {
    /// Handles `first` and then what comes until the stream ends, is replaced, or the router shuts down;
    /// then takes everything back that the edge held here. Its sessions are kept for the lease.
    pub(crate) async fn run<E: Display>(
        mut self,
        first: Vec<EdgeEvent>,
        requests: impl Stream<Item = Result<AttachRequest, E>>,
    ) {
        let sweeper = self.sweep_unannounced();
        self.shared.lifecycle.spawn("edge link sweep", sweeper);
        let end = self.receive(first, requests).await;
        self.close(end).await;
    }

    async fn receive<E: Display>(
        &mut self,
        first: Vec<EdgeEvent>,
        requests: impl Stream<Item = Result<AttachRequest, E>>,
    ) -> End {
        let mut requests = std::pin::pin!(requests);
        let soft = self.shared.lifecycle.soft();
        let ended = self.downlink.ended.clone();
        self.handle(first).await;
        loop {
            // Only the wait for input is cut short: an event is handled to its end.
            let request = tokio::select! {
                () = ended.cancelled() => return End::Edge,
                () = soft.cancelled() => return End::Shutdown,
                request = requests.next() => request,
            };
            match request {
                None => return End::Edge,
                Some(Err(error)) => {
                    tracing::debug!(edge = %self.edge(), %error, "the edge's stream broke");
                    return End::Edge;
                }
                Some(Ok(AttachRequest { hello: Some(_), .. })) => {
                    return End::Protocol("only the first message may carry hello".into());
                }
                Some(Ok(AttachRequest { events, .. })) => self.handle(events).await,
            }
        }
    }

    fn edge(&self) -> &str {
        &self.downlink.attachment.edge.id
    }

    async fn handle(&mut self, events: Vec<EdgeEvent>) {
        for event in events {
            // A newer edge may send events that this build does not know.
            let Some(event) = event.event else { continue };
            self.add(event).await;
        }
        self.finish_run().await;
    }

    /// Adds an event to the run; finishes the run before when it is of another kind.
    async fn add(&mut self, event: edge_event::Event) {
        if let Some(kind) = Kind::of(&event) {
            if self.run.kind.is_some_and(|running| running != kind) || self.run.len() >= RUN {
                self.finish_run().await;
            }
            self.run.kind = Some(kind);
        }
        let refused = match event {
            edge_event::Event::Subscribe(event) => {
                let refused = self.add_subscribe(&event.channel).await.err();
                refused.map(|error| refusal(&event.channel, Some(link_error(&error))))
            }
            edge_event::Event::Unsubscribe(event) => {
                self.run.channels.extend(self.channels.take(event.channel.as_str()));
                None
            }
            edge_event::Event::OpenSession(event) => {
                let refused = self.add_session(&event.user, &event.session, event.inbox).err();
                refused.map(|error| opened(event.session, Some(link_error(&error))))
            }
            edge_event::Event::CloseSession(event) => {
                if let Ok(session) = user_session(&event.user, &event.session, false) {
                    self.sessions.remove(&session.session);
                    self.run.sessions.push(session);
                }
                None
            }
            edge_event::Event::Publish(event) => {
                self.run.publishes.push(event);
                None
            }
            edge_event::Event::Milestones(event) => {
                self.shared.milestones.absorb(event.milestones);
                None
            }
            edge_event::Event::ConnectionEvents(events) => {
                self.shared.watchers.tell(self.edge(), events);
                None
            }
            edge_event::Event::Answered(event) => {
                self.shared.asks.answered(event.request, event.answer.unwrap_or_default());
                None
            }
        };
        if let Some(refusal) = refused
            && self.reserve(1).await
        {
            self.downlink.reply(refusal);
        }
    }

    async fn add_subscribe(&mut self, channel: &str) -> Result<(), EventError> {
        names::check("channel", channel)?;
        let channel: Arc<str> = match self.channels.get(channel) {
            Some(held) => {
                let held = Arc::clone(held);
                // It may be in this very run, where a channel stands once.
                self.finish_run().await;
                self.run.kind = Some(Kind::Subscribe);
                held
            }
            None if self.channels.len() >= self.shared.limits.channels => {
                return Err(EventError::TooManyChannels(self.shared.limits.channels));
            }
            None => channel.into(),
        };
        self.channels.insert(Arc::clone(&channel));
        self.run.channels.push(channel);
        Ok(())
    }

    fn add_session(&mut self, user: &str, session: &[u8], inbox: bool) -> Result<(), EventError> {
        let session = user_session(user, session, inbox)?;
        let limit = self.shared.limits.sessions;
        if self.sessions.len() >= limit && !self.sessions.contains_key(&session.session) {
            return Err(EventError::TooManySessions(limit));
        }
        self.sessions.insert(session.session, Arc::clone(&session.user));
        self.run.sessions.push(session);
        Ok(())
    }

    /// Waits until there is room for replies. False when the stream ended, or when the router shuts down
    /// before the edge reads what waits.
    async fn reserve(&self, replies: usize) -> bool {
        let soft = self.shared.lifecycle.soft();
        tokio::select! {
            biased;
            reserved = self.downlink.reserve(replies) => reserved,
            () = soft.cancelled() => false,
        }
    }

    /// Carries out the run.
    async fn finish_run(&mut self) {
        let run = std::mem::take(&mut self.run);
        let (Some(kind), true) = (run.kind, run.len() > 0) else { return };
        let answered = matches!(kind, Kind::Subscribe | Kind::Open | Kind::Publish);
        if answered && !self.reserve(run.len()).await {
            return;
        }
        let shared = Arc::clone(&self.shared);
        match kind {
            Kind::Subscribe => {
                for failed in shared.subscriptions.subscribe(&self.downlink, run.channels).await {
                    self.channels.remove(&failed);
                }
            }
            Kind::Unsubscribe => shared.subscriptions.unsubscribe(&self.downlink, &run.channels).await,
            Kind::Open => self.open_sessions(run.sessions).await,
            Kind::Close => self.close_sessions(&run.sessions).await,
            Kind::Publish => self.publish(run.publishes).await,
        }
        self.downlink.sessions.store(self.sessions.len(), Ordering::Relaxed);
    }

    async fn open_sessions(&mut self, sessions: Vec<UserSession>) {
        let answers = self.shared.registry.open_sessions(&self.downlink.attachment, &sessions).await;
        for (session, answer) in sessions.into_iter().zip(answers) {
            if matches!(answer, Err(RegistryError::Superseded { .. })) {
                self.downlink.end(End::Superseded);
            }
            let error = answer.err().map(|error| link_error(&error));
            if error.is_some() {
                self.sessions.remove(&session.session);
            }
            self.downlink.reply(opened(session.session.to_vec().into(), error));
        }
    }

    async fn close_sessions(&self, sessions: &[UserSession]) {
        let closing = &self.shared.closing;
        match self.shared.registry.close_sessions(&self.downlink.attachment, sessions).await {
            Ok(()) => {
                if closing.ends() {
                    tracing::info!("sessions are closed again");
                }
            }
            // They are found again by the sweep after the edge's next attachment.
            Err(error) => {
                if closing.begins() {
                    tracing::warn!(%error, "could not close sessions");
                }
            }
        }
    }

    async fn publish(&mut self, publishes: Vec<Publish>) {
        let requests: Vec<_> = publishes.iter().map(|publish| publish.request).collect();
        let publications = publishes.into_iter().map(new_publication).collect();
        let answers = self.shared.publisher.publish(publications).await;
        for (request, answer) in requests.into_iter().zip(answers) {
            let answer = answer.map_err(|error| link_error(&error));
            let published = match answer {
                Ok(assigned) => published(request, assigned),
                Err(error) => Published { request, error: Some(error), ..Published::default() },
            };
            self.downlink.reply(Event::Published(published));
        }
    }

    /// Takes back what the edge held here.
    async fn close(self, end: End) {
        let Link { shared, downlink, channels, sessions, .. } = self;
        downlink.end(end);
        let reason = downlink.reason().cloned();
        let attachment = &downlink.attachment;
        let edge = &attachment.edge;
        tracing::info!(edge = %edge.id, incarnation = edge.incarnation, ?reason, "edge detached");
        shared.fanout.detach(&downlink);
        if !sessions.is_empty() {
            shared.asks.went(edge);
        }
        let channels: Vec<_> = channels.into_iter().collect();
        for run in channels.chunks(RUN) {
            shared.subscriptions.unsubscribe(&downlink, run).await;
        }
        if let Err(error) = shared.registry.detach(attachment).await {
            tracing::warn!(%error, edge = %attachment.edge.id, "could not record that an edge is away");
        }
        let attachment = attachment.clone();
        let lifecycle = shared.lifecycle.clone();
        lifecycle.spawn("edge lease", async move {
            // A router that ends leaves the sweep to those that stay.
            let soft = shared.lifecycle.soft();
            let lease = shared.limits.lease;
            let sweep = sweep_after(lease, lease, &*shared.registry, &attachment);
            // Nobody vouched for them: the edge came back nowhere.
            if soft.run_until_cancelled(sweep).await.is_some_and(|swept| swept > 0) {
                shared.watchers.gone(&attachment.edge.id, sessions);
            }
        });
    }

    /// Sessions from before that the edge no longer has are never closed by it: drops them when it had time
    /// to announce those that it still has.
    fn sweep_unannounced(&self) -> impl Future<Output = ()> + Send + 'static {
        let shared = Arc::clone(&self.shared);
        let downlink = Arc::clone(&self.downlink);
        async move {
            let soft = shared.lifecycle.soft();
            let lease = shared.limits.lease;
            let sweep = sweep_after(lease * ANNOUNCE_LEASES, lease, &*shared.registry, &downlink.attachment);
            tokio::select! {
                () = downlink.ended.cancelled() => {}
                () = soft.cancelled() => {}
                _ = sweep => {}
            }
        }
    }
}

impl Run {
    fn len(&self) -> usize {
        self.channels.len() + self.sessions.len() + self.publishes.len()
    }
}

impl Kind {
    /// What must be kept in order with other events; nothing for events that need no order.
    fn of(event: &edge_event::Event) -> Option<Self> {
        match event {
            edge_event::Event::Subscribe(_) => Some(Kind::Subscribe),
            edge_event::Event::Unsubscribe(_) => Some(Kind::Unsubscribe),
            edge_event::Event::OpenSession(_) => Some(Kind::Open),
            edge_event::Event::CloseSession(_) => Some(Kind::Close),
            edge_event::Event::Publish(_) => Some(Kind::Publish),
            edge_event::Event::Milestones(_)
            | edge_event::Event::Answered(_)
            | edge_event::Event::ConnectionEvents(_) => None,
        }
    }
}

fn user_session(user: &str, session: &[u8], inbox: bool) -> Result<UserSession, EventError> {
    names::check("user", user)?;
    let session = session.try_into().map_err(|_| EventError::Session(session.len()))?;
    Ok(UserSession { user: user.into(), session, inbox })
}

fn opened(session: prost::bytes::Bytes, error: Option<LinkError>) -> Event {
    Event::SessionOpened(SessionOpened { session, error })
}

fn published(request: u64, assigned: Assigned) -> Published {
    Published {
        request,
        epoch: assigned.at.epoch.to_string(),
        offset: assigned.at.offset,
        message_id: assigned.message_id,
        error: None,
    }
}

fn new_publication(publish: Publish) -> NewPublication {
    NewPublication {
        channel: publish.channel,
        payload: publish.payload,
        publisher: publish.publisher,
        dedupe_key: publish.dedupe_key,
        message_id: publish.message_id,
        trace: publish.trace,
    }
}
