//! The load client: opens thousands of WebSocket connections and counts what comes in, on one thread.

mod connection;

use std::{
    collections::VecDeque,
    io::{BufRead as _, Write as _, stdin, stdout},
    sync::{Arc, mpsc},
    time::Instant,
};

use anyhow::Context as _;
use mio::{Events, Interest, Poll, Token, Waker};
use sanjay_protocol::token::{Capabilities, Claims};
use sanjay_runtime::{
    clock::{Clock as _, SystemClock},
    jwt,
    secret::Secret,
};

use crate::orders::{FromClient, Hello, Open, Status, ToClient};
use connection::{Connection, Introduction};

/// Handshakes under way at a time: enough to keep a server busy, few enough for its listen queue.
const CONCURRENT_HANDSHAKES: usize = 64;
/// Loopback addresses that connections come from, so that their ports do not run out.
const SOURCES: u32 = 8;
/// How long the tokens live, in seconds.
const TOKEN_TTL_S: u64 = 3600;

const WAKE: Token = Token(usize::MAX);

/// Takes orders on standard input until it ends.
pub(crate) fn run() -> anyhow::Result<()> {
    let result = Client::new().and_then(Client::serve);
    if let Err(error) = &result {
        answer(&FromClient::Failed(format!("{error:#}")))?;
    }
    result
}

struct Client {
    poll: Poll,
    /// Lives as long as the poll, which would forget the last wake-up with it.
    _waker: Arc<Waker>,
    orders: mpsc::Receiver<String>,
    connections: Vec<Connection>,
    opening: Option<Opening>,
    expected: Option<u64>,
    status: Status,
    read: Vec<u8>,
}

/// Connections that are not ready yet.
struct Opening {
    open: Open,
    started: Instant,
    waiting: VecDeque<u32>,
    ready: u32,
}

impl Client {
    fn new() -> anyhow::Result<Self> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKE)?);
        let kept = Arc::clone(&waker);
        let (sender, orders) = mpsc::channel();
        std::thread::spawn(move || {
            for line in stdin().lock().lines().map_while(Result::ok) {
                if sender.send(line).is_err() || waker.wake().is_err() {
                    return;
                }
            }
            drop(sender);
            // The loop ends when it finds the sender gone; waking cannot fail while it polls.
            let _ = waker.wake();
        });
        Ok(Self {
            poll,
            _waker: kept,
            orders,
            connections: Vec::new(),
            opening: None,
            expected: None,
            status: Status::default(),
            read: vec![0; 256 * 1024],
        })
    }

    fn serve(mut self) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(1024);
        loop {
            match self.poll.poll(&mut events, None) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                result => result?,
            }
            for event in &events {
                if event.token() != WAKE {
                    self.advance(event.token().0, event.is_writable())?;
                } else if !self.take_orders()? {
                    return Ok(());
                }
            }
            self.reached()?;
        }
    }

    /// Carries out what was ordered. False once there will be no more orders.
    fn take_orders(&mut self) -> anyhow::Result<bool> {
        loop {
            let line = match self.orders.try_recv() {
                Ok(line) => line,
                Err(mpsc::TryRecvError::Empty) => return Ok(true),
                Err(mpsc::TryRecvError::Disconnected) => return Ok(false),
            };
            match serde_json::from_str(&line)? {
                ToClient::Open(open) => {
                    let waiting = (0..open.connections).collect();
                    self.opening = Some(Opening { open, started: Instant::now(), waiting, ready: 0 });
                    for _ in 0..CONCURRENT_HANDSHAKES {
                        self.open_next()?;
                    }
                }
                ToClient::Expect { messages } => self.expected = Some(messages),
                ToClient::Ask => answer(&FromClient::Status(self.status.clone()))?,
            }
        }
    }

    fn open_next(&mut self) -> anyhow::Result<()> {
        let Some(opening) = &mut self.opening else { return Ok(()) };
        let Some(number) = opening.waiting.pop_front() else { return Ok(()) };
        let introduction = opening.open.hello.as_ref().map(|hello| introduce(hello, number));
        let source = [127, 0, 0, u8::try_from(1 + number % SOURCES)?];
        let mut connection = Connection::connect(source.into(), opening.open.target, introduction)
            .with_context(|| format!("connection {number}"))?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(connection.stream(), Token(self.connections.len()), interest)?;
        self.connections.push(connection);
        Ok(())
    }

    fn advance(&mut self, index: usize, writable: bool) -> anyhow::Result<()> {
        let connection = &mut self.connections[index];
        let was_ready = connection.is_ready();
        connection
            .advance(writable, &mut self.read, &mut self.status)
            .with_context(|| format!("connection {index}"))?;
        if was_ready || !connection.is_ready() {
            return Ok(());
        }
        self.open_next()?;
        if let Some(opening) = &mut self.opening {
            opening.ready += 1;
            if opening.ready == opening.open.connections {
                answer(&FromClient::Opened { elapsed: opening.started.elapsed() })?;
                self.opening = None;
            }
        }
        Ok(())
    }

    fn reached(&mut self) -> anyhow::Result<()> {
        if self.expected.is_some_and(|messages| self.status.messages >= messages) {
            self.expected = None;
            answer(&FromClient::Reached)?;
        }
        Ok(())
    }
}

/// Every connection is another user, so that the edge shares nothing between them.
fn introduce(hello: &Hello, number: u32) -> Introduction {
    let now_s = SystemClock.now_s();
    let claims = Claims {
        sub: format!("load-{number}"),
        exp: now_s + TOKEN_TTL_S,
        iat: Some(now_s),
        nbf: None,
        jti: None,
        caps: Capabilities::everything(),
        channel: None,
    };
    Introduction {
        token: jwt::sign(&claims, &Secret::new(hello.token_secret.clone())),
        credit: hello.credit,
        channel: format!("load-{}", number / hello.per_channel),
    }
}

fn answer(answer: &FromClient) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut out = stdout().lock();
    out.write_all(&line)?;
    Ok(out.flush()?)
}
