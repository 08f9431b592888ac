//! What becomes of tokens, and of the keys that they are checked with.

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue},
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::{Registry, Unit},
};
use sanjay_runtime::jwt::TokenError;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: FetchOutcome,
}

/// What became of a fetch of keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FetchOutcome {
    /// There are keys.
    Fetched,
    /// No answer.
    Unreachable,
    /// An answer without keys.
    BadAnswer,
}

impl EncodeLabelValue for FetchOutcome {
    fn encode(
        &self,
        encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>,
    ) -> Result<(), std::fmt::Error> {
        let text = match self {
            Self::Fetched => "fetched",
            Self::Unreachable => "unreachable",
            Self::BadAnswer => "bad_answer",
        };
        EncodeLabelValue::encode(&text, encoder)
    }
}

/// Clones share their values.
#[derive(Clone, Debug, Default)]
pub struct TokenMetrics {
    refusals: Family<ReasonLabel, Counter>,
    unavailable: Counter,
    fetches: Family<OutcomeLabel, Counter>,
    keys: Gauge,
    fetched_at: Gauge,
    /// Connections whose token ended without another one in time.
    pub expired: Counter,
    /// Tokens that were taken in place of one that ends.
    pub refreshes: Counter,
}

impl TokenMetrics {
    /// Registers everything.
    #[must_use]
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        for reason in TokenError::REASONS {
            let _series = metrics.refusals.get_or_create(&ReasonLabel { reason });
        }
        for outcome in [FetchOutcome::Fetched, FetchOutcome::Unreachable, FetchOutcome::BadAnswer] {
            let _series = metrics.fetches.get_or_create(&OutcomeLabel { outcome });
        }
        let help = "Tokens that were checked and refused, by what was wrong with them";
        registry.register("edge_token_refusals", help, metrics.refusals.clone());
        let help = "Tokens that could not be checked, because their key is not at hand";
        registry.register("edge_tokens_unchecked", help, metrics.unavailable.clone());
        let help = "Connections closed because their token ended and no other one came";
        registry.register("edge_tokens_expired", help, metrics.expired.clone());
        let help = "Tokens that were taken in place of one that ends, for connections and subscriptions";
        registry.register("edge_token_refreshes", help, metrics.refreshes.clone());
        let help = "Fetches of edge.token_jwks_url by outcome: keys came (fetched), no answer (unreachable), or one \
                    without usable keys (bad_answer)";
        registry.register("edge_jwks_fetches", help, metrics.fetches.clone());
        let help = "Keys of edge.token_jwks_url in use";
        registry.register("edge_jwks_keys", help, metrics.keys.clone());
        let help =
            "When keys were fetched last, in Unix time; 0 before. Its distance from now is the keys' age";
        registry.register_with_unit("edge_jwks_fetched_at", help, Unit::Seconds, metrics.fetched_at.clone());
        metrics
    }

    /// A token was refused.
    pub fn refused(&self, reason: &'static str) {
        self.refusals.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// A token could not be checked.
    pub fn unavailable(&self) {
        self.unavailable.inc();
    }

    /// A fetch ended; with keys, at this time in Unix seconds.
    pub fn fetched(&self, outcome: FetchOutcome, keys: usize, at_s: Option<u64>) {
        self.fetches.get_or_create(&OutcomeLabel { outcome }).inc();
        if let Some(at_s) = at_s {
            self.keys.set(i64::try_from(keys).unwrap_or(i64::MAX));
            self.fetched_at.set(i64::try_from(at_s).unwrap_or(i64::MAX));
        }
    }
}
