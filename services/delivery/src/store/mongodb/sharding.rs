//! Spreads the collections over the shards of a cluster: by what every command of the hot path names, so that one send
//! or one ack has to do with one shard.

use std::time::Duration;

use mongodb::{
    Client, Database as MongoDatabase,
    bson::{Document, doc},
    options::ClientOptions,
};

use super::connect::{credentials, is_router};
use crate::store::Database;

/// How long one command may take: a server makes an index and moves chunks in it.
const COMMAND: Duration = Duration::from_secs(60);

/// Each collection that is spread, with the field whose hash says where a document lies. The others are small, and stay
/// on one shard.
pub(super) const SHARD_KEYS: [(&str, &str); 7] = [
    ("inbox", "_id"),
    ("beside", "u"),
    ("dead", "u"),
    ("scheduled", "u"),
    ("channels", "_id"),
    ("members", "c"),
    ("publications", "_id"),
];

/// Why the collections were not spread.
#[derive(Debug, thiserror::Error)]
pub enum ShardError {
    /// No server answered.
    #[error("{uri} does not answer: {error}; give the address of a router (mongos) of the sharded cluster")]
    Unreachable {
        /// As given; it holds no credentials.
        uri: String,
        /// What the driver said.
        error: String,
    },
    /// The server is no router of a sharded cluster.
    #[error(
        "{uri} is no router of a sharded cluster; give the address of a mongos. A replica set needs no sharding: it \
         holds every inbox as it is"
    )]
    NoRouter {
        /// As given.
        uri: String,
    },
    /// A collection is spread by something else.
    #[error(
        "collection {collection} is sharded by {found} already, and {wanted} is needed; `sh.reshardCollection` changes \
         that"
    )]
    OtherKey {
        /// The collection's name with that of its database.
        collection: String,
        /// The key it has, as JSON.
        found: String,
        /// The key it needs, as JSON.
        wanted: String,
    },
    /// The server refused something.
    #[error(
        "{what} failed: {error}; the user needs the role `clusterManager`, and nothing is undone: run it again"
    )]
    Refused {
        /// What was asked of it.
        what: String,
        /// What it said.
        error: String,
    },
}

/// What to type into `mongosh`, connected to a router of the cluster: a line each.
#[must_use]
pub fn shard_commands(database: &str) -> Vec<String> {
    let shard = |(collection, field)| {
        format!("sh.shardCollection({:?}, {{ {field}: \"hashed\" }})", format!("{database}.{collection}"))
    };
    std::iter::once(format!("sh.enableSharding({database:?})")).chain(SHARD_KEYS.map(shard)).collect()
}

/// Spreads the collections of a database, and calls `told` with each that it has dealt with. What is spread already
/// stays as it is.
///
/// # Errors
/// Says what to do. It may have dealt with some collections by then.
pub async fn shard(location: &Database, mut told: impl FnMut(&str)) -> Result<(), ShardError> {
    let client = connect(location).await?;
    let (admin, database) = (client.database("admin"), client.database(&location.name));
    run(&admin, doc! { "enableSharding": &location.name }, "enableSharding").await?;
    for (collection, field) in SHARD_KEYS {
        let name = format!("{}.{collection}", location.name);
        if is_sharded(&client, &name, field).await? {
            told(&format!("{name} was sharded by the hash of {field}"));
            continue;
        }
        // What is not empty is spread by an index that is there.
        let index = doc! { "key": { field: "hashed" }, "name": format!("{field}_hashed") };
        let create = doc! { "createIndexes": collection, "indexes": [index] };
        run(&database, create, &format!("createIndexes on {name}")).await?;
        let shard = doc! { "shardCollection": &name, "key": { field: "hashed" } };
        run(&admin, shard, &format!("shardCollection {name}")).await?;
        told(&format!("{name} is sharded by the hash of {field}"));
    }
    Ok(())
}

/// Connects to a router.
async fn connect(location: &Database) -> Result<Client, ShardError> {
    let unreachable = |error: String| ShardError::Unreachable { uri: location.uri.clone(), error };
    let mut options =
        ClientOptions::parse(&location.uri).await.map_err(|error| unreachable(error.to_string()))?;
    options.app_name.get_or_insert_with(|| "sanjay-admin".to_owned());
    options.server_selection_timeout.get_or_insert(Duration::from_secs(5));
    credentials(&mut options, location);
    let client = Client::with_options(options).map_err(|error| unreachable(error.to_string()))?;
    let admin = client.database("admin");
    let hello = admin.run_command(doc! { "hello": 1 }).await;
    let hello = hello.map_err(|error| unreachable(error.to_string()))?;
    if !is_router(&hello) {
        return Err(ShardError::NoRouter { uri: location.uri.clone() });
    }
    Ok(client)
}

/// Whether a collection is spread as it should be.
async fn is_sharded(client: &Client, name: &str, field: &str) -> Result<bool, ShardError> {
    let collections = client.database("config").collection::<Document>("collections");
    let found = collections.find_one(doc! { "_id": name }).await;
    let what = || format!("reading how {name} is sharded");
    let found = found.map_err(|error| ShardError::Refused { what: what(), error: error.to_string() })?;
    // A collection on one shard may be listed too.
    let Some(found) = found.filter(|found| !found.get_bool("unsplittable").unwrap_or(false)) else {
        return Ok(false);
    };
    let wanted = doc! { field: "hashed" };
    match found.get_document("key") {
        Ok(key) if *key != wanted => Err(ShardError::OtherKey {
            collection: name.to_owned(),
            found: key.to_string(),
            wanted: wanted.to_string(),
        }),
        Ok(_) => Ok(true),
        Err(_) => Ok(false),
    }
}

async fn run(database: &MongoDatabase, command: Document, what: &str) -> Result<(), ShardError> {
    let refused = |error: String| ShardError::Refused { what: what.to_owned(), error };
    match tokio::time::timeout(COMMAND, database.run_command(command)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(refused(error.to_string())),
        Err(_) => Err(refused(format!("no answer within {} s", COMMAND.as_secs()))),
    }
}
