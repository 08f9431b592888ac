//! The port through which the edge checks tokens, and its adapter for a shared secret (HS256).

use sanjay_protocol::{limits::MAX_TOKEN_BYTES, token::Claims};
use sanjay_runtime::{jwt, secret::Secret};

/// Why a token was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The token was checked and refused.
    #[error("{0}")]
    Refused(String),
    /// The token cannot be checked now, such as when a key is not at hand.
    #[error("{0}")]
    Unavailable(String),
}

/// Checks tokens. Called on a shard's thread for each `hello`: it must not block.
pub trait TokenVerifier: Send + Sync + 'static {
    /// The claims of a token that is valid at `now_s` (Unix seconds).
    ///
    /// # Errors
    /// Says why the token was refused, or that it cannot be checked now.
    fn verify(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError>;
}

/// Tokens signed with one shared secret.
pub struct Hs256 {
    secret: Secret,
}

impl Hs256 {
    /// A verifier for tokens that `secret` signed.
    #[must_use]
    pub fn new(secret: Secret) -> Self {
        Self { secret }
    }
}

impl TokenVerifier for Hs256 {
    fn verify(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError> {
        if token.len() > MAX_TOKEN_BYTES {
            let why = format!("the token has {} bytes; at most {MAX_TOKEN_BYTES} are allowed", token.len());
            return Err(VerifyError::Refused(why));
        }
        jwt::verify_hs256(token, &self.secret, now_s).map_err(|error| VerifyError::Refused(error.to_string()))
    }
}
