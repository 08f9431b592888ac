//! The JSON codec: a WebSocket text message holds envelopes, one a line.

use std::{borrow::Cow, fmt};

use sanjay_proto::client::v1;
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeOwned, Error as _, IgnoredAny, MapAccess, Visitor},
    ser::SerializeMap,
};
use serde_json::value::RawValue;

use crate::{
    Command, ErrorBody, ErrorCode, Event, EventEnvelope,
    command::Envelope,
    event::{Message, Published},
    payload::Payload,
};

/// Why an envelope was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refused {
    /// Not a JSON object at all: the peer does not speak the protocol and is disconnected.
    Malformed(String),
    /// An object that is no good command: the sender gets the error and may go on.
    Command {
        /// The command's id, when it could be read.
        id: Option<u64>,
        /// What was wrong.
        error: ErrorBody,
    },
}

/// The commands of a client's text message. Empty lines are skipped.
pub fn decode_commands(text: &str) -> impl Iterator<Item = Result<Envelope, Refused>> {
    lines(text).map(decode_command)
}

/// The events of an edge's text message. Empty lines are skipped.
///
/// # Errors
/// Each item fails on its own, with what the JSON lacked.
pub fn decode_events(text: &str) -> impl Iterator<Item = Result<EventEnvelope, serde_json::Error>> {
    lines(text).map(serde_json::from_str)
}

fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split('\n').map(str::trim).filter(|line| !line.is_empty())
}

fn decode_command(line: &str) -> Result<Envelope, Refused> {
    let fields: Fields<'_> = serde_json::from_str(line)
        .map_err(|error| Refused::Malformed(format!("not an envelope: {error}")))?;
    let refuse = |code, message| Refused::Command { id: fields.id, error: ErrorBody::new(code, message) };
    let command = match fields.body {
        None => Ok(Command::Ping),
        Some((name, raw)) => match &*name {
            "hello" => parse(&name, raw).map(Command::Hello),
            "subscribe" => parse(&name, raw).map(Command::Subscribe),
            "unsubscribe" => parse(&name, raw).map(Command::Unsubscribe),
            "publish" => parse(&name, raw).map(Command::Publish),
            "ack" => parse(&name, raw).map(Command::Ack),
            "nak" => parse(&name, raw).map(Command::Nak),
            "term" => parse(&name, raw).map(Command::Term),
            "working" => parse(&name, raw).map(Command::Working),
            "credit" => parse(&name, raw).map(Command::Credit),
            "history" => parse(&name, raw).map(Command::History),
            "refresh" => parse(&name, raw).map(Command::Refresh),
            _ => {
                let name: String = name.chars().filter(|c| !c.is_control()).take(40).collect();
                let known = "hello, subscribe, unsubscribe, publish, ack, nak, term, working, credit, history, \
                     refresh";
                return Err(refuse(
                    ErrorCode::UnknownCommand,
                    format!("unknown command \"{name}\"; known are {known}"),
                ));
            }
        },
    };
    let command = command.map_err(|message| refuse(ErrorCode::BadRequest, message))?;
    if let Some(problem) = fields.problem {
        return Err(refuse(ErrorCode::BadRequest, problem));
    }
    match command.check() {
        Ok(()) => Ok(Envelope { id: fields.id, command }),
        Err(error) => Err(Refused::Command { id: fields.id, error }),
    }
}

/// Parses a command's body; on failure says which field was wrong.
fn parse<T: DeserializeOwned>(name: &str, raw: &RawValue) -> Result<T, String> {
    serde_json::from_str(raw.get()).map_err(|_| {
        // Only the failing path pays for tracking where it is.
        let deserializer = &mut serde_json::Deserializer::from_str(raw.get());
        match serde_path_to_error::deserialize::<_, T>(deserializer) {
            Err(error) if error.path().iter().next().is_some() => {
                format!("{name}.{}: {}", error.path(), plain(error.inner()))
            }
            Err(error) => format!("{name}: {}", plain(error.inner())),
            Ok(_) => format!("{name}: not readable"),
        }
    })
}

/// The error without its position: a line holds one envelope, and the field is named already.
fn plain(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// An envelope's members before the command's own fields are looked at.
struct Fields<'a> {
    id: Option<u64>,
    body: Option<(Cow<'a, str>, &'a RawValue)>,
    problem: Option<String>,
}

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object such as {\"id\":1,\"subscribe\":{…}}")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut fields = Fields { id: None, body: None, problem: None };
        while let Some(Key(key)) = map.next_key()? {
            let value: &'de RawValue = map.next_value()?;
            if key == "id" {
                match serde_json::from_str::<u64>(value.get()) {
                    Ok(id) if id <= crate::limits::MAX_SAFE_INTEGER => fields.id = Some(id),
                    _ => fields.problem = Some("id is not an integer from 0 to 2⁵³ − 1".to_owned()),
                }
            } else if let Some((first, _)) = &fields.body {
                fields.problem.get_or_insert_with(|| {
                    format!("one envelope holds one command; this one has {first} and another")
                });
            } else {
                fields.body = Some((key, value));
            }
        }
        Ok(fields)
    }
}

/// An object's key, borrowed unless it holds escapes.
struct Key<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Key<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct KeyVisitor;
        impl<'de> Visitor<'de> for KeyVisitor {
            type Value = Key<'de>;
            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a key")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Key<'de>, E> {
                Ok(Key(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(KeyVisitor)
    }
}

impl Serialize for Envelope {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if let Some(id) = self.id {
            map.serialize_entry("id", &id)?;
        }
        match &self.command {
            Command::Ping => {}
            Command::Hello(body) => map.serialize_entry("hello", body)?,
            Command::Subscribe(body) => map.serialize_entry("subscribe", body)?,
            Command::Unsubscribe(body) => map.serialize_entry("unsubscribe", body)?,
            Command::Publish(body) => map.serialize_entry("publish", body)?,
            Command::Ack(body) => map.serialize_entry("ack", body)?,
            Command::Nak(body) => map.serialize_entry("nak", body)?,
            Command::Term(body) => map.serialize_entry("term", body)?,
            Command::Working(body) => map.serialize_entry("working", body)?,
            Command::Credit(body) => map.serialize_entry("credit", body)?,
            Command::History(body) => map.serialize_entry("history", body)?,
            Command::Refresh(body) => map.serialize_entry("refresh", body)?,
        }
        map.end()
    }
}

impl Serialize for EventEnvelope {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if let Some(id) = self.id {
            map.serialize_entry("id", &id)?;
        }
        match &self.event {
            Event::Ping => {}
            Event::Welcome(body) => map.serialize_entry("welcome", body)?,
            Event::Subscribed(body) => map.serialize_entry("subscribed", body)?,
            Event::Ok(body) => map.serialize_entry("ok", body)?,
            Event::Published(body) => map.serialize_entry("published", body)?,
            Event::Error(body) => map.serialize_entry("error", body)?,
            Event::Message(body) => map.serialize_entry("message", body)?,
            Event::Inbox(body) => map.serialize_entry("inbox", body)?,
            Event::Settled(body) => map.serialize_entry("settled", body)?,
            Event::Gap(body) => map.serialize_entry("gap", body)?,
            Event::Degraded(body) => map.serialize_entry("degraded", body)?,
            Event::Goaway(body) => map.serialize_entry("goaway", body)?,
            Event::History(body) => map.serialize_entry("history", body)?,
            Event::Unsubscribed(body) => map.serialize_entry("unsubscribed", body)?,
            Event::Broadcast(body) => map.serialize_entry("broadcast", body)?,
            Event::Refreshed(body) => map.serialize_entry("refreshed", body)?,
            Event::TokenExpired(body) => map.serialize_entry("token_expired", body)?,
            Event::Unknown(name) => map.serialize_entry(name, &crate::event::Empty {})?,
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for EventEnvelope {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EnvelopeVisitor;
        impl<'de> Visitor<'de> for EnvelopeVisitor {
            type Value = EventEnvelope;
            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object such as {\"message\":{…}}")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<EventEnvelope, A::Error> {
                let (mut id, mut event) = (None, None);
                while let Some(Key(key)) = map.next_key()? {
                    let next = match &*key {
                        "id" => {
                            id = Some(map.next_value()?);
                            continue;
                        }
                        "welcome" => Event::Welcome(map.next_value()?),
                        "subscribed" => Event::Subscribed(map.next_value()?),
                        "ok" => Event::Ok(map.next_value()?),
                        "published" => Event::Published(map.next_value()?),
                        "error" => Event::Error(map.next_value()?),
                        "message" => Event::Message(map.next_value()?),
                        "inbox" => Event::Inbox(map.next_value()?),
                        "settled" => Event::Settled(map.next_value()?),
                        "gap" => Event::Gap(map.next_value()?),
                        "degraded" => Event::Degraded(map.next_value()?),
                        "goaway" => Event::Goaway(map.next_value()?),
                        "history" => Event::History(map.next_value()?),
                        "unsubscribed" => Event::Unsubscribed(map.next_value()?),
                        "broadcast" => Event::Broadcast(map.next_value()?),
                        "refreshed" => Event::Refreshed(map.next_value()?),
                        "token_expired" => Event::TokenExpired(map.next_value()?),
                        other => {
                            let other = other.to_owned();
                            map.next_value::<IgnoredAny>()?;
                            Event::Unknown(other)
                        }
                    };
                    if event.replace(next).is_some() {
                        return Err(A::Error::custom("one envelope holds one event"));
                    }
                }
                Ok(EventEnvelope { id, event: event.unwrap_or(Event::Ping) })
            }
        }
        deserializer.deserialize_map(EnvelopeVisitor)
    }
}

/// Appends an envelope to `out`, after a line break when `out` is not empty.
pub fn encode(envelope: &impl Serialize, out: &mut Vec<u8>) {
    if !out.is_empty() {
        out.push(b'\n');
    }
    serde_json::to_writer(out, envelope).expect("writing to a Vec succeeds, and payloads hold checked JSON");
}

/// The envelope of a channel message, ready to be shared by every subscriber.
#[must_use]
pub fn encode_publication(publication: &v1::Publication) -> Vec<u8> {
    let size = publication.channel.len() + publication.trace.len() + body_size(publication.payload.as_ref());
    let mut out = Vec::with_capacity(size + 224);
    out.extend_from_slice(b"{\"message\":{\"channel\":");
    text(&publication.channel, &mut out);
    number(",\"offset\":", publication.offset, &mut out);
    out.extend_from_slice(b",\"epoch\":");
    text(&publication.epoch, &mut out);
    out.extend_from_slice(b",\"message_id\":");
    text(&message_id(&publication.message_id), &mut out);
    payload(publication.payload.as_ref(), &mut out);
    if !publication.publisher.is_empty() {
        out.extend_from_slice(b",\"publisher\":");
        text(&publication.publisher, &mut out);
    }
    number(",\"time_us\":", publication.time_us, &mut out);
    tail(&publication.trace, &mut out);
    out
}

/// Appends the envelope of an inbox message to `out`, after a line break when `out` is not empty.
pub fn encode_inbox(message: &v1::InboxMessage, out: &mut Vec<u8>) {
    if !out.is_empty() {
        out.push(b'\n');
    }
    number("{\"inbox\":{\"seq\":", message.seq, out);
    out.extend_from_slice(b",\"message_id\":");
    text(&message_id(&message.message_id), out);
    payload(message.payload.as_ref(), out);
    number(",\"time_us\":", message.time_us, out);
    number(",\"delivery\":", u64::from(message.delivery), out);
    tail(&message.trace, out);
}

fn body_size(payload: Option<&v1::Payload>) -> usize {
    use v1::payload::Kind;
    match payload.and_then(|payload| payload.kind.as_ref()) {
        Some(Kind::Text(text) | Kind::Json(text)) => text.len(),
        Some(Kind::Bytes(bytes)) => bytes.len() * 4 / 3 + 4,
        None => 0,
    }
}

fn payload(payload: Option<&v1::Payload>, out: &mut Vec<u8>) {
    use v1::payload::Kind;
    out.extend_from_slice(b",\"payload\":");
    match payload.and_then(|payload| payload.kind.as_ref()) {
        // Checked and minified where it entered the system.
        Some(Kind::Json(json)) => {
            out.extend_from_slice(b"{\"json\":");
            out.extend_from_slice(json.as_bytes());
            out.push(b'}');
        }
        Some(Kind::Text(body)) => {
            out.extend_from_slice(b"{\"text\":");
            text(body, out);
            out.push(b'}');
        }
        Some(Kind::Bytes(bytes)) => {
            serde_json::to_writer(out, &Payload::Bytes(bytes.clone())).expect("writing to a Vec succeeds");
        }
        None => out.extend_from_slice(b"{\"text\":\"\"}"),
    }
}

fn tail(trace: &str, out: &mut Vec<u8>) {
    if !trace.is_empty() {
        out.extend_from_slice(b",\"trace\":");
        text(trace, out);
    }
    out.extend_from_slice(b"}}");
}

fn text(value: &str, out: &mut Vec<u8>) {
    serde_json::to_writer(out, value).expect("writing to a Vec succeeds");
}

fn number(prefix: &str, value: u64, out: &mut Vec<u8>) {
    out.extend_from_slice(prefix.as_bytes());
    serde_json::to_writer(out, &value).expect("writing to a Vec succeeds");
}

/// The text form of a message id; the nil id stands for one that is not 16 bytes.
#[must_use]
pub fn message_id(bytes: &[u8]) -> String {
    uuid::Uuid::from_slice(bytes).unwrap_or_default().to_string()
}

impl From<&v1::Publication> for Message {
    fn from(publication: &v1::Publication) -> Self {
        Message {
            channel: publication.channel.clone(),
            offset: publication.offset,
            epoch: publication.epoch.clone(),
            message_id: message_id(&publication.message_id),
            payload: publication.payload.clone().into(),
            publisher: publication.publisher.clone(),
            time_us: publication.time_us,
            trace: publication.trace.clone(),
        }
    }
}

impl From<Option<v1::Payload>> for Payload {
    fn from(payload: Option<v1::Payload>) -> Self {
        use v1::payload::Kind;
        match payload.and_then(|payload| payload.kind) {
            Some(Kind::Text(text)) => Payload::Text(text),
            Some(Kind::Json(json)) => Payload::Json(json),
            Some(Kind::Bytes(bytes)) => Payload::Bytes(bytes),
            None => Payload::Text(String::new()),
        }
    }
}

impl From<Published> for Event {
    fn from(published: Published) -> Self {
        Event::Published(published)
    }
}

#[cfg(test)]
#[path = "json_tests.rs"]
mod tests;
