//! From one publication to many sockets, on the edge.

use std::{
    hint::black_box,
    io,
    task::{Context, Poll},
};

use sanjay_proto::client::v1::Publication;
use sanjay_protocol::json;
use sanjay_websocket::{Opcode, Outbox, Sent, Transport, encode};

use crate::{
    Case, counted_region,
    edge_hub::{Hub, Step, Top},
    messages::publication,
};

pub(crate) const CASES: &[Case] = &[
    Case { name: "fanout-delivery", operations: PUBLICATIONS * MEMBERS, work: fan_out },
    Case { name: "fanout-delivery-slow", operations: PUBLICATIONS * MEMBERS, work: fan_out_to_slow_sockets },
    Case { name: "hub-join-leave", operations: MEMBERS * CHANNELS, work: join_and_leave },
];

const MEMBERS: u64 = 1_000;
const PUBLICATIONS: u64 = 20;
const CHANNELS: u64 = 2;

/// A socket that takes everything, or nothing.
struct Socket {
    takes: bool,
}

impl Transport for Socket {
    fn poll_readable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_writable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.takes { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn try_read(&self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        if self.takes { Ok(bytes.len()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    }

    fn try_write_vectored(&self, slices: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.takes
            .then(|| slices.iter().map(|slice| slice.len()).sum())
            .ok_or(io::ErrorKind::WouldBlock.into())
    }
}

/// A hub with one channel that everybody is subscribed to.
fn hub() -> Hub {
    let mut hub = Hub::default();
    for conn in 0..MEMBERS as u32 {
        hub.join(conn, Some(1), "rooms:42");
    }
    hub.on_subscribed("rooms:42", Top { epoch: "router-1-17f".into(), offset: 0 });
    hub
}

fn fan_out() {
    fan_out_to(true);
}

fn fan_out_to_slow_sockets() {
    fan_out_to(false);
}

/// What a shard does with publications: the hub moves on, the frame is encoded once, and each member gets it.
fn fan_out_to(takes: bool) {
    let mut hub = hub();
    let mut connections: Vec<(Socket, Outbox)> =
        (0..MEMBERS).map(|_| (Socket { takes }, Outbox::new())).collect();
    let publications: Vec<Publication> = (1..=PUBLICATIONS).map(publication).collect();
    let mut waiting = 0;
    counted_region(&mut || {
        for publication in &publications {
            let Publication { channel: name, epoch, offset, .. } = publication;
            let Step::Deliver { channel, missed: None } = hub.on_publication(name, epoch, *offset) else {
                panic!("the next publication is delivered");
            };
            let frame = encode(Opcode::Text, &json::encode_publication(publication));
            for index in hub.members(channel) {
                let (socket, outbox) = &mut connections[*index as usize];
                let sent = outbox.send_one(socket, &frame).expect("the socket does not fail");
                waiting += u64::from(sent == Sent::Queued);
            }
        }
    });
    assert_eq!(waiting, if takes { 0 } else { PUBLICATIONS * MEMBERS }, "every member got every publication");
}

fn join_and_leave() {
    let names: Vec<String> = (0..CHANNELS).map(|n| format!("rooms:{n}")).collect();
    let mut hub = Hub::default();
    counted_region(&mut || {
        for name in &names {
            for conn in 0..MEMBERS as u32 {
                black_box(hub.join(conn, Some(1), name));
            }
            hub.on_subscribed(name, Top { epoch: "router-1-17f".into(), offset: 0 });
        }
        for conn in 0..MEMBERS as u32 {
            black_box(hub.leave_all(conn));
        }
    });
    assert_eq!(hub.channel_count(), 0, "everybody left");
}
