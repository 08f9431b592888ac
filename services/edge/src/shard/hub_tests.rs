use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn top(epoch: &str, offset: u64) -> Top {
    Top { epoch: epoch.into(), offset }
}

#[test]
fn the_first_asks_and_the_others_wait_with_it() {
    let mut hub = Hub::default();
    assert_eq!(hub.join(0, Some(1), "a"), Join::Waits { ask: Some("a".into()) });
    assert_eq!(hub.join(1, Some(2), "a"), Join::Waits { ask: None });
    assert_eq!(hub.join(1, Some(3), "a"), Join::Already);
    assert_eq!(hub.on_publication("a", "e", 5), Step::Skip, "not confirmed yet");
    let (channel, confirmed) = hub.on_subscribed("a", top("e", 4)).unwrap();
    assert_eq!(confirmed, Confirmed { waiters: vec![(0, Some(1)), (1, Some(2))], missed: None, earlier: 0 });
    assert_eq!(hub.members(channel), [0, 1]);
    assert_eq!(hub.join(2, None, "a"), Join::Member(top("e", 4)));
    assert_eq!(hub.on_publication("a", "e", 5), Step::Deliver { channel, missed: None });
    assert_eq!(hub.on_publication("a", "e", 5), Step::Skip, "handed out already");
}

#[test]
fn what_was_missed_is_told() {
    let mut hub = Hub::default();
    hub.join(0, None, "a");
    let (channel, _) = hub.on_subscribed("a", top("e", 4)).unwrap();
    let missed = Some(Missed { from: 5, to: 6 });
    assert_eq!(hub.on_publication("a", "e", 7), Step::Deliver { channel, missed });
    assert_eq!(hub.on_gap("a", "e", 9), Some((channel, Missed { from: 8, to: 9 })));
    assert_eq!(hub.on_gap("a", "e", 9), None);
    assert_eq!(hub.on_gap("a", "e", 10), Some((channel, Missed { from: 10, to: 10 })));
    let (_, confirmed) = hub.on_subscribed("a", top("e", 12)).unwrap();
    assert_eq!(confirmed.missed, Some(Missed { from: 11, to: 12 }), "while the router was away");
    let (_, confirmed) = hub.on_subscribed("a", top("f", 3)).unwrap();
    assert_eq!(confirmed.missed, Some(Missed { from: 0, to: 3 }), "another epoch");
    assert_eq!(hub.on_publication("a", "f", 4), Step::Deliver { channel, missed: None });
    // Another epoch began, and nothing was published in it yet.
    assert_eq!(hub.on_gap("a", "g", 0), Some((channel, Missed { from: 0, to: 0 })));
}

#[test]
fn leaving_before_the_answer_cancels_the_subscribe() {
    let mut hub = Hub::default();
    hub.join(0, Some(9), "a");
    assert_eq!(hub.leave(0, "a"), Leave::Left { cancelled: Some(Some(9)), last: Some("a".into()) });
    assert_eq!(hub.on_subscribed("a", top("e", 1)), None);
    assert_eq!(hub.leave(0, "a"), Leave::NotSubscribed);
}

#[test]
fn a_refusal_reaches_those_who_wait() {
    let mut hub = Hub::default();
    hub.join(0, Some(1), "a");
    assert_eq!(hub.on_refused("a"), [(0, Some(1))]);
    assert_eq!(hub.channel_count(), 0);
    assert_eq!(hub.join(0, Some(2), "a"), Join::Waits { ask: Some("a".into()) });
}

#[derive(Debug, Clone)]
enum Op {
    Join(u32, u8),
    Leave(u32, u8),
    LeaveAll(u32),
    Confirm(u8),
}

proptest! {
    #[test]
    fn members_are_who_joined_and_did_not_leave(
        ops in prop::collection::vec(prop_oneof![
            4 => (0..6u32, 0..4u8).prop_map(|(conn, channel)| Op::Join(conn, channel)),
            2 => (0..6u32, 0..4u8).prop_map(|(conn, channel)| Op::Leave(conn, channel)),
            1 => (0..6u32).prop_map(Op::LeaveAll),
            2 => (0..4u8).prop_map(Op::Confirm),
        ], 0..120),
    ) {
        let mut hub = Hub::default();
        let mut model: BTreeMap<u8, BTreeSet<u32>> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Join(conn, channel) => {
                    let joined = hub.join(conn, None, &channel.to_string());
                    let fresh = model.entry(channel).or_default().insert(conn);
                    prop_assert_eq!(joined == Join::Already, !fresh);
                }
                Op::Leave(conn, channel) => {
                    let left = hub.leave(conn, &channel.to_string());
                    let was = model.entry(channel).or_default().remove(&conn);
                    prop_assert_eq!(left != Leave::NotSubscribed, was);
                }
                Op::LeaveAll(conn) => {
                    hub.leave_all(conn);
                    model.values_mut().for_each(|members| { members.remove(&conn); });
                }
                Op::Confirm(channel) => {
                    let confirmed = hub.on_subscribed(&channel.to_string(), top("e", 0));
                    let members = model.entry(channel).or_default();
                    match confirmed {
                        None => prop_assert!(members.is_empty()),
                        Some((index, _)) => {
                            let mut now = hub.members(index).to_vec();
                            now.sort_unstable();
                            prop_assert_eq!(now, members.iter().copied().collect::<Vec<_>>());
                        }
                    }
                }
            }
            model.retain(|_, members| !members.is_empty());
            prop_assert_eq!(hub.channel_count(), model.len());
        }
    }
}

#[test]
fn a_bounded_channel_is_counted_across_shards() {
    let subscribers = Arc::new(Subscribers::default());
    let (mut a, mut b) = (Hub::new(Arc::clone(&subscribers)), Hub::new(Arc::clone(&subscribers)));
    let joins = |join: &Join| *join != Join::Full;
    assert!(joins(&a.join_within(2, 0, None, "a")) && joins(&b.join_within(2, 0, None, "a")));
    assert_eq!(b.join_within(2, 1, None, "a"), Join::Full);
    assert_eq!(b.join_within(2, 0, None, "a"), Join::Already, "who is in is not counted twice");
    assert_eq!(a.join_within(2, 1, None, "b"), Join::Waits { ask: Some("b".into()) }, "another channel");
    a.leave(0, "a");
    assert!(joins(&b.join_within(2, 1, None, "a")));
    assert_eq!(a.join_within(2, 0, None, "a"), Join::Full, "nobody here, two there");
    // Those who wait and are refused, and those who go, are counted no more.
    assert_eq!(b.on_refused("a").len(), 2);
    assert!(joins(&a.join_within(1, 0, None, "a")));
    a.leave_all(0);
    a.leave_all(1);
    assert_eq!(subscribers.channels(), 0, "nothing is left behind");
}

#[test]
fn a_bound_that_comes_later_counts_those_who_are_there() {
    let subscribers = Arc::new(Subscribers::default());
    let mut hub = Hub::new(Arc::clone(&subscribers));
    hub.join(0, None, "a");
    hub.on_subscribed("a", top("e", 0)).unwrap();
    hub.join(1, None, "a");
    assert_eq!(hub.join_within(2, 2, None, "a"), Join::Full);
    hub.leave(0, "a");
    assert_eq!(hub.join_within(2, 2, None, "a"), Join::Member(top("e", 0)));
    assert_eq!(hub.join(3, None, "a"), Join::Member(top("e", 0)), "without a bound again");
    assert_eq!(hub.join_within(3, 0, None, "a"), Join::Full, "and all of them count");
    (1..4).for_each(|conn| drop(hub.leave_all(conn)));
    assert_eq!(subscribers.channels(), 0);
}

#[test]
fn channels_are_looked_at_in_parts_with_their_members() {
    let mut hub = Hub::default();
    for (conn, channel) in [(0, "a"), (1, "a"), (0, "b"), (1, "c")] {
        hub.join(conn, None, channel);
    }
    hub.on_subscribed("a", Top { epoch: "e".into(), offset: 0 });
    hub.on_subscribed("b", Top { epoch: "e".into(), offset: 0 });
    hub.leave(1, "c");
    let (mut seen, mut from) = (Vec::new(), 0);
    while hub.look(from, 1, |name, members| seen.push((name.to_owned(), members))) {
        from += 1;
    }
    seen.sort();
    assert_eq!(seen, [("a".to_owned(), 2), ("b".to_owned(), 1)]);
    assert!(hub.holds(0, "a") && hub.holds(1, "a") && hub.holds(0, "b"));
    assert!(!hub.holds(1, "b") && !hub.holds(1, "c") && !hub.holds(9, "a"));
}

#[test]
fn who_recovers_holds_the_channel_and_gets_nothing_until_it_is_let_in() {
    let subscribers = Arc::new(Subscribers::default());
    let mut hub = Hub::new(Arc::clone(&subscribers));
    assert_eq!(hub.seek(2, 0, "a"), Seek::Waits { ask: Some("a".into()) });
    assert_eq!(hub.seek(2, 1, "a"), Seek::Waits { ask: None });
    assert_eq!(hub.seek(2, 2, "a"), Seek::Full);
    assert!(!hub.admit(0, "a"), "not before the channel is confirmed");
    let (channel, confirmed) = hub.on_subscribed("a", top("e", 4)).unwrap();
    assert_eq!((confirmed.waiters, hub.members(channel).len()), (vec![], 0));
    assert_eq!(hub.on_publication("a", "e", 5), Step::Deliver { channel, missed: None });
    assert_eq!(hub.seek(3, 2, "a"), Seek::Known(top("e", 5)));
    assert!(hub.admit(1, "a") && !hub.admit(1, "a"), "once");
    assert_eq!((hub.members(channel), hub.top_of("a")), (&[1][..], Some(top("e", 5))));
    assert_eq!(hub.seek(0, 1, "a"), Seek::Already);
    assert_eq!(hub.join(0, None, "a"), Join::Already);
    assert_eq!(hub.leave(1, "a"), Leave::Left { cancelled: None, last: None }, "two hold it still");
    assert_eq!(hub.leave_all(2), []);
    assert_eq!(hub.leave(0, "a"), Leave::Left { cancelled: None, last: Some("a".into()) });
    assert_eq!((subscribers.channels(), hub.channel_count(), hub.top_of("a")), (0, 0, None));
}
