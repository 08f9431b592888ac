//! One life of the connections to Redis: subscribes to what is wanted, listens for signs of life, and ends when
//! there are none. A new one begins from nothing.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use redis::{
    Cmd, Pipeline, PushInfo, PushKind, RedisError, RedisResult, Value,
    aio::{ConnectionLike as _, MultiplexedConnection},
};
use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval},
};

use super::{
    Shared,
    envelope::encode_probe,
    wanted::{Change, Confirmed},
};
use crate::{
    bus::{Missed, Sink},
    redis::{PubSub, connect},
};

/// Channels of one round trip.
const BATCH: usize = 512;

/// Ticks between looks at what Redis itself says about the subscriptions.
const TICKS_A_LOOK: u64 = 10;

/// Probes that may stay away while nothing else comes, and while other messages come: then the connection works,
/// and may only be behind.
const SILENT_PROBES: u32 = 2;
const BUSY_PROBES: u32 = 10;

/// Probes in a row that somebody else heard too before that is said: a connection of this router that died may take
/// so long until Redis drops it.
const SHARED_PROBES: u32 = 15;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    /// A connection could not be made, or a command failed on it.
    #[error(transparent)]
    Redis(#[from] RedisError),
    /// The two connections reached different processes.
    #[error("two connections reached two Redis processes")]
    TwoServers,
    /// The server or the network ended the connection.
    #[error("the connection was closed")]
    Closed,
    /// Nothing came for too long.
    #[error("nothing came over the connection, not even what this router sent to itself")]
    Silent,
    /// Redis ended the subscription of the router's own name.
    #[error("Redis ended the subscription of this router's own name")]
    Ended,
    /// Redis would not let this router listen.
    #[error("Redis refuses the subscription of this router's own name: {0}")]
    Refused(String),
    /// A reply does not belong to its command.
    #[error("Redis gave a reply out of turn")]
    OutOfTurn,
}

impl SessionError {
    /// Whether somebody waited for Redis in vain.
    pub(super) fn is_silence(&self) -> bool {
        match self {
            Self::Redis(error) => error.is_timeout(),
            other => matches!(other, Self::Silent),
        }
    }
}

/// Signs of life of a session, noted by the connection's reader.
#[derive(Default)]
struct Pulse {
    /// Messages of any name.
    messages: AtomicU64,
    /// Messages of the router's own name.
    own: AtomicU64,
    /// The connection is of no use any more.
    over: Notify,
    ended_own: AtomicU64,
}

/// Connections of one life.
pub(super) struct Session {
    shared: Arc<Shared>,
    subscriber: MultiplexedConnection,
    publisher: MultiplexedConnection,
    pub_sub: PubSub,
    pulse: Arc<Pulse>,
    ticks: u64,
    echo: Echo,
}

/// Whether what this router sends to itself comes back.
#[derive(Debug, Default)]
struct Echo {
    /// What had been heard when the last probe was sent, of the router's own name and of any.
    own: u64,
    messages: u64,
    waiting: bool,
    /// Probes that did not come back, one after another.
    missing: u32,
    /// Probes that others heard too, one after another.
    shared: u32,
}

impl Echo {
    /// Takes what has been heard by now; another probe is sent then. False when too many did not come back.
    fn probe(&mut self, own: u64, messages: u64) -> bool {
        let came = !self.waiting || own > self.own;
        let limit = if messages > self.messages { BUSY_PROBES } else { SILENT_PROBES };
        self.missing = if came { 0 } else { self.missing + 1 };
        (self.own, self.messages, self.waiting) = (own, messages, true);
        self.missing < limit
    }

    /// Takes how many heard a probe. True when others have for long, once.
    fn is_shared(&mut self, receivers: i64) -> bool {
        self.shared = if receivers > 1 { self.shared.saturating_add(1) } else { 0 };
        self.shared == SHARED_PROBES
    }
}

impl Session {
    /// Connects, and subscribes to the router's own name.
    pub(super) async fn open(shared: &Arc<Shared>, sink: &Arc<dyn Sink>) -> Result<Self, SessionError> {
        let config = shared.config.connection_config();
        let pulse = Arc::new(Pulse::default());
        let reader = Reader { shared: Arc::clone(shared), sink: Arc::clone(sink), pulse: Arc::clone(&pulse) };
        let push_config = config.clone().set_push_sender(move |push| reader.take(push));
        let (subscriber, server) = connect(&shared.client, &push_config).await?;
        let (publisher, other) = connect(&shared.client, &config).await?;
        if server != other {
            return Err(SessionError::TwoServers);
        }
        let mut session = Self {
            shared: Arc::clone(shared),
            subscriber,
            publisher,
            pub_sub: server.pub_sub,
            pulse,
            ticks: 0,
            echo: Echo::default(),
        };
        let own = Arc::clone(&shared.own);
        match session.send(&[(own, Change::Subscribe)]).await?.pop() {
            Some((_, why)) => Err(SessionError::Refused(why)),
            None => Ok(session),
        }
    }

    /// Where hints and probes are published.
    pub(super) fn publisher(&self) -> (MultiplexedConnection, PubSub) {
        (self.publisher.clone(), self.pub_sub)
    }

    /// Keeps the subscriptions as wanted until the connection fails.
    pub(super) async fn run(mut self, probe_every: Duration) -> SessionError {
        let shared = Arc::clone(&self.shared);
        let pulse = Arc::clone(&self.pulse);
        let mut ticks = interval(probe_every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let done = tokio::select! {
                biased;
                () = pulse.over.notified() => Err(SessionError::Closed),
                _ = ticks.tick() => self.probe().await,
                () = shared.wanted.work() => self.follow().await,
            };
            if pulse.ended_own.load(Ordering::Relaxed) > 0 {
                return SessionError::Ended;
            }
            if let Err(error) = done {
                return error;
            }
        }
    }

    /// Tells Redis about the next channels that are due.
    async fn follow(&mut self) -> Result<(), SessionError> {
        let due = self.shared.wanted.take_due(BATCH);
        let keys = &self.shared.keys;
        let named: Vec<_> =
            due.iter().map(|(channel, change)| (Arc::from(keys.publications(channel)), *change)).collect();
        let refusals = self.send(&named).await?;
        for (at, why) in refusals {
            if due[at].1 == Change::Subscribe {
                self.shared.wanted.refuse(&due[at].0, &why);
            }
        }
        self.shared.wanted.answered();
        Ok(())
    }

    /// Sends one command for each name in one round trip, and checks that each got its own reply: a cluster may
    /// serve each name from another slot, and an unsolicited message can push replies out of their places. The
    /// confirmations themselves are noted by the reader. Returns what Redis refused, and why.
    async fn send(&mut self, names: &[(Arc<str>, Change)]) -> Result<Vec<(usize, String)>, SessionError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let mut pipeline = Pipeline::with_capacity(names.len());
        for (name, change) in names {
            let command = match change {
                Change::Subscribe => self.pub_sub.subscribe(),
                Change::Unsubscribe => self.pub_sub.unsubscribe(),
            };
            pipeline.cmd(command).arg(&**name);
        }
        let replies = self.subscriber.req_packed_commands(&pipeline, 0, names.len()).await?;
        let mut refusals = Vec::new();
        let mut replies = VecDeque::from(replies);
        for (at, (name, change)) in names.iter().enumerate() {
            match replies.pop_front() {
                Some(Value::ServerError(error)) => {
                    let why = error.details().unwrap_or_else(|| error.code());
                    refusals.push((at, format!("{}: {why}", error.code())));
                }
                Some(Value::Push { kind, data }) if is_reply(&kind, *change, &data, name) => {}
                _ => return Err(SessionError::OutOfTurn),
            }
        }
        Ok(refusals)
    }

    /// Asks the connection, and this router itself through Redis, for signs of life.
    async fn probe(&mut self) -> Result<(), SessionError> {
        let before = self.pulse.messages.load(Ordering::Relaxed);
        if !self.echo.probe(self.pulse.own.load(Ordering::Relaxed), before) {
            return Err(self.silent());
        }
        let mut publish = redis::cmd(self.pub_sub.publish());
        publish.arg(&*self.shared.own).arg(encode_probe());
        let asked = redis::cmd("PING");
        let (pong, receivers) =
            tokio::join!(call(&mut self.subscriber, &asked), call(&mut self.publisher, &publish));
        match pong {
            Ok(Value::SimpleString(pong)) if pong == "PONG" => {}
            Ok(_) => return Err(SessionError::OutOfTurn),
            // Behind with reading is not dead.
            Err(error) if error.is_timeout() && self.pulse.messages.load(Ordering::Relaxed) > before => {}
            Err(error) if error.is_timeout() => return Err(self.silent()),
            Err(error) => return Err(error.into()),
        }
        match receivers {
            Ok(Value::Int(receivers @ 1..)) => {
                if self.echo.is_shared(receivers) {
                    tracing::warn!(
                        name = &*self.shared.own,
                        "another router has this router's name, so each gets hints that are for the other, and inbox \
                         messages come late; give each a `router.node` of its own"
                    );
                }
            }
            Ok(_) => return Err(SessionError::Ended),
            Err(error) if error.is_timeout() => return Err(self.silent()),
            Err(error) => return Err(error.into()),
        }
        self.shared.wanted.retry_refused();
        self.ticks += 1;
        if self.ticks.is_multiple_of(TICKS_A_LOOK) {
            self.look().await?;
        }
        Ok(())
    }

    /// Compares how many subscriptions Redis has for this connection with how many it confirmed.
    async fn look(&mut self) -> Result<(), SessionError> {
        let info = call(&mut self.subscriber, redis::cmd("CLIENT").arg("INFO")).await;
        let text: String = match info {
            Ok(info) => redis::from_redis_value(info).map_err(|_| SessionError::OutOfTurn)?,
            Err(error) => return Err(error.into()),
        };
        let field = match self.pub_sub {
            PubSub::Sharded => "ssub=",
            PubSub::Classic => "sub=",
        };
        // Redis 7.0.0 to 7.0.2 do not tell.
        let Some(count) = text.split_whitespace().find_map(|word| word.strip_prefix(field)) else {
            return Ok(());
        };
        let held = self.shared.wanted.held() + 1;
        if count.parse() != Ok(held) {
            tracing::warn!(count, held, "Redis has other subscriptions than it confirmed; subscribing again");
            self.shared.wanted.resubscribe();
        }
        Ok(())
    }

    fn silent(&self) -> SessionError {
        self.shared.metrics.probe_failures.inc();
        SessionError::Silent
    }
}

/// Takes what Redis pushes, on the connection's own task: it must not wait.
struct Reader {
    shared: Arc<Shared>,
    sink: Arc<dyn Sink>,
    pulse: Arc<Pulse>,
}

impl Reader {
    fn take(&self, PushInfo { kind, data }: PushInfo) -> RedisResult<()> {
        match kind {
            PushKind::SMessage | PushKind::Message => self.message(data),
            PushKind::SSubscribe | PushKind::Subscribe => {
                if let Some(channel) = self.channel(&data)
                    && self.shared.wanted.confirm(channel) == Confirmed::Again
                {
                    self.sink.missed(Missed::Channel(channel));
                }
            }
            PushKind::SUnsubscribe | PushKind::Unsubscribe => match name(&data) {
                Some(own) if own == &*self.shared.own => {
                    self.pulse.ended_own.fetch_add(1, Ordering::Relaxed);
                    self.pulse.over.notify_one();
                }
                _ => {
                    if let Some(channel) = self.channel(&data) {
                        self.shared.wanted.ended(channel);
                    }
                }
            },
            PushKind::Disconnection => self.pulse.over.notify_one(),
            _ => {}
        }
        Ok(())
    }

    fn message(&self, data: Vec<Value>) {
        let mut data = data.into_iter();
        let (Some(Value::BulkString(name)), Some(Value::BulkString(payload))) = (data.next(), data.next())
        else {
            return;
        };
        let Ok(name) = String::from_utf8(name) else { return };
        if *name == *self.shared.own {
            self.pulse.own.fetch_add(1, Ordering::Relaxed);
        }
        self.pulse.messages.fetch_add(1, Ordering::Relaxed);
        if let Some(inlet) = self.shared.inlet.get() {
            inlet.take(name, payload);
        }
    }

    fn channel<'a>(&self, data: &'a [Value]) -> Option<&'a str> {
        self.shared.keys.published_channel(name(data)?)
    }
}

/// The name that a push is about.
fn name(data: &[Value]) -> Option<&str> {
    match data.first()? {
        Value::BulkString(name) => std::str::from_utf8(name).ok(),
        _ => None,
    }
}

fn is_reply(kind: &PushKind, change: Change, data: &[Value], expected: &str) -> bool {
    let of_kind = match change {
        Change::Subscribe => matches!(kind, PushKind::SSubscribe | PushKind::Subscribe),
        Change::Unsubscribe => matches!(kind, PushKind::SUnsubscribe | PushKind::Unsubscribe),
    };
    of_kind && name(data) == Some(expected)
}

/// One command; an error of the server is an error here too.
async fn call(connection: &mut MultiplexedConnection, command: &Cmd) -> RedisResult<Value> {
    connection.req_packed_command(command).await?.extract_error()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_router_that_does_not_hear_itself_gives_up_sooner_when_it_hears_nothing() {
        let probes = |heard: &dyn Fn(u64) -> (u64, u64)| {
            let mut echo = Echo::default();
            (0..100).take_while(|at| echo.probe(heard(*at).0, heard(*at).1)).count()
        };
        assert_eq!(probes(&|at| (at, at)), 100, "all come back");
        assert_eq!(probes(&|_| (0, 0)), 2, "the first was just sent, and two did not come back");
        assert_eq!(probes(&|at| (0, at)), 10, "others' messages come, so it may only be behind");
        assert_eq!(probes(&|at| (at / 2, at / 2)), 100, "one that is late is no two that are missing");
        let mut echo = Echo::default();
        let told = |echo: &mut Echo, receivers| (0..50).filter(|_| echo.is_shared(receivers)).count();
        assert_eq!((told(&mut echo, 2), told(&mut echo, 1), told(&mut echo, 3)), (1, 0, 1));
    }
}
