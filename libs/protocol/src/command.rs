//! What a client asks of an edge.

use serde::{Deserialize, Serialize};

use crate::{
    ErrorBody, ErrorCode, Payload,
    limits::{
        MAX_ACK_RANGES, MAX_CREDIT, MAX_NAK_DELAY_MS, MAX_REASON_BYTES, MAX_SAFE_INTEGER, MAX_TOKEN_BYTES,
    },
    names::{self, NameError},
    payload::PayloadError,
    recovery::{Position, ReadHistory},
};

/// A command with the number that its reply will carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// Chosen by the client. Without it a command gets no reply, unless it fails.
    pub id: Option<u64>,
    /// The command.
    pub command: Command,
}

/// What a client can ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// The empty envelope: with an id a ping, without one the answer to the edge's ping.
    Ping,
    /// Who the client is; always first.
    Hello(Hello),
    /// Receive a channel's messages.
    Subscribe(Subscribe),
    /// Stop receiving them.
    Unsubscribe(Unsubscribe),
    /// Publish to a channel.
    Publish(Publish),
    /// Settle inbox messages.
    Ack(Ack),
    /// Have an inbox message delivered again.
    Nak(Nak),
    /// Give an inbox message up.
    Term(Term),
    /// An inbox message takes longer.
    Working(Working),
    /// How many inbox messages may be in flight.
    Credit(Credit),
    /// Read what a channel keeps.
    History(ReadHistory),
    /// Another token, for the connection or for one subscription.
    Refresh(Refresh),
}

/// `hello`: always the first command.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// May be left out when the handshake carried one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
    /// Stable name of the user's device; empty when it does not matter.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub device: String,
    /// Name and version of the client, for logs.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub client: String,
    /// Inbox messages that may be in flight. 0: this connection does not take part in the user's inbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credit: Option<u32>,
}

impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hello")
            .field("token", &self.token.as_ref().map(|_| "<redacted>"))
            .field("device", &self.device)
            .field("client", &self.client)
            .field("credit", &self.credit)
            .finish()
    }
}

/// `subscribe`.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscribe {
    /// The channel.
    pub channel: String,
    /// Go on from here: the answer has what was missed, or says that it cannot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recover: Option<Position>,
    /// A subscription token: it grants this channel in place of the connection's capabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<String>,
}

impl std::fmt::Debug for Subscribe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Subscribe")
            .field("channel", &self.channel)
            .field("recover", &self.recover)
            .field("token", &self.token.as_ref().map(|_| "<redacted>"))
            .finish()
    }
}

/// `unsubscribe`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsubscribe {
    /// The channel.
    pub channel: String,
}

/// `publish`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// The channel.
    pub channel: String,
    /// The message.
    pub payload: Payload,
    /// A second publish with the same key to the same channel within five minutes gets the first answer.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub dedupe: String,
}

/// `ack`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Inclusive ranges of inbox seq, `[from, to]` each.
    pub ranges: Vec<(u64, u64)>,
    /// W3C `traceparent` of the newest message in `ranges`, as the message had it; may be empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub trace: String,
}

/// `nak`: this delivery failed; deliver the message again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nak {
    /// The message.
    pub seq: u64,
    /// Which delivery of it; another than the newest is ignored.
    pub delivery: u32,
    /// Not before so many milliseconds, up to [`MAX_NAK_DELAY_MS`]; the schedule may take longer.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub delay_ms: u32,
    /// For the record; up to [`MAX_REASON_BYTES`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// `term`: no delivery of this message will help; it becomes a dead letter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Term {
    /// The message.
    pub seq: u64,
    /// Which delivery of it; another than the newest is ignored.
    pub delivery: u32,
    /// For the record; up to [`MAX_REASON_BYTES`].
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// `working`: the ack deadline of this delivery begins anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Working {
    /// The message.
    pub seq: u64,
    /// Which delivery of it; another than the newest is ignored.
    pub delivery: u32,
}

/// `credit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// 1 to [`MAX_CREDIT`].
    pub n: u32,
}

/// `refresh`: another token in place of one that ends.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refresh {
    /// For the same user.
    pub token: String,
    /// The channel whose subscription token this is; without it, it is the connection's token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channel: Option<String>,
}

impl std::fmt::Debug for Refresh {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refresh").field("token", &"<redacted>").field("channel", &self.channel).finish()
    }
}

impl From<NameError> for ErrorBody {
    fn from(error: NameError) -> Self {
        ErrorBody::new(ErrorCode::BadRequest, error.to_string())
    }
}

impl From<PayloadError> for ErrorBody {
    fn from(error: PayloadError) -> Self {
        let code = match error {
            PayloadError::TooLarge(_) => ErrorCode::PayloadTooLarge,
            PayloadError::Missing | PayloadError::NotJson(_) => ErrorCode::BadRequest,
        };
        ErrorBody::new(code, error.to_string())
    }
}

impl Command {
    /// Checks every bound that does not depend on the connection.
    ///
    /// # Errors
    /// Names the field, what was wrong and what would be right.
    pub fn check(&self) -> Result<(), ErrorBody> {
        let bad = |message: String| Err(ErrorBody::new(ErrorCode::BadRequest, message));
        match self {
            Command::Ping => Ok(()),
            Command::Hello(hello) => {
                names::check_optional("device", &hello.device)?;
                names::check_optional("client", &hello.client)?;
                check_token(hello.token.as_deref()).or_else(bad)?;
                match hello.credit {
                    Some(n) if n > MAX_CREDIT => bad(format!("credit is {n}; 0 to {MAX_CREDIT} are allowed")),
                    _ => Ok(()),
                }
            }
            Command::Subscribe(Subscribe { channel, recover, token }) => {
                check_token(token.as_deref()).or_else(bad)?;
                names::check("channel", channel)?;
                recover.as_ref().map_or(Ok(()), |position| position.check("recover"))
            }
            Command::Unsubscribe(Unsubscribe { channel }) => Ok(names::check("channel", channel)?),
            Command::Refresh(Refresh { token, channel }) => {
                check_token(Some(token)).or_else(bad)?;
                match channel {
                    Some(channel) => Ok(names::check("channel", channel)?),
                    None => Ok(()),
                }
            }
            Command::History(read) => read.check(),
            Command::Publish(publish) => {
                names::check("channel", &publish.channel)?;
                names::check_optional("dedupe", &publish.dedupe)?;
                Ok(publish.payload.check()?)
            }
            Command::Ack(ack) => check_ranges(&ack.ranges).or_else(bad),
            Command::Nak(nak) if nak.delay_ms > MAX_NAK_DELAY_MS => {
                bad(format!("delay_ms is {}; 0 to {MAX_NAK_DELAY_MS} are allowed", nak.delay_ms))
            }
            Command::Nak(Nak { seq, delivery, reason, .. })
            | Command::Term(Term { seq, delivery, reason }) => {
                check_delivery(*seq, *delivery).or_else(bad)?;
                Ok(names::check_text("reason", reason, MAX_REASON_BYTES)?)
            }
            Command::Working(Working { seq, delivery }) => check_delivery(*seq, *delivery).or_else(bad),
            Command::Credit(Credit { n }) if *n == 0 || *n > MAX_CREDIT => {
                bad(format!("n is {n}; 1 to {MAX_CREDIT} are allowed"))
            }
            Command::Credit(_) => Ok(()),
        }
    }
}

fn check_token(token: Option<&str>) -> Result<(), String> {
    match token {
        Some(token) if token.len() > MAX_TOKEN_BYTES => {
            Err(format!("token has {} bytes; at most {MAX_TOKEN_BYTES} are allowed", token.len()))
        }
        _ => Ok(()),
    }
}

fn check_ranges(ranges: &[(u64, u64)]) -> Result<(), String> {
    if ranges.is_empty() || ranges.len() > MAX_ACK_RANGES {
        return Err(format!("ranges has {} entries; 1 to {MAX_ACK_RANGES} are allowed", ranges.len()));
    }
    match ranges.iter().find(|(from, to)| *from == 0 || from > to || *to > MAX_SAFE_INTEGER) {
        Some((from, to)) => {
            Err(format!("range [{from},{to}] is not one; a range is [from, to] with 1 ≤ from ≤ to < 2⁵³"))
        }
        None => Ok(()),
    }
}

fn check_delivery(seq: u64, delivery: u32) -> Result<(), String> {
    if seq == 0 || seq > MAX_SAFE_INTEGER {
        return Err(format!("seq is {seq}; it is the seq of an inbox message, from 1 to 2⁵³ − 1"));
    }
    if delivery == 0 {
        return Err("delivery is 0; give back the delivery that the inbox message had, from 1".to_owned());
    }
    Ok(())
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(n: &u32) -> bool {
    *n == 0
}
