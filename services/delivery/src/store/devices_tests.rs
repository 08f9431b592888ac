use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::store::MAX_SETTLED_RANGES;

const NOW_US: u64 = 4_102_444_800_000_000;

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

fn devices(names: &[&str], settled: &Settled, head: u64) -> Devices {
    let mut devices = Devices::default();
    for name in names {
        devices.see(name, settled, head, NOW_US).unwrap();
    }
    devices
}

#[test]
fn the_first_device_begins_at_the_mark_and_the_others_at_the_head() {
    let settled = Settled::new(3, vec![(6, 6)]);
    let devices = devices(&["phone", "laptop"], &settled, 9);
    assert_eq!((devices.mark("phone", &settled), devices.mark("laptop", &settled)), (3, 9));
    assert_eq!(devices.mark("nobody", &settled), 3);
    assert_eq!(devices.acked_by_all(9), [(1, 3)]);
    assert_eq!(devices.acked_by(3), ["phone", "laptop"]);
    assert_eq!(devices.acked_by(4), ["laptop"]);
    assert_eq!(
        (devices.written_to_all(), devices.has_written(9), devices.has_written(10)),
        (Some(3), true, false)
    );
}

#[test]
fn a_seventeenth_device_waits_until_one_is_forgotten() {
    let settled = Settled::default();
    let mut devices = Devices::default();
    for number in 0..MAX_DEVICES as u64 {
        devices.see(&number.to_string(), &settled, 0, NOW_US + number).unwrap();
    }
    let late = NOW_US + micros(FORGET_AFTER);
    assert_eq!(devices.see("new", &settled, 0, late - 1), Err(RegisterError::TooMany));
    assert_eq!(devices.see("15", &settled, 0, late - 1), Ok(()), "it is one of them");
    assert_eq!(devices.see("new", &settled, 0, late), Ok(()));
    assert_eq!((devices.known("0", late), devices.known("new", late)), (Known::Unknown, Known::Lately));
    assert_eq!(devices.forget(late + micros(FORGET_AFTER) - 2), 14, "all but the two that came since");
    assert_eq!(devices.forget(late + micros(FORGET_AFTER)), 2);
    assert!(devices.is_empty() && devices.encode().is_empty() && devices.longest_unseen_us().is_none());
}

#[test]
fn seen_is_noted_once_an_hour() {
    let settled = Settled::default();
    let mut devices = devices(&["phone"], &settled, 0);
    let hour = micros(SEEN_EVERY);
    assert_eq!(devices.known("phone", NOW_US + hour - 1), Known::Lately);
    let before = devices.clone();
    devices.see("phone", &settled, 0, NOW_US + hour - 1).unwrap();
    assert_eq!(devices, before);
    assert_eq!(devices.known("phone", NOW_US + hour), Known::LongAgo);
    devices.see("phone", &settled, 0, NOW_US + hour).unwrap();
    assert_eq!(devices.known("phone", NOW_US + hour), Known::Lately);
    assert_eq!(devices.longest_unseen_us(), Some(NOW_US + hour));
}

#[test]
fn what_is_settled_takes_no_room_of_a_device() {
    // Every second message of the first 400 expired.
    let even: Vec<(u64, u64)> = (1..=200).map(|n| (n * 2, n * 2)).collect();
    let settled = Settled::new(0, even);
    let mut devices = devices(&["phone"], &Settled::default(), 0);
    let odd: Vec<(u64, u64)> = (1..200).map(|n| (n * 2 + 1, n * 2 + 1)).collect();
    assert_eq!(devices.ack("phone", &odd, 10_000, &settled), 0);
    assert_eq!(devices.mark("phone", &settled), 0);
    assert_eq!(devices.ack("phone", &[(1, 1)], 10_000, &settled), 0);
    assert_eq!(devices.mark("phone", &settled), 400);
    let sparse: Vec<(u64, u64)> = (300..=300 + MAX_SETTLED_RANGES as u64).map(|n| (n * 2, n * 2)).collect();
    assert_eq!(devices.ack("phone", &sparse, 10_000, &settled), 1, "one range too many");
}

#[derive(Debug, Clone)]
enum Operation {
    Append,
    Settle(u64),
    See(u8),
    Ack(u8, u64, u64),
    Forget(u8),
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        3 => Just(Operation::Append),
        1 => (1..30_u64).prop_map(Operation::Settle),
        1 => (0..4_u8).prop_map(Operation::See),
        4 => (0..4_u8, 1..30_u64, 0..4_u64).prop_map(|(who, from, more)| Operation::Ack(who, from, from + more)),
        1 => (0..4_u8).prop_map(Operation::Forget),
    ]
}

proptest! {
    /// Beside sets: what a device lacks, its mark, and what no device lacks.
    #[test]
    fn devices_agree_with_sets(operations in prop::collection::vec(operation(), 1..80)) {
        let (mut devices, mut settled, mut head) = (Devices::default(), Settled::default(), 0_u64);
        let mut model: Vec<(u8, BTreeSet<u64>)> = Vec::new();
        for operation in operations {
            match operation {
                Operation::Append => head += 1,
                Operation::Settle(seq) => drop(settled.settle(seq, seq.min(head))),
                Operation::See(who) => {
                    devices.see(&who.to_string(), &settled, head, NOW_US).unwrap();
                    let begins = if model.is_empty() { settled.mark() } else { head };
                    if model.iter().all(|(other, _)| *other != who) {
                        model.push((who, (1..=begins).collect()));
                    }
                }
                Operation::Ack(who, from, to) => {
                    prop_assert_eq!(devices.ack(&who.to_string(), &[(from, to)], head, &settled), 0);
                    if let Some((_, acked)) = model.iter_mut().find(|(other, _)| *other == who) {
                        acked.extend(from..=to.min(head));
                    }
                }
                Operation::Forget(who) => {
                    let name = who.to_string();
                    devices.0.retain(|device| device.name != name);
                    model.retain(|(other, _)| *other != who);
                }
            }
            let decoded = Devices::decode(&devices.encode()).unwrap();
            prop_assert_eq!(&decoded, &devices);
            let all = |seq: u64| !model.is_empty() && model.iter().all(|(_, acked)| acked.contains(&seq));
            let common: BTreeSet<u64> =
                devices.acked_by_all(head).into_iter().flat_map(|(from, to)| from..=to).collect();
            for seq in (1..=head).filter(|seq| !settled.holds(*seq)) {
                prop_assert_eq!(common.contains(&seq), all(seq), "{}", seq);
                for (who, acked) in &model {
                    prop_assert_eq!(devices.has_acked(&who.to_string(), seq), acked.contains(&seq));
                }
            }
            for (who, acked) in &model {
                let mark = (1..=head).take_while(|seq| settled.holds(*seq) || acked.contains(seq)).count() as u64;
                prop_assert_eq!(devices.mark(&who.to_string(), &settled).min(head), mark);
            }
        }
    }
}
