//! The stream to a router: announces what the shards hold, hands out what arrives, attaches again, to whichever
//! router serves, when it ends.

use std::{
    collections::{HashMap, VecDeque},
    convert::Infallible,
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use prost::Message as _;
use sanjay_proto::{
    LINK_VERSION,
    edge::v1::{
        self as pb, Answered, AttachRequest, AttachResponse, EdgeEvent, EdgeHello, edge_event, router_event,
    },
};
use sanjay_protocol::{ErrorBody, ErrorCode, event::Published, json};
use sanjay_runtime::{ReadinessFlag, SharedRandom, grpc::PeerPool};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use tonic::{Code, Streaming};

use super::{
    ConnKey, LinkRequest, ShardEvent,
    ask::Asker,
    search::{Ended, Fruitless, Search, attach, problem},
    shards::{Shards, shards_of},
};
use crate::metrics::Metrics;

/// How long requests wait for another router before they are refused: attaching usually takes milliseconds.
const GRACE: Duration = Duration::from_millis(500);

/// Events that wait for the stream. While so many do, no more requests are taken from the shards. A new stream
/// begins with one event for each channel that is held, whatever their number.
const MAX_WAITING: usize = 8_192;

/// Most events in one message.
const MAX_BATCH: usize = 512;

/// Most bytes in one message, unless its first event alone is larger: well below what a router takes.
const MAX_BATCH_BYTES: usize = 1024 * 1024;

/// Sessions that wait for the router's answer before no more requests are taken: behind the announcement of very
/// many, what clients ask for waits no longer than these take.
const MAX_OPENING: usize = 2_048;

/// How often the shards are offered what they missed, while they missed something.
const FLUSH_EVERY: Duration = Duration::from_millis(20);

/// What the task needs.
pub struct Parts {
    /// Name of this edge.
    pub node: String,
    /// Of this start of the process.
    pub incarnation: u64,
    /// The routers, one of which is attached to.
    pub routers: PeerPool,
    /// From the shards.
    pub requests: mpsc::Receiver<LinkRequest>,
    /// To the shards.
    pub shards: Shards,
    /// Jitter.
    pub random: SharedRandom,
    /// Set while attached.
    pub ready: ReadinessFlag,
    /// What happens here.
    pub metrics: Arc<Metrics>,
    /// Asks the shards what back ends want to know.
    pub asker: (Asker, mpsc::Receiver<Answered>),
}

/// The task: never ends by itself.
pub async fn run(parts: Parts) {
    let Parts { node, incarnation, routers, mut requests, shards, random, ready, metrics, asker } = parts;
    let (asker, answers) = asker;
    let (routes, waiting, asked) = (HashMap::new(), VecDeque::new(), Asked::default());
    let mut state = State { shards, routes, waiting, asked, asker, answers };
    let mut search = Search::new(routers.clone(), random);
    let mut told_away = false;
    state.refusing(&mut requests, GRACE, routers.settled()).await;
    loop {
        let grace = |told_away| if told_away { Duration::ZERO } else { GRACE };
        let router = match search.next() {
            Ok(router) => router,
            Err(Fruitless { why, pause, attempt }) => {
                if let Some(why) = why {
                    // A router that is only restarted is back by now; clients need not hear of that.
                    if !std::mem::replace(&mut told_away, true) {
                        state.shards.replies().tell_all(|| ShardEvent::Away);
                    }
                    let setting = routers.setting();
                    tracing::warn!(
                        why,
                        attempt,
                        setting,
                        "cannot attach to a router; check that one runs and the setting names it"
                    );
                }
                state.refusing(&mut requests, grace(told_away), sleep(pause)).await;
                continue;
            }
        };
        let hello = EdgeHello {
            version: LINK_VERSION,
            build: env!("CARGO_PKG_VERSION").to_owned(),
            edge_id: node.clone(),
            incarnation,
        };
        let attached =
            state.refusing(&mut requests, grace(told_away), attach(router.channel(0), hello)).await;
        match attached {
            Ok((outbound, inbound, hello)) => {
                let (id, incarnation) = (hello.router_id, hello.incarnation);
                tracing::info!(router = id, endpoint = %router, incarnation, "attached to a router");
                search.attached(&router);
                ready.set(true);
                metrics.set_attached(true);
                told_away = false;
                let began = Instant::now();
                state.announce();
                let lost = routers.until_lost(&router);
                let ended = state.serve(&mut requests, outbound, inbound, lost).await;
                state.detached();
                ready.set(false);
                metrics.set_attached(false);
                let why = &ended.why;
                tracing::warn!(why, endpoint = %router, "the stream to the router ended; attaching again");
                search.ended(router, &ended, began.elapsed());
            }
            Err(why) => {
                tracing::debug!(why, endpoint = %router, "a router did not take the edge");
                search.refused(router, &why);
            }
        }
        if requests.is_closed() && requests.is_empty() {
            return;
        }
    }
}

/// What the edge holds, seen from the control runtime.
struct State {
    shards: Shards,
    routes: HashMap<Arc<str>, Route>,
    /// Events that go out with the next message.
    waiting: VecDeque<EdgeEvent>,
    asked: Asked,
    asker: Asker,
    /// What the shards say to it.
    answers: mpsc::Receiver<Answered>,
}

/// A channel that some shard holds.
struct Route {
    /// Bit n: shard n.
    mask: u64,
    /// Epoch and newest offset, once the router confirmed the subscription on this stream.
    live: Option<(Arc<str>, u64)>,
}

/// Requests that wait for the router's answer.
#[derive(Default)]
struct Asked {
    next: u64,
    publishes: HashMap<u64, (ConnKey, Option<u64>)>,
    sessions: HashMap<Vec<u8>, ConnKey>,
}

impl State {
    /// Moves events both ways until the stream ends, or its router is `lost`; says why it did.
    async fn serve(
        &mut self,
        requests: &mut mpsc::Receiver<LinkRequest>,
        outbound: mpsc::Sender<AttachRequest>,
        mut inbound: Streaming<AttachResponse>,
        lost: impl Future<Output = Arc<str>>,
    ) -> Ended {
        let mut lost = pin!(lost);
        let mut batch = Vec::new();
        let mut flush = tokio::time::interval(FLUSH_EVERY);
        flush.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let room = match self.asked.sessions.len() {
                opening if opening >= MAX_OPENING => 0,
                _ => MAX_WAITING.saturating_sub(self.waiting.len()).min(MAX_BATCH),
            };
            tokio::select! {
                permit = outbound.reserve(), if !self.waiting.is_empty() => {
                    let Ok(permit) = permit else { return Ended::because("the router closed the stream") };
                    permit.send(AttachRequest { hello: None, events: self.next_batch() });
                }
                count = requests.recv_many(&mut batch, room), if room > 0 => {
                    if count == 0 {
                        return Ended::because("the edge shuts down");
                    }
                    batch.drain(..).for_each(|request| self.on_request(request));
                }
                // To a question of an earlier stream it is an answer that nobody waits for.
                Some(answered) = self.answers.recv() => self.send(edge_event::Event::Answered(answered)),
                message = inbound.next() => match message {
                    Some(Ok(AttachResponse { events, .. })) => {
                        events.into_iter().filter_map(|event| event.event).for_each(|event| self.on_event(event));
                    }
                    Some(Err(status)) => return ended(&status),
                    None => return Ended::because("the router ended the stream"),
                },
                _ = flush.tick(), if self.shards.has_marks() => self.shards.flush(),
                why = &mut lost => return Ended::because(format!("another router serves, and this one does not: {why}")),
            }
        }
    }

    /// The events of the next message, at least one.
    fn next_batch(&mut self) -> Vec<EdgeEvent> {
        let mut bytes = 0;
        let fits = self.waiting.iter().take(MAX_BATCH).take_while(|event| {
            bytes += event.encoded_len();
            bytes <= MAX_BATCH_BYTES
        });
        let count = fits.count().max(1);
        self.waiting.drain(..count).collect()
    }

    /// Between streams: waits for `work`. Requests wait with it for a grace, and are refused from then on.
    async fn refusing<T>(
        &mut self,
        requests: &mut mpsc::Receiver<LinkRequest>,
        grace: Duration,
        work: impl Future<Output = T>,
    ) -> T {
        let refusing = async {
            sleep(grace).await;
            self.refuse(requests).await
        };
        tokio::select! {
            biased;
            done = work => done,
            never = refusing => match never {},
        }
    }

    /// What needs the router is refused or waits for the next stream.
    async fn refuse(&mut self, requests: &mut mpsc::Receiver<LinkRequest>) -> Infallible {
        while let Some(request) = requests.recv().await {
            match request {
                LinkRequest::OpenSession { conn, .. } => {
                    self.shards.replies().reply(conn, ShardEvent::SessionOpened(conn, Err(away())));
                }
                LinkRequest::Publish(publish) => {
                    let event = ShardEvent::Published(publish.conn, publish.id, Err(away()));
                    self.shards.replies().reply(publish.conn, event);
                }
                LinkRequest::Subscribe(shard, name) => {
                    self.shards.replies().tell(shard, ShardEvent::Subscribed(name, Err(away())));
                }
                LinkRequest::Unsubscribe(..) => self.on_request(request),
                // The router knows nothing of them until it is announced again.
                LinkRequest::CloseSession { .. }
                | LinkRequest::Milestones(_)
                | LinkRequest::Connections(_) => {}
            }
            self.waiting.clear();
        }
        std::future::pending().await
    }

    /// A stream begins: everything that is held is announced.
    fn announce(&mut self) {
        self.waiting.clear();
        let channels = self.routes.keys().map(|name| subscribe(name));
        self.waiting.extend(channels);
        self.shards.replies().tell_all(|| ShardEvent::Attached);
    }

    /// A stream ended: what was asked gets no answer any more. Channels that were confirmed once are announced
    /// again; shards give up those for which nobody but refused subscribers is left.
    fn detached(&mut self) {
        self.shards.replies().tell_all(|| ShardEvent::Watch(false));
        for (name, route) in &mut self.routes {
            if route.live.take().is_none() {
                for shard in shards_of(route.mask) {
                    let refused = ShardEvent::Subscribed(Arc::clone(name), Err(away()));
                    self.shards.replies().tell(shard, refused);
                }
            }
        }
        let asked = std::mem::take(&mut self.asked);
        self.asked.next = asked.next;
        for (conn, id) in asked.publishes.into_values() {
            self.shards.replies().reply(conn, ShardEvent::Published(conn, id, Err(away())));
        }
        for conn in asked.sessions.into_values() {
            self.shards.replies().reply(conn, ShardEvent::SessionOpened(conn, Err(away())));
        }
    }

    fn on_request(&mut self, request: LinkRequest) {
        match request {
            LinkRequest::Subscribe(shard, name) => self.on_subscribe(shard, name),
            LinkRequest::Unsubscribe(shard, name) => {
                let Some(route) = self.routes.get_mut(&name) else { return };
                route.mask &= !(1 << shard);
                if route.mask == 0 {
                    self.routes.remove(&name);
                    self.send(edge_event::Event::Unsubscribe(pb::Unsubscribe { channel: name.to_string() }));
                }
            }
            LinkRequest::OpenSession { conn, user, session, inbox } => {
                let session = session.as_bytes().to_vec();
                self.asked.sessions.insert(session.clone(), conn);
                self.send(edge_event::Event::OpenSession(pb::OpenSession {
                    user,
                    session: session.into(),
                    inbox,
                }));
            }
            LinkRequest::CloseSession { user, session } => {
                let session = session.as_bytes().to_vec().into();
                self.send(edge_event::Event::CloseSession(pb::CloseSession { user, session }));
            }
            LinkRequest::Publish(publish) => {
                self.asked.next += 1;
                self.asked.publishes.insert(self.asked.next, (publish.conn, publish.id));
                self.send(edge_event::Event::Publish(pb::Publish {
                    request: self.asked.next,
                    channel: publish.channel,
                    payload: Some(publish.payload),
                    publisher: publish.publisher,
                    dedupe_key: publish.dedupe_key,
                    message_id: publish.message_id.as_bytes().to_vec().into(),
                    trace: publish.trace,
                }));
            }
            LinkRequest::Connections(events) => self.send(edge_event::Event::ConnectionEvents(events)),
            LinkRequest::Milestones(milestones) => {
                self.send(edge_event::Event::Milestones(pb::Milestones { milestones }));
            }
        }
    }

    fn on_subscribe(&mut self, shard: u16, name: Arc<str>) {
        if let Some(route) = self.routes.get_mut(&name) {
            route.mask |= 1 << shard;
            if let Some((epoch, offset)) = &route.live {
                let top = (Arc::clone(epoch), *offset);
                self.shards.replies().tell(shard, ShardEvent::Subscribed(name, Ok(top)));
            }
            return;
        }
        self.waiting.push_back(subscribe(&name));
        self.routes.insert(name, Route { mask: 1 << shard, live: None });
    }

    fn on_event(&mut self, event: router_event::Event) {
        match event {
            router_event::Event::Publication(publication) => {
                let Some((name, route)) = self.routes.get_key_value(&*publication.channel) else { return };
                let (name, mask) = (Arc::clone(name), route.mask);
                self.moved(&name, &publication.epoch, publication.offset);
                self.shards.publish(mask, &name, publication);
            }
            router_event::Event::Inbox(hint) => self.shards.hint(&Arc::new(hint)),
            router_event::Event::Subscribed(subscribed) => self.on_subscribed(subscribed),
            router_event::Event::Published(published) => self.on_published(published),
            router_event::Event::SessionOpened(opened) => {
                if let Some(conn) = self.asked.sessions.remove(&opened.session[..]) {
                    let result = opened.error.map_or(Ok(()), |error| Err(refusal(error)));
                    self.shards.replies().reply(conn, ShardEvent::SessionOpened(conn, result));
                }
            }
            router_event::Event::Gap(gap) => {
                let Some((name, route)) = self.routes.get_key_value(&*gap.channel) else { return };
                let (name, mask) = (Arc::clone(name), route.mask);
                self.moved(&name, &gap.epoch, gap.top);
                self.shards.gap(mask, &name, &gap.epoch.as_str().into(), gap.top);
            }
            router_event::Event::Resync(_) => self.shards.resync(),
            router_event::Event::Ask(ask) => self.asker.ask(ask),
            router_event::Event::WatchConnections(watch) => {
                self.shards.replies().tell_all(|| ShardEvent::Watch(watch.on));
            }
        }
    }

    /// Remembers the newest offset of a channel, for shards that subscribe later.
    fn moved(&mut self, name: &Arc<str>, epoch: &str, offset: u64) {
        if let Some((known, top)) = self.routes.get_mut(name).and_then(|route| route.live.as_mut()) {
            *top = offset;
            if **known != *epoch {
                *known = epoch.into();
            }
        }
    }

    fn on_subscribed(&mut self, subscribed: pb::Subscribed) {
        let Some((name, route)) = self.routes.get_key_value(&*subscribed.channel) else { return };
        let (name, mask) = (Arc::clone(name), route.mask);
        let result = match subscribed.error {
            Some(error) => Err(refusal(error)),
            None => Ok((Arc::from(subscribed.epoch), subscribed.offset)),
        };
        match &result {
            Ok(top) => {
                if let Some(route) = self.routes.get_mut(&name) {
                    route.live = Some(top.clone());
                }
            }
            Err(error) => {
                tracing::debug!(
                    code = error.code.as_str(),
                    why = error.message,
                    "the router refused a subscription"
                );
                self.routes.remove(&name);
            }
        }
        for shard in shards_of(mask) {
            self.shards.replies().tell(shard, ShardEvent::Subscribed(Arc::clone(&name), result.clone()));
        }
    }

    fn on_published(&mut self, published: pb::Published) {
        let Some((conn, id)) = self.asked.publishes.remove(&published.request) else { return };
        let result = match published.error {
            Some(error) => Err(refusal(error)),
            None => Ok(Published {
                message_id: json::message_id(&published.message_id),
                epoch: published.epoch,
                offset: published.offset,
            }),
        };
        self.shards.replies().reply(conn, ShardEvent::Published(conn, id, result));
    }

    fn send(&mut self, event: edge_event::Event) {
        self.waiting.push_back(EdgeEvent { event: Some(event) });
    }
}

fn ended(status: &tonic::Status) -> Ended {
    Ended {
        why: problem(status),
        again: status.code() == Code::Aborted,
        // What the router itself says has no cause on this side.
        broken: std::error::Error::source(status).is_some(),
    }
}

fn subscribe(name: &str) -> EdgeEvent {
    EdgeEvent { event: Some(edge_event::Event::Subscribe(pb::Subscribe { channel: name.to_owned() })) }
}

/// What commands are answered while no router is there.
pub(crate) fn away() -> ErrorBody {
    ErrorBody::new(
        ErrorCode::Unavailable,
        "the router is away; the outcome is unknown: try again with the same dedupe key",
    )
}

fn refusal(error: pb::LinkError) -> ErrorBody {
    let code = ErrorCode::from_text(&error.code);
    ErrorBody { retryable: error.retryable, ..ErrorBody::new(code, error.message) }
}
