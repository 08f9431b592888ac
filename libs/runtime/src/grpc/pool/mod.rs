//! The processes of one role that another role calls: which there are, which of them serve, and calls that go
//! to another one when the first does not answer.
//!
//! Every address has channels of its own. One that stops serving is left out until its health watch says
//! otherwise, whatever its connections look like; when nobody serves, anybody is tried, so that a call fails
//! with the reason and not with silence.

mod addresses;
mod budget;
mod call;
mod health;
mod metrics;
mod peer;
#[cfg(test)]
mod tests;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::{Endpoint, Uri};

use super::{
    auth::ClusterKey,
    client::tune,
    endpoints::Endpoints,
    resolve::{Resolve, SystemResolver},
};
use crate::{context::Context, lifecycle::Lifecycle, random::SharedRandom, readiness::ReadinessFlag};

pub use call::{Call, PeerError};
pub use metrics::PeerMetrics;
pub use peer::Peer;

use budget::Budget;
use metrics::PoolMetrics;
use peer::Rank;

/// What a pool is made of.
pub struct PoolOptions<'a> {
    /// The role that is called, in one word: for texts, logs and metrics.
    pub peer: &'static str,
    /// The setting that names the endpoints, such as `edge.router`.
    pub setting: &'static str,
    /// The endpoints.
    pub endpoints: &'a Endpoints,
    /// Full name of the gRPC service whose health counts.
    pub service: &'static str,
    /// Connections to each address, for calls that are not to hold each other up; at least 1.
    pub lanes: usize,
    /// How long an address has to accept a connection.
    pub connect_timeout: Duration,
    /// Raised once some peer serves, and not lowered again: whether a process can do without is for its metrics to
    /// say, since taking it out of a balancer would end what still works.
    pub ready: Option<ReadinessFlag>,
    /// 1 while some peer serves, 0 while none does.
    pub up: Option<Gauge>,
    /// What `dependency_breaker_state` shows: 0 while some peer serves, 2 while none does. A peer that does not serve is
    /// left out like behind an open breaker, and its watch is the probe.
    pub breaker: Option<Gauge>,
    /// Where is counted.
    pub metrics: &'a PeerMetrics,
}

/// The processes of one role, as another role sees them. Clones share everything but the lane.
#[derive(Clone)]
pub struct PeerPool {
    shared: Arc<Shared>,
    lane: usize,
}

/// What all clones and the tasks of a pool share. Tasks hold it weakly: they end with the last clone.
struct Shared {
    kind: &'static str,
    setting: &'static str,
    service: &'static str,
    key: ClusterKey,
    lanes: usize,
    connect_timeout: Duration,
    peers: watch::Sender<Arc<[Arc<Peer>]>>,
    /// Whether every name was looked up once.
    settled: watch::Sender<bool>,
    /// Why the last look-up was not complete; empty when it was.
    unresolved: Mutex<String>,
    /// Has names resolved soon.
    resolve: Arc<Notify>,
    /// Changes with the health of any peer.
    changes: watch::Sender<()>,
    next: AtomicUsize,
    budget: Budget,
    metrics: PoolMetrics,
    ready: Option<ReadinessFlag>,
    up: Option<Gauge>,
    breaker: Option<Gauge>,
    /// Held while peers are counted, so that an older count does not replace a newer one.
    counting: Mutex<()>,
    random: SharedRandom,
    lifecycle: Lifecycle,
    stop: CancellationToken,
    _guard: DropGuard,
}

impl PeerPool {
    /// Makes a pool. Its watches run on the lifecycle, until shutdown begins or the last clone is gone.
    ///
    /// # Errors
    /// When an endpoint is not `http://host:port`, or the cluster key cannot be sent in a header.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(options: PoolOptions<'_>, context: &Context) -> anyhow::Result<Self> {
        Self::start_with(options, context, Arc::new(SystemResolver))
    }

    /// Like [`PeerPool::start`], with a resolver of the caller's choice.
    ///
    /// # Errors
    /// As [`PeerPool::start`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start_with(
        options: PoolOptions<'_>,
        context: &Context,
        resolver: Arc<dyn Resolve>,
    ) -> anyhow::Result<Self> {
        let targets = options.endpoints.targets(options.setting)?;
        let stop = context.lifecycle.soft().child_token();
        let shared = Arc::new(Shared {
            kind: options.peer,
            setting: options.setting,
            service: options.service,
            key: ClusterKey::new(&context.cluster_key)?,
            lanes: options.lanes.max(1),
            connect_timeout: options.connect_timeout,
            peers: watch::Sender::new(Arc::new([])),
            settled: watch::Sender::new(false),
            unresolved: Mutex::default(),
            resolve: Arc::default(),
            changes: watch::Sender::new(()),
            // Many callers that start together do not begin with the same peer.
            next: AtomicUsize::new(context.random.next_u64() as usize >> 1),
            budget: Budget::default(),
            metrics: options.metrics.of(options.peer),
            ready: options.ready,
            up: options.up,
            breaker: options.breaker,
            counting: Mutex::default(),
            random: Arc::clone(&context.random),
            lifecycle: context.lifecycle.clone(),
            _guard: stop.clone().drop_guard(),
            stop: stop.clone(),
        });
        let literals = addresses::literals(&targets);
        if literals.len() == targets.len() {
            shared.update(literals, String::new());
        } else {
            let refresh = addresses::refresh(Arc::downgrade(&shared), targets, resolver, stop);
            shared.lifecycle.spawn("peer addresses", refresh);
        }
        Ok(Self { shared, lane: 0 })
    }

    /// The same pool over other connections to each address.
    #[must_use]
    pub fn lane(&self, lane: usize) -> Self {
        Self { shared: Arc::clone(&self.shared), lane }
    }

    /// Somebody to stay with: one of the best peers that are not among `tried`, at random, so that callers
    /// spread; `None` when all were tried.
    #[must_use]
    pub fn choose(&self, tried: &[Arc<Peer>]) -> Option<Arc<Peer>> {
        let peers = self.shared.peers.borrow();
        // Ranks change at any time, so each is looked at once.
        let left: Vec<(Rank, &Arc<Peer>)> = peers
            .iter()
            .filter(|peer| tried.iter().all(|other| !Arc::ptr_eq(peer, other)))
            .map(|peer| (peer.rank(), peer))
            .collect();
        let best = left.iter().map(|(rank, _)| *rank).min()?;
        let candidates: Vec<_> = left.iter().filter(|(rank, _)| *rank == best).collect();
        let index = self.shared.random.next_u64() % candidates.len() as u64;
        Some(Arc::clone(candidates[index as usize].1))
    }

    /// Everybody there is.
    #[must_use]
    pub fn peers(&self) -> Arc<[Arc<Peer>]> {
        self.shared.peers.borrow().clone()
    }

    /// Waits until every name was looked up once.
    pub async fn settled(&self) {
        // The sender lives as long as `self`.
        let _ = self.shared.settled.subscribe().wait_for(|settled| *settled).await;
    }

    /// Whether some peer says that it serves.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.shared.peers.borrow().iter().any(|peer| peer.rank() == Rank::Serving)
    }

    /// For whoever has just begun a stream on `peer`: waits until it does not serve any more while another one does;
    /// says why.
    pub async fn until_lost(&self, peer: &Arc<Peer>) -> Arc<str> {
        let mut changes = self.shared.changes.subscribe();
        // It took a stream, so that what the watch saw last may be old.
        let served = async {
            while peer.rank() == Rank::Down {
                peer.recheck.notify_one();
                // The sender lives as long as `self`.
                let _ = changes.changed().await;
            }
        };
        let _ = timeout(health::ANSWER_TIME, served).await;
        loop {
            changes.mark_unchanged();
            let serves = |other: &Arc<Peer>| !Arc::ptr_eq(other, peer) && other.rank() == Rank::Serving;
            if peer.rank() == Rank::Down && self.shared.peers.borrow().iter().any(serves) {
                return peer.problem();
            }
            let _ = changes.changed().await;
        }
    }

    /// A stream of `peer` broke: it is left out until it says again that it serves.
    pub fn suspect(&self, peer: &Arc<Peer>, problem: &str) {
        self.shared.suspect(peer, problem);
    }

    /// A stream moved from one peer to another.
    pub fn count_failover(&self) {
        self.shared.metrics.failovers.inc();
    }

    /// The setting that names the endpoints.
    #[must_use]
    pub fn setting(&self) -> &'static str {
        self.shared.setting
    }

    /// Why names could not be resolved; empty when they were.
    #[must_use]
    pub fn unresolved(&self) -> String {
        self.shared.unresolved.lock().clone()
    }
}

impl fmt::Debug for PeerPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shared { kind, peers, .. } = &*self.shared;
        f.debug_struct("PeerPool")
            .field("peer", kind)
            .field("peers", &*peers.borrow())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// The best peer that was not tried; of equals the one with the least calls under way, in turn. One that is
    /// down is given only for a first attempt.
    fn pick(&self, tried: impl Fn(&Arc<Peer>) -> bool, first: bool) -> Option<Arc<Peer>> {
        let peers = self.peers.borrow();
        if let [only] = &**peers {
            return (!tried(only)).then(|| Arc::clone(only));
        }
        let begin = self.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..peers.len()).map(|at| &peers[(begin % peers.len() + at) % peers.len()]);
        let left = in_turn.filter(|peer| !tried(peer) && (first || peer.rank() < Rank::Down));
        left.min_by_key(|peer| (peer.rank(), peer.in_flight())).cloned()
    }

    /// Whether anybody but `peer` could be asked.
    fn has_other(&self, peer: &Arc<Peer>, tried: impl Fn(&Arc<Peer>) -> bool) -> bool {
        let peers = self.peers.borrow();
        peers.len() > 1
            && peers
                .iter()
                .any(|other| !Arc::ptr_eq(other, peer) && !tried(other) && other.rank() < Rank::Down)
    }

    /// Notes a peer's health, and says when it changed.
    fn note(&self, peer: &Arc<Peer>, rank: Rank, problem: &str) {
        let before = peer.set(rank, problem);
        let news = rank == Rank::Down && peer.is_news(problem);
        let (kind, name) = (self.kind, peer.to_string());
        if before == rank {
            if news {
                tracing::warn!(peer = kind, endpoint = name, problem, "an endpoint is still left out");
            }
            return;
        }
        match (before, rank) {
            (_, Rank::Down) => {
                tracing::warn!(peer = kind, endpoint = name, problem, "an endpoint is left out")
            }
            (Rank::Down, _) => tracing::info!(peer = kind, endpoint = name, "an endpoint is back"),
            _ => tracing::debug!(peer = kind, endpoint = name, "an endpoint serves"),
        }
        if rank == Rank::Down {
            self.resolve.notify_one();
        }
        self.measure();
    }

    /// A call or a stream of `peer` broke. Its watch asks it anew, and the answer counts.
    fn suspect(&self, peer: &Arc<Peer>, problem: &str) {
        if peer.rank() != Rank::Down {
            self.note(peer, Rank::Down, problem);
            peer.recheck.notify_one();
        }
    }

    fn measure(&self) {
        let _counting = self.counting.lock();
        let peers = self.peers.borrow().clone();
        let serving = peers.iter().filter(|peer| peer.rank() == Rank::Serving).count();
        self.metrics.known.set(i64::try_from(peers.len()).unwrap_or(i64::MAX));
        self.metrics.healthy.set(i64::try_from(serving).unwrap_or(i64::MAX));
        if let Some(up) = &self.up {
            up.set(i64::from(serving > 0));
        }
        if let Some(breaker) = &self.breaker {
            breaker.set(if serving > 0 { 0 } else { 2 });
        }
        if let Some(ready) = self.ready.as_ref().filter(|_| serving > 0) {
            ready.set(true);
        }
        self.changes.send_replace(());
    }

    /// Takes new addresses in and leaves others out. Who is in both stays as it is.
    fn update(self: &Arc<Self>, found: Vec<addresses::Found>, unresolved: String) {
        *self.unresolved.lock() = unresolved;
        let before = self.peers.borrow().clone();
        let peers: Vec<_> = found
            .into_iter()
            .filter_map(|(endpoint, address)| {
                let known = before.iter().find(|peer| peer.address == address && peer.endpoint == endpoint);
                known.cloned().or_else(|| self.add(&endpoint, address))
            })
            .collect();
        for gone in before.iter().filter(|peer| peers.iter().all(|other| !Arc::ptr_eq(other, peer))) {
            tracing::info!(peer = self.kind, endpoint = %gone, "an address is gone");
        }
        self.peers.send_replace(peers.into());
        self.settled.send_replace(true);
        self.measure();
    }

    fn add(self: &Arc<Self>, endpoint: &Arc<str>, address: std::net::SocketAddr) -> Option<Arc<Peer>> {
        // The name stays the authority of the calls, for whatever routes by it.
        let (Ok(connected), Ok(origin)) =
            (Endpoint::from_shared(format!("http://{address}")), endpoint.parse::<Uri>())
        else {
            tracing::error!(%address, "an address makes no URL");
            return None;
        };
        let connected = connected.origin(origin);
        let stop = self.stop.child_token();
        let calls = tune(connected.clone()).connect_timeout(self.connect_timeout);
        let guard = stop.clone().drop_guard();
        let peer =
            Arc::new(Peer::new(Arc::clone(endpoint), address, calls, self.key.clone(), self.lanes, guard));
        let (shared, watched) = (Arc::downgrade(self), Arc::downgrade(&peer));
        self.lifecycle.spawn("peer health", health::watch(shared, watched, health::tune(connected), stop));
        Some(peer)
    }
}
