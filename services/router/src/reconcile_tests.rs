//! A loss that no later publication reveals becomes a gap, and what is only under way does not.

use sanjay_proto::{client::v1::Publication, edge::v1::router_event::Event};
use sanjay_runtime::{ManualClock, MilestoneRing, mailbox::Receiver, random::SeededRandom};

use super::*;
use crate::{
    bus::{Missed, Sink},
    downlink::{Down, Downlink},
    registry::{
        Attachment, EdgeRef,
        memory::{Limits, Memory},
        suite,
    },
};

/// A router whose bus loses whatever the test does not hand on.
struct Lossy {
    fanout: Arc<Fanout>,
    registry: Arc<dyn Registry>,
    reconciler: Arc<Reconciler>,
    metrics: Metrics,
    link: Arc<Downlink>,
    receiver: Receiver<Down>,
}

impl Lossy {
    async fn new(channels: &[&str]) -> Self {
        let clock = Arc::new(ManualClock::new(1));
        let metrics = Metrics::default();
        let milestones = Arc::new(MilestoneRing::new(10, "router", clock.clone()));
        let fanout = Arc::new(Fanout::new(milestones, metrics.clone()));
        let memory = Memory::new(Limits::default(), clock, Arc::new(SeededRandom::new(1)));
        let registry: Arc<dyn Registry> = Arc::new(memory.registry());
        let edge = EdgeRef { id: "e1".into(), incarnation: 1 };
        let attachment = Attachment { edge, router: "r1".into(), number: 1 };
        let (link, receiver) = Downlink::new(attachment, 100_000, metrics.clone());
        fanout.attach(&link);
        for channel in channels {
            let channel: Arc<str> = Arc::from(*channel);
            fanout.join(&channel, &link);
            fanout.set_on_bus(&channel);
            let [top] = registry.tops(&[Arc::clone(&channel)]).await.try_into().unwrap();
            fanout.go_live(&channel, &link, top.unwrap());
        }
        let reconciler =
            Arc::new(Reconciler::new(Arc::clone(&fanout), Arc::clone(&registry), metrics.clone(), true));
        let mut lossy = Self { fanout, registry, reconciler, metrics, link, receiver };
        assert_eq!(lossy.take().len(), channels.len());
        lossy
    }

    /// Publishes, and returns the publication that the bus should have carried.
    async fn publish(&self, channel: &str) -> Arc<Publication> {
        let new = suite::publication(channel, "");
        let [assigned] = self.registry.publish(vec![new]).await.try_into().unwrap();
        let at = assigned.unwrap().at;
        let (channel, epoch) = (channel.into(), at.epoch.to_string());
        Arc::new(Publication { channel, epoch, offset: at.offset, ..Publication::default() })
    }

    async fn look(&self, suspects: Suspects) {
        assert_eq!(self.reconciler.look(suspects).await, Suspects::Nothing);
    }

    fn take(&mut self) -> Vec<String> {
        let mut taken = Vec::new();
        self.receiver.try_recv_many(&mut taken, 100_000);
        let text = |down| match down {
            Down::Reply(Event::Subscribed(event)) => format!("subscribed {}", event.offset),
            Down::Publication(publication) => format!("{} {}", publication.channel, publication.offset),
            Down::Gap { channel, top } => format!("gap {channel} {}", top.offset),
            Down::Resync => "resync".into(),
            other => format!("{other:?}"),
        };
        taken.into_iter().map(text).collect()
    }
}

fn only(channel: &str) -> Suspects {
    Suspects::Some([Arc::from(channel)].into())
}

#[tokio::test(start_paused = true)]
async fn a_lost_last_message_is_found() {
    let mut router = Lossy::new(&["a", "b", "c"]).await;
    for channel in ["a", "b"] {
        let arrives = router.publish(channel).await;
        router.fanout.publication(&arrives);
    }
    let late = router.publish("b").await;
    router.look(Suspects::All).await;
    assert_eq!(router.take(), ["a 1", "b 1", "gap b 2"]);
    assert_eq!(router.metrics.losses.get(), 1);
    router.look(Suspects::All).await;
    router.fanout.publication(&late);
    assert!(router.take().is_empty(), "told once, and what comes too late is dropped");
    let next = router.publish("b").await;
    router.fanout.publication(&next);
    assert_eq!(router.take(), ["b 3"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_under_way_is_not_lost() {
    let mut router = Lossy::new(&["a"]).await;
    let under_way = router.publish("a").await;
    let began = Instant::now();
    let reconciler = Arc::clone(&router.reconciler);
    let looking = tokio::spawn(async move { reconciler.look(only("a")).await });
    sleep(UNDER_WAY / 2).await;
    assert!(!looking.is_finished(), "it looks a second time");
    router.fanout.publication(&under_way);
    assert_eq!(looking.await.unwrap(), Suspects::Nothing);
    assert!(began.elapsed() >= UNDER_WAY);
    assert_eq!(router.take(), ["a 1"]);
    assert_eq!(router.metrics.losses.get(), 0);
}

#[tokio::test(start_paused = true)]
async fn another_epoch_counts_as_lost_even_without_a_publication() {
    let mut router = Lossy::new(&["a"]).await;
    let old = router.publish("a").await;
    router.fanout.publication(&old);
    assert_eq!(router.take(), ["a 1"]);
    let new = Top { epoch: "ffff".into(), offset: 0 };
    assert!(router.fanout.is_behind("a", &new));
    assert!(router.fanout.lost(&"a".into(), &new));
    assert_eq!(router.take(), ["gap a 0"]);
    let stale = Publication { offset: 2, ..(*old).clone() };
    router.fanout.publication(&Arc::new(stale));
    assert!(router.take().is_empty(), "the former epoch is over");
    let first = Publication { epoch: "ffff".into(), offset: 1, ..(*old).clone() };
    router.fanout.publication(&Arc::new(first));
    assert_eq!(router.take(), ["a 1"]);
}

#[tokio::test(start_paused = true)]
async fn an_interruption_is_looked_into_at_once_and_all_is_looked_at_regularly() {
    let mut router = Lossy::new(&["a", "b"]).await;
    let reconciler = Arc::clone(&router.reconciler);
    let reconciler = Reconciler::new(
        Arc::clone(&reconciler.fanout),
        Arc::clone(&reconciler.registry),
        router.metrics.clone(),
        true,
    );
    let running = tokio::spawn(reconciler.run());
    router.publish("a").await;
    router.publish("b").await;
    router.fanout.missed(Missed::Channel("a"));
    router.fanout.missed(Missed::Hints);
    sleep(UNDER_WAY * 2).await;
    assert_eq!(router.take(), ["resync", "gap a 1"]);
    sleep(EVERY).await;
    assert_eq!(router.take(), ["gap b 1"]);
    running.abort();
}

#[tokio::test(start_paused = true)]
async fn who_joined_at_the_top_is_told_nothing() {
    let mut router = Lossy::new(&["a"]).await;
    router.publish("a").await;
    let edge = EdgeRef { id: "e2".into(), incarnation: 1 };
    let attachment = Attachment { edge, router: "r1".into(), number: 2 };
    let (link, mut receiver) = Downlink::new(attachment, 100, Metrics::default());
    let channel: Arc<str> = "a".into();
    router.fanout.join(&channel, &link);
    let [top] = router.registry.tops(&[Arc::clone(&channel)]).await.try_into().unwrap();
    router.fanout.go_live(&channel, &link, top.unwrap());
    router.look(Suspects::All).await;
    assert_eq!(router.take(), ["gap a 1"]);
    let mut taken = Vec::new();
    receiver.try_recv_many(&mut taken, 10);
    assert!(matches!(taken[..], [Down::Reply(_)]), "{taken:?}");
    // A channel that nobody holds is not looked at.
    router.fanout.leave(&channel, &link);
    router.fanout.leave(&channel, &router.link.clone());
    router.publish("a").await;
    router.look(only("a")).await;
    assert!(router.take().is_empty());
}

#[tokio::test]
async fn suspects_add_up_to_all() {
    let router = Lossy::new(&[]).await;
    router.fanout.missed(Missed::Channel("a"));
    router.fanout.missed(Missed::Channel("b"));
    router.fanout.missed(Missed::Channel("a"));
    let both = Suspects::Some([Arc::from("a"), Arc::from("b")].into());
    assert_eq!(router.fanout.suspects().await, both);
    for at in 0..5_000 {
        router.fanout.missed(Missed::Channel(&format!("c{at}")));
    }
    assert_eq!(router.fanout.suspects().await, Suspects::All);
    router.fanout.missed(Missed::Channels);
    router.fanout.suspect(Suspects::Nothing);
    assert_eq!(router.fanout.suspects().await, Suspects::All);
}
