//! What a router of a sharded cluster is asked. No such cluster is run: the router is a script that answers as one.

use mongodb::bson::{Document, doc};
use sanjay_testkit::free_port;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
};

use super::*;
use crate::store::mongodb::sharding::{SHARD_KEYS, ShardError, shard, shard_commands};

/// Kinds of messages of the wire protocol.
const OP_REPLY: i32 = 1;
const OP_QUERY: i32 = 2004;
const OP_MSG: i32 = 2013;

/// What the router says of collections, by name, and the commands that it got, `hello` left out.
struct Router {
    uri: String,
    commands: mpsc::UnboundedReceiver<Document>,
}

impl Router {
    async fn start(collections: Vec<Document>, refused: &'static str) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let uri = format!("mongodb://127.0.0.1:{}/inboxes", listener.local_addr().unwrap().port());
        let (told, commands) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(serve(client, collections.clone(), refused, told.clone()));
            }
        });
        Self { uri, commands }
    }

    /// The commands so far that change something, as (name, argument, key).
    fn changes(&mut self) -> Vec<(String, String)> {
        let mut changes = Vec::new();
        while let Ok(command) = self.commands.try_recv() {
            let (name, target) = command.iter().next().unwrap();
            changes.push((name.clone(), target.as_str().unwrap().to_owned()));
        }
        changes.retain(|(name, _)| name != "find");
        changes
    }
}

async fn serve(
    mut client: TcpStream,
    collections: Vec<Document>,
    refused: &'static str,
    told: mpsc::UnboundedSender<Document>,
) {
    // Until the client closes the connection.
    while let Ok(length) = client.read_i32_le().await {
        let mut rest = vec![0; length as usize - 4];
        client.read_exact(&mut rest).await.unwrap();
        let (request, kind) = (&rest[0..4], i32::from_le_bytes(rest[8..12].try_into().unwrap()));
        // A message has flags and a kind before the document; a query flags, a name, and two numbers.
        let at = match kind {
            OP_MSG => 12 + 5,
            OP_QUERY => 12 + 4 + rest[16..].iter().position(|byte| *byte == 0).unwrap() + 1 + 8,
            other => panic!("a message of kind {other}"),
        };
        let command = Document::from_reader(&rest[at..]).unwrap();
        let answer = answer(&command, &collections, refused);
        if !answer.contains_key("msg") {
            told.send(command).unwrap();
        }
        let (kind, head) = match kind {
            OP_QUERY => (OP_REPLY, [vec![0; 16], 1_i32.to_le_bytes().to_vec()].concat()),
            _ => (OP_MSG, vec![0; 5]),
        };
        let document = answer.to_vec().unwrap();
        let length = (16 + head.len() + document.len()) as i32;
        let numbers = [length.to_le_bytes(), 7_i32.to_le_bytes()].concat();
        let reply = [&numbers[..], request, &kind.to_le_bytes(), &head, &document].concat();
        client.write_all(&reply).await.unwrap();
    }
}

fn answer(command: &Document, collections: &[Document], refused: &str) -> Document {
    let (name, _) = command.iter().next().unwrap();
    match name.as_str() {
        "hello" | "isMaster" | "ismaster" => doc! {
            "ok": 1, "msg": "isdbgrid", "isWritablePrimary": true, "helloOk": true, "minWireVersion": 0,
            "maxWireVersion": 25, "maxBsonObjectSize": 16_777_216, "maxMessageSizeBytes": 48_000_000,
            "maxWriteBatchSize": 100_000,
        },
        "find" => {
            let wanted = command.get_document("filter").unwrap().get_str("_id").unwrap();
            let found = collections.iter().filter(|of| of.get_str("_id").unwrap() == wanted);
            let found: Vec<_> = found.cloned().collect();
            doc! { "ok": 1, "cursor": { "id": 0_i64, "ns": "config.collections", "firstBatch": found } }
        }
        name if name == refused => doc! { "ok": 0, "code": 13, "errmsg": "not authorized" },
        _ => doc! { "ok": 1 },
    }
}

fn at(uri: &str) -> store::Database {
    location(uri, None)
}

fn named(names: &[(&str, &str)]) -> Vec<(String, String)> {
    names.iter().map(|(name, of)| ((*name).to_owned(), (*of).to_owned())).collect()
}

#[tokio::test]
async fn every_collection_is_spread_once() {
    let keys = doc! { "_id": "inboxes.beside", "key": { "u": "hashed" } };
    // It lies on one shard.
    let whole = doc! { "_id": "inboxes.dead", "key": { "_id": 1 }, "unsplittable": true };
    let mut router = Router::start(vec![keys, whole], "nothing").await;
    let mut told = Vec::new();
    shard(&at(&router.uri), |line| told.push(line.to_owned())).await.unwrap();
    let mut expected = vec![("enableSharding".to_owned(), "inboxes".to_owned())];
    for (collection, _) in SHARD_KEYS.iter().filter(|(collection, _)| *collection != "beside") {
        expected.push(("createIndexes".to_owned(), (*collection).to_owned()));
        expected.push(("shardCollection".to_owned(), format!("inboxes.{collection}")));
    }
    assert_eq!(router.changes(), expected);
    assert_eq!(told.len(), SHARD_KEYS.len());
    assert_eq!(
        told[..2],
        ["inboxes.inbox is sharded by the hash of _id", "inboxes.beside was sharded by the hash of u"]
    );
}

#[tokio::test]
async fn another_key_and_a_refusal_are_named() {
    let other = doc! { "_id": "inboxes.inbox", "key": { "h": 1 } };
    let mut router = Router::start(vec![other], "nothing").await;
    let error = shard(&at(&router.uri), |_| {}).await.unwrap_err();
    assert!(matches!(error, ShardError::OtherKey { .. }), "{error}");
    assert!(error.to_string().contains("inboxes.inbox") && error.to_string().contains("hashed"), "{error}");
    assert_eq!(router.changes(), named(&[("enableSharding", "inboxes")]));

    let router = Router::start(Vec::new(), "shardCollection").await;
    let error = shard(&at(&router.uri), |_| {}).await.unwrap_err().to_string();
    for part in ["shardCollection inboxes.inbox", "not authorized", "clusterManager"] {
        assert!(error.contains(part), "{error}");
    }
}

#[tokio::test]
async fn what_is_no_router_is_refused() {
    let mongo = Mongo::shared().await;
    let case = Case::on(mongo);
    let error = shard(&case.location, |_| {}).await.unwrap_err();
    assert!(matches!(error, ShardError::NoRouter { .. }), "{error}");
    let nobody = format!("mongodb://127.0.0.1:{}/db?serverSelectionTimeoutMS=300", free_port());
    let error = shard(&at(&nobody), |_| {}).await.unwrap_err();
    assert!(matches!(error, ShardError::Unreachable { .. }), "{error}");
}

#[test]
fn the_commands_name_what_is_spread() {
    let commands = shard_commands("inboxes");
    assert_eq!(commands[0], "sh.enableSharding(\"inboxes\")");
    assert_eq!(commands[1], "sh.shardCollection(\"inboxes.inbox\", { _id: \"hashed\" })");
    assert_eq!(commands.len(), 1 + SHARD_KEYS.len());
    let documented = include_str!("../../../../../../docs/mongodb.md").replace("\"sanjay", "\"inboxes");
    for command in commands {
        assert!(documented.contains(&command), "docs/mongodb.md has not: {command}");
    }
}
