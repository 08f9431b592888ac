//! The `sanjay` binary: every role of a server, and the commands of a client.

mod allocator;
mod cli;
mod commands;
mod output;
mod payload;
mod serve;
mod settings;
mod signals;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
