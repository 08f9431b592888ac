//! Breaks each part of a cluster of real processes under load, and compares what was accepted with what arrived: the
//! rows of the fault matrix that touch delivery. A row is a test; it fails when something is lost, unexpected, out of
//! order or applied twice, and also when too little was accepted or its fault did not land.

mod history;
mod rows;
mod run;
mod senders;
mod storm;
mod users;

use std::{
    io::Write as _,
    panic::AssertUnwindSafe,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use futures::{
    FutureExt as _,
    stream::{self, StreamExt as _},
};
use history::Report;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rows::Row;
use storm::{Context, Outcome};

/// Rows of a short run at once: most of a row is waiting.
const AT_ONCE: usize = 3;

/// Breaks each part under load, and compares what was accepted with what arrived.
#[derive(Debug, Parser)]
#[command(name = "sanjay-chaos")]
struct Options {
    /// A few seconds a row, as in CI, instead of a minute.
    #[arg(long)]
    short: bool,
    /// Only rows whose name begins with this; may be given several times.
    #[arg(long, value_name = "NAME")]
    row: Vec<String>,
    /// Repeats a run's random choices.
    #[arg(long)]
    seed: Option<u64>,
    /// Prints the names of the rows.
    #[arg(long)]
    list: bool,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    let chosen =
        |row: &Row| options.row.is_empty() || options.row.iter().any(|name| row.name.starts_with(name));
    let rows: Vec<Row> = rows::all().into_iter().filter(chosen).collect();
    anyhow::ensure!(!rows.is_empty(), "no row has such a name; --list shows them");
    if options.list {
        rows.iter().for_each(|row| say(row.name));
        return Ok(ExitCode::SUCCESS);
    }
    let seed = options.seed.unwrap_or_else(|| StdRng::from_os_rng().random());
    let at_once = if options.short { AT_ONCE } else { 1 };
    let ended = stream::iter(rows).map(|row| perform(row, seed, options.short));
    let ended: Vec<(Outcome, bool)> = ended.buffered(at_once).collect().await;
    let ended: Vec<_> = ended.into_iter().filter(|(outcome, _)| outcome.skipped.is_none()).collect();
    let mut sum = Report::default();
    ended.iter().for_each(|(outcome, _)| sum.add(&outcome.report));
    let failed = ended.iter().filter(|(_, passed)| !passed).count();
    say(&format!("all: {sum} seed={seed}"));
    say(&format!("{} passed, {failed} failed", ended.len() - failed));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs a row and says what came of it. The flag says whether it passed.
async fn perform(row: Row, seed: u64, short: bool) -> (Outcome, bool) {
    let context = Context { seed, short, store: row.store };
    let limit = Duration::from_secs(if short { 240 } else { 480 });
    let began = Instant::now();
    // What panics is a row that failed.
    let row_ends = AssertUnwindSafe(tokio::time::timeout(limit, (row.run)(context))).catch_unwind();
    let failed = |why: String| Outcome { problems: vec![why], ..Outcome::default() };
    let outcome = match row_ends.await {
        Ok(Ok(Ok(outcome))) => outcome,
        Ok(Ok(Err(error))) => failed(format!("{error:#}")),
        Ok(Err(_)) => failed(format!("not done within {} s", limit.as_secs())),
        Err(_) => failed("it panicked; standard error says why".to_owned()),
    };
    if let Some(why) = outcome.skipped {
        say(&format!("{}: skipped: {why}", row.name));
        return (outcome, true);
    }
    let passed = outcome.problems.is_empty();
    let seconds = began.elapsed().as_secs();
    say(&format!("{}: {} seed={seed}", row.name, outcome.report));
    // Beside the lines that are read by programs.
    let _ = writeln!(std::io::stderr().lock(), "{}: {seconds} s", row.name);
    for problem in &outcome.problems {
        say(&format!("    FAILED after {seconds} s: {problem}"));
    }
    if !passed {
        outcome.notes.iter().for_each(|note| say(&format!("    {note}")));
        say(&format!(
            "    again: tests/run chaos {}--row {} --seed {seed}",
            if short { "--short " } else { "" },
            row.name
        ));
    }
    (outcome, passed)
}

fn say(line: &str) {
    // Nobody to tell when standard output is gone.
    let _ = writeln!(std::io::stdout().lock(), "{line}");
}
