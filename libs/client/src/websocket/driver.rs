//! The task behind a client: connects, serves the connection, and decides when to try again.

use std::{pin::pin, sync::Arc, time::Duration};

use sanjay_protocol::{close::Reconnect, command::Hello, event::Welcome};
use tokio::{
    sync::{Notify, mpsc, watch},
    time::{Instant, sleep, timeout},
};

use super::{
    client::State,
    error::{ClosedError, ConnectionError},
    inbox::Ready,
    machine::{Machine, Request, TokenNews},
    options::{ClientOptions, TokenError},
    raw::RawConnection,
    renewal::Renewal,
};
use crate::backoff;

/// Longest spread of a fleet's first attempts that a server can ask for.
const MAX_SPREAD: Duration = Duration::from_secs(600);

pub(crate) struct Driver {
    pub(super) options: ClientOptions,
    pub(super) state: watch::Sender<State>,
    pub(super) requests: mpsc::Receiver<Request>,
    pub(super) ready: mpsc::Receiver<Ready>,
    pub(super) closing: Arc<Notify>,
    pub(super) machine: Machine,
    pub(super) renewal: Renewal,
    /// Attempts since the last `welcome`.
    failures: u32,
    spread: Duration,
    token: Option<String>,
    /// The last token was refused, and no other was accepted since.
    token_refused: bool,
}

/// The application wants the client to end.
pub(super) struct Asked;

/// How a connection ended.
pub(super) enum Ended {
    Asked,
    Failed(ConnectionError),
    /// The server asked the client to come back at this time.
    Goaway(Instant),
}

impl Driver {
    pub(crate) fn new(
        options: ClientOptions,
        state: watch::Sender<State>,
        requests: mpsc::Receiver<Request>,
        ready: mpsc::Receiver<Ready>,
        closing: Arc<Notify>,
        machine: Machine,
    ) -> Self {
        let renewal = Renewal::new(options.token.clone(), options.request_timeout);
        Self {
            renewal,
            options,
            state,
            requests,
            ready,
            closing,
            machine,
            failures: 0,
            spread: backoff::DEFAULT_SPREAD,
            token: None,
            token_refused: false,
        }
    }

    pub(crate) async fn run(mut self) {
        let reason = match Box::pin(self.keep_connected()).await {
            Ok(Asked) => ClosedError::ByApplication,
            Err(reason) => reason,
        };
        tracing::debug!(%reason, "the client ends");
        // Before the requests that are left fail with it.
        self.state.send_replace(State::Closed(reason));
    }

    async fn keep_connected(&mut self) -> Result<Asked, ClosedError> {
        loop {
            self.state.send_replace(State::Connecting);
            let connecting = connect(self.options.clone(), self.token.clone());
            let Ok(connected) = self.offline(connecting).await else { return Ok(Asked) };
            let ended = match connected {
                Ok((connection, welcome, token)) => {
                    self.token = Some(token);
                    self.connected(connection, welcome).await
                }
                Err(error) => Ended::Failed(error),
            };
            let (error, delay) = match ended {
                Ended::Asked => return Ok(Asked),
                Ended::Goaway(at) => (None, at.saturating_duration_since(Instant::now())),
                Ended::Failed(error) => {
                    let error = Arc::new(error);
                    let delay = self.delay_after(&error)?;
                    tracing::info!(%error, ?delay, "the connection failed");
                    (Some(error), delay)
                }
            };
            self.state.send_replace(State::Disconnected { error, retry_in: delay });
            if self.offline(sleep(delay)).await.is_err() {
                return Ok(Asked);
            }
        }
    }

    async fn connected(&mut self, connection: RawConnection, welcome: Welcome) -> Ended {
        self.failures = 0;
        self.token_refused = false;
        self.spread = Duration::from_millis(welcome.reconnect_spread_ms).min(MAX_SPREAD);
        self.machine.connected(&welcome);
        let ttl = Duration::from_secs(welcome.token_ttl_s);
        self.renewal.in_force(ttl, Instant::now(), self.options.jitter.fraction());
        let heartbeat = Duration::from_millis(welcome.heartbeat_ms.clamp(1, 3_600_000));
        self.state.send_replace(State::Connected(Arc::new(welcome)));
        let ended = self.session(connection, heartbeat).await;
        self.renewal.stop();
        self.machine.disconnected();
        ended
    }

    /// Another token came from the application, or none.
    pub(super) fn renewed(&mut self, token: Result<String, TokenError>, now: Instant) {
        match token {
            Ok(token) => self.machine.refresh(token, now),
            Err(error) => {
                tracing::warn!(%error, "the application gave no token in place of the one that ends");
                self.renewal.failed(now, self.options.jitter.fraction());
            }
        }
    }

    /// What the server said of tokens.
    pub(super) fn heard_of_tokens(&mut self, now: Instant) {
        for news in self.machine.take_token_news() {
            match news {
                TokenNews::Expired => self.renewal.urgent(now),
                TokenNews::Refreshed { token, ttl } => {
                    self.token = Some(token);
                    self.renewal.in_force(ttl, now, self.options.jitter.fraction());
                }
                TokenNews::Refused(error) => {
                    let why = error.message;
                    tracing::warn!(why, "the server refused the token in place of the one that ends");
                    self.renewal.failed(now, self.options.jitter.fraction());
                }
            }
        }
    }

    /// How long to wait after a failure, or why not to try again.
    fn delay_after(&mut self, error: &Arc<ConnectionError>) -> Result<Duration, ClosedError> {
        match error.rule() {
            Reconnect::Stop => return Err(ClosedError::Stopped(Arc::clone(error))),
            Reconnect::NewToken if self.token_refused || !self.options.token.can_renew() => {
                return Err(ClosedError::TokenRefused(Arc::clone(error)));
            }
            Reconnect::NewToken => {
                self.token = None;
                self.token_refused = true;
            }
            Reconnect::BackOff => {}
        }
        let delay = backoff::reconnect(self.failures, self.spread, self.options.jitter.fraction());
        self.failures = self.failures.saturating_add(1);
        Ok(delay)
    }

    /// Waits for `work` without a connection: subscriptions are noted for later, publishes fail.
    async fn offline<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Asked> {
        let mut work = pin!(work);
        loop {
            self.machine.deliver(Instant::now());
            tokio::select! {
                done = &mut work => return Ok(done),
                () = self.closing.notified() => return Err(Asked),
                request = self.requests.recv() => match request {
                    Some(request) => self.machine.request(request, Instant::now()),
                    // Every handle is gone.
                    None => return Err(Asked),
                },
                // Not acked now; the redelivery will be.
                Some(ready) = self.ready.recv() => self.machine.ready(ready),
                () = self.machine.room() => {}
            }
        }
    }
}

type Connected = (RawConnection, Welcome, String);

async fn connect(options: ClientOptions, token: Option<String>) -> Result<Connected, ConnectionError> {
    let within = options.request_timeout;
    let late = |what| move |_| ConnectionError::Timeout { what, within };
    let token = match token {
        Some(token) => token,
        None => {
            let asked = timeout(within, options.token.get()).await;
            asked.map_err(late("token"))?.map_err(ConnectionError::Token)?
        }
    };
    let opened = timeout(within, RawConnection::connect(&options.url)).await;
    let mut connection = opened.map_err(late("answer to the handshake"))??;
    let hello = Hello {
        token: Some(token.clone()),
        device: options.device,
        client: options.client,
        credit: options.credit,
    };
    let welcome = timeout(within, connection.hello(hello)).await.map_err(late("welcome"))?;
    let welcome = match welcome {
        Ok(welcome) => welcome,
        Err(error) => return Err(connection.explain(error).await),
    };
    Ok((connection, welcome, token))
}
