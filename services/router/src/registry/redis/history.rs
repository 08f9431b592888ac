//! Reading what channels keep, over connections of its own: a large page holds up no publication.

use std::{sync::Arc, time::Duration};

use prost::bytes::Bytes;
use redis::Value;
use tokio::sync::Semaphore;

use super::{
    lanes::new_epoch,
    line::Line,
    pool::Pool,
    server::{Known, describe, timed_out},
};
use crate::{
    bus::redis::envelope::{Content, decode},
    registry::{
        RegistryError, Top,
        history::{HistoryPage, HistoryQuery, Keep},
    },
};

/// Reads at a time: bounds the memory that pages take, and leaves connections for sessions.
const READS: usize = 8;

/// Reads histories of channels.
pub(super) struct Reader {
    known: Arc<Known>,
    line: Arc<Line>,
    room: Semaphore,
}

/// What the script answers: see `scripts/history.lua`.
type Answer = (String, u64, bool, bool, bool, Vec<Value>);

impl Reader {
    pub(super) fn new(known: Arc<Known>, line: Arc<Line>) -> Self {
        Self { known, line, room: Semaphore::new(READS) }
    }

    /// Answers within the time-out.
    pub(super) async fn read(
        &self,
        pool: &Pool,
        query: &HistoryQuery,
        keep: Keep,
        random: &sanjay_runtime::SharedRandom,
    ) -> Result<HistoryPage, RegistryError> {
        let limit = self.known.config.timeout;
        let reading = async {
            let Ok(_room) = self.room.acquire().await else {
                return Err(self.known.unavailable("this router shuts down"));
            };
            self.read_now(pool, query, keep, new_epoch(random)).await
        };
        // Who waits for room for so long says nothing about the server.
        let late = |_| Err(self.known.unavailable(&describe(&timed_out())));
        tokio::time::timeout(limit + Duration::from_millis(50), reading).await.unwrap_or_else(late)
    }

    async fn read_now(
        &self,
        pool: &Pool,
        query: &HistoryQuery,
        keep: Keep,
        new_epoch: String,
    ) -> Result<HistoryPage, RegistryError> {
        let open = self.line.open().await?;
        let keys = &self.known.keys;
        let channel = &*query.channel;
        let mut call =
            open.history.call(&[keys.channel(channel), keys.dedupe(channel), keys.history(channel)]);
        let (epoch, offset) = query.since.as_ref().map_or(("", 0), |since| (&*since.epoch, since.offset));
        call.arg(new_epoch)
            .arg(epoch)
            .arg(offset)
            .arg(query.limit)
            .arg(query.bytes)
            .arg(keep.size)
            .arg(keep.ttl_ms());
        let mut answer = pool.call::<Answer>("history", &call).await?;
        if answer.is_none() {
            // Loaded over the connection whose process is in its text; another process does not get to know it.
            open.load().await.map_err(|error| {
                open.give_up();
                self.known.failed(&describe(&error))
            })?;
            answer = pool.call("history", &call).await?;
        }
        let Some(answer) = answer else {
            open.give_up();
            return Err(self.known.unavailable("another process took its place just now"));
        };
        self.page(answer, query)
    }

    fn page(
        &self,
        (epoch, offset, opened, lost, more, envelopes): Answer,
        query: &HistoryQuery,
    ) -> Result<HistoryPage, RegistryError> {
        if opened {
            self.known.metrics.epochs.inc();
        }
        let top = Top { epoch: epoch.into(), offset };
        let mut publications = Vec::with_capacity(envelopes.len());
        for envelope in envelopes {
            let Value::BulkString(bytes) = envelope else {
                return Err(self.known.unavailable("its history holds what is no envelope"));
            };
            match decode(Bytes::from(bytes)) {
                Ok(Content::Publication(publication)) => publications.push(Arc::new(publication)),
                Ok(_) => return Err(self.known.unavailable("its history holds what is no publication")),
                // Kept by a router of another build: what cannot be read is not there.
                Err(error) => {
                    tracing::debug!(%error, "a kept publication cannot be read");
                    return Ok(HistoryPage::empty(top, query.since.is_some()));
                }
            }
        }
        Ok(HistoryPage { top, publications, lost, more })
    }
}
