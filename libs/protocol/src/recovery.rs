//! A channel's past on its way to a client: where to begin, and the answers, which are encoded once for all who ask for
//! the same.

use std::sync::Arc;

use sanjay_proto::client::v1;
use serde::{Deserialize, Serialize};

use crate::{
    ErrorBody, ErrorCode,
    event::Message,
    json::encode_publication,
    limits::{DEFAULT_HISTORY_LIMIT, MAX_EPOCH_BYTES, MAX_HISTORY_LIMIT, MAX_SAFE_INTEGER},
    names,
};

/// A place in a channel.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Names the sequence.
    pub epoch: String,
    /// The newest offset that is known; 0 before the first.
    pub offset: u64,
}

/// `history`: read what the channel keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadHistory {
    /// The channel.
    pub channel: String,
    /// Read what follows this position; without it, the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Position>,
    /// Most messages, 1 to [`MAX_HISTORY_LIMIT`].
    #[serde(default = "default_limit")]
    pub limit: u32,
}

/// Answers `history`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// The channel.
    pub channel: String,
    /// Names the sequence.
    pub epoch: String,
    /// The newest offset of the channel.
    pub offset: u64,
    /// In the order of their offsets, without holes.
    #[serde(default)]
    pub messages: Vec<Message>,
    /// Whether more follow behind the last one.
    #[serde(default)]
    pub more: bool,
}

const fn default_limit() -> u32 {
    DEFAULT_HISTORY_LIMIT
}

impl Position {
    /// Checks the position that a client gave as `field`.
    ///
    /// # Errors
    /// Says what is wrong with it.
    pub fn check(&self, field: &'static str) -> Result<(), ErrorBody> {
        let bad = |message: String| Err(ErrorBody::new(ErrorCode::BadRequest, message));
        if self.epoch.is_empty() {
            return bad(format!("{field}.epoch is empty; give back the epoch that the channel had"));
        }
        names::check_text("epoch", &self.epoch, MAX_EPOCH_BYTES)?;
        if self.offset > MAX_SAFE_INTEGER {
            return bad(format!(
                "{field}.offset is {}; it is an offset of the channel, below 2⁵³",
                self.offset
            ));
        }
        Ok(())
    }
}

impl ReadHistory {
    /// Checks every bound.
    ///
    /// # Errors
    /// Names the field, what was wrong and what would be right.
    pub fn check(&self) -> Result<(), ErrorBody> {
        names::check("channel", &self.channel)?;
        if let Some(since) = &self.since {
            since.check("since")?;
        }
        if self.limit == 0 || self.limit as usize > MAX_HISTORY_LIMIT {
            let why = format!("limit is {}; 1 to {MAX_HISTORY_LIMIT} are allowed", self.limit);
            return Err(ErrorBody::new(ErrorCode::BadRequest, why));
        }
        Ok(())
    }
}

/// What `encode_publication` puts around a message.
const BEFORE: &str = "{\"message\":";

/// The answer to a `subscribe` with `recover`, without the `{"id":N,` that it begins with for each client: that is
/// [`with_id`]. `publications` is `None` when the position could not be continued.
#[must_use]
pub fn encode_recovered(
    channel: &str,
    at: &Position,
    publications: Option<&[Arc<v1::Publication>]>,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(256);
    out.extend_from_slice(b"\"subscribed\":{\"channel\":");
    text(channel, &mut out);
    out.extend_from_slice(b",\"epoch\":");
    text(&at.epoch, &mut out);
    out.extend_from_slice(
        format!(",\"offset\":{},\"recovered\":{}", at.offset, publications.is_some()).as_bytes(),
    );
    for (index, publication) in publications.unwrap_or_default().iter().enumerate() {
        out.extend_from_slice(if index == 0 { b",\"messages\":[" } else { b"," });
        let envelope = encode_publication(publication);
        out.extend_from_slice(&envelope[BEFORE.len()..envelope.len() - 1]);
    }
    if publications.is_some_and(|publications| !publications.is_empty()) {
        out.push(b']');
    }
    out.extend_from_slice(b"}}");
    out
}

/// Appends the envelope of a client to `out`: its id, and the part that it shares with others.
pub fn with_id(id: u64, shared: &[u8], out: &mut Vec<u8>) {
    if !out.is_empty() {
        out.push(b'\n');
    }
    out.extend_from_slice(format!("{{\"id\":{id},").as_bytes());
    out.extend_from_slice(shared);
}

fn text(value: &str, out: &mut Vec<u8>) {
    serde_json::to_writer(out, value).expect("writing to a Vec succeeds");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        Event, EventEnvelope, Payload,
        event::Subscribed,
        json::{decode_events, encode},
    };

    fn publication(offset: u64) -> Arc<v1::Publication> {
        let kind = v1::payload::Kind::Json("{\"a\":1}".into());
        Arc::new(v1::Publication {
            channel: "a \"b\"".into(),
            offset,
            epoch: "e".into(),
            message_id: vec![7; 16].into(),
            payload: Some(v1::Payload { kind: Some(kind) }),
            publisher: "bob".into(),
            time_us: 5,
            trace: String::new(),
        })
    }

    /// The quick way says what the type says.
    #[test]
    fn what_is_shared_is_what_serde_would_write() {
        let at = Position { epoch: "e".into(), offset: 3 };
        let kept = [publication(2), publication(3)];
        for found in [None, Some(&kept[..0]), Some(&kept[..1]), Some(&kept[..])] {
            let mut quick = Vec::new();
            with_id(9, &encode_recovered("a \"b\"", &at, found), &mut quick);
            let subscribed = Subscribed {
                channel: "a \"b\"".into(),
                epoch: "e".into(),
                offset: 3,
                recovered: Some(found.is_some()),
                messages: found
                    .unwrap_or_default()
                    .iter()
                    .map(|publication| (&**publication).into())
                    .collect(),
            };
            let envelope = EventEnvelope { id: Some(9), event: Event::Subscribed(subscribed) };
            let mut written = Vec::new();
            encode(&envelope, &mut written);
            let quick = String::from_utf8(quick).unwrap();
            assert_eq!(quick, String::from_utf8(written).unwrap());
            let read = decode_events(&quick).next().unwrap().unwrap();
            assert_eq!(read, envelope);
        }
        assert_eq!(Message::from(&*kept[0]).payload, Payload::Json("{\"a\":1}".into()));
    }

    #[test]
    fn positions_and_limits_are_checked() {
        let read = |since: Option<(&str, u64)>, limit| ReadHistory {
            channel: "news".into(),
            since: since.map(|(epoch, offset)| Position { epoch: epoch.into(), offset }),
            limit,
        };
        assert_eq!(read(None, 1).check(), Ok(()));
        assert_eq!(read(Some(("e", MAX_SAFE_INTEGER)), 1_000).check(), Ok(()));
        let cases = [
            (read(None, 0), "limit is 0; 1 to 1000 are allowed"),
            (read(None, 1_001), "limit is 1001; 1 to 1000 are allowed"),
            (read(Some(("", 1)), 1), "since.epoch is empty; give back the epoch that the channel had"),
            (read(Some(("e\n", 1)), 1), "epoch contains the control character"),
            (read(Some((&"e".repeat(65), 1)), 1), "epoch has 65 bytes; at most 64 are allowed"),
            (read(Some(("e", MAX_SAFE_INTEGER + 1)), 1), "since.offset is 9007199254740992; it is an offset"),
        ];
        for (wrong, text) in cases {
            let error = wrong.check().expect_err(text);
            assert!(error.code == ErrorCode::BadRequest && error.message.contains(text), "{error:?}");
        }
    }
}
