//! Dead letters as back ends manage them: lists in pages of bounded size, single letters, and their removal.
//! `redrive.rs` sends them again.

use std::{sync::Arc, time::Duration};

use sanjay_runtime::{clock::SharedClock, milestones::MilestoneRing, random::SharedRandom};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    metrics::Metrics,
    path::Recipients,
    store::{DeadFilter, DeadLetter, DeadPage, DeadPosition, InboxStore, StoreError},
};

/// Most letters of one page.
pub(crate) const MAX_PAGE: usize = 256;

/// Most bytes of one page, about: its letters go into one gRPC message of 4 MiB, and each may hold 32 failed attempts
/// with texts of 400 bytes.
const MAX_PAGE_BYTES: usize = 2 * 1024 * 1024;

/// The dead letters of the store.
#[derive(Clone)]
pub(crate) struct DeadLetters {
    pub(crate) store: Arc<dyn InboxStore>,
    pub(crate) ring: Arc<MilestoneRing>,
    pub(crate) recipients: Arc<Recipients>,
    pub(crate) clock: SharedClock,
    pub(crate) random: SharedRandom,
    pub(crate) metrics: Metrics,
}

/// What a purge came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Purged {
    /// How many letters were removed, or would be.
    pub(crate) count: u64,
    /// Its time was up first: there may be more.
    pub(crate) more: bool,
}

impl DeadLetters {
    /// Letters that match, without payloads, the newest first: up to `limit`, and fewer when they are large.
    pub(crate) async fn list(
        &self,
        filter: DeadFilter,
        after: Option<DeadPosition>,
        limit: usize,
    ) -> Result<DeadPage, StoreError> {
        let page = bounded(self.store.dead_letters(filter, after, limit.clamp(1, MAX_PAGE)).await?);
        page.letters.iter().for_each(|letter| self.learn(letter));
        Ok(page)
    }

    /// One letter with its payload.
    pub(crate) async fn get(&self, user: String, message_id: Uuid) -> Result<Option<DeadLetter>, StoreError> {
        let letter = self.store.dead_letter(user, message_id).await?;
        letter.iter().for_each(|letter| self.learn(letter));
        Ok(letter)
    }

    /// Who looks at a letter may ask for its way next.
    fn learn(&self, letter: &DeadLetter) {
        self.recipients.learn(letter.message_id, &Arc::from(letter.user.as_str()), letter.seq);
    }

    /// Removes one letter, or says with `dry_run` whether it is there.
    pub(crate) async fn purge_one(
        &self,
        user: String,
        message_id: Uuid,
        dry_run: bool,
    ) -> Result<Purged, StoreError> {
        let count = if dry_run {
            u64::from(self.store.dead_letter(user, message_id).await?.is_some())
        } else {
            self.store.purge(vec![(user, message_id)]).await?
        };
        Ok(Purged { count, more: false })
    }

    /// Removes letters that match, or counts them with `dry_run`. After `budget` it begins no further page.
    pub(crate) async fn purge(
        &self,
        filter: DeadFilter,
        dry_run: bool,
        budget: Duration,
    ) -> Result<Purged, StoreError> {
        let until = Instant::now() + budget;
        let (mut purged, mut after) = (Purged::default(), None);
        loop {
            let page = self.store.dead_letters(filter.clone(), after, MAX_PAGE).await?;
            purged.count += if dry_run {
                page.letters.len() as u64
            } else {
                let letters = page.letters.into_iter().map(|letter| (letter.user, letter.message_id));
                self.store.purge(letters.collect()).await?
            };
            after = page.next;
            if after.is_none() {
                return Ok(purged);
            }
            if Instant::now() >= until {
                return Ok(Purged { more: true, ..purged });
            }
        }
    }
}

/// Leaves out what a page has no room for; the next page begins there.
fn bounded(mut page: DeadPage) -> DeadPage {
    let mut bytes = 0;
    let fits = |letter: &&DeadLetter| {
        bytes += size(letter);
        bytes <= MAX_PAGE_BYTES
    };
    // The first has room in any case.
    let kept = page.letters.iter().take_while(fits).count().max(1);
    if kept < page.letters.len() {
        page.letters.truncate(kept);
        page.next = page.letters.last().map(DeadLetter::position);
    }
    page
}

/// About how many bytes a letter takes in a list.
fn size(letter: &DeadLetter) -> usize {
    let texts = letter.user.len() + letter.caller.len() + letter.trace.len();
    let failures = letter.failures.iter().map(|failure| failure.edge.len() + failure.reason.len() + 80);
    texts + failures.sum::<usize>() + 160
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        redrive::tests::World,
        store::{DeadReason, Failure, FailureKind},
    };

    #[tokio::test]
    async fn a_purge_whose_time_is_up_says_that_there_is_more() {
        let world = World::new().await;
        world.plant(3, 100).await;
        let letters = world.unwatched();
        let purge =
            async |dry_run, budget| letters.purge(DeadFilter::default(), dry_run, budget).await.unwrap();
        let (none, long) = (Duration::ZERO, Duration::from_secs(60));
        assert_eq!(purge(true, long).await, Purged { count: 300, more: false });
        assert_eq!(purge(true, none).await, Purged { count: 256, more: true });
        assert_eq!(purge(false, none).await, Purged { count: 256, more: true });
        assert_eq!(purge(false, none).await, Purged { count: 44, more: false });
        assert_eq!(purge(false, long).await, Purged::default());
    }

    /// A letter whose failures say as much as they may.
    fn large(n: u64) -> DeadLetter {
        let failure = Failure {
            seq: n,
            delivery: 1,
            kind: FailureKind::Deadline,
            time_us: n,
            edge: "e".repeat(200),
            session: None,
            reason: "r".repeat(200),
        };
        DeadLetter {
            user: "u".repeat(200),
            message_id: Uuid::from_u128(n.into()),
            seq: n,
            epoch: 1,
            caller: "c".repeat(200),
            reason: DeadReason::MaxAttempts,
            accepted_us: n,
            died_us: n,
            failures: vec![failure; 32],
            trace: String::new(),
            payload: None,
            payload_bytes: 0,
            redriven_as: None,
        }
    }

    #[test]
    fn a_page_of_large_letters_ends_early_and_fits_a_message() {
        let letters: Vec<DeadLetter> = (0..MAX_PAGE as u64).rev().map(large).collect();
        let page = bounded(DeadPage { letters: letters.clone(), next: None });
        assert!(page.letters.len() < MAX_PAGE);
        assert_eq!(page.next, page.letters.last().map(DeadLetter::position));
        let sent = page.letters.iter().cloned().map(sanjay_proto::delivery::v1::DeadLetter::from);
        let bytes: usize = sent.map(|letter| prost::Message::encoded_len(&letter)).sum();
        assert!(bytes > MAX_PAGE_BYTES / 2 && bytes < 3 * 1024 * 1024, "{bytes}");
        let few = DeadPage { letters: letters[..9].to_vec(), next: Some(letters[8].position()) };
        assert_eq!(bounded(few.clone()), few);
    }
}
