use std::sync::Mutex;

use prometheus_client::registry::Registry;
use sanjay_runtime::random::SeededRandom;
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use uuid::Uuid;

use super::*;
use crate::upstream::ConnKey;

type Answered = Result<Vec<UserAckResult>, Failure>;

/// A call as delivery sees it: (user, first acked seq) of each entry, and where its answer goes.
struct Called {
    entries: Vec<(String, u64)>,
    answer: oneshot::Sender<Answered>,
}

impl Called {
    fn of(&self) -> Vec<(&str, u64)> {
        self.entries.iter().map(|(user, seq)| (user.as_str(), *seq)).collect()
    }

    fn ok(self) {
        let results = self.entries.iter().map(|_| UserAckResult::default()).collect();
        self.answer.send(Ok(results)).unwrap();
    }
}

fn request(user: &str, seq: u64) -> AckRequest {
    AckRequest {
        waiter: Some((ConnKey { shard: 0, index: 0, generation: 0 }, Some(seq))),
        user: user.to_owned(),
        device: String::new(),
        epoch: 1,
        ranges: vec![(seq, seq)],
        written: seq,
        rewritten: Vec::new(),
        failed: Vec::new(),
        session: Uuid::nil(),
        trace: String::new(),
        shared: false,
    }
}

/// Drives the task; `script` plays the edge's shards and delivery. What was answered to connections, by the commands' ids.
async fn play<S: Future<Output = ()>>(
    script: impl FnOnce(mpsc::Sender<AckRequest>, mpsc::Receiver<Called>) -> S,
) -> Vec<(u64, Result<(), ErrorCode>)> {
    let (requests, receiver) = mpsc::channel(64);
    let (calls, called) = mpsc::channel(64);
    let call = |acks: Vec<UserAck>| {
        let calls = calls.clone();
        async move {
            let entries = acks.iter().map(|ack| (ack.user.clone(), ack.acked[0].from)).collect();
            let (answer, answered) = oneshot::channel();
            calls.send(Called { entries, answer }).await.ok().unwrap();
            answered.await.unwrap_or_else(|_| Err(Failure::Away("gone".to_owned())))
        }
    };
    let answers = Mutex::new(Vec::new());
    let answer = |_, id: Option<u64>, result: Result<(), ErrorBody>| {
        answers.lock().unwrap().push((id.unwrap(), result.map_err(|error| error.code)));
    };
    let metrics = Metrics::register(&mut Registry::default());
    let acks = Acks::new(call, answer, Arc::new(SeededRandom::new(1)), &metrics);
    tokio::join!(acks.run(receiver), script(requests, called));
    answers.into_inner().unwrap()
}

async fn next(called: &mut mpsc::Receiver<Called>) -> Called {
    timeout(Duration::from_secs(10), called.recv()).await.expect("a call is made").unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_comes_during_a_call_goes_together_in_the_next() {
    let answers = play(async |requests, mut called| {
        requests.send(request("ann", 1)).await.unwrap();
        let first = next(&mut called).await;
        assert_eq!(first.of(), [("ann", 1)]);
        for (user, seq) in [("ann", 2), ("bob", 3), ("ann", 4)] {
            requests.send(request(user, seq)).await.unwrap();
        }
        sleep(SLOW / 2).await;
        assert!(called.try_recv().is_err(), "a call that is quick has none beside it");
        first.ok();
        let second = next(&mut called).await;
        assert_eq!(second.of(), [("ann", 2), ("bob", 3), ("ann", 4)]);
        second.ok();
    })
    .await;
    assert_eq!(answers, [1, 2, 3, 4].map(|id| (id, Ok(()))));
}

#[tokio::test(start_paused = true)]
async fn a_slow_inbox_holds_up_its_own_user_alone() {
    let answers = play(async |requests, mut called| {
        requests.send(request("slow", 1)).await.unwrap();
        let slow = next(&mut called).await;
        for (user, seq) in [("slow", 2), ("bob", 3)] {
            requests.send(request(user, seq)).await.unwrap();
        }
        let beside = next(&mut called).await;
        assert_eq!(beside.of(), [("bob", 3)]);
        beside.ok();
        sleep(SLOW * 10).await;
        assert!(called.try_recv().is_err(), "of one user there is one call at a time");
        slow.ok();
        let rest = next(&mut called).await;
        assert_eq!(rest.of(), [("slow", 2)]);
        rest.ok();
    })
    .await;
    assert_eq!(answers, [3, 1, 2].map(|id| (id, Ok(()))));
}

#[tokio::test(start_paused = true)]
async fn what_delivery_could_not_take_is_repeated_before_what_came_later() {
    let answers = play(async |requests, mut called| {
        for seq in [1, 2] {
            requests.send(request("ann", seq)).await.unwrap();
        }
        let first = next(&mut called).await;
        requests.send(request("ann", 3)).await.unwrap();
        requests.send(request("bob", 4)).await.unwrap();
        first.answer.send(Err(Failure::Away("away".to_owned()))).unwrap();
        let again = next(&mut called).await;
        let all = [("ann", 1), ("ann", 2), ("ann", 3), ("bob", 4)];
        assert!(all.starts_with(&again.of()) && again.of().len() >= 2, "{:?}", again.of());
        // While delivery fails there is one call at a time, however slow.
        requests.send(request("eve", 5)).await.unwrap();
        sleep(SLOW * 10).await;
        assert!(called.try_recv().is_err());
        // Of two, one is refused for good, and one is to come again.
        let mut results = vec![UserAckResult::default(); again.entries.len()];
        results[0] = error(ErrorCode::LimitExceeded, "too many ranges");
        results[1] = error(ErrorCode::Unavailable, "busy");
        again.answer.send(Ok(results)).unwrap();
        let mut seen = Vec::new();
        while !seen.contains(&("eve".to_owned(), 5)) || !seen.contains(&("ann".to_owned(), 2)) {
            let call = next(&mut called).await;
            seen.extend(call.entries.clone());
            call.ok();
        }
        assert!(!seen.contains(&("ann".to_owned(), 1)), "{seen:?}");
    })
    .await;
    let mut ids: Vec<u64> = answers.iter().map(|(id, _)| *id).collect();
    ids.sort_unstable();
    assert_eq!(ids, [1, 2, 3, 4, 5], "each is answered once");
    assert!(answers.contains(&(1, Err(ErrorCode::LimitExceeded))));
    assert_eq!(answers.iter().filter(|(_, result)| result.is_err()).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_is_refused_is_answered_and_not_repeated() {
    let answers = play(async |requests, mut called| {
        requests.send(request("ann", 1)).await.unwrap();
        next(&mut called).await.answer.send(Err(Failure::Refused("bad".to_owned()))).unwrap();
        requests.send(request("ann", 2)).await.unwrap();
        let call = next(&mut called).await;
        assert_eq!(call.of(), [("ann", 2)]);
        call.ok();
    })
    .await;
    // `internal` may be tried again, by who asked.
    assert_eq!(answers, [(1, Err(ErrorCode::Internal)), (2, Ok(()))]);
}
