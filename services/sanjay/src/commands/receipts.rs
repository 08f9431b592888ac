//! `sanjay receipts`: prints how messages ended, in the order of the log, and where it stopped.

use clap::ValueEnum;
use sanjay_client::{
    Backend, BackendError, DeadReason, DeliveryState, Receipt, ReceiptFilter, ReceiptsRequest,
    ReceiptsResponse, protocol::names,
};
use serde::Serialize;

use crate::{
    commands::when::readable,
    output,
    settings::{ApiArgs, explain},
    signals::interrupted,
};

const HEADER: &str =
    "settled                   state       reason        message_id                            user";

/// Print how messages ended, the oldest first. The last line on standard error is the cursor to go on from
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Wait for more at the end; Ctrl-C ends it
    #[arg(long)]
    follow: bool,
    /// Go on from where an earlier run stopped
    #[arg(long, value_name = "CURSOR", conflicts_with = "from_now")]
    cursor: Option<String>,
    /// Begin with what ends from now on
    #[arg(long, requires = "follow")]
    from_now: bool,
    /// Those of this user
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// Those that this back end sent
    #[arg(long, value_name = "NAME")]
    caller: Option<String>,
    /// Those that ended so; may be given several times
    #[arg(long, value_name = "STATE")]
    state: Vec<End>,
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

/// How a message may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum End {
    /// A client acknowledged it
    Acked,
    /// Its time to live passed
    Expired,
    /// A newer one took its place
    Superseded,
    /// It is a dead letter
    Dead,
}

impl From<End> for DeliveryState {
    fn from(end: End) -> Self {
        match end {
            End::Acked => DeliveryState::Acked,
            End::Expired => DeliveryState::Expired,
            End::Superseded => DeliveryState::Superseded,
            End::Dead => DeliveryState::Dead,
        }
    }
}

#[derive(Serialize)]
struct Json<'a> {
    user: &'a str,
    message_id: &'a str,
    seq: u64,
    state: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'static str,
    caller: &'a str,
    accepted_us: u64,
    settled_us: u64,
}

impl Args {
    /// Prints until the end, or until a signal comes. What was printed is what the cursor stands for.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        for (field, name) in [("user", &self.user), ("caller", &self.caller)] {
            name.iter().try_for_each(|name| names::check(field, name))?;
        }
        let states = self.state.iter().map(|end| DeliveryState::from(*end).into()).collect();
        let filter = ReceiptFilter {
            user: self.user.unwrap_or_default(),
            caller: self.caller.unwrap_or_default(),
            states,
        };
        let request = ReceiptsRequest {
            cursor: self.cursor.unwrap_or_default(),
            from_now: self.from_now,
            filter: Some(filter),
            follow: self.follow,
        };
        let backend = self.api.connect().await?;
        let end = interrupted();
        tokio::pin!(end);
        if !self.json {
            output::line(HEADER)?;
        }
        let given = request.cursor.clone();
        let mut printer = Printer { cursor: given.clone(), json: self.json };
        let result = tokio::select! {
            result = read(&backend, request, &mut printer) => result,
            () = &mut end => Ok(()),
        };
        // A cursor that was given and refused is no place to go on from.
        let is_good = result.is_ok() || printer.cursor != given;
        if is_good && !printer.cursor.is_empty() {
            output::status(&format!("cursor: {}", printer.cursor));
        }
        result
    }
}

/// Reads to the end; a stream that broke is opened again when it is followed.
async fn read(backend: &Backend, mut request: ReceiptsRequest, printer: &mut Printer) -> anyhow::Result<()> {
    loop {
        let mut stream = backend.receipts(request.clone()).await.map_err(explain)?;
        let broken = loop {
            match stream.next().await {
                None => return Ok(()),
                Some(Ok(batch)) => printer.print(batch)?,
                Some(Err(error @ BackendError::StreamEnded(_))) if request.follow => break error,
                Some(Err(error)) => return Err(explain(error)),
            }
        };
        if printer.cursor.is_empty() {
            return Err(explain(broken));
        }
        output::status(&format!("{broken}"));
        request = ReceiptsRequest { cursor: printer.cursor.clone(), from_now: false, ..request };
    }
}

struct Printer {
    /// Of what was printed.
    cursor: String,
    json: bool,
}

impl Printer {
    fn print(&mut self, batch: ReceiptsResponse) -> anyhow::Result<()> {
        for receipt in &batch.receipts {
            output::line(&if self.json { json(receipt)? } else { row(receipt) })?;
        }
        self.cursor = batch.cursor;
        Ok(())
    }
}

fn json(receipt: &Receipt) -> serde_json::Result<String> {
    serde_json::to_string(&Json {
        user: &receipt.user,
        message_id: &receipt.message_id,
        seq: receipt.seq,
        state: state_name(receipt.state()),
        reason: reason_name(receipt.reason()),
        caller: &receipt.caller,
        accepted_us: receipt.accepted_us,
        settled_us: receipt.settled_us,
    })
}

fn row(receipt: &Receipt) -> String {
    let (state, reason) = (state_name(receipt.state()), reason_name(receipt.reason()));
    let (settled, id, user) = (readable(receipt.settled_us), &receipt.message_id, clean(&receipt.user));
    format!("{settled}  {state:<10}  {reason:<12}  {id:<36}  {user}")
}

/// A state as one says it.
pub(super) fn state_name(state: DeliveryState) -> &'static str {
    match state {
        DeliveryState::Accepted => "accepted",
        DeliveryState::Acked => "acked",
        DeliveryState::Expired => "expired",
        DeliveryState::Superseded => "superseded",
        DeliveryState::Dead => "dead",
        DeliveryState::Scheduled => "scheduled",
        DeliveryState::Unspecified => "unknown",
    }
}

/// Why a message is dead, as one says it; empty for none.
pub(super) fn reason_name(reason: DeadReason) -> &'static str {
    match reason {
        DeadReason::MaxAttempts => "max_attempts",
        DeadReason::Terminated => "terminated",
        DeadReason::QueueFull => "queue_full",
        DeadReason::Expired => "expired",
        DeadReason::Unspecified => "",
    }
}

/// What clients and back ends wrote must not reach the terminal with control characters.
pub(super) fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_below_the_header() {
        let receipt = Receipt {
            user: "bo\u{7}b".into(),
            message_id: "01890a5d-ac96-774b-bcce-b302099a8057".into(),
            seq: 3,
            state: DeliveryState::Dead.into(),
            caller: "shop".into(),
            accepted_us: 1_700_000_000_000_000,
            settled_us: 1_700_000_001_000_000,
            reason: DeadReason::Terminated.into(),
        };
        let row = row(&receipt);
        for (word, value) in [("state", "dead"), ("reason", "term"), ("message_id", "0189"), ("user", "bob")]
        {
            assert_eq!(HEADER.find(word), row.find(value), "{word}");
        }
        let value: serde_json::Value = serde_json::from_str(&json(&receipt).unwrap()).unwrap();
        assert_eq!((&value["state"], &value["reason"]), (&"dead".into(), &"terminated".into()));
        let acked = Receipt { state: DeliveryState::Acked.into(), reason: 0, ..receipt };
        assert!(!json(&acked).unwrap().contains("reason"));
    }
}
