//! The limit: a process that does nothing but `write` a ready frame to every socket.

use std::{
    io::{BufRead as _, ErrorKind, Read as _, Write as _, stdin, stdout},
    net::{TcpListener, TcpStream},
};

use anyhow::Context as _;

use crate::{
    orders::{FromRaw, ToRaw},
    wire,
};

/// Accepts `sockets` clients, then writes on order.
pub(crate) fn run(sockets: usize) -> anyhow::Result<()> {
    let result = serve(sockets);
    if let Err(error) = &result {
        answer(&FromRaw::Failed(format!("{error:#}")))?;
    }
    result
}

fn serve(sockets: usize) -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    answer(&FromRaw::Listening(listener.local_addr()?))?;
    let mut streams = Vec::with_capacity(sockets);
    while streams.len() < sockets {
        streams.push(accept(&listener).with_context(|| format!("socket {}", streams.len()))?);
    }
    answer(&FromRaw::Accepted)?;
    let mut frame = Vec::new();
    for line in stdin().lock().lines() {
        let ToRaw::Write { frame_bytes } = serde_json::from_str(&line?)?;
        if frame.len() != frame_bytes {
            frame = wire::message_of_size(frame_bytes);
        }
        let mut written = 0;
        for stream in &mut streams {
            match stream.write(&frame) {
                Ok(bytes) if bytes == frame.len() => written += 1,
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("a client left"),
            }
        }
        answer(&FromRaw::Written(written))?;
    }
    Ok(())
}

fn accept(listener: &TcpListener) -> anyhow::Result<TcpStream> {
    let (mut stream, _) = listener.accept()?;
    let (mut request, mut read) = (Vec::new(), [0; 2048]);
    while !request.ends_with(b"\r\n\r\n") {
        let bytes = stream.read(&mut read)?;
        anyhow::ensure!(bytes > 0 && request.len() < 16 * 1024, "no request");
        request.extend_from_slice(&read[..bytes]);
    }
    stream.write_all(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    )?;
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn answer(answer: &FromRaw) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    let mut out = stdout().lock();
    out.write_all(&line)?;
    Ok(out.flush()?)
}
