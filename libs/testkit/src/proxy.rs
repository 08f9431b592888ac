//! A TCP proxy that puts faults between two processes, switched while it runs.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    task::JoinHandle,
    time::{Instant, sleep_until},
};

/// Bytes that a connection holds in each direction. It bounds what is under way with a delay, too.
const BUFFER: usize = 64 * 1024;

/// Bytes that are read at once.
const PART: usize = 16 * 1024;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From who connected to who listens.
    Request,
    /// Back.
    Reply,
}

/// What happens to bytes of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// They go on.
    #[default]
    Pass,
    /// They are swallowed. Who sent them cannot tell.
    Swallow,
    /// They go on so much later each, in order.
    Delay(Duration),
    /// So many bytes go on in a second, at least 1. The rest waits, and then the sender.
    Rate(u32),
}

#[derive(Debug, Clone, Default)]
struct State {
    modes: [Mode; 2],
    /// Refuses connections.
    cut: bool,
    /// Counts the cuts: each ends the connections of before.
    cuts: u64,
    lose: Option<Lose>,
}

/// Which request's reply is to be lost.
#[derive(Debug, Clone)]
struct Lose {
    /// Requests that hold these bytes count; all, when there are none.
    holding: Vec<u8>,
    /// So many pass before.
    after: usize,
}

#[derive(Debug)]
struct Shared {
    target: SocketAddr,
    state: watch::Sender<State>,
    open: AtomicUsize,
    accepted: AtomicUsize,
}

/// A proxy to one address. When dropped, it cuts everything and stops listening.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    listening: JoinHandle<()>,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1, and passes everything to `target`.
    ///
    /// # Panics
    /// When it cannot listen.
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("there is a free port");
        let address = listener.local_addr().expect("a listener has an address");
        let state = watch::Sender::new(State::default());
        let (open, accepted) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let shared = Arc::new(Shared { target, state, open, accepted });
        let listening = tokio::spawn(listen(listener, Arc::clone(&shared)));
        Self { address, shared, listening }
    }

    /// Passes everything to a port of 127.0.0.1.
    pub async fn to_port(port: u16) -> Self {
        Self::to(([127, 0, 0, 1], port).into()).await
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its port on 127.0.0.1.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Connections that are open now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.open.load(Ordering::SeqCst)
    }

    /// Connections that were ever made through it.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// Everything goes on as if there were no proxy, for connections that are open, too. What was swallowed stays
    /// lost.
    pub fn pass(&self) {
        self.shared.state.send_modify(|state| {
            *state = State { cuts: state.cuts, ..State::default() };
        });
    }

    /// Ends every connection with a reset, and each new one at once, until [`pass`](Self::pass).
    pub fn cut(&self) {
        self.shared.cut();
    }

    /// Ends every connection with a reset; new ones are made.
    pub fn reset(&self) {
        self.shared.state.send_modify(|state| state.cuts += 1);
    }

    /// Accepts connections and bytes, and lets none through in either direction: a peer whose network is gone.
    pub fn black_hole(&self) {
        self.set(Direction::Request, Mode::Swallow);
        self.set(Direction::Reply, Mode::Swallow);
    }

    /// Treats the bytes of one direction like this from now on.
    pub fn set(&self, direction: Direction, mode: Mode) {
        self.shared.state.send_modify(|state| state.modes[direction as usize] = mode);
    }

    /// Delays both directions.
    pub fn delay(&self, delay: Duration) {
        self.set(Direction::Request, Mode::Delay(delay));
        self.set(Direction::Reply, Mode::Delay(delay));
    }

    /// Lets `n` requests more pass, and their replies. The one after them is passed on too, but its reply is swallowed
    /// and everything is [`cut`](Self::cut): done there, and unknown here. A request is what is read at once; this is
    /// exact for protocols in which each side waits for the other.
    pub fn cut_after_request(&self, n: usize) {
        self.cut_after_request_holding(b"", n);
    }

    /// Like [`cut_after_request`](Self::cut_after_request), where only requests with these bytes count, such as a
    /// command's name: heartbeats beside them do not.
    pub fn cut_after_request_holding(&self, bytes: &[u8], n: usize) {
        let lose = Lose { holding: bytes.to_owned(), after: n };
        self.shared.state.send_modify(|state| state.lose = Some(lose));
    }

    /// Waits until it has been cut, as after [`cut_after_request`](Self::cut_after_request).
    pub async fn until_cut(&self) {
        let mut state = self.shared.state.subscribe();
        state.wait_for(|state| state.cut).await.expect("the proxy holds the sender");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.listening.abort();
        self.shared.cut();
    }
}

impl Shared {
    fn cut(&self) {
        self.state.send_modify(|state| (state.cut = true, state.cuts += 1).0);
    }

    /// Counts a request. Whether it is the one whose reply is to be lost.
    fn count_request(&self, request: &[u8]) -> bool {
        let mut lose = false;
        self.state.send_if_modified(|state| {
            let Some(Lose { holding, after }) = &mut state.lose else { return false };
            let holds = holding.is_empty() || request.windows(holding.len()).any(|part| part == holding);
            if holds {
                lose = *after == 0;
                *after = after.saturating_sub(1);
            }
            if lose {
                state.lose = None;
            }
            false
        });
        lose
    }

    fn mode(&self, direction: Direction) -> Mode {
        self.state.borrow().modes[direction as usize]
    }
}

async fn listen(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        if shared.state.borrow().cut {
            let _ = client.set_zero_linger();
        } else {
            tokio::spawn(connection(client, Arc::clone(&shared)));
        }
    }
}

async fn connection(client: TcpStream, shared: Arc<Shared>) {
    let mut state = shared.state.subscribe();
    let cuts = state.borrow_and_update().cuts;
    let Ok(server) = TcpStream::connect(shared.target).await else {
        let _ = client.set_zero_linger();
        return;
    };
    let _ = (server.set_nodelay(true), client.set_nodelay(true));
    shared.accepted.fetch_add(1, Ordering::SeqCst);
    shared.open.fetch_add(1, Ordering::SeqCst);
    let (mut client_reads, mut client_writes) = client.into_split();
    let (mut server_reads, mut server_writes) = server.into_split();
    let lost = AtomicBool::new(false);
    let whole = {
        let requests = pump(Direction::Request, &mut client_reads, &mut server_writes, &shared, &lost);
        let replies = pump(Direction::Reply, &mut server_reads, &mut client_writes, &shared, &lost);
        tokio::select! {
            both = async { tokio::try_join!(requests, replies) } => both.is_ok(),
            _ = state.wait_for(|state| state.cuts != cuts) => false,
        }
    };
    if !whole {
        // A reset, not an end: what is under way is lost, as with a machine that is gone.
        let _ = (client_reads.as_ref().set_zero_linger(), server_reads.as_ref().set_zero_linger());
        // Dropped, they would end their direction in order.
        client_writes.forget();
        server_writes.forget();
    }
    shared.open.fetch_sub(1, Ordering::SeqCst);
}

/// Bytes that were read, when, and their place in the buffer.
type Part = (Vec<u8>, Instant, OwnedSemaphorePermit);

/// Moves bytes of one direction until their end or a fault.
async fn pump(
    direction: Direction,
    from: &mut OwnedReadHalf,
    to: &mut OwnedWriteHalf,
    shared: &Shared,
    lost: &AtomicBool,
) -> io::Result<()> {
    // Bounded by the places.
    let (parts, waiting) = mpsc::unbounded_channel();
    let places = Arc::new(Semaphore::new(BUFFER));
    tokio::try_join!(
        read(direction, from, parts, places, shared, lost),
        write(direction, to, waiting, shared),
    )?;
    Ok(())
}

async fn read(
    direction: Direction,
    from: &mut OwnedReadHalf,
    parts: mpsc::UnboundedSender<Part>,
    places: Arc<Semaphore>,
    shared: &Shared,
    lost: &AtomicBool,
) -> io::Result<()> {
    let mut buffer = vec![0; PART];
    loop {
        let part = match from.read(&mut buffer).await {
            Ok(count) => &buffer[..count],
            // Where bytes are swallowed, ends are, too.
            _ if shared.mode(direction) == Mode::Swallow => std::future::pending().await,
            Err(error) => return Err(error),
        };
        if part.is_empty() {
            match shared.mode(direction) {
                Mode::Swallow => std::future::pending().await,
                _ => return Ok(()),
            }
        }
        match direction {
            Direction::Request if shared.count_request(part) => lost.store(true, Ordering::SeqCst),
            // An answer: the server is done with the request.
            Direction::Reply if lost.load(Ordering::SeqCst) => {
                shared.cut();
                std::future::pending().await
            }
            _ => {}
        }
        let place = u32::try_from(part.len()).expect("a part is small");
        let place = Arc::clone(&places).acquire_many_owned(place).await.map_err(io::Error::other)?;
        parts.send((part.to_owned(), Instant::now(), place)).map_err(|_| io::ErrorKind::BrokenPipe)?;
    }
}

async fn write(
    direction: Direction,
    to: &mut OwnedWriteHalf,
    mut parts: mpsc::UnboundedReceiver<Part>,
    shared: &Shared,
) -> io::Result<()> {
    let mut state = shared.state.subscribe();
    let mut earliest = Instant::now();
    while let Some((bytes, read_at, _place)) = parts.recv().await {
        let mut left = bytes.as_slice();
        while !left.is_empty() {
            let mode = state.borrow_and_update().modes[direction as usize];
            let (count, until) = match mode {
                Mode::Pass => (left.len(), None),
                Mode::Swallow => break,
                Mode::Delay(delay) => (left.len(), Some(read_at + delay)),
                Mode::Rate(rate) => {
                    // About ten portions a second, or single bytes.
                    let count = left.len().min((rate / 10).max(1) as usize);
                    let lasts = Duration::from_secs_f64(count as f64 / f64::from(rate.max(1)));
                    earliest = earliest.max(Instant::now());
                    (count, Some(earliest + lasts))
                }
            };
            if let Some(until) = until {
                tokio::select! {
                    () = sleep_until(until) => {}
                    // Decided anew, so that a mode of before holds nothing.
                    _ = state.changed() => continue,
                }
                earliest = until;
            }
            to.write_all(&left[..count]).await?;
            left = &left[count..];
        }
    }
    // Half closed, like the original.
    to.shutdown().await
}

#[cfg(test)]
#[path = "proxy_tests.rs"]
mod tests;
