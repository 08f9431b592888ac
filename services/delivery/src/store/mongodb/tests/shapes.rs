//! What lies in the database, how it is found, and which databases are refused.

use std::{collections::BTreeSet, time::Duration};

use mongodb::{
    Client,
    bson::{Bson, Document, doc},
};
use parking_lot::Mutex;
use sanjay_testkit::{eventually, free_port};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

use super::*;
use crate::store::{
    DeadReason, DeliveriesQuery, FIRST_DUE, FailureKind, LogStart, Next,
    suite::{
        failing::{NAK, failure},
        query, read_all, read_log, settle,
    },
};

/// A collection, seen from outside.
pub(super) async fn look(case: &Case, collection: &str) -> mongodb::Collection<Document> {
    let mut options = mongodb::options::ClientOptions::parse(&case.location.uri).await.unwrap();
    if !case.location.username.is_empty() {
        let credential = options.credential.get_or_insert_default();
        credential.username = Some(case.location.username.clone());
        credential.password = Some(case.location.password.expose().to_owned());
    }
    Client::with_options(options).unwrap().database(&case.location.name).collection(collection)
}

pub(super) async fn inbox_of(collection: &mongodb::Collection<Document>, user: &str) -> Document {
    collection.find_one(doc! { "_id": user }).await.unwrap().unwrap()
}

fn count(inbox: &Document, array: &str) -> usize {
    inbox.get_array(array).map_or(0, Vec::len)
}

/// Documents of a kind.
async fn kinds(collection: &mongodb::Collection<Document>, kind: &str) -> u64 {
    collection.count_documents(doc! { "_id": { "$regex": format!("^{kind}/") } }).await.unwrap()
}

#[tokio::test]
async fn a_long_inbox_moves_beside_its_document_and_is_cleared() {
    let case = Case::on(Mongo::shared().await).roomy();
    let (store, collection) = (case.open().await, look(&case, "inbox").await);
    let beside = look(&case, "beside").await;
    let bounds = Bounds::default();
    // One more than fits moves all but the newest.
    let fits = bounds.messages as u128;
    let epoch = store.append(case.messages("bob", 1..=fits)).await.remove(0).unwrap().epoch;
    assert_eq!(count(&inbox_of(&collection, "bob").await, "messages"), bounds.messages);
    assert_eq!(kinds(&beside, "b").await, 0);
    store.append(case.messages("bob", [fits + 1])).await.remove(0).unwrap();
    let wait = Duration::from_secs(20);
    eventually("bodies are beside the inbox", wait, async || {
        (count(&inbox_of(&collection, "bob").await, "messages") == bounds.keep).then_some(())
    })
    .await;
    assert_eq!(kinds(&beside, "b").await, 1);
    for first in (fits + 2..400).step_by(40) {
        store.append(case.messages("bob", first..first + 40)).await.remove(0).unwrap();
    }
    let head = read_all(&store, "bob").await.head;
    let mut seqs = Vec::new();
    while let page = {
        let after = Some(seqs.last().copied().unwrap_or(0));
        store.read(vec![query("bob", after, 50)]).await.remove(0).unwrap()
    } && !page.messages.is_empty()
    {
        seqs.extend(page.messages.iter().map(|message| message.seq));
    }
    assert_eq!(seqs, (1..=head).collect::<Vec<u64>>());
    // A receipt is found wherever its message lies, and what is settled goes away.
    let lookup = async |id: u128| store.lookup("bob".into(), Uuid::from_u128(id)).await.unwrap().unwrap();
    assert!(!lookup(1).await.state.is_terminal());
    store.ack(vec![settle("bob", epoch, &[(2, head - 1)], 0)]).await.remove(0).unwrap();
    assert!(!lookup(1).await.state.is_terminal() && lookup(2).await.state.is_terminal());
    assert_eq!(read_all(&store, "bob").await.messages.iter().map(|m| m.seq).collect::<Vec<_>>(), [1, head]);
    store.ack(vec![settle("bob", epoch, &[(1, head)], 0)]).await.remove(0).unwrap();
    eventually("nothing lies beside the inbox", wait, async || {
        (kinds(&beside, "b").await == 0).then_some(())
    })
    .await;
    assert!(lookup(1).await.state.is_terminal());
}

#[tokio::test]
async fn large_messages_do_not_gather_in_the_document() {
    let case = Case::on(Mongo::shared().await).roomy();
    let (store, collection) = (case.open().await, look(&case, "inbox").await);
    let large = "x".repeat(60_000);
    for id in 1..=12 {
        let sent = message("bob", id, &large, "", &case.clock);
        assert_eq!(store.append(vec![sent]).await.remove(0).unwrap().seq, id as u64);
    }
    eventually("the document is small", Duration::from_secs(20), async || {
        let inbox = inbox_of(&collection, "bob").await;
        (inbox.to_vec().unwrap().len() < 2 * Bounds::default().bytes).then_some(())
    })
    .await;
    let page = read_all(&store, "bob").await;
    assert_eq!(page.messages.len(), 12);
    assert!(page.messages.iter().all(|message| message.payload == Some((*suite::text(&large)).clone())));
}

#[tokio::test]
async fn keys_and_receipts_leave_the_document_with_an_expiry() {
    let case = Case::on(Mongo::shared().await).roomy().small();
    let store = case.open().await;
    let beside = look(&case, "beside").await;
    for id in 1..=9 {
        let sent = message("bob", id, "x", &format!("key-{id}"), &case.clock);
        let epoch = store.append(vec![sent]).await.remove(0).unwrap().epoch;
        store.ack(vec![settle("bob", epoch, &[(id as u64, id as u64)], 0)]).await.remove(0).unwrap();
    }
    eventually("they are beside the inbox", Duration::from_secs(20), async || {
        (kinds(&beside, "d").await > 4 && kinds(&beside, "r").await > 1).then_some(())
    })
    .await;
    let until = |kind: &str| beside.find_one(doc! { "_id": { "$regex": format!("^{kind}/") } });
    let day = mongodb::bson::DateTime::from_millis((BEGIN_US / 1_000) as i64 + 24 * 3_600_000);
    assert_eq!(until("d").await.unwrap().unwrap().get_datetime("x").unwrap(), &day);
    let week = mongodb::bson::DateTime::from_millis((BEGIN_US / 1_000) as i64 + 7 * 24 * 3_600_000);
    assert_eq!(until("r").await.unwrap().unwrap().get_datetime("x").unwrap(), &week);
    let again = message("bob", 99, "x", "key-1", &case.clock);
    let again = store.append(vec![again]).await.remove(0).unwrap();
    assert_eq!((again.seq, again.duplicate), (1, true));
}

#[tokio::test]
async fn writers_that_are_gone_are_forgotten() {
    let case = Case::on(Mongo::shared().await).roomy();
    for id in 1..=14 {
        let store = case.open().await;
        store.append(case.messages("bob", [id])).await.remove(0).unwrap();
        case.clock.advance(Duration::from_secs(4_000));
    }
    let inbox = inbox_of(&look(&case, "inbox").await, "bob").await;
    let writers = inbox.get_document("writers").unwrap().len();
    assert!((2..=9).contains(&writers), "{writers}");
}

/// Whether a filter, or a document that is inserted, fixes the shard key: the user, or some users.
fn names_users(collection: &str, filter: &Document) -> bool {
    let key = if collection == "inbox" { "_id" } else { "u" };
    match filter.get(key) {
        Some(Bson::String(_)) => true,
        Some(Bson::Document(condition)) => condition.keys().eq(["$in"]),
        _ => false,
    }
}

/// The collection and the filter of each read and write in a command.
pub(super) fn parts(name: &str, command: &Document) -> Vec<(String, Document)> {
    let target = command.get_str(name).unwrap_or_default().to_owned();
    match name {
        "find" => vec![(target, command.get_document("filter").unwrap().clone())],
        "bulkWrite" => {
            let namespaces = command.get_array("nsInfo").unwrap();
            let part = |op: &Bson| {
                let op = op.as_document().unwrap();
                let index = op.values().next().unwrap();
                let index =
                    index.as_i32().map_or_else(|| index.as_i64().unwrap() as usize, |index| index as usize);
                let namespace = namespaces[index].as_document().unwrap().get_str("ns").unwrap();
                let filter = op.get_document("filter").or_else(|_| op.get_document("document")).unwrap();
                (namespace.rsplit('.').next().unwrap().to_owned(), filter.clone())
            };
            command.get_array("ops").unwrap().iter().map(part).collect()
        }
        "update" | "insert" => {
            let (parts, filter) = if name == "update" { ("updates", Some("q")) } else { ("documents", None) };
            let part = |part: &Bson| {
                let part = part.as_document().unwrap();
                filter.map_or(part, |filter| part.get_document(filter).unwrap()).clone()
            };
            command.get_array(parts).unwrap().iter().map(|each| (target.clone(), part(each))).collect()
        }
        "aggregate" => {
            let pipeline = command.get_array("pipeline").unwrap();
            let first = pipeline[0].as_document().unwrap().get_document("$match").unwrap();
            vec![(target, first.clone())]
        }
        // Nothing is written by these, so that one of them would be found out.
        "delete" | "findAndModify" => vec![(target, Document::new())],
        _ => Vec::new(),
    }
}

/// Each command on the hot path says whose inbox it is about, so that a sharded cluster asks one shard.
#[tokio::test]
async fn hot_commands_name_the_user() {
    let heard = Arc::new(Mutex::new(BTreeSet::new()));
    let strays = Arc::new(Mutex::new(Vec::new()));
    let mut case = Case::on(Mongo::shared().await).roomy().small();
    let (to_heard, to_strays) = (heard.clone(), strays.clone());
    case.tuning.commands = Some(EventHandler::callback(move |event| {
        let CommandEvent::Started(started) = event else { return };
        for (collection, filter) in parts(&started.command_name, &started.command) {
            if !["inbox", "beside", "dead", "scheduled"].contains(&collection.as_str()) {
                continue;
            }
            to_heard.lock().insert(format!("{} {collection}", started.command_name));
            // The scans for what is due ask every shard.
            let scans = ["due", "expires", "e", "log"].iter().any(|field| filter.contains_key(field));
            if !names_users(&collection, &filter) && !scans {
                to_strays.lock().push((collection, filter));
            }
        }
    }));
    let store = case.open().await;
    let epoch = read_all(&store, "bob").await.epoch;
    for id in 1..=12 {
        let sent = message("bob", id, "x", &format!("key-{id}"), &case.clock);
        store.append(vec![sent]).await.remove(0).unwrap();
    }
    read_all(&store, "bob").await;
    store.arm(vec!["bob".to_owned()]);
    store.ack(vec![settle("bob", epoch, &[(1, 5), (8, 9)], 10)]).await.remove(0).unwrap();
    store.lookup("bob".to_owned(), Uuid::from_u128(1)).await.unwrap().unwrap();
    case.clock.advance(FIRST_DUE);
    let now_us = case.clock.now_us();
    let claimed = store.claim_due(now_us, now_us + 1_000, 10).await.unwrap().remove(0);
    store.rearm(vec![Rearm { user: claimed.user, armed: claimed.armed, next: Next::Parked }]).await.unwrap();
    fail_and_look(&case, &store, epoch).await;
    schedule_and_expire(&case, &store).await;
    case.clock.advance(Duration::from_micros(1));
    assert_eq!(read_log(&store, LogStart::Oldest, 100).await.0.len(), 10);
    let listed = DeliveriesQuery { user: "bob".into(), limit: 100, ..DeliveriesQuery::default() };
    assert_eq!(store.deliveries(listed).await.unwrap().deliveries.len(), 14);
    assert_eq!(*strays.lock(), []);
    let names = ["beside", "dead", "inbox", "scheduled"];
    let both = names.map(|name| [format!("bulkWrite {name}"), format!("find {name}")]);
    let mut expected: BTreeSet<String> = both.into_iter().flatten().collect();
    expected.extend(["aggregate scheduled", "insert scheduled", "update inbox"].map(str::to_owned));
    assert_eq!(*heard.lock(), expected);
}

/// All that is done with what waits for its time, is replaced or expires.
async fn schedule_and_expire(case: &Case, store: &MongoStore) {
    let deliver_us = case.clock.now_us();
    let later = |id: u128, key: &str| {
        let message = message("bob", id, "x", key, &case.clock);
        Scheduled { message, deliver_us }
    };
    let batch = vec![later(101, "later"), later(102, ""), later(103, "later")];
    let answers = store.schedule(batch).await.into_iter().map(|answer| answer.unwrap().duplicate);
    assert!(answers.eq([false, false, true]));
    store.lookup("bob".to_owned(), Uuid::from_u128(101)).await.unwrap().unwrap();
    let claimed = store.claim_scheduled(deliver_us, deliver_us + 1, 10).await.unwrap();
    assert_eq!(claimed.len(), 2);
    for claimed in claimed {
        let message = NewMessage {
            expires_us: case.clock.now_us() + 1,
            collapse_key: "k".to_owned(),
            ..claimed.message
        };
        let (user, id) = (message.user.clone(), message.message_id);
        store.append(vec![message]).await.remove(0).unwrap();
        assert_eq!(store.unschedule(vec![(user, id)]).await, Ok(1));
    }
    case.clock.advance(Duration::from_micros(1));
    assert_eq!(store.expire(case.clock.now_us(), 10).await.unwrap().settled, 1);
}

/// What the update of a message asks and changes that does nothing but come: no more than before messages could end by
/// themselves, but for a count of bytes.
#[tokio::test]
async fn a_plain_message_asks_for_its_seq_alone() {
    let writes = Arc::new(Mutex::new(Vec::new()));
    let mut case = Case::on(Mongo::shared().await).roomy();
    let (to_writes, finds) = (writes.clone(), Arc::new(Mutex::new(0)));
    let to_finds = finds.clone();
    case.tuning.commands = Some(EventHandler::callback(move |event| {
        let CommandEvent::Started(started) = event else { return };
        if started.command_name == "bulkWrite" {
            let ops = started.command.get_array("ops").unwrap();
            to_writes.lock().extend(ops.iter().map(|op| op.as_document().unwrap().clone()));
        } else if started.command_name == "find" {
            *to_finds.lock() += 1;
        }
    }));
    let store = case.open().await;
    for id in 1..=3 {
        store.append(case.messages("bob", [id])).await.remove(0).unwrap();
    }
    store.append(vec![message("bob", 4, "x", "key", &case.clock)]).await.remove(0).unwrap();
    // One to know the inbox, one for the dedupe key.
    let read = *finds.lock();
    let fields = |document: &Document| document.keys().cloned().collect::<Vec<_>>();
    let writes = writes.lock();
    let last = &writes[writes.len() - 2];
    assert_eq!(fields(last.get_document("filter").unwrap()), ["_id", "seq"]);
    let update = last.get_document("updateMods").unwrap();
    let writer = fields(update.get_document("$set").unwrap()).remove(2);
    assert!(writer.starts_with("writers."), "{writer}");
    let expected = [
        ("$set", vec!["seq", "attempt", &*writer]),
        ("$inc", vec!["armed", "bytes"]),
        ("$min", vec!["due"]),
        ("$push", vec!["messages"]),
    ];
    assert_eq!(fields(update), expected.clone().map(|(operator, _)| operator));
    for (operator, names) in expected {
        assert_eq!(fields(update.get_document(operator).unwrap()), names, "{operator}");
    }
    let keyed = writes[writes.len() - 1].get_document("filter").unwrap();
    assert_eq!(fields(keyed), ["_id", "seq", "plans"]);
    assert!(read <= 3, "{read} reads");
}

/// All that is done with a message that fails, and with its dead letter.
async fn fail_and_look(case: &Case, store: &MongoStore, epoch: u64) {
    let failed = [(6, NAK), (7, FailureKind::Term)].map(|(seq, kind)| failure(seq, 1, kind, &case.clock));
    let report = Settle { failed: failed.to_vec(), ..settle("bob", epoch, &[], 0) };
    assert_eq!(store.ack(vec![report]).await.remove(0).unwrap().failed.len(), 2);
    case.clock.advance(Duration::from_secs(1));
    let now_us = case.clock.now_us();
    let claimed = store.claim_due(now_us, now_us + 1_000, 10).await.unwrap().remove(0);
    assert_eq!(claimed.retries, [(6, 2)]);
    store.read(vec![InboxQuery { only: vec![6], ..query("bob", None, 0) }]).await.remove(0).unwrap();
    let next = Next::At { due_us: now_us + 1, attempt: 1 };
    store.rearm(vec![Rearm { user: claimed.user, armed: claimed.armed, next }]).await.unwrap();
    let of_bob = DeadFilter { user: Some("bob".to_owned()), ..DeadFilter::default() };
    let letter = store.dead_letters(of_bob, None, 10).await.unwrap().letters.remove(0);
    store.dead_letter(letter.user.clone(), letter.message_id).await.unwrap().unwrap();
    assert!(store.redriven(letter.user.clone(), letter.message_id, Uuid::nil()).await.unwrap());
    assert_eq!(store.purge(vec![(letter.user, letter.message_id)]).await, Ok(1));
}

fn stages(plan: &Document, into: &mut Vec<String>) {
    into.extend(plan.get_str("stage").map(str::to_owned));
    for (_, value) in plan {
        match value {
            Bson::Document(inner) => stages(inner, into),
            Bson::Array(many) => {
                many.iter().filter_map(Bson::as_document).for_each(|inner| stages(inner, into))
            }
            _ => {}
        }
    }
}

/// No hot query reads the whole collection or sorts in memory.
#[tokio::test]
async fn hot_queries_use_an_index() {
    let mongo = Mongo::shared().await;
    let case = Case::on(mongo).roomy().small();
    let (store, collection) = (case.open().await, look(&case, "inbox").await);
    for user in 0..30_u128 {
        let name = format!("user-{user}");
        let sent = store.append(case.messages(&name, user * 100..user * 100 + 8)).await.remove(0).unwrap();
        let failed = vec![failure(3, 1, FailureKind::Term, &case.clock)];
        store.ack(vec![Settle { failed, ..settle(&name, sent.epoch, &[], 0) }]).await.remove(0).unwrap();
    }
    let users = ["user-1", "user-2"];
    let (user, position) = (users[0].to_owned(), DeadPosition { died_us: 9, message_id: Uuid::nil() });
    let of_user = DeadFilter { user: Some(user), ..DeadFilter::default() };
    let window = DeadFilter {
        reason: Some(DeadReason::Terminated),
        from_us: Some(1),
        to_us: Some(u64::MAX / 4),
        redriven: true,
        ..DeadFilter::default()
    };
    let newest = doc! { "at": -1 };
    let queries = [
        ("dead", dead::selection(&DeadFilter::default(), None), newest.clone()),
        ("dead", dead::selection(&DeadFilter::default(), Some(position)), newest.clone()),
        ("dead", dead::selection(&window, None), newest.clone()),
        ("dead", dead::selection(&of_user, None), newest.clone()),
        ("dead", dead::selection(&of_user, Some(position)), newest.clone()),
        ("dead", dead::one(users[0], Uuid::nil()), doc! {}),
        ("inbox", doc! { "_id": { "$in": users.to_vec() } }, doc! {}),
        ("inbox", doc! { "_id": users[0], "seq": 8_i64 }, doc! {}),
        ("beside", documents::bodies_between(users[0], 1, 6), doc! { "_id": 1 }),
        ("beside", doc! { "ids": documents::id(Uuid::from_u128(100)), "u": users[0] }, doc! {}),
        ("inbox", due::due_filter("due", u64::MAX / 4, 0, 1 << 31), doc! { "due": 1 }),
        ("inbox", due::due_filter("expires", u64::MAX / 4, 0, 1 << 31), doc! { "expires": 1 }),
        ("beside", due::due_filter("e", u64::MAX / 4, 0, 1 << 31), doc! { "e": 1 }),
        ("scheduled", due::due_filter("due", u64::MAX / 4, 0, 1 << 31), doc! { "due": 1 }),
        ("scheduled", super::super::scheduled::one(users[0], Uuid::nil()), doc! {}),
        ("scheduled", doc! { "u": { "$in": users.to_vec() } }, doc! {}),
        ("scheduled", doc! { "u": users[0] }, doc! {}),
        ("inbox", super::super::receipts::between((0, Uuid::nil()), (u64::MAX, Uuid::max())), doc! {}),
        ("beside", super::super::receipts::between((0, Uuid::nil()), (u64::MAX, Uuid::max())), doc! {}),
        ("beside", deliveries::of("b", users[0]), doc! { "_id": 1 }),
        ("beside", deliveries::of("r", users[0]), doc! { "_id": 1 }),
        ("inbox", due::due_filter("due", u64::MAX / 4, 1 << 29, 1 << 30), doc! { "due": 1 }),
    ];
    let database = collection.client().database(&case.location.name);
    for (name, filter, sort) in queries {
        let find = doc! { "find": name, "filter": &filter, "sort": sort, "limit": 10 };
        let explained =
            database.run_command(doc! { "explain": find, "verbosity": "executionStats" }).await.unwrap();
        let planner = explained.get_document("queryPlanner").unwrap();
        let mut used = Vec::new();
        stages(planner.get_document("winningPlan").unwrap(), &mut used);
        assert!(!used.is_empty(), "{name}: {explained}");
        // SecantusDB's Python server says COLLSCAN and SORT of what it looks up by key.
        if !mongo.describe().contains("secantusd-py") {
            assert!(!used.iter().any(|stage| stage == "COLLSCAN" || stage == "SORT"), "{filter}: {used:?}");
        }
    }
}

/// Nodes claim different inboxes, and what belongs to a node that is gone is not left lying.
#[tokio::test]
async fn nodes_share_the_redelivery() {
    let mut case = Case::on(Mongo::shared().await).roomy();
    case.tuning.sharing = true;
    let (one, two) = (case.open().await, case.open().await);
    let batch = (0..60_u128).flat_map(|user| case.messages(&format!("user-{user}"), [user]));
    one.append(batch.collect()).await.into_iter().for_each(|result| assert!(result.is_ok()));
    case.clock.advance(FIRST_DUE);
    let hold = Duration::from_secs(30).as_micros() as u64;
    let claim = |store: &MongoStore| {
        let now_us = case.clock.now_us();
        store.claim_due(now_us, now_us + hold, 100)
    };
    // The first that asks does not know of the second yet.
    let nobody = one.claim_due(0, 1, 100).await.unwrap();
    assert_eq!(nobody, []);
    assert_eq!(two.claim_due(0, 1, 100).await.unwrap(), []);
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    let (first, second) = tokio::join!(claim(&one), claim(&two));
    let users = |claimed: &[DueInbox]| claimed.iter().map(|due| due.user.clone()).collect::<BTreeSet<_>>();
    let (first, second) = (users(&first.unwrap()), users(&second.unwrap()));
    assert!(first.is_disjoint(&second) && first.len() + second.len() == 60);
    assert!(first.len() > 15 && second.len() > 15, "{} and {}", first.len(), second.len());
    // What the other does not claim in time is claimed by whoever is there.
    case.clock.advance(Duration::from_secs(36));
    assert_eq!(users(&claim(&one).await.unwrap()).len(), 60);
}

#[tokio::test]
async fn another_format_and_a_missing_server_are_named() {
    let mongo = Mongo::shared().await;
    let case = Case::on(mongo);
    drop(case.open().await);
    let database = look(&case, "inbox").await.client().database(&case.location.name);
    let meta = database.collection::<Document>("meta");
    meta.update_one(doc! { "_id": "store" }, doc! { "$set": { "format": 2_i64 } }).await.unwrap();
    let open = async |location: &store::Database| {
        let opened = MongoStore::open_with(location, case.options(), case.tuning.clone()).await;
        opened.map(|_| ()).unwrap_err()
    };
    let error = open(&case.location).await;
    assert!(matches!(error, OpenError::Format { found: 2, .. }), "{error}");
    let nobody = format!("mongodb://127.0.0.1:{}/db", free_port());
    let error = open(&location(&nobody, None)).await;
    assert!(matches!(error, OpenError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains("check `delivery.store`"), "{error}");
}

/// Passes everything on, and makes the server say that it is a 7.
async fn aged(port: u16) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let own = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let ((mut from_client, mut to_client), (mut from_server, mut to_server)) =
                (client.into_split(), server.into_split());
            tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
            tokio::spawn(async move {
                let mut buffer = vec![0; 64 * 1024];
                while let Ok(read @ 1..) = from_server.read(&mut buffer).await {
                    let bytes = &mut buffer[..read];
                    // The field, the length of the text in four bytes, the text.
                    if let Some(at) = bytes.windows(8).position(|window| window == b"version\0") {
                        bytes[at + 12] = b'7';
                    }
                    to_client.write_all(bytes).await.unwrap();
                }
            });
        }
    });
    own
}

#[tokio::test]
async fn an_old_server_is_refused() {
    let mongo = Mongo::start().await;
    let uri = format!("mongodb://127.0.0.1:{}/db?directConnection=true", aged(mongo.port()).await);
    let case = Case::at(location(&uri, None));
    let opened = MongoStore::open_with(&case.location, case.options(), case.tuning.clone()).await;
    let error = opened.map(|_| ()).unwrap_err();
    assert!(matches!(error, OpenError::TooOld { .. }), "{error}");
    assert!(
        error.to_string().contains("runs MongoDB 7.") && error.to_string().contains("8.0 or newer"),
        "{error}"
    );
}

#[tokio::test]
async fn time_is_the_servers() {
    let mut case = Case::on(Mongo::shared().await);
    case.tuning.clock = None;
    let store = case.open().await;
    // This machine's clock, which is in the year 2100 here, does not count.
    let now_us = InboxStore::clock(&store).now_us();
    assert!((1_700_000_000_000_000..BEGIN_US).contains(&now_us), "{now_us}");
}
