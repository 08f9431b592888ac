//! The JSON of the client protocol, and WebSocket frames.

use std::{hint::black_box, ops::ControlFlow};

use sanjay_protocol::json;
use sanjay_websocket::{Decoder, DecoderConfig, Opcode, encode};

use crate::{
    Case, counted_region,
    messages::{inbox_message, publication, text},
};

pub(crate) const CASES: &[Case] = &[
    Case { name: "json-decode-ack", operations: ROUNDS, work: decode_ack },
    Case { name: "json-decode-publish", operations: ROUNDS, work: decode_publish },
    Case { name: "json-encode-inbox", operations: ROUNDS, work: encode_inbox },
    Case { name: "json-encode-publication", operations: ROUNDS, work: encode_publication },
    Case { name: "frame-decode-128", operations: ROUNDS, work: decode_small_frames },
    Case { name: "frame-decode-16k", operations: LARGE_FRAMES, work: decode_large_frames },
    Case { name: "frame-encode-300", operations: ROUNDS, work: encode_frames },
];

const ROUNDS: u64 = 2_000;
const LARGE_FRAMES: u64 = 50;

/// As much as an edge reads at once.
const READ_BYTES: usize = 16 * 1024;

const ACK: &str = r#"{"id":7,"ack":{"ranges":[[1,64],[66,70],[99,99]]}}"#;
const PUBLISH: &str = r#"{"id":8,"publish":{"channel":"rooms:42","payload":{"json":{"kind":"moved","from":[1,2],"to":[3,4],"by":"Zoë","note":"a line that is a little longer than the others"}},"dedupe":"move-17"}}"#;

fn decode_ack() {
    decode(ACK);
}

fn decode_publish() {
    decode(PUBLISH);
}

fn decode(line: &str) {
    counted_region(&mut || {
        for _ in 0..ROUNDS {
            for command in json::decode_commands(black_box(line)) {
                black_box(command).expect("the command is good");
            }
        }
    });
}

fn encode_publication() {
    let publication = publication(1_234_567);
    counted_region(&mut || {
        for _ in 0..ROUNDS {
            black_box(json::encode_publication(black_box(&publication)));
        }
    });
}

fn encode_inbox() {
    let message = inbox_message(1_234_567);
    let mut out = Vec::with_capacity(1_024);
    counted_region(&mut || {
        for _ in 0..ROUNDS {
            out.clear();
            json::encode_inbox(black_box(&message), &mut out);
            black_box(&out);
        }
    });
}

fn decode_small_frames() {
    decode_frames(128, ROUNDS);
}

fn decode_large_frames() {
    decode_frames(16 * 1024, LARGE_FRAMES);
}

/// Frames as they come from a socket: masked, one behind the other, cut where a read ends.
fn decode_frames(bytes: usize, count: u64) {
    let mut stream: Vec<u8> = (0..count).flat_map(|_| masked(&text(bytes))).collect();
    let config = DecoderConfig { max_message_bytes: 128 * 1024 };
    let mut seen = 0;
    counted_region(&mut || {
        let mut decoder = Decoder::new();
        for read in stream.chunks_mut(READ_BYTES) {
            let fed = decoder.feed(&config, read, &mut |incoming| {
                black_box(incoming);
                seen += 1;
                ControlFlow::Continue(())
            });
            fed.expect("the frames are good");
        }
    });
    assert_eq!(seen, count, "every frame is a message");
}

/// A text frame as a client sends it.
fn masked(text: &str) -> Vec<u8> {
    const KEY: [u8; 4] = [0x12, 0x34, 0x56, 0x78];
    let length = u16::try_from(text.len()).expect("the texts are short");
    let mut frame = vec![0x81];
    if length < 126 {
        frame.push(0x80 | length as u8);
    } else {
        frame.push(0x80 | 126);
        frame.extend(length.to_be_bytes());
    }
    frame.extend(KEY);
    frame.extend(text.bytes().zip(KEY.into_iter().cycle()).map(|(byte, key)| byte ^ key));
    frame
}

fn encode_frames() {
    let body = text(300);
    counted_region(&mut || {
        for _ in 0..ROUNDS {
            black_box(encode(Opcode::Text, black_box(body.as_bytes())));
        }
    });
}
