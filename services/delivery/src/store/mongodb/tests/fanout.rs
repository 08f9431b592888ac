//! Durable publications on several nodes: one payload for all, lost answers, and claims.

use std::time::Duration;

use mongodb::bson::{Document, doc};
use parking_lot::Mutex;
use sanjay_testkit::servers::MongoOptions;

use super::{
    faults::{fail, stop_failing},
    shapes::{look, parts},
    *,
};
use crate::{
    message::State,
    store::{
        Applied, DEDUPE_WINDOW, DeadReason, Turn, member_message_id,
        suite::{
            audit::audit_all,
            fanout::{apply_all, claim, join, publication, publish},
            read_all, settle,
        },
    },
};

const HOLD_US: u64 = 30_000_000;

async fn has(store: &MongoStore, user: &str) -> Vec<u64> {
    read_all(store, user).await.messages.iter().map(|message| message.seq).collect()
}

fn user(n: usize) -> String {
    format!("user-{n:05}")
}

async fn join_many(store: &MongoStore, count: usize) {
    let users: Vec<String> = (0..count).map(user).collect();
    for users in users.chunks(1_000) {
        store.join("news".to_owned(), users.to_vec(), u64::MAX).await.unwrap();
    }
}

#[tokio::test]
async fn a_payload_is_stored_once_for_all_members() {
    const MEMBERS: usize = 1_000;
    let case = Case::on(Mongo::shared().await).roomy();
    let store = case.open().await;
    join_many(&store, MEMBERS).await;
    let body = "x".repeat(32 * 1024);
    publish(&store, publication(1, &body, "", &case.clock)).await;
    assert_eq!(apply_all(&store, &case.clock, 500).await, MEMBERS);
    let (inbox, publications) = (look(&case, "inbox").await, look(&case, "publications").await);
    for n in [0, 500, MEMBERS - 1] {
        let document = inbox.find_one(doc! { "_id": user(n) }).await.unwrap().unwrap();
        let size = document.to_vec().unwrap().len();
        assert!(size < 2_048, "{size} bytes");
        let page = read_all(&store, &user(n)).await;
        assert_eq!(page.messages[0].payload, Some((*suite::text(&body)).clone()));
    }
    assert_eq!(publications.count_documents(doc! {}).await.unwrap(), 1);
    // Another node has it from the database.
    let other = case.open().await;
    assert_eq!(read_all(&other, &user(7)).await.messages[0].payload, Some((*suite::text(&body)).clone()));
}

/// A count that a call left wrong when it was cut off is right again with the next publication.
#[tokio::test]
async fn members_are_counted_anew_with_a_publication() {
    let case = Case::on(Mongo::shared().await).roomy();
    let store = case.open().await;
    join_many(&store, 3).await;
    let channels = look(&case, "channels").await;
    for wrong in [2_i64, -5] {
        let update = doc! { "$inc": { "members": wrong } };
        channels.update_one(doc! { "_id": "news" }, update).await.unwrap();
        let id = wrong.unsigned_abs().into();
        let numbered = store.publish_durable(publication(id, "body", "", &case.clock)).await.unwrap();
        assert_eq!(numbered.members, 3);
        let channel = channels.find_one(doc! { "_id": "news" }).await.unwrap().unwrap();
        assert_eq!(channel.get_i64("members").unwrap(), 3);
    }
}

/// A payload goes some time after the last message that refers to it, wherever that lies.
#[tokio::test]
async fn a_payload_goes_when_nothing_refers_to_it() {
    for mut case in [Case::on(Mongo::shared().await), Case::on(Mongo::shared().await).small()] {
        case.max_unsettled = 9;
        let store = case.open().await;
        join(&store, &["bob", "eve"]).await;
        let publications = look(&case, "publications").await;
        let count = async || publications.count_documents(doc! { "gc": { "$gt": 0_i64 } }).await.unwrap();
        let sweep = async || {
            case.clock.advance(Duration::from_secs(4_000));
            store.sweep(case.clock.now_us(), 100).await.unwrap();
        };
        for id in 1..=8 {
            publish(&store, publication(id, &format!("body-{id}"), "", &case.clock)).await;
        }
        sweep().await;
        assert_eq!(count().await, 8, "they are not in inboxes yet");
        apply_all(&store, &case.clock, 10).await;
        store.append(case.messages("bob", [100])).await.remove(0).unwrap();
        sweep().await;
        assert_eq!(count().await, 8);
        let epoch = read_all(&store, "bob").await.epoch;
        store.ack(vec![settle("bob", epoch, &[(1, 9)], 0)]).await.remove(0).unwrap();
        sweep().await;
        assert_eq!(count().await, 8, "the other has them");
        assert_eq!(has(&store, "eve").await, (1..=8).collect::<Vec<u64>>());
        let epoch = read_all(&store, "eve").await.epoch;
        store.ack(vec![settle("eve", epoch, &[(3, 8)], 0)]).await.remove(0).unwrap();
        store.ack(vec![settle("eve", epoch, &[(1, 1)], 0)]).await.remove(0).unwrap();
        sweep().await;
        assert_eq!(has(&store, "eve").await, [2]);
        assert!(read_all(&store, "eve").await.messages[0].payload.is_some());
        store.ack(vec![settle("eve", epoch, &[(2, 2)], 0)]).await.remove(0).unwrap();
        // What lies beside an inbox is removed a moment later.
        sanjay_testkit::eventually("all payloads are gone", Duration::from_secs(20), async || {
            sweep().await;
            (count().await == 0).then_some(())
        })
        .await;
    }
}

/// A number and its publication are there together, and once, whatever becomes of the answer.
#[tokio::test]
async fn what_became_of_a_publication_is_looked_up() {
    let mongo = Mongo::start_with(MongoOptions::default().test_commands()).await;
    let concern = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    let cases = [
        ("closed", 3, doc! { "closeConnection": true }),
        ("shutting down", 3, doc! { "errorCode": 91 }),
        ("without a majority", 2, doc! { "writeConcernError": concern }),
    ];
    for (name, times, how) in cases {
        for key in ["", "key"] {
            let case = Case::on(&mongo).roomy();
            let store = case.open().await;
            join(&store, &["bob"]).await;
            fail(&mongo, doc! { "times": times }, &["bulkWrite"], how.clone()).await;
            let number = store.publish_durable(publication(1, "x", key, &case.clock)).await;
            stop_failing(&mongo).await;
            assert_eq!(number.map(|numbered| numbered.number), Ok(1), "{name} {key}");
            if !key.is_empty() {
                let again = store.publish_durable(publication(2, "x", key, &case.clock)).await.unwrap();
                assert_eq!((again.number, again.duplicate), (1, true), "{name}");
                assert_eq!(again.message_id, publication(1, "", "", &case.clock).message_id);
            }
            assert_eq!(publish(&store, publication(3, "y", "", &case.clock)).await, 2, "{name} {key}");
            apply_all(&store, &case.clock, 10).await;
            assert_eq!(has(&store, "bob").await, [1, 2], "{name} {key}");
        }
    }
}

/// A step that failed anywhere is done by whoever comes next, once for each member.
#[tokio::test]
async fn steps_that_fail_are_repeated_and_double_nothing() {
    let mongo = Mongo::start_with(MongoOptions::default().test_commands()).await;
    let concern = doc! { "code": 64, "errmsg": "waiting for replication timed out" };
    for how in [doc! { "closeConnection": true }, doc! { "writeConcernError": concern }] {
        for skip in 0..6 {
            let case = Case::on(&mongo).roomy();
            let store = case.open().await;
            join_many(&store, 40).await;
            publish(&store, publication(1, "x", "", &case.clock)).await;
            let turn = claim(&store, &case.clock).await.remove(0);
            fail(&mongo, doc! { "skip": skip, "times": 2 }, &["bulkWrite"], how.clone()).await;
            let _perhaps = store.apply(turn, case.clock.now_us() + HOLD_US, 20).await;
            stop_failing(&mongo).await;
            case.clock.advance(Duration::from_micros(HOLD_US));
            apply_all(&store, &case.clock, 15).await;
            for n in 0..40 {
                assert_eq!(has(&store, &user(n)).await, [1], "{n} with {how} after {skip}");
            }
            assert_eq!(audit_all(&store).await, (40, vec![]));
        }
    }
}

/// A turn whose node was cut off between the inboxes and its note.
async fn cut_off(case: &Case, store: &MongoStore) -> Turn {
    let turn = claim(store, &case.clock).await.remove(0);
    let channels = look(case, "channels").await;
    let before = channels.find_one(doc! { "_id": "news" }).await.unwrap().unwrap();
    let applied = store.apply(turn.clone(), case.clock.now_us() + HOLD_US, 5).await.unwrap();
    assert!(matches!(applied, Applied::More(_, 5)), "{applied:?}");
    channels.replace_one(doc! { "_id": "news" }, before).await.unwrap();
    turn
}

#[tokio::test]
async fn a_page_that_was_not_noted_is_known_by_its_keys_and_later_by_its_messages() {
    for days in [0, 1, 5] {
        let case = Case::on(Mongo::shared().await).roomy();
        let (one, two) = (case.open().await, case.open().await);
        join_many(&one, 12).await;
        publish(&one, publication(1, "x", "", &case.clock)).await;
        cut_off(&case, &one).await;
        let epoch = read_all(&one, &user(2)).await.epoch;
        one.ack(vec![settle(&user(2), epoch, &[(1, 1)], 0)]).await.remove(0).unwrap();
        case.clock.advance(DEDUPE_WINDOW * days + Duration::from_micros(HOLD_US));
        if days > 0 {
            // The database forgets keys by itself.
            let forget = doc! { "$set": { "keys": [] } };
            look(&case, "inbox").await.update_many(doc! {}, forget).await.unwrap();
        }
        let turn = claim(&two, &case.clock).await.remove(0);
        assert!(turn.unsure && turn.after.is_empty(), "{turn:?}");
        let mut next = turn;
        while let Applied::More(after, _) = two.apply(next, case.clock.now_us() + HOLD_US, 5).await.unwrap() {
            assert!(!after.unsure);
            next = after;
        }
        let third = case.open().await;
        for n in 0..12 {
            assert_eq!(read_all(&third, &user(n)).await.head, 1, "{n} after {days} days");
        }
    }
}

/// Two nodes at one backlog: every member gets every publication once, in their order.
#[tokio::test]
async fn two_nodes_apply_one_backlog() {
    let mut case = Case::on(Mongo::shared().await).roomy();
    case.tuning.sharing = true;
    let (one, two) = (case.open().await, case.open().await);
    join_many(&one, 30).await;
    let (first, second) = tokio::join!(
        async {
            for id in 1..=10 {
                publish(&one, publication(id, &format!("one-{id}"), "", &case.clock)).await;
            }
        },
        async {
            for id in 11..=20 {
                publish(&two, publication(id, &format!("two-{id}"), "", &case.clock)).await;
            }
        }
    );
    let ((), ()) = (first, second);
    let run = async |store: &MongoStore| {
        let mut finished = 0;
        while store.backlog().await.unwrap().unfinished > 0 {
            for mut turn in claim(store, &case.clock).await {
                loop {
                    match store.apply(turn, case.clock.now_us() + HOLD_US, 7).await.unwrap() {
                        Applied::More(next, _) => turn = next,
                        Applied::Finished(_) => break finished += 1,
                        Applied::Lost => break,
                    }
                }
            }
            // What is another's part is anybody's after a while.
            case.clock.advance(Duration::from_secs(6));
        }
        finished
    };
    let (first, second) = tokio::join!(run(&one), run(&two));
    assert_eq!(first + second, 20);
    let mut orders = Vec::new();
    for n in 0..30 {
        let page = read_all(&one, &user(n)).await;
        assert_eq!(page.head, 20);
        orders.push(page.messages.into_iter().map(|message| message.payload).collect::<Vec<_>>());
    }
    assert!(orders.iter().all(|order| *order == orders[0]), "the same for all");
}

/// Members with the same room as others' messages: the refused die in the write that brings them.
#[tokio::test]
async fn who_has_no_inbox_yet_and_no_room_gets_a_letter() {
    let mut case = Case::on(Mongo::shared().await);
    case.max_unsettled_bytes = 100;
    let store = case.open().await;
    join(&store, &["bob"]).await;
    let large = publication(1, &"x".repeat(200), "", &case.clock);
    publish(&store, large.clone()).await;
    apply_all(&store, &case.clock, 10).await;
    let page = read_all(&store, "bob").await;
    store.ack(vec![settle("bob", page.epoch, &[], 0)]).await.remove(0).unwrap();
    let id = member_message_id(large.message_id, "bob");
    let letter = store.dead_letter("bob".to_owned(), id).await.unwrap().unwrap();
    assert_eq!((letter.seq, letter.reason, letter.payload), (1, DeadReason::QueueFull, Some(large.payload)));
    let receipt = store.lookup("bob".to_owned(), id).await.unwrap().unwrap();
    assert_eq!((receipt.seq, receipt.state), (1, State::Dead));
    assert_eq!(store.append(case.messages("bob", [2])).await.remove(0).unwrap().seq, 2);
    assert_eq!(audit_all(&store).await, (1, vec![]));
}

/// Each command that is made for a publication or a member says which channel, publication or user it is about.
#[tokio::test]
async fn hot_commands_name_the_channel() {
    let strays = Arc::new(Mutex::new(Vec::new()));
    let mut case = Case::on(Mongo::shared().await).roomy();
    let to_strays = strays.clone();
    case.tuning.commands = Some(EventHandler::callback(move |event| {
        let CommandEvent::Started(started) = event else { return };
        let command = &started.command;
        if started.command_name == "findAndModify" {
            let query = command.get_document("query").unwrap();
            if query.get_str("_id").is_err() {
                to_strays.lock().push(("findAndModify".to_owned(), query.clone()));
            }
            return;
        }
        for (collection, filter) in parts(&started.command_name, command) {
            let key = match collection.as_str() {
                "channels" | "publications" => "_id",
                "members" => "c",
                _ => continue,
            };
            let fixed = match filter.get(key) {
                Some(mongodb::bson::Bson::String(_)) => true,
                Some(mongodb::bson::Bson::Document(condition)) => condition.keys().eq(["$in"]),
                _ => false,
            };
            // The scans for what waits ask every shard.
            if !fixed && !filter.contains_key("due") {
                to_strays.lock().push((collection, filter));
            }
        }
    }));
    let store = case.open().await;
    join_many(&store, 12).await;
    publish(&store, publication(1, "x", "key", &case.clock)).await;
    publish(&store, publication(2, "y", "", &case.clock)).await;
    store.leave("news".to_owned(), vec![user(3)]).await.unwrap();
    store.members("news".to_owned(), String::new(), 5).await.unwrap();
    apply_all(&store, &case.clock, 5).await;
    has(&case.open().await, &user(1)).await;
    store.backlog().await.unwrap();
    assert_eq!(*strays.lock(), Vec::<(String, Document)>::new());
}
