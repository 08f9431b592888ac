//! Client tokens: JWTs signed with HMAC-SHA256, and nothing else.

use std::sync::Once;

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, EncodingKey, Header, Validation,
    crypto::{CryptoProvider, JwtSigner, JwtVerifier, KeyUtils},
    errors::{Error, ErrorKind},
    signature::{self, Signer, Verifier},
};
use ring::hmac;
use sanjay_protocol::token::Claims;
use serde::Deserialize;
use thiserror::Error as ThisError;

use crate::secret::Secret;

/// Why a token was refused.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
pub enum TokenError {
    /// It is no JWT, or its claims have wrong types.
    #[error("the token is malformed; send a JWT made by the product's back end, `header.claims.signature`")]
    Malformed,
    /// It was signed with another secret, or changed since.
    #[error("the token's signature is wrong; sign it with the edge's `token_secret`")]
    BadSignature,
    /// It was signed with another algorithm, or not at all.
    #[error("the token's algorithm is not accepted; sign it with HS256")]
    WrongAlgorithm,
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
}

/// Signs `claims` with HS256.
#[must_use]
pub fn sign(claims: &Claims, secret: &Secret) -> String {
    install_provider();
    let key = EncodingKey::from_secret(secret.expose().as_bytes());
    jsonwebtoken::encode(&Header::new(Algorithm::HS256), claims, &key)
        .expect("claims are a map with text keys, and HMAC takes any key")
}

/// Checks a token against `secret` and the time `now_s` (Unix seconds), without leeway: a token is dead at
/// its `exp` and alive from its `nbf`.
///
/// # Errors
/// [`TokenError`]; nothing of the claims is believed before the signature is right.
pub fn verify_hs256(token: &str, secret: &Secret, now_s: u64) -> Result<Claims, TokenError> {
    install_provider();
    let mut validation = Validation::new(Algorithm::HS256);
    // The library would ask the operating system for the time; the caller's clock decides below.
    validation.validate_exp = false;
    validation.validate_nbf = false;
    validation.validate_aud = false;
    validation.required_spec_claims.clear();
    let key = DecodingKey::from_secret(secret.expose().as_bytes());
    let decoded = jsonwebtoken::decode::<serde_json::Value>(token, &key, &validation)
        .map_err(|error| refused(&error, token))?;
    for claim in ["sub", "exp"] {
        if decoded.claims.get(claim).is_none() {
            return Err(TokenError::MissingClaim(claim));
        }
    }
    let claims: Claims = serde_json::from_value(decoded.claims).map_err(|_| TokenError::Malformed)?;
    if claims.sub.is_empty() {
        return Err(TokenError::MissingClaim("sub"));
    }
    if claims.exp <= now_s {
        return Err(TokenError::Expired { expired_s: claims.exp, now_s });
    }
    match claims.nbf {
        Some(not_before_s) if not_before_s > now_s => Err(TokenError::NotYetValid { not_before_s, now_s }),
        _ => Ok(claims),
    }
}

fn refused(error: &Error, token: &str) -> TokenError {
    match error.kind() {
        ErrorKind::InvalidSignature => TokenError::BadSignature,
        ErrorKind::InvalidAlgorithm | ErrorKind::UnsupportedAlgorithm => TokenError::WrongAlgorithm,
        // An algorithm that the library does not know, such as `none`, is a header that it cannot read.
        _ if names_another_algorithm(token) => TokenError::WrongAlgorithm,
        _ => TokenError::Malformed,
    }
}

fn names_another_algorithm(token: &str) -> bool {
    #[derive(Deserialize)]
    struct Named {
        alg: String,
    }
    let header = token.split('.').next().and_then(|header| URL_SAFE_NO_PAD.decode(header).ok());
    let named = header.and_then(|header| serde_json::from_slice::<Named>(&header).ok());
    named.is_some_and(|header| header.alg != "HS256")
}

/// HMAC-SHA256 on ring; the library's own providers bring in RSA or a second TLS stack.
static PROVIDER: CryptoProvider =
    CryptoProvider { signer_factory, verifier_factory, key_utils: KeyUtils::new_unimplemented() };

fn install_provider() {
    static ONCE: Once = Once::new();
    // An error means that somebody installed another provider, which signs HS256 as well.
    ONCE.call_once(|| {
        let _ = PROVIDER.install_default();
    });
}

fn signer_factory(algorithm: &Algorithm, key: &EncodingKey) -> Result<Box<dyn JwtSigner>, Error> {
    if *algorithm != Algorithm::HS256 || key.family() != AlgorithmFamily::Hmac {
        return Err(ErrorKind::UnsupportedAlgorithm.into());
    }
    Ok(Box::new(HmacSha256(hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes()))))
}

fn verifier_factory(algorithm: &Algorithm, key: &DecodingKey) -> Result<Box<dyn JwtVerifier>, Error> {
    if *algorithm != Algorithm::HS256 || key.family() != AlgorithmFamily::Hmac {
        return Err(ErrorKind::UnsupportedAlgorithm.into());
    }
    Ok(Box::new(HmacSha256(hmac::Key::new(hmac::HMAC_SHA256, key.try_get_as_bytes()?))))
}

struct HmacSha256(hmac::Key);

impl Signer<Vec<u8>> for HmacSha256 {
    fn try_sign(&self, message: &[u8]) -> Result<Vec<u8>, signature::Error> {
        Ok(hmac::sign(&self.0, message).as_ref().to_vec())
    }
}

impl Verifier<Vec<u8>> for HmacSha256 {
    /// In constant time.
    fn verify(&self, message: &[u8], tag: &Vec<u8>) -> Result<(), signature::Error> {
        hmac::verify(&self.0, message, tag).map_err(|_| signature::Error::new())
    }
}

impl JwtSigner for HmacSha256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

impl JwtVerifier for HmacSha256 {
    fn algorithm(&self) -> Algorithm {
        Algorithm::HS256
    }
}

#[cfg(test)]
#[path = "jwt_tests.rs"]
mod tests;
