//! The calls to a shared store, as metrics name them.

/// A kind of call to a shared store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StoreOperation {
    /// A group of appends and acks.
    Write,
    /// What must be known of inboxes before they are written to.
    ReadState,
    /// Pages and receipts.
    Read,
    /// Redelivery.
    Claim,
    /// Moving bodies, receipts and dedupe keys out of inboxes.
    Tidy,
    /// Counting.
    Stats,
    /// Comparing what inboxes hold with what they say.
    Audit,
}

impl StoreOperation {
    pub(super) const ALL: [Self; 7] =
        [Self::Write, Self::ReadState, Self::Read, Self::Claim, Self::Tidy, Self::Stats, Self::Audit];

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            StoreOperation::Write => "write",
            StoreOperation::ReadState => "read_state",
            StoreOperation::Read => "read",
            StoreOperation::Claim => "claim",
            StoreOperation::Tidy => "tidy",
            StoreOperation::Stats => "stats",
            StoreOperation::Audit => "audit",
        }
    }
}
