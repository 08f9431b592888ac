//! Client tokens for tests.

use sanjay_protocol::token::{Action, Capabilities, Claims};
use sanjay_runtime::{
    Clock, Secret, SystemClock,
    jwt::{self, Algorithm, SigningKey},
};
use serde_json::{Map, Value};

use crate::{keys::KeyPair, settings::TOKEN_SECRET};

/// A token in the making: everything allowed for an hour, unless it is told otherwise.
#[derive(Debug, Clone)]
pub struct Token {
    claims: Claims,
    more: Map<String, Value>,
    secret: Secret,
    algorithm: Algorithm,
    pair: Option<KeyPair>,
    kid: Option<String>,
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
            jti: None,
            caps: Capabilities::everything(),
            channel: None,
        };
        let secret = Secret::new(TOKEN_SECRET);
        Self { claims, more: Map::new(), secret, algorithm: Algorithm::Hs256, pair: None, kid: None }
    }

    /// A subscription token: for a user and a channel, of which it allows to subscribe.
    #[must_use]
    pub fn for_channel(user: &str, channel: &str) -> Self {
        let mut token = Self::of(user).caps(&[]);
        token.claims.channel = Some(channel.to_owned());
        token
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

    /// Made so many seconds from now; negative: made then. `None`: it does not say when it was made.
    #[must_use]
    pub fn made_in_s(mut self, seconds: Option<i64>) -> Self {
        self.claims.iat = seconds.map(|seconds| SystemClock.now_s().saturating_add_signed(seconds));
        self
    }

    /// With an id of its own.
    #[must_use]
    pub fn jti(mut self, id: &str) -> Self {
        self.claims.jti = Some(id.to_owned());
        self
    }

    /// Allows only this.
    #[must_use]
    pub fn caps(mut self, caps: &[(&str, &[Action])]) -> Self {
        let entries = caps.iter().map(|(pattern, actions)| ((*pattern).to_owned(), actions.to_vec()));
        self.claims.caps = entries.collect();
        self
    }

    /// Has another claim.
    #[must_use]
    pub fn claim(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.more.insert(name.to_owned(), value.into());
        self
    }

    /// Signed with another secret.
    #[must_use]
    pub fn signed_with(mut self, secret: &str) -> Self {
        self.secret = Secret::new(secret);
        self
    }

    /// Signed with the secret by another algorithm, such as `HS512`.
    ///
    /// # Panics
    /// When there is no such algorithm.
    #[must_use]
    pub fn algorithm(mut self, name: &str) -> Self {
        self.algorithm = Algorithm::from_name(name).expect("an algorithm");
        self
    }

    /// Signed with a private key.
    #[must_use]
    pub fn signed_by(mut self, pair: &KeyPair) -> Self {
        self.pair = Some(pair.clone());
        self
    }

    /// Names its key.
    #[must_use]
    pub fn kid(mut self, kid: &str) -> Self {
        self.kid = Some(kid.to_owned());
        self
    }

    /// The token's text.
    ///
    /// # Panics
    /// When the algorithm has no shared secrets.
    #[must_use]
    pub fn sign(&self) -> String {
        let mut values = serde_json::to_value(&self.claims).expect("claims are JSON");
        for (name, value) in &self.more {
            values[name] = value.clone();
        }
        let sign = |key: &SigningKey| jwt::sign_with(&values, key, self.kid.as_deref());
        match &self.pair {
            Some(pair) => sign(pair.key()),
            None => {
                let key = SigningKey::from_secret(self.algorithm, &self.secret);
                sign(&key.expect("the algorithm has shared secrets"))
            }
        }
    }
}
