use std::time::Duration;

use sanjay_client::{
    ChannelEvent, Client, ClientOptions, ConnectionError, State, SubscribeError, SubscriptionState,
    protocol::{
        CloseCode, Command, Envelope, ErrorBody, ErrorCode, Event, Payload, Position,
        event::{Gap, Goaway, Message, Subscribed},
    },
};

use crate::{
    server::{Server, message, welcome},
    soon,
};

fn subscribed(epoch: &str, offset: u64) -> ChannelEvent {
    ChannelEvent::Subscribed { epoch: epoch.into(), offset }
}

fn delivered(event: Event) -> ChannelEvent {
    match event {
        Event::Message(message) => ChannelEvent::Message(message),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_subscription_goes_on_and_tells_what_it_missed() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    assert_eq!(soon(client.connected()).await.unwrap().user, "bob");
    let mut news = soon(client.subscribe("news")).await.unwrap();
    assert_eq!(news.state(), SubscriptionState::Subscribing);
    peer.subscribe("news", "a", 5).await;
    soon(news.subscribed()).await.unwrap();
    // A repeated message is not delivered twice.
    peer.push_all([message("news", "a", 6), message("news", "a", 6)].map(|event| (None, event))).await;
    assert_eq!(soon(news.next()).await, Some(subscribed("a", 5)));
    assert_eq!(soon(news.next()).await, Some(delivered(message("news", "a", 6))));

    drop(peer);
    let mut peer = server.welcome(welcome()).await;
    peer.subscribe("news", "a", 9).await;
    peer.push(None, message("news", "a", 10)).await;
    let gap = Gap { channel: "news".into(), epoch: "a".into(), from: 7, to: 9 };
    assert_eq!(soon(news.next()).await, Some(ChannelEvent::Gap(gap)));
    assert_eq!(soon(news.next()).await, Some(subscribed("a", 9)));
    assert_eq!(soon(news.next()).await, Some(delivered(message("news", "a", 10))));

    peer.close(CloseCode::Internal).await;
    let mut peer = server.welcome(welcome()).await;
    peer.subscribe("news", "b", 2).await;
    assert_eq!(soon(news.next()).await, Some(ChannelEvent::Discontinuity { epoch: "b".into(), offset: 2 }));
    assert_eq!(soon(news.next()).await, Some(subscribed("b", 2)));

    // Nothing missed, nothing reported.
    peer.close(CloseCode::ShuttingDown).await;
    let mut peer = server.welcome(welcome()).await;
    peer.subscribe("news", "b", 2).await;
    assert_eq!(soon(news.next()).await, Some(subscribed("b", 2)));

    drop(news);
    assert!(matches!(peer.command().await.command, Command::Unsubscribe(u) if u.channel == "news"));
}

#[tokio::test]
async fn a_subscription_made_offline_waits_for_the_connection() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let news = soon(client.subscribe("news")).await.unwrap();
    let twice = soon(client.subscribe("news")).await;
    assert!(matches!(twice, Err(SubscribeError::Refused(e)) if e.code == ErrorCode::AlreadySubscribed));
    let nameless = soon(client.subscribe("")).await;
    assert!(matches!(nameless, Err(SubscribeError::Refused(e)) if e.code == ErrorCode::BadRequest));
    let mut peer = server.welcome(welcome()).await;
    peer.subscribe("news", "a", 0).await;
    soon(news.subscribed()).await.unwrap();
}

#[tokio::test]
async fn a_refused_subscription_ends_and_a_retryable_refusal_is_repeated() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    let mut secret = soon(client.subscribe("secret")).await.unwrap();
    let id = peer.expect_subscribe("secret").await;
    let away = ErrorBody::new(ErrorCode::Unavailable, "the router is away");
    peer.push(id, Event::Error(away)).await;
    let id = peer.expect_subscribe("secret").await;
    let refused = ErrorBody::new(ErrorCode::Forbidden, "no capability");
    peer.push(id, Event::Error(refused.clone())).await;
    assert_eq!(soon(secret.next()).await, Some(ChannelEvent::Unsubscribed(refused.clone())));
    assert_eq!(soon(secret.next()).await, None);
    assert_eq!(secret.state(), SubscriptionState::Unsubscribed(Some(refused)));
}

#[tokio::test]
async fn many_subscriptions_are_made_again_without_too_many_commands_at_once() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut held = Vec::new();
    for number in 0..100 {
        held.push(soon(client.subscribe(&format!("channel {number}"))).await.unwrap());
    }
    let mut peer = server.welcome(welcome()).await;
    let mut seen = 0;
    while seen < 100 {
        let commands = peer.next().await.expect("the client is there");
        assert!(commands.len() <= 32, "{} commands without an answer", commands.len());
        for envelope in commands {
            let Command::Subscribe(subscribe) = envelope.command else { panic!("{envelope:?}") };
            let event =
                Subscribed { channel: subscribe.channel, epoch: "a".into(), offset: 0, ..Default::default() };
            peer.push(envelope.id, Event::Subscribed(event)).await;
            seen += 1;
        }
    }
    for subscription in held {
        soon(subscription.subscribed()).await.unwrap();
    }
}

#[tokio::test]
async fn a_heartbeat_is_answered_and_a_silent_server_is_left() {
    let server = Server::start().await;
    let options = ClientOptions { silence_grace: Duration::from_millis(200), ..server.options() };
    let client = Client::connect(options).await.unwrap();
    let mut peer =
        server.welcome(sanjay_client::protocol::event::Welcome { heartbeat_ms: 100, ..welcome() }).await;
    peer.push(None, Event::Ping).await;
    assert_eq!(peer.command().await.command, Command::Ping);
    let mut state = client.watch();
    let lost =
        soon(state.wait_for(|state| matches!(state, State::Disconnected { error: Some(_), .. }))).await;
    let State::Disconnected { error: Some(error), .. } = lost.unwrap().clone() else { unreachable!() };
    assert!(matches!(*error, ConnectionError::Silent(_)), "{error}");
    server.welcome(welcome()).await;
}

#[tokio::test]
async fn a_goaway_moves_the_client_when_it_says() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    let news = soon(client.subscribe("news")).await.unwrap();
    peer.subscribe("news", "a", 0).await;
    let goaway = Goaway { code: 1012, reason: "restart".into(), reconnect_after_ms: 50, spread_ms: 60_000 };
    peer.push(None, Event::Goaway(goaway)).await;
    let ((), mut next) = tokio::join!(
        async {
            assert!(peer.next().await.is_none(), "the client closes the old connection");
        },
        server.welcome(welcome())
    );
    next.subscribe("news", "a", 0).await;
    soon(news.subscribed()).await.unwrap();
}

#[tokio::test]
async fn dropping_every_handle_closes_the_connection() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    let news = soon(client.subscribe("news")).await.unwrap();
    peer.subscribe("news", "a", 0).await;
    drop(client);
    peer.push(None, Event::Ping).await;
    assert_eq!(peer.command().await.command, Command::Ping, "the subscription keeps the connection");
    drop(news);
    while peer.next().await.is_some() {}
}

#[tokio::test]
async fn a_subscription_goes_on_where_it_stood() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut news = soon(client.subscribe("news")).await.unwrap();
    let message = |offset| Message {
        channel: "news".into(),
        offset,
        epoch: "a".into(),
        message_id: String::new(),
        payload: Payload::Text(String::new()),
        publisher: String::new(),
        time_us: 0,
        trace: String::new(),
    };
    let subscribed = |offset, recovered, messages: Vec<Message>| {
        let (channel, epoch) = ("news".to_owned(), "a".to_owned());
        Event::Subscribed(Subscribed { channel, epoch, offset, recovered, messages })
    };
    let at = |offset| Some(ChannelEvent::Subscribed { epoch: "a".into(), offset });
    let got = |offset| Some(ChannelEvent::Message(Box::new(message(offset))));
    // Each time: where the client says that it stands, what it is answered, and what its application gets of it.
    let rounds = [
        (None, subscribed(7, None, vec![]), vec![at(7)]),
        // It never got a message, and can go on all the same.
        (Some(7), subscribed(9, Some(true), vec![message(8), message(9)]), vec![got(8), got(9), at(9)]),
        (Some(9), subscribed(9, Some(true), vec![]), vec![at(9)]),
        // A server that repeats something does no harm.
        (Some(9), subscribed(10, Some(true), vec![message(9), message(10)]), vec![got(10), at(10)]),
    ];
    for (from, answer, expected) in rounds {
        let mut peer = server.welcome(welcome()).await;
        let Envelope { id, command } = peer.command().await;
        let Command::Subscribe(subscribe) = command else { panic!("{command:?}") };
        let from = from.map(|offset| Position { epoch: "a".into(), offset });
        assert_eq!(subscribe.recover, from);
        peer.push(id, answer).await;
        for event in expected {
            assert_eq!(soon(news.next()).await, event);
        }
        drop(peer);
    }
    // What cannot be recovered is a gap or, in another epoch, a discontinuity.
    let mut peer = server.welcome(welcome()).await;
    let id = peer.expect_subscribe("news").await;
    peer.push(id, subscribed(12, Some(false), vec![])).await;
    let gap = Gap { channel: "news".into(), epoch: "a".into(), from: 11, to: 12 };
    assert_eq!(soon(news.next()).await, Some(ChannelEvent::Gap(gap)));
    assert_eq!(soon(news.next()).await, at(12));
}

#[tokio::test]
async fn an_application_that_kept_its_place_goes_on_from_there() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let position = Position { epoch: "a".into(), offset: 3 };
    let mut news = soon(client.subscribe_from("news", position.clone())).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    let Envelope { id, command } = peer.command().await;
    assert!(
        matches!(&command, Command::Subscribe(subscribe) if subscribe.recover == Some(position)),
        "{command:?}"
    );
    let lost = Subscribed {
        channel: "news".into(),
        epoch: "b".into(),
        offset: 5,
        recovered: Some(false),
        messages: vec![],
    };
    peer.push(id, Event::Subscribed(lost)).await;
    assert_eq!(soon(news.next()).await, Some(ChannelEvent::Discontinuity { epoch: "b".into(), offset: 5 }));
    let wrong = client.subscribe_from("other", Position { epoch: String::new(), offset: 1 }).await;
    assert!(wrong.unwrap_err().to_string().contains("position.epoch is empty"));
}
