//! `sanjay tail`: prints what happens to messages at a delivery node, as it happens.

use clap::ValueEnum;
use sanjay_client::{
    ConnectionEvent, DeliveryEvent, DeliveryEventKind, WatchConnectionsRequest, WatchDeliveriesRequest,
    Watched, WatchedConnection, protocol::names,
};
use serde::Serialize;

use crate::{
    commands::{receipts::clean, when::readable},
    output,
    settings::{ApiArgs, explain},
    signals::interrupted,
};

/// Print what happens to messages at one delivery node, as it happens; Ctrl-C ends it. `sanjay receipts` is what is
/// complete
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// What happens to this user's
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
    /// What happens to those that this back end sent: what is accepted, scheduled, and how it ends
    #[arg(long, value_name = "NAME")]
    caller: Option<String>,
    /// Events of this kind; may be given several times
    #[arg(long, value_name = "KIND")]
    kind: Vec<Kind>,
    /// What happens to connections instead, at all edges
    #[arg(long, conflicts_with_all = ["caller", "kind"])]
    connections: bool,
    /// Print lines of JSON instead of a table
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    api: ApiArgs,
}

/// What may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Kind {
    /// It is durable in the inbox
    Accepted,
    /// It is durable, and waits for its time
    Scheduled,
    /// A router handed it to an edge
    Relayed,
    /// An edge wrote it to a socket
    Written,
    /// Its second or a later delivery failed
    Failing,
    /// A client acknowledged it
    Acked,
    /// Its time to live passed
    Expired,
    /// A newer one took its place
    Superseded,
    /// It is a dead letter
    Dead,
    /// It is a dead letter after as many attempts as it may have
    Exhausted,
    /// An inbox holds four fifths of what it may
    InboxFilling,
}

impl From<Kind> for DeliveryEventKind {
    fn from(kind: Kind) -> Self {
        match kind {
            Kind::Accepted => Self::Accepted,
            Kind::Scheduled => Self::Scheduled,
            Kind::Relayed => Self::Relayed,
            Kind::Written => Self::Written,
            Kind::Failing => Self::Failing,
            Kind::Acked => Self::Acked,
            Kind::Expired => Self::Expired,
            Kind::Superseded => Self::Superseded,
            Kind::Dead => Self::Dead,
            Kind::Exhausted => Self::Exhausted,
            Kind::InboxFilling => Self::InboxFilling,
        }
    }
}

#[derive(Serialize)]
struct Json<'a> {
    kind: &'a str,
    time_us: u64,
    user: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    message_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    seq: Option<u64>,
    #[serde(skip_serializing_if = "str::is_empty")]
    caller: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    detail: &'a str,
}

impl Args {
    /// Prints until a signal comes, or the server is gone.
    ///
    /// # Errors
    /// Says what was wrong and what to do.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        for (field, name) in [("user", &self.user), ("caller", &self.caller)] {
            name.iter().try_for_each(|name| names::check(field, name))?;
        }
        if self.connections {
            return self.connections().await;
        }
        let kinds = self.kind.iter().map(|kind| DeliveryEventKind::from(*kind).into()).collect();
        let request = WatchDeliveriesRequest {
            user: self.user.unwrap_or_default(),
            caller: self.caller.unwrap_or_default(),
            kinds,
        };
        let backend = self.api.connect().await?;
        let end = interrupted();
        tokio::pin!(end);
        let mut stream = backend.watch_deliveries(request).await.map_err(explain)?;
        output::status("watching");
        loop {
            let next = tokio::select! {
                next = stream.next() => next,
                () = &mut end => return Ok(()),
            };
            match next {
                None => return Ok(()),
                Some(Ok(Watched::Event(event))) => {
                    output::line(&if self.json { json(&event)? } else { row(&event) })?;
                }
                Some(Ok(Watched::Missed(count))) => output::status(&format!("{count} events were missed")),
                Some(Err(error)) => return Err(explain(error)),
            }
        }
    }
}

impl Args {
    /// Prints what happens to connections.
    async fn connections(self) -> anyhow::Result<()> {
        let user = self.user.unwrap_or_default();
        let backend = self.api.connect().await?;
        let end = interrupted();
        tokio::pin!(end);
        let request = WatchConnectionsRequest { user, ..WatchConnectionsRequest::default() };
        let mut stream = backend.watch_connections(request).await.map_err(explain)?;
        output::status("watching");
        loop {
            let next = tokio::select! {
                next = stream.next() => next,
                () = &mut end => return Ok(()),
            };
            match next {
                None => return Ok(()),
                Some(Ok(WatchedConnection::Event(event))) => {
                    output::line(&if self.json { connection_json(&event) } else { connection_row(&event) })?;
                }
                Some(Ok(WatchedConnection::Missed(count))) => {
                    output::status(&format!("{count} events or more were missed"));
                }
                Some(Err(error)) => return Err(explain(error)),
            }
        }
    }
}

fn connection_kind(event: &ConnectionEvent) -> String {
    event.kind().as_str_name().trim_start_matches("CONNECTION_EVENT_KIND_").to_lowercase()
}

fn connection_json(event: &ConnectionEvent) -> String {
    let ConnectionEvent { time_us, user, session, edge, channel, device, client, code, .. } = event;
    let all = serde_json::json!({
        "kind": connection_kind(event), "time_us": time_us, "user": user, "session": session, "edge": edge,
        "channel": channel, "device": device, "client": client, "code": code,
    });
    all.to_string()
}

fn connection_row(event: &ConnectionEvent) -> String {
    let (time, kind, session) = (readable(event.time_us), connection_kind(event), &event.session);
    let [user, edge, channel] = [&event.user, &event.edge, &event.channel].map(|text| clean(text));
    format!("{time}  {kind:<12}  {session:<36}  {user}  {edge}  {channel}").trim_end().to_owned()
}

fn kind_name(kind: DeliveryEventKind) -> String {
    kind.as_str_name().trim_start_matches("DELIVERY_EVENT_KIND_").to_lowercase()
}

fn json(event: &DeliveryEvent) -> serde_json::Result<String> {
    serde_json::to_string(&Json {
        kind: &kind_name(event.kind()),
        time_us: event.time_us,
        user: &event.user,
        message_id: &event.message_id,
        seq: (event.seq != 0).then_some(event.seq),
        caller: &event.caller,
        detail: &event.detail,
    })
}

fn row(event: &DeliveryEvent) -> String {
    let DeliveryEvent { time_us, message_id, user, detail, .. } = event;
    let (time, kind, user, detail) =
        (readable(*time_us), kind_name(event.kind()), clean(user), clean(detail));
    format!("{time}  {kind:<13}  {message_id:<36}  {user}  {detail}").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let event = DeliveryEvent {
            kind: DeliveryEventKind::InboxFilling.into(),
            time_us: 1_700_000_000_000_000,
            user: "bo\nb".into(),
            detail: "8 messages".into(),
            ..DeliveryEvent::default()
        };
        assert!(row(&event).starts_with("2023-11-14T22:13:20.000Z  inbox_filling  "));
        assert!(row(&event).ends_with("  bob  8 messages"));
        let expected =
            r#"{"kind":"inbox_filling","time_us":1700000000000000,"user":"bo\nb","detail":"8 messages"}"#;
        assert_eq!(json(&event).unwrap(), expected);
    }
}
