//! Client tokens: JWTs, signed with a shared secret or with a private key whose public half the edge knows.
//!
//! A key is pinned to its algorithm. What a token says of its algorithm only selects among the keys that are for it,
//! so that `none` selects nothing and a public key is never used as a shared secret.

mod algorithm;
mod der;
mod jwks;
mod keys;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use sanjay_protocol::token::Claims;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use thiserror::Error as ThisError;

pub use self::{
    algorithm::Algorithm,
    jwks::{JwksError, MAX_KEYS, parse_jwks},
    keys::{KeyError, SigningKey, VerifyingKey},
};
use crate::secret::Secret;

/// Longest `kid` that is repeated in an error, in characters.
const SHOWN: usize = 60;

/// Why a token was refused.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum TokenError {
    /// It is no JWT, or its claims have wrong types.
    #[error("the token is malformed; send a JWT made by the product's back end, `header.claims.signature`")]
    Malformed,
    /// Its header asks for what is not understood (`crit`).
    #[error("the token's header has `crit`, which is not supported; leave it out")]
    Critical,
    /// It was signed with another key, or changed since.
    #[error("the token's signature is wrong; sign it with the key that the edge is configured with")]
    BadSignature,
    /// It was signed with another algorithm, or not at all.
    #[error("the token's algorithm is not accepted; sign it with {accepted}")]
    WrongAlgorithm {
        /// What would be.
        accepted: String,
    },
    /// No key has its `kid`.
    #[error("no key has the token's kid \"{kid}\"; publish the key, or sign with one that is published")]
    UnknownKey {
        /// Its `kid`, cut.
        kid: String,
    },
    /// It has ended.
    #[error("the token expired at {expired_s} (Unix seconds), {} s ago; get a new one and reconnect", now_s.saturating_sub(*expired_s))]
    Expired {
        /// When it ended, in Unix seconds.
        expired_s: u64,
        /// The time of the check, in Unix seconds.
        now_s: u64,
    },
    /// It is for later.
    #[error("the token is not valid before {not_before_s} (Unix seconds), in {} s; check the clock of whoever made it", not_before_s.saturating_sub(*now_s))]
    NotYetValid {
        /// When it begins, in Unix seconds.
        not_before_s: u64,
        /// The time of the check, in Unix seconds.
        now_s: u64,
    },
    /// It lacks a claim.
    #[error("the token lacks the claim `{0}`; add it and sign again")]
    MissingClaim(&'static str),
    /// It was made for somebody else.
    #[error(
        "the token's `aud` does not name this server; sign it with the audience that `edge.token_audience` names"
    )]
    WrongAudience,
    /// It was made by somebody else.
    #[error("the token's `iss` is another issuer; sign it as the one that `edge.token_issuer` names")]
    WrongIssuer,
}

impl TokenError {
    /// Every value of [`reason`](Self::reason).
    pub const REASONS: [&str; 7] =
        ["malformed", "signature", "algorithm", "unknown_key", "expired", "not_yet_valid", "claims"];

    /// The kind of the error, for a metric.
    #[must_use]
    pub const fn reason(&self) -> &'static str {
        match self {
            Self::Malformed | Self::Critical => "malformed",
            Self::BadSignature => "signature",
            Self::WrongAlgorithm { .. } => "algorithm",
            Self::UnknownKey { .. } => "unknown_key",
            Self::Expired { .. } => "expired",
            Self::NotYetValid { .. } => "not_yet_valid",
            Self::MissingClaim(_) | Self::WrongAudience | Self::WrongIssuer => "claims",
        }
    }
}

/// A key with its name.
#[derive(Debug, Clone)]
pub struct Key {
    /// What tokens of it have as `kid`. Without one it is tried for every token of its algorithm.
    pub kid: Option<String>,
    /// The key.
    pub key: VerifyingKey,
}

/// Keys of which each token is checked by those that its header selects.
#[derive(Debug, Clone, Default)]
pub struct KeySet(Vec<Key>);

impl KeySet {
    /// These keys.
    #[must_use]
    pub fn new(keys: Vec<Key>) -> Self {
        Self(keys)
    }

    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether some key has this name.
    #[must_use]
    pub fn has(&self, kid: &str) -> bool {
        self.0.iter().any(|key| key.kid.as_deref() == Some(kid))
    }

    /// The algorithms of its keys, each once.
    pub fn algorithms(&self) -> impl Iterator<Item = Algorithm> {
        let has = |wanted: &Algorithm| self.0.iter().any(|key| key.key.algorithm() == *wanted);
        Algorithm::ALL.into_iter().filter(has)
    }

    /// Checks a signature with the keys that have the token's `kid`, or with those of its algorithm when either side
    /// has no `kid`.
    #[must_use]
    pub fn check(&self, token: &Unverified<'_>) -> Match {
        let named = |key: &&Key| key.kid.is_some() && key.kid == token.kid;
        let nameless = |key: &&Key| key.kid.is_none() || token.kid.is_none();
        let is_for = |key: &&Key| Some(key.key.algorithm()) == token.algorithm;
        let judge = |keys: &mut dyn Iterator<Item = &Key>, none: Match| {
            let mut found = none;
            for key in keys {
                if key.key.is_by(token.signed.as_bytes(), &token.signature) {
                    return Match::Signed;
                }
                found = Match::BadSignature;
            }
            found
        };
        if token.kid().is_some_and(|kid| self.has(kid)) {
            return judge(&mut self.0.iter().filter(named).filter(is_for), Match::WrongAlgorithm);
        }
        let none = match (&token.kid, token.algorithm) {
            (Some(_), Some(_)) => Match::UnknownKey,
            _ => Match::WrongAlgorithm,
        };
        judge(&mut self.0.iter().filter(nameless).filter(is_for), none)
    }
}

/// What a set of keys says of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// A key of the set signed it.
    Signed,
    /// Keys that fit did not.
    BadSignature,
    /// No key has its `kid`.
    UnknownKey,
    /// No key is for its algorithm, or the one with its `kid` is not.
    WrongAlgorithm,
}

/// What claims have to say beside the user and the time.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    /// One of `aud` has to be this.
    pub audience: Option<String>,
    /// `iss` has to be this.
    pub issuer: Option<String>,
}

/// A token whose header was read. Nothing in it is believed yet.
#[derive(Debug)]
pub struct Unverified<'a> {
    /// What the signature is about.
    signed: &'a str,
    claims: &'a str,
    signature: Vec<u8>,
    /// `None`: one that is not supported, such as `none`.
    algorithm: Option<Algorithm>,
    kid: Option<String>,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

impl<'a> Unverified<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// When it is no JWT, or its header asks for something that is not understood.
    pub fn parse(token: &'a str) -> Result<Self, TokenError> {
        let (signed, signature) = token.rsplit_once('.').ok_or(TokenError::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(TokenError::Malformed)?;
        let header: Header = decode(header)?;
        if header.crit.is_some() {
            return Err(TokenError::Critical);
        }
        let signature = URL_SAFE_NO_PAD.decode(signature).map_err(|_| TokenError::Malformed)?;
        let algorithm = Algorithm::from_name(&header.alg);
        Ok(Self { signed, claims, signature, algorithm, kid: header.kid })
    }

    /// The algorithm that it says it is signed with; `None` for one that is not supported.
    #[must_use]
    pub fn algorithm(&self) -> Option<Algorithm> {
        self.algorithm
    }

    /// The name of the key that it says it is signed with.
    #[must_use]
    pub fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    /// The error about a key that is not known.
    #[must_use]
    pub fn unknown_key(&self) -> TokenError {
        let kid = self.kid().unwrap_or_default();
        TokenError::UnknownKey { kid: kid.chars().filter(|c| !c.is_control()).take(SHOWN).collect() }
    }

    /// The claims of a token whose signature was found right, checked against `rules` and the time `now_s` (Unix
    /// seconds), without leeway: a token is dead at its `exp` and alive from its `nbf`.
    ///
    /// # Errors
    /// The first claim that is missing or wrong.
    pub fn claims(&self, rules: &Rules, now_s: u64) -> Result<Claims, TokenError> {
        let values: Value = decode(self.claims)?;
        for claim in ["sub", "exp"] {
            if values.get(claim).is_none() {
                return Err(TokenError::MissingClaim(claim));
            }
        }
        check_rules(&values, rules)?;
        let claims: Claims = serde_json::from_value(values).map_err(|_| TokenError::Malformed)?;
        if claims.sub.is_empty() {
            return Err(TokenError::MissingClaim("sub"));
        }
        if claims.exp <= now_s {
            return Err(TokenError::Expired { expired_s: claims.exp, now_s });
        }
        match claims.nbf {
            Some(not_before_s) if not_before_s > now_s => {
                Err(TokenError::NotYetValid { not_before_s, now_s })
            }
            _ => Ok(claims),
        }
    }
}

fn check_rules(values: &Value, rules: &Rules) -> Result<(), TokenError> {
    if let Some(audience) = &rules.audience {
        match values.get("aud") {
            None => return Err(TokenError::MissingClaim("aud")),
            Some(Value::String(one)) if one == audience => {}
            Some(Value::Array(several)) if several.iter().any(|one| one == audience) => {}
            Some(_) => return Err(TokenError::WrongAudience),
        }
    }
    match (&rules.issuer, values.get("iss")) {
        (None, _) => Ok(()),
        (Some(_), None) => Err(TokenError::MissingClaim("iss")),
        (Some(issuer), Some(found)) if found == issuer => Ok(()),
        (Some(_), Some(_)) => Err(TokenError::WrongIssuer),
    }
}

fn decode<T: for<'de> Deserialize<'de>>(part: &str) -> Result<T, TokenError> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| TokenError::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_| TokenError::Malformed)
}

/// Signs claims, which are an object of JSON. `kid`: the name of the key in the header.
///
/// # Panics
/// When the claims cannot be written as JSON.
#[must_use]
pub fn sign_with(claims: &impl Serialize, key: &SigningKey, kid: Option<&str>) -> String {
    let mut header = serde_json::json!({ "alg": key.algorithm().name(), "typ": "JWT" });
    if let Some(kid) = kid {
        header["kid"] = kid.into();
    }
    let claims = serde_json::to_vec(claims).expect("claims are JSON");
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims));
    let signature = URL_SAFE_NO_PAD.encode(key.sign(signed.as_bytes()));
    format!("{signed}.{signature}")
}

/// Signs `claims` with HS256.
#[must_use]
pub fn sign(claims: &Claims, secret: &Secret) -> String {
    let key = SigningKey::from_secret(Algorithm::Hs256, secret).expect("HS256 has shared secrets");
    sign_with(claims, &key, None)
}

#[cfg(test)]
#[path = "jwt_tests.rs"]
mod tests;
