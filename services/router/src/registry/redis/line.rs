//! The one connection that everything about channels goes over, many calls at a time and in order.
//!
//! Invariant: scripts are loaded over the very connection that told the `run_id` in their text, and a connection
//! that failed is never used again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use redis::{AsyncConnectionConfig, Client, Pipeline, RedisResult, Value, aio::MultiplexedConnection};
use sanjay_resilience::{CallError, Refused};
use tokio::{sync::Mutex, time::Instant};

use super::{
    pool::Script,
    server::{Known, describe, is_outage, timed_out},
};
use crate::{
    redis::{Server, connect},
    registry::RegistryError,
};

/// After a failed attempt to connect, everybody fails for so long without another one.
const PAUSE: Duration = Duration::from_millis(100);

/// How long the state of an unused channel is kept.
pub(super) const IDLE: Duration = Duration::from_secs(10 * 60);

/// For how long a dedupe key is known.
pub(super) const DEDUPE_WINDOW: Duration = Duration::from_secs(5 * 60);

/// Most dedupe keys that a channel remembers.
pub(super) const DEDUPE_KEYS: usize = 4_096;

const PUBLISH: &str = concat!(include_str!("scripts/channel.lua"), include_str!("scripts/publish.lua"));
const HISTORY: &str = concat!(include_str!("scripts/channel.lua"), include_str!("scripts/history.lua"));
const TOP: &str = concat!(include_str!("scripts/channel.lua"), include_str!("scripts/top.lua"));

pub(super) struct Line {
    client: Client,
    config: AsyncConnectionConfig,
    limits: Limits,
    known: Arc<Known>,
    state: Mutex<State>,
}

/// What is written into the scripts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) idle: Duration,
    pub(super) dedupe_window: Duration,
    pub(super) dedupe_keys: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { idle: IDLE, dedupe_window: DEDUPE_WINDOW, dedupe_keys: DEDUPE_KEYS }
    }
}

#[derive(Default)]
struct State {
    open: Option<Arc<Open>>,
    failed: Option<(Instant, RegistryError)>,
}

/// A connection with the scripts that fit the process at its other end.
pub(super) struct Open {
    connection: MultiplexedConnection,
    broken: AtomicBool,
    pub(super) publish: Script,
    pub(super) top: Script,
    pub(super) history: Script,
}

impl Line {
    pub(super) fn new(known: Arc<Known>, limits: Limits) -> RedisResult<Self> {
        let client = known.config.client()?;
        let config = known.config.connection_config();
        Ok(Self { client, config, limits, known, state: Mutex::default() })
    }

    /// The connection, made anew when there is none.
    pub(super) async fn open(&self) -> Result<Arc<Open>, RegistryError> {
        let mut state = self.state.lock().await;
        if let Some(open) = state.open.as_ref().filter(|open| !open.broken.load(Ordering::Relaxed)) {
            return Ok(Arc::clone(open));
        }
        state.open = None;
        if let Some((at, error)) = &state.failed
            && at.elapsed() < PAUSE
        {
            return Err(error.clone());
        }
        match self.known.policy.call_at_once(self.known.config.timeout, self.make(), is_outage).await {
            Ok(open) => {
                let open = Arc::new(open);
                *state = State { open: Some(Arc::clone(&open)), failed: None };
                Ok(open)
            }
            Err(error) => {
                let problem = match error {
                    CallError::Failed(error) => format!("cannot connect: {}", describe(&error)),
                    CallError::Refused(Refused::Late(_)) => {
                        format!("cannot connect: {}", describe(&timed_out()))
                    }
                    CallError::Refused(refused) => refused.to_string(),
                };
                let error = self.known.failed(&problem);
                state.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    /// Makes the connection when there is none, or else looks whether it still works: so that a publication need not
    /// be the one to find out.
    pub(super) async fn probe(&self) -> Result<(), RegistryError> {
        let open = self.open().await?;
        let mut ping = Pipeline::new();
        ping.cmd("PING");
        self.send(&open, "probe", &ping).await.map(drop)
    }

    async fn make(&self) -> RedisResult<Open> {
        let (connection, server) = connect(&self.client, &self.config).await?;
        self.known.connected(&server);
        let open = Open {
            connection,
            broken: AtomicBool::new(false),
            publish: Script::new("publish", self.limits.fill(PUBLISH, &server)),
            top: Script::new("tops", self.limits.fill(TOP, &server)),
            history: Script::new("history", self.limits.fill(HISTORY, &server)),
        };
        open.load().await?;
        Ok(open)
    }

    /// Sends commands together, and returns their answers, errors of the server among them.
    pub(super) async fn send(
        &self,
        open: &Open,
        operation: &'static str,
        pipeline: &Pipeline,
    ) -> Result<Vec<Value>, RegistryError> {
        let began = Instant::now();
        let mut connection = open.connection.clone();
        let sending = connection.send_packed_commands(pipeline, 0, pipeline.len());
        let result = self.known.policy.call_at_once(self.known.config.timeout, sending, is_outage).await;
        if matches!(result, Err(CallError::Failed(_) | CallError::Refused(Refused::Late(_)))) {
            // What was sent may still be carried out, but nothing that is sent from now on waits behind it.
            open.give_up();
        }
        self.known.settled(operation, began.elapsed(), result)
    }
}

impl Open {
    /// Gives the scripts to the server, which forgot them or never had them.
    pub(super) async fn load(&self) -> RedisResult<()> {
        let mut connection = self.connection.clone();
        self.publish.load(&mut connection).await?;
        self.top.load(&mut connection).await?;
        self.history.load(&mut connection).await
    }

    /// Has the next caller make another connection.
    pub(super) fn give_up(&self) {
        self.broken.store(true, Ordering::Relaxed);
    }
}

impl Limits {
    fn fill(&self, text: &str, server: &Server) -> String {
        text.replace("@RUN_ID@", &server.run_id)
            .replace("@PUBLISH@", server.pub_sub.publish())
            .replace("@IDLE_MS@", &self.idle.as_millis().to_string())
            .replace("@WINDOW_MS@", &self.dedupe_window.as_millis().to_string())
            .replace("@MOST_KEYS@", &self.dedupe_keys.to_string())
    }
}
