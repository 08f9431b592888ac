//! A client that speaks JSON over a bare socket, independent of the client crates.

use std::{collections::VecDeque, io};

use serde_json::{Value, json};

use crate::{
    tokens::Token,
    wire::{Opcode, Wire},
};

/// A connection that exchanges envelopes. It answers pings while it reads, unless it is told not to.
#[derive(Debug)]
pub struct Peer {
    /// The socket.
    pub wire: Wire,
    /// What `welcome` said.
    pub welcome: Value,
    /// Whether heartbeats are answered: as envelopes and as frames.
    pub answers: (bool, bool),
    pending: VecDeque<Value>,
    next_id: u64,
}

impl Peer {
    /// Upgrades and says `hello` for a user, without an inbox.
    pub async fn connect(url: &str, user: &str) -> Self {
        Self::with_hello(url, json!({ "token": Token::of(user).sign(), "credit": 0 })).await
    }

    /// Upgrades and says `hello` for a user that takes part in its inbox.
    pub async fn with_inbox(url: &str, user: &str, credit: u32) -> Self {
        Self::with_hello(url, json!({ "token": Token::of(user).sign(), "credit": credit })).await
    }

    /// Upgrades and says this `hello`.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn with_hello(url: &str, hello: Value) -> Self {
        Self::try_hello(url, hello).await.unwrap_or_else(|end| panic!("no welcome from {url}: {end:?}"))
    }

    /// Upgrades and says this `hello`.
    ///
    /// # Errors
    /// How the connection ended.
    ///
    /// # Panics
    /// When `hello` is answered with anything but `welcome`.
    pub async fn try_hello(url: &str, hello: Value) -> Result<Self, End> {
        Self::try_over(Self::open(url).await?, hello).await
    }

    /// Says this `hello` on a socket that is upgraded.
    ///
    /// # Errors
    /// How the connection ended.
    ///
    /// # Panics
    /// When `hello` is answered with anything but `welcome`.
    pub async fn try_over(wire: Wire, hello: Value) -> Result<Self, End> {
        let mut peer = Self::on(wire);
        let id = peer.start(json!({ "hello": hello })).await;
        let answer = peer.answer(id).await?;
        peer.welcome = answer["welcome"].clone();
        assert!(peer.welcome.is_object(), "no welcome: {answer}");
        Ok(peer)
    }

    /// Upgrades and says nothing.
    ///
    /// # Panics
    /// When the handshake is refused.
    pub async fn silent(url: &str) -> Self {
        Self::on(Self::open(url).await.unwrap_or_else(|end| panic!("no handshake with {url}: {end:?}")))
    }

    async fn open(url: &str) -> Result<Wire, End> {
        let upgraded = Wire::upgrade(url, None, &[("Sec-WebSocket-Protocol", "sanjay.v1.json")]).await;
        upgraded.map_err(|answer| End::Refused(answer.status))
    }

    fn on(wire: Wire) -> Self {
        Self { wire, welcome: Value::Null, answers: (true, true), pending: VecDeque::new(), next_id: 1 }
    }

    /// Sends an envelope.
    pub async fn send(&mut self, envelope: &Value) {
        self.wire.send(Opcode::Text, envelope.to_string().as_bytes()).await;
    }

    /// Sends a command under a new id, and gives the id.
    pub async fn start(&mut self, mut command: Value) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        command["id"] = id.into();
        self.send(&command).await;
        id
    }

    /// Sends a command and waits for its answer. What comes in between is kept.
    ///
    /// # Panics
    /// When the connection ends before.
    pub async fn call(&mut self, command: Value) -> Value {
        let id = self.start(command.clone()).await;
        self.answer(id).await.unwrap_or_else(|end| panic!("{command} was not answered: {end:?}"))
    }

    /// Waits for the answer to a command. What comes in between is kept.
    ///
    /// # Errors
    /// How the connection ended.
    pub async fn answer(&mut self, id: u64) -> Result<Value, End> {
        let mut kept = VecDeque::new();
        let found = loop {
            match self.next().await {
                Ok(envelope) if envelope["id"] == id => break Ok(envelope),
                Ok(envelope) => kept.push_back(envelope),
                Err(end) => break Err(end),
            }
        };
        kept.append(&mut self.pending);
        self.pending = kept;
        found
    }

    /// The next envelope that is no heartbeat. Dropping the future loses nothing.
    ///
    /// # Errors
    /// How the connection ended.
    ///
    /// # Panics
    /// When the server sends what is no envelope.
    pub async fn next(&mut self) -> Result<Value, End> {
        loop {
            if let Some(envelope) = self.pending.pop_front() {
                return Ok(envelope);
            }
            let frame = self.wire.next().await.map_err(|error| End::Lost(error.kind()))?;
            match frame.opcode {
                Opcode::Close => {
                    let (code, reason) = frame.close().unwrap_or((1005, String::new()));
                    return Err(End::Closed(code, reason));
                }
                Opcode::Ping if self.answers.1 => self.wire.send(Opcode::Pong, &frame.payload).await,
                Opcode::Text => self.take(&frame.payload).await,
                _ => {}
            }
        }
    }

    async fn take(&mut self, text: &[u8]) {
        let text = std::str::from_utf8(text).expect("text is UTF-8");
        for line in text.split('\n') {
            let envelope: Value =
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}"));
            if envelope == json!({}) {
                if self.answers.0 {
                    self.wire.send(Opcode::Text, b"{}").await;
                }
            } else {
                self.pending.push_back(envelope);
            }
        }
    }

    /// The next event of this kind; gives its body, and drops what comes before it.
    ///
    /// # Panics
    /// When the connection ends before.
    pub async fn event(&mut self, kind: &str) -> Value {
        loop {
            let mut envelope = self.next().await.unwrap_or_else(|end| panic!("no {kind} came: {end:?}"));
            if envelope.get(kind).is_some() {
                return envelope[kind].take();
            }
        }
    }

    /// Reads until the connection ends; gives the close code and its reason.
    ///
    /// # Panics
    /// When it ends without a close frame.
    pub async fn closed(&mut self) -> (u16, String) {
        loop {
            match self.next().await {
                Ok(_) => {}
                Err(End::Closed(code, reason)) => return (code, reason),
                Err(end) => panic!("the connection ended without a close: {end:?}"),
            }
        }
    }

    /// Subscribes; gives the answer's body.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn subscribe(&mut self, channel: &str) -> Value {
        let mut answer = self.call(json!({ "subscribe": { "channel": channel } })).await;
        assert!(answer["subscribed"].is_object(), "not subscribed: {answer}");
        answer["subscribed"].take()
    }

    /// Publishes a text; gives the answer's body.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn publish(&mut self, channel: &str, text: &str) -> Value {
        let command = json!({ "publish": { "channel": channel, "payload": { "text": text } } });
        let mut answer = self.call(command).await;
        assert!(answer["published"].is_object(), "not published: {answer}");
        answer["published"].take()
    }

    /// Acknowledges seqs, and waits until that is durable.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn ack(&mut self, from: u64, to: u64) {
        let answer = self.call(json!({ "ack": { "ranges": [[from, to]] } })).await;
        assert!(answer["ok"].is_object(), "not acknowledged: {answer}");
    }

    /// Gives a delivery back, and waits until that is durable. It comes again, not before `delay_ms`.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn nak(&mut self, seq: u64, delivery: u64, delay_ms: u64) {
        let nak = json!({ "seq": seq, "delivery": delivery, "delay_ms": delay_ms, "reason": "told to" });
        let answer = self.call(json!({ "nak": nak })).await;
        assert!(answer["ok"].is_object(), "not given back: {answer}");
    }

    /// Gives a message up, and waits until that is durable.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn term(&mut self, seq: u64, delivery: u64) {
        let term = json!({ "seq": seq, "delivery": delivery, "reason": "told to" });
        let answer = self.call(json!({ "term": term })).await;
        assert!(answer["ok"].is_object(), "not given up: {answer}");
    }

    /// Begins the ack deadline of a delivery anew.
    ///
    /// # Panics
    /// When it is refused.
    pub async fn working(&mut self, seq: u64, delivery: u64) {
        let answer = self.call(json!({ "working": { "seq": seq, "delivery": delivery } })).await;
        assert!(answer["ok"].is_object(), "not extended: {answer}");
    }

    /// Whether anything has arrived by the time that the server answered a ping.
    ///
    /// # Panics
    /// When the connection ended.
    pub async fn is_quiet(&mut self) -> bool {
        let id = self.start(json!({})).await;
        self.answer(id).await.unwrap_or_else(|end| panic!("no answer to a ping: {end:?}"));
        self.pending.is_empty()
    }

    /// Closes as a client that is done does, and waits for the server's close.
    pub async fn bye(mut self) {
        self.wire.send(Opcode::Close, &1000_u16.to_be_bytes()).await;
        let _ = self.wire.closed().await;
    }
}

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// With a close frame.
    Closed(u16, String),
    /// Without one.
    Lost(io::ErrorKind),
    /// It never began: the HTTP status of the answer, or 0 when there was none.
    Refused(u16),
}
