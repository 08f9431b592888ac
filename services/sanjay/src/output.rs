//! What commands print: results on stdout, one a line and at once, and what goes on beside them on stderr.

use std::io::{self, Write as _};

use anyhow::Context as _;

/// Prints a line on stdout and flushes it, so that a reader at the other end of a pipe has it now.
///
/// # Errors
/// When nobody reads stdout any more; see [`is_closed`].
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).context("cannot write to stdout")
}

/// Prints a line on stderr. Nobody reading it is no reason to stop.
pub(crate) fn status(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Whether the error says that the reader of stdout went away, as `head` does when it has enough.
pub(crate) fn is_closed(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<io::Error>();
    error.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
