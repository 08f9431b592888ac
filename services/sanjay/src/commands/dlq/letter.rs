//! How dead letters are printed: as lines of JSON, as rows, and one in full.

use sanjay_client::{DeadLetter, DeliveryFailure, protocol::Payload};
use serde::Serialize;

use crate::commands::{
    receipts::{clean, reason_name},
    when::readable,
};

/// The header above [`row`]s.
pub(super) const HEADER: &str =
    "died                      reason        failed  message_id                            user";

#[derive(Serialize)]
struct Json<'a> {
    message_id: &'a str,
    user: &'a str,
    seq: u64,
    caller: &'a str,
    reason: &'static str,
    accepted_us: u64,
    died_us: u64,
    failures: Vec<JsonFailure<'a>>,
    #[serde(skip_serializing_if = "str::is_empty")]
    trace: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Payload>,
    payload_bytes: u64,
    #[serde(skip_serializing_if = "str::is_empty")]
    redriven_as: &'a str,
}

#[derive(Serialize)]
struct JsonFailure<'a> {
    time_us: u64,
    delivery: u32,
    kind: &'a str,
    edge: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    session: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    reason: &'a str,
}

impl<'a> From<&'a DeliveryFailure> for JsonFailure<'a> {
    fn from(failure: &'a DeliveryFailure) -> Self {
        let DeliveryFailure { time_us, delivery, kind, edge, session, reason } = failure;
        Self { time_us: *time_us, delivery: *delivery, kind, edge, session, reason }
    }
}

/// One line.
///
/// # Errors
/// When its payload is none that this build knows.
pub(super) fn json(letter: &DeadLetter) -> anyhow::Result<String> {
    Ok(serde_json::to_string(&Json {
        message_id: &letter.message_id,
        user: &letter.user,
        seq: letter.seq,
        caller: &letter.caller,
        reason: reason(letter),
        accepted_us: letter.accepted_us,
        died_us: letter.died_us,
        failures: letter.failures.iter().map(JsonFailure::from).collect(),
        trace: &letter.trace,
        payload: payload(letter)?,
        payload_bytes: letter.payload_bytes,
        redriven_as: &letter.redriven_as,
    })?)
}

/// One row below [`HEADER`].
pub(super) fn row(letter: &DeadLetter) -> String {
    let DeadLetter { message_id, user, died_us, failures, redriven_as, .. } = letter;
    let again = if redriven_as.is_empty() { "" } else { "  (sent again)" };
    let (died, reason, failed) = (readable(*died_us), reason(letter), failures.len());
    format!("{died}  {reason:<12}  {failed:>6}  {message_id:<36}  {}{again}", clean(user))
}

/// Everything that is known of a letter, in lines.
///
/// # Errors
/// When its payload is none that this build knows.
pub(super) fn full(letter: &DeadLetter) -> anyhow::Result<Vec<String>> {
    let payload = payload(letter)?.map(|payload| serde_json::to_string(&payload)).transpose()?;
    let fields = [
        ("message_id", letter.message_id.clone()),
        ("user", clean(&letter.user)),
        ("seq", letter.seq.to_string()),
        ("from", clean(&letter.caller)),
        ("reason", reason(letter).to_owned()),
        ("accepted", readable(letter.accepted_us)),
        ("died", readable(letter.died_us)),
        ("trace", letter.trace.clone()),
        ("sent again as", letter.redriven_as.clone()),
        ("payload", payload.unwrap_or_default()),
    ];
    let known = fields.into_iter().filter(|(_, value)| !value.is_empty());
    let mut lines: Vec<String> = known.map(|(name, value)| format!("{name:<14} {value}")).collect();
    lines.extend(letter.failures.iter().map(|failure| {
        let DeliveryFailure { time_us, delivery, kind, edge, reason, .. } = failure;
        let why = if reason.is_empty() { String::new() } else { format!(": {}", clean(reason)) };
        let number = format!("delivery {delivery}");
        format!("{number:<14} {} {kind} on {}{why}", readable(*time_us), clean(edge))
    }));
    Ok(lines)
}

fn reason(letter: &DeadLetter) -> &'static str {
    match reason_name(letter.reason()) {
        "" => "unknown",
        name => name,
    }
}

fn payload(letter: &DeadLetter) -> anyhow::Result<Option<Payload>> {
    let payload = letter.payload.clone().map(|payload| Payload::from_backend(Some(payload)));
    Ok(payload.transpose()?)
}

#[cfg(test)]
mod tests {
    use sanjay_client::DeadReason;
    use sanjay_proto::client::v1;

    use super::*;

    fn letter() -> DeadLetter {
        DeadLetter {
            message_id: "01890a5d-ac96-774b-bcce-b302099a8057".into(),
            user: "bo\u{7}b".into(),
            seq: 3,
            caller: "shop".into(),
            reason: DeadReason::Terminated.into(),
            accepted_us: 1_700_000_000_000_000,
            died_us: 1_700_000_001_000_000,
            failures: vec![DeliveryFailure {
                time_us: 1_700_000_001_000_000,
                delivery: 1,
                kind: "term".into(),
                edge: "edge-1".into(),
                session: String::new(),
                reason: "no\u{1b}pe".into(),
            }],
            trace: String::new(),
            payload: Some(v1::Payload { kind: Some(v1::payload::Kind::Text("hi".into())) }),
            payload_bytes: 4,
            redriven_as: String::new(),
        }
    }

    #[test]
    fn rows_stand_below_the_header_and_hold_no_control_characters() {
        let row = row(&letter());
        assert!(row.ends_with("  bob"), "{row}");
        for (word, value) in [("reason", "terminated"), ("message_id", "01890a5d"), ("user", "bob")] {
            assert_eq!(HEADER.find(word), row.find(value), "{word}");
        }
        let again = super::row(&DeadLetter { redriven_as: "x".into(), ..letter() });
        assert!(again.ends_with("bob  (sent again)"), "{again}");
        let full = full(&letter()).unwrap();
        assert!(full.contains(&"payload        {\"text\":\"hi\"}".to_owned()), "{full:?}");
        assert_eq!(full.last().unwrap(), "delivery 1     2023-11-14T22:13:21.000Z term on edge-1: nope");
    }

    #[test]
    fn json_leaves_out_what_is_not_there() {
        let value: serde_json::Value = serde_json::from_str(&json(&letter()).unwrap()).unwrap();
        assert_eq!((&value["user"], &value["reason"]), (&"bo\u{7}b".into(), &"terminated".into()));
        assert_eq!(value["payload"], serde_json::json!({ "text": "hi" }));
        assert_eq!(value["failures"][0]["reason"], "no\u{1b}pe");
        assert!(value.get("redriven_as").is_none() && value["failures"][0].get("session").is_none());
    }
}
