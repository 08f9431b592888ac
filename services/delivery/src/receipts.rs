//! Reads the log of receipts for a back end: page after page, and at its end what comes.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    message::State,
    metrics::Metrics,
    store::{InboxStore, LogError, LogPosition, LogStart, LoggedReceipt},
};

/// Most receipts of one batch.
const BATCH: usize = 500;

/// How often a reader that finds nothing for it is told how far it is.
const PROGRESS: Duration = Duration::from_secs(1);

/// How often a reader at the end is told that nothing came.
pub(crate) const IDLE: Duration = Duration::from_secs(10);

/// Which receipts; everything that is set must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    pub(crate) user: Option<String>,
    pub(crate) caller: Option<String>,
    /// Empty for all.
    pub(crate) states: Vec<State>,
}

impl Filter {
    fn matches(&self, receipt: &LoggedReceipt) -> bool {
        self.user.as_ref().is_none_or(|user| *user == receipt.user)
            && self.caller.as_ref().is_none_or(|caller| *caller == receipt.caller)
            && (self.states.is_empty() || self.states.contains(&receipt.receipt.state))
    }
}

/// Some receipts, and where the next follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    /// May be empty.
    pub(crate) receipts: Vec<LoggedReceipt>,
    pub(crate) next: LogPosition,
    /// Whether that is the log's end for now.
    pub(crate) tail: bool,
}

/// Somebody who reads the log. It holds one page at most, and reads the next when it is asked for it.
pub(crate) struct Reader {
    store: Arc<dyn InboxStore>,
    metrics: Metrics,
    filter: Filter,
    follow: bool,
    from: LogStart,
    /// The place of the end, when it was reached and told.
    at_tail: Option<LogPosition>,
    told: Instant,
    ended: bool,
}

impl Reader {
    pub(crate) fn new(
        store: Arc<dyn InboxStore>,
        metrics: Metrics,
        from: LogStart,
        filter: Filter,
        follow: bool,
    ) -> Self {
        let told = Instant::now();
        Self { store, metrics, filter, follow, from, at_tail: None, told, ended: false }
    }

    /// The next batch; `None` at the end of a log that is not followed, and after an error.
    pub(crate) async fn next(&mut self) -> Option<Result<Batch, LogError>> {
        if self.ended {
            return None;
        }
        let result = self.read().await;
        self.told = Instant::now();
        match &result {
            Ok(batch) => {
                self.metrics.receipts_read(batch.receipts.len());
                self.ended = batch.tail && !self.follow;
            }
            Err(_) => self.ended = true,
        }
        Some(result)
    }

    async fn read(&mut self) -> Result<Batch, LogError> {
        loop {
            if let Some(end) = &self.at_tail {
                let more = self.store.receipts_after(end.clone());
                if tokio::time::timeout_at(self.told + IDLE, more).await.is_err() {
                    return Ok(Batch { receipts: Vec::new(), next: end.clone(), tail: true });
                }
            }
            let mut page = self.store.receipts(self.from.clone(), BATCH).await?;
            self.from = LogStart::After(page.next.clone());
            page.receipts.retain(|receipt| self.filter.matches(receipt));
            let first_end = page.tail && self.at_tail.is_none();
            self.at_tail = page.tail.then(|| page.next.clone());
            let waited = self.told.elapsed();
            if !page.receipts.is_empty() || first_end || (!page.tail && waited >= PROGRESS) || waited >= IDLE
            {
                return Ok(Batch { receipts: page.receipts, next: page.next, tail: page.tail });
            }
        }
    }
}
