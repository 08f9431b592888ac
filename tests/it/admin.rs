//! `sanjay admin shard`: what it prints, and what it says when something is wrong.

use sanjay_testkit::{Sanjay, free_port, servers::Mongo};

/// Where a configuration may be.
const STORE: &str = "SANJAY_DELIVERY__STORE";

#[tokio::test]
async fn the_commands_are_printed_for_the_configured_database() {
    let flag = Sanjay::new(["admin", "shard", "--store", "mongodb://mongos-0:27017/app"]).run().await;
    let lines = flag.succeeded();
    assert!(lines.starts_with("sh.enableSharding(\"app\")\n"), "{lines}");
    for (collection, key) in [("inbox", "_id"), ("beside", "u"), ("dead", "u"), ("scheduled", "u")] {
        let line = format!("sh.shardCollection(\"app.{collection}\", {{ {key}: \"hashed\" }})\n");
        assert!(lines.contains(&line), "{lines}");
    }
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("sanjay.toml");
    std::fs::write(&file, "[delivery]\nstore = \"mongodb://mongos-0:27017/app\"\n").unwrap();
    let from_file = Sanjay::new(["admin", "shard", "--config", file.to_str().unwrap()]).run().await;
    assert_eq!(from_file.succeeded(), lines);
    let variable = Sanjay::new(["admin", "shard"]).env(STORE, "mongodb://mongos-0:27017/app").run().await;
    assert_eq!(variable.succeeded(), lines);
}

#[tokio::test]
async fn what_has_no_shards_is_told() {
    let nothing = Sanjay::new(["admin", "shard"]).run().await;
    nothing.failed_with(&["--store mongodb://HOST:PORT/DATABASE"]);
    let file = Sanjay::new(["admin", "shard", "--store", "redb:inbox.redb"]).run().await;
    file.failed_with(&["a store in a file has no shards", "--store mongodb://"]);
    let nameless = Sanjay::new(["admin", "shard", "--store", "mongodb://mongos-0:27017"]).run().await;
    nameless.failed_with(&["names no database"]);
    let login = Sanjay::new(["admin", "shard", "--store", "mongodb://bob:hunter2@mongos-0/app"]).run().await;
    login.clone().failed_with(&["delivery.mongodb_password"]);
    assert!(!login.stderr.contains("hunter2"), "{login:?}");
    let run = async |uri: String| Sanjay::new(["admin", "shard", "--run", "--store", &uri]).run().await;
    let mongo = Mongo::shared().await;
    run(mongo.uri("admin_shard")).await.failed_with(&["no router of a sharded cluster", "mongos"]);
    let nobody = format!("mongodb://127.0.0.1:{}/app?serverSelectionTimeoutMS=300", free_port());
    run(nobody).await.failed_with(&["does not answer", "mongos"]);
}
