//! What a connection and a delivery cost an edge, measured from outside the process and set beside what the
//! kernel alone takes for the same bytes.
//!
//! The edge, a router and a delivery node run as three processes; the load client and the raw writer are
//! processes of their own, started from this binary.

mod client;
mod cluster;
mod fanout;
mod idle;
mod inbox;
mod measure;
mod orders;
mod process;
mod publisher;
mod raw;
mod report;
mod wire;

use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Parser, Subcommand};

/// Measures RSS and CPU per connection, and CPU per delivery over a raw write, of the release build.
#[derive(Debug, Parser)]
#[command(name = "sanjay-load")]
struct Options {
    /// Idle connections.
    #[arg(long, default_value_t = 15_000, value_parser = clap::value_parser!(u32).range(1..=19_000))]
    connections: u32,
    /// Connections of one channel of the idle phase.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    per_channel: u32,
    /// Sockets of the fan-out's channel.
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=19_000))]
    subscribers: u32,
    /// Messages of a round.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    messages: u32,
    /// Blocks of four rounds: raw, edge, edge, raw.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=20))]
    blocks: u32,
    /// Bytes of a payload.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    payload: u32,
    /// Leave the inbox out: the connections say `credit` 0.
    #[arg(long)]
    no_inbox: bool,
    /// Shards of the edge.
    #[arg(long, default_value_t = 1)]
    shards: u32,
    /// Longest time for one step, in seconds.
    #[arg(long, default_value_t = 120)]
    step_seconds: u64,
    /// The server; by default the `sanjay` beside this binary.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Sends with acks, a backlog, and channels without the database, instead of the edge alone.
    Inbox(inbox::Options),
    /// The load client; takes orders on standard input.
    #[command(hide = true)]
    Client,
    /// The raw writer; takes orders on standard input.
    #[command(hide = true)]
    Raw {
        /// How many sockets to accept.
        #[arg(long)]
        sockets: u32,
    },
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    match options.part {
        Some(Part::Client) => client::run(),
        Some(Part::Inbox(inbox)) => inbox::run(&inbox),
        Some(Part::Raw { sockets }) => raw::run(sockets as usize),
        None => bench(&options),
    }
}

fn bench(options: &Options) -> anyhow::Result<()> {
    let idle = idle::measure(options).context("the idle phase")?;
    let fanout = fanout::measure(options).context("the fan-out phase")?;
    report::conclude(&report::Report::new(idle, fanout), options.json)
}
