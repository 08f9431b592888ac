//! Dead letters: listed, shown, sent again and purged.

use std::time::Duration;

use sanjay_proto::delivery::v1;
use sanjay_protocol::ErrorCode;
use tokio::time::timeout;
use tonic::Streaming;

use super::{Backend, BackendError, Client, error::Failure};

impl Backend {
    /// A page of the dead letters that match, without payloads, the newest first. `page_size` is 1 to 256, 0 leaves it
    /// to the server; `page_token` is `next_page_token` of the page before, empty for the first. The last page has none.
    ///
    /// # Errors
    /// When the server refuses the filter or the token, or cannot say.
    pub async fn list_dead_letters(
        &self,
        filter: &v1::DeadLetterFilter,
        page_size: u32,
        page_token: &str,
    ) -> Result<v1::ListDeadLettersResponse, BackendError> {
        let filter = Some(filter.clone());
        let message = v1::ListDeadLettersRequest { filter, page_size, page_token: page_token.to_owned() };
        let list = async |mut client: Client, request| client.list_dead_letters(request).await;
        self.call(true, message, list).await
    }

    /// One dead letter with its payload; `None` when there is no such letter.
    ///
    /// # Errors
    /// When the server cannot say.
    pub async fn get_dead_letter(
        &self,
        user: &str,
        message_id: &str,
    ) -> Result<Option<v1::DeadLetter>, BackendError> {
        let message = v1::GetDeadLetterRequest { user: user.to_owned(), message_id: message_id.to_owned() };
        let get = async |mut client: Client, request| client.get_dead_letter(request).await;
        match self.call(true, message, get).await {
            Err(BackendError::Refused(error)) if error.code == ErrorCode::NotFound => Ok(None),
            other => other.map(Some),
        }
    }

    /// Has dead letters sent to their users again, as new messages, and says how far that is. Dropping the answer ends
    /// it. Repeating it sends nothing twice.
    ///
    /// # Errors
    /// When the server refuses it, or there is none.
    pub async fn redrive_dead_letters(
        &self,
        request: v1::RedriveDeadLettersRequest,
    ) -> Result<RedriveStream, BackendError> {
        let redrive = async |mut client: Client, mut request: tonic::Request<_>| {
            // It takes as long as it takes; each of its answers has a deadline instead.
            request.metadata_mut().remove("grpc-timeout");
            client.redrive_dead_letters(request).await
        };
        let answers = self.call(true, request, redrive).await?;
        let (within, endpoint) = (self.options.timeout, self.servers.current().1.endpoint.clone());
        Ok(RedriveStream { answers, within, endpoint, ended: false })
    }

    /// Removes dead letters for good, and says how many there were. With `dry_run` it says how many there are, or, with
    /// `more`, were counted before the time of one call was up.
    ///
    /// # Errors
    /// When the server refuses it. Otherwise some may have been removed; repeating it removes the rest.
    pub async fn purge_dead_letters(
        &self,
        request: v1::PurgeDeadLettersRequest,
    ) -> Result<v1::PurgeDeadLettersResponse, BackendError> {
        let mut purged = 0;
        loop {
            let purge = async |mut client: Client, request| client.purge_dead_letters(request).await;
            let response = self.call(true, request.clone(), purge).await?;
            purged += response.purged;
            if !response.more || request.dry_run {
                return Ok(v1::PurgeDeadLettersResponse { purged, ..response });
            }
        }
    }
}

/// How far a redrive is, about twice a second.
#[derive(Debug)]
pub struct RedriveStream {
    answers: Streaming<v1::RedriveDeadLettersResponse>,
    /// How long one answer may take.
    within: Duration,
    endpoint: String,
    ended: bool,
}

impl RedriveStream {
    /// The next answer. The last one is `done`; after it, and after an error, there is none.
    ///
    /// # Errors
    /// When the redrive was cut off, or refused.
    pub async fn next(&mut self) -> Option<Result<v1::RedriveDeadLettersResponse, BackendError>> {
        if self.ended {
            return None;
        }
        let answer = timeout(self.within, self.answers.message()).await;
        let result = match answer {
            Ok(Ok(Some(answer))) => Ok(answer),
            Ok(Ok(None)) => Err(BackendError::CutOff("the server ended the redrive early".to_owned())),
            Ok(Err(status)) => match Failure::from_status(&status, &self.endpoint, self.within).error {
                BackendError::Broken(reason) => Err(BackendError::CutOff(reason)),
                other => Err(other),
            },
            Err(_) => {
                let text = format!("the server said nothing for {} s", self.within.as_secs_f64());
                Err(BackendError::CutOff(text))
            }
        };
        self.ended = result.as_ref().map_or(true, |answer| answer.done);
        Some(result)
    }
}
