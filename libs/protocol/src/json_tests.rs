use proptest::prelude::*;

use super::*;
use crate::{
    command::{Ack, Nak, Publish, Term, Working},
    event::{Empty, Inbox},
    limits::MAX_NAK_DELAY_MS,
};

#[derive(Deserialize)]
struct Vectors {
    commands: Vec<CommandVector>,
    events: Vec<EventVector>,
}

#[derive(Deserialize)]
struct CommandVector {
    name: String,
    text: String,
    /// What the command looks like when it is written again; absent when it is refused.
    canonical: Option<String>,
    refused: Option<RefusedVector>,
}

#[derive(Deserialize)]
struct RefusedVector {
    id: Option<u64>,
    code: Option<ErrorCode>,
    says: String,
}

#[derive(Deserialize)]
struct EventVector {
    name: String,
    text: String,
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../vectors/json.json")).unwrap()
}

#[test]
fn commands_follow_the_vectors() {
    for vector in vectors().commands {
        let results: Vec<_> = decode_commands(&vector.text).collect();
        let [result] = &results[..] else { panic!("{}: not one envelope: {results:?}", vector.name) };
        match (result, vector.canonical, vector.refused) {
            (Ok(envelope), Some(canonical), None) => {
                assert_eq!(serde_json::to_string(envelope).unwrap(), canonical, "{}", vector.name);
            }
            (Err(Refused::Malformed(message)), None, Some(RefusedVector { id: None, code: None, says })) => {
                assert!(message.contains(&says), "{}: {message}", vector.name);
            }
            (Err(Refused::Command { id, error }), None, Some(refused)) => {
                assert_eq!((*id, Some(error.code)), (refused.id, refused.code), "{}: {error:?}", vector.name);
                assert!(error.message.contains(&refused.says), "{}: {}", vector.name, error.message);
            }
            (result, ..) => panic!("{}: {result:?}", vector.name),
        }
    }
}

#[test]
fn events_follow_the_vectors() {
    for vector in vectors().events {
        let results: Vec<_> = decode_events(&vector.text).map(Result::unwrap).collect();
        let [envelope] = &results[..] else { panic!("{}: not one envelope: {results:?}", vector.name) };
        assert!(!matches!(envelope.event, Event::Unknown(_)), "{}", vector.name);
        assert_eq!(serde_json::to_string(envelope).unwrap(), vector.text, "{}", vector.name);
    }
}

#[test]
fn a_message_holds_several_envelopes() {
    let commands: Vec<_> =
        decode_commands("{}\n\n {\"id\":7,\"unsubscribe\":{\"channel\":\"a\"}}\n").collect();
    assert_eq!(commands.len(), 2);
    assert_eq!(commands[0], Ok(Envelope { id: None, command: Command::Ping }));
    let mut out = Vec::new();
    encode(&EventEnvelope { id: Some(7), event: Event::Ok(Empty {}) }, &mut out);
    encode(&EventEnvelope { id: None, event: Event::Ping }, &mut out);
    assert_eq!(out, b"{\"id\":7,\"ok\":{}}\n{}");
}

fn payloads() -> impl Strategy<Value = Payload> {
    prop_oneof![
        any::<String>().prop_map(Payload::Text),
        any::<i64>().prop_map(|n| Payload::Json(format!("{{\"n\":{n}}}"))),
        prop::collection::vec(any::<u8>(), 0..64).prop_map(|bytes| Payload::Bytes(bytes.into())),
    ]
}

proptest! {
    #[test]
    fn no_text_panics(text in any::<String>()) {
        decode_commands(&text).for_each(drop);
        decode_events(&text).for_each(drop);
    }

    #[test]
    fn a_publication_is_what_a_client_reads(
        channel in any::<String>(), offset in 0..1u64 << 53, publisher in any::<String>(),
        payload in payloads(), id in any::<[u8; 16]>(), trace in "|00-[0-9a-f]{8}",
    ) {
        let publication = v1::Publication {
            channel, offset, publisher, trace,
            epoch: "a".into(),
            message_id: id.to_vec().into(),
            payload: Some(payload.into()),
            time_us: 5,
        };
        let line = String::from_utf8(encode_publication(&publication)).unwrap();
        prop_assert!(!line.contains('\n'));
        let read: EventEnvelope = serde_json::from_str(&line).unwrap();
        prop_assert_eq!(read.event, Event::Message(Box::new(Message::from(&publication))));
    }

    #[test]
    fn an_inbox_message_is_what_a_client_reads(seq in 1..1u64 << 53, payload in payloads(), id in any::<[u8; 16]>()) {
        let message = v1::InboxMessage {
            seq,
            message_id: id.to_vec().into(),
            payload: Some(payload.clone().into()),
            time_us: 9,
            delivery: 2,
            trace: String::new(),
        };
        let mut out = Vec::new();
        encode_inbox(&message, &mut out);
        let read: EventEnvelope = serde_json::from_slice(&out).unwrap();
        let expected =
            Inbox { seq, message_id: message_id(&id), payload, time_us: 9, delivery: 2, trace: String::new() };
        prop_assert_eq!(read.event, Event::Inbox(Box::new(expected)));
    }

    #[test]
    fn a_command_survives_the_wire(
        id in prop::option::of(0..1u64 << 53), channel in "[a-z:]{1,40}", payload in payloads(),
        ranges in prop::collection::vec((1..1000u64).prop_map(|from| (from, from + 3)), 1..8),
        trace in "([0-9a-f-]{55})?", seq in 1..1u64 << 53, delivery in 1..u32::MAX,
        delay_ms in 0..=MAX_NAK_DELAY_MS, reason in "[^\\pC]{0,50}",
    ) {
        let publish = Command::Publish(Publish { channel, payload, dedupe: String::new() });
        let nak = Command::Nak(Nak { seq, delivery, delay_ms, reason: reason.clone() });
        let term = Command::Term(Term { seq, delivery, reason });
        let working = Command::Working(Working { seq, delivery });
        for command in [publish, Command::Ack(Ack { ranges, trace }), nak, term, working] {
            let envelope = Envelope { id, command };
            let text = serde_json::to_string(&envelope).unwrap();
            prop_assert_eq!(decode_commands(&text).collect::<Vec<_>>(), vec![Ok(envelope)]);
        }
    }
}
