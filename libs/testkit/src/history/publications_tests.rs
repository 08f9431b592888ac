//! Histories of channels with one fault each.

use super::*;

/// The n-th message of an epoch, by one of two publishers in turn.
fn message(epoch: &str, offset: u64) -> Publication {
    Publication {
        channel: "news".to_owned(),
        epoch: epoch.to_owned(),
        offset,
        publisher: if offset.is_multiple_of(2) { "even" } else { "odd" }.to_owned(),
        number: offset,
        id: format!("{epoch} {offset}"),
    }
}

/// Ten messages that were answered, and two subscribers that were there before and got `arrived` of them.
fn history(arrived: &[u64]) -> Publications {
    let mut history = Publications::default();
    (1..=10).for_each(|offset| history.accepted(message("a", offset)));
    for subscriber in ["ann", "bob"] {
        history.positioned(subscriber, "news", "a", 0);
        arrived.iter().for_each(|&offset| history.received(subscriber, message("a", offset)));
    }
    history
}

fn both(number: u64) -> Vec<(String, u64)> {
    vec![("ann on news".to_owned(), number), ("bob on news".to_owned(), number)]
}

#[test]
fn a_perfect_history_is_clean() {
    let report = history(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).check();
    assert_eq!(report, Report { accepted: 20, applied: 20, ..Report::default() });
    report.assert_clean(20);
}

#[test]
fn a_silent_hole_and_a_silent_end_are_losses() {
    let report = history(&[1, 2, 3, 5, 6, 7, 8, 9, 10]).check();
    assert_eq!(report, Report { accepted: 20, applied: 18, lost: both(4), ..Report::default() });
    let report = history(&[1, 2, 3, 4, 5, 6, 7, 8, 9]).check();
    assert_eq!(report, Report { accepted: 20, applied: 18, lost: both(10), ..Report::default() });
}

#[test]
#[should_panic(expected = "2 lost (ann on news 4, bob on news 4)")]
fn a_lossy_history_fails() {
    history(&[1, 2, 3, 5, 6, 7, 8, 9, 10]).check().assert_clean(1);
}

#[test]
#[should_panic(expected = "2 applied twice")]
fn a_doubled_history_fails() {
    history(&[1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10]).check().assert_clean(1);
}

#[test]
fn swapped_messages_are_found() {
    let report = history(&[1, 2, 4, 3, 5, 6, 7, 8, 9, 10]).check();
    // The later one left a hole, and the earlier one came behind its place.
    assert_eq!((report.lost, report.duplicates), (both(3), both(3)));
}

#[test]
fn an_announced_hole_is_missed_and_not_lost() {
    let mut history = history(&[1, 2, 3]);
    for subscriber in ["ann", "bob"] {
        history.positioned(subscriber, "news", "a", 8);
        history.received(subscriber, message("a", 9));
        history.received(subscriber, message("a", 10));
    }
    let report = history.check();
    assert_eq!(report, Report { accepted: 20, applied: 10, missed: 10, ..Report::default() });
}

#[test]
#[should_panic(expected = "too few messages")]
fn a_run_in_which_everything_was_missed_proves_nothing() {
    let mut history = history(&[]);
    history.positioned("ann", "news", "a", 10);
    history.positioned("bob", "news", "a", 10);
    history.check().assert_clean(1);
}

#[test]
fn a_new_epoch_has_to_be_announced() {
    let run = |announce: bool| {
        let mut history = history(&[1, 2, 3, 4, 5, 6, 7, 8]);
        history.accepted(message("b", 1));
        history.accepted(message("b", 2));
        for subscriber in ["ann", "bob"] {
            if announce {
                history.positioned(subscriber, "news", "b", 1);
            }
            history.received(subscriber, message("b", 2));
        }
        history.check()
    };
    assert_eq!(run(true), Report { accepted: 24, applied: 18, missed: 6, ..Report::default() });
    assert_eq!(run(false).out_of_sequence, both(2));
}

#[test]
fn an_epoch_that_never_came_is_lost() {
    let mut history = history(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    history.accepted(message("b", 1));
    assert_eq!(history.check().lost, both(1));
}

#[test]
fn a_publisher_has_its_own_order() {
    let mut history = Publications::default();
    let mut swapped = [message("a", 1), message("a", 3)];
    (swapped[0].number, swapped[1].number) = (3, 1);
    history.positioned("ann", "news", "a", 0);
    for (publication, offset) in swapped.into_iter().zip(1..) {
        let publication = Publication { offset, ..publication };
        history.accepted(publication.clone());
        history.received("ann", publication);
    }
    let report = history.check();
    assert_eq!(report.out_of_sequence, vec![("ann on news".to_owned(), 2)]);
    assert!(report.duplicates.is_empty() && report.lost.is_empty(), "{report}");
}

#[test]
fn who_was_away_misses_nothing_by_that() {
    let mut history = history(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    history.positioned("cat", "news", "a", 2);
    history.received("cat", message("a", 3));
    history.left("cat", "news");
    history.positioned("cat", "news", "a", 8);
    history.received("cat", message("a", 9));
    history.received("cat", message("a", 10));
    assert_eq!(history.check(), Report { accepted: 23, applied: 23, ..Report::default() });
}

#[test]
fn what_nobody_sent_and_what_was_sent_otherwise_is_found() {
    let mut history = history(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
    history.received("ann", Publication { id: "another".to_owned(), ..message("a", 10) });
    history.received("bob", message("a", 10));
    history.received("bob", message("a", 11));
    let report = history.check();
    let unexpected = vec![("ann on news".to_owned(), 10), ("bob on news".to_owned(), 11)];
    assert_eq!(report.unexpected, unexpected);
}

#[test]
fn a_publish_without_an_answer_may_arrive_or_not() {
    let mut history = history(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    history.attempted("news", "odd", 11);
    history.received("ann", message("a", 11));
    history.check().assert_clean(21);
}

#[test]
fn two_recorders_make_one_history() {
    let (mut one, mut two) = (Publications::default(), Publications::default());
    one.positioned("ann", "news", "a", 0);
    for offset in 1..=4 {
        let of = if offset % 2 == 0 { &mut one } else { &mut two };
        of.accepted(message("a", offset));
        one.received("ann", message("a", offset));
    }
    one.merge(two);
    one.check().assert_clean(4);
}
