//! Shared payloads in the file.

use super::*;
use crate::store::{
    DeadReason,
    redb::fanout::PAYLOADS,
    suite::{
        Heard,
        fanout::{apply_all, publication, publish},
    },
};

const MEMBERS: usize = 10_000;

/// How many payloads the file holds that messages share.
fn payloads(redb: &Redb) -> u64 {
    let database = redb::Database::open(redb.path()).unwrap();
    let transaction = redb::ReadableDatabase::begin_read(&database).unwrap();
    redb::ReadableTableMetadata::len(&transaction.open_table(PAYLOADS).unwrap()).unwrap()
}

#[tokio::test]
async fn a_payload_is_stored_once_for_all_members() {
    let redb = Redb::new();
    let store = redb.open().await.unwrap();
    let users: Vec<String> = (0..MEMBERS).map(|n| format!("user-{n}")).collect();
    for users in users.chunks(1_000) {
        store.join("news".to_owned(), users.to_vec(), u64::MAX).await.unwrap();
    }
    let body = "x".repeat(32 * 1024);
    publish(&store, publication(1, &body, "", &redb.clock)).await;
    assert_eq!(apply_all(&store, &redb.clock, 500).await, MEMBERS);
    let size = std::fs::metadata(redb.path()).unwrap().len();
    // Of its own each would have 328 MB together.
    assert!(size < 64 * 1024 * 1024, "{size} bytes");
    let page = read_all(&store, "user-9999").await;
    assert_eq!(page.messages[0].payload, Some((*suite::text(&body)).clone()));
}

#[tokio::test]
async fn a_payload_goes_with_the_last_that_needs_it() {
    let mut redb = Redb::new();
    redb.limits = Limits { max_unsettled: 1, on_commit: Arc::new(Heard::default()), ..Limits::default() };
    let store = redb.open().await.unwrap();
    store.join("news".to_owned(), vec!["bob".to_owned(), "eve".to_owned()], 9).await.unwrap();
    store.append(vec![message("eve", 1, "x", "", &redb.clock)]).await.remove(0).unwrap();
    publish(&store, publication(1, "shared", "", &redb.clock)).await;
    drop(store);
    assert_eq!(payloads(&redb), 1);
    let store = redb.open().await.unwrap();
    apply_all(&store, &redb.clock, 1).await;
    let letter = store.dead_letters(DeadFilter::default(), None, 9).await.unwrap().letters.remove(0);
    assert_eq!((letter.user.as_str(), letter.reason), ("eve", DeadReason::QueueFull));
    let epoch = read_all(&store, "bob").await.epoch;
    drop(store);
    assert_eq!(payloads(&redb), 1, "bob has it still");
    let store = redb.open().await.unwrap();
    store.ack(vec![settle("bob", epoch, &[(1, 1)], 0)]).await.remove(0).unwrap();
    let letter = store.dead_letter(letter.user, letter.message_id).await.unwrap().unwrap();
    assert_eq!(letter.payload, Some(suite::text("shared")), "a letter stands by itself");
    drop(store);
    assert_eq!(payloads(&redb), 0);
}
