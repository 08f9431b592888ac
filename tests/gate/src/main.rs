//! Counts the instructions that the hot paths take, and compares them with a committed baseline.
//!
//! Instructions do not depend on how busy a machine is, so that a change of a few per cent is seen where a time
//! would drown in noise. Valgrind's callgrind counts them while one fixed piece of work runs, each case in a
//! process of its own; what prepares the work is not counted.

mod baseline;
mod callgrind;
mod report;

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;

use self::{baseline::Baseline, callgrind::Cases};

/// Count the instructions of the hot paths and compare them with the baseline
#[derive(Debug, Parser)]
#[command(name = "tests/run gate")]
struct Options {
    /// Write what is counted now as the new baseline
    #[arg(long)]
    record: bool,
    /// Only cases whose name holds this
    #[arg(conflicts_with = "record")]
    filter: Option<String>,
    /// The baseline's file
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/baseline.json"))]
    baseline: PathBuf,
}

fn main() -> ExitCode {
    match gate(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            report::error(&error);
            ExitCode::FAILURE
        }
    }
}

/// Says whether the gate is passed.
fn gate(options: &Options) -> anyhow::Result<bool> {
    let known = if options.record { None } else { Some(Baseline::read(&options.baseline)?) };
    let mut now = Baseline::here()?;
    let wanted = |name: &str| options.filter.as_ref().is_none_or(|filter| name.contains(filter.as_str()));
    let cases = Cases::find()?;
    for case in cases.list()?.iter().filter(|case| wanted(&case.name)) {
        now.set(&case.name, cases.count(&case.name)?, case.operations);
    }
    let Some(known) = known else {
        now.write(&options.baseline)?;
        report::recorded(&now, &options.baseline);
        return Ok(true);
    };
    Ok(report::compare(&known, &now, &wanted))
}
