//! Histories with one fault each.

use super::*;

/// Ten messages of two users, each of which `arrive` turns into those that arrived.
fn history(arrive: impl Fn(u64) -> Vec<u64>) -> History {
    let mut history = History::default();
    for user in ["ann", "bob"] {
        for number in 1..=10 {
            history.accepted(user, number, &format!("{user}-{number}"));
        }
        for number in (1..=10).flat_map(&arrive) {
            history.received(user, number, &format!("{user}-{number}"));
            history.applied(user, number, &format!("{user}-{number}"));
        }
    }
    history
}

fn both(number: u64) -> Vec<(String, u64)> {
    let mut both = vec![("ann".to_owned(), number), ("bob".to_owned(), number)];
    both.sort();
    both
}

fn sorted(mut faults: Vec<(String, u64)>) -> Vec<(String, u64)> {
    faults.sort();
    faults
}

#[test]
fn a_perfect_history_is_clean() {
    let report = history(|number| vec![number]).check();
    assert_eq!(report, Report { accepted: 20, applied: 20, ..Report::default() });
    report.assert_clean(20);
}

#[test]
fn a_lost_message_is_found() {
    let report = history(|number| if number == 7 { vec![] } else { vec![number] }).check();
    assert_eq!(sorted(report.lost), both(7));
    assert!(report.out_of_sequence.is_empty() && report.duplicates.is_empty());
}

#[test]
fn a_stream_from_which_nothing_arrived_is_lost() {
    let mut history = history(|number| vec![number]);
    history.accepted("cat", 1, "cat-1");
    assert_eq!(history.check().lost, vec![("cat".to_owned(), 1)]);
}

#[test]
fn a_doubled_effect_is_found() {
    let report = history(|number| if number == 3 { vec![3, 3] } else { vec![number] }).check();
    assert_eq!(sorted(report.duplicates), both(3));
    assert!(report.lost.is_empty() && report.out_of_sequence.is_empty());
}

#[test]
fn swapped_messages_are_found() {
    let swap = |number| match number {
        4 => vec![5],
        5 => vec![4],
        other => vec![other],
    };
    let report = history(swap).check();
    assert_eq!(sorted(report.out_of_sequence), both(4));
    assert!(report.lost.is_empty() && report.duplicates.is_empty());
}

#[test]
fn a_redelivery_is_neither_disorder_nor_an_effect() {
    let mut history = history(|number| vec![number]);
    history.received("ann", 3, "ann-3");
    let report = history.check();
    report.assert_clean(20);
    assert_eq!(report.redelivered, 1);
}

#[test]
fn what_nobody_sent_is_found() {
    let mut history = history(|number| vec![number]);
    history.received("ann", 11, "ann-11");
    history.applied("bob", 2, "another message");
    let report = history.check();
    assert_eq!(sorted(report.unexpected.clone()), vec![("ann".to_owned(), 11), ("bob".to_owned(), 2)]);
    assert!(report.to_string().contains("2 unexpected"), "{report}");
}

#[test]
#[should_panic(expected = "too few messages")]
fn a_run_without_messages_proves_nothing() {
    History::default().check().assert_clean(1);
}

#[test]
#[should_panic(expected = "2 lost")]
fn a_lossy_history_fails() {
    history(|number| if number == 7 { vec![] } else { vec![number] }).check().assert_clean(1);
}

#[test]
#[should_panic(expected = "2 applied twice")]
fn a_doubled_history_fails() {
    history(|number| vec![number; if number == 7 { 2 } else { 1 }]).check().assert_clean(1);
}

#[test]
#[should_panic(expected = "2 out of sequence")]
fn a_swapped_history_fails() {
    history(|number| {
        vec![if number == 4 {
            5
        } else if number == 5 {
            4
        } else {
            number
        }]
    })
    .check()
    .assert_clean(1);
}

/// A user's connections: what each received.
fn connections(received: &[&[u64]]) -> Report {
    let mut history = History::default();
    (1..=5).for_each(|number| history.accepted("ann", number, "id"));
    for connection in received {
        history.connected("ann");
        connection.iter().for_each(|&number| history.received("ann", number, "id"));
    }
    (1..=5).for_each(|number| history.applied("ann", number, "id"));
    history.check()
}

#[test]
fn another_connection_may_begin_again_and_one_may_not() {
    let report = connections(&[&[1, 2, 3], &[2, 3, 4], &[4, 5]]);
    report.assert_clean(5);
    assert_eq!(report.redelivered, 3);
    assert_eq!(connections(&[&[1, 2, 3], &[3, 2, 4, 5]]).out_of_sequence, vec![("ann".to_owned(), 2)]);
    assert_eq!(connections(&[&[1, 2, 3, 3, 4, 5]]).out_of_sequence, vec![("ann".to_owned(), 3)]);
}

#[test]
fn a_disturbance_counts_when_work_goes_on_before_and_after_it() {
    let mut history = History::default();
    history.disturbed();
    history.accepted("ann", 1, "id");
    history.disturbed();
    history.accepted("ann", 1, "id");
    history.accepted("ann", 2, "id");
    history.disturbed();
    assert_eq!(history.check().disturbances, 1);
}

#[test]
#[should_panic(expected = "too few disturbances")]
fn a_run_in_which_nothing_was_disturbed_proves_nothing() {
    history(|number| vec![number]).check().assert_disturbed(1);
}
