//! What callers are told about a failure: one code of the client protocol's table for each.

use sanjay_proto::edge::v1::LinkError;
use sanjay_protocol::error::ErrorCode;

use crate::{
    bus::BusError, history::HistoryError, link::EventError, publish::PublishError, registry::RegistryError,
    subscriptions::SubscribeError,
};

/// An error with a code of the client protocol.
pub(crate) trait Coded: std::error::Error {
    /// The code.
    fn code(&self) -> ErrorCode;
}

/// The error as it travels inside an answer.
pub(crate) fn link_error(error: &impl Coded) -> LinkError {
    let code = error.code();
    LinkError { code: code.as_str().to_owned(), message: error.to_string(), retryable: code.is_retryable() }
}

impl Coded for RegistryError {
    fn code(&self) -> ErrorCode {
        match self {
            // The channels of others are in the way; they are forgotten when idle, so a later try may
            // succeed.
            RegistryError::TooManyChannels { .. } | RegistryError::Superseded { .. } => {
                ErrorCode::Unavailable
            }
            RegistryError::Unavailable(_) => ErrorCode::Unavailable,
        }
    }
}

impl Coded for SubscribeError {
    fn code(&self) -> ErrorCode {
        match self {
            SubscribeError::Bus(BusError::Listener) => ErrorCode::Internal,
            SubscribeError::Bus(BusError::Unavailable(_)) => ErrorCode::Unavailable,
            SubscribeError::Registry(error) => error.code(),
        }
    }
}

impl Coded for PublishError {
    fn code(&self) -> ErrorCode {
        match self {
            PublishError::Name(_) | PublishError::NoPayload | PublishError::MessageId(_) => {
                ErrorCode::BadRequest
            }
            PublishError::TooLarge(_) | PublishError::TooLargeHere { .. } => ErrorCode::PayloadTooLarge,
            PublishError::BackendsOnly(_) => ErrorCode::Forbidden,
            PublishError::Registry(error) => error.code(),
        }
    }
}

impl Coded for HistoryError {
    fn code(&self) -> ErrorCode {
        match self {
            HistoryError::Name(_) | HistoryError::Limit(_) | HistoryError::Off(_) => ErrorCode::BadRequest,
            HistoryError::Registry(error) => error.code(),
        }
    }
}

impl Coded for EventError {
    fn code(&self) -> ErrorCode {
        match self {
            EventError::Name(_) | EventError::Session(_) => ErrorCode::BadRequest,
            EventError::TooManyChannels(_) | EventError::TooManySessions(_) => ErrorCode::LimitExceeded,
            EventError::Registry(error) => error.code(),
        }
    }
}
