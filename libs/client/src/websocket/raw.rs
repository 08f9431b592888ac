//! One WebSocket connection that sends and receives single envelopes and does nothing on its own.

use std::{collections::VecDeque, future::poll_fn, pin::Pin, task::Poll, time::Duration};

use futures::{Sink, Stream};
use sanjay_protocol::{
    CloseCode, Command, Envelope, Event, EventEnvelope, SUBPROTOCOL_JSON, command::Hello, event::Welcome,
    json,
};
use tokio::{net::TcpStream, time::timeout};
use tokio_tungstenite::{
    MaybeTlsStream, WebSocketStream, connect_async_with_config,
    tungstenite::{
        self, Bytes, Error, Message,
        client::IntoClientRequest,
        http::{HeaderValue, Uri, header::SEC_WEBSOCKET_PROTOCOL},
        protocol::{CloseFrame, WebSocketConfig, frame::coding::CloseCode as Code},
    },
};

use super::error::ConnectionError;

/// Idle connections stay small; the buffer grows with a larger message.
const READ_BUFFER_BYTES: usize = 4 * 1024;
/// Largest message from a server; it coalesces what is ready, of which each payload is at most 64 KiB.
const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;
/// How long the closing handshake may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// One connection: no reconnect, no answers to pings, no bookkeeping. For tests and load;
/// applications use [`Client`](super::Client).
#[derive(Debug)]
pub struct RawConnection {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    received: VecDeque<EventEnvelope>,
    unflushed: bool,
}

/// What [`RawConnection::drive`] did.
#[derive(Debug)]
pub(crate) enum Io {
    Flushed,
    Text(tungstenite::Utf8Bytes),
    /// A frame without an envelope: a sign of life.
    Control,
}

impl RawConnection {
    /// Opens the socket and completes the WebSocket handshake with the JSON subprotocol. Nothing is sent yet.
    ///
    /// # Errors
    /// Names the address and what was wrong.
    pub async fn connect(url: &str) -> Result<Self, ConnectionError> {
        check_url(url)?;
        let bad = |error: &dyn std::fmt::Display| ConnectionError::BadUrl {
            url: url.to_owned(),
            reason: error.to_string(),
        };
        let mut request = url.into_client_request().map_err(|error| bad(&error))?;
        let protocol = HeaderValue::from_static(SUBPROTOCOL_JSON);
        request.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, protocol);
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(MAX_MESSAGE_BYTES))
            .max_frame_size(Some(MAX_MESSAGE_BYTES));
        let connected = Box::pin(connect_async_with_config(request, Some(config), true)).await;
        let (socket, _) = connected.map_err(|error| handshake_error(url, &error))?;
        Ok(Self { socket, received: VecDeque::new(), unflushed: false })
    }

    /// Sends `hello` and waits for `welcome`.
    ///
    /// # Errors
    /// When the server refuses or the connection ends.
    pub async fn hello(&mut self, hello: Hello) -> Result<Welcome, ConnectionError> {
        self.send(Envelope { id: Some(0), command: Command::Hello(hello) }).await?;
        let mut refused = None;
        loop {
            match self.next().await {
                Ok(EventEnvelope { event: Event::Welcome(welcome), .. }) => return Ok(*welcome),
                // The close that follows says what to do; this says why.
                Ok(EventEnvelope { event: Event::Error(error), .. }) => refused = Some(error.message),
                Ok(_) => {}
                Err(ConnectionError::Closed { code, reason }) => {
                    return Err(ConnectionError::Closed { code, reason: refused.unwrap_or(reason) });
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends one envelope.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn send(&mut self, envelope: Envelope) -> Result<(), ConnectionError> {
        let mut bytes = Vec::new();
        json::encode(&envelope, &mut bytes);
        self.send_frame(Message::text(into_text(bytes))).await
    }

    /// Sends a text message as it is.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn send_text(&mut self, text: String) -> Result<(), ConnectionError> {
        self.send_frame(Message::text(text)).await
    }

    /// Sends a binary message.
    ///
    /// # Errors
    /// When the connection has ended.
    pub async fn send_binary(&mut self, bytes: Vec<u8>) -> Result<(), ConnectionError> {
        self.send_frame(Message::binary(bytes)).await
    }

    async fn send_frame(&mut self, message: Message) -> Result<(), ConnectionError> {
        self.start_send(message)?;
        self.flush().await
    }

    /// The next envelope. Dropping the future loses nothing.
    ///
    /// # Errors
    /// [`ConnectionError::Closed`] with the server's code and reason once it closed the connection.
    pub async fn next(&mut self) -> Result<EventEnvelope, ConnectionError> {
        loop {
            if let Some(envelope) = self.received.pop_front() {
                return Ok(envelope);
            }
            if let Io::Text(text) = self.drive(true).await? {
                for envelope in json::decode_events(&text) {
                    self.received
                        .push_back(envelope.map_err(|error| ConnectionError::Protocol(error.to_string()))?);
                }
            }
        }
    }

    /// Closes with `code` and waits a moment for the server's close.
    pub async fn close(mut self, code: CloseCode) {
        let frame = CloseFrame { code: Code::from(code.code()), reason: code.reason().into() };
        if self.start_send(Message::Close(Some(frame))).is_ok() {
            let farewell = async { while self.drive(true).await.is_ok() {} };
            let _ = timeout(CLOSE_TIMEOUT, farewell).await;
        }
    }

    /// Envelopes that were received beside one that [`next`](Self::next) gave.
    pub(crate) fn take_received(&mut self) -> VecDeque<EventEnvelope> {
        std::mem::take(&mut self.received)
    }

    pub(crate) fn is_unflushed(&self) -> bool {
        self.unflushed
    }

    pub(crate) fn start_text(&mut self, text: String) -> Result<(), ConnectionError> {
        self.start_send(Message::text(text))
    }

    pub(crate) fn start_ping(&mut self) -> Result<(), ConnectionError> {
        self.start_send(Message::Ping(Bytes::new()))
    }

    /// Hands a message to the socket without waiting. The caller keeps what is unflushed bounded.
    fn start_send(&mut self, message: Message) -> Result<(), ConnectionError> {
        Pin::new(&mut self.socket).start_send(message).map_err(|error| lost(&error))?;
        self.unflushed = true;
        Ok(())
    }

    async fn flush(&mut self) -> Result<(), ConnectionError> {
        while self.unflushed {
            self.drive(false).await?;
        }
        Ok(())
    }

    /// After a failed write: the close that the server sent before it hung up says more than the failure.
    pub(crate) async fn explain(&mut self, error: ConnectionError) -> ConnectionError {
        if !matches!(error, ConnectionError::Lost { .. }) {
            return error;
        }
        self.unflushed = false;
        let close = async {
            loop {
                if let Err(error) = self.drive(true).await {
                    return error;
                }
            }
        };
        match timeout(CLOSE_TIMEOUT, close).await {
            Ok(closed @ ConnectionError::Closed { .. }) => closed,
            _ => error,
        }
    }

    /// Writes what waits and, with `read`, reads a frame, whichever comes first. Dropping the future loses
    /// nothing.
    pub(crate) async fn drive(&mut self, read: bool) -> Result<Io, ConnectionError> {
        let message = poll_fn(|cx| {
            if self.unflushed
                && let Poll::Ready(flushed) = Pin::new(&mut self.socket).poll_flush(cx)
            {
                self.unflushed = false;
                return Poll::Ready(flushed.map(|()| None));
            }
            if !read {
                return Poll::Pending;
            }
            Pin::new(&mut self.socket)
                .poll_next(cx)
                .map(|next| next.unwrap_or(Err(Error::ConnectionClosed)).map(Some))
        });
        match message.await.map_err(|error| lost(&error))? {
            None => Ok(Io::Flushed),
            Some(Message::Text(text)) => Ok(Io::Text(text)),
            Some(Message::Binary(_)) => {
                Err(ConnectionError::Protocol("a binary message in the JSON subprotocol".into()))
            }
            Some(Message::Close(frame)) => {
                // The answering close is queued already.
                let answer = poll_fn(|cx| Pin::new(&mut self.socket).poll_flush(cx));
                let _ = timeout(CLOSE_TIMEOUT, answer).await;
                let (code, reason) =
                    frame.map_or((1005, String::new()), |f| (f.code.into(), f.reason.to_string()));
                Err(ConnectionError::Closed { code, reason })
            }
            Some(_) => Ok(Io::Control),
        }
    }
}

/// JSON that the codec wrote is UTF-8.
pub(crate) fn into_text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).expect("the JSON codec writes UTF-8")
}

/// Checks an edge's address.
pub(crate) fn check_url(url: &str) -> Result<(), ConnectionError> {
    let bad = |reason: String| Err(ConnectionError::BadUrl { url: url.to_owned(), reason });
    match url.parse::<Uri>() {
        Err(error) => bad(error.to_string()),
        Ok(uri) => match uri.scheme_str() {
            Some("ws") if uri.host().is_some_and(|host| !host.is_empty()) => Ok(()),
            Some("wss") => Err(ConnectionError::Tls { url: url.to_owned() }),
            Some("ws") => bad("it names no host".to_owned()),
            Some(other) => bad(format!("it begins with {other}: instead of ws:")),
            None => bad("it does not begin with ws://".to_owned()),
        },
    }
}

fn handshake_error(url: &str, error: &Error) -> ConnectionError {
    let url = url.to_owned();
    match error {
        Error::Io(error) => ConnectionError::Unreachable { url, reason: error.to_string() },
        Error::Http(response) => ConnectionError::Refused { url, status: response.status().as_u16() },
        other => ConnectionError::Handshake { url, reason: other.to_string() },
    }
}

fn lost(error: &Error) -> ConnectionError {
    match error {
        Error::Capacity(_) | Error::Utf8(_) => ConnectionError::Protocol(error.to_string()),
        _ => ConnectionError::Lost { reason: error.to_string() },
    }
}
