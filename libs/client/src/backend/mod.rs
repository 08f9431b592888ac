//! The gRPC client of a product's back end: publishes to channels and sends to users' inboxes, with deadlines,
//! and with repeats where they cannot double a message.

mod error;
mod stream;

use std::{fmt, time::Duration};

use sanjay_proto::delivery::v1::{self, delivery_client::DeliveryClient};
use sanjay_protocol::{ErrorBody, ErrorCode, Payload, event::Published};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

pub use error::BackendError;
pub use stream::{PendingReply, PublishStream, SendStream};

use crate::{Jitter, backoff};
use error::{Failure, body, deepest};

const RETRY_BASE: Duration = Duration::from_millis(100);
const RETRY_CAP: Duration = Duration::from_secs(5);

/// How a [`Backend`] connects.
#[derive(Clone)]
pub struct BackendOptions {
    /// The delivery API's address, such as `http://127.0.0.1:8082`.
    pub endpoint: String,
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
    /// 10 s for an attempt, 30 s for a call.
    pub fn new(endpoint: impl Into<String>, api_key: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
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
            .field("endpoint", &self.endpoint)
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
    /// Position in the user's inbox.
    pub seq: u64,
    /// An earlier send with the same dedupe key was the one that was accepted.
    pub duplicate: bool,
}

/// What became of a send to one user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserResult {
    /// The user.
    pub user: String,
    /// `Ok` only once the message is durable.
    pub result: Result<Accepted, ErrorBody>,
}

/// A connection to the delivery API. Clones share it; it reconnects by itself.
#[derive(Clone)]
pub struct Backend {
    client: DeliveryClient<Channel>,
    authorization: MetadataValue<Ascii>,
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
    /// When the address or the key is of no use, or nobody listens.
    pub async fn connect(options: BackendOptions) -> Result<Self, BackendError> {
        let endpoint = endpoint(&options.endpoint)?;
        let authorization = format!("Bearer {}", options.api_key).parse();
        let mut authorization: MetadataValue<Ascii> = authorization.map_err(|_| {
            BackendError::Option(
                "the API key holds characters that no key has; give visible ASCII".to_owned(),
            )
        })?;
        authorization.set_sensitive(true);
        let channel = endpoint.connect().await.map_err(|error| BackendError::Unreachable {
            endpoint: options.endpoint.clone(),
            reason: deepest(&error),
        })?;
        Ok(Self { client: DeliveryClient::new(channel), authorization, options })
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
        self.call(!dedupe_key.is_empty(), || {
            let (mut client, request) = self.prepare(message.clone());
            async move { client.publish(request).await }
        })
        .await
        .map(published)
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
        let idempotent = !dedupe_key.is_empty();
        let until = Instant::now() + self.options.patience;
        let mut results: Vec<Option<UserResult>> = vec![None; users.len()];
        let mut left: Vec<usize> = (0..users.len()).collect();
        for attempt in 0_u32.. {
            let asked: Vec<&str> = left.iter().map(|&index| users[index]).collect();
            match self.send_once(&asked, &payload, dedupe_key, until).await {
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
        dedupe_key: &str,
        until: Instant,
    ) -> Result<Vec<UserResult>, BackendError> {
        let message = send_request(users, payload.clone(), dedupe_key);
        let sent = self.call_until(until, !dedupe_key.is_empty(), || {
            let (mut client, request) = self.prepare(message.clone());
            async move { client.send(request).await }
        });
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
        let found = self.call(true, || {
            let (mut client, request) = self.prepare(message.clone());
            async move { client.get_delivery(request).await }
        });
        match found.await {
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
        self.call(true, || {
            let (mut client, request) = self.prepare(message.clone());
            async move { client.get_trace(request).await }
        })
        .await
    }

    /// A client and a request with the key and the deadline.
    fn prepare<T>(&self, message: T) -> (DeliveryClient<Channel>, Request<T>) {
        let mut request = self.authorized(message);
        request.set_timeout(self.options.timeout);
        (self.client.clone(), request)
    }

    /// A request with the key.
    fn authorized<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.authorization.clone());
        request
    }

    async fn call<T, F>(&self, idempotent: bool, attempt: impl Fn() -> F) -> Result<T, BackendError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_until(Instant::now() + self.options.patience, idempotent, attempt).await
    }

    async fn call_until<T, F>(
        &self,
        until: Instant,
        idempotent: bool,
        attempt: impl Fn() -> F,
    ) -> Result<T, BackendError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let within = self.options.timeout;
        let mut attempts = 0;
        loop {
            let failure = match timeout(within, attempt()).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => Failure::from_status(&status, &self.options.endpoint, within),
                Err(_) => Failure::timeout(within),
            };
            let delay = backoff::retry(attempts, None, RETRY_BASE, RETRY_CAP, self.options.jitter.fraction());
            let allowed = failure.not_sent || (idempotent && failure.unknown);
            if !allowed || Instant::now() + delay >= until {
                return Err(failure.error);
            }
            tracing::debug!(error = %failure.error, ?delay, "a call is repeated");
            sleep(delay).await;
            attempts += 1;
        }
    }
}

fn endpoint(address: &str) -> Result<Endpoint, BackendError> {
    let bad = |reason: &str| {
        BackendError::Option(format!(
            "{address:?} is no address of the API: {reason}; one looks like http://127.0.0.1:8082"
        ))
    };
    if address.starts_with("https://") {
        return Err(bad("this client does not speak TLS yet"));
    }
    if !address.starts_with("http://") {
        return Err(bad("it does not begin with http://"));
    }
    let endpoint = Endpoint::from_shared(address.to_owned()).map_err(|error| bad(&deepest(&error)))?;
    Ok(endpoint
        .connect_timeout(Duration::from_secs(5))
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5)))
}

fn publish_request(channel: &str, payload: Payload, dedupe_key: &str) -> v1::PublishRequest {
    v1::PublishRequest {
        channel: channel.to_owned(),
        payload: Some(payload.into()),
        dedupe_key: dedupe_key.to_owned(),
    }
}

fn send_request(users: &[&str], payload: Payload, dedupe_key: &str) -> v1::SendRequest {
    v1::SendRequest {
        users: users.iter().map(|&user| user.to_owned()).collect(),
        payload: Some(payload.into()),
        dedupe_key: dedupe_key.to_owned(),
    }
}

fn published(response: v1::PublishResponse) -> Published {
    Published { message_id: response.message_id, epoch: response.epoch, offset: response.offset }
}

fn user_results(response: v1::SendResponse) -> Vec<UserResult> {
    let user_result = |result: v1::SendResult| {
        let outcome = match result.result {
            Some(v1::send_result::Result::Accepted(accepted)) => {
                let v1::Accepted { message_id, seq, duplicate } = accepted;
                Ok(Accepted { message_id, seq, duplicate })
            }
            Some(v1::send_result::Result::Error(error)) => Err(body(error)),
            None => Err(ErrorBody::new(ErrorCode::Internal, "the server gave no result for this user")),
        };
        UserResult { user: result.user, result: outcome }
    };
    response.results.into_iter().map(user_result).collect()
}
