//! Durable fan-out: users join a channel, and a publication to it goes into the inbox of each of its members.
//!
//! A publication gets the next number of its channel and is durable before that is answered. It is applied afterwards,
//! page by page, in the order of the members' names; those of one channel one after the other. Members of a publication
//! are those who had joined, and not left, when it got its number. Its payload is stored once.

use std::sync::Arc;

use sanjay_proto::client::v1::Payload;
use uuid::Uuid;

use super::{NewMessage, StoreError};

/// Most publications of one channel that are not finished.
pub const MAX_UNFINISHED: usize = 1_000;

/// Most users of one call that joins or leaves, and most names of a page of members.
pub const MAX_MEMBERS_PAGE: usize = 1_000;

/// Most bytes of encoded payload, counted for each member, that one step applies: what is relayed of it at once.
pub const MAX_APPLIED_BYTES: usize = 8 * 1024 * 1024;

/// Begins the dedupe keys of members' messages. Back ends cannot have such a key: it holds a control character.
const KEY_PREFIX: &str = "\u{1f}publication/";

/// A message for all members of a channel.
#[derive(Debug, Clone, Default)]
pub struct Publication {
    /// The channel.
    pub channel: String,
    /// UUID v7. The ids of the members' messages are made of it, see [`member_message_id`].
    pub message_id: Uuid,
    /// The back end that publishes; scopes `dedupe_key`.
    pub caller: String,
    /// The body.
    pub payload: Arc<Payload>,
    /// Empty for none.
    pub dedupe_key: String,
    /// When it was accepted, Unix time in microseconds; so are the members' messages.
    pub time_us: u64,
    /// W3C `traceparent`, or empty.
    pub trace: String,
    /// As in [`NewMessage`].
    pub expires_us: u64,
    /// As in [`NewMessage`].
    pub collapse_key: String,
}

/// The answer to a publication.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Numbered {
    /// Its place among those of its channel, from 1, without gaps.
    pub number: u64,
    /// Its id: of the first one when this is a duplicate.
    pub message_id: Uuid,
    /// Whether an earlier publication with the same dedupe key was the one that was accepted.
    pub duplicate: bool,
    /// How many members the channel has. Where nodes share the store, as counted: not those who join or leave just now.
    pub members: u64,
}

/// Why a publication was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublicationError {
    /// The dedupe key was used for another payload.
    #[error(
        "dedupe_key {key:?} was used for another payload to this channel within 24 hours; use a new key for a new message"
    )]
    AlreadyExists {
        /// The key.
        key: String,
    },
    /// As many wait already as may.
    #[error(
        "{MAX_UNFINISHED} durable publications of this channel wait to be put into inboxes, which is the limit; publish again when some are"
    )]
    Backlog,
    /// The store could not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What joining or leaving came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Membership {
    /// How many of the users had not joined, or left, before.
    pub changed: u64,
    /// How many members the channel has now; as in [`Numbered::members`].
    pub members: u64,
}

/// Why users did not join.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JoinError {
    /// The channel would have too many members; nobody joined.
    #[error(
        "the channel has {members} members, and may have {most} (delivery.max_members); nobody joined: let some leave, or raise the limit"
    )]
    Full {
        /// How many it has.
        members: u64,
        /// How many it may have.
        most: u64,
    },
    /// The store could not do it; some may have joined. Joining again is harmless.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The right to apply the oldest unfinished publication of a channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// The channel.
    pub channel: String,
    /// The publication's number.
    pub number: u64,
    /// Its id.
    pub message_id: Uuid,
    /// When it was accepted, Unix time in microseconds.
    pub time_us: u64,
    /// Members whose names are above it are to come; empty at the beginning.
    pub after: String,
    /// Changes with each claim of the channel.
    pub lease: u64,
    /// Whether whoever had it before did not say where it ended: the next page may have been applied already.
    pub unsure: bool,
}

/// What a step of a publication came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Applied {
    /// It went into the inboxes of so many members, and there may be more of them.
    More(Turn, usize),
    /// It went into the inboxes of so many members, and that was the last step.
    Finished(usize),
    /// The turn is somebody else's, or over; nothing was done.
    Lost,
}

/// What waits to be applied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backlog {
    /// Publications that are not finished.
    pub unfinished: u64,
    /// When the oldest of them was accepted, Unix time in microseconds.
    pub oldest_us: Option<u64>,
}

/// Id of a member's message of a publication: a UUID v7 of the same time, and for each user another.
#[must_use]
pub fn member_message_id(publication: Uuid, user: &str) -> Uuid {
    let mut context = ring::digest::Context::new(&ring::digest::SHA256);
    context.update(publication.as_bytes());
    context.update(user.as_bytes());
    let digest = context.finish();
    let mut bytes = *publication.as_bytes();
    bytes[6..].copy_from_slice(&digest.as_ref()[..10]);
    bytes[6] = 0x70 | (bytes[6] & 0x0f);
    bytes[8] = 0x80 | (bytes[8] & 0x3f);
    Uuid::from_bytes(bytes)
}

impl Publication {
    /// What one member gets of it.
    pub(super) fn message(&self, user: &str) -> NewMessage {
        NewMessage {
            user: user.to_owned(),
            caller: self.caller.clone(),
            message_id: member_message_id(self.message_id, user),
            payload: self.payload.clone(),
            dedupe_key: format!("{KEY_PREFIX}{}", self.message_id),
            time_us: self.time_us,
            trace: self.trace.clone(),
            expires_us: self.expires_us,
            collapse_key: self.collapse_key.clone(),
            shared: Some(self.message_id),
        }
    }
}

/// How many members one step applies a payload of this size to, of at most `limit`.
pub(super) fn step(limit: usize, bytes: usize) -> usize {
    limit.clamp(1, (MAX_APPLIED_BYTES / bytes.max(1)).max(1))
}

/// The part of the port that a test's store without channels has no business with.
#[cfg(test)]
macro_rules! fans_out_nothing {
    () => {
        fn join(
            &self,
            _: String,
            _: Vec<String>,
            _: u64,
        ) -> ::futures::future::BoxFuture<
            'static,
            Result<$crate::store::Membership, $crate::store::JoinError>,
        > {
            unreachable!("nobody joins here")
        }

        fn leave(
            &self,
            _: String,
            _: Vec<String>,
        ) -> ::futures::future::BoxFuture<
            'static,
            Result<$crate::store::Membership, $crate::store::StoreError>,
        > {
            unreachable!("nobody leaves here")
        }

        fn members(
            &self,
            _: String,
            _: String,
            _: usize,
        ) -> ::futures::future::BoxFuture<'static, Result<Vec<String>, $crate::store::StoreError>> {
            unreachable!("there are no members here")
        }

        fn publish_durable(
            &self,
            _: $crate::store::Publication,
        ) -> ::futures::future::BoxFuture<
            'static,
            Result<$crate::store::Numbered, $crate::store::PublicationError>,
        > {
            unreachable!("nothing is published here")
        }

        fn claim_publications(
            &self,
            _: u64,
            _: u64,
            _: usize,
        ) -> ::futures::future::BoxFuture<
            'static,
            Result<Vec<$crate::store::Turn>, $crate::store::StoreError>,
        > {
            unreachable!("nothing is published here")
        }

        fn apply(
            &self,
            _: $crate::store::Turn,
            _: u64,
            _: usize,
        ) -> ::futures::future::BoxFuture<'static, Result<$crate::store::Applied, $crate::store::StoreError>>
        {
            unreachable!("nothing is published here")
        }

        fn backlog(
            &self,
        ) -> ::futures::future::BoxFuture<'static, Result<$crate::store::Backlog, $crate::store::StoreError>>
        {
            unreachable!("nothing is published here")
        }
    };
}
#[cfg(test)]
pub(crate) use fans_out_nothing;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_ids_are_of_the_publications_time_and_all_different() {
        let publication = Uuid::parse_str("01890a5d-ac96-774b-bcce-b302099a8057").unwrap();
        let (bob, eve) = (member_message_id(publication, "bob"), member_message_id(publication, "eve"));
        assert_ne!(bob, eve);
        assert_eq!(bob, member_message_id(publication, "bob"));
        for id in [bob, eve] {
            assert_eq!(id.as_bytes()[..6], publication.as_bytes()[..6]);
            assert_eq!((id.get_version_num(), id.get_variant()), (7, uuid::Variant::RFC4122));
        }
        assert_ne!(bob, member_message_id(Uuid::from_u128(1), "bob"));
    }

    #[test]
    fn steps_are_bounded_by_bytes_and_never_empty() {
        assert_eq!(step(500, 100), 500);
        assert_eq!(step(500, 64 * 1024), 128);
        assert_eq!(step(0, 0), 1);
        assert_eq!(step(500, usize::MAX), 1);
    }
}
