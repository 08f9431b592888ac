//! Connections to the edge under load.

use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};
use sanjay_client::{
    ConnectionError, RawConnection,
    protocol::{CloseCode, Command, Envelope, Event, command::Hello, command::Subscribe},
};
use tokio::{sync::watch, time::timeout};

use crate::{commands::token, settings::Signer};

/// How long a connect, up to `welcome`, or the answer to a command may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// The edge, and this run's names on it.
#[derive(Debug)]
pub(super) struct Edge {
    pub(super) url: String,
    pub(super) signer: Signer,
    /// Tells this run's users, channels and messages from others'.
    pub(super) run: String,
}

/// A connection that was welcomed.
pub(super) struct Opened {
    pub(super) connection: RawConnection,
    /// From the first packet to the upgrade.
    pub(super) handshake: Duration,
    /// From `hello` to `welcome`.
    pub(super) welcome: Duration,
}

impl Edge {
    /// The name of this run's user or channel number `n`.
    pub(super) fn name(&self, kind: &str, n: u64) -> String {
        format!("bench-{}-{kind}-{n}", self.run)
    }

    /// Connects as the user `name`, with `credit` for its inbox.
    pub(super) async fn open(&self, name: &str, credit: Option<u32>) -> Result<Opened, ConnectionError> {
        let token = token::mint(name, &self.signer);
        let open = async {
            let started = Instant::now();
            let mut connection = RawConnection::connect(&self.url).await?;
            let handshake = started.elapsed();
            let client = concat!("sanjay-bench/", env!("CARGO_PKG_VERSION")).to_owned();
            let hello = Hello { token: Some(token), client, credit, ..Hello::default() };
            let started = Instant::now();
            connection.hello(hello).await?;
            Ok(Opened { connection, handshake, welcome: started.elapsed() })
        };
        timeout(PATIENCE, open)
            .await
            .unwrap_or(Err(ConnectionError::Timeout { what: "welcome", within: PATIENCE }))
    }

    /// Connects once and says what to mend when that fails.
    pub(super) async fn probe(&self) -> anyhow::Result<()> {
        match self.open(&self.name("probe", 0), Some(0)).await {
            Ok(opened) => {
                opened.connection.close(CloseCode::Done).await;
                Ok(())
            }
            Err(error @ ConnectionError::Unreachable { .. }) => {
                bail!("{error}; start one with `sanjay standalone`, or give its address with --url")
            }
            Err(ConnectionError::Closed { code, reason }) if code == CloseCode::Unauthorized.code() => {
                bail!(
                    "the edge refused a token made with this secret: {reason}; give the edge's `token_secret` with \
                     --token-secret or SANJAY_EDGE__TOKEN_SECRET"
                )
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Subscribes a connection and waits for the answer.
    pub(super) async fn subscribe(
        &self,
        connection: &mut RawConnection,
        channel: &str,
    ) -> anyhow::Result<()> {
        let command = Command::Subscribe(Subscribe { channel: channel.to_owned(), ..Subscribe::default() });
        let asked = async {
            connection.send(Envelope { id: Some(1), command }).await?;
            loop {
                let answer = connection.next().await?;
                match answer.event {
                    Event::Subscribed(_) => return Ok(()),
                    Event::Error(error) if answer.id == Some(1) => {
                        bail!("subscribing to {channel} failed: {}", error.message)
                    }
                    _ => {}
                }
            }
        };
        let patience = PATIENCE.as_secs();
        let late = |_| Err(anyhow!("no answer to a subscribe within {patience} s"));
        timeout(PATIENCE, asked).await.unwrap_or_else(late)
    }
}

/// Answers the edge's ping.
pub(super) async fn pong(connection: &mut RawConnection) -> Result<(), ConnectionError> {
    connection.send(Envelope { id: None, command: Command::Ping }).await
}

/// Waits for the end of the run.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A sender that is gone has ended the run too.
    let _ = stop.wait_for(|stop| *stop).await;
}
