//! Who hears of what a store has made durable.

use super::{Appended, DeadReason, LoggedReceipt, NewMessage, SettledMessage};
use crate::message::State;

/// Hears of each new message once it is durable, before its sender does.
pub trait CommitSink: Send + Sync + 'static {
    /// A message was committed. Called in ascending seq per user, for duplicates not at all, on a thread that
    /// the next commit waits for: it must neither block nor take long.
    fn committed(&self, message: &NewMessage, appended: &Appended);

    /// A message was settled as expired or superseded, or as acked because a device was forgotten that it waited for,
    /// durably. A hint: a crash may keep it from being called. It must
    /// neither block nor take long.
    fn ended(&self, user: &str, message: &SettledMessage, state: State);

    /// So many messages become dead letters for a reason that no client reported, durably. A hint like [`Self::ended`].
    fn died(&self, reason: DeadReason, count: usize);

    /// Messages of the inbox with this epoch were settled without an ack, durably: clients that have them need not answer
    /// any more. A hint like [`Self::ended`], beside that and [`Self::died`].
    fn gone(&self, _user: &str, _epoch: u64, _seqs: &[u64]) {}

    /// Whether somebody wants to hear what the next two tell; else they are not called.
    fn watches(&self) -> bool {
        false
    }

    /// A message was settled, durably, in whatever way. A hint like [`Self::ended`].
    fn settled(&self, _: &LoggedReceipt) {}

    /// A message brought an inbox to four fifths of what it may hold, or beyond: so many unsettled messages, and bytes of
    /// their payloads. A hint like [`Self::ended`].
    fn filling(&self, _: &str, _: u64, _: u64) {}
}

/// Whether so much of a quota is held that its inbox is filling: four fifths or more.
pub(super) fn filling(held: u64, most: u64) -> bool {
    held >= most - most / 5
}

/// Ignores commits.
impl CommitSink for () {
    fn committed(&self, _: &NewMessage, _: &Appended) {}

    fn ended(&self, _: &str, _: &SettledMessage, _: State) {}

    fn died(&self, _: DeadReason, _: usize) {}
}
