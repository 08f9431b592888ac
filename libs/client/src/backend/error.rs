//! What can go wrong between a back end and the delivery API, and what is known about the outcome.

use std::{error::Error as _, time::Duration};

use sanjay_proto::delivery::v1;
use sanjay_protocol::{ErrorBody, ErrorCode};
use tonic::{Code, ConnectError, Status};
use tonic_types::StatusExt as _;

/// Why a call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// An option is of no use.
    #[error("{0}")]
    Option(String),
    /// Nobody listens; nothing was sent.
    #[error("no server answers at {endpoint}: {reason}")]
    Unreachable {
        /// The API's address.
        endpoint: String,
        /// What the system said.
        reason: String,
    },
    /// The server does not know the API key.
    #[error("{endpoint} refused the API key: {reason}; give the key of this server")]
    WrongKey {
        /// The API's address.
        endpoint: String,
        /// What the server said.
        reason: String,
    },
    /// The server refused the request.
    #[error("{}", .0.message)]
    Refused(ErrorBody),
    /// No answer in time; the outcome is unknown.
    #[error("no answer within {} s, so the outcome is unknown; repeat with the same dedupe key", .0.as_secs_f64())]
    Timeout(Duration),
    /// The call broke; the outcome is unknown.
    #[error("{0}; the outcome is unknown: repeat with the same dedupe key")]
    Broken(String),
    /// A stream of receipts or events broke.
    #[error("{0}; open the stream again, receipts with the last cursor")]
    StreamEnded(String),
    /// A redrive ended before it was done.
    #[error("{0}; repeat the redrive: it goes on where it ended, and sends nothing twice")]
    CutOff(String),
}

/// A failed call with what is known about it.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) error: BackendError,
    /// The request never left: any request may be repeated.
    pub(crate) not_sent: bool,
    /// It may have been carried out: only what is idempotent may be repeated.
    pub(crate) unknown: bool,
    /// The server said that nothing earlier is of use (`google.rpc.RetryInfo`).
    pub(crate) retry_after: Option<Duration>,
}

impl Failure {
    pub(crate) fn timeout(within: Duration) -> Self {
        Self { error: BackendError::Timeout(within), not_sent: false, unknown: true, retry_after: None }
    }

    pub(crate) fn from_status(status: &Status, endpoint: &str, within: Duration) -> Self {
        if let Some(reason) = connect_error(status) {
            let error = BackendError::Unreachable { endpoint: endpoint.to_owned(), reason };
            return Self { error, not_sent: true, unknown: false, retry_after: None };
        }
        let message = status.message().to_owned();
        let retry_after = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let retry_after_ms = retry_after.map(|after| u32::try_from(after.as_millis()).unwrap_or(u32::MAX));
        let refused = |code| {
            let body = ErrorBody { retry_after_ms, ..ErrorBody::new(code, message.clone()) };
            Self { error: BackendError::Refused(body), not_sent: false, unknown: false, retry_after }
        };
        match status.code() {
            Code::Unauthenticated => {
                let error = BackendError::WrongKey { endpoint: endpoint.to_owned(), reason: message };
                Self { error, not_sent: false, unknown: false, retry_after }
            }
            Code::InvalidArgument | Code::OutOfRange => refused(ErrorCode::BadRequest),
            Code::PermissionDenied => refused(ErrorCode::Forbidden),
            Code::NotFound => refused(ErrorCode::NotFound),
            Code::AlreadyExists => refused(ErrorCode::AlreadyExists),
            Code::ResourceExhausted => refused(ErrorCode::RateLimited),
            Code::FailedPrecondition => refused(ErrorCode::LimitExceeded),
            Code::Unimplemented => refused(ErrorCode::UnknownCommand),
            // A server that says when to try again also says what it has done.
            Code::Unavailable if retry_after.is_some() => {
                Self { unknown: true, ..refused(ErrorCode::Unavailable) }
            }
            // A client's own deadline ends as `cancelled`.
            Code::DeadlineExceeded | Code::Cancelled => Self::timeout(within),
            _ => {
                let error = BackendError::Broken(plain(status));
                Self { error, not_sent: false, unknown: true, retry_after }
            }
        }
    }
}

/// The reason when the request found no connection.
fn connect_error(status: &Status) -> Option<String> {
    let mut source = status.source();
    while let Some(error) = source {
        if let Some(ConnectError(reason)) = error.downcast_ref::<ConnectError>() {
            return Some(deepest(&**reason));
        }
        source = error.source();
    }
    None
}

/// The innermost cause says what happened; the outer ones only where.
pub(crate) fn deepest(mut error: &(dyn std::error::Error + 'static)) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

fn plain(status: &Status) -> String {
    match status.source() {
        Some(source) => deepest(source),
        None => format!("{}: {}", status.code().description(), status.message()),
    }
}

impl From<v1::Error> for BackendError {
    fn from(error: v1::Error) -> Self {
        Self::Refused(body(error))
    }
}

pub(crate) fn body(error: v1::Error) -> ErrorBody {
    ErrorBody {
        code: ErrorCode::from_text(&error.code),
        message: error.message,
        retryable: error.retryable,
        retry_after_ms: (error.retry_after_ms > 0).then_some(error.retry_after_ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_of_the_server_is_kept() {
        let after = Duration::from_millis(1_250);
        let details = tonic_types::ErrorDetails::with_retry_info(Some(after));
        let status = |code| Status::with_error_details(code, "later", details.clone());
        let failure = Failure::from_status(&status(Code::Unavailable), "http://here", Duration::ZERO);
        assert_eq!((failure.unknown, failure.retry_after), (true, Some(after)));
        let failure = Failure::from_status(&status(Code::ResourceExhausted), "http://here", Duration::ZERO);
        let BackendError::Refused(body) = failure.error else { panic!("{:?}", failure.error) };
        assert_eq!((body.code, body.retry_after_ms), (ErrorCode::RateLimited, Some(1_250)));
        let failure = Failure::from_status(&Status::unavailable("away"), "http://here", Duration::ZERO);
        assert_eq!(failure.retry_after, None);
    }

    #[test]
    fn only_a_failed_connect_is_known_not_to_be_sent() {
        let connect = ConnectError(Box::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)));
        let failure =
            Failure::from_status(&Status::from_error(Box::new(connect)), "http://here", Duration::ZERO);
        assert!(failure.not_sent && !failure.unknown);
        assert_eq!(failure.error.to_string(), "no server answers at http://here: connection refused");
        for (status, unknown) in [
            (Status::unavailable("the store is away"), true),
            (Status::internal("a fault"), true),
            (Status::deadline_exceeded("late"), true),
            (Status::invalid_argument("users is empty"), false),
            (Status::unauthenticated("unknown key"), false),
        ] {
            let failure = Failure::from_status(&status, "http://here", Duration::ZERO);
            assert_eq!((failure.not_sent, failure.unknown), (false, unknown), "{status}");
        }
    }
}
