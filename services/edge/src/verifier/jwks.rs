//! The task that keeps the keys of a JWKS document: fetches them now and then, and when a token has a key that is not
//! known, yet never more often than once an interval.

use std::{sync::Arc, time::Duration};

use sanjay_runtime::{
    ReadinessFlag, SharedClock, SharedRandom,
    fetch::{Document, FetchError, Source},
    jwt::parse_jwks,
    random::fraction,
};
use tokio::time::{Instant, sleep, sleep_until};

use super::keyring::Published;
use crate::{
    metrics::{FetchOutcome, TokenMetrics},
    upstream::{ShardEvent, shards::Replies},
};

/// How often keys are fetched.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// From the end of a fetch to the beginning of the next, at least.
    pub interval: Duration,
    /// At most; less when the server allows its document to be kept for less.
    pub refresh: Duration,
}

/// What the task needs.
pub struct Parts {
    /// Where the document is.
    pub source: Source,
    /// How often it is fetched.
    pub pace: Pace,
    /// Where its keys go.
    pub published: Arc<Published>,
    /// Who waits for them.
    pub shards: Replies,
    /// Set with the first keys, when there are no others.
    pub ready: Option<ReadinessFlag>,
    /// The time of day, for a metric.
    pub clock: SharedClock,
    /// Spreads repeated attempts of many edges.
    pub random: SharedRandom,
    /// What happens here.
    pub metrics: TokenMetrics,
}

/// The task: never ends by itself.
pub async fn run(parts: Parts) {
    let source = parts.source.clone();
    keep(parts, || source.fetch()).await;
}

async fn keep<F>(parts: Parts, fetch: impl Fn() -> F)
where
    F: Future<Output = Result<Document, FetchError>>,
{
    let Parts { source, pace, published, shards, ready, clock, random, metrics } = parts;
    if !source.is_encrypted() {
        tracing::warn!(
            url = %source,
            "the keys of tokens come over plain HTTP: whoever can change it can sign tokens; use https, or keep the \
             address on this machine"
        );
    }
    let mut failures = 0;
    loop {
        published.begin();
        let fetched = fetch().await.map_err(Failure::Fetch).and_then(|document| {
            let keys = parse_jwks(&document.body).map_err(|error| Failure::Document(error.to_string()))?;
            Ok((keys, document.max_age))
        });
        let wait = match fetched {
            Ok((keys, max_age)) => {
                metrics.fetched(FetchOutcome::Fetched, keys.len(), Some(clock.now_s()));
                if failures > 0 || ready.is_some() {
                    tracing::debug!(url = %source, keys = keys.len(), "the keys of tokens were fetched");
                }
                failures = 0;
                published.end(Some(keys));
                if let Some(ready) = &ready {
                    ready.set(true);
                }
                max_age.map_or(pace.refresh, |max_age| max_age.clamp(pace.interval, pace.refresh))
            }
            Err(failure) => {
                published.end(None);
                metrics.fetched(failure.outcome(), 0, None);
                failures += 1;
                let wait = after_failures(failures, pace, fraction(&*random));
                tracing::warn!(
                    url = %source,
                    why = failure.text(),
                    failures,
                    retry_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                    "cannot fetch the keys of tokens; the last good ones stay in use, and tokens of other keys are \
                     answered 1013; check edge.token_jwks_url and the issuer's server"
                );
                wait
            }
        };
        // Whoever waits is answered now, with these keys or without.
        shards.tell_all(|| ShardEvent::KeysLookedUp);
        let ended = Instant::now();
        sleep(pace.interval).await;
        tokio::select! {
            () = published.asked() => {}
            () = sleep_until(ended + wait.max(pace.interval)) => {}
        }
    }
}

/// Doubling from the interval up to the refresh, less a random part of up to half.
fn after_failures(failures: u32, pace: Pace, fraction: f64) -> Duration {
    let doubled = pace.interval.saturating_mul(1 << failures.min(16)).min(pace.refresh);
    doubled.mul_f64(1.0 - fraction / 2.0)
}

enum Failure {
    Fetch(FetchError),
    Document(String),
}

impl Failure {
    fn outcome(&self) -> FetchOutcome {
        match self {
            Self::Fetch(FetchError::Status(_) | FetchError::TooLarge) | Self::Document(_) => {
                FetchOutcome::BadAnswer
            }
            Self::Fetch(_) => FetchOutcome::Unreachable,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Fetch(error) => error.to_string(),
            Self::Document(why) => why.clone(),
        }
    }
}

#[cfg(test)]
#[path = "jwks_tests.rs"]
mod tests;
