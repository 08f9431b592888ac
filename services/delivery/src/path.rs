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
    router::Router,
    store::{InboxStore, Receipt},
};

/// Of how many recent messages the user is remembered.
const MAX_KNOWN: usize = 65_536;

/// This service's name in milestones.
pub(crate) const SERVICE: &str = "delivery";

/// Which user a recent message belongs to: a milestone names the message alone, but the store is asked by user.
#[derive(Default)]
pub(crate) struct Recipients(Mutex<Known>);

#[derive(Default)]
struct Known {
    users: HashMap<Uuid, Arc<str>>,
    order: VecDeque<Uuid>,
}

impl Recipients {
    /// Remembers whose message this is; the oldest of [`MAX_KNOWN`] is forgotten.
    pub(crate) fn learn(&self, message_id: Uuid, user: &Arc<str>) {
        let mut known = self.0.lock();
        if known.users.insert(message_id, user.clone()).is_none() {
            known.order.push_back(message_id);
        }
        if known.order.len() > MAX_KNOWN
            && let Some(oldest) = known.order.pop_front()
        {
            known.users.remove(&oldest);
        }
    }

    fn of(&self, message_id: Uuid) -> Option<Arc<str>> {
        self.0.lock().users.get(&message_id).cloned()
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
                Ok(Some(receipt)) => add_receipt(&mut path.milestones, message_id, &user, &receipt),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(%error, "the store was not asked for a trace");
                    path.missing.push("store".to_owned());
                }
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
    add("accepted", receipt.accepted_us, recipient(user, receipt.seq));
    if receipt.state == crate::message::State::Acked {
        add("acked", receipt.settled_us, recipient(user, receipt.seq));
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
            recipients.learn(Uuid::from_u128(id), &user);
            recipients.learn(Uuid::from_u128(id), &user);
        }
        assert_eq!(recipients.of(Uuid::from_u128(0)), None);
        assert_eq!(recipients.of(Uuid::from_u128(1)), Some(user));
        let known = recipients.0.lock();
        assert_eq!((known.users.len(), known.order.len()), (MAX_KNOWN, MAX_KNOWN));
    }
}
