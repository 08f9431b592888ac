//! The namespaces of a process: read by many, replaced as a whole.

use std::sync::Arc;

use parking_lot::RwLock;

use super::{Namespace, Namespaces};

/// The namespaces that hold now. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct SharedNamespaces(Arc<RwLock<Arc<Namespaces>>>);

/// What a replacement changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// These, as in [`Namespaces::changes`].
    Some(Vec<String>),
}

impl SharedNamespaces {
    /// With these to begin with; they are valid.
    #[must_use]
    pub fn new(namespaces: Namespaces) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(namespaces))))
    }

    /// Those that hold now: for whoever looks at many channels.
    #[must_use]
    pub fn current(&self) -> Arc<Namespaces> {
        Arc::clone(&self.0.read())
    }

    /// The settings of a channel now.
    #[must_use]
    pub fn of(&self, channel: &str) -> Namespace {
        self.0.read().of(channel)
    }

    /// Puts others in their place, which are valid, and says what differs. Whoever asks from now on gets the new ones.
    pub fn replace(&self, newer: Namespaces) -> Change {
        let mut held = self.0.write();
        let changes = held.changes(&newer);
        if changes.is_empty() {
            return Change::None;
        }
        *held = Arc::new(newer);
        Change::Some(changes)
    }
}

impl From<Namespaces> for SharedNamespaces {
    fn from(namespaces: Namespaces) -> Self {
        Self::new(namespaces)
    }
}
