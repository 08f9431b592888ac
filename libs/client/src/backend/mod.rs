//! The gRPC client of a product's back end: publishes to channels and sends to users' inboxes, with deadlines,
//! and with repeats where they cannot double a message.

mod control;
mod dead;
mod error;
mod fanout;
mod history;
mod receipts;
mod servers;
mod stream;

use std::{fmt, sync::Arc, time::Duration};

use sanjay_proto::delivery::v1::{self, delivery_client::DeliveryClient};
use sanjay_protocol::{ErrorBody, ErrorCode, Payload, event::Published};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};

pub use control::{ConnectionStream, Subject};
pub use dead::RedriveStream;
pub use error::BackendError;
pub use fanout::{DurablyPublished, MembersPage, PublishOptions};
pub use receipts::{ReceiptStream, WatchStream};
pub use stream::{PendingReply, PublishStream, SendStream};

use crate::{Jitter, backoff};
use error::{Failure, body};
use servers::{Server, Servers};

type Client = DeliveryClient<Channel>;

const RETRY_BASE: Duration = Duration::from_millis(100);
const RETRY_CAP: Duration = Duration::from_secs(5);

/// How a [`Backend`] connects.
#[derive(Clone)]
pub struct BackendOptions {
    /// The delivery API's addresses, such as `http://127.0.0.1:8082`. Calls stay with one server while it answers;
    /// when it does not, what may be repeated goes to the next, and later calls go there first.
    pub endpoints: Vec<String>,
    /// An API key of that server.
    pub api_key: String,
    /// How long one attempt of a call may take, and the answer to a request on a stream.
    pub timeout: Duration,
    /// How long a call is repeated where that is allowed.
    pub patience: Duration,
    /// The random source of the delays between attempts.
    pub jitter: Jitter,
}

impl BackendOptions {
    /// 10 s for an attempt, 30 s for a call. `endpoint`: one address, or several with commas between them.
    pub fn new(endpoint: impl Into<String>, api_key: impl Into<String>) -> Self {
        Self {
            endpoints: vec![endpoint.into()],
            api_key: api_key.into(),
            timeout: Duration::from_secs(10),
            patience: Duration::from_secs(30),
            jitter: Jitter::default(),
        }
    }
}

impl fmt::Debug for BackendOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BackendOptions")
            .field("endpoints", &self.endpoints)
            .field("api_key", &"<redacted>")
            .field("timeout", &self.timeout)
            .field("patience", &self.patience)
            .finish_non_exhaustive()
    }
}

/// A message in a user's inbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Accepted {
    /// UUID.
    pub message_id: String,
    /// Position in the user's inbox; 0 for a message that was scheduled.
    pub seq: u64,
    /// An earlier send with the same dedupe key was the one that was accepted.
    pub duplicate: bool,
    /// When it goes into the inbox, Unix time in microseconds; `None` when that is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deliver_at_us: Option<u64>,
}

/// What a send may ask for, beside its users and its payload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SendOptions {
    /// At most 200 bytes; with one, the send may be repeated and is accepted once. Empty for none.
    pub dedupe_key: String,
    /// How long the message may wait to be acknowledged, in whole milliseconds from when it is in the inbox.
    pub ttl: Option<Duration>,
    /// At most 200 bytes; the message replaces an unsettled one with the same key. Empty for none.
    pub collapse_key: String,
    /// When it goes into the inbox, Unix time in microseconds; at most 366 days ahead.
    pub deliver_at_us: Option<u64>,
}

impl SendOptions {
    /// With a dedupe key alone; empty for none.
    #[must_use]
    pub fn dedupe(key: impl Into<String>) -> Self {
        Self { dedupe_key: key.into(), ..Self::default() }
    }
}

/// What became of a send to one user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserResult {
    /// The user.
    pub user: String,
    /// `Ok` only once the message is durable.
    pub result: Result<Accepted, ErrorBody>,
}

/// A connection to the delivery API. Clones share it; it reconnects by itself, to any of its servers.
#[derive(Clone)]
pub struct Backend {
    servers: Arc<Servers>,
    authorization: MetadataValue<Ascii>,
    traceparent: Option<MetadataValue<Ascii>>,
    options: BackendOptions,
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Backend").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Backend {
    /// Connects. The API key is looked at by the first call.
    ///
    /// # Errors
    /// When an address or the key is of no use, or nobody listens.
    pub async fn connect(options: BackendOptions) -> Result<Self, BackendError> {
        let authorization = format!("Bearer {}", options.api_key).parse();
        let mut authorization: MetadataValue<Ascii> = authorization.map_err(|_| {
            BackendError::Option(
                "the API key holds characters that no key has; give visible ASCII".to_owned(),
            )
        })?;
        authorization.set_sensitive(true);
        let servers = Arc::new(Servers::connect(&options).await?);
        Ok(Self { servers, authorization, traceparent: None, options })
    }

    /// The same connection for calls under a span of the caller's: messages of these calls, and of streams that it
    /// opens, continue the trace. `traceparent` is as W3C Trace Context, section 3.2, has it. Its sampled flag decides
    /// whether the servers record.
    ///
    /// # Errors
    /// When it holds characters that no `traceparent` has.
    pub fn traced(&self, traceparent: &str) -> Result<Self, BackendError> {
        let value = traceparent.parse().ok().filter(|_| !traceparent.is_empty());
        let value: MetadataValue<Ascii> = value.ok_or_else(|| {
            BackendError::Option(format!(
                "{traceparent:?} is no traceparent; one looks like 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
            ))
        })?;
        Ok(Self { traceparent: Some(value), ..self.clone() })
    }

    /// Publishes to everyone who is subscribed to a channel. `Ok` means assigned, not durable. With a dedupe key
    /// (at most 200 bytes, may be empty) it is repeated while the server is away; without one, only as long as
    /// it was certainly not sent.
    ///
    /// # Errors
    /// Says whether the server refused it or the outcome is unknown.
    pub async fn publish(
        &self,
        channel: &str,
        payload: Payload,
        dedupe_key: &str,
    ) -> Result<Published, BackendError> {
        let message = publish_request(channel, payload, dedupe_key);
        let publish = async |mut client: Client, request| client.publish(request).await;
        self.call(!dedupe_key.is_empty(), message, publish).await.map(published)
    }

    /// Puts a message into the inbox of each user, at most 1,000; a result for each, in order. With a dedupe key
    /// it is repeated for users who may yet accept it; without one, only as long as it was certainly not sent.
    ///
    /// # Errors
    /// When nothing is known about any user.
    pub async fn send(
        &self,
        users: &[&str],
        payload: Payload,
        dedupe_key: &str,
    ) -> Result<Vec<UserResult>, BackendError> {
        self.send_with(users, payload, &SendOptions::dedupe(dedupe_key)).await
    }

    /// Like [`Backend::send`], with everything that a send may ask for.
    ///
    /// # Errors
    /// When nothing is known about any user.
    pub async fn send_with(
        &self,
        users: &[&str],
        payload: Payload,
        options: &SendOptions,
    ) -> Result<Vec<UserResult>, BackendError> {
        let idempotent = !options.dedupe_key.is_empty();
        let until = Instant::now() + self.options.patience;
        let mut results: Vec<Option<UserResult>> = vec![None; users.len()];
        let mut left: Vec<usize> = (0..users.len()).collect();
        for attempt in 0_u32.. {
            let asked: Vec<&str> = left.iter().map(|&index| users[index]).collect();
            match self.send_once(&asked, &payload, options, until).await {
                Ok(answers) => {
                    left.iter().zip(answers).for_each(|(&index, answer)| results[index] = Some(answer))
                }
                Err(error) if left.len() == users.len() && results.iter().all(Option::is_none) => {
                    return Err(error);
                }
                // Some are accepted: the others keep the errors that they had.
                Err(_) => break,
            }
            let again = |index: &usize| matches!(&results[*index], Some(UserResult { result: Err(e), .. }) if e.retryable);
            left.retain(again);
            let hint = left
                .iter()
                .filter_map(|&index| results[index].as_ref()?.result.as_ref().err()?.retry_after_ms)
                .max();
            let hint = hint.map(|ms| Duration::from_millis(ms.into()));
            let delay = backoff::retry(attempt, hint, RETRY_BASE, RETRY_CAP, self.options.jitter.fraction());
            if left.is_empty() || !idempotent || Instant::now() + delay >= until {
                break;
            }
            sleep(delay).await;
        }
        Ok(results.into_iter().flatten().collect())
    }

    async fn send_once(
        &self,
        users: &[&str],
        payload: &Payload,
        options: &SendOptions,
        until: Instant,
    ) -> Result<Vec<UserResult>, BackendError> {
        let message = send_request(users, payload.clone(), options);
        let send = async |mut client: Client, request| client.send(request).await;
        let sent = self.call_until(until, !options.dedupe_key.is_empty(), message, send);
        let results = user_results(sent.await?);
        if results.len() == users.len() {
            Ok(results)
        } else {
            let text = format!("{} results came for {} users", results.len(), users.len());
            Err(BackendError::Refused(ErrorBody::new(ErrorCode::Internal, text)))
        }
    }

    /// Opens a stream of publishes whose answers come in order.
    #[must_use]
    pub fn publish_stream(&self) -> PublishStream {
        PublishStream::open(self)
    }

    /// Opens a stream of sends whose answers come in order.
    #[must_use]
    pub fn send_stream(&self) -> SendStream {
        SendStream::open(self)
    }

    /// The state of an inbox message; `None` when there is no such message.
    ///
    /// # Errors
    /// When the server cannot say.
    pub async fn get_delivery(
        &self,
        user: &str,
        message_id: &str,
    ) -> Result<Option<v1::GetDeliveryResponse>, BackendError> {
        let message = v1::GetDeliveryRequest { user: user.to_owned(), message_id: message_id.to_owned() };
        let get = async |mut client: Client, request| client.get_delivery(request).await;
        match self.call(true, message, get).await {
            Err(BackendError::Refused(error)) if error.code == ErrorCode::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    /// The way of a recent message, as far as the servers remember it.
    ///
    /// # Errors
    /// When the server cannot say.
    pub async fn get_trace(&self, message_id: &str) -> Result<v1::GetTraceResponse, BackendError> {
        let message = v1::GetTraceRequest { message_id: message_id.to_owned() };
        let get = async |mut client: Client, request| client.get_trace(request).await;
        self.call(true, message, get).await
    }

    /// A request with the key.
    fn authorized<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.authorization.clone());
        if let Some(traceparent) = &self.traceparent {
            request.metadata_mut().insert("traceparent", traceparent.clone());
        }
        request
    }

    async fn call<Q: Clone, T, F>(
        &self,
        idempotent: bool,
        message: Q,
        attempt: impl Fn(Client, Request<Q>) -> F,
    ) -> Result<T, BackendError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_until(Instant::now() + self.options.patience, idempotent, message, attempt).await
    }

    async fn call_until<Q: Clone, T, F>(
        &self,
        until: Instant,
        idempotent: bool,
        message: Q,
        attempt: impl Fn(Client, Request<Q>) -> F,
    ) -> Result<T, BackendError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_server(until, idempotent, message, |server, request| {
            attempt(server.client.clone(), request)
        })
        .await
    }

    /// Makes a call on one server after another, as long as that may help.
    async fn call_server<Q: Clone, T, F>(
        &self,
        until: Instant,
        idempotent: bool,
        message: Q,
        attempt: impl Fn(&Server, Request<Q>) -> F,
    ) -> Result<T, BackendError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let within = self.options.timeout;
        let mut attempts = 0;
        loop {
            let (index, server) = self.servers.current();
            let mut request = self.authorized(message.clone());
            request.set_timeout(within);
            let failure = match timeout(within, attempt(server, request)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => Failure::from_status(&status, &server.endpoint, within),
                Err(_) => Failure::timeout(within),
            };
            if failure.not_sent || failure.unknown {
                self.servers.leave(index);
            }
            let delay = self.delay(attempts, failure.retry_after);
            let allowed = failure.not_sent || (idempotent && failure.unknown);
            if !allowed || Instant::now() + delay >= until {
                return Err(failure.error);
            }
            tracing::debug!(error = %failure.error, ?delay, "a call is repeated");
            sleep(delay).await;
            attempts += 1;
        }
    }

    /// How long to wait after this attempt failed: not at all before each server had its turn, then longer and longer,
    /// and not less than the server asked for.
    fn delay(&self, attempt: u32, hint: Option<Duration>) -> Duration {
        let count = self.servers.count();
        if !(attempt + 1).is_multiple_of(count) {
            return Duration::ZERO;
        }
        let delay = |hint| {
            backoff::retry(attempt / count, hint, RETRY_BASE, RETRY_CAP, self.options.jitter.fraction())
        };
        hint.map_or(Duration::ZERO, |hint| delay(Some(hint))).max(delay(None))
    }
}

fn publish_request(channel: &str, payload: Payload, dedupe_key: &str) -> v1::PublishRequest {
    v1::PublishRequest {
        channel: channel.to_owned(),
        payload: Some(payload.into()),
        dedupe_key: dedupe_key.to_owned(),
        ..v1::PublishRequest::default()
    }
}

fn send_request(users: &[&str], payload: Payload, options: &SendOptions) -> v1::SendRequest {
    // Less than a millisecond is not for ever.
    let ttl_ms = options.ttl.map_or(0, |ttl| u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1));
    v1::SendRequest {
        users: users.iter().map(|&user| user.to_owned()).collect(),
        payload: Some(payload.into()),
        dedupe_key: options.dedupe_key.clone(),
        ttl_ms,
        collapse_key: options.collapse_key.clone(),
        deliver_at_us: options.deliver_at_us.unwrap_or(0),
    }
}

fn published(response: v1::PublishResponse) -> Published {
    Published { message_id: response.message_id, epoch: response.epoch, offset: response.offset }
}

fn user_results(response: v1::SendResponse) -> Vec<UserResult> {
    let user_result = |result: v1::SendResult| {
        let outcome = match result.result {
            Some(v1::send_result::Result::Accepted(accepted)) => {
                let v1::Accepted { message_id, seq, duplicate, deliver_at_us } = accepted;
                let deliver_at_us = Some(deliver_at_us).filter(|at| *at > 0);
                Ok(Accepted { message_id, seq, duplicate, deliver_at_us })
            }
            Some(v1::send_result::Result::Error(error)) => Err(body(error)),
            None => Err(ErrorBody::new(ErrorCode::Internal, "the server gave no result for this user")),
        };
        UserResult { user: result.user, result: outcome }
    };
    response.results.into_iter().map(user_result).collect()
}
