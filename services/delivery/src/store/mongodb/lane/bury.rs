//! How a lane writes the dead letters of dying messages.

use super::{
    super::dead::{self, MAX_LETTERS},
    Lane,
};
use crate::store::StoreError;

impl Lane {
    /// Writes the dead letters of messages that are about to be settled as dead.
    pub(super) async fn bury(&mut self, name: &str, seqs: &[u64]) -> Result<(), StoreError> {
        for seqs in seqs.chunks(MAX_LETTERS) {
            let Some(inbox) = self.inboxes.get(name) else { return Ok(()) };
            let written =
                dead::write_letters(&self.database, name, inbox.epoch, &inbox.attempts, seqs).await?;
            if written.len() < seqs.len() && !inbox.fresh {
                // Another node may have settled them.
                return self.read_inboxes(&[name.to_owned()]).await;
            }
            if written.len() < seqs.len() {
                tracing::error!(
                    ?seqs,
                    ?written,
                    "bodies of dying messages are missing in the database; they get no dead letter"
                );
            }
            if let Some(inbox) = self.inboxes.get_mut(name) {
                inbox.buried.extend(seqs);
            }
        }
        Ok(())
    }
}
