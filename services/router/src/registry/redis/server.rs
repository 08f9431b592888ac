//! What is known about the Redis server: which process it is, since when, and whether it answers.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use redis::{ErrorKind, RedisError, ServerErrorKind};
use sanjay_resilience::{CallError, Policy, Probes, Refused, Rules, Settings};
use tokio::time::Instant;

use super::pool::CONNECTIONS;
use crate::{
    outage::Outage,
    redis::{
        RedisConfig, Server,
        keys::Keys,
        metrics::{REDIS, RedisMetrics},
    },
    registry::RegistryError,
};

/// When calls are refused, and how many there may be. Four failures are a second of a server that hangs, whose lanes and
/// upkeep meet their time-outs together. Any call probes: none takes longer than the time-out. Calls over the pool have a
/// connection each, and more wait than a time-out's worth of them could be carried out for; what goes over the one line is
/// bounded by its lanes.
const SETTINGS: Settings = Settings {
    rules: Rules {
        window: 10,
        minimum: 4,
        share: 0.5,
        fresh: Duration::from_secs(30),
        pause: Duration::from_millis(500),
    },
    probes: Probes::AnyCall,
    running: CONNECTIONS,
    waiting: 1_024,
};

/// Shared by everything that speaks to the server.
pub(super) struct Known {
    pub(super) config: RedisConfig,
    pub(super) keys: Keys,
    pub(super) metrics: RedisMetrics,
    pub(super) lease: Duration,
    /// What every call of the registry goes through.
    pub(super) policy: Policy,
    state: Mutex<State>,
    /// Of the server.
    outage: Outage,
    /// Of what it refuses although it answers.
    refusing: Outage,
}

#[derive(Default)]
struct State {
    run_id: Option<Arc<str>>,
    /// How often another process was found in the server's place, and when last.
    replacements: u64,
    replaced: Option<Instant>,
    /// When a call failed last.
    failed: Option<Instant>,
}

impl Known {
    pub(super) fn new(config: RedisConfig, keys: Keys, metrics: RedisMetrics, lease: Duration) -> Self {
        Self {
            policy: Policy::new(REDIS, SETTINGS, &metrics.breakers),
            config,
            keys,
            metrics,
            lease,
            state: Mutex::default(),
            outage: Outage::default(),
            refusing: Outage::default(),
        }
    }

    /// Notes a new connection. Every connection is noted before the first call on it, so an answer that comes
    /// from another process than before is never taken for one of the process before.
    pub(super) fn connected(&self, server: &Server) {
        self.metrics.connects.inc();
        let mut state = self.state.lock();
        if state.run_id.as_ref() == Some(&server.run_id) {
            return;
        }
        if state.run_id.replace(Arc::clone(&server.run_id)).is_some() {
            state.replacements += 1;
            state.replaced = Some(Instant::now());
            state.failed = state.replaced;
            drop(state);
            tracing::warn!(
                redis = self.config.address(),
                "another Redis process answers: channels begin new epochs, and edges announce again"
            );
        }
    }

    /// Notes that calls work.
    pub(super) fn worked(&self) {
        if self.outage.ends() {
            tracing::info!(redis = self.config.address(), "Redis answers again");
        }
    }

    /// Notes a failure; returns what a caller is told.
    pub(super) fn failed(&self, problem: &str) -> RegistryError {
        self.state.lock().failed = Some(Instant::now());
        let address = self.config.address();
        if self.outage.begins() {
            tracing::warn!(redis = address, problem, "Redis does not answer; nothing works that needs it");
        }
        self.unavailable(problem)
    }

    /// Notes what became of a call through [`Self::policy`]; returns what a caller is told.
    pub(super) fn settled<T>(
        &self,
        operation: &'static str,
        took: Duration,
        result: Result<T, CallError<RedisError>>,
    ) -> Result<T, RegistryError> {
        let made = !matches!(result, Err(CallError::Refused(Refused::Open { .. } | Refused::Full)));
        if made {
            self.metrics.call(operation, result.is_ok(), took);
        }
        match result {
            Ok(answer) => {
                self.worked();
                Ok(answer)
            }
            Err(CallError::Failed(error)) => Err(self.failed(&describe(&error))),
            Err(CallError::Refused(Refused::Late(_))) => Err(self.failed(&describe(&timed_out()))),
            // Who is not asked may have lost what was recorded, like who does not answer.
            Err(CallError::Refused(refused @ Refused::Open { .. })) => Err(self.failed(&refused.to_string())),
            Err(CallError::Refused(Refused::Full)) => Err(self.unavailable("too many calls wait for it")),
        }
    }

    /// Notes that the server carried out a call about a channel.
    pub(super) fn accepted(&self) {
        if self.refusing.ends() {
            tracing::info!(redis = self.config.address(), "Redis takes publications again");
        }
    }

    /// Notes that the server refused one, and therefore works; returns what a caller is told.
    pub(super) fn refused(&self, problem: &str) -> RegistryError {
        if self.refusing.begins() {
            tracing::warn!(redis = self.config.address(), problem, "Redis refuses publications");
        }
        self.unavailable(problem)
    }

    /// What a caller is told when nothing new is known about the server.
    pub(super) fn unavailable(&self, problem: &str) -> RegistryError {
        let address = self.config.address();
        RegistryError::Unavailable(format!("Redis at {address}: {problem}"))
    }

    /// How often another process was found in the server's place: what was recorded when it was less may be lost.
    pub(super) fn replacements(&self) -> u64 {
        self.state.lock().replacements
    }

    /// Whether edges had the time to announce their sessions to this process.
    pub(super) fn is_settled(&self) -> bool {
        self.state.lock().replaced.is_none_or(|at| at.elapsed() >= self.lease)
    }

    /// Whether nothing failed for a lease: before that, an attachment that looks abandoned may only have been
    /// cut off from the server, as this router was.
    pub(super) fn is_quiet(&self) -> bool {
        self.state.lock().failed.is_none_or(|at| at.elapsed() >= self.lease)
    }
}

/// What went wrong and what to check, for a log or a caller. Errors of the server and of sockets name no payload
/// and no secret.
pub(super) fn describe(error: &RedisError) -> String {
    const CHECK: &str = "check that it runs and that router.registry names it";
    match (error.kind(), error.code()) {
        _ if error.is_timeout() => format!("no answer in time; {CHECK}"),
        (ErrorKind::Io, _) => format!("{error}; {CHECK}"),
        (ErrorKind::AuthenticationFailed, _) | (_, Some("WRONGPASS" | "NOAUTH")) => {
            "it refuses the router; check router.redis_username and router.redis_password".to_owned()
        }
        (_, Some("NOPERM")) => {
            format!("{error}; let the router's user run all commands on all keys and channels")
        }
        (_, Some("READONLY")) => {
            "it is a replica, which takes no writes; let router.registry name the primary".to_owned()
        }
        (_, Some("OOM")) => "its memory is full; raise its `maxmemory`".to_owned(),
        _ => error.to_string(),
    }
}

/// Whether an error says that the server is away, or cannot serve; not that it looked at a command and refused it.
pub(super) fn is_outage(error: &RedisError) -> bool {
    use ServerErrorKind::{BusyLoading, ClusterDown, MasterDown, ReadOnly};
    let cannot_serve = [BusyLoading, ClusterDown, MasterDown, ReadOnly].map(ErrorKind::Server);
    error.is_timeout()
        || error.is_io_error()
        || error.is_connection_dropped()
        || error.kind() == ErrorKind::AuthenticationFailed
        || cannot_serve.contains(&error.kind())
}

/// What a call that did not end in time failed of.
pub(super) fn timed_out() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::redis::PubSub;

    #[tokio::test(start_paused = true)]
    async fn another_process_unsettles_for_a_lease() {
        let config = RedisConfig::parse("redis://there").unwrap();
        let keys = config.keys();
        let known = Known::new(config, keys, RedisMetrics::default(), Duration::from_secs(10));
        let server = |run_id: &str| Server { run_id: run_id.into(), pub_sub: PubSub::Sharded };
        known.connected(&server("a"));
        known.connected(&server("a"));
        assert!(known.is_settled() && known.is_quiet(), "the first is no change");
        assert_eq!(known.replacements(), 0);
        known.connected(&server("b"));
        assert_eq!(known.replacements(), 1);
        assert!(!known.is_settled() && !known.is_quiet());
        advance(Duration::from_secs(10)).await;
        assert!(known.is_settled() && known.is_quiet());
        let error = known.failed(&describe(&timed_out())).to_string();
        assert!(error.contains("there:6379") && error.contains("router.registry"), "{error}");
        assert!(known.is_settled() && !known.is_quiet());
    }
}
