//! The way of a message: what this node, the edges and the router remember of it, and what the store knows.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use sanjay_proto::edge::v1::Milestone;
use sanjay_runtime::milestones::MilestoneRing;
use uuid::Uuid;

use crate::{
    message::State,
    router::Router,
    store::{DeadLetter, Failure, InboxStore, Receipt, StoreError},
};

/// Of how many recent messages the user is remembered.
const MAX_KNOWN: usize = 65_536;

/// This service's name in milestones.
pub(crate) const SERVICE: &str = "delivery";

/// Where recent messages are: a milestone names the message alone, but the store is asked by user, and a failed attempt
/// names user and seq.
#[derive(Default)]
pub(crate) struct Recipients(Mutex<Known>);

/// A user and a seq in its inbox.
type Place = (Arc<str>, u64);

#[derive(Default)]
struct Known {
    places: HashMap<Uuid, Place>,
    ids: HashMap<Place, Uuid>,
    order: VecDeque<Uuid>,
}

impl Recipients {
    /// Remembers where this message is; the oldest of [`MAX_KNOWN`] is forgotten.
    pub(crate) fn learn(&self, message_id: Uuid, user: &Arc<str>, seq: u64) {
        let mut known = self.0.lock();
        if known.places.contains_key(&message_id) {
            return;
        }
        let place = (user.clone(), seq);
        known.ids.insert(place.clone(), message_id);
        known.places.insert(message_id, place);
        known.order.push_back(message_id);
        if known.order.len() > MAX_KNOWN
            && let Some(oldest) = known.order.pop_front()
            && let Some(place) = known.places.remove(&oldest)
        {
            // A database that was put back gives seqs out anew.
            if known.ids.get(&place) == Some(&oldest) {
                known.ids.remove(&place);
            }
        }
    }

    /// The message at this place, when it is remembered.
    pub(crate) fn at(&self, user: &Arc<str>, seq: u64) -> Option<Uuid> {
        self.0.lock().ids.get(&(user.clone(), seq)).copied()
    }

    fn of(&self, message_id: Uuid) -> Option<Arc<str>> {
        self.0.lock().places.get(&message_id).map(|(user, _)| user.clone())
    }
}

/// What is known of a message's way.
#[derive(Debug, Default)]
pub(crate) struct Path {
    /// In ascending time.
    pub(crate) milestones: Vec<Milestone>,
    /// Who could not be asked.
    pub(crate) missing: Vec<String>,
}

/// Collects what is known of messages' ways.
#[derive(Clone)]
pub(crate) struct Paths {
    pub(crate) ring: Arc<MilestoneRing>,
    pub(crate) recipients: Arc<Recipients>,
    pub(crate) store: Arc<dyn InboxStore>,
    pub(crate) router: Router,
}

impl Paths {
    /// Asks everybody. What happened before a restart of this node comes from the store.
    pub(crate) async fn of(&self, message_id: Uuid) -> Path {
        let mut path = Path { milestones: self.ring.of(message_id.as_bytes()), missing: Vec::new() };
        let (more, complete) = self.router.trace(message_id.as_bytes()).await;
        path.milestones.extend(more);
        if !complete {
            path.missing.push("router".to_owned());
        }
        if let Some(user) = self.recipients.of(message_id) {
            match self.store.lookup(user.to_string(), message_id).await {
                Ok(Some(receipt)) => {
                    add_receipt(&mut path.milestones, message_id, &user, &receipt);
                    if receipt.state == State::Dead {
                        self.add_letter(&mut path, user.to_string(), message_id).await;
                    }
                }
                Ok(None) => {}
                Err(error) => not_asked(&mut path, &error),
            }
        }
        path.milestones.sort_by(|a, b| {
            let key = |m: &Milestone| (m.time_us, m.service.clone(), m.stage.clone(), m.detail.clone());
            key(a).cmp(&key(b))
        });
        // A newer edge may report to the router and to this node.
        path.milestones.dedup();
        path
    }

    /// Adds the failed attempts of a dead message.
    async fn add_letter(&self, path: &mut Path, user: String, message_id: Uuid) {
        match self.store.dead_letter(user, message_id).await {
            Ok(Some(letter)) => add_failures(&mut path.milestones, &letter),
            Ok(None) => {}
            Err(error) => not_asked(path, &error),
        }
    }
}

fn not_asked(path: &mut Path, error: &StoreError) {
    tracing::debug!(%error, "the store was not asked for a trace");
    path.missing.push("store".to_owned());
}

/// How a milestone tells a failed attempt.
pub(crate) fn attempt(failure: &Failure) -> String {
    let Failure { delivery, kind, reason, .. } = failure;
    let kind = kind.as_str();
    if reason.is_empty() {
        format!("delivery {delivery}, {kind}")
    } else {
        format!("delivery {delivery}, {kind}: {reason}")
    }
}

/// Adds the failed attempts of a dead message that the ring has forgotten.
fn add_failures(milestones: &mut Vec<Milestone>, letter: &DeadLetter) {
    for failure in &letter.failures {
        let detail = attempt(failure);
        let failed = |m: &Milestone| m.service == SERVICE && m.stage == "failed" && m.detail == detail;
        if !milestones.iter().any(failed) {
            milestones.push(Milestone {
                message_id: letter.message_id.as_bytes().to_vec().into(),
                time_us: failure.time_us,
                service: SERVICE.to_owned(),
                stage: "failed".to_owned(),
                detail,
            });
        }
    }
}

/// Adds what the store knows and the ring has forgotten.
fn add_receipt(milestones: &mut Vec<Milestone>, message_id: Uuid, user: &str, receipt: &Receipt) {
    let mut add = |stage: &str, time_us: u64, detail: String| {
        if !milestones.iter().any(|milestone| milestone.service == SERVICE && milestone.stage == stage) {
            milestones.push(Milestone {
                message_id: message_id.as_bytes().to_vec().into(),
                time_us,
                service: SERVICE.to_owned(),
                stage: stage.to_owned(),
                detail,
            });
        }
    };
    if receipt.state == State::Scheduled {
        return add(receipt.state.as_str(), receipt.accepted_us, format!("user {user}"));
    }
    add("accepted", receipt.accepted_us, recipient(user, receipt.seq));
    if receipt.state.is_terminal() {
        add(receipt.state.as_str(), receipt.settled_us, recipient(user, receipt.seq));
    }
}

/// How a milestone names a message's place.
pub(crate) fn recipient(user: &str, seq: u64) -> String {
    format!("user {user}, seq {seq}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipients_are_bounded() {
        let recipients = Recipients::default();
        let user: Arc<str> = Arc::from("bob");
        for id in 0..=MAX_KNOWN as u128 {
            recipients.learn(Uuid::from_u128(id), &user, id as u64);
            recipients.learn(Uuid::from_u128(id), &user, id as u64);
        }
        assert_eq!((recipients.of(Uuid::from_u128(0)), recipients.at(&user, 0)), (None, None));
        assert_eq!(recipients.at(&user, 1), Some(Uuid::from_u128(1)));
        assert_eq!(recipients.of(Uuid::from_u128(1)), Some(user));
        let known = recipients.0.lock();
        assert_eq!(
            (known.places.len(), known.ids.len(), known.order.len()),
            (MAX_KNOWN, MAX_KNOWN, MAX_KNOWN)
        );
    }
}
