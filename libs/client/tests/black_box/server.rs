//! A WebSocket server that a test drives envelope by envelope.

use futures::{SinkExt, StreamExt};
use sanjay_client::{
    ClientOptions, Jitter,
    protocol::{
        CloseCode, Command, Envelope, Event, EventEnvelope, Payload, SUBPROTOCOL_JSON,
        command::{Ack, Hello},
        event::{Inbox, InboxState, Limits, Message, Subscribed, Welcome},
        json,
    },
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async,
    tungstenite::{
        self,
        handshake::server::{Request, Response},
        http::{HeaderValue, header::SEC_WEBSOCKET_PROTOCOL},
        protocol::CloseFrame,
    },
};

use crate::soon;

pub(crate) struct Server {
    listener: TcpListener,
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    pub(crate) fn options(&self) -> ClientOptions {
        let url = format!("ws://{}/v1/ws", self.listener.local_addr().unwrap());
        // No delays, so that tests are quick; their lengths are tested where they are computed.
        ClientOptions { jitter: Jitter::from_source(|| 0.0), ..ClientOptions::new(url, "token") }
    }

    pub(crate) async fn accept(&self) -> Peer {
        let (socket, _) = soon(self.listener.accept()).await.unwrap();
        #[expect(clippy::result_large_err, reason = "the handshake's callback has this type")]
        let select = |_: &Request, mut response: Response| {
            let protocol = HeaderValue::from_static(SUBPROTOCOL_JSON);
            response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, protocol);
            Ok(response)
        };
        Peer { socket: soon(accept_hdr_async(socket, select)).await.unwrap() }
    }

    /// Accepts a connection and welcomes it.
    pub(crate) async fn welcome(&self, welcome: Welcome) -> Peer {
        let mut peer = self.accept().await;
        peer.hello().await;
        peer.push(Some(0), Event::Welcome(Box::new(welcome))).await;
        peer
    }
}

pub(crate) struct Peer {
    socket: WebSocketStream<TcpStream>,
}

impl Peer {
    pub(crate) async fn hello(&mut self) -> Hello {
        match self.command().await {
            Envelope { id: Some(0), command: Command::Hello(hello) } => hello,
            other => panic!("instead of hello came {other:?}"),
        }
    }

    /// The next command; `None` once the connection has ended.
    pub(crate) async fn next(&mut self) -> Option<Vec<Envelope>> {
        loop {
            match soon(self.socket.next()).await? {
                Ok(tungstenite::Message::Text(text)) => {
                    return Some(json::decode_commands(&text).map(Result::unwrap).collect());
                }
                Ok(_) => {}
                Err(_) => return None,
            }
        }
    }

    /// The one command of the next message.
    pub(crate) async fn command(&mut self) -> Envelope {
        let mut commands = self.next().await.expect("the client is there");
        assert_eq!(commands.len(), 1, "{commands:?}");
        commands.remove(0)
    }

    pub(crate) async fn ack(&mut self) -> Vec<(u64, u64)> {
        self.whole_ack().await.ranges
    }

    pub(crate) async fn whole_ack(&mut self) -> Ack {
        match self.command().await.command {
            Command::Ack(ack) => ack,
            other => panic!("instead of ack came {other:?}"),
        }
    }

    pub(crate) async fn push(&mut self, id: Option<u64>, event: Event) {
        self.push_all([(id, event)]).await;
    }

    pub(crate) async fn push_all(&mut self, events: impl IntoIterator<Item = (Option<u64>, Event)>) {
        let mut out = Vec::new();
        for (id, event) in events {
            json::encode(&EventEnvelope { id, event }, &mut out);
        }
        let text = String::from_utf8(out).unwrap();
        soon(self.socket.send(tungstenite::Message::text(text))).await.unwrap();
    }

    pub(crate) async fn expect_subscribe(&mut self, channel: &str) -> Option<u64> {
        let Envelope { id, command } = self.command().await;
        assert!(matches!(&command, Command::Subscribe(s) if s.channel == channel), "{command:?}");
        id
    }

    pub(crate) async fn subscribe(&mut self, channel: &str, epoch: &str, offset: u64) {
        let id = self.expect_subscribe(channel).await;
        let subscribed =
            Subscribed { channel: channel.into(), epoch: epoch.into(), offset, ..Subscribed::default() };
        self.push(id, Event::Subscribed(subscribed)).await;
    }

    /// Pushes one event after the other; says so when the second ping has come meanwhile.
    pub(crate) async fn flood(
        self,
        events: impl Iterator<Item = Event>,
        pinged: oneshot::Sender<()>,
    ) -> Self {
        let (mut sink, mut stream) = self.socket.split();
        let listening = tokio::spawn(async move {
            let mut pings = 0;
            while pings < 2 {
                let frame = stream.next().await.expect("the client is there").unwrap();
                pings += usize::from(frame.is_ping());
            }
            pinged.send(()).unwrap();
            stream
        });
        for event in events {
            let mut out = Vec::new();
            json::encode(&EventEnvelope { id: None, event }, &mut out);
            let text = String::from_utf8(out).unwrap();
            soon(sink.send(tungstenite::Message::text(text))).await.unwrap();
        }
        let stream = soon(listening).await.unwrap();
        Self { socket: sink.reunite(stream).expect("both are of this socket") }
    }

    pub(crate) async fn close(mut self, code: CloseCode) {
        let frame = CloseFrame { code: code.code().into(), reason: code.reason().into() };
        soon(self.socket.close(Some(frame))).await.unwrap();
        while soon(self.socket.next()).await.is_some_and(|frame| frame.is_ok()) {}
    }
}

pub(crate) fn welcome() -> Welcome {
    Welcome {
        session: "00000000-0000-0000-0000-000000000001".into(),
        user: "bob".into(),
        inbox: None,
        heartbeat_ms: 25_000,
        token_ttl_s: 3_600,
        limits: Limits { message_bytes: 131_072, payload_bytes: 65_536, subscriptions: 256, credit: 256 },
        reconnect_spread_ms: 1_000,
        features: Vec::new(),
    }
}

pub(crate) fn welcome_with_inbox(epoch: &str, mark: u64, head: u64) -> Welcome {
    Welcome { inbox: Some(InboxState { epoch: epoch.into(), mark, head }), ..welcome() }
}

pub(crate) fn message(channel: &str, epoch: &str, offset: u64) -> Event {
    Event::Message(Box::new(Message {
        channel: channel.into(),
        offset,
        epoch: epoch.into(),
        message_id: format!("00000000-0000-0000-0000-{offset:012x}"),
        payload: Payload::Text(format!("message {offset}")),
        publisher: String::new(),
        time_us: 1,
        trace: String::new(),
    }))
}

pub(crate) fn inbox(seq: u64) -> Event {
    Event::Inbox(Box::new(Inbox {
        seq,
        message_id: format!("00000000-0000-0000-0000-{seq:012x}"),
        payload: Payload::Text(format!("message {seq}")),
        time_us: 1,
        delivery: 1,
        trace: String::new(),
    }))
}
