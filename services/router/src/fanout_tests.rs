//! Where a subscription begins, whatever arrives while it is being made.

use sanjay_runtime::{ManualClock, mailbox::Receiver};

use super::*;
use crate::{downlink::Down, registry::Attachment};

fn fanout() -> Fanout {
    Fanout::new(Arc::new(MilestoneRing::new(10, "router", Arc::new(ManualClock::new(1)))), Metrics::default())
}

fn link(number: u64) -> (Arc<Downlink>, Receiver<Down>) {
    let edge = EdgeRef { id: "e1".into(), incarnation: number };
    Downlink::new(Attachment { edge, router: "r1".into(), number }, 10_000, Metrics::default())
}

fn top(epoch: &str, offset: u64) -> Top {
    Top { epoch: epoch.into(), offset }
}

fn publication(epoch: &str, offset: u64) -> Arc<Publication> {
    Arc::new(Publication { channel: "c".into(), epoch: epoch.into(), offset, ..Publication::default() })
}

fn take(receiver: &mut Receiver<Down>) -> Vec<String> {
    let mut taken = Vec::new();
    receiver.try_recv_many(&mut taken, 100_000);
    let text = |down| match down {
        Down::Reply(Event::Subscribed(event)) => format!("subscribed {}:{}", event.epoch, event.offset),
        Down::Publication(publication) => format!("{}:{}", publication.epoch, publication.offset),
        Down::Gap { top, .. } => format!("gap {}:{}", top.epoch, top.offset),
        other => format!("{other:?}"),
    };
    taken.into_iter().map(text).collect()
}

/// What an edge gets when `before` arrive before the top is known and `after` afterwards.
fn outcome(before: &[(&str, u64)], at: Top, after: &[(&str, u64)]) -> Vec<String> {
    let (fanout, (link, mut receiver)) = (fanout(), link(1));
    let channel = Arc::from("c");
    assert!(fanout.join(&channel, &link));
    fanout.set_on_bus(&channel);
    before.iter().for_each(|(epoch, offset)| fanout.publication(&publication(epoch, *offset)));
    assert!(take(&mut receiver).is_empty(), "nothing comes before the answer");
    fanout.go_live(&channel, &link, at);
    after.iter().for_each(|(epoch, offset)| fanout.publication(&publication(epoch, *offset)));
    take(&mut receiver)
}

#[test]
fn everything_above_the_top_comes_and_nothing_else() {
    assert_eq!(
        outcome(&[("a", 4), ("a", 5), ("a", 6)], top("a", 5), &[("a", 7)]),
        ["subscribed a:5", "a:6", "a:7"]
    );
    assert_eq!(outcome(&[("a", 4)], top("a", 5), &[("a", 5), ("a", 6)]), ["subscribed a:5", "a:6"]);
    assert_eq!(outcome(&[], top("a", 0), &[("a", 1)]), ["subscribed a:0", "a:1"]);
}

#[test]
fn a_change_of_epoch_is_told_apart_or_becomes_a_gap() {
    let changed = outcome(&[("a", 5), ("b", 1), ("b", 2)], top("b", 1), &[("b", 3)]);
    assert_eq!(changed, ["subscribed b:1", "b:2", "b:3"]);
    let later = outcome(&[("a", 5), ("b", 1)], top("a", 5), &[]);
    assert_eq!(later, ["subscribed a:5", "b:1"]);
    let unclear = outcome(&[("b", 1)], top("a", 5), &[("b", 2)]);
    assert_eq!(unclear, ["subscribed a:5", "gap b:1", "b:2"]);
}

#[test]
fn too_many_before_the_top_become_a_gap() {
    let many: Vec<_> = (1..=MAX_KEPT as u64 + 2).map(|offset| ("a", offset)).collect();
    let got = outcome(&many, top("a", 1), &[]);
    assert_eq!(got.len(), MAX_KEPT + 1);
    assert_eq!(got.last().unwrap(), &format!("gap a:{}", MAX_KEPT + 2));
}

#[test]
fn a_loss_on_the_bus_becomes_a_gap_unless_the_top_covers_it() {
    let (fanout, (link, mut receiver)) = (fanout(), link(1));
    let (other, mut others) = self::link(2);
    let channel = Arc::from("c");
    fanout.join(&channel, &link);
    assert!(!fanout.lost(&channel, &top("a", 3)), "nobody has joined yet");
    fanout.go_live(&channel, &link, top("a", 3));
    fanout.join(&channel, &other);
    assert!(fanout.lost(&channel, &top("a", 9)));
    assert!(!fanout.lost(&channel, &top("a", 9)), "it is known");
    assert!(!fanout.lost(&"unknown".into(), &top("a", 9)));
    fanout.go_live(&channel, &other, top("a", 8));
    assert_eq!(take(&mut receiver), ["subscribed a:3", "gap a:9"]);
    assert_eq!(take(&mut others), ["subscribed a:8", "gap a:9"]);
}

#[test]
fn a_link_that_left_is_not_answered() {
    let (fanout, (link, mut receiver)) = (fanout(), link(1));
    let channel = Arc::from("c");
    fanout.join(&channel, &link);
    assert!(!fanout.leave(&channel, &link), "the bus was never asked");
    fanout.go_live(&channel, &link, top("a", 3));
    fanout.publication(&publication("a", 4));
    assert!(take(&mut receiver).is_empty());
}

#[test]
fn the_newest_stream_of_an_edge_stays() {
    let fanout = fanout();
    let ((older, _older), (newer, _newer)) = (link(1), link(2));
    fanout.attach(&newer);
    fanout.attach(&older);
    assert_eq!((older.reason(), newer.reason()), (Some(&End::Replaced), None));
    fanout.detach(&older);
    assert!(fanout.link(&newer.attachment.edge).is_some());
    assert!(fanout.link(&older.attachment.edge).is_none(), "another incarnation");
}
