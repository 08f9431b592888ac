//! The port through which the edge checks tokens, and its adapter: a ring of keys, of which some may be fetched.

pub mod jwks;
pub mod keyring;

use sanjay_protocol::token::Claims;

pub use keyring::Keyring;

/// Why a token was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VerifyError {
    /// The token was checked and refused.
    #[error("{0}")]
    Refused(String),
    /// The token cannot be checked now, such as when a key is not at hand.
    #[error("{0}")]
    Unavailable(String),
    /// The token's key is being looked up. Every shard is told when that is done, well or not
    /// ([`ShardEvent::KeysLookedUp`](crate::upstream::ShardEvent::KeysLookedUp)).
    #[error("the token's key is being looked up; try again in a moment")]
    LookingUp,
}

/// Checks tokens. Called on a shard's thread for each `hello`: it must not block.
pub trait TokenVerifier: Send + Sync + 'static {
    /// The claims of a token that is valid at `now_s` (Unix seconds).
    ///
    /// # Errors
    /// Says why the token was refused, or that it cannot be checked now.
    fn verify(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError>;

    /// The same after keys were looked up: never [`VerifyError::LookingUp`].
    ///
    /// # Errors
    /// As [`verify`](Self::verify).
    fn verify_looked_up(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError> {
        self.verify(token, now_s)
    }
}
