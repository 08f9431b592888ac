use std::collections::BTreeSet;

use super::*;
use proptest::prelude::*;

fn inbox(epoch: &str, mark: u64, head: u64) -> InboxState {
    InboxState { epoch: epoch.to_owned(), mark, head }
}

#[derive(Debug, Clone)]
enum Step {
    /// A message was processed, in any order and perhaps again.
    Process(u64),
    /// A reconnect to the same inbox whose mark moved on so far.
    Reconnect(u64),
    /// A reconnect to an inbox of another epoch with this mark.
    Replace(u64),
    /// A reconnect to an inbox whose head is lower by this.
    GoBack(u64),
    /// The device stores and loads its state.
    Reload,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => (1_u64..50).prop_map(Step::Process),
        2 => (0_u64..50).prop_map(Step::Reconnect),
        1 => (0_u64..20).prop_map(Step::Replace),
        1 => (1_u64..20).prop_map(Step::GoBack),
        2 => Just(Step::Reload),
    ]
}

proptest! {
    #[test]
    fn it_remembers_what_was_processed_and_nothing_else(steps in prop::collection::vec(step(), 0..80)) {
        let mut epoch = 0;
        let name = |epoch: u32| format!("{epoch:016x}");
        let mut state = Processed::begin(&inbox(&name(epoch), 0, 0));
        let mut model = BTreeSet::new();
        for step in steps {
            let newest = model.last().copied().unwrap_or(0);
            match step {
                Step::Process(seq) => {
                    state.insert(seq);
                    model.insert(seq);
                }
                Step::Reconnect(mark) => {
                    let head = newest.max(mark);
                    prop_assert_eq!(state.observe(&inbox(&name(epoch), mark, head)), None);
                    model.extend(1..=mark);
                }
                Step::Replace(mark) => {
                    let before = name(epoch);
                    epoch += 1;
                    let now = name(epoch);
                    let found = state.observe(&inbox(&now, mark, mark));
                    prop_assert_eq!(found, Some(Discontinuity::Epoch { before, now }));
                    model = (1..=mark).collect();
                }
                Step::GoBack(by) => {
                    let head = newest.saturating_sub(by);
                    let found = state.observe(&inbox(&name(epoch), 0, head));
                    if newest > 0 {
                        prop_assert_eq!(found, Some(Discontinuity::WentBack { processed: newest, head }));
                        model.clear();
                    } else {
                        prop_assert_eq!(found, None);
                    }
                }
                Step::Reload => {
                    let text = serde_json::to_string(&state).unwrap();
                    let loaded: Processed = serde_json::from_str(&text).unwrap();
                    prop_assert_eq!(&loaded, &state);
                }
            }
            prop_assert!(state.is_valid());
            for seq in 1..70 {
                prop_assert_eq!(state.contains(seq), model.contains(&seq), "seq {}", seq);
            }
        }
    }
}

#[test]
fn a_late_message_below_processed_ones_is_new() {
    let mut state = Processed::begin(&inbox("a", 3, 10));
    for seq in [5, 6, 9] {
        state.insert(seq);
    }
    assert!(!state.contains(4));
    assert!(!state.contains(8));
    state.insert(4);
    assert_eq!(state.floor(), 6);
}

#[test]
fn the_number_of_ranges_is_bounded_and_forgetting_repeats_instead_of_losing() {
    let mut state = Processed::begin(&inbox("a", 0, 0));
    for seq in 1..=MAX_RANGES as u64 + 10 {
        state.insert(seq * 2);
    }
    assert_eq!(state.ranges.len(), MAX_RANGES);
    assert!(!state.contains(2));
    assert!(state.contains(MAX_RANGES as u64 * 2));
}
