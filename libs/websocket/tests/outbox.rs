//! The outbox in front of a transport that takes as few bytes as it likes.

use bytes::Bytes;
use proptest::prelude::*;
use sanjay_websocket::{Opcode, Outbox, Sent, Transport, encode, encode_close};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice};
use std::task::{Context, Poll};

/// Takes as many bytes at each write as its script says; 0 is "would block", and the end of the script takes all.
#[derive(Default)]
struct Fake {
    script: RefCell<VecDeque<usize>>,
    taken: RefCell<Vec<u8>>,
    calls: RefCell<usize>,
}

impl Fake {
    fn new(script: impl IntoIterator<Item = usize>) -> Self {
        Self { script: RefCell::new(script.into_iter().collect()), ..Self::default() }
    }
}

impl Transport for Fake {
    fn poll_readable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_writable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn try_read(&self, _: &mut [u8]) -> io::Result<usize> {
        Err(ErrorKind::WouldBlock.into())
    }

    fn try_write(&self, buf: &[u8]) -> io::Result<usize> {
        self.try_write_vectored(&[IoSlice::new(buf)])
    }

    fn try_write_vectored(&self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        *self.calls.borrow_mut() += 1;
        assert!(bufs.iter().all(|buf| !buf.is_empty()), "an empty slice was written");
        let all: Vec<u8> = bufs.iter().flat_map(|buf| buf.iter().copied()).collect();
        let takes = self.script.borrow_mut().pop_front().unwrap_or(usize::MAX).min(all.len());
        if takes == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.taken.borrow_mut().extend_from_slice(&all[..takes]);
        Ok(takes)
    }
}

/// The payloads of a stream of whole server frames; None when it does not end between two frames.
fn payloads(mut stream: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    while let [_, len, rest @ ..] = stream {
        assert!(*len < 126, "the tests send short frames");
        let (payload, after) = rest.split_at_checked(usize::from(*len))?;
        found.push(payload.to_vec());
        stream = after;
    }
    stream.is_empty().then_some(found)
}

#[test]
fn idle_state_is_one_pointer() {
    assert_eq!(size_of::<Outbox>(), size_of::<usize>());
}

#[test]
fn frames_leave_together_while_the_transport_keeps_up() {
    let frames: Vec<Bytes> = (0..130u8).map(|i| encode(Opcode::Binary, &[i])).collect();
    let io = Fake::default();
    let mut outbox = Outbox::new();
    assert_eq!(outbox.send(&io, &frames).unwrap(), Sent::All);
    assert_eq!(*io.calls.borrow(), 3);
    assert_eq!(*io.taken.borrow(), frames.concat());
    assert!(outbox.is_empty());
}

#[test]
fn nothing_is_written_past_what_waits() {
    let io = Fake::new([2]);
    let mut outbox = Outbox::new();
    let frame = encode(Opcode::Text, b"abc");
    assert_eq!(outbox.send_one(&io, &frame).unwrap(), Sent::Queued);
    assert_eq!(outbox.send_one(&io, &frame).unwrap(), Sent::Queued);
    assert_eq!(outbox.send(&io, std::slice::from_ref(&frame)).unwrap(), Sent::Queued);
    assert_eq!((*io.calls.borrow(), outbox.bytes()), (1, 13));
    let flushed = outbox.flush(&io).unwrap();
    assert_eq!((flushed.wrote, flushed.empty, outbox.bytes()), (13, true, 0));
    assert_eq!(*io.taken.borrow(), [&frame[..]; 3].concat());
}

#[test]
fn truncation_keeps_only_a_frame_that_has_begun() {
    let frame = encode(Opcode::Text, b"abc");
    let frames = vec![frame; 3];
    for (takes, left) in [(0, 0), (1, 4), (5, 0), (7, 3)] {
        let io = Fake::new([takes]);
        let mut outbox = Outbox::new();
        outbox.send(&io, &frames).unwrap();
        outbox.truncate_to_boundary();
        assert_eq!(outbox.bytes(), left, "after {takes} bytes");
        assert_eq!(outbox.is_empty(), left == 0);
    }
}

#[test]
fn an_error_is_reported() {
    struct Broken;
    impl Transport for Broken {
        fn poll_readable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_writable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn try_read(&self, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }
        fn try_write(&self, _: &[u8]) -> io::Result<usize> {
            Ok(0)
        }
        fn try_write_vectored(&self, _: &[IoSlice<'_>]) -> io::Result<usize> {
            Err(ErrorKind::BrokenPipe.into())
        }
    }
    let frame = encode(Opcode::Ping, b"");
    let one = Outbox::new().send_one(&Broken, &frame).unwrap_err();
    assert_eq!(one.kind(), ErrorKind::WriteZero);
    let two = Outbox::new().send(&Broken, &[frame.clone(), frame]).unwrap_err();
    assert_eq!(two.kind(), ErrorKind::BrokenPipe);
}

#[derive(Clone, Debug)]
enum Step {
    One,
    Many(usize),
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![Just(Step::One), (0usize..100).prop_map(Step::Many), Just(Step::Flush)];
    prop::collection::vec(step, 0..40)
}

/// Takes the steps with numbered frames and returns the bytes that were sent.
fn run(outbox: &mut Outbox, io: &Fake, steps: Vec<Step>) -> Vec<u8> {
    let mut sent = Vec::new();
    let mut number = 0u32;
    let mut next = || {
        number += 1;
        let frame = encode(Opcode::Binary, &number.to_be_bytes()[(number % 4) as usize..]);
        sent.extend_from_slice(&frame);
        frame
    };
    for step in steps {
        match step {
            Step::One => {
                let state = outbox.send_one(io, &next()).expect("the fake does not fail");
                assert_eq!(state == Sent::All, outbox.is_empty());
            }
            Step::Many(count) => {
                let frames: Vec<Bytes> = (0..count).map(|_| next()).collect();
                let state = outbox.send(io, &frames).expect("the fake does not fail");
                assert_eq!(state == Sent::All, outbox.is_empty());
            }
            Step::Flush => {
                let before = outbox.bytes();
                let flushed = outbox.flush(io).expect("the fake does not fail");
                assert_eq!((before - flushed.wrote, flushed.empty), (outbox.bytes(), outbox.is_empty()));
            }
        }
    }
    assert_eq!(io.taken.borrow().len() + outbox.bytes(), sent.len());
    sent
}

proptest! {
    #[test]
    fn nothing_is_lost_or_reordered(
        steps in steps(),
        script in prop::collection::vec(prop_oneof![Just(0usize), 0usize..12, 0usize..400], 0..80),
    ) {
        let io = Fake::new(script);
        let mut outbox = Outbox::new();
        let sent = run(&mut outbox, &io, steps);
        while !outbox.flush(&io).unwrap().empty {}
        prop_assert_eq!(&*io.taken.borrow(), &sent);
    }

    #[test]
    fn a_close_frame_may_follow_a_truncation(
        steps in steps(),
        script in prop::collection::vec(prop_oneof![Just(0usize), 0usize..12, 0usize..400], 0..80),
    ) {
        let io = Fake::new(script);
        let mut outbox = Outbox::new();
        let sent = run(&mut outbox, &io, steps);
        let before = io.taken.borrow().len();
        outbox.truncate_to_boundary();
        outbox.send_one(&io, &encode_close(1001, "bye")).unwrap();
        while !outbox.flush(&io).unwrap().empty {}
        let taken = io.taken.borrow();
        let seen = payloads(&taken).expect("whole frames");
        let expected = payloads(&sent).expect("whole frames");
        let (close, data) = seen.split_last().expect("the close frame");
        prop_assert_eq!(&close[2..], b"bye");
        prop_assert_eq!(data, &expected[..data.len()]);
        prop_assert!(taken.len() <= before + 5 + 7, "at most the rest of one frame precedes the close");
    }
}
