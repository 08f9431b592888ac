//! Reads of what channels keep: for connections that recover, and for clients that ask.
//!
//! However many connections go on from one position, whichever their shards, it is read once at a time.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use sanjay_proto::router::v1::{HistoryRequest as PbRequest, HistoryResponse, router_client::RouterClient};
use sanjay_protocol::{
    ErrorBody, ErrorCode,
    limits::MAX_HISTORY_LIMIT,
    recovery::{History, Position, ReadHistory},
};
use sanjay_runtime::grpc::{Call, MAX_MESSAGE, PeerPool};
use tokio::sync::mpsc;

use super::{ConnKey, ShardEvent, shards::Replies};
use crate::{
    metrics::Metrics,
    shard::{hub::Top, recovery::Found},
};

/// Reads under way at once: with answers of 1 MiB they take little memory, and hide their latency.
const MAX_READS: usize = 16;

/// A read is for a client that waits: rather no answer than a late one.
const TIMEOUT: Duration = Duration::from_secs(2);

/// What a shard wants to read.
#[derive(Debug)]
pub enum HistoryRead {
    /// All that follows a place, for connections that recover; answered by [`ShardEvent::Found`].
    Recover {
        /// Who asks.
        shard: u16,
        /// The channel.
        channel: Arc<str>,
        /// Where the connections go on.
        since: Top,
        /// From which offset on to read; above that of `since` when a part was read before.
        from: u64,
    },
    /// A part, for a client; answered by [`ShardEvent::History`].
    Page(ConnKey, u64, ReadHistory),
}

/// A position that connections go on from, and where its read begins.
type Key = (Arc<str>, Arc<str>, u64, u64);

/// An answer on its way: to the shards that asked for a position, or to a connection.
enum Read {
    Recover(Key, Result<HistoryResponse, ErrorBody>),
    Page(ConnKey, u64, String, Result<HistoryResponse, ErrorBody>),
}

/// The reading task: ends when the shards are gone.
pub async fn run(
    routers: PeerPool,
    mut requests: mpsc::Receiver<HistoryRead>,
    replies: Replies,
    metrics: Arc<Metrics>,
) {
    let mut reads: FuturesUnordered<BoxFuture<'static, Read>> = FuturesUnordered::new();
    let mut waiting: HashMap<Key, Vec<u16>> = HashMap::new();
    loop {
        tokio::select! {
            request = requests.recv(), if reads.len() < MAX_READS => match request {
                None => return,
                Some(HistoryRead::Page(conn, id, ReadHistory { channel, since, limit })) => {
                    let read = read(routers.clone(), channel.clone(), since, limit);
                    reads.push(read.map(move |answer| Read::Page(conn, id, channel, answer)).boxed());
                    metrics.history_reads.inc();
                }
                Some(HistoryRead::Recover { shard, channel, since, from }) => {
                    let position = Position { epoch: since.epoch.to_string(), offset: from };
                    let key = (channel, since.epoch, since.offset, from);
                    if let Some(shards) = waiting.get_mut(&key) {
                        if !shards.contains(&shard) {
                            shards.push(shard);
                        }
                        continue;
                    }
                    waiting.insert(key.clone(), vec![shard]);
                    let limit = MAX_HISTORY_LIMIT as u32;
                    let read = read(routers.clone(), key.0.to_string(), Some(position), limit);
                    reads.push(read.map(move |answer| Read::Recover(key, answer)).boxed());
                    metrics.history_reads.inc();
                }
            },
            Some(read) = reads.next() => answer(read, &mut waiting, &replies, &metrics),
        }
    }
}

async fn read(
    routers: PeerPool,
    channel: String,
    since: Option<Position>,
    limit: u32,
) -> Result<HistoryResponse, ErrorBody> {
    let (epoch, offset) = since.map_or_else(Default::default, |since| (since.epoch, since.offset));
    let request = PbRequest { channel, epoch, offset, limit };
    let call = async |channel, request| {
        RouterClient::new(channel).max_decoding_message_size(MAX_MESSAGE).history(request).await
    };
    match routers.call(Call::idempotent(TIMEOUT), request, call).await {
        Ok(HistoryResponse { error: Some(error), .. }) => {
            let code = ErrorCode::from_text(&error.code);
            Err(ErrorBody { retryable: error.retryable, ..ErrorBody::new(code, error.message) })
        }
        Ok(response) => Ok(response),
        Err(error) => Err(ErrorBody::new(ErrorCode::Unavailable, error.to_string())),
    }
}

fn answer(read: Read, waiting: &mut HashMap<Key, Vec<u16>>, replies: &Replies, metrics: &Metrics) {
    match read {
        Read::Page(conn, id, channel, answer) => {
            if answer.is_err() {
                metrics.history_read_failures.inc();
            }
            replies
                .reply(conn, ShardEvent::History(conn, id, answer.and_then(|answer| page(channel, answer))));
        }
        Read::Recover(key, answer) => {
            if answer.is_err() {
                metrics.history_read_failures.inc();
            }
            let shards = waiting.remove(&key).unwrap_or_default();
            let (channel, epoch, offset, from) = key;
            let since = Top { epoch, offset };
            let found = match answer {
                Ok(answer) => Ok(found(answer, &since)),
                // The router has other settings, and keeps nothing of the channel.
                Err(error) if error.code == ErrorCode::BadRequest => Ok(Found::lost()),
                Err(error) => Err(error),
            };
            for shard in shards {
                let event = ShardEvent::Found(Arc::clone(&channel), since.clone(), from, found.clone());
                replies.tell(shard, event);
            }
        }
    }
}

/// What a read says to those who recover: a part of what they missed would be worse than nothing.
fn found(answer: HistoryResponse, since: &Top) -> Found {
    let lost = answer.lost || answer.more || *answer.epoch != *since.epoch;
    Found { publications: answer.publications.into_iter().map(Arc::new).collect(), lost }
}

fn page(channel: String, answer: HistoryResponse) -> Result<History, ErrorBody> {
    let HistoryResponse { epoch, offset, publications, lost, more, .. } = answer;
    if lost {
        let why = format!(
            "the history of \"{channel}\" does not reach back to this position; its epoch is {epoch} and its newest offset \
             {offset}: ask without since"
        );
        return Err(ErrorBody::new(ErrorCode::NotFound, why));
    }
    let messages = publications.iter().map(Into::into).collect();
    Ok(History { channel, epoch, offset, messages, more })
}
