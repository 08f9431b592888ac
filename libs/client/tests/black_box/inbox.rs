use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use sanjay_client::{
    AckError, Checkpoint, CheckpointError, Client, ClientOptions, Discontinuity, FileCheckpoint,
    InboxDelivery, InboxEvent, InboxStream, Processed,
    protocol::{
        Command, ErrorBody, ErrorCode, Event,
        command::{Nak, Term, Working},
        event::{Degraded, Empty, InboxState, Settled},
    },
};
use tokio::sync::{Mutex, mpsc};

use crate::{
    server::{Peer, Server, inbox, welcome, welcome_with_inbox},
    soon,
};

async fn next(stream: &mut InboxStream) -> InboxDelivery {
    match soon(stream.next()).await {
        Some(InboxEvent::Message(delivery)) => delivery,
        other => panic!("instead of a message came {other:?}"),
    }
}

async fn push(peer: &mut Peer, seqs: impl IntoIterator<Item = u64>) {
    peer.push_all(seqs.into_iter().map(|seq| (None, inbox(seq)))).await;
}

#[tokio::test]
async fn what_was_processed_is_acked_again_and_not_handed_over() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 3)).await;
    let mut stream = client.inbox().unwrap();
    assert!(client.inbox().is_none(), "there is one stream");
    push(&mut peer, [1, 2, 3]).await;
    let (first, second, third) = (next(&mut stream).await, next(&mut stream).await, next(&mut stream).await);
    assert_eq!((first.message.seq, second.message.seq, third.message.seq), (1, 2, 3));
    soon(second.acker.ack()).await.unwrap();
    assert_eq!(peer.ack().await, [(2, 2)]);

    // 1 is still in work, 2 is done, 3 was given up.
    drop(third);
    drop(peer);
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 4)).await;
    push(&mut peer, [1, 2, 3, 4]).await;
    assert_eq!(peer.ack().await, [(2, 2)]);
    assert_eq!(next(&mut stream).await.message.seq, 3);
    let fourth = next(&mut stream).await;
    assert_eq!(fourth.message.seq, 4);
    soon(first.acker.ack()).await.unwrap();
    assert_eq!(peer.ack().await, [(1, 1)]);
    soon(fourth.acker.ack()).await.unwrap();
    assert_eq!(peer.ack().await, [(4, 4)]);
}

#[tokio::test]
async fn an_ack_returns_the_trace_of_its_newest_message() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 3)).await;
    let mut stream = client.inbox().unwrap();
    let trace = |seq: u64| format!("00-0af7651916cd43dd8448eb211c80319c-{seq:016x}-01");
    let traced = |seq| match inbox(seq) {
        Event::Inbox(mut message) => {
            message.trace = trace(seq);
            (None, Event::Inbox(message))
        }
        other => panic!("{other:?}"),
    };
    peer.push_all([traced(1), traced(2), (None, inbox(3))]).await;
    let (first, second, third) = (next(&mut stream).await, next(&mut stream).await, next(&mut stream).await);
    assert_eq!(second.message.trace, trace(2), "the application sees it");
    // Together they are one batch, whose newest message counts.
    let acks = async { tokio::join!(second.acker.ack(), first.acker.ack()) };
    let (second, first) = soon(acks).await;
    second.and(first).unwrap();
    let ack = peer.whole_ack().await;
    assert_eq!((&ack.ranges[..], ack.trace), (&[(1, 2)][..], trace(2)));
    soon(third.acker.ack()).await.unwrap();
    assert_eq!(peer.whole_ack().await.trace, "", "it had none");

    // What is acked again returns the trace of that time.
    peer.push_all([traced(1)]).await;
    assert_eq!(peer.whole_ack().await.trace, trace(1));
}

#[tokio::test]
async fn a_device_remembers_beyond_the_process() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bob.json");
    let server = Server::start().await;
    let options = || ClientOptions { checkpoint: Arc::new(FileCheckpoint::new(&path)), ..server.options() };
    let client = Client::connect(options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 4, 6)).await;
    let mut stream = client.inbox().unwrap();
    push(&mut peer, [5, 6]).await;
    let _in_work = next(&mut stream).await;
    soon(next(&mut stream).await.acker.ack()).await.unwrap();
    // Both the ack and the process are lost.
    drop((peer, client, stream));

    let client = Client::connect(options()).await.unwrap();
    let mut stream = client.inbox().unwrap();
    let mut peer = loop {
        // The first client may have connected once more before its end.
        let mut peer = server.welcome(welcome_with_inbox("e1", 4, 6)).await;
        push(&mut peer, [5, 6]).await;
        if peer.next().await.is_some_and(
            |commands| matches!(commands[0].command, Command::Ack(ref ack) if ack.ranges == [(6, 6)]),
        ) {
            break peer;
        }
    };
    assert_eq!(next(&mut stream).await.message.seq, 5);

    // Another epoch: numbers mean other messages.
    peer.push(None, Event::Ping).await;
    drop(peer);
    let mut peer = server.welcome(welcome_with_inbox("e2", 0, 6)).await;
    push(&mut peer, [6]).await;
    match soon(stream.next()).await {
        Some(InboxEvent::Discontinuity(Discontinuity::Epoch { before, now })) => {
            assert_eq!((before.as_str(), now.as_str()), ("e1", "e2"));
        }
        other => panic!("{other:?}"),
    }
    let sixth = next(&mut stream).await;
    soon(sixth.acker.ack()).await.unwrap();
    assert_eq!(peer.ack().await, [(6, 6)]);
    // An inbox that lost what was processed.
    drop(peer);
    let _peer = server.welcome(welcome_with_inbox("e2", 0, 3)).await;
    let went_back = soon(stream.next()).await;
    assert!(
        matches!(
            went_back,
            Some(InboxEvent::Discontinuity(Discontinuity::WentBack { processed: 6, head: 3 }))
        ),
        "{went_back:?}"
    );
}

#[tokio::test]
async fn an_ack_of_a_replaced_inbox_goes_nowhere() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    let known = |epoch: &str| Degraded {
        features: Vec::new(),
        inbox: Some(InboxState { epoch: epoch.into(), mark: 0, head: 9 }),
    };
    peer.push(None, Event::Degraded(known("e1"))).await;
    let mut stream = client.inbox().unwrap();
    push(&mut peer, [1]).await;
    let old = next(&mut stream).await;
    peer.push(None, Event::Degraded(known("e2"))).await;
    assert!(matches!(soon(stream.next()).await, Some(InboxEvent::Discontinuity(_))));
    soon(old.acker.ack()).await.unwrap();
    push(&mut peer, [1]).await;
    let new = next(&mut stream).await;
    soon(new.acker.ack()).await.unwrap();
    assert_eq!(peer.ack().await, [(1, 1)]);
    peer.push(None, Event::Ping).await;
    assert_eq!(peer.command().await.command, Command::Ping, "there was one ack");
}

/// A checkpoint whose stores a test answers.
struct Gated(Mutex<mpsc::Receiver<Result<(), CheckpointError>>>, mpsc::UnboundedSender<Processed>);

#[async_trait]
impl Checkpoint for Gated {
    async fn load(&self) -> Result<Option<Processed>, CheckpointError> {
        Ok(None)
    }

    async fn store(&self, state: &Processed) -> Result<(), CheckpointError> {
        self.1.send(state.clone()).unwrap();
        self.0.lock().await.recv().await.unwrap()
    }
}

#[tokio::test]
async fn an_ack_is_stored_before_it_is_sent_and_acks_that_are_ready_go_together() {
    let server = Server::start().await;
    let (answers, gate) = mpsc::channel(1);
    let (stores, mut stored) = mpsc::unbounded_channel();
    let checkpoint = Arc::new(Gated(Mutex::new(gate), stores));
    let client = Client::connect(ClientOptions { checkpoint, ..server.options() }).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 6)).await;
    let mut stream = client.inbox().unwrap();
    assert_eq!(soon(stored.recv()).await.unwrap().floor(), 0, "where the device began");
    answers.send(Ok(())).await.unwrap();
    push(&mut peer, 1..=6).await;
    let mut ackers = Vec::new();
    for _ in 0..6 {
        ackers.push(next(&mut stream).await.acker);
    }
    let mut ackers = ackers.into_iter();
    let mut ack = || tokio::spawn(ackers.next().unwrap().ack());

    let first = ack();
    assert!(soon(stored.recv()).await.unwrap().contains(1));
    // While the store hangs, more become ready; nothing is sent.
    let (second, third) = (ack(), ack());
    peer.push(None, Event::Ping).await;
    assert_eq!(peer.command().await.command, Command::Ping);
    answers.send(Ok(())).await.unwrap();
    soon(first).await.unwrap().unwrap();
    assert_eq!(peer.ack().await, [(1, 1)]);
    let mut state = soon(stored.recv()).await.unwrap();
    answers.send(Ok(())).await.unwrap();
    if !state.contains(3) {
        state = soon(stored.recv()).await.unwrap();
        answers.send(Ok(())).await.unwrap();
    }
    assert_eq!(state.floor(), 3);
    soon(second).await.unwrap().unwrap();
    soon(third).await.unwrap().unwrap();
    let mut acked = peer.ack().await;
    if acked == [(2, 2)] {
        acked = peer.ack().await;
    }
    assert!(acked == [(2, 3)] || acked == [(3, 3)], "{acked:?}");

    // What cannot be stored is not acked, and is handed over again.
    let fourth = ack();
    soon(stored.recv()).await.unwrap();
    let full = CheckpointError::Store { place: "here".into(), doing: "written", reason: "full".into() };
    answers.send(Err(full)).await.unwrap();
    assert!(matches!(soon(fourth).await.unwrap(), Err(AckError::Checkpoint(_))));
    push(&mut peer, [4]).await;
    assert_eq!(next(&mut stream).await.message.seq, 4);
    peer.push(None, Event::Ping).await;
    assert_eq!(peer.command().await.command, Command::Ping);
}

#[tokio::test]
async fn closing_waits_until_the_acks_are_durable() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 3)).await;
    let mut stream = client.inbox().unwrap();
    push(&mut peer, [1, 2, 3]).await;
    for _ in 0..3 {
        soon(next(&mut stream).await.acker.ack()).await.unwrap();
    }
    let closing = tokio::spawn({
        let client = client.clone();
        async move { client.close().await }
    });
    let mut acked = 0;
    while acked < 3 {
        for envelope in peer.next().await.expect("the client is there") {
            let Command::Ack(ack) = envelope.command else { panic!("{envelope:?}") };
            acked += ack.ranges.iter().map(|(from, to)| to - from + 1).sum::<u64>();
            assert!(!closing.is_finished(), "the client waits for the answers");
            peer.push(envelope.id, Event::Ok(Empty {})).await;
        }
    }
    assert!(peer.next().await.is_none());
    soon(closing).await.unwrap();
    assert!(soon(stream.next()).await.is_none());
}

#[tokio::test]
async fn an_ack_that_is_refused_for_now_is_repeated() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 2)).await;
    let mut stream = client.inbox().unwrap();
    push(&mut peer, [1]).await;
    soon(next(&mut stream).await.acker.ack()).await.unwrap();
    let envelope = peer.command().await;
    let away = ErrorBody::new(ErrorCode::Unavailable, "the store is away");
    peer.push(envelope.id, Event::Error(away)).await;
    let again = peer.command().await;
    assert_eq!(again.command, envelope.command);
    peer.push(again.id, Event::Ok(Empty {})).await;
    soon(client.close()).await;
}

/// An inbox message in another than its first delivery.
fn again(seq: u64, delivery: u32) -> Event {
    match inbox(seq) {
        Event::Inbox(mut message) => {
            message.delivery = delivery;
            Event::Inbox(message)
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_message_that_is_given_back_comes_again() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 2)).await;
    let mut stream = client.inbox().unwrap();
    push(&mut peer, [1, 2]).await;
    let (first, second) = (next(&mut stream).await, next(&mut stream).await);
    soon(first.acker.nak(Duration::from_millis(1_500), "busy")).await.unwrap();
    let Command::Nak(nak) = peer.command().await.command else { panic!("no nak") };
    assert_eq!(nak, Nak { seq: 1, delivery: 1, delay_ms: 1_500, reason: "busy".into() });
    soon(second.acker.term("broken")).await.unwrap();
    let Command::Term(term) = peer.command().await.command else { panic!("no term") };
    assert_eq!(term, Term { seq: 2, delivery: 1, reason: "broken".into() });
    peer.push(None, again(1, 2)).await;
    let first = next(&mut stream).await;
    assert_eq!((first.message.seq, first.message.delivery), (1, 2));
    soon(first.acker.ack()).await.unwrap();
    assert_eq!(peer.ack().await, [(1, 1)]);
}

#[tokio::test]
async fn who_works_for_long_answers_the_newest_delivery() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 1)).await;
    let mut stream = client.inbox().unwrap();
    push(&mut peer, [1]).await;
    let first = next(&mut stream).await;
    soon(first.acker.working()).await.unwrap();
    let working = peer.command().await;
    assert_eq!(working.command, Command::Working(Working { seq: 1, delivery: 1 }));
    // A refusal, such as of a delivery that is over, ends nothing.
    let stale = ErrorBody::new(ErrorCode::BadRequest, "delivery 1 is over");
    peer.push_all([(working.id, Event::Error(stale)), (None, again(1, 2)), (None, Event::Ping)]).await;
    assert_eq!(
        peer.command().await.command,
        Command::Ping,
        "the redelivery was taken, and nobody else got it"
    );
    soon(first.acker.nak(Duration::ZERO, "")).await.unwrap();
    let Command::Nak(nak) = peer.command().await.command else { panic!("no nak") };
    assert_eq!((nak.seq, nak.delivery), (1, 2));
}

#[tokio::test]
async fn what_is_out_of_bounds_is_not_sent() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 3)).await;
    let mut stream = client.inbox().unwrap();
    push(&mut peer, [1, 2, 3]).await;
    let (first, second) = (next(&mut stream).await, next(&mut stream).await);
    let error = soon(first.acker.nak(Duration::from_secs(86_401), "")).await.unwrap_err();
    assert_eq!(error.to_string(), "not given back: delay_ms is 86401000; 0 to 86400000 are allowed");
    let error = soon(second.acker.term(&"x".repeat(201))).await.unwrap_err();
    assert_eq!(error.to_string(), "not given back: reason has 201 bytes; at most 200 are allowed");
    soon(next(&mut stream).await.acker.ack()).await.unwrap();
    assert_eq!(peer.ack().await, [(3, 3)], "nothing came before it");
}

#[tokio::test]
async fn closing_waits_for_what_is_given_back() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 1)).await;
    let mut stream = client.inbox().unwrap();
    push(&mut peer, [1]).await;
    soon(next(&mut stream).await.acker.nak(Duration::ZERO, "")).await.unwrap();
    let closing = tokio::spawn({
        let client = client.clone();
        async move { client.close().await }
    });
    let nak = peer.command().await;
    assert!(matches!(nak.command, Command::Nak(_)), "{nak:?}");
    assert!(!closing.is_finished(), "the client waits for the answer");
    peer.push(nak.id, Event::Ok(Empty {})).await;
    assert!(peer.next().await.is_none());
    soon(closing).await.unwrap();
}

#[tokio::test]
async fn what_was_settled_elsewhere_does_not_reach_the_application() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome_with_inbox("e1", 0, 5)).await;
    let mut stream = client.inbox().unwrap();
    let settled = |epoch: &str, from, to| {
        (None, Event::Settled(Settled { epoch: epoch.into(), ranges: vec![(from, to)] }))
    };
    push(&mut peer, [1]).await;
    let first = next(&mut stream).await;
    // The application has 1, and has not come to 2 and 3 when these are settled; 4 is of an inbox that is not this one.
    peer.push_all([
        (None, inbox(2)),
        (None, inbox(3)),
        settled("e1", 1, 3),
        settled("e0", 4, 4),
        (None, inbox(4)),
    ])
    .await;
    let fourth = next(&mut stream).await;
    assert_eq!(fourth.message.seq, 4);
    // Its answer is given all the same.
    soon(first.acker.ack()).await.unwrap();
    assert_eq!(peer.ack().await, [(1, 1)]);
    // They count as processed: what comes late is answered without the application.
    push(&mut peer, [3, 5]).await;
    assert_eq!(peer.ack().await, [(3, 3)]);
    assert_eq!(next(&mut stream).await.message.seq, 5);
}
