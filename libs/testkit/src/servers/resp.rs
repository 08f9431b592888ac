//! Just enough of Redis's protocol to send one command and read its reply.

use std::io;

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

/// What Redis answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// Nothing there.
    Nil,
    /// A status, such as `OK`.
    Status(String),
    /// An error's text.
    Error(String),
    /// A number.
    Integer(i64),
    /// Bytes.
    Bytes(Vec<u8>),
    /// Several replies.
    Array(Vec<Reply>),
}

impl Reply {
    /// A status or bytes as text.
    ///
    /// # Panics
    /// When it is something else.
    #[must_use]
    pub fn text(&self) -> &str {
        match self {
            Reply::Status(text) => text,
            Reply::Bytes(bytes) => std::str::from_utf8(bytes).expect("a text is UTF-8"),
            other => panic!("no text: {other:?}"),
        }
    }

    /// A number.
    ///
    /// # Panics
    /// When it is something else.
    #[must_use]
    pub fn integer(&self) -> i64 {
        match self {
            Reply::Integer(number) => *number,
            other => panic!("no number: {other:?}"),
        }
    }
}

/// A connection.
pub(super) struct Connection(BufReader<TcpStream>);

impl Connection {
    pub(super) async fn open(port: u16) -> io::Result<Self> {
        Ok(Self(BufReader::new(TcpStream::connect(("127.0.0.1", port)).await?)))
    }

    pub(super) async fn call(&mut self, command: &[&[u8]]) -> io::Result<Reply> {
        let mut request = format!("*{}\r\n", command.len()).into_bytes();
        for part in command {
            request.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
            request.extend_from_slice(part);
            request.extend_from_slice(b"\r\n");
        }
        self.0.write_all(&request).await?;
        self.reply().await
    }

    async fn reply(&mut self) -> io::Result<Reply> {
        let mut line = String::new();
        self.0.read_line(&mut line).await?;
        let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("no reply: {line:?}"));
        let (kind, rest) = line.trim_end_matches("\r\n").split_at_checked(1).ok_or_else(bad)?;
        let number = || rest.parse::<i64>().map_err(|_| bad());
        Ok(match kind {
            "+" => Reply::Status(rest.to_owned()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Integer(number()?),
            "$" => match usize::try_from(number()?) {
                Ok(length) => {
                    let mut bytes = vec![0; length + 2];
                    self.0.read_exact(&mut bytes).await?;
                    bytes.truncate(length);
                    Reply::Bytes(bytes)
                }
                Err(_) => Reply::Nil,
            },
            "*" => match usize::try_from(number()?) {
                Ok(length) => {
                    let mut replies = Vec::new();
                    for _ in 0..length {
                        replies.push(Box::pin(self.reply()).await?);
                    }
                    Reply::Array(replies)
                }
                Err(_) => Reply::Nil,
            },
            _ => return Err(bad()),
        })
    }
}
