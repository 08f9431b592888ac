//! Who is connected, and what is to become of them.

use sanjay_proto::delivery::v1::{self, control_client::ControlClient};
use sanjay_protocol::{ErrorCode, Payload};
use tokio::time::Instant;
use tonic::{Request, Response, Status, transport::Channel};

use super::{Backend, BackendError, receipts::Answers};

type Client = ControlClient<Channel>;

impl Backend {
    /// Closes the connections of a user, or one of them (`session`, empty for all). `reason` goes to the clients, at most
    /// 120 bytes. With `reconnect` they are to come back.
    ///
    /// # Errors
    /// When the server refuses it, cannot say, or there is no such session.
    pub async fn disconnect(
        &self,
        user: &str,
        session: &str,
        reason: &str,
        reconnect: bool,
    ) -> Result<v1::DisconnectResponse, BackendError> {
        let [user, session, reason] = [user, session, reason].map(str::to_owned);
        let message = v1::DisconnectRequest { user, session, reason, reconnect };
        let call = async |mut client: Client, request| client.disconnect(request).await;
        self.control(message, call).await
    }

    /// The connections that a user has now. Without `complete` there may be others.
    ///
    /// # Errors
    /// When the server refuses the name, or cannot say.
    pub async fn list_connections(&self, user: &str) -> Result<v1::ListConnectionsResponse, BackendError> {
        let message = v1::ListConnectionsRequest { user: user.to_owned() };
        let call = async |mut client: Client, request| client.list_connections(request).await;
        self.control(message, call).await
    }

    /// Subscribes the connections that a user has now to a channel, whatever their tokens allow.
    ///
    /// # Errors
    /// When the server refuses a name, or cannot say.
    pub async fn subscribe_user(
        &self,
        user: &str,
        channel: &str,
    ) -> Result<v1::SubscribeResponse, BackendError> {
        let message = v1::SubscribeRequest { user: user.to_owned(), channel: channel.to_owned() };
        let call = async |mut client: Client, request| client.subscribe(request).await;
        self.control(message, call).await
    }

    /// Ends the subscriptions to a channel of the connections that a user has now. `reason` goes to the clients, at most
    /// 200 bytes; `retryable`: they may subscribe again by themselves.
    ///
    /// # Errors
    /// As [`Backend::subscribe_user`].
    pub async fn unsubscribe_user(
        &self,
        user: &str,
        channel: &str,
        reason: &str,
        retryable: bool,
    ) -> Result<v1::UnsubscribeResponse, BackendError> {
        let [user, channel, reason] = [user, channel, reason].map(str::to_owned);
        let message = v1::UnsubscribeRequest { user, channel, reason, retryable };
        let call = async |mut client: Client, request| client.unsubscribe(request).await;
        self.control(message, call).await
    }

    /// A page of the channels that have subscribers now and whose names begin with `prefix`. `page_size` is 1 to 1,000, 0
    /// leaves it to the server; `page_token` is that of the page before, empty for the first.
    ///
    /// # Errors
    /// When the server refuses it, or cannot say.
    pub async fn list_channels(
        &self,
        prefix: &str,
        page_size: u32,
        page_token: &str,
    ) -> Result<v1::ListChannelsResponse, BackendError> {
        let (prefix, page_token) = (prefix.to_owned(), page_token.to_owned());
        let message = v1::ListChannelsRequest { prefix, page_size, page_token };
        let call = async |mut client: Client, request| client.list_channels(request).await;
        self.control(message, call).await
    }

    /// The edges and routers that run.
    ///
    /// # Errors
    /// When the server cannot say.
    pub async fn list_nodes(&self) -> Result<v1::ListNodesResponse, BackendError> {
        let call = async |mut client: Client, request| client.list_nodes(request).await;
        self.control(v1::ListNodesRequest {}, call).await
    }

    /// Sends a message to every client that is connected now. It is not repeated when its outcome is unknown: a second
    /// one would be another message.
    ///
    /// # Errors
    /// When the server refuses the payload, or cannot say.
    pub async fn broadcast(&self, payload: Payload) -> Result<v1::BroadcastResponse, BackendError> {
        let message = v1::BroadcastRequest { payload: Some(payload.into()) };
        let call = async |mut client: Client, request| client.broadcast(request).await;
        self.call_control(false, message, call).await
    }

    /// A call that may be repeated.
    async fn control<Q: Clone, T, F>(
        &self,
        message: Q,
        attempt: impl Fn(Client, Request<Q>) -> F,
    ) -> Result<T, BackendError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_control(true, message, attempt).await
    }

    async fn call_control<Q: Clone, T, F>(
        &self,
        idempotent: bool,
        message: Q,
        attempt: impl Fn(Client, Request<Q>) -> F,
    ) -> Result<T, BackendError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let until = Instant::now() + self.options.patience;
        self.call_server(until, idempotent, message, |server, request| {
            attempt(server.control.clone(), request)
        })
        .await
    }
}

/// What is revoked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// A user's tokens that were made until now.
    User(String),
    /// One session, by its UUID.
    Session(String),
    /// One token, by its `jti`.
    Token(String),
}

impl From<&Subject> for v1::Subject {
    fn from(subject: &Subject) -> Self {
        let subject = match subject {
            Subject::User(user) => v1::subject::Subject::User(user.clone()),
            Subject::Session(session) => v1::subject::Subject::Session(session.clone()),
            Subject::Token(jti) => v1::subject::Subject::Jti(jti.clone()),
        };
        v1::Subject { subject: Some(subject) }
    }
}

impl Backend {
    /// Refuses tokens from now on, and closes the connections that were opened with them within a second. `Ok` means
    /// durable. `reason` is for whoever lists revocations, at most 200 bytes.
    ///
    /// # Errors
    /// When the server refuses it, or the outcome is unknown.
    pub async fn revoke(&self, subject: &Subject, reason: &str) -> Result<v1::Revocation, BackendError> {
        let message = v1::RevokeRequest { subject: Some(subject.into()), reason: reason.to_owned() };
        let call = async |mut client: Client, request| client.revoke(request).await;
        self.control(message, call).await.map(|revoked| revoked.revocation.unwrap_or_default())
    }

    /// Takes a revocation back; `None` when there was none. `Ok` means durable.
    ///
    /// # Errors
    /// When the server refuses it, or the outcome is unknown.
    pub async fn unrevoke(&self, subject: &Subject) -> Result<Option<v1::Revocation>, BackendError> {
        let message = v1::UnrevokeRequest { subject: Some(subject.into()) };
        let call = async |mut client: Client, request| client.unrevoke(request).await;
        match self.control(message, call).await {
            Err(BackendError::Refused(error)) if error.code == ErrorCode::NotFound => Ok(None),
            other => other.map(|unrevoked| unrevoked.revocation),
        }
    }

    /// A page of the revocations in force. `page_size` is 1 to 1,000, 0 leaves it to the server; `page_token` is that of the
    /// page before, empty for the first.
    ///
    /// # Errors
    /// When the server refuses it, or cannot say.
    pub async fn list_revocations(
        &self,
        page_size: u32,
        page_token: &str,
    ) -> Result<v1::ListRevocationsResponse, BackendError> {
        let message = v1::ListRevocationsRequest { page_size, page_token: page_token.to_owned() };
        let call = async |mut client: Client, request| client.list_revocations(request).await;
        self.control(message, call).await
    }
}

impl Backend {
    /// Hears of what happens to connections, from now on.
    ///
    /// # Errors
    /// When the server refuses the request, or there is none.
    pub async fn watch_connections(
        &self,
        request: v1::WatchConnectionsRequest,
    ) -> Result<ConnectionStream, BackendError> {
        let watch = async |mut client: Client, mut request: Request<_>| {
            request.metadata_mut().remove("grpc-timeout");
            client.watch_connections(request).await
        };
        let answers = self.control(request, watch).await?;
        Ok(ConnectionStream(Answers::new(self, answers)))
    }
}

/// What happens to connections.
#[derive(Debug)]
pub struct ConnectionStream(Answers<v1::WatchConnectionsResponse>);

impl ConnectionStream {
    /// The next event, or how many were missed; `None` once the stream ended.
    pub async fn next(&mut self) -> Option<Result<v1::watch_connections_response::Result, BackendError>> {
        loop {
            match self.0.next().await? {
                Ok(answer) => {
                    if let Some(result) = answer.result {
                        return Some(Ok(result));
                    }
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
