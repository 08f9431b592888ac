//! Members of channels, and durable publications.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use sanjay_proto::delivery::v1::{
    JoinRequest, JoinResponse, LeaveRequest, LeaveResponse, ListMembersRequest, ListMembersResponse,
    PublishRequest, PublishResponse,
};
use sanjay_protocol::{ErrorCode, Payload, names};

use super::{
    Refusal,
    backend::{BackendApi, checked_ttl, checked_users},
};
use crate::{
    fanout::DurablePublish,
    store::{JoinError, MAX_MEMBERS_PAGE, PublicationError},
};

/// Members of a page of a list, unless the caller says how many.
const DEFAULT_PAGE: usize = 100;

impl From<PublicationError> for Refusal {
    fn from(error: PublicationError) -> Self {
        match error {
            PublicationError::Store(error) => error.into(),
            error => Self::new(error.code(), error.to_string()),
        }
    }
}

impl From<JoinError> for Refusal {
    fn from(error: JoinError) -> Self {
        match error {
            JoinError::Store(error) => error.into(),
            error => Self::new(error.code(), error.to_string()),
        }
    }
}

/// Checks and submits a durable publish when it is called.
pub(super) fn submit(
    api: &BackendApi,
    request: PublishRequest,
    caller: Arc<str>,
    parent: String,
) -> BoxFuture<'static, Result<PublishResponse, Refusal>> {
    let (metrics, timer, deadline) = (api.metrics.clone(), api.metrics.publish_timer(), api.deadline);
    let submitted = checked(request, caller, parent).map(|publish| api.channels.publish(publish));
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
        let numbered = result?;
        Ok(PublishResponse {
            message_id: numbered.message_id.to_string(),
            publication: numbered.number,
            members: numbered.members,
            duplicate: numbered.duplicate,
            ..PublishResponse::default()
        })
    }
    .boxed()
}

fn checked(request: PublishRequest, caller: Arc<str>, parent: String) -> Result<DurablePublish, Refusal> {
    names::check("channel", &request.channel)?;
    names::check_optional("dedupe_key", &request.dedupe_key)?;
    names::check_optional("collapse_key", &request.collapse_key)?;
    let ttl = checked_ttl(request.ttl_ms)?;
    let payload = Payload::from_backend(request.payload)?.into();
    let PublishRequest { channel, dedupe_key, collapse_key, .. } = request;
    Ok(DurablePublish { caller, channel, payload, dedupe_key, parent, ttl, collapse_key })
}

/// Checks that a publish that is not durable asks for nothing that only durable ones have.
pub(super) fn checked_plain(request: &PublishRequest) -> Result<(), Refusal> {
    let field = if request.ttl_ms != 0 {
        "ttl_ms"
    } else if !request.collapse_key.is_empty() {
        "collapse_key"
    } else {
        return Ok(());
    };
    Err(Refusal::bad(format!(
        "{field} is set, and durable is not; a channel message is not kept: leave {field} out, or set durable"
    )))
}

pub(super) async fn in_time<T, E: Into<Refusal>>(
    deadline: Duration,
    call: impl Future<Output = Result<T, E>>,
) -> Result<T, Refusal> {
    match tokio::time::timeout(deadline, call).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(Refusal::new(
            ErrorCode::Unavailable,
            format!(
                "no answer within {deadline:?}; whether it was done is unknown: repeating it is harmless"
            ),
        )),
    }
}

pub(super) async fn join(api: &BackendApi, request: JoinRequest) -> Result<JoinResponse, Refusal> {
    names::check("channel", &request.channel)?;
    checked_users(&request.users, MAX_MEMBERS_PAGE)?;
    let joined = in_time(api.deadline, api.channels.join(request.channel, request.users)).await?;
    Ok(JoinResponse { joined: joined.changed, members: joined.members })
}

pub(super) async fn leave(api: &BackendApi, request: LeaveRequest) -> Result<LeaveResponse, Refusal> {
    names::check("channel", &request.channel)?;
    checked_users(&request.users, MAX_MEMBERS_PAGE)?;
    let left = in_time(api.deadline, api.channels.leave(request.channel, request.users)).await?;
    Ok(LeaveResponse { left: left.changed, members: left.members })
}

pub(super) async fn list(
    api: &BackendApi,
    request: ListMembersRequest,
) -> Result<ListMembersResponse, Refusal> {
    names::check("channel", &request.channel)?;
    let size = match usize::try_from(request.page_size).unwrap_or(usize::MAX) {
        0 => DEFAULT_PAGE,
        size @ 1..=MAX_MEMBERS_PAGE => size,
        size => {
            return Err(Refusal::bad(format!(
                "page_size is {size}; give 1 to {MAX_MEMBERS_PAGE}, or 0 for {DEFAULT_PAGE}"
            )));
        }
    };
    // A page ends with a member's name, and that is where the next begins.
    names::check_optional("page_token", &request.page_token)?;
    let list = api.channels.members(request.channel, request.page_token, size);
    let users = in_time(api.deadline, list).await?;
    let next_page_token = users.last().filter(|_| users.len() == size).cloned().unwrap_or_default();
    Ok(ListMembersResponse { users, next_page_token })
}
