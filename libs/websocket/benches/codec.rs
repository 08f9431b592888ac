//! How long frames take: decoding with unmasking and the check of UTF-8, encoding, and a write to a ready socket.

use std::{
    hint::black_box,
    io,
    ops::ControlFlow,
    task::{Context, Poll},
};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use sanjay_websocket::{Decoder, DecoderConfig, Opcode, Outbox, Transport, encode};

/// A masked text frame as a client sends it, of `len` bytes of which some belong to longer characters.
fn masked(len: u16) -> Vec<u8> {
    const KEY: [u8; 4] = [0x12, 0x34, 0x56, 0x78];
    let text: String = "Zoë's line of text. ".chars().cycle().take(usize::from(len)).collect();
    let mut frame = vec![0x81, 0x80 | 126];
    frame.extend((text.len() as u16).to_be_bytes());
    frame.extend(KEY);
    frame.extend(text.bytes().zip(KEY.into_iter().cycle()).map(|(byte, key)| byte ^ key));
    frame
}

fn decode(c: &mut Criterion) {
    let config = DecoderConfig { max_message_bytes: 128 * 1024 };
    let mut group = c.benchmark_group("frame/decode");
    for len in [128, 16 * 1024] {
        let frame = masked(len);
        group.throughput(Throughput::Bytes(u64::from(len)));
        group.bench_function(format!("{len} bytes"), |b| {
            let feed = |mut bytes: Vec<u8>| {
                let mut on = |incoming: sanjay_websocket::Incoming<'_>| {
                    black_box(incoming);
                    ControlFlow::Continue(())
                };
                black_box(Decoder::new().feed(&config, &mut bytes, &mut on)).is_ok()
            };
            b.iter_batched(|| frame.clone(), feed, BatchSize::SmallInput);
        });
    }
    group.finish();
}

/// A socket that takes everything.
struct Ready;

impl Transport for Ready {
    fn poll_readable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_writable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn try_read(&self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn try_write_vectored(&self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        Ok(slices.iter().map(|slice| slice.len()).sum())
    }
}

fn write(c: &mut Criterion) {
    let body = [b'x'; 300];
    c.bench_function("frame/encode 300 bytes", |b| b.iter(|| encode(Opcode::Text, black_box(&body))));
    let frame = encode(Opcode::Text, &body);
    let mut outbox = Outbox::new();
    c.bench_function("outbox/send to a ready socket", |b| {
        b.iter(|| outbox.send_one(&Ready, black_box(&frame)));
    });
}

criterion_group!(benches, decode, write);
criterion_main!(benches);
