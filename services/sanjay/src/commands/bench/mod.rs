//! `sanjay bench`: loads a running server and says how fast it answered, and whether anything was lost.
//!
//! Each bench is back end and client in one process, so that one monotonic clock measures from end to end. Load
//! comes by a schedule that does not wait for answers (see `pace.rs`), and a latency begins when its message was
//! due: a server that stalls is charged for everything that had to wait.

mod connect;
mod edge;
mod fanout;
mod inbox;
mod latency;
mod pace;
mod problems;
mod progress;
mod report;
mod sockets;
mod stamp;
mod tally;
mod target;

use std::time::Duration;

use anyhow::Context as _;
use clap::Subcommand;

use self::{pace::MAX_RATE, report::Report};
use crate::output;

/// Longest measurement or warm-up.
const MAX_DURATION: Duration = Duration::from_secs(60 * 60);

/// Load a running server, and say how fast it answered and whether anything was lost
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Debug, Subcommand)]
enum Bench {
    Connect(connect::Args),
    Fanout(fanout::Args),
    Inbox(inbox::Args),
}

/// What every bench can be told.
#[derive(Debug, Clone, clap::Args)]
struct LoadArgs {
    /// How long to measure, such as 500ms, 10s or 2m
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,
    /// How long to run before that; 0s for not at all
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = parse_duration)]
    warm_up: Duration,
    /// Print the result as one JSON object
    #[arg(long)]
    json: bool,
}

impl LoadArgs {
    /// Prints the result. A run in which something went wrong is an error, after its figures.
    fn conclude(&self, report: &impl Report) -> anyhow::Result<()> {
        if self.json {
            output::line(&serde_json::to_string(report)?)?;
        } else {
            for line in report.lines() {
                output::line(&line)?;
            }
        }
        report.verdict()
    }
}

impl Args {
    /// Runs the bench until it is over or a signal comes, and prints what was measured.
    ///
    /// # Errors
    /// Says what was wrong with the arguments, where no server answered, or what was lost.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self.bench {
            Bench::Connect(args) => Box::pin(args.run()).await,
            Bench::Fanout(args) => Box::pin(args.run()).await,
            Bench::Inbox(args) => Box::pin(args.run()).await,
        }
    }
}

fn parse_duration(text: &str) -> anyhow::Result<Duration> {
    let help = "give a number with its unit, such as 500ms, 10s or 2m, at most 60m";
    let at = text.find(|c: char| !c.is_ascii_digit()).context(help)?;
    let number: u64 = text[..at].parse().ok().context(help)?;
    let unit = match &text[at..] {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        _ => anyhow::bail!(help),
    };
    let duration = number.checked_mul(unit).map(Duration::from_millis);
    duration.filter(|duration| *duration <= MAX_DURATION).context(help)
}

fn parse_rate(text: &str) -> anyhow::Result<f64> {
    let rate: Option<f64> = text.parse().ok().filter(|rate| (0.1..=MAX_RATE).contains(rate));
    rate.with_context(|| format!("give a number for each second, from 0.1 to {MAX_RATE:.0}"))
}

/// A size in bytes that has room for the stamp.
fn parse_size(text: &str) -> anyhow::Result<usize> {
    let most = sanjay_client::protocol::limits::MAX_PAYLOAD_BYTES;
    let size: Option<usize> = text.parse().ok().filter(|size| (stamp::MIN_BYTES..=most).contains(size));
    size.with_context(|| {
        format!("give a number of bytes from {} (the bench's own stamp) to {most}", stamp::MIN_BYTES)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_bounded_and_explained() {
        assert_eq!(parse_duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(parse_duration("60m").unwrap(), MAX_DURATION);
        assert_eq!(parse_duration("0s").unwrap(), Duration::ZERO);
        for text in ["", "1", "s", "1h", "61m", "-1s", "99999999999999999999s", "9999999999999999999m", "1é"]
        {
            assert!(parse_duration(text).unwrap_err().to_string().contains("500ms"), "{text}");
        }
        for text in ["0", "-1", "NaN", "inf", "2000000", ""] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
        assert!((parse_rate("2.5").unwrap() - 2.5).abs() < f64::EPSILON);
        assert_eq!(parse_size("64").unwrap(), 64);
        assert!(parse_size("63").is_err() && parse_size("65537").is_err());
    }
}
