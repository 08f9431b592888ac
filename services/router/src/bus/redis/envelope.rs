//! How publications and hints look inside Redis: `sanjay.router.v1.BusEnvelope`.

use std::sync::Arc;

use prost::{Message as _, bytes::Bytes};
use sanjay_proto::{
    BUS_VERSION,
    client::v1::Publication,
    router::v1::{BusEnvelope, EdgeHint as WireHint, Hints, NewPublication, Probe, bus_envelope::Body},
};

use crate::{bus::EdgeHint, registry::EdgeRef};

/// An envelope of hints is closed at this size in bytes, so that one batch does not hold up the connection.
const HINTS_BYTES: usize = 256 * 1024;

/// What an envelope holds.
#[derive(Debug, PartialEq)]
pub(crate) enum Content {
    /// A publication with its position.
    Publication(Publication),
    /// Hints for edges of this router.
    Hints(Vec<EdgeHint>),
    /// The router's own question whether it hears itself.
    Probe,
}

/// Why an envelope was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EnvelopeError {
    /// Not protobuf, or not this message.
    #[error("it cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A router of another build wrote it.
    #[error(
        "it has version {0}, and this router reads version {BUS_VERSION}; run routers of builds that share one"
    )]
    Version(u32),
    /// Nothing in it, or nothing that this build knows.
    #[error("it has no body that this router knows")]
    Body,
    /// A publication that no registry has given its place.
    #[error("its publication has no position")]
    Stamp,
}

/// The envelope of a publication without its stamp, which the registry appends.
pub(crate) fn encode_publication(new: NewPublication) -> Vec<u8> {
    encode(Body::Publication(Publication {
        channel: new.channel,
        message_id: new.message_id,
        payload: new.payload,
        publisher: new.publisher,
        trace: new.trace,
        ..Publication::default()
    }))
}

/// As many envelopes as the hints need, in order.
pub(super) fn encode_hints(hints: Vec<EdgeHint>) -> Vec<Vec<u8>> {
    let mut envelopes = Vec::new();
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for EdgeHint { edge, hint } in hints {
        let hint = WireHint {
            edge_id: edge.id.to_string(),
            incarnation: edge.incarnation,
            hint: Some(Arc::unwrap_or_clone(hint)),
        };
        bytes += hint.encoded_len();
        batch.push(hint);
        if bytes >= HINTS_BYTES {
            envelopes.push(encode(Body::Hints(Hints { hints: std::mem::take(&mut batch) })));
            bytes = 0;
        }
    }
    if !batch.is_empty() {
        envelopes.push(encode(Body::Hints(Hints { hints: batch })));
    }
    envelopes
}

/// The envelope of a probe.
pub(super) fn encode_probe() -> Vec<u8> {
    encode(Body::Probe(Probe {}))
}

fn encode(body: Body) -> Vec<u8> {
    BusEnvelope { version: BUS_VERSION, body: Some(body), stamp: None }.encode_to_vec()
}

/// Reads an envelope; the payload in it is not copied.
pub(crate) fn decode(bytes: Bytes) -> Result<Content, EnvelopeError> {
    let envelope = BusEnvelope::decode(bytes)?;
    if envelope.version != BUS_VERSION {
        return Err(EnvelopeError::Version(envelope.version));
    }
    match envelope.body.ok_or(EnvelopeError::Body)? {
        Body::Publication(mut publication) => {
            let stamp = envelope.stamp.filter(|stamp| stamp.offset > 0 && !stamp.epoch.is_empty());
            let stamp = stamp.ok_or(EnvelopeError::Stamp)?;
            publication.epoch = stamp.epoch;
            publication.offset = stamp.offset;
            publication.time_us = stamp.time_us;
            Ok(Content::Publication(publication))
        }
        Body::Hints(Hints { hints }) => {
            let hints = hints.into_iter().map(|hint| EdgeHint {
                edge: EdgeRef { id: hint.edge_id.into(), incarnation: hint.incarnation },
                hint: Arc::new(hint.hint.unwrap_or_default()),
            });
            Ok(Content::Hints(hints.collect()))
        }
        Body::Probe(Probe {}) => Ok(Content::Probe),
    }
}

#[cfg(test)]
mod tests {
    use sanjay_proto::{
        client::v1::{InboxMessage, Payload, payload::Kind},
        edge::v1::InboxHint,
        router::v1::Stamp,
    };

    use super::*;

    fn new() -> NewPublication {
        NewPublication {
            channel: "news".into(),
            payload: Some(Payload { kind: Some(Kind::Text("hi".into())) }),
            publisher: "bob".into(),
            dedupe_key: "k".into(),
            message_id: vec![7; 16].into(),
            trace: "00-1-2-01".into(),
        }
    }

    /// What the registry appends is a field of its own, so it does not matter what stands before it.
    #[test]
    fn a_stamp_is_appended() {
        let mut bytes = encode_publication(new());
        assert_eq!(decode(bytes.clone().into()), Err(EnvelopeError::Stamp));
        let stamp = Stamp { epoch: "00ff".into(), offset: 300, time_us: 5 };
        let mut field = vec![0x2a, 11, 0x0a, 4];
        field.extend_from_slice(b"00ff");
        field.extend_from_slice(&[0x10, 0xac, 0x02, 0x18, 5]);
        assert_eq!(field[2..], stamp.encode_to_vec());
        bytes.extend(field);
        let expected = Publication {
            channel: "news".into(),
            offset: 300,
            epoch: "00ff".into(),
            message_id: vec![7; 16].into(),
            payload: new().payload,
            publisher: "bob".into(),
            time_us: 5,
            trace: "00-1-2-01".into(),
        };
        assert_eq!(decode(bytes.into()), Ok(Content::Publication(expected)));
    }

    #[test]
    fn hints_are_split_by_size_and_keep_their_order() {
        let edge = EdgeRef { id: "e1".into(), incarnation: u64::MAX };
        let hint = |seq| {
            let payload = Payload { kind: Some(Kind::Bytes(vec![1; 60_000].into())) };
            let message = InboxMessage { seq, payload: Some(payload), ..InboxMessage::default() };
            let hint = InboxHint {
                user: "bob".into(),
                message: Some(message),
                inbox_epoch: 3,
                ..InboxHint::default()
            };
            EdgeHint { edge: edge.clone(), hint: Arc::new(hint) }
        };
        let hints: Vec<_> = (1..=20).map(hint).collect();
        let envelopes = encode_hints(hints.clone());
        assert_eq!(envelopes.len(), 4);
        assert!(envelopes.iter().all(|envelope| envelope.len() < HINTS_BYTES + 64 * 1024));
        let mut decoded = Vec::new();
        for envelope in envelopes {
            match decode(envelope.into()) {
                Ok(Content::Hints(hints)) => decoded.extend(hints),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(decoded, hints);
        assert!(encode_hints(Vec::new()).is_empty());
    }

    #[test]
    fn what_is_not_known_is_refused() {
        assert_eq!(decode(encode_probe().into()), Ok(Content::Probe));
        assert!(matches!(decode(Bytes::from_static(b"\xff\xff")), Err(EnvelopeError::Decode(_))));
        assert_eq!(decode(Bytes::new()), Err(EnvelopeError::Version(0)));
        let newer = BusEnvelope { version: BUS_VERSION + 1, body: Some(Body::Probe(Probe {})), stamp: None };
        assert_eq!(decode(newer.encode_to_vec().into()), Err(EnvelopeError::Version(BUS_VERSION + 1)));
        // Field 9 is a body of a later build, under the same version.
        let mut unknown = BusEnvelope { version: BUS_VERSION, ..BusEnvelope::default() }.encode_to_vec();
        unknown.extend_from_slice(&[0x4a, 0]);
        assert_eq!(decode(unknown.into()), Err(EnvelopeError::Body));
    }
}
