//! What the registry and the bus in Redis share: where the server is, what it is, and how everything in it is
//! called.

pub mod keys;
pub(crate) mod metrics;

use std::{sync::Arc, time::Duration};

use redis::{
    AsyncConnectionConfig, Client, ConnectionAddr, ConnectionInfo, ErrorKind, IntoConnectionInfo,
    ProtocolVersion, RedisConnectionInfo, RedisError, RedisResult,
    aio::{ConnectionLike, MultiplexedConnection},
};
use sanjay_runtime::{ConfigError, Secret};

use self::keys::Keys;

/// How long a call may take, unless the configuration says otherwise.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);

/// The key of the configuration that errors are about.
const KEY: &str = "router.registry";

/// Where Redis is, and how to speak to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RedisConfig {
    /// Host name or address.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// Number of the database.
    pub db: u32,
    /// User of the server's access control list; empty for the default user.
    pub username: String,
    /// Empty when the server asks for none.
    pub password: Secret,
    /// How long connecting and each call may take.
    pub timeout: Duration,
}

impl RedisConfig {
    /// Reads `redis://HOST[:PORT][/DB]`.
    ///
    /// # Errors
    /// When it is something else; names the key `router.registry`.
    pub fn parse(url: &str) -> Result<Self, ConfigError> {
        const FIX: &str = "write it like `redis://HOST:6379` or `redis://HOST:6379/DB`";
        if url.starts_with("rediss://") || url.starts_with("redis+tls://") {
            let fix = "use redis:// over a private network";
            return Err(ConfigError::new(KEY, "asks for TLS to Redis, which is not supported", fix));
        }
        // What is wrong is never quoted: it may hold a password.
        let wrong = |problem: &str| ConfigError::new(KEY, problem, FIX);
        let parsed = redis::parse_redis_url(url)
            .filter(|parsed| parsed.scheme() == "redis")
            .ok_or_else(|| wrong("is not the URL of a Redis server"))?;
        if !parsed.username().is_empty() || parsed.password().is_some() {
            let fix = "put them into `router.redis_username` and `router.redis_password`";
            return Err(ConfigError::new(KEY, "holds credentials", fix));
        }
        let host = parsed.host_str().filter(|host| !host.is_empty()).ok_or_else(|| wrong("names no host"))?;
        if parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(wrong("has options"));
        }
        let db = match parsed.path().trim_start_matches('/') {
            "" => 0,
            db => db.parse().map_err(|_| wrong("names a database that is no number"))?,
        };
        Ok(Self {
            host: host.trim_matches(['[', ']']).to_owned(),
            port: parsed.port().unwrap_or(6379),
            db,
            username: String::new(),
            password: Secret::default(),
            timeout: DEFAULT_TIMEOUT,
        })
    }

    /// The names of everything in this database.
    #[must_use]
    pub fn keys(&self) -> Keys {
        Keys::new(self.db)
    }

    /// A client that speaks RESP3; it connects only when it is asked to.
    ///
    /// # Errors
    /// Never for a configuration that [`Self::parse`] made.
    pub fn client(&self) -> RedisResult<Client> {
        Client::open(self.connection_info()?)
    }

    /// Bounds connecting and each answer by the time-out.
    #[must_use]
    pub fn connection_config(&self) -> AsyncConnectionConfig {
        AsyncConnectionConfig::new()
            .set_connection_timeout(Some(self.timeout))
            .set_response_timeout(Some(self.timeout))
    }

    /// Where the server is, for logs and errors.
    #[must_use]
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    pub(crate) fn connection_info(&self) -> RedisResult<ConnectionInfo> {
        let mut settings = RedisConnectionInfo::default()
            .set_db(self.db.into())
            .set_protocol(ProtocolVersion::RESP3)
            .set_lib_name("sanjay-router", env!("CARGO_PKG_VERSION"));
        if !self.username.is_empty() {
            settings = settings.set_username(&self.username);
        }
        if !self.password.is_empty() {
            settings = settings.set_password(self.password.expose());
        }
        let info = ConnectionAddr::Tcp(self.host.clone(), self.port).into_connection_info()?;
        Ok(info.set_redis_settings(settings))
    }
}

/// Which commands carry publications. Everybody who is connected to a server uses what that server knows, so
/// routers agree even while servers are upgraded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PubSub {
    /// `SPUBLISH` and `SSUBSCRIBE`: on a cluster, a message stays on the shard of its name.
    Sharded,
    /// `PUBLISH` and `SUBSCRIBE`, before Redis 7.
    Classic,
}

impl PubSub {
    /// The command that publishes.
    #[must_use]
    pub const fn publish(self) -> &'static str {
        match self {
            Self::Sharded => "SPUBLISH",
            Self::Classic => "PUBLISH",
        }
    }

    /// The command that subscribes.
    #[must_use]
    pub const fn subscribe(self) -> &'static str {
        match self {
            Self::Sharded => "SSUBSCRIBE",
            Self::Classic => "SUBSCRIBE",
        }
    }

    /// The command that unsubscribes.
    #[must_use]
    pub const fn unsubscribe(self) -> &'static str {
        match self {
            Self::Sharded => "SUNSUBSCRIBE",
            Self::Classic => "UNSUBSCRIBE",
        }
    }
}

/// The Redis process at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    /// Random for each start of the process.
    pub run_id: Arc<str>,
    /// What it can do.
    pub pub_sub: PubSub,
}

impl Server {
    /// Asks the server. A connection that does not reconnect by itself keeps to one process, so the answer
    /// holds for as long as the connection does.
    ///
    /// # Errors
    /// When it does not answer, or not as Redis does.
    pub async fn read(connection: &mut impl ConnectionLike) -> RedisResult<Self> {
        let info: String = redis::cmd("INFO").arg("server").query_async(connection).await?;
        Self::from_info(&info).ok_or_else(|| {
            RedisError::from((ErrorKind::UnexpectedReturnType, "INFO tells no run_id or redis_version"))
        })
    }

    fn from_info(info: &str) -> Option<Self> {
        let field = |name: &str| {
            let value = |line: &str| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned());
            info.lines().find_map(value).filter(|value| !value.is_empty())
        };
        // It becomes part of a script's text.
        let run_id = field("run_id").filter(|id| id.bytes().all(|byte| byte.is_ascii_alphanumeric()))?;
        let major: u32 = field("redis_version")?.split('.').next()?.parse().ok()?;
        let pub_sub = if major >= 7 { PubSub::Sharded } else { PubSub::Classic };
        Some(Self { run_id: run_id.into(), pub_sub })
    }
}

/// Connects, and asks which process answered. The connection is never made anew behind the caller's back.
///
/// # Errors
/// When the server cannot be reached within the time-out, or is not Redis.
pub(crate) async fn connect(
    client: &Client,
    config: &AsyncConnectionConfig,
) -> RedisResult<(MultiplexedConnection, Server)> {
    let mut connection = client.get_multiplexed_async_connection_with_config(config).await?;
    let server = Server::read(&mut connection).await?;
    Ok((connection, server))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read() {
        let of = |url: &str| RedisConfig::parse(url).map(|config| (config.host, config.port, config.db));
        assert_eq!(of("redis://localhost"), Ok(("localhost".into(), 6379, 0)));
        assert_eq!(of("redis://10.0.0.1:7000/3"), Ok(("10.0.0.1".into(), 7000, 3)));
        assert_eq!(of("redis://[::1]:7000/"), Ok(("::1".into(), 7000, 0)));
        let wrong = [
            ("rediss://there", "TLS"),
            ("redis://me:hunter2@there", "`router.redis_password`"),
            ("redis://me@there", "`router.redis_password`"),
            ("http://there", "redis://HOST:6379"),
            ("redis://", "redis://HOST:6379"),
            ("redis://there/a", "no number"),
            ("redis://there?protocol=resp3", "has options"),
            ("unix:///tmp/redis", "redis://HOST:6379"),
        ];
        for (url, hint) in wrong {
            let error = RedisConfig::parse(url).expect_err(url).to_string();
            assert!(error.contains(hint) && error.contains("router.registry"), "{url}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_server_is_known_by_its_answer() {
        let of = |version: &str| {
            let info = format!("# Server\r\nredis_version:{version}\r\nrun_id:0a1b\r\nother:run_id:x\r\n");
            Server::from_info(&info)
        };
        assert_eq!(of("7.0.15"), Some(Server { run_id: "0a1b".into(), pub_sub: PubSub::Sharded }));
        assert_eq!(of("6.2.14").map(|server| server.pub_sub), Some(PubSub::Classic));
        assert_eq!(of("x"), None);
        assert_eq!(Server::from_info("redis_version:7.0.0\nrun_id:'..evil\n"), None);
    }
}
