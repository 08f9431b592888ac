//! What a client can do wrong inside an established WebSocket connection.

use crate::frame::MAX_CONTROL_PAYLOAD_BYTES;

/// A violation that ends the connection. The text is safe to send as the reason of the close frame.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum ProtocolError {
    /// A reserved bit was set although no extension that uses it was negotiated.
    #[error("a reserved bit is set but no extension was negotiated")]
    ReservedBits,
    /// An opcode that RFC 6455 keeps for the future (3–7, 11–15).
    #[error("opcode {0} is reserved")]
    ReservedOpcode(u8),
    /// A frame without a mask.
    #[error("a client frame must be masked")]
    Unmasked,
    /// A length written in more bytes than it needs.
    #[error("a frame length must use the shortest encoding")]
    LongLengthEncoding,
    /// A ping, pong or close frame without the FIN bit.
    #[error("a control frame must not be fragmented")]
    FragmentedControl,
    /// A ping, pong or close frame above 125 bytes.
    #[error("a control frame carries at most {MAX_CONTROL_PAYLOAD_BYTES} bytes, not {0}")]
    LongControl(u64),
    /// A continuation frame while no message is open.
    #[error("a continuation frame needs a message to continue")]
    UnexpectedContinuation,
    /// A new text or binary frame inside a fragmented message.
    #[error("the fragmented message must end before another begins")]
    InterruptedMessage,
    /// A close frame with one byte of payload: half a code.
    #[error("a close frame carries nothing or a two-byte code, not one byte")]
    TruncatedCloseCode,
    /// A close code that must not appear on the wire.
    #[error("{0} is not a close code that may be sent")]
    InvalidCloseCode(u16),
    /// Text, or the reason of a close frame, that is not UTF-8.
    #[error("text must be UTF-8")]
    InvalidUtf8,
    /// A message above the limit, judged from the frame header before any of its payload is kept.
    #[error("a message is at most {limit} bytes")]
    TooLarge {
        /// The limit in bytes.
        limit: usize,
    },
}

impl ProtocolError {
    /// The code of the close frame that tells the client: 1002, 1007 or 1009.
    pub const fn close_code(&self) -> u16 {
        match self {
            Self::InvalidUtf8 => 1007,
            Self::TooLarge { .. } => 1009,
            _ => 1002,
        }
    }
}
