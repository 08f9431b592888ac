//! How long the JSON codec takes for one envelope of each frequent kind.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{Criterion, criterion_group, criterion_main};
use sanjay_proto::client::v1::{InboxMessage, Payload, Publication, payload::Kind};
use sanjay_protocol::json;

const PUBLISH: &str = r#"{"id":8,"publish":{"channel":"rooms:42","payload":{"json":{"kind":"moved","from":[1,2],"to":[3,4]}}}}"#;
const ACK: &str = r#"{"ack":{"ranges":[[1,64],[66,70]]}}"#;

fn payload() -> Option<Payload> {
    Some(Payload { kind: Some(Kind::Text("a line of text ".repeat(8))) })
}

fn codec(c: &mut Criterion) {
    for (name, line) in [("publish", PUBLISH), ("ack", ACK)] {
        c.bench_function(&format!("json/decode {name}"), |b| {
            b.iter(|| json::decode_commands(black_box(line)).for_each(|command| drop(black_box(command))));
        });
    }
    let message_id = Bytes::from_static(&[7; 16]);
    let publication = Publication {
        channel: "rooms:42".to_owned(),
        offset: 1_234_567,
        epoch: "router-1-17f".to_owned(),
        message_id: message_id.clone(),
        payload: payload(),
        time_us: 1_790_000_000_000_000,
        ..Publication::default()
    };
    c.bench_function("json/encode publication", |b| {
        b.iter(|| json::encode_publication(black_box(&publication)))
    });
    let message =
        InboxMessage { seq: 1_234_567, message_id, payload: payload(), delivery: 1, ..Default::default() };
    let mut out = Vec::with_capacity(1_024);
    c.bench_function("json/encode inbox", |b| {
        b.iter(|| {
            out.clear();
            json::encode_inbox(black_box(&message), &mut out);
        });
    });
    let event = String::from_utf8(json::encode_publication(&publication)).unwrap_or_default();
    c.bench_function("json/decode message event", |b| {
        b.iter(|| json::decode_events(black_box(&event)).for_each(|event| drop(black_box(event))));
    });
}

criterion_group!(benches, codec);
criterion_main!(benches);
