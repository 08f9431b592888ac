//! Inbox hints to the edges that hold a user, and where users are.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures::future::join_all;
use parking_lot::Mutex;
use sanjay_proto::{edge::v1::InboxHint, router::v1::RelayOutcome};
use sanjay_runtime::MilestoneRing;
use tokio::time::Instant;

use crate::{
    bus::{Bus, BusError, EdgeHint},
    fanout::Fanout,
    metrics::Metrics,
    outage::Outage,
    registry::{EdgeRef, Location, Registry, RegistryError},
    spans::{self, Relays},
};

/// Hands hints on. A hint may be lost anywhere on its way; the inbox is authoritative.
pub(crate) struct Relay {
    registry: Arc<dyn Registry>,
    bus: Arc<dyn Bus>,
    fanout: Arc<Fanout>,
    milestones: Arc<MilestoneRing>,
    spans: Relays,
    metrics: Metrics,
    router: Arc<str>,
    /// Until then edges may not have announced yet what they hold.
    settled_at: Instant,
    /// Of the registry's answers.
    locating: Outage,
    /// The routers that the bus does not reach at present.
    unreached: Mutex<HashSet<Arc<str>>>,
}

/// Where a user is.
pub(crate) struct Whereabouts {
    pub(crate) sessions: Vec<Location>,
    /// False while there may be more.
    pub(crate) complete: bool,
}

/// Hints for other routers, with the places of their outcomes.
type Elsewhere = HashMap<Arc<str>, (Vec<EdgeHint>, Vec<usize>)>;

impl Relay {
    pub(crate) fn new(
        registry: Arc<dyn Registry>,
        bus: Arc<dyn Bus>,
        fanout: Arc<Fanout>,
        milestones: Arc<MilestoneRing>,
        metrics: Metrics,
        router: Arc<str>,
        lease: Duration,
    ) -> Self {
        let settled_at = Instant::now() + lease;
        Self {
            registry,
            bus,
            fanout,
            milestones,
            spans: Relays::default(),
            metrics,
            router,
            settled_at,
            locating: Outage::default(),
            unreached: Mutex::default(),
        }
    }

    /// Hands each hint to every edge where its user takes part in the inbox, once an edge. Outcomes stand
    /// in the same order.
    pub(crate) async fn relay(&self, hints: Vec<InboxHint>) -> Vec<RelayOutcome> {
        let users: Vec<Arc<str>> = hints.iter().map(|hint| hint.user.as_str().into()).collect();
        let began = Instant::now();
        let places = match self.registry.locate(&users).await {
            Ok(mut places) => {
                if self.locating.ends() {
                    tracing::info!("it is known again where users are");
                }
                places.iter_mut().for_each(|places| places.retain(|place| place.inbox));
                places
            }
            Err(error) => {
                if self.locating.begins() {
                    tracing::warn!(%error, "cannot tell where users are");
                }
                Vec::new()
            }
        };
        let mut edges = vec![0_usize; hints.len()];
        let mut elsewhere = Elsewhere::new();
        let mut spans = Vec::new();
        // Of hints about a message alone; others neither count nor leave a milestone.
        let ids: Vec<_> = hints.iter().map(message_id).collect();
        for (at, (mut hint, places)) in hints.into_iter().zip(&places).enumerate() {
            spans.push(self.spans.relay(&mut hint, began.elapsed()));
            hint.sessions = u32::try_from(places.len()).unwrap_or(u32::MAX);
            edges[at] = self.hand_over(at, &Arc::new(hint), places, &mut elsewhere);
        }
        self.send_elsewhere(elsewhere, &mut edges).await;
        spans.iter().zip(&edges).for_each(|(span, edges)| spans::relayed(span, *edges));
        drop(spans);
        let outcomes = edges.iter().zip(ids).enumerate().map(|(at, (&edges, id))| {
            let outcome = match places.get(at) {
                _ if edges > 0 => RelayOutcome::Relayed,
                Some(places) if places.is_empty() && self.is_settled() => RelayOutcome::Offline,
                _ => RelayOutcome::Unspecified,
            };
            let Some(id) = id else { return outcome };
            if edges > 0 {
                let detail = if edges == 1 { "1 edge".into() } else { format!("{edges} edges") };
                self.milestones.record(&id, "relayed", detail);
            }
            self.metrics.relay(outcome);
            outcome
        });
        outcomes.collect()
    }

    /// Where each user is, in the order given.
    pub(crate) async fn locate(&self, users: &[Arc<str>]) -> Result<Vec<Whereabouts>, RegistryError> {
        let places = self.registry.locate(users).await?;
        let settled = self.is_settled();
        let whereabouts = places.into_iter().map(|sessions| {
            let complete = settled && sessions.iter().all(|place| place.attached);
            Whereabouts { sessions, complete }
        });
        Ok(whereabouts.collect())
    }

    /// Whether nobody else can be connected than whom the registry told of; to be asked after it told.
    pub(crate) fn is_settled(&self) -> bool {
        Instant::now() >= self.settled_at && self.registry.is_settled()
    }

    /// Gives the hint to the edges of this router and puts it beside those of other routers; returns how
    /// many took it.
    fn hand_over(
        &self,
        at: usize,
        hint: &Arc<InboxHint>,
        places: &[Location],
        elsewhere: &mut Elsewhere,
    ) -> usize {
        let mut seen: Vec<&EdgeRef> = Vec::new();
        let mut taken = 0;
        for place in places {
            if seen.contains(&&place.edge) {
                continue;
            }
            seen.push(&place.edge);
            if let Some(link) = self.fanout.link(&place.edge) {
                taken += usize::from(link.hint(hint));
            } else if place.attached && place.router != self.router {
                let (hints, at_places) = elsewhere.entry(Arc::clone(&place.router)).or_default();
                hints.push(EdgeHint { edge: place.edge.clone(), hint: Arc::clone(hint) });
                at_places.push(at);
            }
        }
        taken
    }

    /// To all routers at once: one that does not answer must not hold up the others.
    async fn send_elsewhere(&self, elsewhere: Elsewhere, edges: &mut [usize]) {
        let relays = elsewhere.into_iter().map(|(router, (hints, places))| async move {
            let relayed = self.bus.relay(&router, hints).await;
            (router, relayed, places)
        });
        for (router, relayed, places) in join_all(relays).await {
            self.note_reached(&router, relayed.as_ref().err());
            match relayed {
                Ok(true) => places.into_iter().for_each(|at| edges[at] += 1),
                Ok(false) => tracing::debug!(%router, "a router that has sessions does not listen"),
                Err(_) => {}
            }
        }
    }

    /// Logs when a router is out of reach, and when it is not any more.
    fn note_reached(&self, router: &Arc<str>, error: Option<&BusError>) {
        let mut unreached = self.unreached.lock();
        match error {
            Some(error) => {
                if unreached.insert(Arc::clone(router)) {
                    tracing::warn!(%router, %error, "could not relay hints");
                }
            }
            None => {
                if unreached.remove(router) {
                    tracing::info!(%router, "hints are relayed again");
                }
            }
        }
    }
}

fn message_id(hint: &InboxHint) -> Option<prost::bytes::Bytes> {
    hint.message.as_ref().map(|message| message.message_id.clone())
}
