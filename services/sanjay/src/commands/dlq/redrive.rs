//! `sanjay dlq redrive`: has dead letters sent to their users again, and shows how far that is.

use std::io::IsTerminal as _;

use anyhow::{anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use sanjay_client::{RedriveDeadLettersRequest, RedriveDeadLettersResponse, RedriveStream};
use serde::Serialize;

use super::{FilterArgs, letters, parse_id};
use crate::{
    output,
    settings::{ApiArgs, explain},
};

/// Send dead letters to their users again, as new messages, in the order in which they died. Repeating it sends
/// nothing twice; Ctrl-C ends it
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// This one alone
    #[arg(requires = "user")]
    message_id: Option<String>,
    #[command(flatten)]
    filter: FilterArgs,
    /// So many a second
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// Count them, and send nothing
    #[arg(long)]
    dry_run: bool,
    /// Print one line of JSON at the end
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Serialize)]
struct Result<'a> {
    total: u64,
    examined: u64,
    redriven: u64,
    failed: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    problem: &'a str,
}

impl Args {
    /// Waits until all are sent, or counted.
    ///
    /// # Errors
    /// When some could not be sent, or it was cut off.
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let request = RedriveDeadLettersRequest {
            filter: Some(self.filter.filter(false)?),
            message_id: self.message_id.as_deref().map(parse_id).transpose()?.unwrap_or_default(),
            rate: self.rate,
            dry_run: self.dry_run,
        };
        let backend = self.api.connect().await?;
        let stream = backend.redrive_dead_letters(request).await.map_err(explain)?;
        let end = follow(stream).await?;
        if self.json {
            let RedriveDeadLettersResponse { total, examined, redriven, failed, problem, .. } = &end;
            let (total, examined, redriven, failed) = (*total, *examined, *redriven, *failed);
            output::line(&serde_json::to_string(&Result { total, examined, redriven, failed, problem })?)?;
        } else {
            output::line(&sentence(&end, self.dry_run))?;
        }
        match end.failed {
            0 => Ok(()),
            failed => {
                bail!("{failed} of {} could not be sent; the last: {}", letters(end.total), end.problem)
            }
        }
    }
}

fn sentence(end: &RedriveDeadLettersResponse, dry_run: bool) -> String {
    if dry_run && !end.problem.is_empty() {
        return format!("0 of {} would be sent again: {}", letters(end.total), end.problem);
    }
    if dry_run {
        return format!("{} would be sent again", letters(end.examined));
    }
    let note =
        if end.failed == 0 && !end.problem.is_empty() { format!(": {}", end.problem) } else { String::new() };
    format!("{} of {} sent again{note}", end.redriven, letters(end.total))
}

/// Follows it to its end, with a bar on standard error when that is a terminal.
async fn follow(mut stream: RedriveStream) -> anyhow::Result<RedriveDeadLettersResponse> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {elapsed} {msg}");
    bar.set_style(style.expect("the template is a constant"));
    let mut last = None;
    let failure = loop {
        match stream.next().await {
            None => break None,
            Some(Err(error)) => break Some(error),
            Some(Ok(answer)) => {
                bar.set_length(answer.total);
                bar.set_position(answer.examined);
                if answer.failed > 0 {
                    bar.set_message(format!("{} not sent", answer.failed));
                }
                last = Some(answer);
            }
        }
    };
    bar.finish_and_clear();
    match (failure, last) {
        (Some(error), last) => {
            if let Some(last) = last {
                output::status(&format!("{} were sent before it ended", letters(last.redriven)));
            }
            Err(explain(error))
        }
        (None, last) => last.ok_or_else(|| anyhow!("the server said nothing of the redrive")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_is_told_in_a_sentence() {
        let end = RedriveDeadLettersResponse { total: 3, examined: 3, redriven: 2, ..Default::default() };
        assert_eq!(sentence(&end, false), "2 of 3 dead letters sent again");
        assert_eq!(sentence(&end, true), "3 dead letters would be sent again");
        let one = RedriveDeadLettersResponse {
            total: 1,
            examined: 1,
            problem: "it was sent again already, as x".into(),
            ..Default::default()
        };
        assert_eq!(sentence(&one, false), "0 of 1 dead letter sent again: it was sent again already, as x");
        assert_eq!(
            sentence(&one, true),
            "0 of 1 dead letter would be sent again: it was sent again already, as x"
        );
    }
}
