//! The calls to delivery: reads and acks of many connections travel together.

use std::{sync::Arc, time::Duration};

use sanjay_proto::{
    client::v1::SeqRange,
    edge::v1::{
        AckRequest as PbAckRequest, AckResponse, InboxError, InboxQuery, ReadInboxRequest, ReadInboxResponse,
        UserAck, UserAckResult, inbox_client::InboxClient,
    },
};
use sanjay_protocol::{ErrorBody, ErrorCode};
use sanjay_runtime::{SharedRandom, grpc::PeerChannel, random::full_jitter};
use tokio::{
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tonic::{Code, Status};

use super::{AckRequest, ReadRequest, ShardEvent, shards::Replies};
use crate::metrics::Metrics;

/// Most users in one call; what a delivery node takes.
const MAX_BATCH: usize = 500;

/// Calls that may be under way at once: enough to hide their latency, few enough to keep batches large.
const MAX_CALLS: usize = 8;

/// A read is for a person who waits: rather no answer than a late one.
const READ_TIMEOUT: Duration = Duration::from_secs(2);

/// An ack is tried again until it is durable.
const ACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest answer: pages are bounded by delivery to 1 MiB each, and a batch of them stays below this.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

fn client(channel: PeerChannel) -> InboxClient<PeerChannel> {
    InboxClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES)
}

/// The reading task: ends when the shards are gone.
pub async fn read(
    channel: PeerChannel,
    mut requests: mpsc::Receiver<ReadRequest>,
    replies: Replies,
    metrics: Arc<Metrics>,
) {
    let calls = Arc::new(Semaphore::new(MAX_CALLS));
    loop {
        let Ok(call) = Arc::clone(&calls).acquire_owned().await else { return };
        let mut batch = Vec::new();
        if requests.recv_many(&mut batch, MAX_BATCH).await == 0 {
            return;
        }
        let (channel, replies, metrics) = (channel.clone(), replies.clone(), Arc::clone(&metrics));
        tokio::spawn(async move {
            let _call = call;
            read_batch(channel, batch, &replies, &metrics).await;
        });
    }
}

async fn read_batch(channel: PeerChannel, batch: Vec<ReadRequest>, replies: &Replies, metrics: &Metrics) {
    let (conns, queries): (Vec<_>, Vec<_>) = batch
        .into_iter()
        .map(|ReadRequest { conn, user, device, after, limit }| {
            (conn, InboxQuery { user, device, after, limit })
        })
        .unzip();
    metrics.inbox_reads.inc_by(queries.len() as u64);
    let result = timeout(READ_TIMEOUT, client(channel).read_inbox(ReadInboxRequest { queries })).await;
    let mut pages = match result.map(|result| result.map(tonic::Response::into_inner)) {
        Ok(Ok(ReadInboxResponse { pages })) if pages.len() == conns.len() => Ok(pages.into_iter()),
        Ok(Ok(_)) => Err(away("delivery answered another number of pages than were asked for")),
        Ok(Err(status)) => Err(failed("reading inboxes", &status)),
        Err(_) => Err(away("delivery did not answer in time")),
    };
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
}

/// The acking task: ends when the shards are gone and everything is durable.
///
/// While delivery is away acks wait here and in the lanes of the shards, which then stop reading sockets.
pub async fn ack(
    channel: PeerChannel,
    mut requests: mpsc::Receiver<AckRequest>,
    replies: Replies,
    random: SharedRandom,
    metrics: Arc<Metrics>,
) {
    let mut batch = Vec::new();
    while requests.recv_many(&mut batch, MAX_BATCH).await > 0 {
        let acks: Vec<UserAck> = batch.iter().map(user_ack).collect();
        metrics.acks.inc_by(acks.len() as u64);
        let mut attempt = 0;
        let results = loop {
            match ack_batch(channel.clone(), acks.clone()).await {
                Ok(results) => break results,
                Err(Failure::Refused(why)) => {
                    tracing::error!(
                        why,
                        "delivery refused a batch of acks; its messages will be delivered again"
                    );
                    break AckResponse { results: vec![refused(&why); batch.len()] };
                }
                Err(Failure::Away(why)) => {
                    attempt += 1;
                    metrics.ack_failures.inc();
                    tracing::warn!(
                        why,
                        attempt,
                        "acks wait; check that delivery runs and edge.delivery names it"
                    );
                    let pause =
                        full_jitter(&*random, attempt, Duration::from_millis(50), Duration::from_secs(2));
                    tokio::time::sleep(pause).await;
                }
            }
        };
        let mut results = results.results.into_iter();
        for AckRequest { waiter, .. } in batch.drain(..) {
            let error = results.next().and_then(|result| result.error);
            if let Some((conn, id)) = waiter {
                let result = error.map_or(Ok(()), |error| {
                    Err(ErrorBody::new(ErrorCode::from_text(&error.code), error.message))
                });
                replies.reply(conn, ShardEvent::Acked(conn, id, result));
            }
        }
    }
}

/// Why a batch of acks was not taken.
enum Failure {
    /// The same batch would be refused again.
    Refused(String),
    /// Later it may be taken.
    Away(String),
}

async fn ack_batch(channel: PeerChannel, acks: Vec<UserAck>) -> Result<AckResponse, Failure> {
    match timeout(ACK_TIMEOUT, client(channel).ack(PbAckRequest { acks })).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) if status.code() == Code::InvalidArgument => {
            Err(Failure::Refused(status.message().to_owned()))
        }
        Ok(Err(status)) => Err(Failure::Away(format!("{:?}: {}", status.code(), status.message()))),
        Err(_) => Err(Failure::Away(format!("no answer within {ACK_TIMEOUT:?}"))),
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
    }
}

fn failed(what: &str, status: &Status) -> ErrorBody {
    tracing::warn!(code = ?status.code(), why = status.message(), "{what} failed; check that delivery runs");
    away("delivery is away")
}

fn away(why: &str) -> ErrorBody {
    ErrorBody::new(ErrorCode::Unavailable, why)
}
