//! What became of messages: the log of receipts, the deliveries of a user, and live events.

use std::time::Duration;

use sanjay_proto::delivery::v1;
use tokio::time::timeout;
use tonic::Streaming;

use super::{Backend, BackendError, Client, error::Failure};

/// How long a stream may say nothing before it counts as broken: the server says something every 10 seconds.
const SILENCE: Duration = Duration::from_secs(30);

impl Backend {
    /// Reads the log of receipts: how each message ended, in one order. Go on with the cursor of the last response that
    /// was dealt with: then none is missed, and none comes twice.
    ///
    /// # Errors
    /// When the server refuses the cursor or the filter, or there is none.
    pub async fn receipts(&self, request: v1::ReceiptsRequest) -> Result<ReceiptStream, BackendError> {
        let cursor = request.cursor.clone();
        let receipts = async |mut client: Client, mut request: tonic::Request<_>| {
            request.metadata_mut().remove("grpc-timeout");
            client.receipts(request).await
        };
        let answers = self.call(true, request, receipts).await?;
        Ok(ReceiptStream { answers: Answers::new(self, answers), cursor })
    }

    /// A page of a user's messages, the newest first. `next_page_token` of the page before goes into `page_token`.
    ///
    /// # Errors
    /// When the server refuses the request or the token, or cannot say.
    pub async fn list_deliveries(
        &self,
        request: v1::ListDeliveriesRequest,
    ) -> Result<v1::ListDeliveriesResponse, BackendError> {
        let list = async |mut client: Client, request| client.list_deliveries(request).await;
        self.call(true, request, list).await
    }

    /// Hears of what happens to messages at the server that is asked, from when this returns.
    ///
    /// # Errors
    /// When the server refuses the request, or there is none.
    pub async fn watch_deliveries(
        &self,
        request: v1::WatchDeliveriesRequest,
    ) -> Result<WatchStream, BackendError> {
        let watch = async |mut client: Client, mut request: tonic::Request<_>| {
            request.metadata_mut().remove("grpc-timeout");
            client.watch_deliveries(request).await
        };
        let answers = self.call(true, request, watch).await?;
        Ok(WatchStream(Answers::new(self, answers)))
    }
}

/// The answers of a stream that says something now and again.
#[derive(Debug)]
pub(super) struct Answers<T> {
    answers: Streaming<T>,
    endpoint: String,
    ended: bool,
}

impl<T> Answers<T> {
    pub(super) fn new(backend: &Backend, answers: Streaming<T>) -> Self {
        Self { answers, endpoint: backend.servers.current().1.endpoint.clone(), ended: false }
    }

    pub(super) async fn next(&mut self) -> Option<Result<T, BackendError>> {
        if self.ended {
            return None;
        }
        let result = match timeout(SILENCE, self.answers.message()).await {
            Ok(Ok(answer)) => answer.map(Ok),
            Ok(Err(status)) => {
                Some(Err(match Failure::from_status(&status, &self.endpoint, SILENCE).error {
                    BackendError::Broken(reason) => BackendError::StreamEnded(reason),
                    BackendError::Timeout(_) => {
                        BackendError::StreamEnded("the call was cancelled".to_owned())
                    }
                    other => other,
                }))
            }
            Err(_) => {
                let text = format!("the server said nothing for {} s", SILENCE.as_secs());
                Some(Err(BackendError::StreamEnded(text)))
            }
        };
        self.ended = !matches!(result, Some(Ok(_)));
        result
    }
}

/// The log of receipts, batch by batch.
#[derive(Debug)]
pub struct ReceiptStream {
    answers: Answers<v1::ReceiptsResponse>,
    cursor: String,
}

impl ReceiptStream {
    /// The next batch, which may be empty; `None` at the end of a log that is not followed.
    ///
    /// # Errors
    /// When the stream broke: [`Backend::receipts`] with [`ReceiptStream::cursor`] goes on.
    pub async fn next(&mut self) -> Option<Result<v1::ReceiptsResponse, BackendError>> {
        let result = self.answers.next().await;
        if let Some(Ok(batch)) = &result {
            self.cursor.clone_from(&batch.cursor);
        }
        result
    }

    /// Stands for everything that was given out; empty before the first batch, unless it began with one.
    #[must_use]
    pub fn cursor(&self) -> &str {
        &self.cursor
    }
}

/// Live events.
#[derive(Debug)]
pub struct WatchStream(Answers<v1::WatchDeliveriesResponse>);

impl WatchStream {
    /// The next event, or how many were missed; `None` when the server ended the stream.
    ///
    /// # Errors
    /// When the stream broke. What happens until the next one is opened is not told.
    pub async fn next(&mut self) -> Option<Result<v1::watch_deliveries_response::Result, BackendError>> {
        loop {
            match self.0.next().await? {
                Ok(v1::WatchDeliveriesResponse { result: Some(result) }) => return Some(Ok(result)),
                // It is alive.
                Ok(_) => {}
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
