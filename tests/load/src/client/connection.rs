//! One connection of the load client: upgrade, hello, subscribe, then counting.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, SocketAddr},
};

use mio::net::TcpStream;
use sanjay_protocol::{
    Command, Envelope, Event, PATH, SUBPROTOCOL_JSON,
    command::{Hello, Subscribe},
    json,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{orders::Status, wire};

/// What channel messages begin with; everything else is rare and parsed whole.
const MESSAGE: &[u8] = b"{\"message\":";
/// Most surprises that are kept.
const MAX_SURPRISES: usize = 20;

/// What a connection says to an edge.
#[derive(Debug)]
pub(crate) struct Introduction {
    pub token: String,
    pub credit: Option<u32>,
    pub channel: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    Connecting,
    Upgrading,
    Introducing,
    Subscribing,
    Ready,
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    phase: Phase,
    introduction: Option<Box<Introduction>>,
    /// What was read of a frame, or of the upgrade's answer, that is not whole yet.
    partial: Vec<u8>,
}

impl Connection {
    /// Begins to connect.
    pub(crate) fn connect(
        source: IpAddr,
        target: SocketAddr,
        introduction: Option<Introduction>,
    ) -> anyhow::Result<Self> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        match socket.connect(&target.into()) {
            // It goes on in the background.
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error.into()),
            _ => {}
        }
        Ok(Self {
            stream: TcpStream::from_std(socket.into()),
            phase: Phase::Connecting,
            introduction: introduction.map(Box::new),
            partial: Vec::new(),
        })
    }

    pub(crate) fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }

    pub(crate) fn is_ready(&self) -> bool {
        self.phase == Phase::Ready
    }

    /// Does what readiness allows. `read` is scratch space.
    pub(crate) fn advance(
        &mut self,
        writable: bool,
        read: &mut [u8],
        status: &mut Status,
    ) -> anyhow::Result<()> {
        if self.phase == Phase::Connecting {
            if !writable {
                return Ok(());
            }
            if let Some(error) = self.stream.take_error()? {
                return Err(error.into());
            }
            self.phase = Phase::Upgrading;
            self.send(self.request().as_bytes())?;
        }
        loop {
            match self.stream.read(read) {
                Ok(0) => anyhow::bail!("the server closed it in phase {:?}", self.phase),
                Ok(bytes) => {
                    self.take(&read[..bytes], status)?;
                    // Level of the socket is known to be empty after a short read.
                    if bytes < read.len() {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn request(&self) -> String {
        // The key is the example of RFC 6455; nobody here checks what the server makes of it.
        format!(
            "GET {PATH} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Protocol: {SUBPROTOCOL_JSON}\r\n\r\n"
        )
    }

    fn take(&mut self, bytes: &[u8], status: &mut Status) -> anyhow::Result<()> {
        let mut held = std::mem::take(&mut self.partial);
        let mut rest: &[u8] = if held.is_empty() {
            bytes
        } else {
            held.extend_from_slice(bytes);
            &held
        };
        if self.phase == Phase::Upgrading {
            let Some(end) = rest.windows(4).position(|window| window == b"\r\n\r\n") else {
                self.partial = rest.to_vec();
                return Ok(());
            };
            self.upgraded(&rest[..end])?;
            rest = &rest[end + 4..];
        }
        while let Some(frame) = wire::parse(rest) {
            self.frame(&frame, status)?;
            rest = &rest[frame.size..];
        }
        self.partial = rest.to_vec();
        Ok(())
    }

    fn upgraded(&mut self, answer: &[u8]) -> anyhow::Result<()> {
        let answer = String::from_utf8_lossy(answer);
        anyhow::ensure!(answer.starts_with("HTTP/1.1 101"), "the upgrade was refused: {answer}");
        let Some(introduction) = &self.introduction else {
            self.phase = Phase::Ready;
            return Ok(());
        };
        self.phase = Phase::Introducing;
        let hello = Hello {
            token: Some(introduction.token.clone()),
            credit: introduction.credit,
            client: "sanjay-load".to_owned(),
            ..Hello::default()
        };
        self.command(1, Command::Hello(hello))
    }

    fn frame(&mut self, frame: &wire::Frame<'_>, status: &mut Status) -> anyhow::Result<()> {
        match frame.opcode {
            1 => {}
            9 => {
                let mut pong = Vec::new();
                wire::client_frame(10, frame.payload, &mut pong);
                return self.send(&pong);
            }
            10 => return Ok(()),
            8 => anyhow::bail!("the server closed it: {}", String::from_utf8_lossy(frame.payload)),
            other => anyhow::bail!("a frame of kind {other}"),
        }
        let before = status.messages;
        for line in frame.payload.split(|byte| *byte == b'\n') {
            if line.starts_with(MESSAGE) {
                status.messages += 1;
            } else {
                self.event(std::str::from_utf8(line)?, status)?;
            }
        }
        if status.messages > before {
            status.frames += 1;
            status.frame_bytes = frame.size;
        }
        Ok(())
    }

    fn event(&mut self, line: &str, status: &mut Status) -> anyhow::Result<()> {
        for event in json::decode_events(line) {
            match event?.event {
                Event::Ping => {
                    status.pings += 1;
                    let mut answer = Vec::new();
                    wire::client_frame(1, b"{}", &mut answer);
                    self.send(&answer)?;
                }
                Event::Welcome(_) if self.phase == Phase::Introducing => {
                    self.phase = Phase::Subscribing;
                    let channel = self.introduction.take().map(|introduction| introduction.channel);
                    self.command(
                        2,
                        Command::Subscribe(Subscribe {
                            channel: channel.unwrap_or_default(),
                            ..Subscribe::default()
                        }),
                    )?;
                }
                Event::Subscribed(_) if self.phase == Phase::Subscribing => self.phase = Phase::Ready,
                Event::Error(error) => anyhow::bail!("refused in phase {:?}: {}", self.phase, error.message),
                other if status.surprises.len() < MAX_SURPRISES => {
                    status.surprises.push(format!("{other:?}"))
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn command(&mut self, id: u64, command: Command) -> anyhow::Result<()> {
        let (mut text, mut frame) = (Vec::new(), Vec::new());
        json::encode(&Envelope { id: Some(id), command }, &mut text);
        wire::client_frame(1, &text, &mut frame);
        self.send(&frame)
    }

    /// Writes at once: what a client says here always fits a socket's buffer.
    fn send(&mut self, bytes: &[u8]) -> anyhow::Result<()> {
        let written = self.stream.write(bytes)?;
        anyhow::ensure!(written == bytes.len(), "the socket took {written} of {} bytes", bytes.len());
        Ok(())
    }
}
