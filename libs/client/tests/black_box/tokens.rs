use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use sanjay_client::{
    ChannelEvent, Client, ClientOptions, SubscriptionState, TokenSource,
    protocol::{
        CloseCode, Command, Envelope, ErrorBody, ErrorCode, Event,
        event::{Refreshed, TokenExpired, Unsubscribed, Welcome},
    },
};

use crate::{
    server::{Peer, Server, welcome},
    soon,
};

/// Tokens are numbered; the second time that one is asked for there is none.
fn options(server: &Server, fails: bool) -> ClientOptions {
    let asked = Arc::new(AtomicUsize::new(0));
    let token = TokenSource::callback(move || {
        let number = asked.fetch_add(1, Ordering::SeqCst);
        async move {
            match number {
                1 if fails => Err("the back end is away".into()),
                number => Ok(format!("token {number}")),
            }
        }
    });
    ClientOptions { token, ..server.options() }
}

async fn expect_refresh(peer: &mut Peer, token: &str) -> Option<u64> {
    let Envelope { id, command } = peer.command().await;
    let Command::Refresh(refresh) = command else { panic!("instead of refresh came {command:?}") };
    assert_eq!((refresh.token.as_str(), refresh.channel), (token, None));
    id
}

fn ends_in(token_ttl_s: u64) -> Welcome {
    Welcome { token_ttl_s, ..welcome() }
}

#[tokio::test]
async fn a_token_is_replaced_before_it_ends_and_kept_for_the_next_connection() {
    let server = Server::start().await;
    let _client = Client::connect(options(&server, false)).await.unwrap();
    let mut peer = server.welcome(ends_in(1)).await;
    let id = expect_refresh(&mut peer, "token 1").await;
    peer.push(id, Event::Refreshed(Refreshed { token_ttl_s: 3_600, channel: None })).await;
    peer.push(None, Event::TokenExpired(TokenExpired { close_in_ms: 25_000 })).await;
    let id = expect_refresh(&mut peer, "token 2").await;
    // Refused: another one is asked for.
    peer.push(id, Event::Error(ErrorBody::new(ErrorCode::Forbidden, "another user's"))).await;
    let id = expect_refresh(&mut peer, "token 3").await;
    peer.push(id, Event::Refreshed(Refreshed { token_ttl_s: 3_600, channel: None })).await;
    // Answered, so that the client has it, before the connection ends.
    peer.push(None, Event::TokenExpired(TokenExpired { close_in_ms: 25_000 })).await;
    let _ = expect_refresh(&mut peer, "token 4").await;
    drop(peer);
    assert_eq!(server.accept().await.hello().await.token.as_deref(), Some("token 3"));
}

#[tokio::test]
async fn an_application_without_a_token_is_asked_again() {
    let server = Server::start().await;
    let _client = Client::connect(options(&server, true)).await.unwrap();
    let mut peer = server.welcome(ends_in(1)).await;
    expect_refresh(&mut peer, "token 2").await;
    peer.close(CloseCode::TokenExpired).await;
    assert_eq!(server.accept().await.hello().await.token.as_deref(), Some("token 3"));
}

#[tokio::test]
async fn a_subscription_that_the_server_ends_is_ended_or_made_again() {
    let server = Server::start().await;
    let client = Client::connect(server.options()).await.unwrap();
    let mut peer = server.welcome(welcome()).await;
    let mut subscription = client.subscribe("news").await.unwrap();
    peer.subscribe("news", "e", 3).await;
    assert!(matches!(soon(subscription.next()).await, Some(ChannelEvent::Subscribed { offset: 3, .. })));
    let ended = |code, retryable| {
        Event::Unsubscribed(Unsubscribed { channel: "news".into(), code, reason: "told".into(), retryable })
    };
    peer.push(None, ended(ErrorCode::TokenExpired, true)).await;
    peer.subscribe("news", "e", 3).await;
    assert!(matches!(soon(subscription.next()).await, Some(ChannelEvent::Subscribed { .. })));
    peer.push(None, ended(ErrorCode::Forbidden, false)).await;
    let Some(ChannelEvent::Unsubscribed(error)) = soon(subscription.next()).await else {
        panic!("the subscription goes on");
    };
    assert_eq!((error.code, error.message.as_str()), (ErrorCode::Forbidden, "told"));
    assert!(matches!(subscription.state(), SubscriptionState::Unsubscribed(Some(_))));
}
