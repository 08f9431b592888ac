use proptest::prelude::*;

use super::*;

fn key(index: u32) -> ConnKey {
    ConnKey { shard: 0, index, generation: 1 }
}

fn top(epoch: &str, offset: u64) -> Top {
    Top { epoch: epoch.into(), offset }
}

fn publication(epoch: &str, offset: u64) -> Arc<Publication> {
    Arc::new(Publication { channel: "a".into(), epoch: epoch.into(), offset, ..Publication::default() })
}

fn found(epoch: &str, offsets: std::ops::RangeInclusive<u64>) -> Found {
    Found { publications: offsets.map(|offset| publication(epoch, offset)).collect(), lost: false }
}

fn answers(next: &[(Top, Next)]) -> Vec<(u32, Option<Vec<u64>>)> {
    let mut answers = Vec::new();
    for (_, step) in next {
        let Next::Answer { seekers, missed } = step else { continue };
        let offsets = missed.as_ref().map(|missed| missed.iter().map(|one| one.offset).collect::<Vec<_>>());
        answers.extend(seekers.iter().map(|(key, _)| (key.index, offsets.clone())));
    }
    answers
}

fn reads(next: &[(Top, Next)]) -> Vec<u64> {
    let read = |(_, step): &(Top, Next)| match step {
        Next::Read(from) => Some(from.offset),
        Next::Answer { .. } => None,
    };
    next.iter().filter_map(read).collect()
}

#[test]
fn one_read_serves_all_who_go_on_from_a_position() {
    let mut recovering = Recovering::default();
    recovering.add(top("e", 3), key(0), 1);
    assert_eq!(reads(&recovering.advance(&top("e", 5))), [3]);
    recovering.add(top("e", 3), key(1), 9);
    recovering.add(top("e", 5), key(2), 1);
    recovering.add(top("f", 5), key(3), 1);
    let mut next = answers(&recovering.advance(&top("e", 5)));
    next.sort();
    assert_eq!(next, [(2, Some(vec![])), (3, None)], "nothing was missed; another epoch");
    recovering.found(&top("e", 3), 3, &found("e", 4..=7));
    // Of what was read, members have only a part; the rest follows as it comes.
    assert_eq!(answers(&recovering.advance(&top("e", 5))), [(0, Some(vec![4, 5])), (1, Some(vec![4, 5]))]);
    assert!(recovering.is_empty());
}

#[test]
fn who_is_taken_out_is_not_answered_and_the_others_are() {
    let mut recovering = Recovering::default();
    recovering.add(top("e", 3), key(0), 7);
    recovering.add(top("e", 3), key(1), 8);
    assert_eq!(reads(&recovering.advance(&top("e", 4))), [3]);
    assert_eq!(
        (recovering.cancel(key(0)), recovering.cancel(key(0)), recovering.cancel(key(5))),
        (Some(7), None, None)
    );
    recovering.found(&top("e", 3), 3, &found("e", 4..=4));
    assert_eq!(answers(&recovering.advance(&top("e", 4))), [(1, Some(vec![4]))]);
    recovering.add(top("e", 3), key(2), 9);
    assert_eq!(recovering.cancel(key(2)), Some(9));
    assert!(recovering.is_empty(), "the last takes its search with it");
}

#[test]
fn what_came_since_the_read_is_added_and_a_hole_is_read_on() {
    let mut recovering = Recovering::default();
    recovering.add(top("e", 3), key(0), 1);
    recovering.advance(&top("e", 3 + 1));
    recovering.note(&publication("e", 5));
    recovering.note(&publication("e", 6));
    recovering.found(&top("e", 3), 3, &found("e", 4..=4));
    assert_eq!(answers(&recovering.advance(&top("e", 6))), [(0, Some(vec![4, 5, 6]))]);

    recovering.add(top("e", 3), key(0), 1);
    recovering.advance(&top("e", 6));
    // A gap: members were not handed 7, and neither is it at hand here.
    recovering.note(&publication("e", 8));
    recovering.found(&top("e", 3), 3, &found("e", 4..=6));
    assert_eq!(reads(&recovering.advance(&top("e", 8))), [6]);
    recovering.found(&top("e", 3), 6, &found("e", 7..=8));
    assert_eq!(answers(&recovering.advance(&top("e", 8))), [(0, Some(vec![4, 5, 6, 7, 8]))]);
}

#[test]
fn who_is_ahead_of_this_shard_waits_until_it_is_there() {
    let mut recovering = Recovering::default();
    recovering.add(top("e", 5), key(0), 1);
    assert_eq!(reads(&recovering.advance(&top("e", 4))), [5], "whether there is such a position");
    recovering.found(&top("e", 5), 5, &found("e", 6..=6));
    assert_eq!(recovering.advance(&top("e", 4)), []);
    recovering.note(&publication("e", 5));
    assert_eq!(answers(&recovering.advance(&top("e", 5))), [(0, Some(vec![]))], "6 is still on its way");
    recovering.add(top("e", 9), key(0), 1);
    recovering.advance(&top("e", 5));
    recovering.found(&top("e", 9), 9, &Found::lost());
    assert_eq!(answers(&recovering.advance(&top("e", 5))), [(0, None)]);
}

#[test]
fn a_channel_that_outruns_its_reads_is_given_up() {
    let mut recovering = Recovering::default();
    recovering.add(top("e", 0), key(0), 1);
    let mut reached = 0;
    for round in 0..10 {
        let next = recovering.advance(&top("e", 100 * (round + 1)));
        if reads(&next).is_empty() {
            assert_eq!((answers(&next), round), (vec![(0, None)], u64::from(MAX_READS)));
            return;
        }
        recovering.found(&top("e", 0), reached, &found("e", reached + 1..=reached + 50));
        reached += 50;
    }
    panic!("it goes on for ever");
}

#[test]
fn recent_publications_are_bounded() {
    let mut recovering = Recovering::default();
    recovering.add(top("e", 0), key(0), 1);
    (1..=3_000).for_each(|offset| recovering.note(&publication("e", offset)));
    assert_eq!(recovering.recent.len(), MAX_RECENT);
    recovering.note(&publication("f", 1));
    assert_eq!(recovering.recent.len(), 1, "those of another epoch are of no use");
}

/// What happens around a shard.
#[derive(Debug, Clone)]
enum Step {
    /// The registry assigns so many offsets.
    Publish(u8),
    /// The shard is handed the next one, or a gap over so many.
    Hand(u8),
    /// The oldest that is kept goes.
    Trim(u8),
    /// A new epoch.
    Begin,
    /// Somebody goes on from so far below the registry's top; perhaps in the epoch before.
    Seek(u8, bool),
    /// The oldest read is answered, as things are now or, when it is `late`, as they were when it was asked.
    Answer { late: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..4_u8).prop_map(Step::Publish),
        6 => prop_oneof![5 => Just(1_u8), 1 => 2..5_u8].prop_map(Step::Hand),
        1 => (1..4_u8).prop_map(Step::Trim),
        1 => Just(Step::Begin),
        4 => (0..8_u8, prop::bool::weighted(0.1)).prop_map(|(back, former)| Step::Seek(back, former)),
        5 => any::<bool>().prop_map(|late| Step::Answer { late }),
    ]
}

#[derive(Default)]
struct World {
    recovering: Recovering,
    epoch: u64,
    registry: u64,
    oldest: u64,
    handed: u64,
    asked: VecDeque<(Top, u64, Found)>,
    /// Where each seeker stood.
    seekers: HashMap<u32, Top>,
    recovered: usize,
}

impl World {
    fn top(&self) -> Top {
        top(&format!("e{}", self.epoch), self.handed)
    }

    fn read(&self, since: &Top, from: u64) -> Found {
        let here = *since.epoch == *self.top().epoch && from <= self.registry && from + 1 >= self.oldest;
        match here {
            true => found(&since.epoch, from + 1..=self.registry),
            false => Found::lost(),
        }
    }

    fn advance(&mut self) -> Result<(), TestCaseError> {
        for (since, next) in self.recovering.advance(&self.top()) {
            match next {
                Next::Read(from) => {
                    let as_it_is = self.read(&since, from.offset);
                    self.asked.push_back((since, from.offset, as_it_is));
                }
                Next::Answer { seekers, missed } => {
                    for (key, _) in seekers {
                        let stood = self.seekers.remove(&key.index).expect("each is answered once");
                        prop_assert_eq!(&stood, &since);
                        let Some(missed) = &missed else { continue };
                        let offsets: Vec<_> = missed.iter().map(|one| one.offset).collect();
                        // Exactly what lies between where it stood and what members have.
                        prop_assert_eq!(&*since.epoch, &*self.top().epoch);
                        prop_assert_eq!(offsets, (since.offset + 1..=self.handed).collect::<Vec<_>>());
                        prop_assert!(missed.iter().all(|one| *one.epoch == *since.epoch));
                        self.recovered += 1;
                    }
                }
            }
        }
        Ok(())
    }
}

proptest! {
    /// Whatever is published, lost on the way, trimmed and begun anew while somebody recovers: it gets all that it missed,
    /// or nothing and is told so.
    #[test]
    fn nobody_gets_a_part(steps in prop::collection::vec(step(), 1..120)) {
        let mut world = World { oldest: 1, ..World::default() };
        for (at, step) in (0..).zip(steps) {
            match step {
                Step::Publish(count) => world.registry += u64::from(count),
                Step::Hand(count) => {
                    let to = (world.handed + u64::from(count)).min(world.registry);
                    if to > world.handed {
                        world.handed = to;
                        if !world.recovering.is_empty() {
                            world.recovering.note(&publication(&world.top().epoch, to));
                        }
                    }
                }
                Step::Trim(count) => world.oldest = (world.oldest + u64::from(count)).min(world.registry + 1),
                Step::Begin => {
                    world.epoch += 1;
                    (world.registry, world.handed, world.oldest) = (0, 0, 1);
                }
                Step::Seek(back, former) => {
                    let epoch = if former { world.epoch.saturating_sub(1) } else { world.epoch };
                    let since = top(&format!("e{epoch}"), world.registry.saturating_sub(back.into()));
                    world.seekers.insert(at, since.clone());
                    world.recovering.add(since, key(at), 1);
                }
                Step::Answer { late } => {
                    if let Some((since, from, as_it_was)) = world.asked.pop_front() {
                        let answer = if late { as_it_was } else { world.read(&since, from) };
                        world.recovering.found(&since, from, &answer);
                    }
                }
            }
            world.advance()?;
        }
        // Everything arrives in the end, and then everybody has an answer.
        while world.handed < world.registry || !world.asked.is_empty() {
            if world.handed < world.registry {
                world.handed += 1;
                world.recovering.note(&publication(&world.top().epoch, world.handed));
            }
            if let Some((since, from, _)) = world.asked.pop_front() {
                let answer = world.read(&since, from);
                world.recovering.found(&since, from, &answer);
            }
            world.advance()?;
        }
        prop_assert!(world.seekers.is_empty() && world.recovering.is_empty(), "{:?}", world.seekers);
    }
}
