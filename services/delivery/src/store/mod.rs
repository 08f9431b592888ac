//! The port to where inboxes live.
//!
//! Every adapter passes the suite in `suite.rs`. What callers may rely on:
//! - **Atomic.** A sequence number and its message become visible in one step: a number that was given out is a
//!   message that exists. A message is settled, its receipt written and its inbox's counters raised in one step.
//! - **Ordered.** The methods submit when they are called, not when the returned future is polled. Messages of
//!   one `append`, and of appends that one task calls one after the other, get ascending numbers per user.
//! - **Dead letters.** From when it is noted what ends a message (a failure, a full inbox, its time), nothing but a dead letter becomes of it: no
//!   reader gets it, and no ack counts. Its letter is there before it is settled as dead; what a crash leaves between the
//!   two is finished by the next claim, or by the next ack in its inbox.
//! - **Idempotent.** Settling what is settled changes nothing. Appending again with a dedupe key gives the first
//!   answer.
//! - **Bounded.** Submitting never waits; a store with too much to do answers [`StoreError::Busy`].
//! - **Unknown outcomes.** After [`StoreError::Unavailable`] an append may have happened or not; repeating it
//!   with the same dedupe key is safe.

mod attempts;
mod audit;
mod dead;
mod devices;
#[cfg(test)]
mod doubles;
mod due;
mod epoch;
mod errors;
mod fanout;
mod location;
pub mod mongodb;
mod opening;
mod receipts;
pub mod redb;
mod revocations;
mod settled;
mod sink;
#[cfg(test)]
pub(crate) mod suite;

use std::{sync::Arc, time::Duration};

pub use attempts::{Attempts, Failure, FailureKind, MAX_FAILED, MAX_FAILURES, Verdict};
pub use audit::{AuditPage, Finding};
pub use dead::{DeadFilter, DeadLetter, DeadPage, DeadPosition, DeadReason};
pub use devices::{Devices, FORGET_AFTER, Forgotten, Known, MAX_DEVICES, RegisterError, SEEN_EVERY};
#[cfg(test)]
pub(crate) use doubles::{knows_no_devices, schedules_nothing};
pub use errors::{AppendError, Overflow, Quota, StoreError};
#[cfg(test)]
pub(crate) use fanout::fans_out_nothing;
pub use fanout::{
    Applied, Backlog, JoinError, MAX_APPLIED_BYTES, MAX_MEMBERS_PAGE, MAX_UNFINISHED, Membership, Numbered,
    Publication, PublicationError, Turn, member_message_id,
};
use futures::future::BoxFuture;
pub use location::{Database, Location, LocationError};
pub use opening::{OpenError, StoreOptions, open};
#[cfg(test)]
pub(crate) use receipts::logs_nothing;
pub use receipts::{
    DeliveriesPage, DeliveriesQuery, ListedDelivery, LogError, LogPage, LogPosition, LogStart, LoggedReceipt,
    MAX_DELIVERIES, MAX_LOG_PAGE,
};
#[cfg(test)]
pub(crate) use revocations::revokes_nothing;
pub use revocations::{MAX_REVOCATIONS_PAGE, Revocation, Subject};
use sanjay_proto::client::v1::{InboxMessage, Payload, SeqRange};
use sanjay_runtime::clock::SharedClock;
pub use settled::{Settled, TooManyRanges};
pub use sink::CommitSink;
use sink::filling;
use uuid::Uuid;

use crate::message::State;

/// Most settled ranges above an inbox's mark: the inbox's record stays small, and with at most 256 messages in
/// flight on a connection a well-behaved client does not come near it.
pub const MAX_SETTLED_RANGES: usize = 256;

/// Most messages of one page.
pub const MAX_PAGE_MESSAGES: usize = 256;

/// Most bytes of one page, unless its first message alone is larger.
pub const MAX_PAGE_BYTES: usize = 1024 * 1024;

/// Most bytes of all the pages of one `read`, so that they fit one gRPC message of 4 MiB.
pub const MAX_READ_BYTES: usize = 3 * 1024 * 1024;

/// How long a dedupe key is remembered.
pub const DEDUPE_WINDOW: Duration = Duration::from_secs(24 * 60 * 60);

/// How long the receipt of a settled message is kept.
pub const RECEIPT_RETENTION: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Most unsettled messages of one inbox that have a collapse key.
pub const MAX_COLLAPSE_KEYS: usize = 256;

/// Most messages of one user that wait for their time.
pub const MAX_SCHEDULED: usize = 1_000;

/// How long after its commit a message waits for an edge to report it written before it is relayed again.
pub const FIRST_DUE: Duration = Duration::from_secs(2);

/// A message to put into one user's inbox.
#[derive(Debug, Clone, Default)]
pub struct NewMessage {
    /// Whose inbox.
    pub user: String,
    /// The back end that sends; scopes `dedupe_key`.
    pub caller: String,
    /// UUID v7.
    pub message_id: Uuid,
    /// The body, shared by all messages of one send.
    pub payload: Arc<Payload>,
    /// Empty for none.
    pub dedupe_key: String,
    /// When the message was accepted, Unix time in microseconds.
    pub time_us: u64,
    /// W3C `traceparent`, or empty.
    pub trace: String,
    /// From when on no reader gets it any more, Unix time in microseconds; 0 for never.
    pub expires_us: u64,
    /// It takes the place of the caller's unsettled message with the same key in this inbox. Empty for none.
    pub collapse_key: String,
    /// Of a member's message: the publication under whose id its payload is stored once. Such a message is taken also
    /// when the inbox has no room for it, and becomes a dead letter in the same step then; with too many messages that
    /// failed it stays, beyond the quota.
    pub shared: Option<Uuid>,
}

/// A message that waits outside the inbox for its time.
#[derive(Debug, Clone)]
pub struct Scheduled {
    /// Its message; `expires_us` counts as everywhere.
    pub message: NewMessage,
    /// When it is to be appended, Unix time in microseconds.
    pub deliver_us: u64,
}

/// The answer to one scheduled message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduledAt {
    /// Id under which the message is stored: of the first one when this is a duplicate.
    pub message_id: Uuid,
    /// When it is to be appended, Unix time in microseconds. Of a duplicate whose first message was appended, or that
    /// was never scheduled: 0.
    pub deliver_us: u64,
    /// Whether an earlier message with the same dedupe key was the one that was accepted.
    pub duplicate: bool,
    /// When the stored message was accepted, Unix time in microseconds.
    pub time_us: u64,
}

/// The answer to one appended message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// Position in the inbox, from 1, without gaps.
    pub seq: u64,
    /// Id under which the message is stored: of the first one when this is a duplicate.
    pub message_id: Uuid,
    /// Epoch of the inbox.
    pub epoch: u64,
    /// Whether an earlier message with the same dedupe key was the one that was accepted.
    pub duplicate: bool,
    /// When the stored message was accepted, Unix time in microseconds.
    pub time_us: u64,
}

/// What to read of one inbox.
#[derive(Debug, Clone)]
pub struct InboxQuery {
    /// Whose inbox.
    pub user: String,
    /// Return unsettled messages above it; `None` means from the mark.
    pub after: Option<u64>,
    /// At most so many messages, bounded to [`MAX_PAGE_MESSAGES`]; 0 reads the head alone.
    pub limit: usize,
    /// When not empty: return those of these seqs that are unsettled, ascending and also when they wait for their next
    /// attempt, as far as a page has room; `after` and `limit` do not matter, and `covers` says nothing.
    pub only: Vec<u64>,
    /// Where each device has to ack a message: for which one this is. It gets what it has not acked, and its own mark.
    pub device: Option<String>,
}

impl InboxQuery {
    /// [`InboxQuery::only`], ascending and each once.
    fn only_seqs(&self) -> Vec<u64> {
        let mut seqs = self.only.clone();
        seqs.sort_unstable();
        seqs.dedup();
        seqs
    }
}

/// Part of an inbox.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Page {
    /// Of the inbox; for a user without one, the epoch that its first message will have.
    pub epoch: u64,
    /// Everything up to it is settled.
    pub mark: u64,
    /// The newest number that was given out; 0 before the first.
    pub head: u64,
    /// The head when all that is unsettled above `after` is in `messages`, else the last seq in it, or `after`
    /// when there is none because of a bound.
    pub covers: u64,
    /// Unsettled messages in ascending seq with the number of their newest delivery. One that waits for its next attempt
    /// is left out although `covers` may pass it: it comes by itself when it is due.
    pub messages: Vec<InboxMessage>,
    /// What is known of the query's device.
    pub device: Known,
    /// For a query of no device by [`InboxQuery::only`]: which devices have acked a message, where there are such.
    pub acked_by: Vec<(u64, Vec<String>)>,
}

/// What to settle and to note in one inbox.
#[derive(Debug, Clone, Default)]
pub struct Settle {
    /// Whose inbox.
    pub user: String,
    /// Epoch that `ranges` and `written` belong to; those of another epoch are ignored.
    pub epoch: u64,
    /// To settle as acked; parts that are settled or above the head are ignored.
    pub ranges: Vec<SeqRange>,
    /// Everything up to it was written to a socket of the user; 0 when there is nothing to note. A hint: it may
    /// be forgotten after a crash.
    pub written: u64,
    /// Redeliveries that were written to a socket, as (seq, delivery).
    pub rewritten: Vec<(u64, u32)>,
    /// Deliveries that failed. Applied after `ranges`.
    pub failed: Vec<Failure>,
    /// Where each device has to ack a message: which one says all this. One that is not registered is, when there is room,
    /// and is ignored otherwise. `ranges` are settled when every device has acked them, and what this one has acked fails
    /// no more.
    pub device: Option<String>,
}

/// What [`InboxStore::expire`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Expired {
    /// Messages that it settled as expired, or as dead where those are kept.
    pub settled: usize,
    /// Whether more may be due already.
    pub more: bool,
}

/// The answer to one [`Settle`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Acked {
    /// Everything up to it is settled.
    pub mark: u64,
    /// What this call settled, ascending; the first [`MAX_REPORTED`] of it.
    pub messages: Vec<SettledMessage>,
    /// How many ranges were refused because the inbox would have too many settled ranges above its mark. Their
    /// messages stay unsettled and are delivered again.
    pub refused: usize,
    /// Failures that were taken, with what follows for each message; those that were ignored are not among them.
    pub failed: Vec<(u64, Verdict)>,
}

/// Most messages that one [`Acked`] names.
pub const MAX_REPORTED: usize = 256;

/// A message that was just settled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettledMessage {
    /// Its position.
    pub seq: u64,
    /// Its id.
    pub message_id: Uuid,
    /// When it was accepted, Unix time in microseconds.
    pub accepted_us: u64,
    /// W3C `traceparent` that it was stored with, or empty.
    pub trace: String,
}

/// The durable record of a message's life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Receipt {
    /// Its position.
    pub seq: u64,
    /// Where it is in its life.
    pub state: State,
    /// Unix time in microseconds.
    pub accepted_us: u64,
    /// Unix time in microseconds; 0 while it is not settled.
    pub settled_us: u64,
}

/// An inbox with unwritten messages, claimed for redelivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DueInbox {
    /// Whose inbox.
    pub user: String,
    /// Its epoch.
    pub epoch: u64,
    /// Changes whenever something arms the inbox; [`Rearm::armed`] must give it back.
    pub armed: u64,
    /// How often it was relayed again since it was last armed afresh.
    pub attempt: u32,
    /// Everything up to it is settled or written.
    pub after: u64,
    /// Messages whose next attempt is due, as (seq, delivery), in ascending seq; at most [`MAX_RETRIES`].
    pub retries: Vec<(u64, u32)>,
    /// Whether all of it was written to some device: what is unwritten was missed by others, or these are away.
    pub missed: bool,
}

/// Most messages of one claim whose next attempt is due; others follow with the next claim.
pub const MAX_RETRIES: usize = 64;

/// What follows for a claimed inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rearm {
    /// Whose inbox.
    pub user: String,
    /// [`DueInbox::armed`] of the claim; the call does nothing for an inbox that was armed afresh since.
    pub armed: u64,
    /// When it is due again.
    pub next: Next,
}

/// When a claimed inbox is due again, unless the attempts of its messages make it due earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// At a time.
    At {
        /// Unix time in microseconds.
        due_us: u64,
        /// The attempt count to keep.
        attempt: u32,
    },
    /// Not before something arms it: its user is known to be offline. The messages of the claim's `retries` wait no
    /// longer; a reader gets them.
    Parked,
}

/// How much the store holds, for metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Inboxes.
    pub inboxes: u64,
    /// Unsettled messages.
    pub unsettled: u64,
    /// Inboxes that wait for redelivery.
    pub armed: u64,
    /// Dead letters, those that were sent again included.
    pub dead_letters: u64,
    /// Messages that wait for their time.
    pub scheduled: u64,
}

/// Where inboxes live. See the module's documentation for what holds for every method.
pub trait InboxStore: Send + Sync + 'static {
    /// Puts messages into inboxes, in order; the answers are in the same order. `Ok` means durable. A new
    /// message arms its inbox [`FIRST_DUE`] after the commit. What its collapse key replaces is settled as superseded in
    /// the same step, unless that is dying; the newest message of a key is the one that the next replaces.
    fn append(&self, messages: Vec<NewMessage>) -> BoxFuture<'static, Vec<Result<Appended, AppendError>>>;

    /// Reads parts of inboxes; the answers are in the order of the queries. Sees everything that `append` and
    /// `ack` answered before the call.
    fn read(&self, queries: Vec<InboxQuery>) -> BoxFuture<'static, Vec<Result<Page, StoreError>>>;

    /// Settles messages and notes what was written; the answers are in the order of the entries. `Ok` means
    /// that what was settled is durable.
    fn ack(&self, settles: Vec<Settle>) -> BoxFuture<'static, Vec<Result<Acked, StoreError>>>;

    /// The record of a message, also of one that waits for its time. `None` means that the user never had such a message, or that it was settled
    /// more than [`RECEIPT_RETENTION`] ago.
    fn lookup(
        &self,
        user: String,
        message_id: Uuid,
    ) -> BoxFuture<'static, Result<Option<Receipt>, StoreError>>;

    /// Arms inboxes that have unwritten messages and are not armed: something is on its way to their users. A
    /// hint that may be dropped.
    fn arm(&self, users: Vec<String>);

    /// Claims up to `limit` inboxes that are due at `now_us`, the longest due first, and makes them due again
    /// at `until_us`: a claim that nobody finishes comes back by itself. No two claims return one inbox within
    /// that time.
    fn claim_due(
        &self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<DueInbox>, StoreError>>;

    /// Says what follows for claimed inboxes.
    fn rearm(&self, rearms: Vec<Rearm>) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Dead letters that match, the newest first, above a page's end; at most `limit`, at least one.
    fn dead_letters(
        &self,
        filter: DeadFilter,
        after: Option<DeadPosition>,
        limit: usize,
    ) -> BoxFuture<'static, Result<DeadPage, StoreError>>;

    /// One dead letter with its payload.
    fn dead_letter(
        &self,
        user: String,
        message_id: Uuid,
    ) -> BoxFuture<'static, Result<Option<DeadLetter>, StoreError>>;

    /// Notes that a dead letter was sent again. `Ok(false)` when there is no such dead letter.
    fn redriven(
        &self,
        user: String,
        message_id: Uuid,
        sent_as: Uuid,
    ) -> BoxFuture<'static, Result<bool, StoreError>>;

    /// Removes dead letters, (user, message id) each; those that are not there count as not removed.
    fn purge(&self, letters: Vec<(String, Uuid)>) -> BoxFuture<'static, Result<u64, StoreError>>;

    /// Settles messages as expired whose time has passed at `now_us`: about `limit`, those first whose time passed first.
    /// With [`StoreOptions::keep_expired`] they become dead letters instead. From when its time has passed no reader
    /// gets a message, be it settled or not; an ack that comes before it is settled settles it as acked.
    fn expire(&self, now_us: u64, limit: usize) -> BoxFuture<'static, Result<Expired, StoreError>>;

    /// Keeps messages until their time; the answers are in the same order. `Ok` means durable. A dedupe key is looked
    /// for, and kept, as by `append`: the two share the keys of a caller.
    fn schedule(&self, messages: Vec<Scheduled>)
    -> BoxFuture<'static, Vec<Result<ScheduledAt, AppendError>>>;

    /// Hands out up to `limit` scheduled messages whose time has come at `now_us`: those that are due first, in any order
    /// and without their dedupe keys; they come again at `until_us` unless they are unscheduled. No two claims return one message within
    /// that time.
    fn claim_scheduled(
        &self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Scheduled>, StoreError>>;

    /// Forgets scheduled messages, (user, message id) each; returns how many there were.
    fn unschedule(&self, messages: Vec<(String, Uuid)>) -> BoxFuture<'static, Result<u64, StoreError>>;

    /// Has claimed messages, (user, message id) each, handed out again at `until_us` and not before, whatever their claims
    /// said; those that are not there any more are left out.
    fn postpone(
        &self,
        messages: Vec<(String, Uuid)>,
        until_us: u64,
    ) -> BoxFuture<'static, Result<(), StoreError>>;

    /// Removes up to `limit` receipts and dedupe keys that are past their time at `now_us`; returns how many
    /// were removed. An adapter whose database does this by itself returns 0, and until then hides them.
    fn sweep(&self, now_us: u64, limit: usize) -> BoxFuture<'static, Result<usize, StoreError>>;

    /// Notes that devices are there, (user, device) each, and registers those that are new; the answers are in the same
    /// order. `Ok` means durable. The first device of an inbox begins at its mark, others at its head.
    fn register(&self, devices: Vec<(String, String)>) -> BoxFuture<'static, Vec<Result<(), RegisterError>>>;

    /// Forgets devices, of about `limit` inboxes, that were not seen for [`FORGET_AFTER`] at `now_us`. What waited for
    /// them alone is settled as acked, which the sink hears.
    fn forget_devices(&self, now_us: u64, limit: usize) -> BoxFuture<'static, Result<Forgotten, StoreError>>;

    /// How much the store holds. A store that nodes share may answer with a count that it made a while ago.
    fn stats(&self) -> BoxFuture<'static, Result<Stats, StoreError>>;

    /// When the oldest message was accepted, in Unix microseconds, that was not reported written and whose user is
    /// not known to be offline; `None` when there is none. Looks at the `limit` inboxes that are due first, and at as
    /// many that are due last: among those are the ones that were relayed again most often.
    fn oldest_undelivered(&self, limit: usize) -> BoxFuture<'static, Result<Option<u64>, StoreError>>;

    /// Compares up to `limit` inboxes of users whose names follow `after` (empty for the first) with their bodies.
    /// Each is seen as it was at one moment, so that what is appended, settled or moved meanwhile is no finding.
    fn audit(&self, after: String, limit: usize) -> BoxFuture<'static, Result<AuditPage, StoreError>>;

    /// Makes users members of a channel, which may have `most`: of publications that get their number from then on, each
    /// gets a message. Those who are members stay as they are. `Ok` means durable.
    fn join(
        &self,
        channel: String,
        users: Vec<String>,
        most: u64,
    ) -> BoxFuture<'static, Result<Membership, JoinError>>;

    /// Ends memberships: of publications that get their number from then on, these users get nothing. Those who are no
    /// members stay as they are. `Ok` means durable.
    fn leave(
        &self,
        channel: String,
        users: Vec<String>,
    ) -> BoxFuture<'static, Result<Membership, StoreError>>;

    /// The first `limit` members of a channel whose names follow `after`, in the order of their names.
    fn members(
        &self,
        channel: String,
        after: String,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<String>, StoreError>>;

    /// Accepts a publication: `Ok` means that it has its number and is durable, with its payload. It goes into the
    /// inboxes of its members by [`InboxStore::apply`]. A dedupe key is looked for among those of the caller to this
    /// channel. Publications of one channel get their numbers in the order in which this is called.
    fn publish_durable(
        &self,
        publication: Publication,
    ) -> BoxFuture<'static, Result<Numbered, PublicationError>>;

    /// Claims the oldest unfinished publications of up to `limit` channels that nobody has at `now_us`, those that have
    /// waited longest first. They are anybody's again at `until_us`. Of a channel, the next one is claimed only when the one before
    /// it is finished.
    fn claim_publications(
        &self,
        now_us: u64,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Turn>, StoreError>>;

    /// Puts a claimed publication into the inboxes of up to `limit` further members, and notes how far it is; the claim
    /// then ends at `until_us`. Each member gets it once, also when a step is cut off anywhere, and repeated.
    fn apply(
        &self,
        turn: Turn,
        until_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Applied, StoreError>>;

    /// What waits to be applied. A store that nodes share may answer with a count that it made a while ago.
    fn backlog(&self) -> BoxFuture<'static, Result<Backlog, StoreError>>;

    /// The time in which inboxes are due: all nodes that share the store have it in common.
    fn clock(&self) -> SharedClock;

    /// A part of the log of receipts: at most `limit`, bounded to [`MAX_LOG_PAGE`], and at least one. Whoever goes on with
    /// [`LogPage::next`] gets each message that is settled from when the log began exactly once, in one order for all
    /// readers, as long as it is not more than [`RECEIPT_RETENTION`] behind. A receipt may be in it a few seconds after the
    /// message was settled. One whose body was lost is in no log.
    fn receipts(&self, from: LogStart, limit: usize) -> BoxFuture<'static, Result<LogPage, LogError>>;

    /// Waits until the log may go on after a place at which it ended. It may be ready too early, never too late by more
    /// than a few seconds.
    fn receipts_after(&self, position: LogPosition) -> BoxFuture<'static, ()>;

    /// Messages of one user, the newest ids first: those that wait for their time, those that are not settled, and those
    /// that were settled within [`RECEIPT_RETENTION`].
    fn deliveries(&self, query: DeliveriesQuery) -> BoxFuture<'static, Result<DeliveriesPage, StoreError>>;

    /// Writes that something is revoked, or is not any more, in place of what was known of the same subject. `Ok` means
    /// durable; repeating it is harmless.
    fn revoke(&self, revocation: Revocation) -> BoxFuture<'static, Result<(), StoreError>>;

    /// The first `limit` revocations whose subjects follow `after`, in the order of [`Subject::key`]: also those that were
    /// taken back, and not those that are over.
    fn revocations(
        &self,
        after: Option<Subject>,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Revocation>, StoreError>>;

    /// The first `limit` revocations that were changed at a time or later, the earliest first: by an index, so that it
    /// costs little to ask often. Those that are over may be among them.
    fn revocations_changed(
        &self,
        since_us: u64,
        limit: usize,
    ) -> BoxFuture<'static, Result<Vec<Revocation>, StoreError>>;
}
