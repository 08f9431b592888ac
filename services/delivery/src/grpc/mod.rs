//! The gRPC services: check, convert, call, map errors.

mod backend;
mod control;
mod cursor;
mod dead;
mod fanout;
mod history;
mod inbox;
mod receipts;
mod revocations;
mod stream;
#[cfg(test)]
mod tests;
mod token;
mod watch;

use std::time::Duration;

pub(crate) use backend::BackendApi;
pub(crate) use control::ControlApi;
pub(crate) use inbox::EdgeApi;
pub(crate) use receipts::readers;
pub(crate) use revocations::RevocationsApi;
use sanjay_proto::delivery::v1;
use sanjay_protocol::{ErrorCode, names::NameError, payload::PayloadError};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
pub(crate) use watch::room;

use crate::{
    publish::PublishError,
    redrive::RedriveError,
    store::{AppendError, StoreError},
};

/// When a caller should try again what failed for load or for a part that is away, unless it is known better.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// A call, or one item of it, that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal {
    code: ErrorCode,
    message: String,
    /// When another try may be of use, where that is known.
    retry_after: Option<Duration>,
}

impl Refusal {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    /// When to try again, where that may help at all.
    fn retry_after(&self) -> Option<Duration> {
        self.code.is_retryable().then(|| self.retry_after.unwrap_or(RETRY_AFTER))
    }

    fn bad(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::BadRequest, message)
    }

    /// Nothing came back in time.
    fn late(deadline: Duration) -> Self {
        let message = format!(
            "no answer within {deadline:?}; whether it was done is unknown: repeat the call with the same dedupe_key"
        );
        Self::new(ErrorCode::Unavailable, message)
    }
}

impl From<RedriveError> for Refusal {
    fn from(error: RedriveError) -> Self {
        match error {
            RedriveError::NotFound(..) => Self::new(ErrorCode::NotFound, error.to_string()),
            RedriveError::Store(error) => error.into(),
        }
    }
}

impl From<NameError> for Refusal {
    fn from(error: NameError) -> Self {
        Self::bad(error.to_string())
    }
}

impl From<PayloadError> for Refusal {
    fn from(error: PayloadError) -> Self {
        let code = match error {
            PayloadError::TooLarge(_) => ErrorCode::PayloadTooLarge,
            PayloadError::Missing | PayloadError::NotJson(_) => ErrorCode::BadRequest,
        };
        Self::new(code, error.to_string())
    }
}

impl From<AppendError> for Refusal {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Store(error) => error.into(),
            error => Self::new(error.code(), error.to_string()),
        }
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        let retry_after = match error {
            StoreError::Away { retry_after } => Some(retry_after),
            StoreError::Busy | StoreError::Unavailable(_) => None,
        };
        Self { retry_after, ..Self::new(error.code(), error.to_string()) }
    }
}

impl From<PublishError> for Refusal {
    fn from(error: PublishError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal.code {
            ErrorCode::BadRequest | ErrorCode::PayloadTooLarge | ErrorCode::UnknownCommand => {
                Code::InvalidArgument
            }
            ErrorCode::Forbidden | ErrorCode::TokenExpired => Code::PermissionDenied,
            ErrorCode::AlreadyExists => Code::AlreadyExists,
            ErrorCode::NotFound => Code::NotFound,
            ErrorCode::LimitExceeded | ErrorCode::QueueFull | ErrorCode::RateLimited => {
                Code::ResourceExhausted
            }
            ErrorCode::Unavailable => Code::Unavailable,
            ErrorCode::AlreadySubscribed | ErrorCode::NotSubscribed => Code::FailedPrecondition,
            ErrorCode::Internal | ErrorCode::Unknown => Code::Internal,
        };
        // `google.rpc.RetryInfo`, which clients of other languages know too.
        match refusal.retry_after() {
            Some(after) => {
                let details = ErrorDetails::with_retry_info(Some(after));
                Status::with_error_details(code, refusal.message, details)
            }
            None => Status::new(code, refusal.message),
        }
    }
}

impl From<Refusal> for v1::Error {
    fn from(refusal: Refusal) -> Self {
        let after = refusal.retry_after();
        // 0 would say nothing.
        let ms = |after: Duration| u32::try_from(after.as_millis()).unwrap_or(u32::MAX).max(1);
        v1::Error {
            code: refusal.code.as_str().to_owned(),
            message: refusal.message,
            retryable: after.is_some(),
            retry_after_ms: after.map_or(0, ms),
        }
    }
}
