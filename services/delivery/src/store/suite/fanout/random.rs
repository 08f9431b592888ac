//! Random joins, leaves, publications, steps and crashes, beside a model of who gets what.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

/// A random operation; channels, users and callers are numbers.
#[derive(Debug, Clone)]
pub(crate) enum Operation {
    Join(u8, Vec<u8>),
    Leave(u8, Vec<u8>),
    /// Channel, dedupe key (0 for none), body.
    Publish(u8, u8, u8),
    Claim(usize),
    /// Takes a step with a turn, told by its place among all that were ever given; whether the next turn is kept, or lost
    /// with the answer.
    Apply(usize, usize, bool),
    /// A message to a user.
    Send(u8),
    /// Acks the oldest of a user's messages.
    Ack(u8, u64),
    Advance(u64),
    Sweep,
    Reopen,
}

fn users() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::btree_set(0..5_u8, 1..4).prop_map(|users| users.into_iter().collect())
}

pub(crate) fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let operation = prop_oneof![
        4 => (0..2_u8, users()).prop_map(|(channel, users)| Operation::Join(channel, users)),
        2 => (0..2_u8, users()).prop_map(|(channel, users)| Operation::Leave(channel, users)),
        4 => (0..2_u8, 0..3_u8, 0..3_u8).prop_map(|(channel, key, body)| Operation::Publish(channel, key, body)),
        4 => (1..3_usize).prop_map(Operation::Claim),
        8 => (any::<usize>(), 1..4_usize, prop::bool::weighted(0.8))
            .prop_map(|(turn, limit, kept)| Operation::Apply(turn, limit, kept)),
        1 => (0..5_u8).prop_map(Operation::Send),
        2 => (0..5_u8, 1..6_u64).prop_map(|(user, count)| Operation::Ack(user, count)),
        3 => prop_oneof![5 => 0..40_u64, 1 => 0..100_000_u64].prop_map(Operation::Advance),
        1 => Just(Operation::Sweep),
        1 => Just(Operation::Reopen),
    ];
    prop::collection::vec(operation, 1..60)
}

/// A publication, and who is to get it.
struct Kept {
    publication: Publication,
    users: BTreeSet<u8>,
    body: u8,
}

#[derive(Default)]
struct Model {
    /// By channel; a publication's number is its place.
    members: BTreeMap<u8, BTreeSet<u8>>,
    publications: BTreeMap<u8, Vec<Kept>>,
    /// (channel, key) → the publication that it is of.
    keys: BTreeMap<(u8, u8), usize>,
    sent: BTreeMap<u8, u64>,
}

struct Pair<H> {
    harness: H,
    store: Option<Arc<dyn InboxStore>>,
    model: Model,
    turns: Vec<Turn>,
    next_id: u128,
}

fn channel(channel: u8) -> String {
    format!("channel-{channel}")
}

fn user(user: u8) -> String {
    format!("user-{user}")
}

fn all(users: &[u8]) -> Vec<String> {
    users.iter().map(|number| user(*number)).collect()
}

/// Runs random operations on a store and on the model.
pub(crate) async fn agrees_with_the_model<H: Harness>(mut harness: H, operations: Vec<Operation>) {
    harness.set(Limits { max_unsettled: 6, ..Limits::default() });
    let store = Some(harness.reopen().await);
    let mut pair = Pair { harness, store, model: Model::default(), turns: Vec::new(), next_id: 0 };
    for operation in operations {
        pair.apply(operation).await;
    }
    // Whatever was left lying is finished by whoever comes next.
    pair.harness.clock().advance(Duration::from_micros(HOLD_US));
    apply_all(&**pair.store(), pair.harness.clock(), 2).await;
    pair.check(true).await;
}

impl<H: Harness> Pair<H> {
    fn store(&self) -> &Arc<dyn InboxStore> {
        self.store.as_ref().expect("it is open between operations")
    }

    fn id(&mut self) -> u128 {
        self.next_id += 1;
        self.next_id
    }

    async fn apply(&mut self, operation: Operation) {
        let clock = self.harness.clock().clone();
        match operation {
            Operation::Join(number, users) => {
                let joined = self.store().join(channel(number), all(&users), 100).await.unwrap();
                let members = self.model.members.entry(number).or_default();
                let changed = users.into_iter().filter(|user| members.insert(*user)).count() as u64;
                assert_eq!(joined, Membership { changed, members: members.len() as u64 });
            }
            Operation::Leave(number, users) => {
                let left = self.store().leave(channel(number), all(&users)).await.unwrap();
                let members = self.model.members.entry(number).or_default();
                let changed = users.into_iter().filter(|user| members.remove(user)).count() as u64;
                assert_eq!(left, Membership { changed, members: members.len() as u64 });
            }
            Operation::Publish(number, key, body) => self.publish(number, key, body).await,
            Operation::Claim(limit) => {
                let now_us = clock.now_us();
                let turns = self.store().claim_publications(now_us, now_us + HOLD_US, limit).await.unwrap();
                assert!(turns.len() <= limit);
                self.turns.extend(turns);
            }
            Operation::Apply(place, limit, kept) if !self.turns.is_empty() => {
                let turn = self.turns[place % self.turns.len()].clone();
                let until_us = clock.now_us() + HOLD_US;
                let applied = self.store().apply(turn, until_us, limit).await.unwrap();
                if let Applied::More(next, _) = applied
                    && kept
                {
                    self.turns.push(next);
                }
            }
            Operation::Apply(..) => {}
            Operation::Send(number) => {
                let id = self.id();
                let sent =
                    self.store().append(vec![message(&user(number), id, "sent", "", &clock)]).await.remove(0);
                *self.model.sent.entry(number).or_default() += u64::from(sent.is_ok());
            }
            Operation::Ack(number, count) => {
                let page = read_all(&**self.store(), &user(number)).await;
                let up_to = page.messages.iter().take(count as usize).map(|message| message.seq).max();
                let range = up_to.map(|to| (1, to));
                let ack = settle(&user(number), page.epoch, range.as_slice(), 0);
                self.store().ack(vec![ack]).await.remove(0).unwrap();
            }
            Operation::Advance(seconds) => clock.advance(Duration::from_secs(seconds)),
            Operation::Sweep => drop(self.store().sweep(clock.now_us(), 100).await.unwrap()),
            Operation::Reopen => {
                self.store = None;
                self.store = Some(self.harness.reopen().await);
            }
        }
        self.check(false).await;
    }

    async fn publish(&mut self, number: u8, key: u8, body: u8) {
        let clock = self.harness.clock().clone();
        let text = if key == 0 { String::new() } else { format!("key-{key}") };
        let publication = Publication {
            channel: channel(number),
            ..publication(self.id(), &format!("body-{body}"), &text, &clock)
        };
        let answer = self.store().publish_durable(publication.clone()).await;
        let members = self.model.members.entry(number).or_default().clone();
        let publications = self.model.publications.entry(number).or_default();
        let count = members.len() as u64;
        let window_us = DEDUPE_WINDOW.as_micros() as u64;
        let first = self.model.keys.get(&(number, key)).map(|place| (place, &publications[*place]));
        let first =
            first.filter(|(_, first)| key != 0 && first.publication.time_us + window_us >= clock.now_us());
        match first {
            Some((place, first)) if first.body == body => {
                let (number, message_id) = (*place as u64 + 1, first.publication.message_id);
                assert_eq!(answer, Ok(Numbered { number, message_id, duplicate: true, members: count }));
            }
            Some(_) => assert!(matches!(answer, Err(PublicationError::AlreadyExists { .. })), "{answer:?}"),
            None => {
                let (message_id, place) = (publication.message_id, publications.len());
                let expected =
                    Numbered { number: place as u64 + 1, message_id, duplicate: false, members: count };
                assert_eq!(answer, Ok(expected));
                publications.push(Kept { publication, users: members, body });
                self.model.keys.insert((number, key), place);
            }
        }
    }

    /// Everybody has what is meant for them, once, and of each channel in the order of the numbers; when `all`, all of it.
    async fn check(&self, all: bool) {
        let week_us = RECEIPT_RETENTION.as_micros() as u64;
        for number in 0..5_u8 {
            let mut count = self.model.sent.get(&number).copied().unwrap_or(0);
            for publications in self.model.publications.values() {
                let (mut last, mut ended) = (0, false);
                for kept in publications {
                    let id = member_message_id(kept.publication.message_id, &user(number));
                    let found = self.store().lookup(user(number), id).await.unwrap();
                    if !kept.users.contains(&number) {
                        assert_eq!(found, None);
                        continue;
                    }
                    match found {
                        Some(receipt) => {
                            assert!(!ended && receipt.seq > last, "{receipt:?} after {last}");
                            last = receipt.seq;
                            count += 1;
                        }
                        // Its record is gone, or it is still to come; and so are those after it.
                        None if kept.publication.time_us + week_us < self.harness.clock().now_us() => {
                            return;
                        }
                        None => {
                            assert!(!all, "{} lacks {:?}", user(number), kept.publication);
                            ended = true;
                        }
                    }
                }
            }
            let page = read_all(&**self.store(), &user(number)).await;
            assert_eq!(page.head, count, "each once");
            for message in page.messages {
                assert!(message.payload.is_some());
            }
        }
        assert_eq!(audit::audit_all(&**self.store()).await.1, []);
        if all {
            assert_eq!(backlog(&**self.store()).await, (0, None));
        }
    }
}
