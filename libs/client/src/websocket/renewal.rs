//! When a connection's token is replaced: somewhat before it ends, so that the connection goes on.

use std::time::Duration;

use futures::future::BoxFuture;
use tokio::time::{Instant, sleep_until, timeout};

use super::options::{TokenError, TokenSource};
use crate::backoff;

/// Longest time before a token's end at which another one is asked for.
const MAX_LEAD: Duration = Duration::from_secs(60);
/// Longest time that is counted with; a token that lives longer is asked for again before its end.
const MAX_LIFE: Duration = Duration::from_secs(30 * 24 * 60 * 60);
const RETRY_BASE: Duration = Duration::from_secs(1);
const RETRY_CAP: Duration = Duration::from_secs(20);

/// The renewal of one connection's token at a time.
pub(super) struct Renewal {
    source: TokenSource,
    within: Duration,
    due: Option<Instant>,
    /// The application is being asked.
    asking: Option<BoxFuture<'static, Result<String, TokenError>>>,
    failures: u32,
}

impl Renewal {
    /// Nothing is due yet. `within`: how long the application has to answer.
    pub(super) fn new(source: TokenSource, within: Duration) -> Self {
        Self { source, within, due: None, asking: None, failures: 0 }
    }

    /// A token is in force for so long. The next one is asked for when a quarter of that is left, at most a minute; up
    /// to half of it later (`fraction` in [0, 1)), so that clients that connected together do not all ask together.
    pub(super) fn in_force(&mut self, ttl: Duration, now: Instant, fraction: f64) {
        let ttl = ttl.min(MAX_LIFE);
        let lead = (ttl / 4).min(MAX_LEAD).mul_f64(1.0 - fraction / 2.0);
        self.failures = 0;
        self.asking = None;
        self.due = self.source.can_renew().then(|| now + ttl - lead);
    }

    /// The token has ended: another one is asked for now, unless one is under way.
    pub(super) fn urgent(&mut self, now: Instant) {
        if self.source.can_renew() && self.asking.is_none() {
            self.due = Some(now);
        }
    }

    /// The application gave none, or the server refused it: asked for again after a while.
    pub(super) fn failed(&mut self, now: Instant, fraction: f64) {
        let delay = backoff::retry(self.failures, None, RETRY_BASE, RETRY_CAP, fraction);
        self.failures = self.failures.saturating_add(1);
        self.due = Some(now + delay);
    }

    /// The connection is over.
    pub(super) fn stop(&mut self) {
        (self.due, self.asking) = (None, None);
    }

    /// Waits until a token is due, and asks for it. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Result<String, TokenError> {
        if self.asking.is_none() {
            match self.due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
            self.due = None;
        }
        let (source, within) = (&self.source, self.within);
        let asking = self.asking.get_or_insert_with(|| {
            let source = source.clone();
            Box::pin(async move {
                let late = |_| format!("no token from the application within {} s", within.as_secs_f64());
                timeout(within, source.get()).await.map_err(late)?
            })
        });
        let token = asking.await;
        self.asking = None;
        token
    }
}
