//! The close codes of the client protocol, each with the reconnect rule that a client follows.

/// What a client does after a close.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reconnect {
    /// Stop: the same connection would be refused again.
    Stop,
    /// Reconnect with the usual back-off.
    BackOff,
    /// Get a new token, then reconnect; stop if that is refused too.
    NewToken,
}

macro_rules! close_codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $reason:literal, $rule:ident;)*) => {
        /// Why a connection ends. Codes below 4000 are RFC 6455's own.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum CloseCode {
            $($(#[$doc])* $name = $code,)*
        }

        impl CloseCode {
            /// Every code.
            pub const ALL: &[CloseCode] = &[$(CloseCode::$name,)*];

            /// The default reason that travels with the code.
            #[must_use]
            pub const fn reason(self) -> &'static str {
                match self { $(CloseCode::$name => $reason,)* }
            }

            /// What a client does next.
            #[must_use]
            pub const fn reconnect(self) -> Reconnect {
                match self { $(CloseCode::$name => Reconnect::$rule,)* }
            }

            /// The code with this number, when it is one of ours.
            #[must_use]
            pub const fn from_code(code: u16) -> Option<CloseCode> {
                match code { $($code => Some(CloseCode::$name),)* _ => None }
            }
        }
    };
}

close_codes! {
    /// The client is done.
    Done = 1000, "done", Stop;
    /// The edge drains; `goaway` said when to come back.
    GoingAway = 1001, "going away", BackOff;
    /// A frame broke RFC 6455.
    ProtocolError = 1002, "websocket protocol error", Stop;
    /// A message of a kind that the subprotocol does not use.
    Unsupported = 1003, "unsupported message kind", Stop;
    /// A text message was not UTF-8.
    InvalidUtf8 = 1007, "text is not UTF-8", Stop;
    /// A message was larger than the limit.
    TooLarge = 1009, "message too large", Stop;
    /// The edge restarts; `goaway` said when to come back.
    Restart = 1012, "restart", BackOff;
    /// The edge has no room, or tokens cannot be checked now.
    TryAgainLater = 1013, "try again later", BackOff;
    /// A frame was not an envelope of the protocol.
    BadFrame = 4400, "bad frame", Stop;
    /// The token was checked and refused.
    Unauthorized = 4401, "token refused", NewToken;
    /// The connection is not allowed.
    Forbidden = 4403, "forbidden", Stop;
    /// No `hello` in time, or no answer to a heartbeat.
    TooSlow = 4408, "too slow", BackOff;
    /// Another connection took this one's place.
    Replaced = 4409, "replaced", Stop;
    /// The token expired.
    TokenExpired = 4410, "token expired", NewToken;
    /// The client reads slower than messages arrive.
    SlowConsumer = 4413, "slow consumer", BackOff;
    /// Too many commands in a while. Not sent yet.
    RateLimited = 4429, "rate limited", BackOff;
    /// A fault of the server.
    Internal = 4500, "internal error", BackOff;
    /// The edge shuts down.
    ShuttingDown = 4503, "shutting down", BackOff;
}

impl CloseCode {
    /// The number on the wire.
    #[must_use]
    pub const fn code(self) -> u16 {
        self as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_found_by_its_number_and_fits_a_close_frame() {
        for &code in CloseCode::ALL {
            assert_eq!(CloseCode::from_code(code.code()), Some(code));
            assert!(code.reason().len() <= 123, "a control frame holds 125 bytes");
        }
        assert_eq!(CloseCode::from_code(4999), None);
    }
}
