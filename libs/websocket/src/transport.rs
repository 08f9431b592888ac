//! The byte stream under a connection, in the form that a connection without buffers needs: wait for
//! readiness, then try.

use std::io;
use std::task::{Context, Poll};
use tokio::net::TcpStream;

/// A byte stream that can be polled for readiness and tried without waiting.
///
/// All methods take `&self`, so that the side that fans out may write while the connection's own task waits to
/// read. Readiness is a hint: a try that follows may still answer [`io::ErrorKind::WouldBlock`], and only that
/// answer makes the next poll wait. Each direction keeps the waker of the last poll only.
pub trait Transport: 'static {
    /// Waits until a read may make progress (bytes, end of stream or an error).
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Waits until a write may make progress.
    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Reads what is there, up to `buf.len()` bytes; 0 is the end of the stream.
    fn try_read(&self, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes a prefix of `buf` and returns its length.
    fn try_write(&self, buf: &[u8]) -> io::Result<usize>;

    /// Writes a prefix of the concatenation of `bufs` and returns its length.
    fn try_write_vectored(&self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize>;

    /// Ends the sending direction after everything that was written, so that the peer sees the end of the stream
    /// while its own last bytes can still be read. Closing a socket with unread bytes resets it instead, and the
    /// reset may overtake a close frame. Streams that cannot close by halves keep this default, which does nothing.
    fn shutdown_write(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for TcpStream {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_read_ready(cx)
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_ready(cx)
    }

    fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        Self::try_read(self, buf)
    }

    fn try_write(&self, buf: &[u8]) -> io::Result<usize> {
        Self::try_write(self, buf)
    }

    fn try_write_vectored(&self, bufs: &[io::IoSlice<'_>]) -> io::Result<usize> {
        Self::try_write_vectored(self, bufs)
    }

    fn shutdown_write(&self) -> io::Result<()> {
        socket2::SockRef::from(self).shutdown(std::net::Shutdown::Write)
    }
}
