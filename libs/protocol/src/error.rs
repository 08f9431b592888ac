//! The error codes of the client protocol and of the back ends' API, and the body that carries them.

use serde::{Deserialize, Serialize};

macro_rules! error_codes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $retryable:literal;)*) => {
        /// Why a command was refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $text)] $name,)*
            /// A code that this build does not know.
            #[serde(other, rename = "unknown")]
            Unknown,
        }

        impl ErrorCode {
            /// Every code that is sent.
            pub const ALL: &[ErrorCode] = &[$(ErrorCode::$name,)*];

            /// The code on the wire.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$name => $text,)* ErrorCode::Unknown => "unknown" }
            }

            /// The code with this text.
            #[must_use]
            pub fn from_text(text: &str) -> ErrorCode {
                match text { $($text => ErrorCode::$name,)* _ => ErrorCode::Unknown }
            }

            /// Whether the same command may succeed later.
            #[must_use]
            pub const fn is_retryable(self) -> bool {
                match self { $(ErrorCode::$name => $retryable,)* ErrorCode::Unknown => false }
            }
        }
    };
}

error_codes! {
    /// A field is missing, of the wrong type or out of bounds.
    BadRequest = "bad_request", false;
    /// The command does not exist.
    UnknownCommand = "unknown_command", false;
    /// The token has no capability for this.
    Forbidden = "forbidden", false;
    /// The token has ended: the command may succeed after a `refresh`, or with a new subscription token.
    TokenExpired = "token_expired", true;
    /// The channel is already subscribed on this connection.
    AlreadySubscribed = "already_subscribed", false;
    /// The channel is not subscribed on this connection.
    NotSubscribed = "not_subscribed", false;
    /// The payload is larger than the limit.
    PayloadTooLarge = "payload_too_large", false;
    /// The dedupe key was used for another payload.
    AlreadyExists = "already_exists", false;
    /// No such message.
    NotFound = "not_found", false;
    /// A limit of the connection or of the inbox is reached.
    LimitExceeded = "limit_exceeded", false;
    /// The user's inbox is full.
    QueueFull = "queue_full", true;
    /// Too much at once: a queue is full, and nothing was done.
    RateLimited = "rate_limited", true;
    /// A part that the command needs is away. Its outcome may be unknown: repeat with the same dedupe key.
    Unavailable = "unavailable", true;
    /// A fault of the server.
    Internal = "internal", true;
}

/// The body of an error reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// One of the table.
    pub code: ErrorCode,
    /// What was wrong and what would be right, for a person.
    pub message: String,
    /// Whether the same command may succeed later.
    #[serde(default)]
    pub retryable: bool,
    /// When to try again, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u32>,
}

impl ErrorBody {
    /// An error whose `retryable` follows from its code.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), retryable: code.is_retryable(), retry_after_ms: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_keep_their_text() {
        for &code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_text(code.as_str()), code);
            let json = serde_json::to_string(&code).unwrap();
            assert_eq!(json, format!("\"{}\"", code.as_str()));
        }
        let newer: ErrorCode = serde_json::from_str("\"made_later\"").unwrap();
        assert_eq!(newer, ErrorCode::Unknown);
    }
}
