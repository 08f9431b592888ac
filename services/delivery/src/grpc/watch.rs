//! What happens to connections, for whoever watches: one stream of each router, brought together. Nobody waits for a
//! watcher; what it missed is said, also when a router or an edge was away.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use sanjay_proto::{
    delivery::v1::{
        self as api, WatchConnectionsRequest, WatchConnectionsResponse,
        watch_connections_response::Result as Watched,
    },
    edge::v1::{ConnectionEvent, ConnectionEventKind, ListConnections, question::Question},
    router::v1::{WatchConnectionsRequest as Ask, router_client::RouterClient},
};
use sanjay_protocol::{ErrorCode, names};
use sanjay_runtime::grpc::{Peer, PeerPool};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::{AbortHandle, JoinSet},
    time::{Interval, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{Refusal, stream::Answers};
use crate::router::Router;

/// Most watchers of one node.
pub(super) const MAX_WATCHERS: usize = 64;

/// Most events that wait for one watcher.
const MAX_WAITING: usize = 4_096;

/// How long a watcher hears nothing at most.
const IDLE: Duration = Duration::from_secs(10);

/// How often it is looked whether there are other routers, and how long one that ended is left alone.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long a router has to begin, and how long it may say nothing: it says something every ten seconds.
const BEGIN: Duration = Duration::from_secs(2);
const SILENCE: Duration = Duration::from_secs(30);

/// Room for watchers.
pub(crate) fn room() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(MAX_WATCHERS))
}

/// Which events somebody wants to hear of.
#[derive(Debug, Clone)]
struct Wanted {
    user: String,
    channel: String,
    kinds: Vec<i32>,
}

impl Wanted {
    fn matches(&self, event: &ConnectionEvent) -> bool {
        (self.user.is_empty() || self.user == event.user)
            && (self.channel.is_empty() || self.channel == event.channel)
            && (self.kinds.is_empty() || self.kinds.contains(&event.kind))
    }
}

/// Checks what is to be heard of, and begins: when this returns, every edge that answers tells what happens.
pub(super) async fn watch(
    router: &Router,
    room: &Arc<Semaphore>,
    stop: CancellationToken,
    request: WatchConnectionsRequest,
) -> Result<Answers<WatchConnectionsResponse>, Refusal> {
    let WatchConnectionsRequest { user, channel, kinds } = request;
    names::check_optional("user", &user)?;
    names::check_optional("channel", &channel)?;
    let known = |kind: i32| ConnectionEventKind::try_from(kind).is_ok_and(|kind| kind as i32 != 0);
    if let Some(kind) = kinds.iter().find(|kind| !known(**kind)) {
        return Err(Refusal::bad(format!("kinds has {kind}; 1 (ONLINE) to 4 (UNSUBSCRIBED) are known")));
    }
    let permit = Arc::clone(room).try_acquire_owned().map_err(|_| {
        let text = format!(
            "{MAX_WATCHERS} streams of connection events are open at this node, which is its limit; end one"
        );
        Refusal::new(ErrorCode::RateLimited, text)
    })?;
    let (sender, events) = mpsc::channel(MAX_WAITING);
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let wanted = Wanted { user, channel, kinds };
    let (begun, first) = mpsc::channel(MAX_WATCHERS);
    let mut watching = Watching {
        routers: router.pool(),
        begun,
        wanted,
        sender: Sender { sender, missed: 0 },
        events,
        streams: JoinSet::new(),
        open: HashMap::new(),
        looks,
        stop,
        _permit: permit,
    };
    watching.begin(router, first).await;
    let answers = stream::unfold(Some(watching), |watching| async {
        let mut watching = watching?;
        let stop = watching.stop.clone();
        let result = tokio::select! {
            biased;
            () = stop.cancelled() => {
                let text = "this server shuts down; go on at another, or when it is back";
                return Some((Err(Refusal::new(ErrorCode::Unavailable, text).into()), None));
            }
            heard = timeout(IDLE, watching.next()) => heard.ok(),
        };
        Some((Ok(WatchConnectionsResponse { result }), Some(watching)))
    });
    Ok(answers.boxed())
}

/// What is heard, and what was passed by.
#[derive(Clone)]
struct Sender {
    sender: mpsc::Sender<Watched>,
    missed: u64,
}

impl Sender {
    /// Hands an event on, after what was passed by before it; passes it by when there is no room.
    fn hand(&mut self, event: Watched) {
        if self.missed > 0 {
            match self.sender.try_send(Watched::Missed(self.missed)) {
                Ok(()) => self.missed = 0,
                Err(_) => return self.missed += 1,
            }
        }
        if self.sender.try_send(event).is_err() {
            self.missed += 1;
        }
    }

    /// So many, or an unknown number, were passed by.
    fn miss(&mut self, count: u64) {
        self.missed += count;
        if self.sender.try_send(Watched::Missed(self.missed)).is_ok() {
            self.missed = 0;
        }
    }
}

struct Watching {
    routers: PeerPool,
    wanted: Wanted,
    sender: Sender,
    events: mpsc::Receiver<Watched>,
    /// A task for each router.
    streams: JoinSet<()>,
    open: HashMap<String, AbortHandle>,
    /// Hears of each task that has tried its router.
    begun: mpsc::Sender<()>,
    looks: Interval,
    stop: CancellationToken,
    _permit: OwnedSemaphorePermit,
}

impl Watching {
    /// Waits until every router has been tried, and every edge has answered a question that came behind the word that
    /// somebody watches. What may be missing is said.
    async fn begin(&mut self, router: &Router, mut first: mpsc::Receiver<()>) {
        self.look();
        let count = self.open.len();
        let tried = async {
            for _ in 0..count {
                first.recv().await;
            }
        };
        let tried = timeout(BEGIN, tried).await;
        // About nobody: what counts is that all shards answer.
        let asked = router.ask(Question::ListConnections(ListConnections::default())).await;
        if tried.is_err() || !asked.is_ok_and(|asked| asked.answer.complete) {
            self.sender.miss(1);
        }
    }

    async fn next(&mut self) -> Watched {
        loop {
            tokio::select! {
                Some(event) = self.events.recv() => return event,
                _ = self.looks.tick() => self.look(),
            }
        }
    }

    /// Watches at every router that there is, and no more at those that are gone.
    fn look(&mut self) {
        while self.streams.try_join_next().is_some() {}
        let peers = self.routers.peers();
        self.open.retain(|name, task| {
            let stays = peers.iter().any(|peer| peer.to_string() == *name);
            if !stays {
                task.abort();
            }
            stays
        });
        for peer in peers.iter() {
            self.open.entry(peer.to_string()).or_insert_with(|| {
                let (wanted, sender) = (self.wanted.clone(), self.sender.clone());
                let follow = follow(Arc::clone(peer), wanted, sender, self.begun.clone());
                self.streams.spawn(follow)
            });
        }
    }
}

/// Watches at one router, again and again.
async fn follow(router: Arc<Peer>, wanted: Wanted, mut sender: Sender, begun: mpsc::Sender<()>) {
    loop {
        let mut client = RouterClient::new(router.channel(0));
        let response = timeout(BEGIN, client.watch_connections(Ask {})).await;
        // Only the first try is waited for.
        let _full = begun.try_send(());
        if let Ok(Ok(response)) = response {
            let mut events = response.into_inner();
            while let Ok(Ok(Some(some))) = timeout(SILENCE, events.message()).await {
                for event in some.events.into_iter().filter(|event| wanted.matches(event)) {
                    sender.hand(Watched::Event(told(event)));
                }
                if some.missed > 0 {
                    sender.miss(some.missed);
                }
            }
            // Until it is there again, or its edges are elsewhere, things happen that nobody tells.
            sender.miss(1);
        }
        sleep(LOOK_EVERY).await;
    }
}

fn told(event: ConnectionEvent) -> api::ConnectionEvent {
    let session = Uuid::from_slice(&event.session).unwrap_or_default().to_string();
    let ConnectionEvent { kind, time_us, user, edge_id: edge, channel, device, client, code, .. } = event;
    api::ConnectionEvent { kind, time_us, user, session, edge, channel, device, client, code }
}
