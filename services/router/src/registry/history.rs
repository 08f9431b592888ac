//! Reading what channels keep: the question, the answer, and what a namespace says of both.

use std::{sync::Arc, time::Duration};

use sanjay_proto::client::v1::Publication;
use sanjay_runtime::Namespace;

use super::Top;

/// What to read of a channel's history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryQuery {
    /// The channel.
    pub channel: Arc<str>,
    /// Read what follows this position; without it, the newest.
    pub since: Option<Top>,
    /// Most publications.
    pub limit: usize,
    /// Most bytes of publications, as their payloads and names count; one comes whatever its size.
    pub bytes: usize,
}

/// A part of a channel's history.
#[derive(Debug, Clone, PartialEq)]
pub struct HistoryPage {
    /// Where the channel stands.
    pub top: Top,
    /// In the order of their offsets, without holes. They begin right behind the position that was asked for, or else
    /// end at `top`.
    pub publications: Vec<Arc<Publication>>,
    /// The position cannot be continued from: its epoch is another, it is above the top, or something behind it is kept
    /// no more. Then there are no publications.
    pub lost: bool,
    /// Whether there are more behind the last one.
    pub more: bool,
}

/// How much of a channel is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Keep {
    /// So many publications; 0: none.
    pub(super) size: usize,
    /// Each for so long.
    pub(super) ttl: Duration,
}

impl Keep {
    pub(super) fn ttl_ms(self) -> u64 {
        u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX)
    }
}

impl From<Namespace> for Keep {
    fn from(namespace: Namespace) -> Self {
        Self {
            size: namespace.history_size as usize,
            ttl: Duration::from_secs(namespace.history_ttl_s.into()),
        }
    }
}

impl HistoryPage {
    /// A page without publications.
    pub(super) fn empty(top: Top, lost: bool) -> Self {
        Self { top, publications: Vec::new(), lost, more: false }
    }
}
