//! Members of channels, and durable publications.

use std::time::Duration;

use sanjay_proto::delivery::v1;
use sanjay_protocol::Payload;
use serde::Serialize;

use super::{Backend, BackendError, Client};

/// What a durable publish may ask for, beside its channel and its payload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PublishOptions {
    /// At most 200 bytes; with one, the publish may be repeated and is accepted once. Empty for none.
    pub dedupe_key: String,
    /// How long each member's message may wait to be acknowledged, in whole milliseconds from its acceptance.
    pub ttl: Option<Duration>,
    /// At most 200 bytes; the message replaces an unsettled one with the same key. Empty for none.
    pub collapse_key: String,
}

/// A publication that goes into the inbox of each member of its channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DurablyPublished {
    /// UUID; with a member's name it stands for that member's message.
    pub message_id: String,
    /// Its place among the channel's durable publications, from 1.
    pub publication: u64,
    /// How many members the channel has, as counted.
    pub members: u64,
    /// An earlier publish with the same dedupe key was the one that was accepted.
    pub duplicate: bool,
}

/// A page of the members of a channel.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MembersPage {
    /// In the order of their names.
    pub users: Vec<String>,
    /// For the next page; empty on the last.
    pub next_page_token: String,
}

impl Backend {
    /// Puts a message into the inbox of each member of a channel: whoever joined it, online or not. `Ok` means that it
    /// is durable and that each of them gets it. With a dedupe key it is repeated while the server is away; without one,
    /// only as long as it was certainly not sent.
    ///
    /// # Errors
    /// Says whether the server refused it or the outcome is unknown.
    pub async fn publish_durable(
        &self,
        channel: &str,
        payload: Payload,
        options: &PublishOptions,
    ) -> Result<DurablyPublished, BackendError> {
        let message = v1::PublishRequest {
            channel: channel.to_owned(),
            payload: Some(payload.into()),
            dedupe_key: options.dedupe_key.clone(),
            durable: true,
            // Less than a millisecond is not for ever.
            ttl_ms: options.ttl.map_or(0, |ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1)),
            collapse_key: options.collapse_key.clone(),
        };
        let publish = async |mut client: Client, request| client.publish(request).await;
        let published = self.call(!options.dedupe_key.is_empty(), message, publish).await?;
        let v1::PublishResponse { message_id, publication, members, duplicate, .. } = published;
        Ok(DurablyPublished { message_id, publication, members, duplicate })
    }

    /// Makes users members of a channel, at most 1,000 in one call; says how many were none before, and how many members
    /// there are.
    ///
    /// # Errors
    /// When the server refuses it, or cannot say. Repeating it is harmless.
    pub async fn join(&self, channel: &str, users: &[&str]) -> Result<v1::JoinResponse, BackendError> {
        let message = v1::JoinRequest { channel: channel.to_owned(), users: owned(users) };
        let join = async |mut client: Client, request| client.join(request).await;
        self.call(true, message, join).await
    }

    /// Ends memberships, at most 1,000 in one call; says how many there were, and how many members are left.
    ///
    /// # Errors
    /// As [`Backend::join`].
    pub async fn leave(&self, channel: &str, users: &[&str]) -> Result<v1::LeaveResponse, BackendError> {
        let message = v1::LeaveRequest { channel: channel.to_owned(), users: owned(users) };
        let leave = async |mut client: Client, request| client.leave(request).await;
        self.call(true, message, leave).await
    }

    /// A page of the members of a channel. `page_size` is 1 to 1,000, 0 leaves it to the server; `page_token` is that of
    /// the page before, empty for the first.
    ///
    /// # Errors
    /// When the server refuses it, or cannot say.
    pub async fn list_members(
        &self,
        channel: &str,
        page_size: u32,
        page_token: &str,
    ) -> Result<MembersPage, BackendError> {
        let (channel, page_token) = (channel.to_owned(), page_token.to_owned());
        let message = v1::ListMembersRequest { channel, page_size, page_token };
        let list = async |mut client: Client, request| client.list_members(request).await;
        let v1::ListMembersResponse { users, next_page_token } = self.call(true, message, list).await?;
        Ok(MembersPage { users, next_page_token })
    }
}

fn owned(users: &[&str]) -> Vec<String> {
    users.iter().map(|&user| user.to_owned()).collect()
}
