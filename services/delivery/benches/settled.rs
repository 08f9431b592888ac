//! How long it takes to settle messages of an inbox: in order, as acks nearly always come, and scattered.
//!
//! What the store takes for a durable append is a matter of the disk; the example `sends` prints that.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sanjay_delivery::store::Settled;

const SEQS: u64 = 128;

fn settle(c: &mut Criterion) {
    let in_order: Vec<u64> = (1..=SEQS).collect();
    // Every second one first: as many ranges as there can be, then none.
    let scattered: Vec<u64> = (2..=SEQS).step_by(2).chain((1..=SEQS).step_by(2)).collect();
    let mut group = c.benchmark_group("settle");
    group.throughput(Throughput::Elements(SEQS));
    for (name, seqs) in [("in order", in_order), ("scattered", scattered)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut settled = Settled::default();
                for seq in &seqs {
                    let _ = black_box(settled.settle(*seq, *seq));
                }
                settled
            });
        });
    }
    group.finish();
}

criterion_group!(benches, settle);
criterion_main!(benches);
