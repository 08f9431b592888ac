//! Sends dead letters again, at a set rate and in the order in which they died.
//!
//! **Nothing is sent twice.** A letter is sent under a dedupe key of its own and is then noted as sent. A redrive that was
//! cut off between the two, or two that run at once, find the first message by that key, for as long as keys are
//! remembered.
//!
//! **Memory is bounded.** The store lists the newest first. So the pages are counted first, remembering where each ends,
//! and then read again from the last to the first; payloads are read for the few letters that are sent next.

use std::{sync::Arc, time::Duration};

use futures::{
    FutureExt,
    future::{join_all, try_join_all},
};
use parking_lot::Mutex;
use sanjay_runtime::{random::uuid_v7, trace::carry};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::Span;
use uuid::Uuid;

use crate::{
    dead::{DeadLetters, MAX_PAGE},
    spans,
    store::{AppendError, Appended, DeadFilter, DeadLetter, DeadPosition, NewMessage, StoreError},
};

/// Most letters that are sent at once: with their payloads they take 4 MiB.
const MAX_CHUNK: usize = 64;

/// How many times a second letters are sent, where the rate allows more than one at a time.
const CHUNKS_PER_SECOND: u32 = 20;

/// How often letters are tried before a store that refuses ends the redrive, and how long it rests after the first try;
/// the rest doubles, to 6 s in all.
const TRIES: u32 = 6;
const REST: Duration = Duration::from_millis(200);

/// Begins the dedupe keys of redriven messages. Back ends' keys hold no control characters, so that theirs and these
/// never meet, although they share a caller.
const KEY_PREFIX: &str = "\u{1f}redrive/";

/// What to send again.
#[derive(Debug, Clone)]
pub(crate) struct Redrive {
    /// The back end that asks, for the log.
    pub(crate) caller: Arc<str>,
    pub(crate) select: Select,
    /// Letters a second, at least 1.
    pub(crate) rate: u32,
    /// Count, and send nothing.
    pub(crate) dry_run: bool,
}

/// Which letters.
#[derive(Debug, Clone)]
pub(crate) enum Select {
    /// One.
    One(String, Uuid),
    /// Those that match and were not sent again yet.
    All(DeadFilter),
}

/// How far a redrive is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// How many letters there are, as far as they are counted.
    pub(crate) total: u64,
    /// How many were looked at.
    pub(crate) examined: u64,
    /// How many were sent.
    pub(crate) redriven: u64,
    /// How many could not be sent; they stay.
    pub(crate) failed: u64,
    /// The last failure, or empty.
    pub(crate) problem: String,
}

/// Why a redrive ended early.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RedriveError {
    #[error("user {0:?} has no dead letter {1}; `ListDeadLetters` names those that there are")]
    NotFound(String, Uuid),
    #[error("{0}")]
    Store(#[from] StoreError),
}

/// Where a redrive notes how far it is.
pub(crate) type Shared = Arc<Mutex<Progress>>;

impl DeadLetters {
    /// Sends letters again. Dropped, it sends no more.
    pub(crate) async fn redrive(&self, redrive: Redrive, progress: Shared) -> Result<(), RedriveError> {
        let Redrive { caller, select, rate, dry_run } = redrive;
        let run = Run { letters: self, progress: &progress, rate: rate.max(1), dry_run };
        let result = match select {
            Select::One(user, message_id) => run.one(user, message_id).await,
            Select::All(filter) => run.all(filter).await,
        };
        if !dry_run {
            let Progress { examined, redriven, failed, problem, .. } = progress.lock().clone();
            tracing::info!(%caller, examined, redriven, failed, problem, ok = result.is_ok(), "dead letters were sent again");
        }
        result
    }
}

/// Keeps chunks apart.
struct Pace {
    next: Instant,
    rate: u32,
}

impl Pace {
    /// Waits until so many letters more may be sent.
    async fn wait(&mut self, count: usize) {
        sleep_until(self.next).await;
        let took = Duration::from_secs(1) * u32::try_from(count).unwrap_or(u32::MAX) / self.rate;
        self.next = self.next.max(Instant::now()) + took;
    }
}

/// A redrive under way.
struct Run<'a> {
    letters: &'a DeadLetters,
    progress: &'a Mutex<Progress>,
    rate: u32,
    dry_run: bool,
}

impl Run<'_> {
    async fn one(&self, user: String, message_id: Uuid) -> Result<(), RedriveError> {
        let letter = self.letters.get(user.clone(), message_id).await?;
        let letter = letter.ok_or(RedriveError::NotFound(user, message_id))?;
        self.progress.lock().total = 1;
        if let Some(sent_as) = letter.redriven_as {
            let mut progress = self.progress.lock();
            progress.problem = format!("it was sent again already, as {sent_as}");
            progress.examined = 1;
        } else if self.dry_run {
            self.progress.lock().examined = 1;
        } else {
            self.send_patiently(vec![letter]).await?;
        }
        Ok(())
    }

    async fn all(&self, mut filter: DeadFilter) -> Result<(), RedriveError> {
        filter.redriven = false;
        // What dies from now on is not part of it, or a message that dies at once would keep it going.
        let now_us = self.letters.store.clock().now_us();
        filter.to_us = Some(filter.to_us.map_or(now_us + 1, |to_us| to_us.min(now_us + 1)));
        let ends = self.count(&filter).await?;
        if self.dry_run {
            let mut progress = self.progress.lock();
            progress.examined = progress.total;
            return Ok(());
        }
        let mut pace = Pace { next: Instant::now(), rate: self.rate };
        let chunk = ((self.rate / CHUNKS_PER_SECOND) as usize).clamp(1, MAX_CHUNK);
        for (index, end) in ends.iter().enumerate().rev() {
            let after = index.checked_sub(1).map(|before| ends[before]);
            let page = self.letters.store.dead_letters(filter.clone(), after, MAX_PAGE).await?;
            // Letters that left this page since it was counted let some of the page before it move up.
            let mut letters = page.letters;
            letters.retain(|letter| letter.position() >= *end);
            letters.reverse();
            let mut letters = letters.into_iter();
            loop {
                let next: Vec<DeadLetter> = letters.by_ref().take(chunk).collect();
                if next.is_empty() {
                    break;
                }
                pace.wait(next.len()).await;
                self.send_patiently(next).await?;
            }
        }
        Ok(())
    }

    /// Counts the letters, and returns the position of the last of each page.
    async fn count(&self, filter: &DeadFilter) -> Result<Vec<DeadPosition>, StoreError> {
        let (mut ends, mut after) = (Vec::new(), None);
        loop {
            let page = self.letters.store.dead_letters(filter.clone(), after, MAX_PAGE).await?;
            self.progress.lock().total += page.letters.len() as u64;
            ends.extend(page.letters.last().map(DeadLetter::position));
            after = page.next;
            if after.is_none() {
                return Ok(ends);
            }
        }
    }

    /// Sends letters, again when the store refuses for a moment: their keys make that harmless.
    async fn send_patiently(&self, mut letters: Vec<DeadLetter>) -> Result<(), StoreError> {
        let (mut tries, mut rest) = (1, REST);
        loop {
            match self.send(letters).await {
                Ok(()) => return Ok(()),
                Err((error, _)) if tries == TRIES => return Err(error),
                Err((error, left)) => {
                    tracing::debug!(%error, ?rest, "a redrive rests");
                    letters = left;
                }
            }
            sleep(rest).await;
            (tries, rest) = (tries + 1, rest * 2);
        }
    }

    /// Sends letters, and notes in the store that they were sent.
    ///
    /// # Errors
    /// When the store refused; with the letters that are left.
    async fn send(&self, letters: Vec<DeadLetter>) -> Result<(), (StoreError, Vec<DeadLetter>)> {
        let store = &self.letters.store;
        let reading = letters.iter().map(|letter| store.dead_letter(letter.user.clone(), letter.message_id));
        let found = match try_join_all(reading).await {
            Ok(found) => found,
            Err(error) => return Err((error, letters)),
        };
        let (mut messages, mut sending) = (Vec::with_capacity(found.len()), Vec::with_capacity(found.len()));
        for letter in found {
            // Somebody else may have purged it or sent it again since it was listed.
            let Some(letter) = letter.filter(|letter| letter.redriven_as.is_none()) else {
                self.examined(Ok(false));
                continue;
            };
            match self.message(&letter) {
                Some((message, span)) => {
                    messages.push(message);
                    sending.push((letter, span));
                }
                None => self.examined(Err(format!("dead letter {} has lost its payload", letter.message_id))),
            }
        }
        let (mut left, mut problem) = (Vec::new(), None);
        let mut noting = Vec::with_capacity(sending.len());
        for ((letter, span), result) in sending.into_iter().zip(store.append(messages).await) {
            if let Err(error) = &result {
                spans::refused(&span, error.code().as_str());
            }
            match result {
                Ok(appended) => {
                    self.appended(&letter, &appended);
                    let note = store.redriven(letter.user.clone(), letter.message_id, appended.message_id);
                    noting.push(note.map(|noted| (letter, noted)));
                }
                Err(AppendError::Store(error)) => {
                    problem = Some(error);
                    left.push(letter);
                }
                Err(error) => self.examined(Err(format!("user {:?}: {error}", letter.user))),
            }
        }
        for (letter, noted) in join_all(noting).await {
            match noted {
                Ok(_) => {
                    self.letters.metrics.redriven();
                    self.examined(Ok(true));
                }
                Err(error) => {
                    problem = Some(error);
                    left.push(letter);
                }
            }
        }
        problem.map_or(Ok(()), |error| Err((error, left)))
    }

    /// A letter is done with: it was sent or did not need to be, or it could not be.
    fn examined(&self, result: Result<bool, String>) {
        let mut progress = self.progress.lock();
        progress.examined += 1;
        match result {
            Ok(sent) => progress.redriven += u64::from(sent),
            Err(problem) => {
                progress.failed += 1;
                progress.problem = problem;
            }
        }
    }

    /// The message that a letter is sent as, with the span of its way to the disk.
    fn message(&self, letter: &DeadLetter) -> Option<(NewMessage, Span)> {
        let payload = letter.payload.clone()?;
        let message_id = uuid_v7(&*self.letters.clock, &*self.letters.random);
        let span = spans::redrive(letter, message_id);
        let mut trace = String::new();
        carry(&span, &mut trace);
        let span = spans::process(&mut trace, message_id, prost::Message::encoded_len(&*payload));
        let message = NewMessage {
            user: letter.user.clone(),
            caller: letter.caller.clone(),
            message_id,
            payload,
            dedupe_key: format!("{KEY_PREFIX}{}", letter.message_id),
            time_us: self.letters.clock.now_us(),
            trace,
            ..NewMessage::default()
        };
        Some((message, span))
    }

    fn appended(&self, letter: &DeadLetter, appended: &Appended) {
        let DeadLetters { ring, recipients, metrics, .. } = self.letters;
        metrics.appended(appended.duplicate);
        let message_id = appended.message_id;
        recipients.learn(message_id, &Arc::from(letter.user.as_str()), appended.seq);
        ring.record(letter.message_id.as_bytes(), "redriven", format!("as {message_id}"));
        ring.record(message_id.as_bytes(), "redrive", format!("of {}", letter.message_id));
    }
}

#[cfg(test)]
#[path = "redrive_tests.rs"]
pub(crate) mod tests;
