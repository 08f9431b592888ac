//! Encodes server frames, and the rules of control frames that both directions share.

use bytes::Bytes;
use smallvec::SmallVec;
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Control, Data, OpCode};

/// The most payload bytes of a ping, pong or close frame (RFC 6455, section 5.5).
pub const MAX_CONTROL_PAYLOAD_BYTES: usize = 125;

/// The most bytes of a close frame's reason: the payload without the two bytes of the code.
pub const MAX_CLOSE_REASON_BYTES: usize = MAX_CONTROL_PAYLOAD_BYTES - 2;

/// The payload of a close frame, kept on the stack.
pub type ClosePayload = SmallVec<[u8; 128]>;

/// What an unfragmented frame is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Opcode {
    /// A message of UTF-8 text. Encoding does not check that it is.
    Text,
    /// A message of bytes.
    Binary,
    /// Asks the peer for a pong with the same payload.
    Ping,
    /// Answers a ping, or is a heartbeat of its own.
    Pong,
    /// Begins or answers the closing handshake.
    Close,
}

impl Opcode {
    const fn wire(self) -> OpCode {
        match self {
            Self::Text => OpCode::Data(Data::Text),
            Self::Binary => OpCode::Data(Data::Binary),
            Self::Ping => OpCode::Control(Control::Ping),
            Self::Pong => OpCode::Control(Control::Pong),
            Self::Close => OpCode::Control(Control::Close),
        }
    }
}

/// One complete unmasked frame, header and payload in one allocation, ready to be shared between connections.
///
/// A control frame's payload must not exceed [`MAX_CONTROL_PAYLOAD_BYTES`].
pub fn encode(opcode: Opcode, payload: &[u8]) -> Bytes {
    let header = header(opcode);
    // An exact capacity lets `Bytes` take the vector over as it is.
    let mut out = Vec::with_capacity(header.len(payload.len() as u64) + payload.len());
    append(&header, payload, &mut out);
    Bytes::from(out)
}

/// Appends the frame that [`encode`] makes.
pub fn encode_into(opcode: Opcode, payload: &[u8], out: &mut Vec<u8>) {
    append(&header(opcode), payload, out);
}

/// The payload of a close frame: the code, then the reason cut on a character boundary to
/// [`MAX_CLOSE_REASON_BYTES`].
pub fn close_payload(code: u16, reason: &str) -> ClosePayload {
    let mut payload = ClosePayload::from_slice(&code.to_be_bytes());
    payload.extend_from_slice(&reason.as_bytes()[..reason.floor_char_boundary(MAX_CLOSE_REASON_BYTES)]);
    payload
}

/// A close frame; see [`close_payload`].
pub fn encode_close(code: u16, reason: &str) -> Bytes {
    encode(Opcode::Close, &close_payload(code, reason))
}

/// Whether a close frame may carry the code: those that RFC 6455 and its registry define for the wire, and
/// 3000–4999 for libraries and applications.
pub const fn is_valid_close_code(code: u16) -> bool {
    matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999)
}

fn header(opcode: Opcode) -> FrameHeader {
    FrameHeader { is_final: true, opcode: opcode.wire(), mask: None, ..FrameHeader::default() }
}

fn append(header: &FrameHeader, payload: &[u8], out: &mut Vec<u8>) {
    debug_assert!(
        matches!(header.opcode, OpCode::Data(_)) || payload.len() <= MAX_CONTROL_PAYLOAD_BYTES,
        "a control frame carries at most {MAX_CONTROL_PAYLOAD_BYTES} bytes, not {}",
        payload.len()
    );
    header.format(payload.len() as u64, out).expect("writing to a Vec does not fail");
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_use_the_shortest_form() {
        assert_eq!(&encode(Opcode::Text, b"hi")[..], b"\x81\x02hi");
        assert_eq!(&encode(Opcode::Binary, &[7; 126])[..4], [0x82, 126, 0, 126]);
        assert_eq!(&encode(Opcode::Binary, &[7; 65536])[..10], [0x82, 127, 0, 0, 0, 0, 0, 1, 0, 0]);
        let mut both = encode(Opcode::Ping, b"").to_vec();
        encode_into(Opcode::Pong, b"x", &mut both);
        assert_eq!(both, b"\x89\x00\x8a\x01x");
    }

    #[test]
    fn close_reasons_are_cut_between_characters() {
        assert_eq!(&encode_close(1000, "")[..], [0x88, 2, 0x03, 0xe8]);
        let payload = close_payload(4001, &"é".repeat(100));
        assert_eq!(payload.len(), 2 + 122);
        assert!(!payload.spilled());
        assert_eq!(std::str::from_utf8(&payload[2..]), Ok("é".repeat(61).as_str()));
    }
}
