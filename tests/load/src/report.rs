//! What the bench prints: the result on standard output, progress on standard error.

use std::io::Write as _;

use serde::Serialize;

use crate::{fanout::Fanout, idle::Idle, process};

/// Resident memory of the edge that a connection may take, in bytes.
const BUDGET_RSS_BYTES: f64 = 4096.0;
/// CPU of a delivery that an edge may take, in raw writes.
const BUDGET_OVER_RAW: f64 = 1.3;

/// What was measured, and how.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Whether the edge and the raw writer had a core of their own, and the clients another.
    pub pinned: bool,
    pub idle: Idle,
    pub fanout: Fanout,
}

impl Report {
    pub(crate) fn new(idle: Idle, fanout: Fanout) -> Self {
        Self { pinned: process::can_pin(), idle, fanout }
    }
}

/// Prints the result, and on standard error whether it keeps to the budgets, as a test run would.
///
/// # Errors
/// When it does not.
pub(crate) fn conclude(report: &Report, json: bool) -> anyhow::Result<()> {
    print(report, json)?;
    let budgets = [
        ("RSS per connection, bytes", report.idle.rss_bytes_per_connection, BUDGET_RSS_BYTES),
        ("CPU of a delivery, raw writes", report.fanout.edge_over_raw, BUDGET_OVER_RAW),
    ];
    let (kept, broken): (Vec<_>, Vec<_>) = budgets.iter().partition(|(_, value, budget)| value < budget);
    for (what, value, budget) in &broken {
        progress(&format!("over budget: {what}: {value:.2}, not below {budget}"));
    }
    writeln!(std::io::stderr().lock(), "{} passed, {} failed", kept.len(), broken.len())?;
    anyhow::ensure!(broken.is_empty(), "over budget");
    Ok(())
}

fn print(report: &Report, json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, report)?;
        return Ok(writeln!(out)?);
    }
    let Report { idle, fanout, pinned } = report;
    writeln!(out, "edge alone, release build{}", if *pinned { ", pinned" } else { "" })?;
    writeln!(
        out,
        "{} connections on {} channels, {} the inbox, heartbeat on",
        idle.connections,
        idle.channels,
        if idle.inbox { "with" } else { "without" }
    )?;
    writeln!(out, "  RSS per connection   {:>9.0} bytes", idle.rss_bytes_per_connection)?;
    writeln!(out, "  CPU per connect      {:>9.1} µs", idle.cpu_us_per_connect)?;
    writeln!(out, "  connects             {:>9.0} /s", idle.connects_per_second)?;
    writeln!(
        out,
        "{} bytes to {} sockets of one channel (frames of {} bytes)",
        fanout.payload_bytes, fanout.subscribers, fanout.frame_bytes
    )?;
    for round in &fanout.rounds {
        writeln!(
            out,
            "  {:<4}  {:>7.3} CPU-s per million   {:>7.1} ms to the last socket (p50)",
            format!("{:?}", round.side).to_lowercase(),
            round.cpu_s_per_million,
            round.spread_ms_p50
        )?;
    }
    writeln!(
        out,
        "  edge {:.3} / raw {:.3} = {:.3}",
        fanout.edge_cpu_s_per_million, fanout.raw_cpu_s_per_million, fanout.edge_over_raw
    )?;
    Ok(())
}

/// Prints a line of a result.
///
/// # Errors
/// When nobody reads standard output.
pub(crate) fn line(result: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout().lock(), "{result}")?)
}

/// Says what is going on.
pub(crate) fn progress(what: &str) {
    // Nobody to tell when standard error is gone.
    let _ = writeln!(std::io::stderr().lock(), "sanjay-load: {what}");
}

/// `part / whole`, of numbers far below 2⁵³.
pub(crate) fn ratio(part: u64, whole: f64) -> f64 {
    part as f64 / whole
}
