//! Calls about edges and sessions, over a pool of connections: each takes one for itself, so that a slow one holds
//! up nobody else.

use std::{sync::Arc, time::Duration};

use deadpool_redis::{Hook, HookError, Manager, Pool as Connections, PoolError, Runtime, TimeoutType};
use redis::{
    ErrorKind, FromRedisValue, Pipeline, RedisError, RedisResult, ServerErrorKind, ToRedisArgs, Value,
    aio::MultiplexedConnection,
};
use tokio::time::Instant;

use super::server::{Known, is_outage, timed_out};
use crate::{redis::Server, registry::RegistryError};

/// Connections of one router for calls. Calls wait for one when all are taken.
pub(super) const CONNECTIONS: usize = 16;

/// A script with its digest, by which it is called.
pub(super) struct Script {
    /// What metrics call it.
    pub(super) name: &'static str,
    pub(super) text: String,
    pub(super) sha: String,
}

impl Script {
    pub(super) fn new(name: &'static str, text: String) -> Self {
        let sha = redis::Script::new(&text).get_hash().to_owned();
        Self { name, text, sha }
    }

    /// The call of it; arguments are to be added.
    pub(super) fn call(&self, keys: &[impl ToRedisArgs]) -> redis::Cmd {
        let mut call = redis::cmd("EVALSHA");
        call.arg(&self.sha).arg(keys.len());
        for key in keys {
            call.arg(key);
        }
        call
    }

    /// Gives its text to the server.
    pub(super) async fn load(&self, connection: &mut MultiplexedConnection) -> RedisResult<()> {
        redis::cmd("SCRIPT").arg("LOAD").arg(&self.text).exec_async(connection).await
    }
}

pub(super) struct Pool {
    connections: Connections,
    known: Arc<Known>,
    timeout: Duration,
}

impl Pool {
    pub(super) fn new(known: Arc<Known>) -> RedisResult<Self> {
        let config = &known.config;
        let manager = Manager::new_with_config(config.connection_info()?, config.connection_config())?;
        let noting = Arc::clone(&known);
        let connections = Connections::builder(manager)
            .max_size(CONNECTIONS)
            .create_timeout(Some(config.timeout))
            .wait_timeout(Some(config.timeout))
            .recycle_timeout(Some(config.timeout))
            .runtime(Runtime::Tokio1)
            .post_create(Hook::async_fn(move |connection: &mut MultiplexedConnection, _| {
                let noting = Arc::clone(&noting);
                Box::pin(async move {
                    let server = Server::read(connection).await.map_err(HookError::Backend)?;
                    noting.connected(&server);
                    Ok(())
                })
            }))
            .build()
            .map_err(|_| RedisError::from((ErrorKind::InvalidClientConfig, "the pool has no runtime")))?;
        Ok(Self { connections, timeout: config.timeout, known })
    }

    /// Calls a script; loads it where the server does not know it.
    pub(super) async fn eval<T: FromRedisValue>(
        &self,
        script: &Script,
        call: &redis::Cmd,
    ) -> Result<T, RegistryError> {
        let run = async {
            let mut connection = self.connect().await?;
            let mut answer = call.query_async(&mut connection).await;
            if matches!(&answer, Err(error) if is_no_script(error)) {
                script.load(&mut connection).await?;
                answer = call.query_async(&mut connection).await;
            }
            answer
        };
        self.within(script.name, run).await
    }

    /// Calls a script that only the connection which it is made for may load; nothing when the server does not know it.
    pub(super) async fn call<T: FromRedisValue>(
        &self,
        operation: &'static str,
        call: &redis::Cmd,
    ) -> Result<Option<T>, RegistryError> {
        let run = async {
            let mut connection = self.connect().await?;
            match call.query_async(&mut connection).await {
                Err(error) if is_no_script(&error) => Ok(None),
                answer => answer.map(Some),
            }
        };
        self.within(operation, run).await
    }

    /// Sends commands together; an error of one is an error of all.
    pub(super) async fn send(
        &self,
        operation: &'static str,
        pipeline: &Pipeline,
    ) -> Result<Vec<Value>, RegistryError> {
        let run = async {
            let mut connection = self.connect().await?;
            pipeline.query_async(&mut connection).await
        };
        self.within(operation, run).await
    }

    async fn connect(&self) -> RedisResult<deadpool_redis::Connection> {
        self.connections.get().await.map_err(|error| match error {
            PoolError::Backend(error) | PoolError::PostCreateHook(HookError::Backend(error)) => error,
            PoolError::Timeout(TimeoutType::Wait) => {
                RedisError::from((ErrorKind::Client, "every connection is busy"))
            }
            PoolError::Timeout(_) => timed_out(),
            _ => RedisError::from((ErrorKind::Client, "the pool is closed")),
        })
    }

    /// Bounds a call, and notes what became of it.
    async fn within<T>(
        &self,
        operation: &'static str,
        run: impl Future<Output = RedisResult<T>>,
    ) -> Result<T, RegistryError> {
        let began = Instant::now();
        let result = self.known.policy.call(self.timeout, Box::pin(run), is_outage).await;
        self.known.settled(operation, began.elapsed(), result)
    }
}

/// Whether the server does not know the script: then nothing was done.
pub(super) fn is_no_script(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::NoScript)
}
