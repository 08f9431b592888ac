//! `sanjay history`: prints what a channel keeps, as a back end.

use std::str::FromStr;

use anyhow::{anyhow, ensure};
use sanjay_client::protocol::{
    Event, EventEnvelope, Payload, Position, event::Message, json, limits::MAX_HISTORY_LIMIT, names,
};

use crate::{
    commands::{receipts::clean, when::readable},
    output,
    settings::{ApiArgs, explain},
};

/// Print what a channel keeps, in order; its namespace must have a history
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The channel
    channel: String,
    /// Print what follows this position, instead of the newest messages; a run says at its end where the channel stands
    #[arg(long, value_name = "EPOCH:OFFSET")]
    since: Option<Since>,
    /// Most messages
    #[arg(long, value_name = "N", default_value_t = 100)]
    limit: u32,
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

/// A position as it is written on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Since(Position);

impl FromStr for Since {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let wrong = || anyhow!("write it as EPOCH:OFFSET, such as 34f2dcf7e289e201:17");
        let (epoch, offset) = text.rsplit_once(':').ok_or_else(wrong)?;
        let position = Position { epoch: epoch.to_owned(), offset: offset.parse().map_err(|_| wrong())? };
        position.check("since").map_err(|error| anyhow!(error.message))?;
        Ok(Self(position))
    }
}

impl Args {
    /// Prints page by page, up to the limit.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        names::check("channel", &self.channel)?;
        ensure!(self.limit > 0, "--limit is 0; ask for at least 1 message");
        let backend = self.api.connect().await?;
        let (mut since, mut left) = (self.since.map(|Since(position)| position), self.limit);
        loop {
            let limit = left.min(MAX_HISTORY_LIMIT as u32);
            let page = backend.history(&self.channel, since.as_ref(), limit).await.map_err(explain)?;
            left -= (page.messages.len() as u32).min(left);
            let last = page.messages.last().map(|last| last.offset);
            for message in page.messages {
                output::line(&if self.json { as_json(message)? } else { as_row(&message) })?;
            }
            match last {
                Some(offset) if page.more && left > 0 => since = Some(Position { epoch: page.epoch, offset }),
                _ => {
                    let at = last.filter(|_| page.more).unwrap_or(page.offset);
                    output::status(&format!("go on with --since {}:{at}", page.epoch));
                    return Ok(());
                }
            }
        }
    }
}

fn as_json(message: Message) -> anyhow::Result<String> {
    let mut line = Vec::new();
    json::encode(&EventEnvelope { id: None, event: Event::Message(Box::new(message)) }, &mut line);
    Ok(String::from_utf8(line)?)
}

fn as_row(message: &Message) -> String {
    let payload = match &message.payload {
        Payload::Text(text) | Payload::Json(text) => clean(text),
        Payload::Bytes(bytes) => format!("({} bytes)", bytes.len()),
    };
    let publisher = if message.publisher.is_empty() { "-".to_owned() } else { clean(&message.publisher) };
    format!("{:>8}  {}  {publisher}  {payload}", message.offset, readable(message.time_us))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_an_epoch_and_an_offset() {
        let since =
            |text: &str| Since::from_str(text).map(|Since(position)| (position.epoch, position.offset));
        assert_eq!(since("34f2:17").unwrap(), ("34f2".to_owned(), 17));
        for wrong in ["17", "34f2:", ":17", "34f2:x", "34f2:9007199254740992"] {
            assert!(since(wrong).is_err(), "{wrong}");
        }
    }
}
