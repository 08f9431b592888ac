//! Puts a delivery node together.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use prometheus_client::registry::Registry;
use sanjay_proto::{
    delivery::v1::{control_server::ControlServer, delivery_server::DeliveryServer},
    edge::v1::{inbox_server::InboxServer, revocations_server::RevocationsServer},
};
use sanjay_runtime::{
    Context, MilestoneRing, Validate,
    grpc::{MAX_MESSAGE, PeerMetrics, PeerPool, PoolOptions, ServeOptions, cluster_auth, serve_with},
};
use tokio::{net::TcpListener, sync::Notify};
use tonic::service::{Routes, interceptor::InterceptedService};

use crate::{
    audit::Audit,
    auth::ApiKeys,
    config::{Config, Devices},
    dead::DeadLetters,
    events::Events,
    fanout::{Channels, FanOut},
    grpc::{BackendApi, ControlApi, EdgeApi, RevocationsApi, readers, room},
    inbox::{Committed, Inbox},
    metrics::{Metrics, PEERS},
    path::{Paths, Recipients, SERVICE},
    publish,
    redeliver::Redelivery,
    relay,
    revocations::Revocations,
    router::Router,
    schedule::Schedule,
    settled,
    store::{self, StoreOptions},
    sweep::Sweep,
};

/// How many milestones are remembered.
const MILESTONES: usize = 65_536;

/// How long connecting to a router may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Full name of the service whose health decides whether a router is called.
const ROUTER_SERVICE: &str = "sanjay.router.v1.Router";

/// Full names of the gRPC services, for health.
const SERVICES: &[&str] = &[
    "sanjay.delivery.v1.Delivery",
    "sanjay.delivery.v1.Control",
    "sanjay.edge.v1.Inbox",
    "sanjay.edge.v1.Revocations",
];

/// Starts a delivery node on `listener`: opens the store, and runs everything on the context's lifecycle.
/// Returns once it serves.
///
/// # Errors
/// When the configuration is wrong or the store cannot be opened; the text says what to do.
pub async fn start(
    config: Config,
    listener: TcpListener,
    context: Context,
    registry: &mut Registry,
) -> anyhow::Result<()> {
    config.validate()?;
    let ready = context.readiness.register("delivery");
    let metrics = Metrics::register(registry);
    let ring = Arc::new(MilestoneRing::new(MILESTONES, SERVICE, context.clock.clone()));
    let (relay_queue, relay) = relay::queue(metrics.clone());
    let events = Events::new(context.clock.clone(), metrics.clone());
    let (notices, telling) = settled::queue(metrics.clone());
    let options = StoreOptions {
        on_commit: Arc::new(Committed {
            relay: relay_queue,
            notices: notices.clone(),
            ring: ring.clone(),
            events: events.clone(),
            metrics: metrics.clone(),
        }),
        max_unsettled: config.max_unsettled,
        max_unsettled_bytes: config.max_unsettled_bytes,
        overflow: config.overflow.into(),
        keep_expired: config.keep_expired,
        max_attempts: config.max_attempts,
        clock: context.clock.clone(),
        random: context.random.clone(),
        metrics: metrics.clone(),
    };
    let store =
        store::open(&config.location()?, options).await.context("the inbox store cannot be opened")?;
    let router = routers(&config, &context, &PeerMetrics::register(registry, "delivery", &PEERS), &metrics)?;
    let recipients = Arc::new(Recipients::default());

    // These three end by themselves when what feeds them is gone: the store, and the services.
    let relaying = relay.run(router.clone(), ring.clone(), events.clone(), context.lifecycle.soft());
    spawn(&context, "delivery relay", relaying);
    spawn(&context, "delivery notices", telling.run(router.clone(), context.lifecycle.soft()));
    let (publisher, lane) = publish::queue(ring.clone(), context.clock.clone(), context.random.clone());
    spawn(&context, "delivery publish", lane.run(router.clone()));
    let redelivery = Redelivery {
        store: store.clone(),
        router: router.clone(),
        ring: ring.clone(),
        clock: store.clock(),
        random: context.random.clone(),
        metrics: metrics.clone(),
    };
    spawn(&context, "delivery redelivery", redelivery.run(context.lifecycle.soft()));
    let sweep = Sweep { store: store.clone(), clock: store.clock() };
    if config.devices == Devices::Every {
        let forgotten = metrics.devices.forgotten.clone();
        spawn(&context, "delivery devices", sweep.clone().forget(forgotten, context.lifecycle.soft()));
    }
    spawn(&context, "delivery expiry", sweep.clone().expire(context.lifecycle.soft()));
    spawn(&context, "delivery sweep", sweep.run(context.lifecycle.soft()));
    let schedule = Schedule { store: store.clone(), clock: store.clock() };
    spawn(&context, "delivery schedule", schedule.run(context.lifecycle.soft()));

    let wake = Arc::new(Notify::new());
    let fan_out = FanOut {
        store: store.clone(),
        ring: ring.clone(),
        clock: store.clock(),
        metrics: metrics.clone(),
        wake: wake.clone(),
    };
    spawn(&context, "delivery fan-out", fan_out.run(context.lifecycle.soft()));
    let measuring = FanOut::measure(store.clone(), metrics.clone(), store.clock(), context.lifecycle.soft());
    spawn(&context, "delivery fan-out backlog", measuring);
    let channels = Channels {
        store: store.clone(),
        ring: ring.clone(),
        clock: context.clock.clone(),
        random: context.random.clone(),
        metrics: metrics.clone(),
        max_age: config.max_age(),
        max_members: config.max_members,
        wake,
    };

    let audit = Audit::new(store.clone(), metrics.clone());
    spawn(&context, "delivery audit", audit.run(context.lifecycle.soft()));

    let inbox = Inbox {
        store: store.clone(),
        notices,
        ring: ring.clone(),
        recipients: recipients.clone(),
        events,
        clock: context.clock.clone(),
        random: context.random.clone(),
        metrics: metrics.clone(),
        max_age: config.max_age(),
    };
    let dead_letters = DeadLetters {
        store: store.clone(),
        ring: ring.clone(),
        recipients: recipients.clone(),
        clock: context.clock.clone(),
        random: context.random.clone(),
        metrics: metrics.clone(),
    };
    let revocations = Revocations::new(store.clone(), config.max_token_life(), metrics.clone());
    spawn(&context, "delivery revocations", revocations.clone().run(context.lifecycle.soft()));
    let telling = RevocationsApi { revocations: revocations.clone(), stop: context.lifecycle.soft() };
    let control = ControlApi {
        router: router.clone(),
        metrics: metrics.clone(),
        clock: context.clock.clone(),
        random: context.random.clone(),
        revocations,
        deadline: config.call_timeout(),
        room: room(),
        stop: context.lifecycle.soft(),
    };
    let backend = BackendApi {
        inbox: inbox.clone(),
        dead_letters,
        publisher,
        channels,
        paths: Paths { ring, recipients, store, router },
        metrics,
        log_readers: readers(),
        deadline: config.call_timeout(),
        stop: context.lifecycle.soft(),
    };
    let every_device = config.devices == Devices::Every;
    let edge = EdgeApi { inbox, deadline: config.call_timeout(), every_device };
    serve(&config, listener, &context, (backend, control), (edge, telling)).await?;
    ready.set(true);
    Ok(())
}

/// The routers that the configuration names.
fn routers(
    config: &Config,
    context: &Context,
    peers: &PeerMetrics,
    metrics: &Metrics,
) -> anyhow::Result<Router> {
    let options = PoolOptions {
        peer: "router",
        setting: "delivery.router",
        endpoints: &config.router,
        service: ROUTER_SERVICE,
        lanes: 1,
        connect_timeout: CONNECT_TIMEOUT,
        ready: None,
        up: Some(metrics.router_up.clone()),
        breaker: Some(metrics.breakers.state("router")),
        metrics: peers,
    };
    Ok(Router::new(PeerPool::start(options, context)?))
}

/// Runs a task without which the node makes no sense.
fn spawn(context: &Context, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
    context.lifecycle.spawn_vital(name, async move {
        task.await;
        Ok(())
    });
}

/// Serves both APIs, each behind its own key.
async fn serve(
    config: &Config,
    listener: TcpListener,
    context: &Context,
    (backend, control): (BackendApi, ControlApi),
    (edge, telling): (EdgeApi, RevocationsApi),
) -> anyhow::Result<()> {
    let backend = DeliveryServer::new(backend).max_decoding_message_size(MAX_MESSAGE);
    let edge = InboxServer::new(edge).max_decoding_message_size(MAX_MESSAGE);
    let telling = RevocationsServer::new(telling).max_decoding_message_size(MAX_MESSAGE);
    let control = ControlServer::new(control).max_decoding_message_size(MAX_MESSAGE);
    let (mut routes, auth) = (Routes::builder(), cluster_auth(&context.cluster_key));
    routes
        .add_service(InterceptedService::new(backend, ApiKeys::new(&config.api_keys)))
        .add_service(InterceptedService::new(control, ApiKeys::new(&config.api_keys)))
        .add_service(InterceptedService::new(telling, auth.clone()))
        .add_service(InterceptedService::new(edge, auth.clone()));
    let options = ServeOptions {
        name: "delivery grpc",
        routes: routes.routes(),
        key: Some(auth),
        health: SERVICES,
        reflection: config.reflection,
        serving: None,
    };
    serve_with(listener, options, &context.lifecycle).await
}
