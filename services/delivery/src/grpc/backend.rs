//! `sanjay.delivery.v1.Delivery`: the API for product back ends.

use std::{collections::HashSet, future::ready, sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use sanjay_proto::delivery::v1::{
    Accepted, DeadLetter, DeliveryState, GetDeadLetterRequest, GetDeliveryRequest, GetDeliveryResponse,
    GetHistoryRequest, GetHistoryResponse, GetTraceRequest, GetTraceResponse, JoinRequest, JoinResponse,
    LeaveRequest, LeaveResponse, ListDeadLettersRequest, ListDeadLettersResponse, ListDeliveriesRequest,
    ListDeliveriesResponse, ListMembersRequest, ListMembersResponse, PublishRequest, PublishResponse,
    PublishStreamResponse, PurgeDeadLettersRequest, PurgeDeadLettersResponse, ReceiptsRequest,
    ReceiptsResponse, RedriveDeadLettersRequest, RedriveDeadLettersResponse, SendRequest, SendResponse,
    SendResult, SendStreamResponse, WatchDeliveriesRequest, WatchDeliveriesResponse,
    delivery_server::Delivery, publish_stream_response, send_result, send_stream_response,
};
use sanjay_protocol::{ErrorCode, Payload, limits::MAX_SEND_USERS, names};
use sanjay_runtime::trace::extract;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

use super::{
    Refusal, dead, fanout, history, receipts,
    stream::{Answers, pipelined},
};
use crate::{
    auth::Caller,
    dead::DeadLetters,
    fanout::Channels,
    inbox::{self, Inbox, Send},
    metrics::Metrics,
    path::Paths,
    publish::{Publish, Publisher},
    store::{AppendError, StoreError, member_message_id},
};

/// Most that a send may ask for as time to live: ten years, so that every sum stays within bounds.
const MAX_TTL: Duration = Duration::from_secs(3_650 * 24 * 60 * 60);

/// How far ahead a message may be scheduled.
const MAX_AHEAD: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// The back ends' API.
#[derive(Clone)]
pub(crate) struct BackendApi {
    pub(crate) inbox: Inbox,
    pub(crate) dead_letters: DeadLetters,
    pub(crate) publisher: Publisher,
    pub(crate) channels: Channels,
    pub(crate) paths: Paths,
    pub(crate) metrics: Metrics,
    /// Room for readers of the log of receipts.
    pub(crate) log_readers: Arc<Semaphore>,
    /// How long one call, or one item of a stream, may take.
    pub(crate) deadline: Duration,
    /// Ends streams on shutdown.
    pub(crate) stop: CancellationToken,
}

impl BackendApi {
    /// Checks and submits a publish when it is called.
    fn submit_publish(
        &self,
        request: PublishRequest,
        caller: Arc<str>,
        parent: String,
    ) -> BoxFuture<'static, Result<PublishResponse, Refusal>> {
        if request.durable {
            return fanout::submit(self, request, caller, parent);
        }
        let (metrics, timer) = (self.metrics.clone(), self.metrics.publish_timer());
        let submitted = checked_publish(request, parent).map(|publish| self.publisher.publish(publish));
        let deadline = self.deadline;
        async move {
            let _timer = timer;
            let result = match submitted {
                Ok(answer) => match tokio::time::timeout(deadline, answer).await {
                    Ok(result) => result.map_err(Refusal::from),
                    Err(_) => Err(Refusal::late(deadline)),
                },
                Err(refusal) => Err(refusal),
            };
            metrics.publish(result.as_ref().map_or_else(|refusal| refusal.code.as_str(), |_| "ok"));
            let published = result?;
            let message_id = published.message_id.to_string();
            let (epoch, offset) = (published.epoch, published.offset);
            Ok(PublishResponse { message_id, epoch, offset, ..PublishResponse::default() })
        }
        .boxed()
    }

    /// Checks and submits a send when it is called.
    fn submit_send(
        &self,
        request: SendRequest,
        caller: Arc<str>,
        parent: String,
    ) -> BoxFuture<'static, Result<SendResponse, Refusal>> {
        let timer = self.metrics.send_timer();
        let answer = match checked_send(request, caller, parent, self.inbox.clock.now_us()) {
            Ok(send) => self.inbox.send(send),
            Err(refusal) => {
                self.metrics.send(refusal.code.as_str());
                return ready(Err(refusal)).boxed();
            }
        };
        let deadline = self.deadline;
        async move {
            let _timer = timer;
            match tokio::time::timeout(deadline, answer).await {
                Ok(results) => send_response(results),
                Err(_) => Err(Refusal::late(deadline)),
            }
        }
        .boxed()
    }
}

#[tonic::async_trait]
impl Delivery for BackendApi {
    type PublishStreamStream = Answers<PublishStreamResponse>;
    type SendStreamStream = Answers<SendStreamResponse>;
    type RedriveDeadLettersStream = Answers<RedriveDeadLettersResponse>;
    type ReceiptsStream = Answers<ReceiptsResponse>;
    type WatchDeliveriesStream = Answers<WatchDeliveriesResponse>;

    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        let (parent, caller) = (extract(request.metadata()), caller(&request)?);
        Ok(Response::new(self.submit_publish(request.into_inner(), caller, parent).await?))
    }

    async fn send(&self, request: Request<SendRequest>) -> Result<Response<SendResponse>, Status> {
        let (parent, caller) = (extract(request.metadata()), caller(&request)?);
        Ok(Response::new(self.submit_send(request.into_inner(), caller, parent).await?))
    }

    async fn publish_stream(
        &self,
        request: Request<Streaming<PublishRequest>>,
    ) -> Result<Response<Self::PublishStreamStream>, Status> {
        use publish_stream_response::Result as Item;
        let (parent, caller, api) = (extract(request.metadata()), caller(&request)?, self.clone());
        let answers = pipelined(request.into_inner(), self.stop.clone(), move |request| {
            api.submit_publish(request, caller.clone(), parent.clone()).map(|result| PublishStreamResponse {
                result: Some(result.map_or_else(|refusal| Item::Error(refusal.into()), Item::Published)),
            })
        });
        Ok(Response::new(answers))
    }

    async fn send_stream(
        &self,
        request: Request<Streaming<SendRequest>>,
    ) -> Result<Response<Self::SendStreamStream>, Status> {
        use send_stream_response::Result as Item;
        let (parent, caller, api) = (extract(request.metadata()), caller(&request)?, self.clone());
        let answers = pipelined(request.into_inner(), self.stop.clone(), move |request| {
            api.submit_send(request, caller.clone(), parent.clone()).map(|result| SendStreamResponse {
                result: Some(result.map_or_else(|refusal| Item::Error(refusal.into()), Item::Sent)),
            })
        });
        Ok(Response::new(answers))
    }

    async fn get_delivery(
        &self,
        request: Request<GetDeliveryRequest>,
    ) -> Result<Response<GetDeliveryResponse>, Status> {
        let GetDeliveryRequest { user, message_id } = request.into_inner();
        names::check("user", &user).map_err(Refusal::from)?;
        let id = checked_message_id(&message_id)?;
        let looking = async {
            // An id of a publication stands for that of the member's message.
            match self.inbox.lookup(user.clone(), id).await? {
                None => self.inbox.lookup(user.clone(), member_message_id(id, &user)).await,
                found => Ok(found),
            }
        };
        let looked_up = tokio::time::timeout(self.deadline, looking).await;
        let receipt = looked_up.map_err(|_| Refusal::late(self.deadline))?.map_err(Refusal::from)?;
        let receipt = receipt.ok_or_else(|| {
            let text = format!(
                "user {user:?} has no message {id}; check both, and note that the record of a settled message is kept for 7 days"
            );
            Refusal::new(ErrorCode::NotFound, text)
        })?;
        Ok(Response::new(GetDeliveryResponse {
            user,
            message_id: id.to_string(),
            seq: receipt.seq,
            state: DeliveryState::try_from(receipt.state.number())
                .unwrap_or(DeliveryState::Unspecified)
                .into(),
            accepted_us: receipt.accepted_us,
            settled_us: receipt.settled_us,
        }))
    }

    async fn list_dead_letters(
        &self,
        request: Request<ListDeadLettersRequest>,
    ) -> Result<Response<ListDeadLettersResponse>, Status> {
        Ok(Response::new(dead::list(self, request.into_inner()).await?))
    }

    async fn get_dead_letter(
        &self,
        request: Request<GetDeadLetterRequest>,
    ) -> Result<Response<DeadLetter>, Status> {
        Ok(Response::new(dead::get(self, request.into_inner()).await?))
    }

    async fn redrive_dead_letters(
        &self,
        request: Request<RedriveDeadLettersRequest>,
    ) -> Result<Response<Self::RedriveDeadLettersStream>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(dead::redrive(self, request.into_inner(), caller)?))
    }

    async fn purge_dead_letters(
        &self,
        request: Request<PurgeDeadLettersRequest>,
    ) -> Result<Response<PurgeDeadLettersResponse>, Status> {
        let caller = caller(&request)?;
        Ok(Response::new(dead::purge(self, request.into_inner(), &caller).await?))
    }

    async fn get_trace(
        &self,
        request: Request<GetTraceRequest>,
    ) -> Result<Response<GetTraceResponse>, Status> {
        let id = checked_message_id(&request.get_ref().message_id)?;
        let path = tokio::time::timeout(self.deadline, self.paths.of(id)).await;
        let path = path.map_err(|_| Refusal::late(self.deadline))?;
        if path.milestones.is_empty() && path.missing.is_empty() {
            let text = format!(
                "nothing is remembered of message {id}; milestones are kept in memory for recent messages"
            );
            return Err(Refusal::new(ErrorCode::NotFound, text).into());
        }
        Ok(Response::new(GetTraceResponse { milestones: path.milestones, missing: path.missing }))
    }

    async fn get_history(
        &self,
        request: Request<GetHistoryRequest>,
    ) -> Result<Response<GetHistoryResponse>, Status> {
        Ok(Response::new(history::get(self, request.into_inner()).await?))
    }

    async fn receipts(
        &self,
        request: Request<ReceiptsRequest>,
    ) -> Result<Response<Self::ReceiptsStream>, Status> {
        Ok(Response::new(receipts::receipts(self, request.into_inner())?))
    }

    async fn list_deliveries(
        &self,
        request: Request<ListDeliveriesRequest>,
    ) -> Result<Response<ListDeliveriesResponse>, Status> {
        Ok(Response::new(receipts::list(self, request.into_inner()).await?))
    }

    async fn watch_deliveries(
        &self,
        request: Request<WatchDeliveriesRequest>,
    ) -> Result<Response<Self::WatchDeliveriesStream>, Status> {
        Ok(Response::new(receipts::watch(self, request.into_inner())?))
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        Ok(Response::new(fanout::join(self, request.into_inner()).await?))
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        Ok(Response::new(fanout::leave(self, request.into_inner()).await?))
    }

    async fn list_members(
        &self,
        request: Request<ListMembersRequest>,
    ) -> Result<Response<ListMembersResponse>, Status> {
        Ok(Response::new(fanout::list(self, request.into_inner()).await?))
    }
}

/// Who calls, as the interceptor noted it.
pub(super) fn caller<T>(request: &Request<T>) -> Result<Arc<str>, Status> {
    let caller = request.extensions().get::<Caller>();
    caller.map(|caller| caller.0.clone()).ok_or_else(|| Status::internal("the caller's name was not noted"))
}

fn checked_publish(request: PublishRequest, parent: String) -> Result<Publish, Refusal> {
    names::check("channel", &request.channel)?;
    names::check_optional("dedupe_key", &request.dedupe_key)?;
    fanout::checked_plain(&request)?;
    let payload = Payload::from_backend(request.payload)?.into();
    Ok(Publish { channel: request.channel, payload, dedupe_key: request.dedupe_key, parent })
}

fn checked_send(
    request: SendRequest,
    caller: Arc<str>,
    parent: String,
    now_us: u64,
) -> Result<Send, Refusal> {
    let SendRequest { users, payload, dedupe_key, ttl_ms, collapse_key, deliver_at_us } = request;
    checked_users(&users, MAX_SEND_USERS)?;
    names::check_optional("dedupe_key", &dedupe_key)?;
    names::check_optional("collapse_key", &collapse_key)?;
    let ttl = checked_ttl(ttl_ms)?;
    if deliver_at_us > now_us.saturating_add(MAX_AHEAD.as_micros() as u64) {
        return Err(Refusal::bad(format!(
            "deliver_at_us is {deliver_at_us}; give Unix time in microseconds, at most 366 days from now"
        )));
    }
    let payload = Payload::from_backend(payload)?.into();
    Ok(Send { caller, users, payload, dedupe_key, parent, ttl, collapse_key, deliver_us: deliver_at_us })
}

/// A time to live; `None` for none.
pub(super) fn checked_ttl(ttl_ms: u64) -> Result<Option<Duration>, Refusal> {
    let ttl = Duration::from_millis(ttl_ms);
    if ttl > MAX_TTL {
        return Err(Refusal::bad(format!("ttl_ms is {ttl_ms}; at most {} is allowed", MAX_TTL.as_millis())));
    }
    Ok(Some(ttl).filter(|ttl| !ttl.is_zero()))
}

/// Checks that there are users, at most so many, each with a name, none twice.
pub(super) fn checked_users(users: &[String], most: usize) -> Result<(), Refusal> {
    if users.is_empty() || users.len() > most {
        return Err(Refusal::bad(format!("users has {} entries; it needs 1 to {most}", users.len())));
    }
    let mut seen = HashSet::with_capacity(users.len());
    for (index, user) in users.iter().enumerate() {
        names::check("user", user).map_err(|error| Refusal::bad(format!("users[{index}]: {error}")))?;
        if !seen.insert(user.as_str()) {
            return Err(Refusal::bad(format!(
                "users[{index}]: {user:?} is named twice; name each user once"
            )));
        }
    }
    Ok(())
}

pub(super) fn checked_message_id(text: &str) -> Result<Uuid, Refusal> {
    Uuid::try_parse(text).map_err(|error| {
        let example = "01890a5d-ac96-774b-bcce-b302099a8057";
        Refusal::bad(format!("message_id {text:?} is not a UUID ({error}); write it like {example}"))
    })
}

/// A result for each user; one refusal when the store was away for all of them, so that nothing was tried.
fn send_response(results: Vec<inbox::SendResult>) -> Result<SendResponse, Refusal> {
    let away = |(_, result): &inbox::SendResult| match result {
        Err(AppendError::Store(error @ StoreError::Away { .. })) => Some(error.clone()),
        _ => None,
    };
    if let Some(all) = results.iter().map(away).collect::<Option<Vec<_>>>()
        && let Some(error) = all.into_iter().next_back()
    {
        return Err(error.into());
    }
    Ok(SendResponse { results: results.into_iter().map(send_result).collect() })
}

fn send_result((user, result): inbox::SendResult) -> SendResult {
    let result = match result {
        Ok(inbox::Accepted::Appended(appended)) => send_result::Result::Accepted(Accepted {
            message_id: appended.message_id.to_string(),
            seq: appended.seq,
            duplicate: appended.duplicate,
            deliver_at_us: 0,
        }),
        Ok(inbox::Accepted::Scheduled(scheduled)) => send_result::Result::Accepted(Accepted {
            message_id: scheduled.message_id.to_string(),
            seq: 0,
            duplicate: scheduled.duplicate,
            deliver_at_us: scheduled.deliver_us,
        }),
        Err(error) => send_result::Result::Error(Refusal::from(error).into()),
    };
    SendResult { user, result: Some(result) }
}
