use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use sanjay_client::{
    Client, ClientOptions, ClosedError, ConnectionError, RawConnection, StartError, State, TokenSource,
    protocol::{CloseCode, Command, Envelope, ErrorBody, ErrorCode, Event, close::Reconnect, command::Hello},
};

use crate::{
    server::{Server, welcome},
    soon,
};

async fn closed(client: &Client) -> ClosedError {
    match soon(client.watch().wait_for(|state| matches!(state, State::Closed(_)))).await.unwrap().clone() {
        State::Closed(error) => error,
        _ => unreachable!(),
    }
}

#[tokio::test]
async fn every_close_code_has_its_rule() {
    for &code in CloseCode::ALL {
        let server = Server::start().await;
        let client = Client::connect(server.options()).await.unwrap();
        server.welcome(welcome()).await.close(code).await;
        match code.reconnect() {
            Reconnect::BackOff => drop(server.welcome(welcome()).await),
            Reconnect::Stop => {
                let error = closed(&client).await;
                assert!(matches!(error, ClosedError::Stopped(_)), "{code:?}: {error}");
                assert!(error.to_string().contains(&code.code().to_string()), "{error}");
            }
            // A fixed token cannot be renewed.
            Reconnect::NewToken => {
                let error = closed(&client).await;
                assert!(matches!(error, ClosedError::TokenRefused(_)), "{code:?}: {error}");
            }
        }
    }
}

fn counted(server: &Server) -> (ClientOptions, Arc<AtomicUsize>) {
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let token = TokenSource::callback(move || {
        let number = count.fetch_add(1, Ordering::SeqCst);
        async move { Ok(format!("token {number}")) }
    });
    (ClientOptions { token, ..server.options() }, asked)
}

#[tokio::test]
async fn a_refused_token_is_renewed_once() {
    let server = Server::start().await;
    let (options, asked) = counted(&server);
    let client = Client::connect(options).await.unwrap();
    let mut peer = server.accept().await;
    assert_eq!(peer.hello().await.token.as_deref(), Some("token 0"));
    let refused = ErrorBody::new(ErrorCode::Forbidden, "the token's signature is wrong");
    peer.push(Some(0), Event::Error(refused)).await;
    peer.close(CloseCode::Unauthorized).await;
    let mut peer = server.accept().await;
    assert_eq!(peer.hello().await.token.as_deref(), Some("token 1"));
    peer.push(Some(0), Event::Welcome(Box::new(welcome()))).await;
    soon(client.connected()).await.unwrap();
    // An accepted token may be refused later, and is kept over other failures.
    drop(peer);
    let mut peer = server.accept().await;
    assert_eq!(peer.hello().await.token.as_deref(), Some("token 1"));
    peer.close(CloseCode::TokenExpired).await;
    let mut peer = server.accept().await;
    assert_eq!(peer.hello().await.token.as_deref(), Some("token 2"));
    peer.close(CloseCode::Unauthorized).await;
    assert!(matches!(closed(&client).await, ClosedError::TokenRefused(_)));
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn a_closed_port_is_named_and_tried_again() {
    let server = Server::start().await;
    let options = server.options();
    drop(server);
    let url = options.url.clone();
    let client = Client::connect(options).await.unwrap();
    let mut state = client.watch();
    let lost =
        soon(state.wait_for(|state| matches!(state, State::Disconnected { .. }))).await.unwrap().clone();
    let State::Disconnected { error: Some(error), .. } = lost else { panic!("{lost:?}") };
    assert!(error.to_string().starts_with(&format!("no server answers at {url}")), "{error}");
    soon(client.close()).await;
    assert!(matches!(client.state(), State::Closed(ClosedError::ByApplication)));
}

#[tokio::test]
async fn bad_addresses_and_options_are_refused_at_once() {
    for (url, text) in [
        ("wss://example.org/v1/ws", "asks for TLS"),
        ("http://127.0.0.1:8080", "begins with http: instead of ws:"),
        ("127.0.0.1:8080", "no WebSocket address"),
        ("", "no WebSocket address"),
    ] {
        let error = Client::connect(ClientOptions::new(url, "token")).await.unwrap_err();
        assert!(matches!(error, StartError::Url(_)) && error.to_string().contains(text), "{url}: {error}");
    }
    let options = ClientOptions { credit: Some(1_000), ..ClientOptions::new("ws://127.0.0.1:1/", "token") };
    let error = Client::connect(options).await.unwrap_err();
    assert_eq!(error.to_string(), "credit is 1000; 0 to 256 are allowed");
}

#[tokio::test]
async fn a_raw_connection_does_only_what_it_is_told() {
    let server = Server::start().await;
    let url = server.options().url;
    let (raw, mut peer) = tokio::join!(RawConnection::connect(&url), server.accept());
    let mut raw = raw.unwrap();
    let hello = Hello { token: Some("t".into()), credit: Some(0), ..Hello::default() };
    let answer = async {
        assert_eq!(peer.hello().await.credit, Some(0));
        peer.push_all([(Some(0), Event::Welcome(Box::new(welcome()))), (None, Event::Ping)]).await;
    };
    let (welcomed, ()) = soon(async { tokio::join!(raw.hello(hello), answer) }).await;
    assert_eq!(welcomed.unwrap().user, "bob");
    assert_eq!(soon(raw.next()).await.unwrap().event, Event::Ping);
    raw.send(Envelope { id: Some(7), command: Command::Ping }).await.unwrap();
    assert_eq!(peer.command().await, Envelope { id: Some(7), command: Command::Ping });
    raw.send_text("{}".to_owned()).await.unwrap();
    assert_eq!(peer.command().await, Envelope { id: None, command: Command::Ping });
    let ((), end) = tokio::join!(peer.close(CloseCode::TooSlow), soon(raw.next()));
    assert!(matches!(end, Err(ConnectionError::Closed { code: 4408, reason }) if reason == "too slow"));
}
