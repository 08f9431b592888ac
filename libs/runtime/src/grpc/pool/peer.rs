//! One address of a pool: its connections, whether it serves, and how much it has to do.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicUsize, Ordering},
    },
};

use parking_lot::{Mutex, RwLock};
use tokio::sync::Notify;
use tokio_util::sync::DropGuard;
use tonic::{service::interceptor::InterceptedService, transport::Endpoint};

use crate::grpc::{auth::ClusterKey, client::PeerChannel};

/// What is known of a peer; the better ones come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum Rank {
    /// It says that it serves.
    Serving,
    /// It was not asked yet.
    Unknown,
    /// It does not answer, says that it does not serve, or just broke a call.
    Down,
}

/// Most problems of one peer that are logged before it serves again.
const MAX_TOLD: usize = 4;

/// A process that can be called, at one address. Whoever holds it may use it on when its address is gone from
/// the pool; its health is watched until nobody does.
pub struct Peer {
    /// The endpoint as it was given, and the address when that is not in it.
    name: Arc<str>,
    pub(super) endpoint: Arc<str>,
    pub(super) address: SocketAddr,
    /// For calls; one channel of it is one connection.
    calls: Endpoint,
    key: ClusterKey,
    lanes: RwLock<Box<[PeerChannel]>>,
    rank: AtomicU8,
    problem: Mutex<Arc<str>>,
    /// The problems that were logged since it serves no more.
    told: Mutex<Vec<Arc<str>>>,
    in_flight: AtomicUsize,
    /// Has the watch ask anew.
    pub(super) recheck: Arc<Notify>,
    _watched: DropGuard,
}

impl Peer {
    pub(super) fn new(
        endpoint: Arc<str>,
        address: SocketAddr,
        calls: Endpoint,
        key: ClusterKey,
        lanes: usize,
        watched: DropGuard,
    ) -> Self {
        let shown = format!("http://{address}");
        let name =
            if *endpoint == *shown { endpoint.clone() } else { format!("{endpoint} ({address})").into() };
        let channels = (0..lanes).map(|_| channel(&calls, &key)).collect();
        Self {
            name,
            endpoint,
            address,
            calls,
            key,
            lanes: RwLock::new(channels),
            rank: AtomicU8::new(Rank::Unknown as u8),
            problem: Mutex::new("it was not asked yet".into()),
            told: Mutex::default(),
            in_flight: AtomicUsize::new(0),
            recheck: Arc::default(),
            _watched: watched,
        }
    }

    /// The channel of a lane. Calls on clones of it that are under way outlive its renewal.
    #[must_use]
    pub fn channel(&self, lane: usize) -> PeerChannel {
        let lanes = self.lanes.read();
        lanes[lane % lanes.len()].clone()
    }

    pub(super) fn rank(&self) -> Rank {
        match self.rank.load(Ordering::Relaxed) {
            0 => Rank::Serving,
            1 => Rank::Unknown,
            _ => Rank::Down,
        }
    }

    /// The last problem, while it does not serve.
    pub(super) fn problem(&self) -> Arc<str> {
        self.problem.lock().clone()
    }

    /// Whether this problem is worth a line in the log: it was not logged since the peer serves no more, and not many
    /// others were.
    pub(super) fn is_news(&self, problem: &str) -> bool {
        let mut told = self.told.lock();
        let news = told.len() < MAX_TOLD && !told.iter().any(|known| **known == *problem);
        if news {
            told.push(problem.into());
        }
        news
    }

    /// Notes what was found; gives what was known before.
    pub(super) fn set(&self, rank: Rank, problem: &str) -> Rank {
        let before = match self.rank.swap(rank as u8, Ordering::Relaxed) {
            0 => Rank::Serving,
            1 => Rank::Unknown,
            _ => Rank::Down,
        };
        if rank != Rank::Down {
            self.told.lock().clear();
        } else {
            *self.problem.lock() = problem.into();
            if before != Rank::Down {
                // A peer that comes back gets new connections: an old one may hang on a machine that is gone.
                self.lanes.write().iter_mut().for_each(|lane| *lane = channel(&self.calls, &self.key));
            }
        }
        before
    }

    pub(super) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a call until the guard is dropped.
    pub(super) fn begin(&self) -> InFlight<'_> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(self)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Peer").field("name", &self.name).field("rank", &self.rank()).finish_non_exhaustive()
    }
}

/// A call under way.
pub(super) struct InFlight<'a>(&'a Peer);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

fn channel(calls: &Endpoint, key: &ClusterKey) -> PeerChannel {
    InterceptedService::new(calls.connect_lazy(), key.clone())
}
