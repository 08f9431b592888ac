use std::{
    cell::{Cell, RefCell},
    io::{self, IoSlice},
    sync::{Arc, atomic::AtomicUsize},
    task::{Context, Poll},
};

use sanjay_proto::{
    client::v1::{InboxMessage, Payload, payload::Kind},
    edge::v1::InboxPage,
};
use sanjay_protocol::{
    Command, Envelope,
    command::{Ack, Hello},
    token::{Capabilities, Claims},
};
use sanjay_runtime::{clock::ManualClock, random::SeededRandom};
use tokio::sync::mpsc;

use super::*;
use crate::{
    Config,
    metrics::Metrics,
    shard::{Common, Upstream},
    upstream::lane::Lane,
    verifier::{TokenVerifier, VerifyError},
};

/// A socket that takes so many more bytes.
struct Socket {
    room: Cell<usize>,
    taken: RefCell<Vec<u8>>,
}

impl Socket {
    fn has_ping(&self) -> bool {
        self.taken.borrow().ends_with(&[0x81, 2, b'{', b'}', 0x89, 0])
    }
}

impl Transport for Socket {
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
        let count = bytes.len().min(self.room.get());
        if count == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.room.set(self.room.get() - count);
        self.taken.borrow_mut().extend_from_slice(&bytes[..count]);
        Ok(count)
    }

    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut written = 0;
        for slice in slices.iter().filter(|slice| !slice.is_empty()) {
            match self.try_write(slice) {
                Ok(count) => written += count,
                Err(_) => break,
            }
        }
        if written == 0 { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(written) }
    }
}

struct Everybody;

impl TokenVerifier for Everybody {
    fn verify(&self, _: &str, now_s: u64) -> Result<Claims, VerifyError> {
        let caps = Capabilities::everything();
        Ok(Claims {
            sub: "bob".to_owned(),
            exp: now_s + 3_600,
            iat: None,
            nbf: None,
            jti: None,
            caps,
            channel: None,
        })
    }
}

/// One connection of a shard, whose time is moved by hand.
struct Bench {
    shard: Rc<Shard<Socket>>,
    conn: Rc<Connection<Socket>>,
    acks: mpsc::Receiver<AckRequest>,
    /// Kept so that their lanes stay open.
    _others: (mpsc::Receiver<crate::upstream::LinkRequest>, mpsc::Receiver<crate::upstream::ReadRequest>),
}

/// Ticks from the write to the look at the answer.
const DEADLINE: Tick = 1_000 / 20 + 1;

impl Bench {
    /// A client that was welcomed, and was sent `messages` over a socket with room for so many bytes.
    fn new(messages: u64, room: usize) -> Self {
        let common = Common {
            config: Config { ack_deadline_ms: 1_000, ..Config::default() },
            clock: Arc::new(ManualClock::new(1)),
            random: Arc::new(SeededRandom::new(1)),
            verifier: Arc::new(Everybody),
            metrics: Arc::new(Metrics::register(&mut prometheus_client::registry::Registry::default())),
            revocations: crate::revocations::Revocations::default(),
            connections: AtomicUsize::new(0),
            namespaces: sanjay_runtime::SharedNamespaces::default(),
            subscribers: Arc::default(),
        };
        let ((link, links), (read, reads), (ack, acks)) =
            (mpsc::channel(128), mpsc::channel(128), mpsc::channel(128));
        let histories = Lane::new(mpsc::channel(128).0);
        let upstream =
            Upstream { link: Lane::new(link), reads: Lane::new(read), acks: Lane::new(ack), histories };
        let shard = Shard::new(0, Arc::new(common), upstream);
        let socket = Socket { room: Cell::new(usize::MAX), taken: RefCell::default() };
        let conn = shard.add(socket, Some("token".to_owned()));
        let bench = Self { shard, conn, acks, _others: (links, reads) };
        bench.input(Input::Command(Envelope { id: None, command: Command::Hello(Hello::default()) }));
        bench.input(Input::SessionOpened(Ok(())));
        let empty = InboxPage { epoch: 7, ..InboxPage::default() };
        bench.input(Input::Page(Ok(empty)));
        bench.conn.io.room.set(room);
        let messages = (1..=messages).map(|seq| message(seq, 1)).collect();
        let page = InboxPage { epoch: 7, head: 9, covers: 9, messages, ..InboxPage::default() };
        bench.input(Input::Page(Ok(page)));
        bench
    }

    fn input(&self, input: Input) {
        Turn::once(&self.shard, &self.conn, input);
    }

    /// Time passes until this tick, and what is due is looked at.
    fn at(&self, tick: Tick) {
        self.shard.now.set(tick);
        self.shard.check_answers(&self.conn);
    }

    /// Bytes arrive from the client.
    fn hears(&self) {
        self.conn.heard.set(self.shard.now());
        self.conn.pinged.set(NEVER);
    }

    fn due(&self) -> Tick {
        let due = self.conn.machine.borrow().inbox().and_then(|cursor| cursor.next_due());
        due.map_or(NEVER, |due| self.shard.answers_due(&self.conn, due))
    }

    /// What delivery was told last failed.
    fn failed(&mut self) -> Vec<(u64, u32)> {
        let Ok(request) = self.acks.try_recv() else { return Vec::new() };
        assert_eq!((request.waiter.is_none(), request.user.as_str(), request.epoch), (true, "bob", 7));
        assert!(request.failed.iter().all(|attempt| attempt.kind() == FailureKind::Deadline));
        request.failed.iter().map(|attempt| (attempt.seq, attempt.delivery)).collect()
    }
}

fn message(seq: u64, delivery: u32) -> InboxMessage {
    let payload = Some(Payload { kind: Some(Kind::Text("x".repeat(100))) });
    InboxMessage { seq, delivery, payload, ..InboxMessage::default() }
}

#[test]
fn a_silent_client_is_asked_first_and_fails_when_it_answers() {
    let mut bench = Bench::new(2, usize::MAX);
    assert_eq!(bench.due(), DEADLINE);
    bench.at(DEADLINE - 1);
    assert!(!bench.conn.io.has_ping());
    bench.at(DEADLINE);
    assert!(bench.conn.io.has_ping(), "it is asked");
    assert_eq!((bench.failed(), bench.due()), (vec![], NEVER), "and nothing is said without an answer");
    bench.at(DEADLINE * 9);
    assert_eq!(bench.failed(), []);
    bench.hears();
    assert_eq!(bench.due(), bench.shard.now());
    bench.at(DEADLINE * 9);
    assert_eq!(bench.failed(), [(1, 1), (2, 1)]);
    assert_eq!((bench.due(), bench.shard.common.metrics.ack_deadlines.get()), (NEVER, 2));
}

#[test]
fn a_byte_from_before_the_deadline_proves_nothing() {
    let mut bench = Bench::new(1, usize::MAX);
    bench.at(DEADLINE - 1);
    bench.hears();
    bench.at(DEADLINE + 5);
    assert_eq!(bench.failed(), []);
    assert!(bench.conn.io.has_ping());
}

#[test]
fn what_waits_for_the_socket_has_its_whole_deadline_left() {
    let mut bench = Bench::new(3, 250);
    assert!(bench.conn.waiting() > 0);
    bench.at(DEADLINE * 3);
    bench.hears();
    bench.at(DEADLINE * 3);
    assert_eq!((bench.failed(), bench.due()), (vec![], NEVER), "the frame is not out yet");
    bench.conn.io.room.set(usize::MAX);
    let taken = bench.conn.flush(bench.shard.now()).unwrap();
    bench.shard.on_taken(&bench.conn, taken);
    assert_eq!(bench.due(), DEADLINE * 4);
    bench.at(DEADLINE * 4);
    bench.hears();
    bench.at(DEADLINE * 4);
    assert_eq!(bench.failed(), [(1, 1), (2, 1), (3, 1)]);
}

#[test]
fn an_answer_that_lies_unread_counts() {
    let mut bench = Bench::new(1, usize::MAX);
    let ack = Command::Ack(Ack { ranges: vec![(1, 1)], trace: String::new() });
    let backlog = [Ok(Envelope { id: None, command: ack })].into_iter().collect();
    *bench.conn.backlog.borrow_mut() = Some(Box::new(backlog));
    bench.shard.now.set(DEADLINE * 2);
    bench.hears();
    bench.at(DEADLINE * 2);
    assert_eq!((bench.failed(), bench.due()), (vec![], NEVER));
    bench.shard.take_backlog(&bench.conn);
    bench.at(DEADLINE * 2);
    let request = bench.acks.try_recv().unwrap();
    assert_eq!((request.ranges, request.failed.len()), (vec![(1, 1)], 0));
    assert!(bench.acks.try_recv().is_err());
}

#[test]
fn while_delivery_is_away_nothing_fails() {
    let mut bench = Bench::new(1, usize::MAX);
    for _ in 0..100 {
        let (epoch, ranges) = (7, vec![(9, 9)]);
        bench.shard.ack(&bench.conn, None, epoch, ranges, String::new());
    }
    bench.shard.now.set(DEADLINE * 2);
    bench.hears();
    bench.at(DEADLINE * 2);
    assert_eq!(bench.due(), after(bench.shard.now(), LOOK_AGAIN), "it is looked at again");
    for _ in 0..100 {
        assert!(bench.acks.try_recv().unwrap().failed.is_empty());
    }
    bench.at(DEADLINE * 2);
    assert_eq!(bench.failed(), [(1, 1)]);
}

#[test]
fn a_redelivery_is_reported_once() {
    let mut bench = Bench::new(2, usize::MAX);
    bench.shard.report_written(&bench.conn);
    let first = bench.acks.try_recv().unwrap();
    assert_eq!((first.written, first.rewritten), (9, vec![]));
    bench.input(Input::Hint(7, message(2, 3)));
    bench.shard.report_written(&bench.conn);
    let second = bench.acks.try_recv().unwrap();
    assert_eq!((second.written, second.rewritten), (9, vec![(2, 3)]));
    bench.shard.report_written(&bench.conn);
    assert!(bench.acks.try_recv().is_err());
    assert_eq!(bench.shard.common.metrics.redeliveries.get(), 1);
}

#[test]
fn a_report_names_the_session_and_what_was_written() {
    let mut bench = Bench::new(2, usize::MAX);
    let session = bench.conn.machine.borrow().session();
    let failed =
        FailedAttempt { seq: 2, delivery: 1, kind: FailureKind::Nak.into(), ..FailedAttempt::default() };
    bench.shard.fail(&bench.conn, Some(Some(5)), 7, vec![failed.clone()]);
    let request = bench.acks.try_recv().unwrap();
    assert_eq!((request.session, request.written, request.failed), (session, 2, vec![failed]));
    assert_eq!(request.waiter, Some((bench.conn.key, Some(5))));
}
