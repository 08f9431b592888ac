//! `sanjay deliveries`: the messages of one user, the newest first.

use std::num::NonZeroU64;

use clap::ValueEnum;
use sanjay_client::{DeliveryState, ListDeliveriesRequest, ListedDelivery, protocol::names};
use serde::Serialize;

use crate::{
    commands::{
        receipts::{clean, reason_name, state_name},
        when::readable,
    },
    output,
    settings::{ApiArgs, explain},
};

/// Deliveries of one call.
const PAGE: u64 = 256;

const HEADER: &str =
    "accepted                  state       seq        message_id                            from";

/// List the messages of a user, the newest first: those that wait, and those that ended within 7 days
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The user
    user: String,
    /// Those in this state; may be given several times
    #[arg(long, value_name = "STATE")]
    state: Vec<Wanted>,
    /// Those that this back end sent
    #[arg(long, value_name = "NAME")]
    caller: Option<String>,
    /// At most so many
    #[arg(long, value_name = "N", default_value = "100")]
    limit: NonZeroU64,
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

/// Where a message may be in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Wanted {
    /// It waits for its time
    Scheduled,
    /// It waits to be acknowledged
    Accepted,
    /// A client acknowledged it
    Acked,
    /// Its time to live passed
    Expired,
    /// A newer one took its place
    Superseded,
    /// It is a dead letter
    Dead,
}

impl From<Wanted> for DeliveryState {
    fn from(wanted: Wanted) -> Self {
        match wanted {
            Wanted::Scheduled => DeliveryState::Scheduled,
            Wanted::Accepted => DeliveryState::Accepted,
            Wanted::Acked => DeliveryState::Acked,
            Wanted::Expired => DeliveryState::Expired,
            Wanted::Superseded => DeliveryState::Superseded,
            Wanted::Dead => DeliveryState::Dead,
        }
    }
}

#[derive(Serialize)]
struct Json<'a> {
    message_id: &'a str,
    seq: u64,
    state: &'static str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'static str,
    caller: &'a str,
    accepted_us: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    settled_us: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    deliver_at_us: Option<u64>,
}

impl Args {
    /// Prints a page while the next is not asked for yet, so that the list may be as long as it likes.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        names::check("user", &self.user)?;
        self.caller.iter().try_for_each(|caller| names::check("caller", caller))?;
        let mut request = ListDeliveriesRequest {
            user: self.user,
            states: self.state.iter().map(|wanted| DeliveryState::from(*wanted).into()).collect(),
            caller: self.caller.unwrap_or_default(),
            ..ListDeliveriesRequest::default()
        };
        let backend = self.api.connect().await?;
        let mut left = self.limit.get();
        if !self.json {
            output::line(HEADER)?;
        }
        while left > 0 {
            request.page_size = left.min(PAGE) as u32;
            let page = backend.list_deliveries(request.clone()).await.map_err(explain)?;
            left -= left.min(page.deliveries.len() as u64);
            for found in &page.deliveries {
                output::line(&if self.json { json(found)? } else { row(found) })?;
            }
            request.page_token = page.next_page_token;
            if request.page_token.is_empty() {
                return Ok(());
            }
        }
        output::status(&format!("more follow these {}; give a higher --limit", self.limit));
        Ok(())
    }
}

fn json(found: &ListedDelivery) -> serde_json::Result<String> {
    let given = |us: u64| (us != 0).then_some(us);
    serde_json::to_string(&Json {
        message_id: &found.message_id,
        seq: found.seq,
        state: state_name(found.state()),
        reason: reason_name(found.reason()),
        caller: &found.caller,
        accepted_us: found.accepted_us,
        settled_us: given(found.settled_us),
        deliver_at_us: given(found.deliver_at_us),
    })
}

fn row(found: &ListedDelivery) -> String {
    let ListedDelivery { message_id, seq, caller, accepted_us, deliver_at_us, .. } = found;
    let (accepted, state) = (readable(*accepted_us), state_name(found.state()));
    let more = match (found.reason(), *deliver_at_us) {
        (_, at) if at > 0 => format!("  (for {})", readable(at)),
        (reason, _) if !reason_name(reason).is_empty() => format!("  ({})", reason_name(reason)),
        _ => String::new(),
    };
    format!("{accepted}  {state:<10}  {seq:<9}  {message_id:<36}  {}{more}", clean(caller))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_stand_below_the_header() {
        let found = ListedDelivery {
            message_id: "01890a5d-ac96-774b-bcce-b302099a8057".into(),
            seq: 7,
            state: DeliveryState::Acked.into(),
            caller: "sh\u{1b}op".into(),
            accepted_us: 1_700_000_000_000_000,
            settled_us: 1_700_000_001_000_000,
            ..ListedDelivery::default()
        };
        let line = row(&found);
        for (word, value) in [("state", "acked"), ("seq", "7 "), ("message_id", "0189"), ("from", "shop")] {
            assert_eq!(HEADER.find(word), line.find(value), "{word}");
        }
        let waits = ListedDelivery { deliver_at_us: 1_700_000_002_000_000, ..found };
        assert!(row(&waits).ends_with("(for 2023-11-14T22:13:22.000Z)"));
    }
}
