//! What every adapter must do with members and durable publications: fixed cases.

use super::*;
use crate::store::{
    Applied, Backlog, JoinError, MAX_UNFINISHED, Membership, Numbered, Publication, PublicationError, Turn,
    member_message_id,
};

mod random;

pub(crate) use random::{agrees_with_the_model, operations};

const HOLD_US: u64 = 30_000_000;

fn names(users: &[&str]) -> Vec<String> {
    users.iter().map(|&user| user.to_owned()).collect()
}

/// A publication to channel `news`.
pub(crate) fn publication(id: u128, body: &str, key: &str, clock: &ManualClock) -> Publication {
    Publication {
        channel: "news".to_owned(),
        message_id: Uuid::from_u128(id << 64),
        caller: "shop".to_owned(),
        payload: text(body),
        dedupe_key: key.to_owned(),
        time_us: clock.now_us(),
        trace: "00-trace".to_owned(),
        ..Publication::default()
    }
}

pub(crate) async fn join(store: &dyn InboxStore, users: &[&str]) -> Membership {
    store.join("news".to_owned(), names(users), 1_000).await.unwrap()
}

async fn leave(store: &dyn InboxStore, users: &[&str]) -> Membership {
    store.leave("news".to_owned(), names(users)).await.unwrap()
}

async fn members(store: &dyn InboxStore) -> Vec<String> {
    store.members("news".to_owned(), String::new(), 1_000).await.unwrap()
}

pub(crate) async fn publish(store: &dyn InboxStore, publication: Publication) -> u64 {
    store.publish_durable(publication).await.unwrap().number
}

pub(crate) async fn claim(store: &dyn InboxStore, clock: &ManualClock) -> Vec<Turn> {
    store.claim_publications(clock.now_us(), clock.now_us() + HOLD_US, 10).await.unwrap()
}

/// Applies all that may be claimed, so many members at a time; returns how many members that were.
pub(crate) async fn apply_all(store: &dyn InboxStore, clock: &ManualClock, limit: usize) -> usize {
    let mut applied = 0;
    loop {
        let turns = claim(store, clock).await;
        if turns.is_empty() {
            return applied;
        }
        for mut turn in turns {
            loop {
                match store.apply(turn, clock.now_us() + HOLD_US, limit).await.unwrap() {
                    Applied::More(next, count) => {
                        assert!(count <= limit);
                        (turn, applied) = (next, applied + count);
                    }
                    Applied::Finished(count) => {
                        applied += count;
                        break;
                    }
                    Applied::Lost => panic!("nobody else is there"),
                }
            }
        }
    }
}

/// The texts in an inbox, in their order.
async fn bodies(store: &dyn InboxStore, user: &str) -> Vec<String> {
    let page = read_all(store, user).await;
    let text = |message: &InboxMessage| match &message.payload {
        Some(Payload { kind: Some(Kind::Text(text)) }) => text.clone(),
        other => panic!("{other:?}"),
    };
    page.messages.iter().map(text).collect()
}

async fn backlog(store: &dyn InboxStore) -> (u64, Option<u64>) {
    let Backlog { unfinished, oldest_us } = store.backlog().await.unwrap();
    (unfinished, oldest_us)
}

/// Runs every case, each on a store of its own.
pub(super) async fn fixed_cases<H: Harness>(make: impl Fn() -> H) {
    users_join_and_leave(make()).await;
    members_are_those_at_the_time(make()).await;
    publications_are_numbered_and_deduplicated(make()).await;
    one_has_a_turn_at_a_time(make()).await;
    a_step_is_applied_once(make()).await;
    who_has_no_room_gets_a_dead_letter(make()).await;
    members_messages_end_like_others(make()).await;
    shared_payloads_count_for_pages(make()).await;
    so_many_publications_wait_at_most(make()).await;
}

async fn users_join_and_leave<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    assert_eq!(members(&*store).await, [""; 0]);
    assert_eq!(join(&*store, &["eve", "bob", "böb"]).await, Membership { changed: 3, members: 3 });
    assert_eq!(join(&*store, &["bob", "bo"]).await, Membership { changed: 1, members: 4 });
    assert_eq!(members(&*store).await, ["bo", "bob", "böb", "eve"]);
    let page = |after: &str| store.members("news".to_owned(), after.to_owned(), 2);
    assert_eq!(page("").await.unwrap(), ["bo", "bob"]);
    assert_eq!(page("bob").await.unwrap(), ["böb", "eve"]);
    assert_eq!(page("bobby").await.unwrap(), ["böb", "eve"]);
    assert_eq!(page("eve").await.unwrap(), [""; 0]);
    // A channel whose name begins like it is another one.
    let other = |channel: &str| store.members(channel.to_owned(), String::new(), 10);
    store.join("news/sports".to_owned(), names(&["zoe"]), 10).await.unwrap();
    store.join("new".to_owned(), names(&["zoe"]), 10).await.unwrap();
    assert_eq!(other("news/sports").await.unwrap(), ["zoe"]);
    assert_eq!(members(&*store).await.len(), 4);
    let full = store.join("news".to_owned(), names(&["x", "bob", "y"]), 5).await;
    assert_eq!(full, Err(JoinError::Full { members: 4, most: 5 }));
    assert_eq!(leave(&*store, &["bob", "nobody"]).await, Membership { changed: 1, members: 3 });
    assert_eq!(leave(&*store, &["bob"]).await, Membership { changed: 0, members: 3 });
    drop(store);
    let store = harness.reopen().await;
    assert_eq!(members(&*store).await, ["bo", "böb", "eve"]);
    assert_eq!(store.join("news".to_owned(), names(&["x", "y"]), 5).await.unwrap().members, 5);
    assert_eq!(join(&*store, &["bob"]).await, Membership { changed: 1, members: 6 });
}

async fn members_are_those_at_the_time<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    join(&*store, &["early", "leaves", "returns"]).await;
    let first = publication(1, "first", "", &clock);
    assert_eq!(publish(&*store, first.clone()).await, 1);
    leave(&*store, &["leaves", "returns"]).await;
    join(&*store, &["late"]).await;
    assert_eq!(publish(&*store, publication(2, "second", "", &clock)).await, 2);
    join(&*store, &["returns"]).await;
    assert_eq!(publish(&*store, publication(3, "third", "", &clock)).await, 3);
    assert_eq!(members(&*store).await, ["early", "late", "returns"]);
    // One user at a time, so that some come between two steps.
    assert_eq!(apply_all(&*store, &clock, 1).await, 3 + 2 + 3);
    for (user, expected) in [
        ("early", &["first", "second", "third"][..]),
        ("leaves", &["first"]),
        ("returns", &["first", "third"]),
        ("late", &["second", "third"]),
        ("nobody", &[]),
    ] {
        assert_eq!(bodies(&*store, user).await, expected, "{user}");
    }
    let found = store.lookup("late".to_owned(), member_message_id(first.message_id, "late")).await;
    assert_eq!(found, Ok(None));
    let found = store.lookup("leaves".to_owned(), member_message_id(first.message_id, "leaves")).await;
    let accepted = Receipt { seq: 1, state: State::Accepted, accepted_us: first.time_us, settled_us: 0 };
    assert_eq!(found, Ok(Some(accepted)));
    let message = read_all(&*store, "late").await.messages.remove(0);
    assert_eq!((message.time_us, message.trace.as_str()), (clock.now_us(), "00-trace"));
    // Nothing is left of those that ended.
    leave(&*store, &["early"]).await;
    join(&*store, &["early"]).await;
    publish(&*store, publication(4, "fourth", "", &clock)).await;
    assert_eq!(apply_all(&*store, &clock, 10).await, 3);
    assert_eq!(bodies(&*store, "early").await.len(), 4);
    assert_eq!(audit::audit_all(&*store).await.1, []);
}

async fn publications_are_numbered_and_deduplicated<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    join(&*store, &["bob"]).await;
    // Submitted in order, awaited in the opposite one.
    let send = |id: u128| store.publish_durable(publication(id, &format!("body-{id}"), "", &clock));
    let pending: Vec<_> = (1..=5).map(send).collect();
    for (index, pending) in pending.into_iter().enumerate().rev() {
        assert_eq!(pending.await.unwrap().number, index as u64 + 1);
    }
    let keyed = publication(10, "keyed", "key", &clock);
    let id = keyed.message_id;
    let first = Numbered { number: 6, message_id: id, duplicate: false, members: 1 };
    assert_eq!(store.publish_durable(keyed.clone()).await, Ok(first.clone()));
    apply_all(&*store, &clock, 10).await;
    drop(store);
    let store = harness.reopen().await;
    clock.advance(Duration::from_secs(60));
    let again = Publication { message_id: Uuid::from_u128(11), time_us: clock.now_us(), ..keyed.clone() };
    let duplicate = Ok(Numbered { duplicate: true, ..first });
    assert_eq!(store.publish_durable(again.clone()).await, duplicate);
    let other = Publication { payload: text("other"), ..again.clone() };
    let refused = Err(PublicationError::AlreadyExists { key: "key".to_owned() });
    assert_eq!(store.publish_durable(other).await, refused);
    let mail = Publication { caller: "mail".to_owned(), message_id: Uuid::from_u128(12), ..again.clone() };
    assert_eq!(publish(&*store, mail).await, 7);
    let sports =
        Publication { channel: "sports".to_owned(), message_id: Uuid::from_u128(13), ..again.clone() };
    let numbered = store.publish_durable(sports).await.unwrap();
    assert_eq!((numbered.number, numbered.duplicate, numbered.members), (1, false, 0));
    clock.advance(DEDUPE_WINDOW);
    let late = Publication { time_us: clock.now_us(), message_id: Uuid::from_u128(14), ..again };
    assert_eq!(publish(&*store, late).await, 8);
    apply_all(&*store, &clock, 10).await;
    let expected = ["body-1", "body-2", "body-3", "body-4", "body-5", "keyed", "keyed", "keyed"];
    assert_eq!(bodies(&*store, "bob").await, expected);
}

async fn one_has_a_turn_at_a_time<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    join(&*store, &["bob", "eve"]).await;
    let began_us = clock.now_us();
    publish(&*store, publication(1, "first", "", &clock)).await;
    clock.advance(Duration::from_secs(1));
    publish(&*store, publication(2, "second", "", &clock)).await;
    assert_eq!(backlog(&*store).await, (2, Some(began_us)));
    let turn = claim(&*store, &clock).await.remove(0);
    assert_eq!((turn.number, turn.time_us, turn.after.as_str()), (1, began_us, ""));
    assert_eq!(claim(&*store, &clock).await, []);
    let until_us = clock.now_us() + HOLD_US;
    let Applied::More(next, 1) = store.apply(turn.clone(), until_us, 1).await.unwrap() else { panic!() };
    assert_eq!(next.after, "bob");
    // Who has it goes on, and nobody else.
    assert_eq!(claim(&*store, &clock).await, []);
    assert_eq!(bodies(&*store, "eve").await, [""; 0]);
    drop(store);
    let store = harness.reopen().await;
    // Who alone can have it does not wait for who had it before.
    if H::SWEPT_BY_DATABASE {
        assert_eq!(claim(&*store, &clock).await, []);
        clock.advance(Duration::from_micros(HOLD_US));
    }
    let other = claim(&*store, &clock).await.remove(0);
    assert_eq!((other.number, other.after.as_str()), (1, "bob"));
    assert_eq!(store.apply(next, until_us, 1).await, Ok(Applied::Lost));
    // A turn can be given up.
    let until_us = clock.now_us();
    assert!(matches!(store.apply(other, until_us, 1).await, Ok(Applied::More(..) | Applied::Finished(1))));
    apply_all(&*store, &clock, 10).await;
    assert_eq!(backlog(&*store).await, (0, None));
    for user in ["bob", "eve"] {
        assert_eq!(bodies(&*store, user).await, ["first", "second"]);
    }
    assert_eq!(claim(&*store, &clock).await, []);
}

async fn a_step_is_applied_once<H: Harness>(mut harness: H) {
    let heard = Arc::new(Heard::default());
    harness.set(Limits { on_commit: heard.clone(), ..Limits::default() });
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let users: Vec<String> = (0..20).map(|n| format!("user-{n:02}")).collect();
    store.join("news".to_owned(), users.clone(), 100).await.unwrap();
    publish(&*store, publication(1, "once", "", &clock)).await;
    let first = claim(&*store, &clock).await.remove(0);
    let until_us = clock.now_us() + HOLD_US;
    // The answer is lost, and it is asked again.
    store.apply(first.clone(), until_us, 8).await.unwrap();
    assert_eq!(store.apply(first.clone(), until_us, 8).await, Ok(Applied::Lost));
    clock.advance(Duration::from_micros(HOLD_US));
    let second = claim(&*store, &clock).await.remove(0);
    assert_eq!(second.after, "user-07");
    let until_us = clock.now_us() + HOLD_US;
    let (one, two) = tokio::join!(store.apply(second.clone(), until_us, 8), store.apply(second, until_us, 8));
    let lost = [one.unwrap(), two.unwrap()].into_iter().filter(|applied| *applied == Applied::Lost).count();
    assert_eq!(lost, 1);
    clock.advance(Duration::from_micros(HOLD_US));
    apply_all(&*store, &clock, 8).await;
    for user in &users {
        assert_eq!(bodies(&*store, user).await, ["once"], "{user}");
    }
    assert_eq!(heard.committed.lock().len(), users.len());
    assert_eq!(store.stats().await.unwrap().unsettled, users.len() as u64);
}

async fn who_has_no_room_gets_a_dead_letter<H: Harness>(mut harness: H) {
    let heard = Arc::new(Heard::default());
    harness.set(Limits { max_unsettled: 2, on_commit: heard.clone(), ..Limits::default() });
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    join(&*store, &["bob", "eve"]).await;
    store.append(vec![message("bob", 1, "x", "", &clock), message("bob", 2, "x", "", &clock)]).await;
    let (first, second) = (publication(10, "lost?", "", &clock), publication(20, "lost?", "", &clock));
    for publication in [&first, &second] {
        publish(&*store, publication.clone()).await;
    }
    assert_eq!(apply_all(&*store, &clock, 10).await, 4);
    let epoch = read_all(&*store, "bob").await.epoch;
    // What died is settled before what is submitted for the user after it.
    store.ack(vec![settle("bob", epoch, &[], 0)]).await.remove(0).unwrap();
    let page = read_all(&*store, "bob").await;
    assert_eq!((seqs(&page), page.head), (vec![1, 2], 4));
    assert_eq!(bodies(&*store, "eve").await, ["lost?", "lost?"]);
    let letters = store.dead_letters(DeadFilter::default(), None, 10).await.unwrap().letters;
    let told: Vec<_> =
        letters.iter().map(|letter| (letter.user.as_str(), letter.seq, letter.reason)).collect();
    assert_eq!(told.len(), 2);
    assert!(told.contains(&("bob", 3, DeadReason::QueueFull)), "{told:?}");
    assert!(told.contains(&("bob", 4, DeadReason::QueueFull)), "{told:?}");
    let id = member_message_id(first.message_id, "bob");
    let letter = store.dead_letter("bob".to_owned(), id).await.unwrap().unwrap();
    assert_eq!((letter.payload, letter.caller.as_str()), (Some(text("lost?")), "shop"));
    assert_eq!(letter.accepted_us, first.time_us);
    let receipt = store.lookup("bob".to_owned(), id).await.unwrap().unwrap();
    assert_eq!((receipt.seq, receipt.state), (3, State::Dead));
    // Nobody is told of it as of a message that came.
    assert!(!heard.committed.lock().contains(&id));
    let more = store.append(vec![message("bob", 3, "x", "", &clock)]).await.remove(0);
    assert_eq!(more, Err(AppendError::QueueFull { quota: Quota::Messages, held: 2 }));
    store.ack(vec![settle("bob", epoch, &[(1, 1)], 0)]).await.remove(0).unwrap();
    let more = store.append(vec![message("bob", 3, "x", "", &clock)]).await.remove(0);
    assert_eq!(more.unwrap().seq, 5);
    assert_eq!(store.stats().await.unwrap().unsettled, 4);
    assert_eq!(audit::audit_all(&*store).await.1, []);
}

async fn members_messages_end_like_others<H: Harness>(mut harness: H) {
    harness.set(Limits { max_unsettled_bytes: 1_000, ..Limits::default() });
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    join(&*store, &["bob"]).await;
    let keyed = |id: u128, body: &str| Publication {
        collapse_key: "k".to_owned(),
        expires_us: clock.now_us() + 1_000_000,
        ..publication(id, body, "", &clock)
    };
    for body in ["old", "new"] {
        publish(&*store, keyed(body.len() as u128 + u128::from(body == "new"), body)).await;
    }
    publish(&*store, publication(20, "stays", "", &clock)).await;
    // Larger than the inbox may be.
    publish(&*store, publication(21, &"x".repeat(1_000), "", &clock)).await;
    apply_all(&*store, &clock, 10).await;
    let epoch = read_all(&*store, "bob").await.epoch;
    store.ack(vec![settle("bob", epoch, &[], 0)]).await.remove(0).unwrap();
    assert_eq!(bodies(&*store, "bob").await, ["new", "stays"]);
    let state = async |id: u128| {
        let id = member_message_id(Uuid::from_u128(id << 64), "bob");
        store.lookup("bob".to_owned(), id).await.unwrap().unwrap().state
    };
    assert_eq!((state(3).await, state(4).await), (State::Superseded, State::Accepted));
    assert_eq!((state(20).await, state(21).await), (State::Accepted, State::Dead));
    clock.advance(Duration::from_secs(1));
    assert_eq!(store.expire(clock.now_us(), 10).await.unwrap().settled, 1);
    assert_eq!((state(4).await, state(20).await), (State::Expired, State::Accepted));
    // Bytes of a shared payload count like those of another.
    let big = "x".repeat(980);
    assert_eq!(store.append(vec![message("bob", 50, &big, "", &clock)]).await.remove(0).unwrap().seq, 5);
    let more = store.append(vec![message("bob", 51, &big, "", &clock)]).await.remove(0);
    assert!(matches!(more, Err(AppendError::QueueFull { quota: Quota::Bytes, held: 990 })), "{more:?}");
    store.ack(vec![settle("bob", epoch, &[(1, 5)], 0)]).await.remove(0).unwrap();
    assert_eq!(state(20).await, State::Acked);
    assert_eq!(store.append(vec![message("bob", 51, &big, "", &clock)]).await.remove(0).unwrap().seq, 6);
    assert_eq!(audit::audit_all(&*store).await.1, []);
}

async fn shared_payloads_count_for_pages<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    join(&*store, &["a", "b", "c", "d"]).await;
    let body = "x".repeat(60_000);
    for id in 1..=MAX_UNSETTLED as u128 {
        publish(&*store, publication(id, &body, "", &clock)).await;
    }
    apply_all(&*store, &clock, 100).await;
    let all = ["a", "b", "c", "d"].map(|user| query(user, None, 500));
    let pages: Vec<Page> = store.read(all.to_vec()).await.into_iter().map(Result::unwrap).collect();
    let bytes: usize =
        pages.iter().map(|page| page.messages.iter().map(prost::Message::encoded_len).sum::<usize>()).sum();
    assert!(bytes <= MAX_READ_BYTES, "{bytes}");
    assert!(pages[0].messages.len() >= 15 && pages[0].messages.len() <= MAX_PAGE_BYTES / 60_000);
    let rest = store.read(vec![query("a", Some(pages[0].covers), 500)]).await.remove(0).unwrap();
    assert_eq!((rest.covers, rest.head), (MAX_UNSETTLED, MAX_UNSETTLED));
    let count = pages[0].messages.len() + rest.messages.len();
    assert_eq!(count as u64, MAX_UNSETTLED);
    assert!(rest.messages.iter().all(|message| message.payload == Some((*text(&body)).clone())));
}

async fn so_many_publications_wait_at_most<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    join(&*store, &["bob"]).await;
    for batch in 0..MAX_UNFINISHED as u128 / 100 {
        let send = |n| store.publish_durable(publication(batch * 100 + n + 1, "x", "", &clock));
        for result in futures::future::join_all((0..100).map(send)).await {
            result.unwrap();
        }
    }
    let more = store.publish_durable(publication(5_000, "x", "", &clock)).await;
    assert_eq!(more, Err(PublicationError::Backlog));
    let turn = claim(&*store, &clock).await.remove(0);
    assert_eq!(store.apply(turn, clock.now_us(), 10).await, Ok(Applied::Finished(1)));
    assert_eq!(publish(&*store, publication(5_000, "x", "", &clock)).await, MAX_UNFINISHED as u64 + 1);
}
