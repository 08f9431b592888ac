//! The server side of the WebSocket protocol (RFC 6455) for hundreds of thousands of mostly idle
//! connections: a handshake on hyper, a decoder that holds nothing between messages, and an outbox that
//! exists only while a socket would block.
//!
//! None of it owns a socket or a task. The caller waits for readiness through [`Transport`], reads into a
//! buffer that all connections of a thread share, and gives the bytes to [`Decoder::feed`]:
//!
//! ```
//! use sanjay_websocket::{Decoder, DecoderConfig, Incoming};
//! use std::ops::ControlFlow;
//!
//! let config = DecoderConfig { max_message_bytes: 64 * 1024 };
//! let mut decoder = Decoder::new();
//! // A masked text frame as a client sends it: "hi" under an all-zero mask.
//! let mut read = [0x81, 0x82, 0, 0, 0, 0, b'h', b'i'];
//! let mut seen = Vec::new();
//! decoder.feed(&config, &mut read, &mut |incoming| {
//!     if let Incoming::Text(text) = incoming {
//!         seen.push(text.to_owned());
//!     }
//!     ControlFlow::Continue(())
//! })?;
//! assert_eq!(seen, ["hi"]);
//! assert!(decoder.is_idle());
//! # Ok::<(), sanjay_websocket::ProtocolError>(())
//! ```

mod accept;
mod decoder;
mod error;
mod frame;
mod mask;
mod message;
mod outbox;
mod transport;
mod utf8;

pub use accept::{Accepted, UpgradeRefused, offered_subprotocols, serve_upgrade, upgrade_response};
pub use decoder::{Decoder, DecoderConfig, Incoming};
pub use error::ProtocolError;
pub use frame::{
    ClosePayload, MAX_CLOSE_REASON_BYTES, MAX_CONTROL_PAYLOAD_BYTES, Opcode, close_payload, encode,
    encode_close, encode_into, is_valid_close_code,
};
pub use outbox::{Flushed, Outbox, Sent};
pub use transport::Transport;
