use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use prometheus_client::registry::Registry as MetricsRegistry;
use sanjay_proto::router::v1::NewPublication;
use sanjay_runtime::{ManualClock, MilestoneRing, SeededRandom};
use tokio::time::Instant;

use super::*;
use crate::{
    downlink::{Downlink, End},
    metrics::Metrics,
    registry::{
        Assigned, EdgeRef, HistoryPage, HistoryQuery, Location, Top, UserSession,
        memory::{Limits, Memory, MemoryRegistry},
    },
};

const LEASE: Duration = Duration::from_secs(10);

/// A registry that refuses to renew and to sweep for some time.
struct Fragile {
    registry: MemoryRegistry,
    refusals: AtomicUsize,
}

impl Fragile {
    fn refuse(&self) -> Result<(), RegistryError> {
        let left = self.refusals.load(Ordering::Relaxed);
        if left == 0 {
            return Ok(());
        }
        self.refusals.store(left - 1, Ordering::Relaxed);
        Err(RegistryError::Unavailable("told to".into()))
    }
}

#[async_trait]
impl Registry for Fragile {
    async fn publish(&self, publications: Vec<NewPublication>) -> Vec<Result<Assigned, RegistryError>> {
        self.registry.publish(publications).await
    }

    async fn tops(&self, channels: &[Arc<str>]) -> Vec<Result<Top, RegistryError>> {
        self.registry.tops(channels).await
    }

    async fn history(&self, query: &HistoryQuery) -> Result<HistoryPage, RegistryError> {
        self.registry.history(query).await
    }

    async fn attach(&self, edge: &EdgeRef, router: &Arc<str>) -> Result<Attachment, RegistryError> {
        self.registry.attach(edge, router).await
    }

    async fn detach(&self, attachment: &Attachment) -> Result<(), RegistryError> {
        self.registry.detach(attachment).await
    }

    async fn renew(&self, attachments: &[Attachment]) -> Vec<Result<(), RegistryError>> {
        match self.refuse() {
            Ok(()) => self.registry.renew(attachments).await,
            Err(error) => attachments.iter().map(|_| Err(error.clone())).collect(),
        }
    }

    async fn sweep(&self, attachment: &Attachment) -> Result<usize, RegistryError> {
        self.refuse()?;
        self.registry.sweep(attachment).await
    }

    async fn open_sessions(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Vec<Result<(), RegistryError>> {
        self.registry.open_sessions(attachment, sessions).await
    }

    async fn close_sessions(
        &self,
        attachment: &Attachment,
        sessions: &[UserSession],
    ) -> Result<(), RegistryError> {
        self.registry.close_sessions(attachment, sessions).await
    }

    async fn locate(&self, users: &[Arc<str>]) -> Result<Vec<Vec<Location>>, RegistryError> {
        self.registry.locate(users).await
    }

    fn is_settled(&self) -> bool {
        self.registry.is_settled()
    }

    async fn maintain(&self) -> Result<(), RegistryError> {
        self.registry.maintain().await
    }
}

fn fragile(refusals: usize) -> Arc<Fragile> {
    let clock = Arc::new(ManualClock::new(1));
    let memory = Memory::new(Limits::default(), clock, Arc::new(SeededRandom::new(1)));
    Arc::new(Fragile { registry: memory.registry(), refusals: AtomicUsize::new(refusals) })
}

fn edge() -> EdgeRef {
    EdgeRef { id: "e1".into(), incarnation: 1 }
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_when_the_registry_knows_it_no_more_and_not_when_it_fails() {
    let registry = fragile(2);
    let metrics = Metrics::register(&mut MetricsRegistry::default());
    let milestones = Arc::new(MilestoneRing::new(10, "router", Arc::new(ManualClock::new(1))));
    let fanout = Arc::new(Fanout::new(milestones, metrics.clone()));
    let leases = Leases::new(Arc::clone(&fanout), Arc::clone(&registry) as _, LEASE);
    let attachment = registry.attach(&edge(), &"r1".into()).await.unwrap();
    let (link, _receiver) = Downlink::new(attachment, 10, metrics);
    fanout.attach(&link);
    for _ in 0..3 {
        leases.renew().await;
        assert_eq!(link.reason(), None);
    }
    registry.attach(&edge(), &"r2".into()).await.unwrap();
    let running = tokio::spawn(leases.run());
    let began = Instant::now();
    link.ended.cancelled().await;
    assert!(began.elapsed() <= LEASE / 3);
    assert_eq!(link.reason(), Some(&End::Superseded));
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn a_sweep_that_is_refused_comes_again() {
    let registry = fragile(2);
    let attachment = registry.attach(&edge(), &"r1".into()).await.unwrap();
    let bob = UserSession { user: "bob".into(), session: [1; 16], inbox: true };
    registry.open_sessions(&attachment, &[bob]).await.remove(0).unwrap();
    registry.detach(&attachment).await.unwrap();
    let began = Instant::now();
    sweep_after(LEASE, LEASE, &*registry, &attachment).await;
    assert_eq!(began.elapsed(), LEASE * 3);
    assert!(registry.locate(&["bob".into()]).await.unwrap()[0].is_empty());
}
