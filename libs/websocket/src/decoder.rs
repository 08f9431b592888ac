//! Turns the bytes that a client sends into messages, without holding anything while a connection is idle.

use crate::error::ProtocolError;
use crate::frame::{MAX_CONTROL_PAYLOAD_BYTES, is_valid_close_code};
use crate::mask::Mask;
use crate::message::Message;
use crate::utf8;
use std::io::Cursor;
use std::ops::ControlFlow;
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Control, Data, OpCode};

/// The longest frame header: two bytes, a 64-bit length and a mask.
const MAX_HEADER_BYTES: usize = 14;

/// What all decoders of a listener share.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DecoderConfig {
    /// The most bytes of a text or binary message, all its fragments together.
    pub max_message_bytes: usize,
}

/// A complete message or control frame, borrowed from the bytes that were read whenever it lay in one piece.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Incoming<'a> {
    /// A message of text.
    Text(&'a str),
    /// A message of bytes.
    Binary(&'a [u8]),
    /// A ping: answer with a pong that carries the same payload.
    Ping(&'a [u8]),
    /// A pong.
    Pong(&'a [u8]),
    /// The client closes, or answers our close: its code and reason, if it gave them.
    Close(Option<(u16, &'a str)>),
}

/// The receiving state of one connection: one pointer, which is null between messages.
#[derive(Debug, Default)]
pub struct Decoder {
    partial: Option<Box<Partial>>,
}

/// What is kept from one read to the next.
#[derive(Debug, Default)]
struct Partial {
    /// The beginning of a header; empty while `frame` is set.
    header: [u8; MAX_HEADER_BYTES],
    header_len: u8,
    /// The frame whose payload has not ended.
    frame: Option<Frame>,
    /// The payload so far of that frame when it is a control frame.
    control: Vec<u8>,
    /// The message that is arriving in several frames or several reads.
    message: Option<Message>,
}

/// A checked header, and how much of its payload is still to come.
#[derive(Clone, Copy, Debug)]
struct Frame {
    kind: Kind,
    is_final: bool,
    mask: Mask,
    /// Payload bytes that have not arrived.
    remaining: usize,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Text,
    Binary,
    Continuation,
    Ping,
    Pong,
    Close,
}

impl Decoder {
    /// A decoder at the start of a connection.
    pub const fn new() -> Self {
        Self { partial: None }
    }

    /// Whether nothing is held: the next byte begins a frame, and no fragmented message is open.
    pub const fn is_idle(&self) -> bool {
        self.partial.is_none()
    }

    /// Bytes held of unfinished frames and messages.
    pub fn buffered(&self) -> usize {
        self.partial.as_ref().map_or(0, |partial| {
            let message = partial.message.as_ref().map_or(0, Message::len);
            usize::from(partial.header_len) + partial.control.len() + message
        })
    }

    /// Takes bytes that were just read, in any portions, and calls `on` for each message or control frame that
    /// they complete, in order. The bytes are unmasked in place.
    ///
    /// When `on` breaks, the rest of `bytes` is discarded. After that, and after an error, the position in the
    /// stream is lost: the connection is closing and the decoder must not be fed again.
    pub fn feed(
        &mut self,
        config: &DecoderConfig,
        bytes: &mut [u8],
        on: &mut impl FnMut(Incoming<'_>) -> ControlFlow<()>,
    ) -> Result<(), ProtocolError> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let Some((mut frame, header_len)) = self.next_frame(config, rest)? else { return Ok(()) };
            let arrived = &mut rest[header_len..];
            let (payload, after) = arrived.split_at_mut(frame.remaining.min(arrived.len()));
            rest = after;
            frame.mask.apply(payload);
            frame.remaining -= payload.len();
            let flow = match frame.kind {
                Kind::Text | Kind::Binary | Kind::Continuation => self.data(config, frame, payload, on)?,
                Kind::Ping | Kind::Pong | Kind::Close => self.control(frame, payload, on)?,
            };
            if flow.is_break() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The frame that `bytes` continues or begins with, and how many of the bytes are its header. None when they
    /// end inside the header; they are kept then.
    fn next_frame(
        &mut self,
        config: &DecoderConfig,
        bytes: &[u8],
    ) -> Result<Option<(Frame, usize)>, ProtocolError> {
        let Some(partial) = &mut self.partial else {
            let Some((header, length, used)) = parse_header(bytes)? else {
                let partial = self.partial.insert(Box::default());
                partial.hold_header(bytes);
                return Ok(None);
            };
            return Ok(Some((check_header(config, &header, length, used, None)?, used)));
        };
        if let Some(frame) = partial.frame.take() {
            return Ok(Some((frame, 0)));
        }
        let held = usize::from(partial.header_len);
        let taken = bytes.len().min(MAX_HEADER_BYTES - held);
        let mut joined = partial.header;
        joined[held..held + taken].copy_from_slice(&bytes[..taken]);
        let Some((header, length, used)) = parse_header(&joined[..held + taken])? else {
            partial.hold_header(bytes);
            return Ok(None);
        };
        partial.header_len = 0;
        let frame = check_header(config, &header, length, used, partial.message.as_ref())?;
        self.release();
        Ok(Some((frame, used - held)))
    }

    /// Takes the next piece of a text or binary message.
    fn data(
        &mut self,
        config: &DecoderConfig,
        frame: Frame,
        payload: &[u8],
        on: &mut impl FnMut(Incoming<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ProtocolError> {
        let is_last = frame.is_final && frame.remaining == 0;
        if is_last && self.partial.as_ref().is_none_or(|partial| partial.message.is_none()) {
            return Ok(match frame.kind {
                Kind::Text => on(Incoming::Text(utf8::check(payload)?)),
                _ => on(Incoming::Binary(payload)),
            });
        }
        let partial = self.partial.get_or_insert_default();
        let message = partial.message.get_or_insert_with(|| match frame.kind {
            Kind::Text => Message::Text(utf8::TextBuffer::default()),
            _ => Message::Binary(Vec::new()),
        });
        let most = if frame.is_final {
            payload.len() + frame.remaining
        } else {
            config.max_message_bytes.saturating_sub(message.len())
        };
        message.push(payload, most)?;
        if !is_last {
            partial.frame = (frame.remaining > 0).then_some(frame);
            return Ok(ControlFlow::Continue(()));
        }
        let message = partial.message.take();
        self.release();
        Ok(match &message {
            Some(Message::Text(text)) => on(Incoming::Text(text.finish()?)),
            Some(Message::Binary(bytes)) => on(Incoming::Binary(bytes)),
            None => ControlFlow::Continue(()),
        })
    }

    /// Takes the next piece of a control frame.
    fn control(
        &mut self,
        frame: Frame,
        payload: &[u8],
        on: &mut impl FnMut(Incoming<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, ProtocolError> {
        if frame.remaining > 0 {
            let partial = self.partial.get_or_insert_default();
            partial.control.extend_from_slice(payload);
            partial.frame = Some(frame);
            return Ok(ControlFlow::Continue(()));
        }
        let mut joined = Vec::new();
        if let Some(partial) = &mut self.partial {
            joined = std::mem::take(&mut partial.control);
            self.release();
        }
        let payload = if joined.is_empty() {
            payload
        } else {
            joined.extend_from_slice(payload);
            &joined
        };
        Ok(match frame.kind {
            Kind::Ping => on(Incoming::Ping(payload)),
            Kind::Pong => on(Incoming::Pong(payload)),
            _ => on(Incoming::Close(parse_close(payload)?)),
        })
    }

    /// Frees the partial state once nothing is left in it.
    fn release(&mut self) {
        if self.partial.as_ref().is_some_and(|partial| partial.is_empty()) {
            self.partial = None;
        }
    }
}

impl Partial {
    fn is_empty(&self) -> bool {
        self.header_len == 0 && self.frame.is_none() && self.control.is_empty() && self.message.is_none()
    }

    /// Keeps bytes that end before their header does, so there is room for them.
    fn hold_header(&mut self, bytes: &[u8]) {
        let held = usize::from(self.header_len);
        self.header[held..held + bytes.len()].copy_from_slice(bytes);
        self.header_len += bytes.len() as u8;
    }
}

/// A header with the payload length that it announces and its own length, or None when `bytes` end inside it.
fn parse_header(bytes: &[u8]) -> Result<Option<(FrameHeader, u64, usize)>, ProtocolError> {
    let mut cursor = Cursor::new(bytes);
    match FrameHeader::parse(&mut cursor) {
        Ok(Some((header, length))) => Ok(Some((header, length, cursor.position() as usize))),
        Ok(None) => Ok(None),
        // Reading from memory does not fail, so an opcode is all that the parser can refuse.
        Err(_) => Err(ProtocolError::ReservedOpcode(bytes.first().map_or(0, |byte| byte & 0x0F))),
    }
}

/// Applies every rule that a header alone can break. `open` is the message that a continuation would continue.
fn check_header(
    config: &DecoderConfig,
    header: &FrameHeader,
    length: u64,
    header_len: usize,
    open: Option<&Message>,
) -> Result<Frame, ProtocolError> {
    if header.rsv1 || header.rsv2 || header.rsv3 {
        return Err(ProtocolError::ReservedBits);
    }
    let kind = match header.opcode {
        OpCode::Data(Data::Text) => Kind::Text,
        OpCode::Data(Data::Binary) => Kind::Binary,
        OpCode::Data(Data::Continue) => Kind::Continuation,
        OpCode::Control(Control::Ping) => Kind::Ping,
        OpCode::Control(Control::Pong) => Kind::Pong,
        OpCode::Control(Control::Close) => Kind::Close,
        OpCode::Data(Data::Reserved(code)) | OpCode::Control(Control::Reserved(code)) => {
            return Err(ProtocolError::ReservedOpcode(code));
        }
    };
    let Some(key) = header.mask else { return Err(ProtocolError::Unmasked) };
    if header.len(length) != header_len {
        return Err(ProtocolError::LongLengthEncoding);
    }
    match (kind, open) {
        (Kind::Ping | Kind::Pong | Kind::Close, _) => {
            if !header.is_final {
                return Err(ProtocolError::FragmentedControl);
            }
            if length > MAX_CONTROL_PAYLOAD_BYTES as u64 {
                return Err(ProtocolError::LongControl(length));
            }
        }
        (Kind::Continuation, None) => return Err(ProtocolError::UnexpectedContinuation),
        (Kind::Text | Kind::Binary, Some(_)) => return Err(ProtocolError::InterruptedMessage),
        (Kind::Text | Kind::Binary | Kind::Continuation, open) => {
            let limit = config.max_message_bytes;
            let room = limit.saturating_sub(open.map_or(0, Message::len));
            if length > room as u64 {
                return Err(ProtocolError::TooLarge { limit });
            }
        }
    }
    // Both limits above are counts of memory, so the length fits.
    Ok(Frame { kind, is_final: header.is_final, mask: Mask::new(key), remaining: length as usize })
}

fn parse_close(payload: &[u8]) -> Result<Option<(u16, &str)>, ProtocolError> {
    match payload {
        [] => Ok(None),
        [_] => Err(ProtocolError::TruncatedCloseCode),
        [high, low, reason @ ..] => {
            let code = u16::from_be_bytes([*high, *low]);
            if !is_valid_close_code(code) {
                return Err(ProtocolError::InvalidCloseCode(code));
            }
            Ok(Some((code, utf8::check(reason)?)))
        }
    }
}
