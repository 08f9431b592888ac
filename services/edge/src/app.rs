//! The edge's composition root: binds a listener for each shard, starts the shards and the tasks upstream.

use std::{
    collections::VecDeque,
    net::{SocketAddr, TcpListener as StdListener},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use sanjay_proto::edge::v1::EdgeNode;
use sanjay_runtime::{
    Context,
    grpc::{PeerMetrics, PeerPool, PoolOptions},
    mailbox::{self, mailbox},
    random,
};
use sanjay_websocket::serve_upgrade;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::LocalOptions,
    sync::mpsc,
    task::{AbortHandle, JoinHandle, spawn_local},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::{
    Config,
    config::MAX_SHARDS,
    connection::session,
    metrics::{Metrics, PEERS, RefusalLabel},
    revocations::Revocations,
    shard::{Common, Shard, Upstream},
    upgrade::{Refusal, decide},
    upstream::{
        ShardEvent, acks,
        ask::Asker,
        history, inbox,
        lane::Lane,
        link::{self, Parts},
        revocations::{self, Watch},
        shards::{Replies, Shards},
    },
    verifier::{Keyring, jwks, keyring::Published},
};

/// Requests that may wait for the control runtime before sockets are not read any more.
const LANE: usize = 16_384;

/// Handshakes that a shard has under way; for more, the oldest is dropped.
const HANDSHAKES: usize = 1_024;

/// Connections that wait for a shard to accept them.
const BACKLOG: i32 = 8_192;

/// How long a router or delivery node has to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Full names of the services whose health decides whether a router or delivery node is used.
const ROUTER_SERVICE: &str = "sanjay.edge.v1.RouterLink";
const DELIVERY_SERVICE: &str = "sanjay.edge.v1.Inbox";

/// How long connections have to say goodbye at shutdown.
const DRAIN: Duration = Duration::from_secs(3);

/// Starts an edge on `listener`, which only claims the address: each shard opens a listener of its own beside it.
///
/// # Errors
/// When the address, the router's or delivery's URL cannot be used, or a thread cannot be started.
pub async fn start(
    config: Config,
    listener: StdListener,
    context: Context,
    registry: &mut Registry,
) -> anyhow::Result<()> {
    let address = listener.local_addr().context("the edge's listener has no address")?;
    drop(listener);
    let shards = shard_count(config.shards);
    let listeners = (0..shards).map(|_| reuse_port(address)).collect::<anyhow::Result<Vec<_>>>()?;
    let metrics = Arc::new(Metrics::register(registry));
    let own = config.own_keys()?;
    let source = config.published_keys()?;
    let only_source = own.is_empty();
    let published = source.is_some().then(Arc::<Published>::default);
    let keyring = Keyring::new(own, published.clone(), config.token_rules(), metrics.tokens.clone());
    let common = Arc::new(Common {
        verifier: Arc::new(keyring),
        clock: Arc::clone(&context.clock),
        random: Arc::clone(&context.random),
        metrics: Arc::clone(&metrics),
        revocations: Revocations::default(),
        connections: AtomicUsize::new(0),
        namespaces: context.namespaces.clone(),
        subscribers: Arc::default(),
        config,
    });

    let (link_sender, link_requests) = mpsc::channel(LANE);
    let (read_sender, read_requests) = mpsc::channel(LANE);
    let (ack_sender, ack_requests) = mpsc::channel(LANE);
    let (history_sender, history_requests) = mpsc::channel(LANE);
    let mailboxes: Vec<_> = (0..shards).map(|_| mailbox(common.config.shard_queue)).collect();
    let (senders, receivers): (Vec<_>, Vec<_>) = mailboxes.into_iter().unzip();
    let replies = Replies::new(senders);
    for ((number, listener), events) in (0..).zip(listeners).zip(receivers) {
        let upstream = (link_sender.clone(), read_sender.clone(), ack_sender.clone(), history_sender.clone());
        start_shard(number, Arc::clone(&common), upstream, listener, events, &context)?;
    }
    if let (Some(source), Some(published)) = (source, published) {
        let keys = jwks::Parts {
            source,
            pace: common.config.jwks_pace(),
            published,
            shards: replies.clone(),
            // With other keys the edge has work to do while these are away.
            ready: only_source.then(|| context.readiness.register("edge: token keys")),
            clock: Arc::clone(&context.clock),
            random: Arc::clone(&context.random),
            metrics: metrics.tokens.clone(),
        };
        // It has nothing to finish, so it ends with the process.
        let soft = context.lifecycle.soft();
        context.lifecycle.spawn("edge: token keys", async move {
            soft.run_until_cancelled(jwks::run(keys)).await;
        });
    }
    let peers = PeerMetrics::register(registry, "edge", &PEERS);
    let requests = (link_requests, read_requests, ack_requests, history_requests);
    start_upstream(&common, &context, &peers, replies, requests)
}

type Senders = (
    mpsc::Sender<crate::upstream::LinkRequest>,
    mpsc::Sender<crate::upstream::ReadRequest>,
    mpsc::Sender<crate::upstream::AckRequest>,
    mpsc::Sender<history::HistoryRead>,
);

type Receivers = (
    mpsc::Receiver<crate::upstream::LinkRequest>,
    mpsc::Receiver<crate::upstream::ReadRequest>,
    mpsc::Receiver<crate::upstream::AckRequest>,
    mpsc::Receiver<history::HistoryRead>,
);

fn start_upstream(
    common: &Arc<Common>,
    context: &Context,
    peers: &PeerMetrics,
    replies: Replies,
    (link_requests, reads, acks, histories): Receivers,
) -> anyhow::Result<()> {
    let config = &common.config;
    let ready = |name| context.readiness.register(name);
    let router = PoolOptions {
        peer: "router",
        setting: "edge.router",
        endpoints: &config.router,
        service: ROUTER_SERVICE,
        // Histories use a connection of their own, so that large ones hold up no publication.
        lanes: 2,
        connect_timeout: CONNECT_TIMEOUT,
        ready: None,
        // That one serves is not enough: the edge must be attached, which the link knows.
        up: None,
        breaker: Some(common.metrics.router_breaker.clone()),
        metrics: peers,
    };
    let delivery = PoolOptions {
        peer: "delivery node",
        setting: "edge.delivery",
        endpoints: &config.delivery,
        service: DELIVERY_SERVICE,
        // Reads and acks use a connection each, so that large pages do not delay acks.
        lanes: 2,
        ready: Some(ready("edge: delivery")),
        up: Some(common.metrics.delivery_up.clone()),
        breaker: Some(common.metrics.delivery_breaker.clone()),
        ..router
    };
    let (router, delivery) = (PeerPool::start(router, context)?, PeerPool::start(delivery, context)?);
    let node = match config.node.as_str() {
        "" => random::node_name("edge", &*context.random),
        node => node.to_owned(),
    };
    let metrics = &common.metrics;
    let incarnation = context.random.next_u64();
    let this = EdgeNode {
        edge_id: node.clone(),
        build: env!("CARGO_PKG_VERSION").to_owned(),
        since_us: context.clock.now_us(),
        connections: 0,
        incarnation,
    };
    let asker = Asker::new(this, Arc::clone(common), replies.clone(), context.lifecycle.clone());
    context.lifecycle.spawn(
        "edge: router link",
        link::run(Parts {
            node: node.clone(),
            incarnation,
            routers: router.clone(),
            requests: link_requests,
            shards: Shards::new(replies.clone(), Arc::clone(metrics)),
            random: Arc::clone(&context.random),
            ready: ready("edge: router"),
            metrics: Arc::clone(metrics),
            asker,
        }),
    );
    context.lifecycle.spawn(
        "edge: revocations",
        revocations::run(Watch {
            node: node.clone(),
            delivery: delivery.clone(),
            common: Arc::clone(common),
            shards: replies.clone(),
            random: Arc::clone(&context.random),
            ready: ready("edge: revocations"),
        }),
    );
    context.lifecycle.spawn(
        "edge: histories",
        history::run(router.lane(1), histories, replies.clone(), Arc::clone(metrics)),
    );
    context.lifecycle.spawn(
        "edge: inbox reads",
        inbox::read(delivery.lane(0), reads, replies.clone(), context.lifecycle.clone(), Arc::clone(metrics)),
    );
    context.lifecycle.spawn(
        "edge: inbox acks",
        acks::run(
            node,
            delivery.lane(1),
            acks,
            replies.clone(),
            Arc::clone(&context.random),
            Arc::clone(metrics),
        ),
    );
    let soft = context.lifecycle.soft();
    context.lifecycle.spawn("edge: drain", async move {
        soft.cancelled().await;
        replies.tell_all(|| ShardEvent::Drain);
    });
    Ok(())
}

fn shard_count(configured: usize) -> usize {
    let count = match configured {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        count => count,
    };
    count.clamp(1, MAX_SHARDS)
}

/// A listener that shares its address with those of the other shards; the kernel spreads connections over them.
fn reuse_port(address: SocketAddr) -> anyhow::Result<StdListener> {
    let open = || -> std::io::Result<StdListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    open().with_context(|| format!("cannot listen on {address}; another process may have taken it just now"))
}

fn start_shard(
    number: u16,
    common: Arc<Common>,
    (link, reads, acks, histories): Senders,
    listener: StdListener,
    events: mailbox::Receiver<ShardEvent>,
    context: &Context,
) -> anyhow::Result<()> {
    let tracked = context.lifecycle.track("edge: shard");
    let soft = context.lifecycle.soft();
    let (started, outcome) = std::sync::mpsc::sync_channel(1);
    let run = move || {
        let _tracked = tracked;
        let _guard = AbortOnPanic;
        // A local runtime cannot move between threads, so the shard's own thread makes it.
        let builder =
            tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        match builder {
            Ok(runtime) => {
                let _ = started.send(Ok(()));
                runtime.block_on(async move {
                    let upstream = Upstream {
                        link: Lane::new(link),
                        reads: Lane::new(reads),
                        acks: Lane::new(acks),
                        histories: Lane::new(histories),
                    };
                    let shard = Shard::<TcpStream>::new(number, common, upstream);
                    run_shard(shard, listener, events, soft).await;
                });
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        }
    };
    std::thread::Builder::new()
        .name(format!("shard-{number}"))
        .spawn(run)
        .context("cannot start a thread for a shard")?;
    outcome.recv().context("a shard's thread ended at once")?.context("cannot start a runtime for a shard")
}

/// Runs a task on the shard's thread. The runtime would catch a panic in it and go on without it.
fn spawn_on_shard(task: impl Future<Output = ()> + 'static) -> JoinHandle<()> {
    spawn_local(async move {
        let _guard = AbortOnPanic;
        task.await;
    })
}

/// A shard that panics leaves its sockets without anyone who serves them: the process ends, and clients go elsewhere.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!(
                "a shard of the edge panicked; the process aborts so that its clients go elsewhere"
            );
            std::process::abort();
        }
    }
}

async fn run_shard(
    shard: Rc<Shard<TcpStream>>,
    listener: StdListener,
    events: mailbox::Receiver<ShardEvent>,
    soft: CancellationToken,
) {
    let accepting = spawn_on_shard(accept(Rc::clone(&shard), listener));
    let ticking = spawn_on_shard(Rc::clone(&shard).tick());
    let running = spawn_on_shard(Rc::clone(&shard).run(events));
    soft.cancelled().await;
    accepting.abort();
    let emptied = async {
        while !shard.is_empty() {
            sleep(Duration::from_millis(20)).await;
        }
    };
    let _ = timeout(DRAIN, emptied).await;
    running.abort();
    ticking.abort();
}

/// The handshakes that a shard has under way, the oldest first.
#[derive(Default)]
struct Handshakes(VecDeque<AbortHandle>);

impl Handshakes {
    /// Adds one; true when the oldest was dropped for it. A good client is done within moments, so whoever lasted
    /// longest most likely says nothing.
    fn add(&mut self, handshake: AbortHandle) -> bool {
        if self.0.len() >= HANDSHAKES {
            self.0.retain(|other| !other.is_finished());
        }
        let oldest = if self.0.len() >= HANDSHAKES { self.0.pop_front() } else { None };
        if let Some(oldest) = &oldest {
            oldest.abort();
        }
        self.0.push_back(handshake);
        oldest.is_some()
    }
}

async fn accept(shard: Rc<Shard<TcpStream>>, listener: StdListener) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            return tracing::error!(%error, "a shard cannot use its listener; it accepts nothing");
        }
    };
    let mut handshakes = Handshakes::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let task = spawn_on_shard(handshake(Rc::clone(&shard), stream));
                if handshakes.add(task.abort_handle()) {
                    shard.common.metrics.handshakes_dropped.inc();
                }
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; if files ran out, raise the limit (ulimit -n)");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Upgrades a connection and starts its session as a task of its own, so that nothing of the handshake stays.
async fn handshake(shard: Rc<Shard<TcpStream>>, stream: TcpStream) {
    // Without it the kernel may hold small frames back; a failure costs only latency.
    let _ = stream.set_nodelay(true);
    let common = &shard.common;
    let limit = common.config.upgrade_timeout();
    let upgrade = serve_upgrade(stream, limit, |request| {
        let has_room = common.connections.load(Ordering::Relaxed) < common.config.max_connections;
        decide(request, &common.config.allowed_origins, has_room).inspect_err(|refusal: &Refusal| {
            let status = refusal.status().as_u16();
            common.metrics.refused.get_or_create(&RefusalLabel { status }).inc();
        })
    });
    let Ok(Some(accepted)) = timeout(limit, upgrade).await else { return };
    common.connections.fetch_add(1, Ordering::Relaxed);
    common.metrics.accepted.inc();
    let conn = shard.add(accepted.io, accepted.context.token);
    spawn_on_shard(session::run(Rc::clone(&shard), conn, accepted.leftover.to_vec()));
}
