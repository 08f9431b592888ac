//! The keys that tokens are checked with: the configured ones, and those of a JWKS document that `jwks.rs` keeps fresh.

use std::sync::Arc;

use parking_lot::RwLock;
use sanjay_protocol::{limits::MAX_TOKEN_BYTES, token::Claims};
use sanjay_runtime::jwt::{KeySet, Match, Rules, TokenError, Unverified};
use tokio::sync::Notify;

use super::{TokenVerifier, VerifyError};
use crate::metrics::TokenMetrics;

/// Checks tokens with keys.
pub struct Keyring {
    own: KeySet,
    published: Option<Arc<Published>>,
    rules: Rules,
    metrics: TokenMetrics,
}

/// The keys of a JWKS document, shared between the shards and the task that fetches it.
#[derive(Default)]
pub struct Published {
    state: RwLock<State>,
    wanted: Notify,
}

#[derive(Default)]
struct State {
    keys: Arc<KeySet>,
    phase: Phase,
    /// A document was had at some time.
    known: bool,
    /// The last fetch failed.
    failing: bool,
}

/// Where the fetching task stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    /// A fetch is under way, or was asked for.
    #[default]
    Fetching,
    /// A fetch ended a moment ago; nobody can ask for another yet.
    Resting,
    /// A key that is not known is looked up at once.
    Idle,
}

impl Published {
    /// A fetch begins.
    pub fn begin(&self) {
        self.state.write().phase = Phase::Fetching;
    }

    /// A fetch ended: with keys, or in vain, which leaves the last ones in use. For a while nobody can ask.
    pub fn end(&self, keys: Option<KeySet>) {
        let mut state = self.state.write();
        state.phase = Phase::Resting;
        state.failing = keys.is_none();
        if let Some(keys) = keys {
            state.keys = Arc::new(keys);
            state.known = true;
        }
    }

    /// From now on a token with a key that is not known may ask for a fetch; returns when one did.
    pub async fn asked(&self) {
        self.state.write().phase = Phase::Idle;
        self.wanted.notified().await;
    }

    /// What may be done about a key that is not known.
    fn look_up(&self) -> Result<(), VerifyError> {
        let mut state = self.state.write();
        match state.phase {
            Phase::Fetching => Ok(()),
            Phase::Idle => {
                // Once, however many tokens come before the task wakes up.
                state.phase = Phase::Fetching;
                self.wanted.notify_one();
                Ok(())
            }
            Phase::Resting if state.failing => Err(VerifyError::Unavailable(
                "the keys of tokens cannot be fetched now; try again in a few seconds".to_owned(),
            )),
            Phase::Resting => Err(VerifyError::Unavailable(
                "the token's key is not known yet, and keys were fetched just now; try again in a few seconds"
                    .to_owned(),
            )),
        }
    }
}

/// What the keys say of a token before its claims are looked at.
enum Verdict {
    Signed,
    Refused(TokenError),
    /// Its key may be published, and is not known here.
    Unknown,
}

impl Keyring {
    /// `own`: the configured keys. `published`: those that a task of [`super::jwks`] fetches.
    #[must_use]
    pub fn new(own: KeySet, published: Option<Arc<Published>>, rules: Rules, metrics: TokenMetrics) -> Self {
        Self { own, published, rules, metrics }
    }

    fn check(&self, token: &Unverified<'_>) -> Verdict {
        let own = self.own.check(token);
        if own == Match::Signed {
            return Verdict::Signed;
        }
        let Some(published) = &self.published else {
            return Verdict::Refused(self.refusal(token, own, &KeySet::default()));
        };
        let (keys, known) = {
            let state = published.state.read();
            (Arc::clone(&state.keys), state.known)
        };
        let found = keys.check(token);
        if found == Match::Signed {
            return Verdict::Signed;
        }
        // A shared secret is never published, and what a configured key has the name of is not looked up.
        let may_be_published = token.algorithm().is_some_and(|algorithm| algorithm.least_secret().is_none())
            && token.kid().is_none_or(|kid| !self.own.has(kid));
        if may_be_published && (found == Match::UnknownKey || !known) {
            return Verdict::Unknown;
        }
        let worse = if own == Match::BadSignature { own } else { found };
        Verdict::Refused(self.refusal(token, worse, &keys))
    }

    fn refusal(&self, token: &Unverified<'_>, found: Match, published: &KeySet) -> TokenError {
        let is_known =
            |algorithm| self.own.algorithms().chain(published.algorithms()).any(|other| other == algorithm);
        match found {
            Match::Signed | Match::BadSignature => TokenError::BadSignature,
            Match::UnknownKey if token.algorithm().is_some_and(is_known) => token.unknown_key(),
            Match::UnknownKey | Match::WrongAlgorithm => {
                let mut accepted: Vec<&str> = self
                    .own
                    .algorithms()
                    .chain(published.algorithms())
                    .map(|algorithm| algorithm.name())
                    .collect();
                accepted.dedup();
                let accepted = match accepted.len() {
                    0 => "a key of the JWKS document".to_owned(),
                    _ => accepted.join(" or "),
                };
                TokenError::WrongAlgorithm { accepted }
            }
        }
    }

    fn refuse(&self, error: &TokenError) -> VerifyError {
        self.metrics.refused(error.reason());
        VerifyError::Refused(error.to_string())
    }

    fn verify_with(
        &self,
        token: &str,
        now_s: u64,
        unknown: impl FnOnce(&Published, &Unverified<'_>) -> VerifyError,
    ) -> Result<Claims, VerifyError> {
        if token.len() > MAX_TOKEN_BYTES {
            self.metrics.refused(TokenError::Malformed.reason());
            let why = format!("the token has {} bytes; at most {MAX_TOKEN_BYTES} are allowed", token.len());
            return Err(VerifyError::Refused(why));
        }
        let token = Unverified::parse(token).map_err(|error| self.refuse(&error))?;
        match (self.check(&token), &self.published) {
            (Verdict::Signed, _) => token.claims(&self.rules, now_s).map_err(|error| self.refuse(&error)),
            (Verdict::Refused(error), _) => Err(self.refuse(&error)),
            (Verdict::Unknown, Some(published)) => Err(unknown(published, &token)),
            (Verdict::Unknown, None) => Err(self.refuse(&token.unknown_key())),
        }
    }
}

impl TokenVerifier for Keyring {
    fn verify(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError> {
        self.verify_with(token, now_s, |published, _| match published.look_up() {
            Ok(()) => VerifyError::LookingUp,
            Err(error) => {
                self.metrics.unavailable();
                error
            }
        })
    }

    fn verify_looked_up(&self, token: &str, now_s: u64) -> Result<Claims, VerifyError> {
        self.verify_with(token, now_s, |published, token| {
            if published.state.read().failing {
                self.metrics.unavailable();
                let why = "the keys of tokens cannot be fetched now; try again in a few seconds";
                return VerifyError::Unavailable(why.to_owned());
            }
            self.refuse(&token.unknown_key())
        })
    }
}

#[cfg(test)]
#[path = "keyring_tests.rs"]
mod tests;
