//! The client protocol: envelopes and their JSON codec, payloads, close codes, error codes, limits and
//! token claims. The edge and every client share these definitions; the text of the protocol is
//! `docs/protocol.md`.

pub mod close;
pub mod command;
pub mod error;
pub mod event;
pub mod json;
pub mod limits;
pub mod names;
pub mod payload;
pub mod recovery;
pub mod token;

pub use close::CloseCode;
pub use command::{Command, Envelope};
pub use error::{ErrorBody, ErrorCode};
pub use event::{Event, EventEnvelope};
pub use payload::Payload;
pub use recovery::Position;

/// Subprotocol with one JSON envelope for each line of a text message; the default when a client offers none.
pub const SUBPROTOCOL_JSON: &str = "sanjay.v1.json";

/// The path of the WebSocket endpoint.
pub const PATH: &str = "/v1/ws";
