//! The I/O loop of one connection: writes what waits, reads what comes, hands it to the machine.
//!
//! While a connection is idle it owns no buffer: bytes are read into the shard's scratch, and only a partial
//! frame is kept.

use std::{
    future::poll_fn,
    io::ErrorKind,
    ops::ControlFlow,
    rc::Rc,
    task::{Context, Poll, ready},
};

use sanjay_protocol::{
    CloseCode,
    json::decode_commands,
    limits::{MAX_CLIENT_MESSAGE_BYTES, MAX_TOKEN_BYTES},
};
use sanjay_websocket::{Decoder, DecoderConfig, Incoming, Opcode, Transport, encode, encode_close};

use super::{Connection, Life, MAX_WAITING_TO_READ, NEVER};
use crate::shard::{Shard, effects::Turn};

const DECODER: DecoderConfig = DecoderConfig { max_message_bytes: MAX_CLIENT_MESSAGE_BYTES };

/// Before `hello` was accepted: room for it with the largest token, so that a stranger holds little memory.
const STRANGER: DecoderConfig = DecoderConfig { max_message_bytes: 2 * MAX_TOKEN_BYTES };

/// Reads in one go before other connections of the shard get their turn.
const READS_A_TURN: usize = 8;

/// Runs a connection until it ends. `leftover`: what was read behind the handshake.
pub async fn run<T: Transport>(shard: Rc<Shard<T>>, conn: Rc<Connection<T>>, leftover: Vec<u8>) {
    let mut decoder = Decoder::new();
    if !leftover.is_empty() {
        let mut leftover = leftover;
        shard.common.metrics.received_bytes.inc_by(leftover.len() as u64);
        on_bytes(&shard, &conn, &mut decoder, &mut leftover);
    }
    poll_fn(|cx| poll(&shard, &conn, &mut decoder, cx)).await;
    shard.remove(&conn);
}

fn poll<T: Transport>(
    shard: &Rc<Shard<T>>,
    conn: &Rc<Connection<T>>,
    decoder: &mut Decoder,
    cx: &mut Context<'_>,
) -> Poll<()> {
    remember_waker(conn, cx);
    for _ in 0..READS_A_TURN {
        if poll_write(shard, conn, cx).is_break() {
            return Poll::Ready(());
        }
        if conn.has_backlog() {
            shard.take_backlog(conn);
            if conn.has_backlog() {
                return Poll::Pending;
            }
            continue;
        }
        if conn.waiting() > MAX_WAITING_TO_READ {
            return Poll::Pending;
        }
        if ready!(conn.io.poll_readable(cx)).is_err() {
            return Poll::Ready(());
        }
        match read(shard, conn, decoder) {
            ControlFlow::Continue(()) => {}
            ControlFlow::Break(()) => return Poll::Ready(()),
        }
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}

fn remember_waker<T>(conn: &Connection<T>, cx: &Context<'_>) {
    let mut waker = conn.waker.borrow_mut();
    match &*waker {
        Some(waker) if waker.will_wake(cx.waker()) => {}
        _ => *waker = Some(cx.waker().clone()),
    }
}

/// Writes what waits, as far as the socket takes it. Breaks when the connection is over.
fn poll_write<T: Transport>(shard: &Shard<T>, conn: &Connection<T>, cx: &mut Context<'_>) -> ControlFlow<()> {
    loop {
        if conn.life.get() == Life::Dead {
            return ControlFlow::Break(());
        }
        if conn.waiting() == 0 {
            break;
        }
        match conn.io.poll_writable(cx) {
            Poll::Pending => return ControlFlow::Continue(()),
            Poll::Ready(Err(_)) => return ControlFlow::Break(()),
            Poll::Ready(Ok(())) => match conn.flush(shard.now()) {
                Ok(bytes) => shard.on_taken(conn, bytes),
                Err(_) => return ControlFlow::Break(()),
            },
        }
    }
    if let Some((after, limit)) = conn.deferred_read.take() {
        shard.read_inbox(conn, after, limit);
    }
    match conn.life.get() {
        Life::Finishing => {
            // Both sides have said that they are done. A reset could not overtake the close frame any more.
            let _ = conn.io.shutdown_write();
            ControlFlow::Break(())
        }
        Life::Closing => {
            let _ = conn.io.shutdown_write();
            ControlFlow::Continue(())
        }
        Life::Open | Life::Dead => ControlFlow::Continue(()),
    }
}

/// Reads once. Breaks when the connection is over.
fn read<T: Transport>(
    shard: &Rc<Shard<T>>,
    conn: &Rc<Connection<T>>,
    decoder: &mut Decoder,
) -> ControlFlow<()> {
    let mut scratch = shard.scratch.borrow_mut();
    match conn.io.try_read(&mut scratch) {
        Ok(0) => ControlFlow::Break(()),
        Ok(count) => {
            conn.heard.set(shard.now());
            conn.pinged.set(NEVER);
            shard.common.metrics.received_bytes.inc_by(count as u64);
            on_bytes(shard, conn, decoder, &mut scratch[..count]);
            ControlFlow::Continue(())
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            ControlFlow::Continue(())
        }
        Err(_) => ControlFlow::Break(()),
    }
}

fn on_bytes<T: Transport>(
    shard: &Rc<Shard<T>>,
    conn: &Rc<Connection<T>>,
    decoder: &mut Decoder,
    bytes: &mut [u8],
) {
    if matches!(conn.life.get(), Life::Finishing | Life::Dead) {
        return;
    }
    let config = if conn.machine.borrow().is_identified() { &DECODER } else { &STRANGER };
    let mut turn = Turn::new(shard, conn);
    let result = decoder.feed(config, bytes, &mut |incoming| {
        on_incoming(&mut turn, incoming);
        match conn.life.get() {
            Life::Open | Life::Closing => ControlFlow::Continue(()),
            Life::Finishing | Life::Dead => ControlFlow::Break(()),
        }
    });
    turn.end();
    if let Err(error) = result {
        let code = CloseCode::from_code(error.close_code()).unwrap_or(CloseCode::ProtocolError);
        shard.close(conn, code, &error.to_string(), false);
        if conn.life.get() == Life::Closing {
            // The stream cannot be read on from here, so the client's own close frame cannot be waited for.
            conn.life.set(Life::Finishing);
        }
    }
}

fn on_incoming<T: Transport>(turn: &mut Turn<'_, T>, incoming: Incoming<'_>) {
    let (shard, conn) = (turn.shard, turn.conn);
    if conn.life.get() == Life::Closing {
        if matches!(incoming, Incoming::Close(_)) {
            conn.life.set(Life::Finishing);
        }
        return;
    }
    match incoming {
        Incoming::Text(text) => decode_commands(text).for_each(|command| turn.on_command(command)),
        Incoming::Binary(_) => {
            turn.flush();
            shard.close(conn, CloseCode::Unsupported, "this subprotocol uses text messages", false);
        }
        Incoming::Ping(payload) => turn.send_frame(&encode(Opcode::Pong, payload)),
        Incoming::Pong(_) => {}
        Incoming::Close(close) => {
            turn.flush();
            // The same code goes back (RFC 6455, section 5.5.1); without a code 1000 says the same.
            let code = close.map_or(CloseCode::Done.code(), |(code, _)| code);
            conn.answer_close(&encode_close(code, ""), shard.now(), shard.linger());
        }
    }
}
