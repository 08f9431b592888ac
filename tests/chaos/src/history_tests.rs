//! Histories with one fault each, and what is no fault.

use super::*;

const USER: &str = "ann";

fn id(number: u64) -> String {
    format!("id-{number}")
}

fn accepted(number: u64) -> Event {
    Event::Accepted { number, seq: number, id: id(number), stream: Some(1) }
}

fn delivered(number: u64) -> Event {
    again(number, 1)
}

fn again(number: u64, delivery: u32) -> Event {
    Event::Delivered { number, seq: number, delivery, id: id(number) }
}

fn applied(number: u64) -> Event {
    Event::Applied { number }
}

/// Five messages that went well, as events; message n has the seq n.
fn good() -> Vec<Event> {
    let sends = (1..=5).flat_map(|number| [Event::Sent { number }, accepted(number)]);
    let arrivals = (1..=5).flat_map(|number| [delivered(number), applied(number)]);
    sends.chain([Event::Connected]).chain(arrivals).collect()
}

fn history(events: impl IntoIterator<Item = Event>) -> History {
    let mut history = History::default();
    events.into_iter().for_each(|event| history.record(USER, event));
    history
}

fn check(events: impl IntoIterator<Item = Event>) -> Report {
    history(events).check()
}

/// The good history without some of its events, and with others behind them.
fn changed(keep: impl Fn(&Event) -> bool, more: impl IntoIterator<Item = Event>) -> Report {
    check(good().into_iter().filter(keep).chain(more))
}

fn more(events: impl IntoIterator<Item = Event>) -> Report {
    changed(|_| true, events)
}

/// Places of faults, without the reasons.
fn at(wrong: &[Wrong]) -> Vec<u64> {
    wrong.iter().map(|(user, at, _)| (assert_eq!(user, USER), *at).1).collect()
}

#[test]
fn a_good_history_is_clean() {
    let report = check(good());
    assert_eq!(report, Report { accepted: 5, ..Report::default() });
    assert!(report.is_clean() && report.wrongs().is_empty());
    let line =
        "accepted=5 lost=0 unexpected=0 out_of_order=0 duplicate_effects=0 redelivered=0 dead=0 faults=0";
    assert_eq!(report.to_string(), line);
    assert!(check([]).is_clean());
}

#[test]
fn an_accepted_message_without_an_effect_is_lost() {
    let report = changed(|event| *event != applied(3), []);
    assert_eq!(at(&report.lost), [3], "delivered, not applied");
    let report = changed(|event| *event != applied(3) && *event != delivered(3), []);
    assert_eq!(at(&report.lost), [3], "neither");
    assert!(!report.is_clean() && report.wrongs()[0].contains("ann 3: accepted"), "{:?}", report.wrongs());
    assert!(report.unexpected.is_empty() && report.out_of_order.is_empty());
}

#[test]
fn a_history_knows_what_is_owed_while_it_is_recorded() {
    let mut history = history(good().into_iter().filter(|event| *event != applied(3)));
    assert_eq!((history.owed(), history.accepted()), (1, 5));
    assert!(history.is_applied(USER, 2) && !history.is_applied(USER, 3) && !history.is_applied("bob", 2));
    assert!(history.was_sent(USER, 3) && !history.was_sent(USER, 6));
    history.poison(USER, 3);
    assert_eq!((history.owed(), history.poisoned()), (0, BTreeSet::from([(USER.to_owned(), 3)])));
    assert_eq!(history.answered(USER)[&4], (4, id(4)));
}

#[test]
fn a_hole_in_the_inbox_is_lost() {
    // The message with seq 6 had no answer, and vanished; the one behind it arrived.
    let events = [Event::Sent { number: 6 }, Event::Sent { number: 7 }, delivered(7), applied(7)];
    let report = more(events);
    assert_eq!(at(&report.lost), [6]);
}

#[test]
fn an_unknown_outcome_may_be_both() {
    assert!(more([Event::Sent { number: 6 }]).is_clean());
    assert!(more([Event::Sent { number: 6 }, delivered(6), applied(6)]).is_clean());
}

#[test]
fn what_nobody_sent_or_what_was_refused_is_unexpected() {
    assert_eq!(at(&more([delivered(6)]).unexpected), [6]);
    assert_eq!(at(&more([applied(6)]).unexpected), [6]);
    let refused = [Event::Sent { number: 6 }, Event::Refused { number: 6 }];
    assert!(more(refused.clone()).is_clean());
    let report = more(refused.into_iter().chain([delivered(6)]));
    assert_eq!(at(&report.unexpected), [6]);
}

#[test]
fn another_message_under_a_known_seq_is_unexpected() {
    let other = Event::Delivered { number: 3, seq: 3, delivery: 1, id: id(9) };
    let swapped = |event: Event| if event == delivered(3) { other.clone() } else { event };
    let report = check(good().into_iter().map(swapped));
    assert_eq!(at(&report.unexpected), [3]);
    let sixth = [Event::Sent { number: 6 }, Event::Sent { number: 7 }, delivered(6), applied(6)];
    let other = Event::Delivered { number: 7, seq: 6, delivery: 1, id: id(7) };
    let report = more(sixth.into_iter().chain([Event::Connected, other]));
    assert_eq!(at(&report.unexpected), [6]);
}

#[test]
fn a_seq_of_two_messages_and_a_message_of_two_seqs_are_unexpected() {
    let taken = Event::Accepted { number: 6, seq: 5, id: id(6), stream: None };
    let report = more([Event::Sent { number: 6 }, taken, applied(6)]);
    assert_eq!(
        at(&report.unexpected),
        [5, 5],
        "it was given out twice, and what came is not what was answered last"
    );
    let twice = Event::Accepted { number: 5, seq: 6, id: id(5), stream: None };
    assert_eq!(at(&more([twice]).unexpected), [5]);
    let moved = Event::Delivered { number: 5, seq: 6, delivery: 1, id: id(6) };
    let report = more([moved, applied(5)]);
    assert_eq!(at(&report.unexpected), [6]);
    assert_eq!(at(&report.duplicate_effects), [5], "the client cannot tell");
}

#[test]
fn the_answer_to_a_repeat_is_the_first_one() {
    let repeat = Event::Accepted { number: 2, seq: 2, id: id(2), stream: None };
    assert_eq!(more([repeat]), check(good()));
}

#[test]
fn a_second_effect_is_found() {
    let report = more([Event::Connected, delivered(3), applied(3)]);
    assert_eq!((at(&report.duplicate_effects), report.redelivered), (vec![3], 1));
    assert!(report.lost.is_empty() && report.unexpected.is_empty() && report.out_of_order.is_empty());
}

#[test]
fn messages_behind_their_successors_are_out_of_order() {
    // 4 before 3.
    let events = good().into_iter().filter(|event| *event != delivered(3));
    let late = events.flat_map(|event| match event == delivered(4) {
        true => vec![event, delivered(3)],
        false => vec![event],
    });
    let report = check(late);
    assert_eq!(at(&report.out_of_order), [3, 3], "of the inbox, and on the connection");
    // On a connection alone: both had come before.
    let report = more([Event::Connected, delivered(4), delivered(3)]);
    assert_eq!(at(&report.out_of_order), [3]);
}

#[test]
fn messages_of_one_stream_keep_their_order() {
    let accepted = |number, seq, stream| Event::Accepted { number, seq, id: id(number), stream };
    let arrive =
        |number, seq| [Event::Delivered { number, seq, delivery: 1, id: id(number) }, applied(number)];
    let swapped = |stream| {
        let sends = [6, 7].map(|number| Event::Sent { number });
        let answers = [accepted(6, 7, stream), accepted(7, 6, stream)];
        more(sends.into_iter().chain(answers).chain(arrive(7, 6)).chain(arrive(6, 7)))
    };
    assert_eq!(at(&swapped(Some(2)).out_of_order), [6]);
    assert!(swapped(None).is_clean(), "repeats have no order");
}

#[test]
fn a_redelivery_on_another_connection_is_none() {
    let report = more([Event::Connected, delivered(3), delivered(4)]);
    assert!(report.is_clean());
    assert_eq!(report.redelivered, 2);
}

#[test]
fn a_redelivery_on_the_same_connection_needs_a_failure() {
    assert_eq!(at(&more([delivered(5)]).out_of_order), [5]);
    let report = more([Event::Failed { seq: 3 }, again(3, 2)]);
    assert!(report.is_clean(), "{:?}", report.wrongs());
    assert_eq!(report.redelivered, 1);
    let late = [Event::Failed { seq: 3 }, again(3, 2), delivered(3)];
    assert_eq!(at(&more(late).out_of_order), [3], "an attempt that was over");
    let repeated = more([Event::Failed { seq: 3 }, again(3, 2), again(3, 2)]);
    assert_eq!(at(&repeated.out_of_order), [3], "one attempt twice");
}

#[test]
fn an_attempt_that_nobody_failed_is_unexpected() {
    assert_eq!(at(&more([Event::Connected, again(3, 2)]).unexpected), [3]);
    assert_eq!(at(&more([Event::Failed { seq: 3 }, again(3, 3)]).unexpected), [3]);
    assert_eq!(at(&more([Event::Connected, again(3, 0)]).unexpected), [3]);
}

#[test]
fn what_was_settled_does_not_come_again() {
    let report = more([Event::Acked { seq: 3 }, Event::Connected, delivered(3)]);
    assert_eq!(at(&report.unexpected), [3]);
}

#[test]
fn a_dead_letter_is_lost_unless_it_was_to_die() {
    let dead = Event::Dead { number: 3, id: id(3) };
    let events = good().into_iter().filter(|event| *event != applied(3)).chain([dead]);
    let mut history = history(events);
    let report = history.check();
    assert_eq!((at(&report.lost), report.dead), (vec![3], 1));
    history.poison(USER, 3);
    assert!(history.check().is_clean());
}

#[test]
fn a_letter_that_is_sent_again_has_one_effect() {
    let dead = Event::Dead { number: 3, id: id(3) };
    let redriven = Event::Redriven { number: 3, seq: 6, id: id(6) };
    let events = good().into_iter().filter(|event| *event != applied(3)).chain([dead, redriven]);
    let mut history = history(events);
    history.poison(USER, 3);
    assert_eq!(at(&history.check().lost), [3], "it was sent again and did not arrive");
    history.record(USER, Event::Delivered { number: 3, seq: 6, delivery: 1, id: id(6) });
    history.record(USER, applied(3));
    assert!(history.check().is_clean(), "{:?}", history.check().wrongs());
    history.record(USER, applied(3));
    assert_eq!(at(&history.check().duplicate_effects), [3]);
}

#[test]
fn a_fault_counts_when_work_goes_on_before_and_after_it() {
    let mut history = History::default();
    history.fault();
    let send = |history: &mut History, number| {
        history.record(USER, Event::Sent { number });
        history.record(USER, accepted(number));
    };
    send(&mut history, 1);
    history.fault();
    send(&mut history, 2);
    history.fault();
    assert_eq!(history.check().faults, 1);
}

#[test]
fn users_are_checked_apart_and_added_up() {
    let mut history = history(good());
    for event in good().into_iter().filter(|event| *event != applied(2)) {
        history.record("bob", event);
    }
    let report = history.check();
    assert_eq!(
        (report.accepted, report.lost),
        (10, vec![("bob".to_owned(), 2, "accepted, and without an effect")])
    );
}
