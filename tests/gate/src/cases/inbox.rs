//! Both ends of an inbox: the edge's cursor, and what delivery keeps of the acks.

use std::hint::black_box;

use sanjay_proto::{client::v1::InboxMessage, edge::v1::InboxPage};

use crate::{
    Case, counted_region,
    delivery_settled::Settled,
    edge_inbox::{Cursor, Step},
    in_flight::Written,
    messages::inbox_message,
};

pub(crate) const CASES: &[Case] = &[
    Case { name: "cursor-hint-ack", operations: ROUNDS, work: push_hints },
    Case { name: "cursor-page-message", operations: ROUNDS, work: push_pages },
    Case { name: "settle-in-order", operations: ROUNDS, work: settle_in_order },
    Case { name: "settle-scattered", operations: ROUNDS, work: settle_scattered },
];

const ROUNDS: u64 = 2_000;

/// A cursor whose inbox is known and empty.
fn cursor() -> Cursor {
    let mut cursor = Cursor::new(64);
    let mut steps = Vec::new();
    cursor.resync(&mut steps);
    cursor.on_page(page(0, 0, 0), &mut steps);
    cursor
}

/// The messages after `after` up to `to` of an inbox that ends with `head`.
fn page(after: u64, to: u64, head: u64) -> InboxPage {
    let messages = (after + 1..=to).map(inbox_message).collect();
    InboxPage { epoch: 5, mark: after, head, covers: to, messages, ..InboxPage::default() }
}

/// The live path: each message is hinted in order, pushed and written at once, 16 in a tick, and acked eight at a time.
fn push_hints() {
    let mut cursor = cursor();
    let mut hints: Vec<InboxMessage> = (1..=ROUNDS).rev().map(inbox_message).collect();
    let mut steps = Vec::with_capacity(8);
    let mut pushed = 0;
    counted_region(&mut || {
        while let Some(message) = hints.pop() {
            let seq = message.seq;
            cursor.on_hint(5, message, &mut steps);
            pushed += steps.drain(..).filter(|step| matches!(step, Step::Push(_))).count() as u64;
            cursor.on_handed(1, Written::Until((seq / 16) as u32));
            if seq % 8 == 0 {
                black_box(cursor.on_ack(&[(seq - 7, seq)], &mut steps));
            }
        }
    });
    assert_eq!(pushed, ROUNDS, "every hint is pushed");
}

/// Catching up: pages as large as the credit, each written together and acked before the next.
fn push_pages() {
    let mut cursor = cursor();
    let mut steps = Vec::with_capacity(80);
    cursor.on_hint(5, inbox_message(ROUNDS), &mut steps);
    cursor.on_timer(&mut steps);
    let bounds: Vec<u64> = (0..=ROUNDS).step_by(50).collect();
    let mut pages: Vec<InboxPage> =
        bounds.windows(2).rev().map(|bounds| page(bounds[0], bounds[1], ROUNDS)).collect();
    let mut pushed = 0;
    counted_region(&mut || {
        while let Some(page) = pages.pop() {
            let covers = page.covers;
            cursor.on_page(page, &mut steps);
            cursor.on_handed(50, Written::Until(covers as u32));
            black_box(cursor.on_ack(&[(covers - 49, covers)], &mut steps));
            pushed += steps.drain(..).filter(|step| matches!(step, Step::Push(_))).count() as u64;
        }
    });
    assert_eq!(pushed, ROUNDS, "every message of the pages is pushed");
}

/// Acks as they nearly always come.
fn settle_in_order() {
    let mut settled = Settled::default();
    counted_region(&mut || {
        for seq in 1..=ROUNDS {
            black_box(settled.settle(seq, seq)).expect("there is room");
        }
    });
    assert_eq!(settled.mark(), ROUNDS, "everything is settled");
}

/// Every second seq of a window first, so that there are many ranges, then those between.
fn settle_scattered() {
    const WINDOW: u64 = 100;
    let mut settled = Settled::default();
    counted_region(&mut || {
        for window in 0..ROUNDS / WINDOW {
            for first in [2, 1] {
                for seq in (first..=WINDOW).step_by(2) {
                    let seq = window * WINDOW + seq;
                    black_box(settled.settle(seq, seq)).expect("there is room");
                }
            }
        }
    });
    assert_eq!(settled.mark(), ROUNDS, "everything is settled");
}
