//! What a failed call says about itself: whether it was sent, and whether another peer may do better.

use std::error::Error as _;

use tonic::{Code, ConnectError, Status};

/// What is known after a failed call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// There was no connection: the request never left.
    NotSent,
    /// The connection broke under it: the outcome is unknown, and so is the peer's health.
    Broken,
    /// The peer, or a time-out, says that it could not be done now: the outcome is unknown.
    Away,
    /// The peer said no: another one would say the same.
    Refused,
}

pub(super) fn known(status: &Status) -> Known {
    let mut source = status.source();
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return Known::NotSent;
        }
        source = error.source();
    }
    match status.code() {
        // A status that came over the wire has no cause on this side.
        _ if status.source().is_some() => Known::Broken,
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => Known::Away,
        _ => Known::Refused,
    }
}

/// The innermost cause says what happened; the outer ones only where.
pub(super) fn deepest(mut error: &(dyn std::error::Error + 'static)) -> String {
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// A status as text, without the wrapping that the library puts around it.
#[must_use]
pub fn plain(status: &Status) -> String {
    match status.source() {
        Some(source) => deepest(source),
        None if status.message().is_empty() => status.code().description().to_owned(),
        None => status.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn only_a_failed_connect_is_certainly_not_sent() {
        let refused = io::Error::from(io::ErrorKind::ConnectionRefused);
        let not_sent = Status::from_error(Box::new(ConnectError(Box::new(refused))));
        assert_eq!((known(&not_sent), plain(&not_sent).as_str()), (Known::NotSent, "connection refused"));
        let broken = Status::from_error(Box::new(io::Error::from(io::ErrorKind::ConnectionReset)));
        assert_eq!((known(&broken), plain(&broken).as_str()), (Known::Broken, "connection reset"));
        for (status, expected) in [
            (Status::unavailable("away"), Known::Away),
            (Status::deadline_exceeded("late"), Known::Away),
            (Status::invalid_argument("no"), Known::Refused),
            (Status::unauthenticated("no"), Known::Refused),
            (Status::internal("a fault"), Known::Refused),
        ] {
            assert_eq!(known(&status), expected, "{status}");
        }
    }
}
