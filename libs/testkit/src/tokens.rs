//! Client tokens for tests.

use sanjay_protocol::token::{Action, Capabilities, Claims};
use sanjay_runtime::{Clock, Secret, SystemClock, jwt};

use crate::settings::TOKEN_SECRET;

/// A token in the making: everything allowed for an hour, unless it is told otherwise.
#[derive(Debug, Clone)]
pub struct Token {
    claims: Claims,
    secret: Secret,
}

impl Token {
    /// For a user.
    #[must_use]
    pub fn of(user: &str) -> Self {
        let now_s = SystemClock.now_s();
        let claims = Claims {
            sub: user.to_owned(),
            exp: now_s + 3_600,
            iat: Some(now_s),
            nbf: None,
            caps: Capabilities::everything(),
        };
        Self { claims, secret: Secret::new(TOKEN_SECRET) }
    }

    /// Ends so many seconds from now; negative: ended then.
    #[must_use]
    pub fn expires_in_s(mut self, seconds: i64) -> Self {
        self.claims.exp = SystemClock.now_s().saturating_add_signed(seconds);
        self
    }

    /// Begins so many seconds from now.
    #[must_use]
    pub fn begins_in_s(mut self, seconds: u64) -> Self {
        self.claims.nbf = Some(SystemClock.now_s() + seconds);
        self
    }

    /// Allows only this.
    #[must_use]
    pub fn caps(mut self, caps: &[(&str, &[Action])]) -> Self {
        let entries = caps.iter().map(|(pattern, actions)| ((*pattern).to_owned(), actions.to_vec()));
        self.claims.caps = entries.collect();
        self
    }

    /// Signed with another secret.
    #[must_use]
    pub fn signed_with(mut self, secret: &str) -> Self {
        self.secret = Secret::new(secret);
        self
    }

    /// The token's text.
    #[must_use]
    pub fn sign(&self) -> String {
        jwt::sign(&self.claims, &self.secret)
    }
}
