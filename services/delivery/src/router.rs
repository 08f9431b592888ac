//! The client of the router.

use std::time::Duration;

use sanjay_proto::{
    edge::v1::{InboxHint, Milestone},
    router::v1::{
        NewPublication, PublishRequest, PublishResult, RelayRequest, TraceRequest,
        router_client::RouterClient,
    },
};
use sanjay_runtime::grpc::{MAX_MESSAGE, PeerChannel};

/// How long the router may take to answer one call.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Most publications or hints of one call.
pub(crate) const MAX_ITEMS: usize = 1_000;

/// Most bytes of payload of one call; names and ids need the rest of [`MAX_MESSAGE`], about 1 KiB an item.
pub(crate) const MAX_BYTES: usize = MAX_MESSAGE - 1024 * 1024;

/// The router did not answer as it should. What it did with the call is unknown.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the router at {endpoint} does not answer: {problem}")]
pub(crate) struct RouterError {
    endpoint: String,
    problem: String,
}

/// The router, over one connection.
#[derive(Clone)]
pub(crate) struct Router {
    endpoint: String,
    client: RouterClient<PeerChannel>,
}

impl Router {
    pub(crate) fn new(endpoint: String, channel: PeerChannel) -> Self {
        Self { endpoint, client: RouterClient::new(channel) }
    }

    /// Publishes in order; the answers are in the same order.
    pub(crate) async fn publish(
        &self,
        publications: Vec<NewPublication>,
    ) -> Result<Vec<PublishResult>, RouterError> {
        let count = publications.len();
        let mut client = self.client.clone();
        let results = self.call(client.publish(PublishRequest { publications })).await?.results;
        self.check_count(count, results.len())?;
        Ok(results)
    }

    /// Relays hints; the answers, numbers of `RelayOutcome`, are in the same order.
    pub(crate) async fn relay(&self, hints: Vec<InboxHint>) -> Result<Vec<i32>, RouterError> {
        let count = hints.len();
        let mut client = self.client.clone();
        let outcomes = self.call(client.relay(RelayRequest { hints })).await?.outcomes;
        self.check_count(count, outcomes.len())?;
        Ok(outcomes)
    }

    /// What the router knows of a message.
    pub(crate) async fn trace(&self, message_id: &[u8]) -> Result<Vec<Milestone>, RouterError> {
        let mut client = self.client.clone();
        let request = TraceRequest { message_id: message_id.to_vec().into() };
        Ok(self.call(client.trace(request)).await?.milestones)
    }

    async fn call<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, RouterError> {
        match tokio::time::timeout(TIMEOUT, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.error(status.message().to_owned())),
            Err(_) => Err(self.error(format!("no answer within {TIMEOUT:?}"))),
        }
    }

    fn check_count(&self, asked: usize, answered: usize) -> Result<(), RouterError> {
        if asked == answered {
            return Ok(());
        }
        Err(self.error(format!("it gave {answered} answers to {asked} questions")))
    }

    fn error(&self, problem: String) -> RouterError {
        RouterError { endpoint: self.endpoint.clone(), problem }
    }
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
