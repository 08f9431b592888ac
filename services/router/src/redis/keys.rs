//! The names of everything that routers keep and say in Redis, and what is behind each.
//!
//! Invariant: the keys of one script, pub/sub names included, share one hash tag, so that a script runs on one
//! node of a cluster.

use std::sync::Arc;

/// Partitions of channels. Fixed for ever: a channel that moved to another partition would lose its state and
/// its subscribers.
pub const PARTITIONS: u16 = 128;

/// The partition of a channel: the CRC16 that Redis Cluster uses for its slots, taken of the name.
#[must_use]
pub fn partition(channel: &str) -> u16 {
    crc16(channel.as_bytes()) % PARTITIONS
}

/// CRC-16/XMODEM: polynomial 0x1021, initial value 0, as in the Redis Cluster specification.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| {
            if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 }
        })
    })
}

/// Names under one prefix.
#[derive(Debug, Clone)]
pub struct Keys {
    prefix: Arc<str>,
}

impl Keys {
    /// Names of a cluster that keeps its state in database `db`. Pub/sub does not know databases, so the
    /// names themselves must differ.
    #[must_use]
    pub fn new(db: u32) -> Self {
        if db == 0 { Self::with_prefix("sanjay") } else { Self::with_prefix(&format!("sanjay/{db}")) }
    }

    /// Names under another prefix, which must not contain `{`.
    #[must_use]
    pub fn with_prefix(prefix: &str) -> Self {
        Self { prefix: prefix.into() }
    }

    /// Hash: where a channel stands. Fields `epoch`, `run_id` (of the Redis process that assigned the last
    /// offset), `top` (the newest offset) and `kept` (there, when [`Keys::history`] has no hole and ends at `top`). Lives for
    /// ten minutes after the last use, and as long as the history may.
    #[must_use]
    pub fn channel(&self, channel: &str) -> String {
        self.of_channel(channel, 'c')
    }

    /// Hash: dedupe keys of a channel's epoch. `k` and a key: its number and the first answer; `n` and a
    /// number: the key; `first` and `last`: the numbers in use. Lives for five minutes after the last key.
    #[must_use]
    pub fn dedupe(&self, channel: &str) -> String {
        self.of_channel(channel, 'd')
    }

    /// Stream: what a channel keeps of its epoch, as `sanjay.router.v1.BusEnvelope` in the field `e`. An entry's id is the
    /// offset, and behind it the server's Unix time in milliseconds. Lives for as long as its newest entry may be kept.
    #[must_use]
    pub fn history(&self, channel: &str) -> String {
        self.of_channel(channel, 'h')
    }

    /// Pub/sub name: the publications of a channel, as `sanjay.router.v1.BusEnvelope`.
    #[must_use]
    pub fn publications(&self, channel: &str) -> String {
        self.of_channel(channel, 'm')
    }

    /// The channel of a name that [`Keys::publications`] made.
    #[must_use]
    pub fn published_channel<'a>(&self, name: &'a str) -> Option<&'a str> {
        // The tag is the first thing in braces.
        name.split_once("}:m:").map(|(_, channel)| channel)
    }

    /// Pub/sub name: what other routers send to a router, as `sanjay.router.v1.BusEnvelope`.
    #[must_use]
    pub fn router(&self, router: &str) -> String {
        format!("{}:r:{router}", self.prefix)
    }

    /// String: the number of the latest attachment. Numbers are at least the server's Unix time in
    /// microseconds, so that a server that lost this key gives out none a second time.
    #[must_use]
    pub fn attachments(&self) -> String {
        self.of_sessions("n")
    }

    /// String: how many sessions were ever opened; it orders the sessions of a user.
    #[must_use]
    pub fn opened(&self) -> String {
        self.of_sessions("o")
    }

    /// Hash: edge → its attachment, as `incarnation number since attached beat router`. `since` is the number
    /// of the first attachment of this incarnation, `beat` counts renewals, `attached` is 0 or 1.
    #[must_use]
    pub fn edges(&self) -> String {
        self.of_sessions("e")
    }

    /// Hash: session (16 bytes) → `number user`, for every session of an edge's incarnation; `number` is the
    /// attachment under which it was announced last.
    #[must_use]
    pub fn edge_sessions(&self, edge: &str) -> String {
        self.of_sessions(&format!("x:{edge}"))
    }

    /// Hash: session (16 bytes) and edge → `number opened inbox`, for every session of a user; `inbox` is 0
    /// or 1. A `number` below the edge's `since` belongs to an earlier incarnation and is not seen.
    #[must_use]
    pub fn user_sessions(&self, user: &str) -> String {
        self.of_sessions(&format!("u:{user}"))
    }

    /// Hash: number of the attachment that replaced an incarnation → the edge, for every
    /// [`Keys::left_sessions`].
    #[must_use]
    pub fn left(&self) -> String {
        self.of_sessions("l")
    }

    /// Hash: the [`Keys::edge_sessions`] of an earlier incarnation, until they are removed.
    #[must_use]
    pub fn left_sessions(&self, number: u64) -> String {
        self.of_sessions(&format!("l:{number}"))
    }

    fn of_channel(&self, channel: &str, kind: char) -> String {
        format!("{}:{{p{}}}:{kind}:{channel}", self.prefix, partition(channel))
    }

    /// Edges and sessions change together, so all of them are on one node. They are touched when clients come
    /// and go and once for each batch of relayed hints, not for each publication.
    fn of_sessions(&self, rest: &str) -> String {
        format!("{}:{{s}}:{rest}", self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_are_those_of_the_cluster_specification() {
        assert_eq!(crc16(b"123456789"), 0x31c3, "the check value of the specification");
        // `CLUSTER KEYSLOT` answers 12182 for foo and 12739 for 123456789.
        assert_eq!((crc16(b"foo") % 16_384, crc16(b"123456789") % 16_384), (12_182, 12_739));
        assert_eq!((partition("foo"), partition("")), (12_182 % 128, 0));
    }

    #[test]
    fn names_differ_by_database_and_keep_their_tag() {
        let keys = Keys::new(0);
        assert_eq!(keys.channel("foo"), "sanjay:{p22}:c:foo");
        assert_eq!(keys.publications("{x}"), format!("sanjay:{{p{}}}:m:{{x}}", partition("{x}")));
        for channel in ["foo", "{x}", "}:m:a", ""] {
            assert_eq!(keys.published_channel(&keys.publications(channel)), Some(channel));
        }
        assert_eq!(keys.published_channel(&keys.router("r1")), None);
        assert_eq!(keys.router("r1"), "sanjay:r:r1");
        assert_eq!(Keys::new(3).router("r1"), "sanjay/3:r:r1");
        assert_eq!(keys.user_sessions("bob"), "sanjay:{s}:u:bob");
    }
}
