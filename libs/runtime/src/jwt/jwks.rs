//! JWKS documents (RFC 7517): the public keys of an issuer of tokens.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::Deserialize;
use thiserror::Error;

use super::{Key, KeySet, VerifyingKey};

/// Most keys of a document that are used: a token without `kid` is tried against each of its algorithm.
pub const MAX_KEYS: usize = 64;

/// Why a document gives no keys.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum JwksError {
    /// It is no JSON of the right shape.
    #[error("the answer is no JWKS document: {0}; it looks like {{\"keys\":[…]}}")]
    Malformed(String),
    /// Nothing in it can check a token.
    #[error(
        "none of its {0} keys can be used; RS256, ES256 (P-256) and EdDSA (Ed25519) keys for signatures can"
    )]
    NoKeys(usize),
    /// More than [`MAX_KEYS`].
    #[error("it has {0} usable keys; at most {MAX_KEYS} are allowed")]
    TooMany(usize),
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<serde_json::Value>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    kid: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
    key_ops: Option<Vec<String>>,
    alg: Option<String>,
    crv: Option<String>,
    n: Option<String>,
    e: Option<String>,
    x: Option<String>,
    y: Option<String>,
}

/// The keys of a document. Those that are for something else, of another kind, or damaged are left out, as RFC 7517
/// asks for; shared secrets (`oct`) are too, since they do not belong where everybody can read them.
///
/// # Errors
/// When the document is none, or has no key that can be used, or too many.
pub fn parse_jwks(text: &[u8]) -> Result<KeySet, JwksError> {
    let document: Document =
        serde_json::from_slice(text).map_err(|error| JwksError::Malformed(error.to_string()))?;
    let count = document.keys.len();
    let keys: Vec<Key> = document.keys.into_iter().filter_map(usable).collect();
    match keys.len() {
        0 => Err(JwksError::NoKeys(count)),
        usable if usable > MAX_KEYS => Err(JwksError::TooMany(usable)),
        _ => Ok(KeySet::new(keys)),
    }
}

fn usable(jwk: serde_json::Value) -> Option<Key> {
    let jwk: Jwk = serde_json::from_value(jwk).ok()?;
    let signs = jwk.purpose.as_deref().is_none_or(|purpose| purpose == "sig")
        && jwk.key_ops.as_ref().is_none_or(|operations| operations.iter().any(|name| name == "verify"));
    if !signs {
        return None;
    }
    let bytes = |text: &Option<String>| URL_SAFE_NO_PAD.decode(text.as_deref()?).ok();
    let key = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("RSA", _) => VerifyingKey::from_rsa(&bytes(&jwk.n)?, &bytes(&jwk.e)?),
        ("EC", Some("P-256")) => {
            VerifyingKey::from_point(&[&[4], &bytes(&jwk.x)?[..], &bytes(&jwk.y)?[..]].concat())
        }
        ("OKP", Some("Ed25519")) => VerifyingKey::from_ed25519(&bytes(&jwk.x)?),
        _ => None,
    }?;
    // RFC 9864 renames EdDSA for this curve.
    let named = |alg: &str| alg == key.algorithm().name() || (alg == "Ed25519" && jwk.kty == "OKP");
    jwk.alg.as_deref().is_none_or(named).then(|| Key { kid: jwk.kid.clone(), key })
}
