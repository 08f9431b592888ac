//! The WebSocket frames of the load client and the raw writer: as much of RFC 6455 as they need.

/// A server's frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    /// 1 text, 8 close, 9 ping, 10 pong.
    pub opcode: u8,
    /// Not masked: servers do not.
    pub payload: &'a [u8],
    /// With the header.
    pub size: usize,
}

/// The first frame of `bytes`, once it is whole. Fragments are not told apart: the edge sends none.
pub(crate) fn parse(bytes: &[u8]) -> Option<Frame<'_>> {
    let (&[first, second], rest) = bytes.split_first_chunk()?;
    let (header, length) = match second & 0x7f {
        126 => (4, usize::from(u16::from_be_bytes(*rest.first_chunk()?))),
        127 => (10, usize::try_from(u64::from_be_bytes(*rest.first_chunk()?)).ok()?),
        short => (2, usize::from(short)),
    };
    let size = header + length;
    Some(Frame { opcode: first & 0x0f, payload: bytes.get(header..size)?, size })
}

/// Appends a client's frame. Its mask is zero, which RFC 6455 allows and costs the client nothing; the edge
/// unmasks all the same.
pub(crate) fn client_frame(opcode: u8, payload: &[u8], out: &mut Vec<u8>) {
    out.push(0x80 | opcode);
    push_length(payload.len(), 0x80, out);
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(payload);
}

/// A server's text frame of exactly `size` bytes, which counts as one message; at least 40.
pub(crate) fn message_of_size(size: usize) -> Vec<u8> {
    const START: &[u8] = br#"{"message":{"raw":""#;
    const END: &[u8] = br#""}}"#;
    let header = match size {
        ..=127 => 2,
        128..=65_539 => 4,
        _ => 10,
    };
    let mut frame = vec![0x81];
    push_length(size - header, 0, &mut frame);
    frame.extend_from_slice(START);
    frame.resize(size - END.len(), b'x');
    frame.extend_from_slice(END);
    frame
}

fn push_length(length: usize, mask_bit: u8, out: &mut Vec<u8>) {
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(short @ ..=125), _) => out.push(mask_bit | short),
        (_, Ok(medium)) => {
            out.push(mask_bit | 126);
            out.extend_from_slice(&medium.to_be_bytes());
        }
        _ => {
            out.push(mask_bit | 127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_the_size_that_was_asked_for() {
        for size in [40, 126, 127, 130, 300, 65_539, 65_550] {
            let frame = message_of_size(size);
            assert_eq!(frame.len(), size);
            let parsed = parse(&frame).unwrap();
            assert_eq!((parsed.opcode, parsed.size), (1, size));
            assert!(parsed.payload.starts_with(b"{\"message\":") && parsed.payload.ends_with(b"}}"));
            assert_eq!(parse(&frame[..size - 1]), None);
        }
    }

    #[test]
    fn a_client_frame_is_masked() {
        let mut out = Vec::new();
        client_frame(1, b"{}", &mut out);
        assert_eq!(out, [0x81, 0x82, 0, 0, 0, 0, b'{', b'}']);
    }
}
