//! Message bodies: text, JSON or bytes. A payload keeps its kind from publisher to receiver.

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use sanjay_proto::client::v1;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _, ser::Error as _};
use serde_json::value::RawValue;

use crate::limits::MAX_PAYLOAD_BYTES;

/// A message body. In JSON `{"text":"…"}`, `{"json":…}` or `{"bytes":"<base64>"}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Payload {
    /// UTF-8 text.
    Text(String),
    /// One JSON value, minified: a newline would end the envelope that carries it.
    #[serde(serialize_with = "raw_json", deserialize_with = "minified_json")]
    Json(String),
    /// Raw bytes.
    #[serde(serialize_with = "to_base64", deserialize_with = "from_base64")]
    Bytes(Bytes),
}

/// Why a payload is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PayloadError {
    /// None was given.
    #[error("payload is missing; give one of text, json or bytes")]
    Missing,
    /// More than [`MAX_PAYLOAD_BYTES`].
    #[error("payload has {0} bytes; at most {MAX_PAYLOAD_BYTES} are allowed")]
    TooLarge(usize),
    /// The `json` kind does not hold JSON.
    #[error("payload.json is not a JSON value: {0}")]
    NotJson(String),
}

impl Payload {
    /// Size of the body in bytes, in its own kind.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Payload::Text(text) | Payload::Json(text) => text.len(),
            Payload::Bytes(bytes) => bytes.len(),
        }
    }

    /// Whether the body is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Checks the size.
    ///
    /// # Errors
    /// When the body is larger than [`MAX_PAYLOAD_BYTES`].
    pub fn check(&self) -> Result<(), PayloadError> {
        if self.len() > MAX_PAYLOAD_BYTES { Err(PayloadError::TooLarge(self.len())) } else { Ok(()) }
    }

    /// Takes a payload from a back end: checks its size, checks and minifies JSON.
    ///
    /// # Errors
    /// When there is none, it is too large, or its JSON is not.
    pub fn from_backend(payload: Option<v1::Payload>) -> Result<Self, PayloadError> {
        use v1::payload::Kind;
        let payload = match payload.and_then(|payload| payload.kind).ok_or(PayloadError::Missing)? {
            Kind::Text(text) => Payload::Text(text),
            Kind::Bytes(bytes) => Payload::Bytes(bytes),
            Kind::Json(json) if json.len() > MAX_PAYLOAD_BYTES => {
                return Err(PayloadError::TooLarge(json.len()));
            }
            Kind::Json(json) => {
                serde_json::from_str::<&RawValue>(&json).map_err(|e| PayloadError::NotJson(e.to_string()))?;
                Payload::Json(minify(&json))
            }
        };
        payload.check()?;
        Ok(payload)
    }
}

impl From<Payload> for v1::Payload {
    fn from(payload: Payload) -> Self {
        use v1::payload::Kind;
        let kind = match payload {
            Payload::Text(text) => Kind::Text(text),
            Payload::Json(json) => Kind::Json(json),
            Payload::Bytes(bytes) => Kind::Bytes(bytes),
        };
        v1::Payload { kind: Some(kind) }
    }
}

/// Drops the white space between the tokens of a valid JSON text.
fn minify(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let (mut in_string, mut escaped) = (false, false);
    for character in json.chars() {
        if in_string {
            match character {
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                '"' => in_string = false,
                _ => {}
            }
        } else if matches!(character, ' ' | '\t' | '\n' | '\r') {
            continue;
        } else {
            in_string = character == '"';
        }
        out.push(character);
    }
    out
}

fn minified_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let raw = Box::<RawValue>::deserialize(deserializer)?;
    Ok(minify(raw.get()))
}

fn raw_json<S: Serializer>(json: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serde_json::from_str::<&RawValue>(json).map_err(S::Error::custom)?.serialize(serializer)
}

fn to_base64<S: Serializer>(bytes: &Bytes, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&BASE64.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
    let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
    match BASE64.decode(text.as_bytes()) {
        Ok(bytes) => Ok(bytes.into()),
        Err(error) => Err(D::Error::custom(format!("bytes are not standard base64 with padding: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn json_value() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i64>().prop_map(Into::into),
            any::<String>().prop_map(Into::into),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                prop::collection::vec((any::<String>(), inner), 0..4)
                    .prop_map(|entries| serde_json::Value::Object(entries.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn minifying_keeps_the_value_and_leaves_no_line_break(value in json_value()) {
            let pretty = serde_json::to_string_pretty(&value).unwrap();
            let minified = minify(&pretty);
            prop_assert_eq!(&minified, &serde_json::to_string(&value).unwrap());
            prop_assert!(!minified.contains('\n'));
        }
    }

    #[test]
    fn numbers_keep_every_digit() {
        let payload: Payload =
            serde_json::from_str("{\"json\": [1.10, 123456789012345678901234567890] }").unwrap();
        assert_eq!(payload, Payload::Json("[1.10,123456789012345678901234567890]".into()));
        assert_eq!(
            serde_json::to_string(&payload).unwrap(),
            "{\"json\":[1.10,123456789012345678901234567890]}"
        );
    }

    #[test]
    fn a_back_end_gets_told_what_is_wrong() {
        use v1::payload::Kind;
        let with = |kind| Payload::from_backend(Some(v1::Payload { kind: Some(kind) }));
        assert_eq!(Payload::from_backend(None), Err(PayloadError::Missing));
        assert!(matches!(with(Kind::Json("{\"a\":".into())), Err(PayloadError::NotJson(_))));
        assert_eq!(with(Kind::Text("x".repeat(65_537))), Err(PayloadError::TooLarge(65_537)));
        assert_eq!(with(Kind::Json(" {\n} ".into())), Ok(Payload::Json("{}".into())));
    }
}
