//! A WebSocket as bytes on a socket: it can say what no library lets a client say, and answers nothing by itself.

use std::{collections::BTreeMap, io};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opcode {
    /// The next part of a message.
    Continuation = 0,
    /// Text.
    Text = 1,
    /// Bytes.
    Binary = 2,
    /// A close with its code and reason.
    Close = 8,
    /// A ping.
    Ping = 9,
    /// Its answer.
    Pong = 10,
}

/// A frame from the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it holds.
    pub opcode: Opcode,
    /// Its payload.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Code and reason of a close frame.
    #[must_use]
    pub fn close(&self) -> Option<(u16, String)> {
        match (self.opcode, &self.payload[..]) {
            (Opcode::Close, [high, low, reason @ ..]) => {
                Some((u16::from_be_bytes([*high, *low]), String::from_utf8_lossy(reason).into_owned()))
            }
            _ => None,
        }
    }
}

/// An HTTP answer that is no upgrade.
#[derive(Debug, Clone, Default)]
pub struct HttpAnswer {
    /// The status.
    pub status: u16,
    /// Headers, with names in lower case.
    pub headers: BTreeMap<String, String>,
    /// What came beside them.
    pub body: String,
}

/// A WebSocket after its handshake.
#[derive(Debug)]
pub struct Wire {
    socket: TcpStream,
    received: Vec<u8>,
    mask: u32,
    handshake: BTreeMap<String, String>,
}

/// The handshake's key; which one it is does not matter.
const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";

impl Wire {
    /// Opens a socket and asks for an upgrade, with further headers. `path` replaces that of `url` when it is given.
    ///
    /// # Errors
    /// The answer when it is none, with status 0 when nobody listens or the socket was closed instead.
    pub async fn upgrade(
        url: &str,
        path: Option<&str>,
        headers: &[(&str, &str)],
    ) -> Result<Self, HttpAnswer> {
        let (host, own) = split(url);
        let path = path.unwrap_or(own);
        let mut request = format!(
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n"
        );
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        let Ok(mut wire) = Self::open(url).await else { return Err(HttpAnswer::default()) };
        wire.write(request.as_bytes()).await;
        let answer = wire.http_answer().await;
        if answer.status != 101 {
            return Err(answer);
        }
        wire.handshake = answer.headers;
        Ok(wire)
    }

    /// A header of the answer to the handshake, by its name in lower case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.handshake.get(name).map(String::as_str)
    }

    /// Opens a socket to the address of `url`, and sends nothing.
    ///
    /// # Errors
    /// When nobody listens.
    pub async fn open(url: &str) -> io::Result<Self> {
        let socket = TcpStream::connect(split(url).0).await?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, received: Vec::new(), mask: 0x1234_5678, handshake: BTreeMap::new() })
    }

    /// Asks for a page over HTTP.
    pub async fn get(url: &str) -> HttpAnswer {
        let (host, path) = split(url);
        let Ok(mut wire) = Self::open(url).await else { return HttpAnswer::default() };
        wire.write(format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").as_bytes())
            .await;
        wire.http_answer().await
    }

    /// Sends bytes as they are. A socket that the server has closed takes none, which the next read tells.
    pub async fn write(&mut self, bytes: &[u8]) {
        let _ = self.socket.write_all(bytes).await;
    }

    /// The answer to an HTTP request.
    pub async fn http_answer(&mut self) -> HttpAnswer {
        let end = loop {
            match self.received.windows(4).position(|four| four == b"\r\n\r\n") {
                Some(at) => break at + 4,
                None if self.more().await.is_ok() => {}
                None => return HttpAnswer::default(),
            }
        };
        let head: Vec<u8> = self.received.drain(..end).collect();
        let head = String::from_utf8_lossy(&head).into_owned();
        let mut lines = head.split("\r\n");
        let status = lines.next().and_then(|line| line.split(' ').nth(1)).and_then(|code| code.parse().ok());
        let pairs = lines.filter_map(|line| line.split_once(':'));
        let headers: BTreeMap<_, _> =
            pairs.map(|(name, value)| (name.to_lowercase(), value.trim().to_owned())).collect();
        let length = headers.get("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        while self.received.len() < length && self.more().await.is_ok() {}
        let body = if status == Some(101) { Vec::new() } else { std::mem::take(&mut self.received) };
        HttpAnswer { status: status.unwrap_or(0), headers, body: String::from_utf8_lossy(&body).into_owned() }
    }

    /// Sends one whole frame, masked.
    pub async fn send(&mut self, opcode: Opcode, payload: &[u8]) {
        let frame = self.frame(true, opcode, payload);
        self.write(&frame).await;
    }

    /// A masked frame's bytes.
    pub fn frame(&mut self, fin: bool, opcode: Opcode, payload: &[u8]) -> Vec<u8> {
        self.mask = self.mask.rotate_left(5).wrapping_mul(0x9e37_79b9);
        let mask = self.mask.to_be_bytes();
        let mut frame = vec![opcode as u8 | if fin { 0x80 } else { 0 }];
        match payload.len() {
            length @ 0..=125 => frame.push(0x80 | length as u8),
            length @ 126..=0xffff => {
                frame.push(0x80 | 126);
                frame.extend((length as u16).to_be_bytes());
            }
            length => {
                frame.push(0x80 | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend(mask);
        frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        frame
    }

    /// The next frame.
    ///
    /// # Errors
    /// When the socket ended.
    ///
    /// # Panics
    /// When the server sent what is no frame.
    pub async fn next(&mut self) -> io::Result<Frame> {
        loop {
            if let Some((frame, length)) = parse(&self.received) {
                self.received.drain(..length);
                return Ok(frame);
            }
            self.more().await?;
        }
    }

    /// Reads frames until the server's close; gives its code and reason.
    ///
    /// # Errors
    /// When the socket ended without one.
    pub async fn closed(&mut self) -> io::Result<(u16, String)> {
        loop {
            let frame = self.next().await?;
            if frame.opcode == Opcode::Close {
                return Ok(frame.close().unwrap_or((1005, String::new())));
            }
        }
    }

    async fn more(&mut self) -> io::Result<()> {
        match self.socket.read_buf(&mut self.received).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }
}

fn split(url: &str) -> (&str, &str) {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    match rest.find('/') {
        Some(at) => rest.split_at(at),
        None => (rest, "/"),
    }
}

fn parse(bytes: &[u8]) -> Option<(Frame, usize)> {
    let (&first, &second) = (bytes.first()?, bytes.get(1)?);
    assert_eq!(first & 0xf0, 0x80, "servers of this protocol send whole messages");
    assert_eq!(second & 0x80, 0, "a server does not mask");
    let (length, start) = match second {
        126 => (usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)), 4),
        127 => (usize::try_from(u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?)).ok()?, 10),
        short => (usize::from(short), 2),
    };
    let payload = bytes.get(start..start + length)?.to_vec();
    let opcode = match first & 0x0f {
        1 => Opcode::Text,
        2 => Opcode::Binary,
        8 => Opcode::Close,
        9 => Opcode::Ping,
        10 => Opcode::Pong,
        other => panic!("the server sent a frame with opcode {other}"),
    };
    Some((Frame { opcode, payload }, start + length))
}
