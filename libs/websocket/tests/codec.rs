//! The decoder, driven with bytes as a client would send them.

use proptest::prelude::*;
use sanjay_websocket::{Decoder, DecoderConfig, Incoming, ProtocolError};
use std::ops::ControlFlow;
use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Control, Data, OpCode};

const LIMIT: usize = 4096;
const CONFIG: DecoderConfig = DecoderConfig { max_message_bytes: LIMIT };
const TEXT: OpCode = OpCode::Data(Data::Text);
const BINARY: OpCode = OpCode::Data(Data::Binary);
const CONTINUE: OpCode = OpCode::Data(Data::Continue);
const PING: OpCode = OpCode::Control(Control::Ping);
const PONG: OpCode = OpCode::Control(Control::Pong);
const CLOSE: OpCode = OpCode::Control(Control::Close);

#[derive(Clone, Debug, Eq, PartialEq)]
enum Event {
    Text(String),
    Binary(Vec<u8>),
    Ping(Vec<u8>),
    Pong(Vec<u8>),
    Close(Option<(u16, String)>),
}

impl From<Incoming<'_>> for Event {
    fn from(incoming: Incoming<'_>) -> Self {
        match incoming {
            Incoming::Text(text) => Self::Text(text.to_owned()),
            Incoming::Binary(bytes) => Self::Binary(bytes.to_vec()),
            Incoming::Ping(bytes) => Self::Ping(bytes.to_vec()),
            Incoming::Pong(bytes) => Self::Pong(bytes.to_vec()),
            Incoming::Close(close) => Self::Close(close.map(|(code, reason)| (code, reason.to_owned()))),
        }
    }
}

/// A masked client frame.
fn frame(opcode: OpCode, is_final: bool, mask: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let header = FrameHeader { is_final, opcode, mask: Some(mask), ..FrameHeader::default() };
    let mut out = Vec::new();
    header.format(payload.len() as u64, &mut out).expect("writing to a Vec does not fail");
    out.extend(payload.iter().enumerate().map(|(i, byte)| byte ^ mask[i % 4]));
    out
}

fn simple(opcode: OpCode, payload: &[u8]) -> Vec<u8> {
    frame(opcode, true, [0x11, 0x22, 0x33, 0x44], payload)
}

fn fragment(opcode: OpCode, payload: &[u8]) -> Vec<u8> {
    frame(opcode, false, [0xA5, 0, 0xFF, 1], payload)
}

/// Feeds the pieces and returns what came out, and the error that ended it.
fn decode(
    decoder: &mut Decoder,
    pieces: impl IntoIterator<Item = Vec<u8>>,
) -> (Vec<Event>, Result<(), ProtocolError>) {
    let mut events = Vec::new();
    for mut piece in pieces {
        let result = decoder.feed(&CONFIG, &mut piece, &mut |incoming| {
            events.push(incoming.into());
            ControlFlow::Continue(())
        });
        if result.is_err() {
            return (events, result);
        }
    }
    (events, Ok(()))
}

/// What the decoder makes of the bytes at once; checks that one byte at a time gives the same.
fn outcome(bytes: &[u8]) -> (Vec<Event>, Result<(), ProtocolError>) {
    let whole = decode(&mut Decoder::new(), [bytes.to_vec()]);
    let single = decode(&mut Decoder::new(), bytes.iter().map(|byte| vec![*byte]));
    assert_eq!(whole, single);
    whole
}

fn error(bytes: &[u8]) -> ProtocolError {
    outcome(bytes).1.expect_err("the bytes break a rule")
}

#[test]
fn idle_state_is_one_pointer() {
    assert_eq!(size_of::<Decoder>(), size_of::<usize>());
}

#[test]
fn whole_messages_are_borrowed_and_leave_nothing_behind() {
    let mut decoder = Decoder::new();
    let bytes = [simple(TEXT, "grüß".as_bytes()), simple(BINARY, &[0; 300]), simple(PING, b"")].concat();
    let (events, result) = decode(&mut decoder, [bytes]);
    assert_eq!(result, Ok(()));
    assert_eq!(events, [Event::Text("grüß".into()), Event::Binary(vec![0; 300]), Event::Ping(vec![])]);
    assert!(decoder.is_idle());
}

#[test]
fn control_frames_pass_between_fragments() {
    let bytes = [
        fragment(TEXT, &"€".as_bytes()[..1]),
        simple(PING, b"now"),
        fragment(CONTINUE, b""),
        simple(CONTINUE, &"€".as_bytes()[1..]),
    ];
    let (events, result) = outcome(&bytes.concat());
    assert_eq!(result, Ok(()));
    assert_eq!(events, [Event::Ping(b"now".to_vec()), Event::Text("€".into())]);
}

#[test]
fn idle_again_after_every_way_to_be_partial() {
    for bytes in [simple(PING, b"abc"), simple(TEXT, b""), simple(BINARY, b"abc"), simple(CLOSE, b"")] {
        for cut in 1..bytes.len() {
            let mut decoder = Decoder::new();
            decode(&mut decoder, [bytes[..cut].to_vec()]).1.unwrap();
            assert!(!decoder.is_idle());
            let (events, result) = decode(&mut decoder, [bytes[cut..].to_vec()]);
            assert_eq!((events.len(), result), (1, Ok(())));
            assert!(decoder.is_idle(), "cut at {cut}");
            assert_eq!(decoder.buffered(), 0);
        }
    }
}

#[test]
fn memory_follows_what_arrived() {
    let bytes = simple(BINARY, &[9; 4000]);
    let mut decoder = Decoder::new();
    decode(&mut decoder, [bytes[..108].to_vec()]).1.unwrap();
    assert_eq!(decoder.buffered(), 100);
}

#[test]
fn break_ends_the_call() {
    let mut bytes = [simple(CLOSE, b""), simple(TEXT, b"late")].concat();
    let mut calls = 0;
    let result = Decoder::new().feed(&CONFIG, &mut bytes, &mut |_| {
        calls += 1;
        ControlFlow::Break(())
    });
    assert_eq!((calls, result), (1, Ok(())));
}

#[test]
fn headers_that_break_a_rule() {
    let mut reserved = simple(TEXT, b"x");
    reserved[0] |= 0x40;
    assert_eq!(error(&reserved), ProtocolError::ReservedBits);
    assert_eq!(error(&[0x83, 0x80, 0, 0, 0, 0]), ProtocolError::ReservedOpcode(3));
    assert_eq!(error(&[0x8B, 0x80, 0, 0, 0, 0]), ProtocolError::ReservedOpcode(11));
    assert_eq!(error(b"\x81\x02hi"), ProtocolError::Unmasked);
    assert_eq!(error(&[0x82, 0xFE, 0, 5, 0, 0, 0, 0]), ProtocolError::LongLengthEncoding);
    assert_eq!(error(&fragment(PING, b"")), ProtocolError::FragmentedControl);
    assert_eq!(error(&simple(PONG, &[0; 126])), ProtocolError::LongControl(126));
    assert_eq!(error(&simple(CONTINUE, b"x")), ProtocolError::UnexpectedContinuation);
    let interrupted = [fragment(TEXT, b"a"), simple(TEXT, b"b")].concat();
    assert_eq!(error(&interrupted), ProtocolError::InterruptedMessage);
    assert_eq!(error(&interrupted).close_code(), 1002);
}

#[test]
fn sizes_are_judged_from_the_header() {
    let over = simple(BINARY, &[0; LIMIT + 1]);
    let result = decode(&mut Decoder::new(), [over[..8].to_vec()]).1;
    assert_eq!(result, Err(ProtocolError::TooLarge { limit: LIMIT }));
    assert_eq!(ProtocolError::TooLarge { limit: LIMIT }.close_code(), 1009);
    assert_eq!(
        error(&[0x82, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0]),
        ProtocolError::TooLarge { limit: LIMIT }
    );
    let total = [fragment(BINARY, &[0; LIMIT]), simple(CONTINUE, &[0])].concat();
    assert_eq!(error(&total), ProtocolError::TooLarge { limit: LIMIT });
    let exact = [fragment(BINARY, &[0; LIMIT - 1]), simple(CONTINUE, &[0])].concat();
    assert_eq!(outcome(&exact), (vec![Event::Binary(vec![0; LIMIT])], Ok(())));
}

#[test]
fn close_payloads() {
    let close = |payload: &[u8]| outcome(&simple(CLOSE, payload));
    assert_eq!(close(b"").0, [Event::Close(None)]);
    assert_eq!(close(b"\x03\xe8bye").0, [Event::Close(Some((1000, "bye".into())))]);
    assert_eq!(close(b"\x03").1, Err(ProtocolError::TruncatedCloseCode));
    for code in [0u16, 999, 1004, 1005, 1006, 1015, 1016, 2999, 5000] {
        assert_eq!(close(&code.to_be_bytes()).1, Err(ProtocolError::InvalidCloseCode(code)));
    }
    assert_eq!(close(b"\x03\xe8\xff").1, Err(ProtocolError::InvalidUtf8));
    assert_eq!(ProtocolError::InvalidUtf8.close_code(), 1007);
}

#[test]
fn invalid_text_is_refused_before_the_frame_ends() {
    // F4 90 is above U+10FFFF whatever follows; most of the frame has not arrived.
    let bytes = simple(TEXT, &[b"abc\xF4\x90".as_slice(), &[b'x'; 1000]].concat());
    let header = 2 + 2 + 4;
    let mut decoder = Decoder::new();
    assert_eq!(decode(&mut decoder, [bytes[..header + 4].to_vec()]).1, Ok(()));
    assert_eq!(decode(&mut decoder, [bytes[header + 4..][..1].to_vec()]).1, Err(ProtocolError::InvalidUtf8));
    let across = [fragment(TEXT, b"\xF4"), fragment(CONTINUE, b"\x90")].concat();
    assert_eq!(error(&across), ProtocolError::InvalidUtf8);
    let unfinished = [fragment(TEXT, b"\xF4"), simple(CONTINUE, b"")].concat();
    assert_eq!(error(&unfinished), ProtocolError::InvalidUtf8);
    assert_eq!(error(&simple(TEXT, b"\xC3")), ProtocolError::InvalidUtf8);
}

/// A message in fragments with pings between them, or a lone control frame, and the events that it must produce.
fn sequence() -> impl Strategy<Value = (Vec<u8>, Vec<Event>)> {
    let fragments = prop::collection::vec((any::<[u8; 4]>(), 0usize..200), 1..5);
    (any::<bool>(), prop::collection::vec(any::<char>(), 0..120), fragments, any::<bool>()).prop_map(
        |(is_text, characters, fragments, pings)| {
            let text: String = characters.into_iter().collect();
            let (mut bytes, mut events) = (Vec::new(), Vec::new());
            let mut rest = text.as_bytes();
            let last = fragments.len() - 1;
            for (i, (mask, size)) in fragments.into_iter().enumerate() {
                let (part, after) = rest.split_at(if i == last { rest.len() } else { size.min(rest.len()) });
                rest = after;
                let opcode = if i > 0 {
                    CONTINUE
                } else if is_text {
                    TEXT
                } else {
                    BINARY
                };
                bytes.extend(frame(opcode, i == last, mask, part));
                if pings && i != last {
                    bytes.extend(frame(PING, true, mask, &mask));
                    events.push(Event::Ping(mask.to_vec()));
                }
            }
            events.push(if is_text { Event::Text(text) } else { Event::Binary(text.into_bytes()) });
            bytes.extend(simple(PONG, b""));
            events.push(Event::Pong(Vec::new()));
            (bytes, events)
        },
    )
}

fn split(bytes: &[u8], cuts: Vec<usize>) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    for cut in cuts {
        let (piece, after) = rest.split_at(cut.min(rest.len()));
        pieces.push(piece.to_vec());
        rest = after;
    }
    pieces.push(rest.to_vec());
    pieces
}

proptest! {
    #[test]
    fn splitting_changes_nothing(
        messages in prop::collection::vec(sequence(), 0..6),
        cuts in prop::collection::vec(0usize..60, 0..60),
    ) {
        let bytes: Vec<u8> = messages.iter().flat_map(|(bytes, _)| bytes.clone()).collect();
        let expected: Vec<Event> = messages.into_iter().flat_map(|(_, events)| events).collect();
        let mut decoder = Decoder::new();
        let (events, result) = decode(&mut decoder, split(&bytes, cuts));
        prop_assert_eq!(result, Ok(()));
        prop_assert_eq!(&events, &expected);
        prop_assert!(decoder.is_idle());
        prop_assert_eq!(outcome(&bytes).0, expected);
    }

    #[test]
    fn garbage_is_an_error_at_worst(
        prefix in sequence(),
        keep in 0usize..400,
        garbage in prop::collection::vec(any::<u8>(), 0..300),
        cuts in prop::collection::vec(0usize..40, 0..12),
    ) {
        let mut bytes = prefix.0;
        bytes.truncate(keep);
        bytes.extend(garbage);
        let split = decode(&mut Decoder::new(), split(&bytes, cuts));
        prop_assert_eq!(split, outcome(&bytes));
    }
}
