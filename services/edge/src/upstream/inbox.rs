//! The calls to delivery: reads and acks of many connections travel together.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use sanjay_proto::{
    client::v1::SeqRange,
    edge::v1::{
        AckRequest as PbAckRequest, InboxError, InboxQuery, ReadInboxRequest, ReadInboxResponse, Rewritten,
        UserAck, UserAckResult, inbox_client::InboxClient,
    },
};
use sanjay_protocol::{ErrorBody, ErrorCode};
use sanjay_runtime::{
    Lifecycle, SharedRandom,
    grpc::{Call, PeerChannel, PeerError, PeerPool},
    random::full_jitter,
};
use tokio::sync::{Semaphore, mpsc};
use tonic::Code;

use super::{AckRequest, ReadRequest, ShardEvent, shards::Replies};
use crate::metrics::Metrics;

/// Most users in one call; what a delivery node takes.
const MAX_BATCH: usize = 500;

/// Calls that may be under way at once: enough to hide their latency, few enough to keep batches large.
const MAX_CALLS: usize = 8;

/// A read is for a person who waits: rather no answer than a late one.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// An ack that has no answer by then is sent again: until it is durable or refused for good.
const ACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Pauses between attempts: full jitter that doubles from the first to the other.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Largest answer. Delivery bounds all pages of a call to 3 MiB, beside their frames.
const MAX_ANSWER_BYTES: usize = 8 * 1024 * 1024;

fn client(channel: PeerChannel) -> InboxClient<PeerChannel> {
    InboxClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

/// The reading task: ends when the shards are gone.
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

/// The acking task: ends when the shards are gone and everything is durable.
///
/// While delivery is away acks and failures wait here and in the lanes of the shards, which then stop reading sockets
/// and judge no deadline. `node` is the edge's name.
pub async fn ack(
    node: String,
    delivery: PeerPool,
    mut requests: mpsc::Receiver<AckRequest>,
    replies: Replies,
    random: SharedRandom,
    metrics: Arc<Metrics>,
) {
    let mut batch = Vec::new();
    let mut attempt = 0;
    while requests.recv_many(&mut batch, MAX_BATCH).await > 0 {
        while !batch.is_empty() {
            let why = match ack_batch(&node, &delivery, &batch, &metrics).await {
                Ok(results) => settle(&mut batch, results, &replies),
                Err(Failure::Refused(why)) => {
                    tracing::error!(
                        why,
                        "delivery refused a batch of acks; its messages will be delivered again"
                    );
                    let results = batch.iter().map(|_| refused(&why)).collect();
                    settle(&mut batch, results, &replies)
                }
                Err(Failure::Away(why)) => Some(why),
            };
            let Some(why) = why else { break };
            attempt += 1;
            metrics.ack_failures.inc();
            if attempt == 1 {
                tracing::warn!(why, "acks wait; check that delivery runs and edge.delivery names it");
            }
            tokio::time::sleep(full_jitter(&*random, attempt, FIRST_PAUSE, MAX_PAUSE)).await;
        }
        if attempt > 0 {
            tracing::info!(attempt, "acks go through again");
            attempt = 0;
        }
    }
}

/// Answers what was settled or refused, and keeps what delivery could not take now. Says why it could not.
fn settle(batch: &mut Vec<AckRequest>, results: Vec<UserAckResult>, replies: &Replies) -> Option<String> {
    let mut why = None;
    let mut results = results.into_iter();
    batch.retain(|request| {
        let error = results.next().and_then(|result| result.error);
        let error = error.map(|error| ErrorBody::new(ErrorCode::from_text(&error.code), error.message));
        match (error, request.waiter) {
            (Some(error), _) if error.retryable => {
                why = Some(error.message);
                true
            }
            (error, Some((conn, id))) => {
                replies.reply(conn, ShardEvent::Acked(conn, id, error.map_or(Ok(()), Err)));
                false
            }
            (Some(error), None) => {
                tracing::debug!(code = error.code.as_str(), why = error.message, "delivery refused a report");
                false
            }
            (None, None) => false,
        }
    });
    why
}

/// Why a batch of acks was not taken.
enum Failure {
    /// The same batch would be refused again.
    Refused(String),
    /// Later it may be taken.
    Away(String),
}

async fn ack_batch(
    node: &str,
    delivery: &PeerPool,
    batch: &[AckRequest],
    metrics: &Metrics,
) -> Result<Vec<UserAckResult>, Failure> {
    let acks: Vec<UserAck> = batch.iter().map(user_ack).collect();
    metrics.acks.inc_by(acks.len() as u64);
    let ack = async |channel, request| client(channel).ack(request).await;
    let request = PbAckRequest { acks, edge: node.to_owned() };
    match delivery.call(Call::idempotent(ACK_TIMEOUT), request, ack).await {
        Ok(response) if response.results.len() == batch.len() => Ok(response.results),
        Ok(_) => Err(Failure::Away("delivery answered another number of acks than were sent".to_owned())),
        Err(PeerError::Refused { code: Code::InvalidArgument, message, .. }) => {
            Err(Failure::Refused(message))
        }
        Err(error) => Err(Failure::Away(error.to_string())),
    }
}

fn refused(why: &str) -> UserAckResult {
    let error = InboxError { code: ErrorCode::Internal.as_str().to_owned(), message: why.to_owned() };
    UserAckResult { mark: 0, error: Some(error) }
}

fn user_ack(request: &AckRequest) -> UserAck {
    UserAck {
        user: request.user.clone(),
        device: request.device.clone(),
        epoch: request.epoch,
        acked: request.ranges.iter().map(|&(from, to)| SeqRange { from, to }).collect(),
        written: request.written,
        milestones: Vec::new(),
        rewritten: request.rewritten.iter().map(|&(seq, delivery)| Rewritten { seq, delivery }).collect(),
        failed: request.failed.clone(),
        session: request.session.as_bytes().to_vec().into(),
        trace: request.trace.clone(),
        shared: request.shared,
    }
}

fn away(why: &str) -> ErrorBody {
    ErrorBody::new(ErrorCode::Unavailable, why)
}
