//! What a client needs to know before it starts.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use futures::future::BoxFuture;

use super::checkpoint::{Checkpoint, MemoryCheckpoint};
use crate::Jitter;

/// Why the application gave no token.
pub type TokenError = Box<dyn Error + Send + Sync>;

type Ask = dyn Fn() -> BoxFuture<'static, Result<String, TokenError>> + Send + Sync;

/// Where tokens come from.
#[derive(Clone)]
pub enum TokenSource {
    /// One token; once it is refused or expired the client stops.
    Static(String),
    /// Asked at the first connect and whenever the last token was refused or expired.
    Callback(Arc<Ask>),
}

impl TokenSource {
    /// A source that asks the application.
    pub fn callback<F>(ask: impl Fn() -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<String, TokenError>> + Send + 'static,
    {
        Self::Callback(Arc::new(move || Box::pin(ask())))
    }

    pub(crate) async fn get(&self) -> Result<String, TokenError> {
        match self {
            Self::Static(token) => Ok(token.clone()),
            Self::Callback(ask) => ask().await,
        }
    }

    pub(crate) fn can_renew(&self) -> bool {
        matches!(self, Self::Callback(_))
    }
}

impl From<String> for TokenSource {
    fn from(token: String) -> Self {
        Self::Static(token)
    }
}

impl From<&str> for TokenSource {
    fn from(token: &str) -> Self {
        Self::Static(token.to_owned())
    }
}

impl fmt::Debug for TokenSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Static(_) => "Static(<redacted>)",
            Self::Callback(_) => "Callback",
        })
    }
}

/// How a [`Client`](super::Client) connects. [`ClientOptions::new`] fills in the usual values.
#[derive(Clone)]
pub struct ClientOptions {
    /// The edge's address, such as `ws://127.0.0.1:8080/v1/ws`.
    pub url: String,
    /// Where tokens come from.
    pub token: TokenSource,
    /// Stable name of the user's device, at most 200 bytes; empty when it does not matter. Where the server keeps a cursor
    /// for each device, one without a name is one more of them.
    pub device: String,
    /// Name and version of the application, for the server's logs, at most 200 bytes.
    pub client: String,
    /// Inbox messages that may be in flight: 1 to 256, or 0 not to take part in the user's inbox. The server
    /// chooses when it is `None`.
    pub credit: Option<u32>,
    /// Where what was processed is kept; in memory unless set.
    pub checkpoint: Arc<dyn Checkpoint>,
    /// The random source of back-off delays.
    pub jitter: Jitter,
    /// Events that a subscription holds before the client stops reading; at least 1.
    pub buffer: usize,
    /// How long the steps of a connect and the answer to a publish may take.
    pub request_timeout: Duration,
    /// A connection counts as dead after the server's heartbeat and this, without a byte.
    pub silence_grace: Duration,
}

impl ClientOptions {
    /// The usual values: no device, the server's credit, memory, 256 buffered events, 10 s for a request and
    /// for silence beyond the heartbeat.
    pub fn new(url: impl Into<String>, token: impl Into<TokenSource>) -> Self {
        Self {
            url: url.into(),
            token: token.into(),
            device: String::new(),
            client: concat!("sanjay-rust/", env!("CARGO_PKG_VERSION")).to_owned(),
            credit: None,
            checkpoint: Arc::new(MemoryCheckpoint::default()),
            jitter: Jitter::default(),
            buffer: 256,
            request_timeout: Duration::from_secs(10),
            silence_grace: Duration::from_secs(10),
        }
    }
}

impl fmt::Debug for ClientOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientOptions")
            .field("url", &self.url)
            .field("token", &self.token)
            .field("device", &self.device)
            .field("client", &self.client)
            .field("credit", &self.credit)
            .finish_non_exhaustive()
    }
}
