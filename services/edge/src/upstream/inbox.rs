//! Reads of inboxes: those of many connections travel together.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sanjay_proto::edge::v1::{InboxQuery, ReadInboxRequest, ReadInboxResponse, inbox_client::InboxClient};
use sanjay_protocol::{ErrorBody, ErrorCode};
use sanjay_runtime::{
    Lifecycle,
    grpc::{Call, PeerChannel, PeerPool},
};
use tokio::sync::{Semaphore, mpsc};

use super::{ReadRequest, ShardEvent, shards::Replies};
use crate::metrics::Metrics;

/// Most users in one call; what a delivery node takes.
pub(super) const MAX_BATCH: usize = 500;

/// Calls that may be under way at once: enough to hide their latency, few enough to keep batches large.
const MAX_CALLS: usize = 8;

/// A read is for a person who waits: rather no answer than a late one.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// Largest answer. Delivery bounds all pages of a call to 3 MiB, beside their frames.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;

pub(super) fn client(channel: PeerChannel) -> InboxClient<PeerChannel> {
    InboxClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

/// The task: ends when the shards are gone.
pub async fn read(
    delivery: PeerPool,
    mut requests: mpsc::Receiver<ReadRequest>,
    replies: Replies,
    lifecycle: Lifecycle,
    metrics: Arc<Metrics>,
) {
    let calls = Arc::new(Semaphore::new(MAX_CALLS));
    let away = Arc::new(AtomicBool::new(false));
    loop {
        let Ok(call) = Arc::clone(&calls).acquire_owned().await else { return };
        let mut batch = Vec::new();
        if requests.recv_many(&mut batch, MAX_BATCH).await == 0 {
            return;
        }
        let (delivery, replies, metrics) = (delivery.clone(), replies.clone(), Arc::clone(&metrics));
        let away = Arc::clone(&away);
        lifecycle.spawn("edge: inbox read", async move {
            let _call = call;
            let result = read_batch(&delivery, batch, &replies, &metrics).await;
            log_change(&away, result);
        });
    }
}

/// Reads some inboxes and answers each; says what went wrong with the call.
async fn read_batch(
    delivery: &PeerPool,
    batch: Vec<ReadRequest>,
    replies: &Replies,
    metrics: &Metrics,
) -> Result<(), String> {
    let (conns, queries): (Vec<_>, Vec<_>) = batch
        .into_iter()
        .map(|ReadRequest { conn, user, device, after, limit }| {
            (conn, InboxQuery { user, device, after, limit })
        })
        .unzip();
    metrics.inbox_reads.inc_by(queries.len() as u64);
    let read = async |channel, request| client(channel).read_inbox(request).await;
    let result = delivery.call(Call::idempotent(READ_TIMEOUT), ReadInboxRequest { queries }, read).await;
    let mut pages = match result {
        Ok(ReadInboxResponse { pages }) if pages.len() == conns.len() => Ok(pages.into_iter()),
        Ok(_) => Err(away("delivery answered another number of pages than were asked for")),
        Err(error) => Err(away(&error.to_string())),
    };
    let outcome = pages.as_ref().map(|_| ()).map_err(|error| error.message.clone());
    for conn in conns {
        let page = match &mut pages {
            Err(error) => Err(error.clone()),
            Ok(pages) => match pages.next().map(|mut page| (page.error.take(), page)) {
                Some((None, page)) => Ok(page),
                Some((Some(error), _)) => {
                    Err(ErrorBody::new(ErrorCode::from_text(&error.code), error.message))
                }
                None => Err(away("a page is missing")),
            },
        };
        if page.is_err() {
            metrics.inbox_read_failures.inc();
        }
        replies.reply(conn, ShardEvent::Page(conn, page));
    }
    outcome
}

/// Logs when reads begin to fail and when they work again, rather than each of thousands.
fn log_change(away: &AtomicBool, outcome: Result<(), String>) {
    match outcome {
        Ok(()) if away.swap(false, Ordering::Relaxed) => tracing::info!("reading inboxes works again"),
        Err(why) if !away.swap(true, Ordering::Relaxed) => {
            tracing::warn!(
                why,
                "reading inboxes failed; check that delivery runs and edge.delivery names it"
            );
        }
        Ok(()) | Err(_) => {}
    }
}

fn away(why: &str) -> ErrorBody {
    ErrorBody::new(ErrorCode::Unavailable, why)
}
