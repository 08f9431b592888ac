//! How many processes of each role a cluster has, and what they stand on.

use std::{collections::BTreeMap, fmt::Display};

use super::{Cluster, Node};
use crate::{
    collector::Collector,
    servers::{Mongo, MongoOptions, Redis, RedisOptions},
    settings::Settings,
};

/// A cluster in the making: one process of each role on embedded stores, unless it is told otherwise.
#[derive(Debug, Default)]
pub struct ClusterBuilder {
    pub(super) settings: Settings,
    pub(super) more: [usize; 3],
    pub(super) environment: BTreeMap<Node, Vec<(String, String)>>,
    pub(super) launchers: BTreeMap<Node, Vec<String>>,
    registry: Option<Registry>,
    store: Option<Store>,
    login: Option<(String, String)>,
}

#[derive(Debug)]
enum Registry {
    Own(RedisOptions),
    At(String),
}

#[derive(Debug)]
enum Store {
    Shared,
    Own(MongoOptions),
    At(String),
}

impl ClusterBuilder {
    /// So many edges, at least 1.
    #[must_use]
    pub fn edges(mut self, count: usize) -> Self {
        self.more[0] = count.saturating_sub(1);
        self
    }

    /// So many routers, at least 1; several need Redis.
    #[must_use]
    pub fn routers(mut self, count: usize) -> Self {
        self.more[1] = count.saturating_sub(1);
        self
    }

    /// So many delivery nodes, at least 1; several need MongoDB.
    #[must_use]
    pub fn deliveries(mut self, count: usize) -> Self {
        self.more[2] = count.saturating_sub(1);
        self
    }

    /// Routers stand on a Redis server of this cluster.
    #[must_use]
    pub fn redis(self) -> Self {
        self.redis_with(RedisOptions::default())
    }

    /// Likewise, with options.
    #[must_use]
    pub fn redis_with(mut self, options: RedisOptions) -> Self {
        self.registry = Some(Registry::Own(options));
        self
    }

    /// Routers stand on the Redis at this URL, such as one behind a [`Proxy`](crate::proxy::Proxy).
    #[must_use]
    pub fn redis_at(mut self, url: &str) -> Self {
        self.registry = Some(Registry::At(url.to_owned()));
        self
    }

    /// Delivery nodes stand on a database of their own on the [shared](Mongo::shared) server.
    #[must_use]
    pub fn mongo(mut self) -> Self {
        self.store = Some(Store::Shared);
        self
    }

    /// Delivery nodes stand on a server of this cluster.
    #[must_use]
    pub fn mongo_with(mut self, options: MongoOptions) -> Self {
        self.store = Some(Store::Own(options));
        self
    }

    /// Delivery nodes stand on the database at this URI, such as one behind a [`Proxy`](crate::proxy::Proxy).
    #[must_use]
    pub fn mongo_at(mut self, uri: &str) -> Self {
        self.store = Some(Store::At(uri.to_owned()));
        self
    }

    /// Every process exports its traces there.
    #[must_use]
    pub fn traces_to(self, collector: &Collector) -> Self {
        self.set("telemetry.otlp_endpoint", format!("{:?}", collector.endpoint()))
    }

    /// Sets `section.key` to a TOML value, for every process.
    #[must_use]
    pub fn set(mut self, key: &str, value: impl ToString) -> Self {
        self.settings = self.settings.set(key, value);
        self
    }

    /// Begins with these settings instead of the usual ones. Call it before [`set`](Self::set).
    #[must_use]
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Gives one process an environment variable. It has it whenever it is started, until
    /// [`Cluster::forget_environment`].
    #[must_use]
    pub fn env(mut self, node: impl Into<Node>, name: &str, value: impl Display) -> Self {
        self.environment.entry(node.into()).or_default().push((name.to_owned(), value.to_string()));
        self
    }

    /// Has one process started by another program, such as a shell that sets limits and then runs `exec "$0" "$@"`: the
    /// binary and its arguments are added to this command line. It is used until [`Cluster::forget_environment`].
    #[must_use]
    pub fn launcher(mut self, node: impl Into<Node>, command: &[&str]) -> Self {
        let command = command.iter().map(|&part| part.to_owned()).collect();
        self.launchers.insert(node.into(), command);
        self
    }

    /// Starts everything and waits until it is ready.
    ///
    /// # Panics
    /// When something does not become ready, or several routers or delivery nodes have nothing to share.
    pub async fn start(mut self) -> Cluster {
        let [_, routers, deliveries] = self.more;
        assert!(routers == 0 || self.registry.is_some(), "several routers need Redis");
        assert!(deliveries == 0 || self.store.is_some(), "several delivery nodes need MongoDB");
        let redis = self.start_redis().await;
        let mongo = self.start_mongo().await;
        Cluster::launch(self, redis, mongo).await
    }

    async fn start_redis(&mut self) -> Option<Redis> {
        let (url, redis) = match self.registry.take()? {
            Registry::At(url) => (url, None),
            Registry::Own(options) => {
                let redis = Redis::start_with(options).await;
                self.login = redis.login().map(|(name, password)| (name.to_owned(), password.to_owned()));
                (redis.url(), Some(redis))
            }
        };
        self.set_place("router.registry", &url, "router.redis");
        redis
    }

    async fn start_mongo(&mut self) -> Option<Mongo> {
        let (uri, mongo) = match self.store.take()? {
            Store::At(uri) => (uri, None),
            Store::Shared => {
                let mongo = Mongo::shared().await;
                self.login = mongo.login().map(|(name, password)| (name.to_owned(), password.to_owned()));
                (mongo.uri(&mongo.database()), None)
            }
            Store::Own(options) => {
                let mongo = Mongo::start_with(options).await;
                (mongo.uri(&mongo.database()), Some(mongo))
            }
        };
        self.set_place("delivery.store", &uri, "delivery.mongodb");
        mongo
    }

    /// Sets where something is, and whom to log in as there.
    fn set_place(&mut self, key: &str, place: &str, login: &str) {
        let mut settings = std::mem::take(&mut self.settings).set(key, format!("{place:?}"));
        if let Some((name, password)) = self.login.take() {
            settings = settings
                .set(&format!("{login}_username"), format!("{name:?}"))
                .set(&format!("{login}_password"), format!("{password:?}"));
        }
        self.settings = settings;
    }
}
