//! The client of the routers.

mod ask;

use std::time::Duration;

pub(crate) use ask::Asked;

use sanjay_proto::{
    edge::v1::{InboxHint, Milestone},
    router::v1::{
        HistoryRequest, HistoryResponse, NewPublication, PublishRequest, PublishResult, RelayRequest,
        TraceRequest, router_client::RouterClient,
    },
};
use sanjay_runtime::grpc::{Call, MAX_MESSAGE, PeerError, PeerPool};

/// How long the routers may take to answer one call.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Most publications or hints of one call.
pub(crate) const MAX_ITEMS: usize = 1_000;

/// Most bytes of payload of one call; names and ids need the rest of [`MAX_MESSAGE`], about 1 KiB an item.
pub(crate) const MAX_BYTES: usize = MAX_MESSAGE - 1024 * 1024;

/// No router answered as it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RouterError {
    /// The call failed.
    #[error(transparent)]
    Call(#[from] PeerError),
    /// What the router did with the call is unknown.
    #[error("a router gave {answered} answers to {asked} questions; run builds that fit each other")]
    Count {
        /// How many were asked.
        asked: usize,
        /// How many were answered.
        answered: usize,
    },
}

/// The routers, over one connection to each.
#[derive(Clone)]
pub(crate) struct Router(PeerPool);

impl Router {
    pub(crate) fn new(pool: PeerPool) -> Self {
        Self(pool)
    }

    /// The routers, for streams of each.
    pub(crate) fn pool(&self) -> PeerPool {
        self.0.clone()
    }

    /// Whether some router serves, as far as this node can see.
    pub(crate) fn is_serving(&self) -> bool {
        self.0.is_serving()
    }

    /// Publishes in order, all on one router; the answers are in the same order. When the outcome is unknown,
    /// what has a dedupe key is published again through another router: the key makes that harmless.
    pub(crate) async fn publish(
        &self,
        publications: Vec<NewPublication>,
    ) -> Vec<Result<PublishResult, RouterError>> {
        let count = publications.len();
        let others = self.0.peers().len() > 1;
        let keyed: Vec<usize> = (0..count).filter(|&at| !publications[at].dedupe_key.is_empty()).collect();
        if keyed.len() == count {
            return spread(self.publish_on(Call::idempotent(TIMEOUT), publications).await, count);
        }
        if keyed.is_empty() || !others {
            return spread(self.publish_on(Call::once(TIMEOUT), publications).await, count);
        }
        let again: Vec<_> = keyed.iter().map(|&at| publications[at].clone()).collect();
        let first = self.publish_on(Call::once(TIMEOUT / 2), publications).await;
        let unknown = matches!(first, Err(RouterError::Call(PeerError::Unknown { .. })));
        let mut results = spread(first, count);
        if unknown {
            let answers = self.publish_on(Call::idempotent(TIMEOUT / 2), again).await;
            for (&at, answer) in keyed.iter().zip(spread(answers, keyed.len())) {
                results[at] = answer;
            }
        }
        results
    }

    async fn publish_on(
        &self,
        call: Call,
        publications: Vec<NewPublication>,
    ) -> Result<Vec<PublishResult>, RouterError> {
        let count = publications.len();
        let request = PublishRequest { publications };
        let publish = async |channel, request| RouterClient::new(channel).publish(request).await;
        let results = self.0.call(call, request, publish).await?.results;
        check_count(count, results.len())?;
        Ok(results)
    }

    /// Relays hints; the answers, numbers of `RelayOutcome`, are in the same order. A hint that is relayed twice
    /// does no harm.
    pub(crate) async fn relay(&self, hints: Vec<InboxHint>) -> Result<Vec<i32>, RouterError> {
        let count = hints.len();
        let relay = async |channel, request| RouterClient::new(channel).relay(request).await;
        let request = RelayRequest { hints };
        let outcomes = self.0.call(Call::idempotent(TIMEOUT), request, relay).await?.outcomes;
        check_count(count, outcomes.len())?;
        Ok(outcomes)
    }

    /// A part of what a channel keeps.
    pub(crate) async fn history(&self, request: HistoryRequest) -> Result<HistoryResponse, RouterError> {
        let read = async |channel, request| {
            RouterClient::new(channel).max_decoding_message_size(MAX_MESSAGE).history(request).await
        };
        Ok(self.0.call(Call::idempotent(TIMEOUT), request, read).await?)
    }

    /// What the routers know of a message, each of a part of its way; and whether all could be asked.
    pub(crate) async fn trace(&self, message_id: &[u8]) -> (Vec<Milestone>, bool) {
        let request = TraceRequest { message_id: message_id.to_vec().into() };
        let trace = async |channel, request| RouterClient::new(channel).trace(request).await;
        let answers = self.0.call_all(TIMEOUT, request, trace).await;
        let complete = !answers.is_empty() && answers.iter().all(Result::is_ok);
        let mut milestones = Vec::new();
        for answer in answers {
            match answer {
                Ok(answer) => milestones.extend(answer.milestones),
                Err(error) => tracing::debug!(%error, "a router was not asked for a trace"),
            }
        }
        (milestones, complete)
    }
}

/// The result of a whole call as that of each part.
fn spread<T>(result: Result<Vec<T>, RouterError>, count: usize) -> Vec<Result<T, RouterError>> {
    match result {
        Ok(results) => results.into_iter().map(Ok).collect(),
        Err(error) => vec![error; count].into_iter().map(Err).collect(),
    }
}

fn check_count(asked: usize, answered: usize) -> Result<(), RouterError> {
    if asked == answered { Ok(()) } else { Err(RouterError::Count { asked, answered }) }
}

/// Splits what is to be sent into calls within the router's bounds, keeping the order.
pub(crate) fn split<T>(items: impl IntoIterator<Item = T>, size: impl Fn(&T) -> usize) -> Vec<Vec<T>> {
    let mut calls: Vec<Vec<T>> = Vec::new();
    let mut bytes = 0;
    for item in items {
        let more = size(&item);
        match calls.last_mut() {
            Some(call) if call.len() < MAX_ITEMS && bytes + more <= MAX_BYTES => {
                call.push(item);
                bytes += more;
            }
            _ => {
                calls.push(vec![item]);
                bytes = more;
            }
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_stay_within_bounds_and_order() {
        let calls = split(0..2_500, |_| 1);
        assert_eq!(calls.iter().map(Vec::len).collect::<Vec<_>>(), [1_000, 1_000, 500]);
        assert!(calls.concat().into_iter().eq(0..2_500));
        let calls = split([MAX_BYTES, 1, MAX_BYTES - 1, 1, MAX_BYTES + 1], |size| *size);
        assert_eq!(calls.iter().map(Vec::len).collect::<Vec<_>>(), [1, 2, 1, 1]);
        assert!(split(Vec::<usize>::new(), |size| *size).is_empty());
    }
}

#[cfg(test)]
#[path = "router_tests.rs"]
mod calls;
