//! The payload argument of `pub` and `send`.

use anyhow::Context as _;
use base64::{Engine, engine::general_purpose::STANDARD};
use clap::Args;
use sanjay_client::protocol::Payload;
use sanjay_proto::client::v1;

/// A message body.
#[derive(Debug, Args)]
pub(crate) struct PayloadArgs {
    /// The message: text, unless a flag says otherwise
    payload: String,
    /// The message is a JSON value
    #[arg(long, conflicts_with = "base64")]
    json: bool,
    /// The message is bytes in base64
    #[arg(long)]
    base64: bool,
}

impl PayloadArgs {
    /// The payload, checked.
    ///
    /// # Errors
    /// When it is not what the flag says, or too large.
    pub(crate) fn parse(self) -> anyhow::Result<Payload> {
        use v1::payload::Kind;
        let kind = if self.json {
            Kind::Json(self.payload)
        } else if self.base64 {
            let bytes = STANDARD.decode(&self.payload).context("the payload is not base64 with padding")?;
            Kind::Bytes(bytes.into())
        } else {
            Kind::Text(self.payload)
        };
        Ok(Payload::from_backend(Some(v1::Payload { kind: Some(kind) }))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(payload: &str, json: bool, base64: bool) -> anyhow::Result<Payload> {
        PayloadArgs { payload: payload.to_owned(), json, base64 }.parse()
    }

    #[test]
    fn the_kind_is_what_the_flag_says() {
        assert_eq!(parse("{}", false, false).unwrap(), Payload::Text("{}".into()));
        assert_eq!(parse("{ \"a\": 1 }", true, false).unwrap(), Payload::Json("{\"a\":1}".into()));
        assert_eq!(parse("AAE=", false, true).unwrap(), Payload::Bytes(vec![0, 1].into()));
        assert!(parse("{", true, false).unwrap_err().to_string().contains("not a JSON value"));
        assert!(parse("?", false, true).is_err());
        let large = parse(&"x".repeat(65_537), false, false).unwrap_err().to_string();
        assert!(large.contains("at most 65536"), "{large}");
    }
}
