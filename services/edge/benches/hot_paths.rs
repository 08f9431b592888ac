//! How long a shard's hot paths take without sockets: a publication through the hub to each subscriber, and an inbox
//! message through a connection's cursor.

use std::{
    hint::black_box,
    io,
    task::{Context, Poll},
};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use sanjay_edge::{
    inbox::Cursor,
    shard::hub::{Hub, Step, Top},
};
use sanjay_proto::{
    client::v1::{InboxMessage, Payload, Publication, payload::Kind},
    edge::v1::InboxPage,
};
use sanjay_protocol::json;
use sanjay_websocket::{Opcode, Outbox, Transport, encode};

const CHANNEL: &str = "rooms:42";
const EPOCH: &str = "router-1-17f";

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

fn payload() -> Option<Payload> {
    Some(Payload { kind: Some(Kind::Text("x".repeat(128))) })
}

fn fan_out(c: &mut Criterion) {
    let mut group = c.benchmark_group("hub/fan out");
    for subscribers in [10_u32, 1_000] {
        let mut hub = Hub::default();
        for conn in 0..subscribers {
            hub.join(conn, None, CHANNEL);
        }
        hub.on_subscribed(CHANNEL, Top { epoch: EPOCH.into(), offset: 0 });
        let mut outboxes: Vec<Outbox> = (0..subscribers).map(|_| Outbox::new()).collect();
        let mut publication = Publication {
            channel: CHANNEL.to_owned(),
            epoch: EPOCH.to_owned(),
            message_id: Bytes::from_static(&[7; 16]),
            payload: payload(),
            ..Publication::default()
        };
        group.throughput(Throughput::Elements(subscribers.into()));
        group.bench_function(format!("{subscribers} subscribers"), |b| {
            b.iter(|| {
                publication.offset += 1;
                let step = hub.on_publication(CHANNEL, EPOCH, publication.offset);
                let Step::Deliver { channel, .. } = step else { return };
                let frame = encode(Opcode::Text, &json::encode_publication(&publication));
                for member in hub.members(channel) {
                    let _ = black_box(outboxes[*member as usize].send_one(&Ready, &frame));
                }
            });
        });
    }
    group.finish();
}

/// The live path: 64 hints in order, each pushed, acked eight at a time.
fn push(c: &mut Criterion) {
    const MESSAGES: u64 = 64;
    let message = |seq| InboxMessage { seq, payload: payload(), delivery: 1, ..InboxMessage::default() };
    let prepare = || {
        let mut cursor = Cursor::new(MESSAGES as u32);
        let mut steps = Vec::with_capacity(8);
        cursor.resync(&mut steps);
        cursor.on_page(InboxPage { epoch: 5, ..InboxPage::default() }, &mut steps);
        steps.clear();
        let hints: Vec<InboxMessage> = (1..=MESSAGES).map(message).collect();
        (cursor, steps, hints)
    };
    let mut group = c.benchmark_group("cursor");
    group.throughput(Throughput::Elements(MESSAGES));
    group.bench_function("hint, push and ack", |b| {
        b.iter_batched(
            prepare,
            |(mut cursor, mut steps, hints)| {
                for hint in hints {
                    let seq = hint.seq;
                    cursor.on_hint(5, hint, &mut steps);
                    if seq % 8 == 0 {
                        black_box(cursor.on_ack(&[(seq - 7, seq)], &mut steps));
                    }
                    black_box(&steps);
                    steps.clear();
                }
                cursor
            },
            BatchSize::SmallInput,
        );
    });
    group.finish();
}

criterion_group!(benches, fan_out, push);
criterion_main!(benches);
