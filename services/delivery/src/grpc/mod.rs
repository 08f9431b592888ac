//! The gRPC services: check, convert, call, map errors.

mod backend;
mod dead;
mod inbox;
mod stream;
#[cfg(test)]
mod tests;
mod token;

use std::time::Duration;

pub(crate) use backend::BackendApi;
pub(crate) use inbox::EdgeApi;
use sanjay_proto::delivery::v1;
use sanjay_protocol::{ErrorCode, names::NameError, payload::PayloadError};
use tonic::{Code, Status};

use crate::{
    publish::PublishError,
    redrive::RedriveError,
    store::{AppendError, StoreError},
};

/// When a caller should try again what failed for load or for a part that is away.
const RETRY_AFTER_MS: u32 = 500;

/// A call, or one item of it, that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Refusal {
    code: ErrorCode,
    message: String,
}

impl Refusal {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
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
        let code = match &error {
            RedriveError::NotFound(..) => ErrorCode::NotFound,
            RedriveError::Store(error) => error.code(),
        };
        Self::new(code, error.to_string())
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
        Self::new(error.code(), error.to_string())
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::new(error.code(), error.to_string())
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
            ErrorCode::Forbidden => Code::PermissionDenied,
            ErrorCode::AlreadyExists => Code::AlreadyExists,
            ErrorCode::NotFound => Code::NotFound,
            ErrorCode::LimitExceeded | ErrorCode::QueueFull | ErrorCode::RateLimited => {
                Code::ResourceExhausted
            }
            ErrorCode::Unavailable => Code::Unavailable,
            ErrorCode::AlreadySubscribed | ErrorCode::NotSubscribed => Code::FailedPrecondition,
            ErrorCode::Internal | ErrorCode::Unknown => Code::Internal,
        };
        Status::new(code, refusal.message)
    }
}

impl From<Refusal> for v1::Error {
    fn from(refusal: Refusal) -> Self {
        let retryable = refusal.code.is_retryable();
        v1::Error {
            code: refusal.code.as_str().to_owned(),
            message: refusal.message,
            retryable,
            retry_after_ms: if retryable { RETRY_AFTER_MS } else { 0 },
        }
    }
}
