//! `sanjay trace`: shows the way of a recent message through the services.

use anyhow::{Context as _, bail};
use sanjay_client::GetTraceResponse;
use serde::Serialize;
use uuid::Uuid;

use crate::{
    output,
    settings::{ApiArgs, explain},
};

/// Show the way of a recent message through the services
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What `pub`, `send` and `sub` print as message_id
    message_id: String,
    /// Print one line of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Serialize)]
struct Trace<'a> {
    message_id: &'a str,
    milestones: Vec<Milestone<'a>>,
    missing: &'a [String],
}

#[derive(Serialize)]
struct Milestone<'a> {
    time_us: u64,
    service: &'a str,
    stage: &'a str,
    detail: &'a str,
}

impl Args {
    /// Prints the milestones in the order of their times.
    ///
    /// # Errors
    /// When nothing is remembered of the message, or the server cannot be asked.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        let id = Uuid::parse_str(&self.message_id);
        let id =
            id.with_context(|| format!("{:?} is no message id; one is a UUID", self.message_id))?.to_string();
        let backend = self.api.connect().await?;
        let trace = backend.get_trace(&id).await.map_err(explain)?;
        for service in &trace.missing {
            output::status(&format!("{service} could not be asked; its part of the way is missing"));
        }
        if trace.milestones.is_empty() {
            bail!(
                "nothing is known of message {id}; only recent messages are remembered, and only until a restart"
            );
        }
        if self.json {
            return output::line(&json(&id, &trace)?);
        }
        table(&trace).iter().try_for_each(|row| output::line(row))
    }
}

fn json(id: &str, trace: &GetTraceResponse) -> serde_json::Result<String> {
    let milestones = trace.milestones.iter().map(|m| Milestone {
        time_us: m.time_us,
        service: &m.service,
        stage: &m.stage,
        detail: &m.detail,
    });
    serde_json::to_string(&Trace {
        message_id: id,
        milestones: milestones.collect(),
        missing: &trace.missing,
    })
}

/// A header and a row for each milestone, with the time since the first.
fn table(trace: &GetTraceResponse) -> Vec<String> {
    let first = trace.milestones.iter().map(|m| m.time_us).min().unwrap_or(0);
    let time = |us: u64| format!("{}.{:03}", (us - first) / 1_000, (us - first) % 1_000);
    let mut rows = vec![["ms".to_owned(), "service".to_owned(), "stage".to_owned(), "detail".to_owned()]];
    rows.extend(trace.milestones.iter().map(|m| {
        // Details come from other processes: a control character must not reach the terminal.
        let clean = |text: &str| text.chars().filter(|c| !c.is_control()).collect::<String>();
        [time(m.time_us), clean(&m.service), clean(&m.stage), clean(&m.detail)]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    // Of every usual trace, so that the columns stand where they stood for the last one.
    let (times, services, stages) = (width(0).max(9), width(1).max(8), width(2).max(10));
    let row = |[time, service, stage, detail]: &[String; 4]| {
        format!("{time:>times$}  {service:<services$}  {stage:<stages$}  {detail}").trim_end().to_owned()
    };
    rows.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use sanjay_proto::edge::v1::Milestone;

    #[test]
    fn columns_are_aligned_and_times_are_relative() {
        let milestone = |time_us, service: &str, stage: &str, detail: &str| Milestone {
            message_id: Vec::new().into(),
            time_us,
            service: service.into(),
            stage: stage.into(),
            detail: detail.into(),
        };
        let milestones = vec![
            milestone(1_000_000, "delivery", "accepted", "seq 3"),
            milestone(1_012_345, "edge", "written", "1 \u{1b}socket"),
            milestone(1_100_000, "edge", "acked", ""),
        ];
        let trace = GetTraceResponse { milestones, missing: vec!["router".into()] };
        let expected = [
            "       ms  service   stage       detail",
            "    0.000  delivery  accepted    seq 3",
            "   12.345  edge      written     1 socket",
            "  100.000  edge      acked",
        ];
        assert_eq!(table(&trace), expected);
        let json: serde_json::Value = serde_json::from_str(&json("id", &trace).unwrap()).unwrap();
        assert_eq!(json["milestones"][0]["time_us"], 1_000_000);
        assert_eq!(json["missing"][0], "router");
    }
}
