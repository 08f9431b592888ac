//! Tokens of the connection.

use std::time::Duration;

use sanjay_protocol::{Command, ErrorBody, command::Refresh};
use tokio::time::Instant;

use super::{Machine, Pending};

/// What the server said of the connection's token.
pub(crate) enum TokenNews {
    /// It has ended; the connection will.
    Expired,
    /// This one took its place, for so long.
    Refreshed { token: String, ttl: Duration },
    /// The other one did not.
    Refused(ErrorBody),
}

impl Machine {
    /// Sends another token in place of the connection's.
    pub(crate) fn refresh(&mut self, token: String, now: Instant) {
        let frame = self.encode(Command::Refresh(Refresh { token: token.clone(), channel: None }));
        self.push(frame, Pending::Refresh(token), now);
    }

    /// What the server has said of tokens since this was asked last.
    pub(crate) fn take_token_news(&mut self) -> Vec<TokenNews> {
        std::mem::take(&mut self.token_news)
    }
}
