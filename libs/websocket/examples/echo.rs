//! An echo server on the codec, for the conformance suite: it accepts every path and returns every message.

use bytes::Bytes;
use clap::Parser;
use sanjay_websocket::{
    Accepted, Decoder, DecoderConfig, Incoming, Opcode, Outbox, Transport, close_payload, encode,
    encode_close, serve_upgrade, upgrade_response,
};
use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, ErrorKind};
use std::ops::ControlFlow;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

/// The conformance suite sends messages of up to 16 MiB.
const CONFIG: DecoderConfig = DecoderConfig { max_message_bytes: 32 << 20 };

/// From the accepted connection to the answered handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// How long to wait for the client's end of the stream after our close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// One read; the connections of a thread share the buffer.
const SCRATCH_BYTES: usize = 64 * 1024;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; SCRATCH_BYTES]);
}

#[derive(Parser)]
struct Options {
    /// Port on 127.0.0.1; 0 takes a free one.
    #[arg(long, default_value_t = 0)]
    port: u16,
}

#[tokio::main(flavor = "current_thread")]
#[expect(clippy::print_stdout, reason = "whoever starts the server reads the port from it")]
async fn main() -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", Options::parse().port)).await?;
    println!("listening {}", listener.local_addr()?);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(serve(stream));
    }
}

async fn serve(stream: TcpStream) {
    let handshake = serve_upgrade(stream, HANDSHAKE_TIMEOUT, |request| {
        upgrade_response(request, None).map(|response| (response, ()))
    });
    if let Ok(Some(accepted)) = timeout(HANDSHAKE_TIMEOUT, handshake).await {
        // An I/O error means that the client has gone, which is no event for an echo.
        let _ = echo(accepted).await;
    }
}

/// The receiving and the sending state of one connection.
struct Connection {
    io: TcpStream,
    decoder: Decoder,
    outbox: Outbox,
}

async fn echo(accepted: Accepted<TcpStream, ()>) -> io::Result<()> {
    let mut connection = Connection { io: accepted.io, decoder: Decoder::new(), outbox: Outbox::new() };
    let mut flow = connection.take(&mut accepted.leftover.to_vec())?;
    while flow.is_continue() {
        // A client that does not read is not read from.
        connection.flush().await?;
        poll_fn(|cx| connection.io.poll_readable(cx)).await?;
        flow = SCRATCH.with_borrow_mut(|scratch| match Transport::try_read(&connection.io, scratch) {
            Ok(0) => Ok(ControlFlow::Break(())),
            Ok(read) => connection.take(&mut scratch[..read]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(ControlFlow::Continue(())),
            Err(error) => Err(error),
        })?;
    }
    connection.flush().await?;
    connection.io.shutdown_write()?;
    let _ = timeout(CLOSE_TIMEOUT, connection.drain()).await;
    Ok(())
}

impl Connection {
    /// Answers what the bytes complete; breaks after a close frame has been sent.
    fn take(&mut self, bytes: &mut [u8]) -> io::Result<ControlFlow<()>> {
        let Self { io, decoder, outbox } = self;
        let mut failure = None;
        let mut flow = ControlFlow::Continue(());
        let result = decoder.feed(&CONFIG, bytes, &mut |incoming| {
            if let Some(reply) = reply(&incoming)
                && let Err(error) = outbox.send_one(io, &reply)
            {
                failure = Some(error);
                return ControlFlow::Break(());
            }
            if matches!(incoming, Incoming::Close(_)) {
                flow = ControlFlow::Break(());
            }
            flow
        });
        if let Some(error) = failure {
            return Err(error);
        }
        if let Err(error) = result {
            self.outbox.send_one(&self.io, &encode_close(error.close_code(), &error.to_string()))?;
            return Ok(ControlFlow::Break(()));
        }
        Ok(flow)
    }

    /// Waits until the outbox is empty.
    async fn flush(&mut self) -> io::Result<()> {
        while !self.outbox.is_empty() {
            poll_fn(|cx| self.io.poll_writable(cx)).await?;
            self.outbox.flush(&self.io)?;
        }
        Ok(())
    }

    /// Reads and ignores until the client ends the stream.
    async fn drain(&mut self) -> io::Result<()> {
        let mut ignored = [0; 1024];
        loop {
            poll_fn(|cx| self.io.poll_readable(cx)).await?;
            match Transport::try_read(&self.io, &mut ignored) {
                Ok(0) => return Ok(()),
                Err(error) if error.kind() != ErrorKind::WouldBlock => return Err(error),
                _ => {}
            }
        }
    }
}

fn reply(incoming: &Incoming<'_>) -> Option<Bytes> {
    match incoming {
        Incoming::Text(text) => Some(encode(Opcode::Text, text.as_bytes())),
        Incoming::Binary(bytes) => Some(encode(Opcode::Binary, bytes)),
        Incoming::Ping(bytes) => Some(encode(Opcode::Pong, bytes)),
        Incoming::Pong(_) => None,
        Incoming::Close(None) => Some(encode(Opcode::Close, &[])),
        Incoming::Close(Some((code, _))) => Some(encode(Opcode::Close, &close_payload(*code, ""))),
    }
}
