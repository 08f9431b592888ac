//! Composition root: makes the adapters, the domain and the server, and starts them.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use prometheus_client::registry::Registry as MetricsRegistry;
use sanjay_proto::{
    edge::v1::router_link_server::RouterLinkServer,
    router::v1::{RouterNode, router_server::RouterServer},
};
use sanjay_runtime::{
    Context, MilestoneRing, ReadinessFlag, Validate,
    grpc::{MAX_MESSAGE, ServeOptions, cluster_auth, serve_with},
    random,
};
use tokio::{
    net::TcpListener,
    sync::watch,
    time::{MissedTickBehavior, interval},
};
use tonic::service::{Routes, interceptor::InterceptedService};

use crate::{
    asks::Asks,
    bus::{
        Bus, BusError, Sink,
        measured::Measured,
        redis::{RedisBus, metrics::BusMetrics},
    },
    config::Config,
    fanout::Fanout,
    grpc::{RouterLinkService, RouterService},
    history::Histories,
    leases::Leases,
    link::{LinkLimits, Links},
    metrics::Metrics,
    outage::Outage,
    publish::Publisher,
    reconcile::Reconciler,
    redis::metrics::RedisMetrics,
    registry::{
        Registry,
        memory::{Limits, Memory},
        redis::RedisRegistry,
    },
    relay::Relay,
    subscriptions::Subscriptions,
    watchers::Watchers,
};

const SERVICES: [&str; 2] = ["sanjay.edge.v1.RouterLink", "sanjay.router.v1.Router"];

/// Starts a router on `listener` with the adapters that `router.registry` names. Its tasks belong to
/// `context.lifecycle`; metrics are added to `registry`. Redis need not be there yet.
///
/// # Errors
/// When the configuration is not valid, or the server cannot be set up.
pub async fn start(
    mut config: Config,
    listener: TcpListener,
    context: Context,
    registry: &mut MetricsRegistry,
) -> anyhow::Result<()> {
    config.validate()?;
    if config.node.is_empty() {
        config.node = random::node_name("router", &*context.random);
    }
    let (clock, random) = (Arc::clone(&context.clock), Arc::clone(&context.random));
    let (known, bus): (Arc<dyn Registry>, Arc<dyn Bus>) = match config.redis()? {
        None => {
            let (channels, history_bytes) = (config.max_channels, config.max_history_bytes);
            let limits = Limits { channels, history_bytes, ..Limits::default() };
            let memory = Memory::keeping(limits, context.namespaces.clone(), clock, random);
            (Arc::new(memory.registry()), Arc::new(memory.bus(config.node.as_str().into())))
        }
        Some(redis) => {
            tracing::info!(redis = redis.address(), db = redis.db, "routers meet in Redis");
            let lease = Duration::from_millis(config.lease_ms.into());
            let metrics = RedisMetrics::register(registry);
            let namespaces = context.namespaces.clone();
            let known =
                RedisRegistry::new(redis.clone(), lease, clock, Arc::clone(&random), metrics, namespaces)?;
            let (lifecycle, metrics) = (context.lifecycle.clone(), BusMetrics::register(registry));
            let bus = RedisBus::new(redis, &config.node, lifecycle, random, metrics);
            (Arc::new(known), Arc::new(bus.context("cannot set up Redis")?))
        }
    };
    start_with(config, listener, context, registry, known, bus).await
}

/// Like [`start`], on adapters of the caller's choice.
///
/// # Errors
/// When the configuration is not valid, the bus does not take the router, or the server cannot be set up.
pub async fn start_with(
    config: Config,
    listener: TcpListener,
    context: Context,
    metrics: &mut MetricsRegistry,
    registry: Arc<dyn Registry>,
    bus: Arc<dyn Bus>,
) -> anyhow::Result<()> {
    config.validate()?;
    let ready = context.readiness.register("router");
    let metrics = Metrics::register(metrics);
    let router: Arc<str> = config.node.as_str().into();
    let lease = Duration::from_millis(config.lease_ms.into());
    let milestones = Arc::new(MilestoneRing::new(config.milestones, "router", Arc::clone(&context.clock)));
    let fanout = Arc::new(Fanout::new(Arc::clone(&milestones), metrics.clone()));
    let sink = Arc::new(Measured {
        sink: Arc::clone(&fanout) as Arc<dyn Sink>,
        clock: Arc::clone(&context.clock),
        latency: metrics.bus_latency.clone(),
    });
    match bus.listen(sink).await {
        // It goes on trying, and until then every call says what is wrong.
        Err(error @ BusError::Unavailable(_)) => tracing::warn!(%error, "the bus is not there yet"),
        listening => listening.context("listening on the bus")?,
    }
    let publisher = Publisher::new(Arc::clone(&registry), Arc::clone(&milestones), metrics.clone());
    let publisher = Arc::new(publisher.with_namespaces(context.namespaces.clone()));
    let relay = Arc::new(Relay::new(
        Arc::clone(&registry),
        Arc::clone(&bus),
        Arc::clone(&fanout),
        Arc::clone(&milestones),
        metrics.clone(),
        Arc::clone(&router),
        lease,
    ));
    let reconciler =
        Reconciler::new(Arc::clone(&fanout), Arc::clone(&registry), metrics.clone(), !bus.is_candid());
    let asks = Arc::new(Asks::new(Arc::clone(&fanout), context.random.next_u64(), lease));
    let watchers = Arc::new(Watchers::new(Arc::clone(&fanout), Arc::clone(&context.clock)));
    let node = RouterNode {
        router_id: config.node.clone(),
        build: env!("CARGO_PKG_VERSION").into(),
        since_us: context.clock.now_us(),
        edges: 0,
    };
    let links = Arc::new(Links {
        fanout: Arc::clone(&fanout),
        subscriptions: Subscriptions::new(Arc::clone(&fanout), bus, Arc::clone(&registry)),
        asks: Arc::clone(&asks),
        watchers: Arc::clone(&watchers),
        registry: Arc::clone(&registry),
        publisher: Arc::clone(&publisher),
        milestones: Arc::clone(&milestones),
        metrics: metrics.clone(),
        lifecycle: context.lifecycle.clone(),
        router,
        incarnation: context.random.next_u64(),
        limits: LinkLimits {
            mailbox: config.mailbox_capacity,
            channels: config.max_channels_per_edge,
            sessions: config.max_sessions_per_edge,
            lease,
        },
        closing: Outage::default(),
    });
    // A registry that answers at once makes a router that is ready at once.
    let serving = watch::Sender::new(registry.maintain().await.is_ok());
    ready.set(*serving.borrow());
    let auth = cluster_auth(&context.cluster_key);
    let link = RouterLinkServer::new(RouterLinkService { links }).max_decoding_message_size(MAX_MESSAGE);
    let histories = Histories::new(Arc::clone(&registry), context.namespaces.clone(), metrics);
    let server = RouterServer::new(RouterService {
        publisher,
        relay,
        milestones,
        histories,
        asks,
        node,
        watchers,
        soft: context.lifecycle.soft(),
    })
    .max_decoding_message_size(MAX_MESSAGE);
    let routes = Routes::new(InterceptedService::new(link, auth.clone()))
        .add_service(InterceptedService::new(server, auth.clone()));
    let options = ServeOptions {
        name: "router server",
        routes,
        key: Some(auth),
        health: &SERVICES,
        reflection: config.reflection,
        serving: Some(serving.subscribe()),
    };
    serve_with(listener, options, &context.lifecycle).await?;
    let leases = Leases::new(Arc::clone(&fanout), Arc::clone(&registry), lease);
    spawn_upkeep(&context, registry, fanout, ready, serving);
    let soft = context.lifecycle.soft();
    context.lifecycle.spawn("router reconciler", async move {
        soft.run_until_cancelled(reconciler.run()).await;
    });
    let soft = context.lifecycle.soft();
    context.lifecycle.spawn("router leases", async move {
        soft.run_until_cancelled(leases.run()).await;
    });
    Ok(())
}

/// Failures of the registry's upkeep in a row, a second apart, after which the router says that it does not serve:
/// edges and delivery nodes then go to a router that does, if there is one.
const FAILURES: u32 = 2;

/// Once a second: forget what expired, measure what nothing else measures. The router is ready when the registry
/// answered for the first time, and serves while it does.
fn spawn_upkeep(
    context: &Context,
    registry: Arc<dyn Registry>,
    fanout: Arc<Fanout>,
    ready: ReadinessFlag,
    serving: watch::Sender<bool>,
) {
    let soft = context.lifecycle.soft();
    context.lifecycle.spawn("router upkeep", async move {
        let (maintaining, mut failures) = (Outage::default(), 0);
        let mut ticks = interval(Duration::from_secs(1));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while soft.run_until_cancelled(ticks.tick()).await.is_some() {
            fanout.measure();
            match registry.maintain().await {
                Ok(()) => {
                    ready.set(true);
                    failures = 0;
                    serving.send_if_modified(|serves| !std::mem::replace(serves, true));
                    if maintaining.ends() {
                        tracing::info!("the registry is maintained again");
                    }
                }
                Err(error) => {
                    if maintaining.begins() {
                        tracing::warn!(%error, "could not maintain the registry");
                    }
                    failures += 1;
                    serving
                        .send_if_modified(|serves| failures >= FAILURES && std::mem::replace(serves, false));
                }
            }
        }
    });
}
