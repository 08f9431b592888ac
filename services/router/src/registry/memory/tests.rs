//! The shared suite over the memory adapters, and what only they promise.

use std::{sync::Arc, time::Duration};

use sanjay_runtime::{ManualClock, Namespace, Namespaces, SeededRandom, SharedNamespaces};
use tokio::time::advance;

use super::{Limits, Memory};
use crate::{
    bus::{Bus, Sink},
    registry::{
        Assigned, EdgeRef, HistoryPage, HistoryQuery, Registry, RegistryError, Top, UserSession,
        suite::{self, Pair, Recorder, publication},
    },
};

fn memory(limits: Limits) -> Arc<Memory> {
    Memory::new(limits, Arc::new(ManualClock::new(1_000_000)), Arc::new(SeededRandom::new(1)))
}

async fn publish(memory: &Arc<Memory>, channel: &str, key: &str) -> Assigned {
    let answers = memory.registry().publish(vec![publication(channel, key)]).await;
    answers.into_iter().next().unwrap().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_passes_the_suite() {
    let make = |router: &str| -> Pair {
        let memory = memory(Limits::default());
        (Arc::new(memory.registry()), Arc::new(memory.bus(router.into())))
    };
    suite::run(make, suite::cases(200, 60)).await;
}

#[tokio::test(start_paused = true)]
async fn a_key_is_known_for_its_window() {
    let memory = memory(Limits::default());
    let first = publish(&memory, "news", "k").await;
    advance(Duration::from_secs(299)).await;
    assert_eq!(publish(&memory, "news", "k").await, Assigned { repeated: true, ..first.clone() });
    assert!(!publish(&memory, "other", "k").await.repeated, "keys belong to a channel");
    advance(Duration::from_secs(1)).await;
    let second = publish(&memory, "news", "k").await;
    assert_eq!((second.repeated, second.at.offset, second.at.epoch), (false, 2, first.at.epoch));
}

#[tokio::test]
async fn the_oldest_key_goes_first() {
    let memory = memory(Limits { dedupe_keys: 2, ..Limits::default() });
    for key in ["a", "b", "c"] {
        publish(&memory, "news", key).await;
    }
    assert!(publish(&memory, "news", "b").await.repeated);
    assert!(publish(&memory, "news", "c").await.repeated);
    assert!(!publish(&memory, "news", "a").await.repeated);
}

#[tokio::test]
async fn keys_are_bounded_across_channels_and_the_oldest_goes_first() {
    let memory = memory(Limits { dedupe_keys: 8, total_dedupe_keys: 64 * 4, ..Limits::default() });
    for at in 0..20_000 {
        publish(&memory, &format!("c{at}"), "k").await;
    }
    assert_eq!(memory.channels.keys(), 64 * 4, "every stripe took its four");
    assert!(publish(&memory, "c19999", "k").await.repeated, "the latest is known");
    assert!(!publish(&memory, "c0", "k").await.repeated, "the oldest is not");
    // A busy channel may have all of its stripe's keys and no more.
    for at in 0..20 {
        publish(&memory, "busy", &format!("k{at}")).await;
    }
    assert!(publish(&memory, "busy", "k16").await.repeated);
    assert!(!publish(&memory, "busy", "k15").await.repeated);
    assert_eq!(memory.channels.keys(), 64 * 4);
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_gone_counts_no_more() {
    let memory = memory(Limits { dedupe_keys: 2, ..Limits::default() });
    for key in ["a", "b", "c"] {
        publish(&memory, "news", key).await;
    }
    assert_eq!(memory.channels.keys(), 2, "the channel's own bound");
    advance(Duration::from_secs(301)).await;
    publish(&memory, "news", "d").await;
    assert_eq!(memory.channels.keys(), 1, "their time");
    advance(Duration::from_secs(601)).await;
    publish(&memory, "news", "").await;
    assert_eq!(memory.channels.keys(), 0, "a new epoch");
    publish(&memory, "news", "e").await;
    advance(Duration::from_secs(601)).await;
    memory.registry().maintain().await.unwrap();
    assert_eq!(memory.channels.keys(), 0, "an idle channel");
}

#[tokio::test(start_paused = true)]
async fn an_idle_channel_begins_a_new_epoch() {
    let memory = memory(Limits::default());
    let first = publish(&memory, "news", "").await;
    advance(Duration::from_secs(599)).await;
    let second = publish(&memory, "news", "").await;
    assert_eq!((&second.at.epoch, second.at.offset), (&first.at.epoch, 2));
    for swept in [false, true] {
        let before = publish(&memory, "news", "").await;
        advance(Duration::from_secs(601)).await;
        if swept {
            memory.registry().maintain().await.unwrap();
        }
        let after = publish(&memory, "news", "").await;
        assert_ne!(after.at.epoch, before.at.epoch);
        assert_eq!(after.at.offset, 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_subscribed_channel_is_kept() {
    let memory = memory(Limits::default());
    let bus = memory.bus("r1".into());
    bus.listen(Arc::new(Recorder::default()) as Arc<dyn Sink>).await.unwrap();
    bus.subscribe(&["news".into()]).await[0].clone().unwrap();
    let first = publish(&memory, "news", "").await;
    for _ in 0..3 {
        advance(Duration::from_secs(601)).await;
        memory.registry().maintain().await.unwrap();
    }
    bus.unsubscribe(&["news".into()]).await.unwrap();
    advance(Duration::from_secs(599)).await;
    assert_eq!(publish(&memory, "news", "").await.at.epoch, first.at.epoch);
}

#[tokio::test(start_paused = true)]
async fn channels_are_bounded_and_idle_ones_make_room() {
    let memory = memory(Limits { channels: 64, ..Limits::default() });
    let fill = async |from: usize| {
        let mut refused = 0;
        for at in from..from + 2_000 {
            let new = publication(&format!("c{at}"), "");
            match memory.registry().publish(vec![new]).await.remove(0) {
                Ok(_) => {}
                Err(RegistryError::TooManyChannels { limit: 64 }) => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
        refused
    };
    assert_eq!(fill(0).await, 1_936, "every stripe took its one");
    advance(Duration::from_secs(601)).await;
    assert_eq!(fill(2_000).await, 1_936);
}

#[tokio::test]
async fn many_sessions_of_an_older_incarnation_go_at_once() {
    let memory = memory(Limits::default());
    let registry = memory.registry();
    let edge = |incarnation| EdgeRef { id: "e1".into(), incarnation };
    let first = registry.attach(&edge(1), &"r1".into()).await.unwrap();
    let session = |at: u32| {
        let mut session = [0; 16];
        session[..4].copy_from_slice(&at.to_le_bytes());
        UserSession { user: format!("u{}", at % 100).into(), session, inbox: true }
    };
    let sessions: Vec<_> = (0..10_000).map(session).collect();
    assert!(registry.open_sessions(&first, &sessions).await.iter().all(Result::is_ok));
    registry.attach(&edge(2), &"r1".into()).await.unwrap();
    let users: Vec<Arc<str>> = (0..100).map(|at| format!("u{at}").into()).collect();
    assert!(registry.locate(&users).await.unwrap().iter().all(Vec::is_empty));
    assert!(memory.sessions.read().is_empty(), "and nothing of them is left");
}

#[tokio::test]
async fn several_routers_share_one_memory() {
    let memory = memory(Limits::default());
    let (a, b) = (memory.bus("a".into()), memory.bus("b".into()));
    a.listen(Arc::new(Recorder::default()) as Arc<dyn Sink>).await.unwrap();
    assert_eq!(b.relay("a", Vec::new()).await, Ok(true));
    drop(a);
    assert_eq!(b.relay("a", Vec::new()).await, Ok(false));
}

fn keeping(limits: Limits, namespace: Namespace) -> Arc<Memory> {
    let namespaces: Namespaces = [("log".to_owned(), namespace)].into_iter().collect();
    let (clock, random) = (Arc::new(ManualClock::new(1_000_000)), Arc::new(SeededRandom::new(1)));
    Memory::keeping(limits, SharedNamespaces::new(namespaces), clock, random)
}

async fn read(memory: &Arc<Memory>, channel: &str, since: Option<Top>) -> HistoryPage {
    let query = HistoryQuery { channel: channel.into(), since, limit: 100, bytes: 1 << 20 };
    memory.registry().history(&query).await.unwrap()
}

fn offsets(page: &HistoryPage) -> Vec<u64> {
    page.publications.iter().map(|publication| publication.offset).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn histories_are_what_the_model_says() {
    let make = |namespaces| -> suite::history::Subject {
        let (clock, random) = (Arc::new(ManualClock::new(1_000_000)), Arc::new(SeededRandom::new(1)));
        let memory = Memory::keeping(Limits::default(), namespaces, clock, random);
        let registry = Arc::new(memory.registry());
        let lose = move |channel: Arc<str>, all: bool| {
            memory.channels.lose(&channel, all);
            Box::pin(async {}) as _
        };
        (registry, Box::new(lose))
    };
    suite::history::run(make, suite::history::cases(200, 60)).await;
}

#[tokio::test(start_paused = true)]
async fn a_publication_is_kept_for_its_time_and_a_channel_as_long_as_its_history() {
    let settings = Namespace { history_size: 10, history_ttl_s: 3_600, ..Namespace::default() };
    let memory = keeping(Limits::default(), settings);
    let first = publish(&memory, "log:1", "").await.at;
    advance(Duration::from_secs(1_800)).await;
    memory.registry().maintain().await.unwrap();
    assert_eq!(
        publish(&memory, "log:1", "").await.at.epoch,
        first.epoch,
        "it was idle for longer than others may be"
    );
    advance(Duration::from_secs(1_799)).await;
    assert_eq!(offsets(&read(&memory, "log:1", None).await), [1, 2]);
    advance(Duration::from_secs(1)).await;
    let page = read(&memory, "log:1", Some(Top { offset: 0, ..first.clone() })).await;
    assert!(page.lost && page.publications.is_empty(), "not a part of it");
    assert_eq!(offsets(&read(&memory, "log:1", Some(first.clone())).await), [2]);
    advance(Duration::from_secs(1_800)).await;
    assert!(read(&memory, "log:1", None).await.publications.is_empty());
    memory.registry().maintain().await.unwrap();
    assert_eq!(memory.channels.kept_bytes(), 0, "what is too old makes room");
    advance(Duration::from_secs(601)).await;
    memory.registry().maintain().await.unwrap();
    let page = read(&memory, "log:1", Some(first.clone())).await;
    assert!(page.lost && page.top.epoch != first.epoch, "another epoch");
}

#[tokio::test]
async fn histories_are_bounded_in_bytes_and_the_oldest_go_first() {
    let settings = Namespace { history_size: 10_000, ..Namespace::default() };
    let most = 64 * 1024;
    let memory = keeping(Limits { history_bytes: most, ..Limits::default() }, settings);
    let mut last = None;
    for _ in 0..2_000 {
        last = Some(publish(&memory, "log:1", "").await.at);
    }
    let (bytes, last) = (memory.channels.kept_bytes(), last.unwrap());
    assert!(bytes <= most && bytes > most - 1_024, "{bytes}");
    let page = read(&memory, "log:1", None).await;
    assert_eq!(page.publications.len(), 100);
    assert_eq!(page.publications.last().unwrap().offset, 2_000, "the newest are there");
    assert!(read(&memory, "log:1", Some(Top { offset: 1_000, ..last.clone() })).await.lost);
    assert!(!read(&memory, "log:1", Some(Top { offset: 1_990, ..last })).await.lost);
}
