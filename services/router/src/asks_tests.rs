//! Questions to edges whose streams are driven by hand.

use sanjay_proto::edge::v1::{
    Answer, Answered, ConnectionEvent, ConnectionEventKind, ConnectionEvents, DescribeEdge, Question,
    question,
};

use super::*;
use crate::{
    asks::{Asked, Busy},
    watchers::Watcher,
};

impl Router {
    /// Asks, as a task, once the question is on its way.
    async fn ask(&self) -> tokio::task::JoinHandle<Result<Asked, Busy>> {
        let asks = Arc::clone(&self.links.asks);
        let question = Question { question: Some(question::Question::Describe(DescribeEdge {})) };
        let asking = tokio::spawn(async move { asks.ask(question).await });
        settle().await;
        asking
    }
}

impl Edge {
    /// The number of the question that is here.
    async fn asked(&mut self) -> u64 {
        let events = self.next().await;
        let number = events.iter().find_map(|event| event.strip_prefix("ask ")?.parse().ok());
        number.unwrap_or_else(|| panic!("no question: {events:?}"))
    }

    async fn answer(&self, request: u64, sessions: u64) {
        let answer = Some(Answer { complete: true, sessions, ..Answer::default() });
        self.send(vec![edge_event::Event::Answered(Answered { request, answer })]).await;
        settle().await;
    }
}

fn names(edges: &[crate::registry::EdgeRef]) -> Vec<&str> {
    edges.iter().map(|edge| &*edge.id).collect()
}

#[tokio::test(start_paused = true)]
async fn every_edge_is_asked_and_a_silent_one_is_missed() {
    let router = router(&memory(), "r1", 100).await;
    let (mut first, mut second) = (router.attach("e1", 1).await, router.attach("e2", 1).await);
    let asking = router.ask().await;
    let (one, two) = (first.asked().await, second.asked().await);
    assert_ne!(one, two, "an answer belongs to one edge's question");
    first.answer(one, 2).await;
    second.answer(two, 3).await;
    let asked = asking.await.unwrap().unwrap();
    assert_eq!((asked.answer.sessions, asked.answer.complete, asked.edges), (5, true, 2));

    let asking = router.ask().await;
    let one = first.asked().await;
    let late = second.asked().await;
    first.answer(one, 2).await;
    advance(Duration::from_secs(2)).await;
    let asked = asking.await.unwrap().unwrap();
    assert_eq!((asked.answer.sessions, asked.answer.complete), (2, false));
    assert_eq!(names(&asked.answered), ["e1"]);
    second.answer(late, 3).await;
}

#[tokio::test(start_paused = true)]
async fn an_edge_that_went_with_sessions_is_away_until_it_is_back_or_its_lease_is_over() {
    let router = router(&memory(), "r1", 100).await;
    let mut edge = router.attach("e1", 1).await;
    edge.open("bob", 1).await;
    let empty = router.attach("e2", 1).await;
    let asking = router.ask().await;
    edge.leave().await;
    empty.leave().await;
    let asked = asking.await.unwrap().unwrap();
    assert!(!asked.answer.complete, "it ended while it was asked");
    assert_eq!(names(&asked.away), ["e1"], "the other held nothing");
    let back = router.attach("e1", 2).await;
    back.leave().await;
    assert!(names(&router.ask().await.await.unwrap().unwrap().away).is_empty());

    let mut edge = router.attach("e1", 3).await;
    edge.open("bob", 1).await;
    edge.leave().await;
    advance(LEASE - Duration::from_secs(1)).await;
    assert_eq!(names(&router.ask().await.await.unwrap().unwrap().away), ["e1"]);
    advance(Duration::from_secs(1)).await;
    assert!(names(&router.ask().await.await.unwrap().unwrap().away).is_empty());
}

#[tokio::test(start_paused = true)]
async fn questions_under_way_are_bounded() {
    let router = router(&memory(), "r1", 4_096).await;
    let edge = router.attach("e1", 1).await;
    let mut under_way = Vec::new();
    for _ in 0..64 {
        under_way.push(router.ask().await);
    }
    assert!(matches!(router.ask().await.await.unwrap(), Err(Busy)));
    advance(Duration::from_secs(2)).await;
    for asking in under_way {
        assert!(!asking.await.unwrap().unwrap().answer.complete);
    }
    assert!(router.ask().await.await.unwrap().is_ok());
    edge.leave().await;
}

fn happened(user: &str) -> edge_event::Event {
    let event = ConnectionEvent { user: user.to_owned(), ..ConnectionEvent::default() };
    edge_event::Event::ConnectionEvents(ConnectionEvents { events: vec![event], missed: 0 })
}

/// What a watcher hears next, as users and their edges.
async fn heard(watcher: &mut Watcher) -> Vec<(String, String, i32)> {
    let events = timeout(Duration::from_millis(1), watcher.next()).await.expect("something is told");
    let events = events.unwrap().unwrap();
    events.events.iter().map(|event| (event.user.clone(), event.edge_id.clone(), event.kind)).collect()
}

#[tokio::test(start_paused = true)]
async fn edges_tell_what_happens_while_somebody_watches() {
    let router = router(&memory(), "r1", 100).await;
    let mut edge = router.attach("e1", 1).await;
    edge.send(vec![happened("nobody hears of it")]).await;
    settle().await;
    let mut first = router.links.watchers.watch().unwrap();
    assert_eq!(edge.next().await, ["watch true"]);
    let mut second = router.links.watchers.watch().unwrap();
    assert!(timeout(Duration::from_millis(1), edge.writer.next()).await.is_err(), "it knows");
    edge.send(vec![happened("bob")]).await;
    settle().await;
    for watcher in [&mut first, &mut second] {
        assert_eq!(heard(watcher).await, [("bob".to_owned(), "e1".to_owned(), 0)]);
    }
    let mut other = router.attach("e2", 1).await;
    assert_eq!(other.next().await, ["watch true"]);
    assert_eq!(first.next().await.unwrap().unwrap().missed, 1, "it may have been elsewhere before");
    drop(first);
    assert!(timeout(Duration::from_millis(1), other.writer.next()).await.is_err(), "one watches still");
    drop(second);
    assert_eq!(
        (edge.next().await, other.next().await),
        (vec!["watch false".into()], vec!["watch false".into()])
    );
}

#[tokio::test(start_paused = true)]
async fn sessions_of_an_edge_that_is_gone_go_offline_a_lease_later() {
    let router = router(&memory(), "r1", 100).await;
    let mut watcher = router.links.watchers.watch().unwrap();
    let mut edge = router.attach("e1", 1).await;
    assert_eq!(edge.next().await, ["watch true"]);
    watcher.next().await;
    edge.open("bob", 1).await;
    edge.open("eve", 2).await;
    edge.send(vec![close("eve", 2)]).await;
    settle().await;
    edge.leave().await;
    advance(LEASE - Duration::from_secs(1)).await;
    settle().await;
    assert!(timeout(Duration::from_millis(1), watcher.next()).await.is_err(), "it may come back");
    advance(Duration::from_secs(1)).await;
    settle().await;
    let offline = ConnectionEventKind::Offline.into();
    assert_eq!(heard(&mut watcher).await, [("bob".to_owned(), "e1".to_owned(), offline)]);
}
