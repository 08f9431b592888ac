//! API keys of back ends: a key is known here by its SHA-256 alone.

use std::{fmt::Write as _, sync::Arc};

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use serde::{Deserialize, Serialize};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use tonic::{Request, Status, service::Interceptor};

/// An API key as it is configured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ApiKey {
    /// Who calls with it; scopes dedupe keys and stands in logs.
    pub name: String,
    /// SHA-256 of the key in hex.
    pub sha256: String,
}

/// What [`ApiKey::sha256`] must be for a key.
#[must_use]
pub fn hash_api_key(key: &str) -> String {
    digest(&SHA256, key.as_bytes()).as_ref().iter().fold(String::with_capacity(64), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string does not fail");
        text
    })
}

/// Reads a SHA-256 in hex; `None` when it is not one.
pub(crate) fn parse_hash(hex: &str) -> Option<[u8; SHA256_OUTPUT_LEN]> {
    let digits: Option<Vec<u8>> = hex.chars().map(|c| c.to_digit(16).map(|digit| digit as u8)).collect();
    let bytes: Vec<u8> =
        digits?.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
    if hex.len() == SHA256_OUTPUT_LEN * 2 { bytes.try_into().ok() } else { None }
}

/// The name of the back end that calls, as an extension of its requests.
#[derive(Debug, Clone)]
pub(crate) struct Caller(pub(crate) Arc<str>);

/// Lets calls through that carry a known key, and notes who calls.
#[derive(Clone)]
pub(crate) struct ApiKeys(Arc<Vec<([u8; SHA256_OUTPUT_LEN], Arc<str>)>>);

impl ApiKeys {
    /// Takes the configured keys; those that validation would refuse match nothing.
    pub(crate) fn new(keys: &[ApiKey]) -> Self {
        let keys =
            keys.iter().filter_map(|key| Some((parse_hash(&key.sha256)?, Arc::from(key.name.as_str()))));
        Self(Arc::new(keys.collect()))
    }

    /// Who has this key. Takes the same time whichever it is, and whether it is known or not.
    fn identify(&self, key: &[u8]) -> Option<Arc<str>> {
        let hash = digest(&SHA256, key);
        let mut found = u64::MAX;
        for (index, (known, _)) in self.0.iter().enumerate() {
            let same: Choice = known[..].ct_eq(hash.as_ref());
            found.conditional_assign(&(index as u64), same);
        }
        usize::try_from(found).ok().and_then(|index| self.0.get(index)).map(|(_, name)| name.clone())
    }
}

impl Interceptor for ApiKeys {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let Some(header) = request.metadata().get("authorization") else {
            return Err(Status::unauthenticated(
                "the call carries no API key; send the metadata `authorization: Bearer <API key>`",
            ));
        };
        let Some(key) = header.as_encoded_bytes().strip_prefix(b"Bearer ") else {
            return Err(Status::unauthenticated(
                "the metadata `authorization` must have the form `Bearer <API key>`, with a capital B and one space",
            ));
        };
        let Some(name) = self.identify(key) else {
            return Err(Status::unauthenticated(
                "the API key is not known here; use the key of this server, or add its SHA-256 to `delivery.api_keys`",
            ));
        };
        request.extensions_mut().insert(Caller(name));
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_known_by_its_hash() {
        assert_eq!(hash_api_key("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert!(parse_hash(&hash_api_key("abc").to_uppercase()).is_some());
        for wrong in ["", "ab", &"g".repeat(64), &"a".repeat(63), &"a".repeat(66), &"é".repeat(32)] {
            assert_eq!(parse_hash(wrong), None, "{wrong}");
        }
        let key = |name: &str, key: &str| ApiKey { name: name.into(), sha256: hash_api_key(key) };
        let keys = ApiKeys::new(&[key("shop", "one"), key("mail", "two")]);
        assert_eq!(keys.identify(b"one").as_deref(), Some("shop"));
        assert_eq!(keys.identify(b"two").as_deref(), Some("mail"));
        assert_eq!(keys.identify(b"three"), None);
        assert_eq!(ApiKeys::new(&[]).identify(b""), None);
    }
}
