//! Messages of usual sizes.

use bytes::Bytes;
use sanjay_proto::client::v1::{InboxMessage, Payload, Publication, payload::Kind};

/// Text of so many characters, not all of them ASCII.
pub(crate) fn text(characters: usize) -> String {
    "A line of Zoë's, which is as long as it is. ".chars().cycle().take(characters).collect()
}

/// A body of text.
fn payload(bytes: usize) -> Option<Payload> {
    Some(Payload { kind: Some(Kind::Text(text(bytes))) })
}

/// A message of a channel.
pub(crate) fn publication(offset: u64) -> Publication {
    Publication {
        channel: "rooms:42".to_owned(),
        offset,
        epoch: "router-1-17f".to_owned(),
        message_id: Bytes::from_static(&[7; 16]),
        payload: payload(128),
        publisher: "zoe".to_owned(),
        time_us: 1_790_000_000_000_000,
        trace: String::new(),
    }
}

/// A message of an inbox.
pub(crate) fn inbox_message(seq: u64) -> InboxMessage {
    InboxMessage {
        seq,
        message_id: Bytes::from_static(&[7; 16]),
        payload: payload(128),
        time_us: 1_790_000_000_000_000,
        delivery: 1,
        trace: String::new(),
    }
}
