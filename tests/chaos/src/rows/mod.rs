//! The rows: what is broken, and what must be seen of it.

mod clients;
mod delivery;
mod files;
mod parts;
mod stores;
pub(crate) mod torn;

use futures::future::LocalBoxFuture;

use crate::storm::{Context, Outcome, Store};

type Run = fn(Context) -> LocalBoxFuture<'static, anyhow::Result<Outcome>>;

/// A row of the fault matrix.
pub(crate) struct Row {
    pub(crate) name: &'static str,
    pub(crate) store: Store,
    pub(crate) run: Run,
}

/// Builds the table from `name, store, function` of each row.
macro_rules! rows {
    ($($name:literal, $store:ident, $run:path;)*) => {
        vec![$(Row { name: $name, store: Store::$store, run: |context| Box::pin($run(context)) }),*]
    };
}

/// Every row, in the order in which they run.
pub(crate) fn all() -> Vec<Row> {
    rows! {
        "delivery_killed_before_relay-redb", Redb, delivery::killed_before_relay;
        "delivery_killed_before_relay-mongo", Mongo, delivery::killed_before_relay;
        "delivery_killed_before_ack-redb", Redb, delivery::killed_before_ack;
        "delivery_killed_before_ack-mongo", Mongo, delivery::killed_before_ack;
        "mongo_killed", Mongo, stores::mongo_killed;
        "mongo_paused", Mongo, stores::mongo_paused;
        "mongo_failing", Mongo, stores::mongo_failing;
        "mongo_reply_lost", Mongo, stores::mongo_reply_lost;
        "edge_killed-redb", Redb, parts::edge_killed;
        "edge_killed-mongo", Mongo, parts::edge_killed;
        "router_killed", Redb, parts::router_killed;
        "redis_killed_empty", Redb, parts::redis_killed_empty;
        "redis_paused", Redb, parts::redis_paused;
        "two_nodes_one_backlog", Mongo, clients::two_nodes_one_backlog;
        "poison-redb", Redb, clients::poison;
        "poison-mongo", Mongo, clients::poison;
        "half_open-redb", Redb, clients::half_open;
        "half_open-mongo", Mongo, clients::half_open;
        "store_full", Redb, files::store_full;
        "store_limited", Redb, files::store_limited;
        "torn_file", Redb, files::torn_file;
    }
}
