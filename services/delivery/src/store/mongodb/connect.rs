//! Opens the database: options of the driver, what the server must be able to do, indexes, and the store's identity.

use std::time::Duration;

use mongodb::{
    Client, Database as MongoDatabase, IndexModel,
    bson::{DateTime, Document, doc},
    error::Result as MongoResult,
    event::{EventHandler, cmap::CmapEvent},
    options::{
        Acknowledgment, ClientOptions, Credential, IndexOptions, ReadConcern, ReadPreference,
        SelectionCriteria, WriteConcern,
    },
};

use super::{Tuning, database::is_duplicate, documents::FORMAT};
use crate::{
    metrics::Metrics,
    store::{Database, StoreOptions},
};

/// First version that has `bulkWrite` on the level of the server, with a result for each write.
const MIN_VERSION: (i64, i64) = (8, 0);

/// Most connections to one server.
pub(super) const MAX_POOL: u32 = 64;

/// How long opening the database may take.
const OPEN: Duration = Duration::from_secs(10);

/// How long a server is looked for that takes writes. Short, because whoever waits is told to come again.
const SELECT: Duration = Duration::from_millis(1_500);

/// How often servers are asked how they are. A server that said it takes no writes is left alone until its next
/// answer, so this bounds how long sends wait after a change that was none.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// How long making a connection may take.
const CONNECT: Duration = Duration::from_millis(1_500);

/// After how long the server gives up waiting for a majority. Below the deadline of a call, so that the answer
/// still arrives.
const MAJORITY: Duration = Duration::from_millis(2_000);

/// How long a node that says nothing stays on the list of those that share the redelivery.
const NODE_EXPIRY: Duration = Duration::from_secs(60);

/// Why the database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No server answered.
    #[error(
        "{uri} does not answer: {error}; check `delivery.store`, that the server runs, and, where it asks for them, \
         `delivery.mongodb_username` and `delivery.mongodb_password`"
    )]
    Unreachable {
        /// As configured; it holds no credentials.
        uri: String,
        /// What the driver said.
        error: String,
    },
    /// The server lacks what sends are grouped with.
    #[error(
        "{uri} runs MongoDB {found}; 8.0 or newer is needed, because only it answers for each write of a group"
    )]
    TooOld {
        /// As configured.
        uri: String,
        /// The server's version.
        found: String,
    },
    /// A server without the log that majority writes and safe retries need.
    #[error(
        "{uri} is a server by itself; start it with --replSet and run rs.initiate() once: one member is enough"
    )]
    Standalone {
        /// As configured.
        uri: String,
    },
    /// The documents are of another build.
    #[error(
        "database {name:?} holds inboxes of format {found}, and this build reads format {FORMAT}; use a build that \
         matches, or another database"
    )]
    Format {
        /// The database.
        name: String,
        /// The format it has.
        found: i64,
    },
    /// Something else the server refused.
    #[error("{uri}: {what} failed: {error}")]
    Refused {
        /// As configured.
        uri: String,
        /// What was tried.
        what: &'static str,
        /// What the server said.
        error: String,
    },
}

/// What opening gives.
pub(super) struct Opened {
    pub(super) client: Client,
    pub(super) database: MongoDatabase,
    /// Random, made with the database.
    pub(super) store_id: u64,
    /// Whether the server looks at its clock in the condition of a write.
    pub(super) tells_now: bool,
}

/// Connects, checks the server, and makes what is missing.
pub(super) async fn open(
    location: &Database,
    options: &StoreOptions,
    tuning: &Tuning,
) -> Result<Opened, OpenError> {
    let uri = location.uri.clone();
    let late = |_| OpenError::Unreachable { uri, error: "no answer in time".to_owned() };
    tokio::time::timeout(OPEN, try_open(location, options, tuning)).await.map_err(late)?
}

async fn try_open(location: &Database, options: &StoreOptions, tuning: &Tuning) -> Result<Opened, OpenError> {
    let unreachable = |error: mongodb::error::Error| match error.to_string() {
        // So old that the driver does not speak with it, and tells no version.
        error if error.contains("reports wire version") && error.contains("requires at least") => {
            OpenError::TooOld { uri: location.uri.clone(), found: "older than 4.4".to_owned() }
        }
        error => OpenError::Unreachable { uri: location.uri.clone(), error },
    };
    let mut parsed = client_options(location, &options.metrics).await.map_err(unreachable)?;
    parsed.command_event_handler.clone_from(&tuning.commands);
    let client = Client::with_options(parsed).map_err(unreachable)?;
    let admin = client.database("admin");
    let hello = admin.run_command(doc! { "hello": 1 }).await.map_err(unreachable)?;
    let info = admin.run_command(doc! { "buildInfo": 1 }).await.map_err(unreachable)?;
    let found = info.get_str("version").unwrap_or("of no known version");
    if !is_new_enough(found) {
        return Err(OpenError::TooOld { uri: location.uri.clone(), found: found.to_owned() });
    }
    if is_standalone(&hello) {
        return Err(OpenError::Standalone { uri: location.uri.clone() });
    }
    let database = client.database(&location.name);
    create_indexes(&database).await.map_err(|error| OpenError::Refused {
        uri: location.uri.clone(),
        what: "making the indexes",
        error: error.to_string(),
    })?;
    let store_id = identity(location, &database, options).await?;
    let tells_now = tells_now(&database).await;
    if !tells_now {
        tracing::warn!(
            "the database does not know its own time in a condition ($$NOW); receipts are read 15 s late, and one of a \
             write that came later than that may be missed"
        );
    }
    Ok(Opened { client, database, store_id, tells_now })
}

/// The driver's options: ours where correctness depends on them, whatever the URI says.
async fn client_options(location: &Database, metrics: &Metrics) -> MongoResult<ClientOptions> {
    let mut options = ClientOptions::parse(&location.uri).await?;
    options.app_name.get_or_insert_with(|| "sanjay-delivery".to_owned());
    options.max_pool_size.get_or_insert(MAX_POOL);
    options.server_selection_timeout.get_or_insert(SELECT);
    options.connect_timeout.get_or_insert(CONNECT);
    options.heartbeat_freq.get_or_insert(HEARTBEAT);
    options.retry_writes = Some(true);
    options.retry_reads = Some(true);
    options.read_concern = Some(ReadConcern::majority());
    options.selection_criteria = Some(SelectionCriteria::ReadPreference(ReadPreference::Primary));
    let durable = WriteConcern::builder().w(Acknowledgment::Majority).journal(true).w_timeout(MAJORITY);
    options.write_concern = Some(durable.build());
    credentials(&mut options, location);
    let metrics = metrics.clone();
    options.cmap_event_handler = Some(EventHandler::callback(move |event| match event {
        CmapEvent::ConnectionCheckedOut(_) => metrics.store_connection(1),
        CmapEvent::ConnectionCheckedIn(_) => metrics.store_connection(-1),
        _ => {}
    }));
    Ok(options)
}

/// Gives the driver the configured credentials.
pub(super) fn credentials(options: &mut ClientOptions, location: &Database) {
    if !location.username.is_empty() {
        // What the URI says about where and how to log in stays.
        let credential = options.credential.get_or_insert_with(Credential::default);
        credential.username = Some(location.username.clone());
        credential.password = Some(location.password.expose().to_owned());
    }
}

/// Whether a server of this version can do what is needed.
fn is_new_enough(version: &str) -> bool {
    let mut numbers = version.split(['.', '-']).map_while(|part| part.parse::<i64>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= MIN_VERSION
}

/// Whether the server is neither a member of a replica set nor a router of a sharded cluster.
fn is_standalone(hello: &Document) -> bool {
    hello.get_str("setName").is_err() && !is_router(hello)
}

/// Whether the server is a router of a sharded cluster.
pub(super) fn is_router(hello: &Document) -> bool {
    hello.get_str("msg").ok() == Some("isdbgrid")
}

async fn create_indexes(database: &MongoDatabase) -> MongoResult<()> {
    let index =
        |keys: Document, options: IndexOptions| IndexModel::builder().keys(keys).options(options).build();
    let expiring =
        |name: &str, after| IndexOptions::builder().name(name.to_owned()).expire_after(Some(after)).build();
    let sparse = |name: &str| IndexOptions::builder().name(name.to_owned()).sparse(true).build();
    let partial = |name: &str| {
        let some = doc! { name: { "$gt": 0_i64 } };
        IndexOptions::builder().name(name.to_owned()).partial_filter_expression(some).build()
    };
    let inbox = [
        // Armed inboxes, the longest due first; a node's share of users is told from the index alone.
        index(doc! { "due": 1, "h": 1 }, partial("due")),
        // Those in which something expires, likewise.
        index(doc! { "expires": 1, "h": 1 }, partial("expires")),
        // Receipts by when their messages were settled; `beside` likewise.
        index(doc! { "log": 1 }, sparse("log")),
        // Those that refer to a shared payload.
        index(doc! { "shared": 1 }, sparse("shared")),
        // Those with devices, the longest unseen first, likewise.
        index(doc! { "seen": 1, "h": 1 }, partial("seen")),
    ];
    database.collection::<Document>("inbox").create_indexes(inbox).await?;
    let beside = [
        // Bodies and receipts by message.
        index(doc! { "ids": 1 }, sparse("by_message")),
        // Receipts and dedupe keys go by themselves.
        index(doc! { "x": 1 }, expiring("expiry", Duration::ZERO)),
        // Bodies that expire.
        index(doc! { "e": 1, "h": 1 }, partial("e")),
        index(doc! { "log": 1 }, sparse("log")),
        // Bodies that refer to a shared payload.
        index(doc! { "s": 1 }, sparse("shared")),
    ];
    database.collection::<Document>("beside").create_indexes(beside).await?;
    let named = |name: &str| IndexOptions::builder().name(name.to_owned()).build();
    let dead = [
        // The newest first, of all and of one user.
        index(doc! { "at": -1 }, named("at")),
        index(doc! { "u": 1, "at": -1 }, named("of")),
    ];
    database.collection::<Document>("dead").create_indexes(dead).await?;
    let scheduled = [
        // The earliest first, and how many a user has.
        index(doc! { "due": 1, "h": 1 }, named("due")),
        index(doc! { "u": 1 }, named("of")),
    ];
    database.collection::<Document>("scheduled").create_indexes(scheduled).await?;
    // Channels with publications that are not finished.
    let channels = [index(doc! { "due": 1, "h": 1 }, partial("due"))];
    database.collection::<Document>("channels").create_indexes(channels).await?;
    let publications = [
        // Payloads that are to be looked at, and dedupe keys, which go by themselves.
        index(doc! { "gc": 1 }, partial("gc")),
        index(doc! { "x": 1 }, expiring("expiry", Duration::ZERO)),
    ];
    database.collection::<Document>("publications").create_indexes(publications).await?;
    let revoked = [
        // What was changed, the earliest first; and what is over goes by itself.
        index(doc! { "changed": 1 }, named("changed")),
        index(doc! { "x": 1 }, expiring("expiry", Duration::ZERO)),
    ];
    database.collection::<Document>("revoked").create_indexes(revoked).await?;
    let nodes = [index(doc! { "seen": 1 }, expiring("expiry", NODE_EXPIRY))];
    database.collection::<Document>("nodes").create_indexes(nodes).await?;
    Ok(())
}

/// Whether the server looks at its clock in a condition. It is asked about the document with the store's identity.
async fn tells_now(database: &MongoDatabase) -> bool {
    let meta = database.collection::<Document>("meta");
    let look = async |time: DateTime| {
        let filter = doc! { "_id": "store", "$and": [{ "$expr": { "$lt": ["$$NOW", time] } }] };
        meta.count_documents(filter).await.ok()
    };
    look(DateTime::MAX).await == Some(1) && look(DateTime::from_millis(0)).await == Some(0)
}

/// Reads the identity of the store, or gives it one.
async fn identity(
    location: &Database,
    database: &MongoDatabase,
    options: &StoreOptions,
) -> Result<u64, OpenError> {
    let refused = |error: String| OpenError::Refused {
        uri: location.uri.clone(),
        what: "reading the store's identity",
        error,
    };
    let meta = database.collection::<Document>("meta");
    let fresh = doc! { "format": FORMAT, "store_id": options.random.next_u64().cast_signed() };
    // Two nodes that start at once may both try to insert; the one that comes late reads.
    let made = meta.update_one(doc! { "_id": "store" }, doc! { "$setOnInsert": fresh }).upsert(true);
    if let Err(error) = made.await
        && !is_duplicate(&error)
    {
        return Err(refused(error.to_string()));
    }
    let found = meta.find_one(doc! { "_id": "store" }).await.map_err(|error| refused(error.to_string()))?;
    let found = found.ok_or_else(|| refused("it is not there".to_owned()))?;
    let format = found.get_i64("format").unwrap_or_default();
    if format != FORMAT {
        return Err(OpenError::Format { name: location.name.clone(), found: format });
    }
    let store_id = found.get_i64("store_id").map_err(|error| refused(error.to_string()))?;
    Ok(store_id.cast_unsigned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        for new in ["8.0.0", "8.0.4-rc0", "8.2.11", "9.0.0", "10.1.0"] {
            assert!(is_new_enough(new), "{new}");
        }
        for old in ["7.0.14", "7.3.2", "6.0", "of no known version", ""] {
            assert!(!is_new_enough(old), "{old}");
        }
    }

    #[test]
    fn replica_sets_and_routers_are_no_standalone_servers() {
        assert!(!is_standalone(&doc! { "setName": "rs0" }));
        assert!(!is_standalone(&doc! { "msg": "isdbgrid" }));
        assert!(is_standalone(&doc! { "isWritablePrimary": true }));
    }
}
