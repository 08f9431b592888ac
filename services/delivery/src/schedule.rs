//! Puts scheduled messages into their inboxes when their time has come.
//!
//! Each is claimed, appended under its id, and forgotten as a scheduled one, in this order: a node that dies in between
//! leaves it to the next claim, which finds by the message's record, or by a dedupe key made of its id, that it is in.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use sanjay_runtime::clock::SharedClock;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    message::State,
    paced::paced,
    store::{AppendError, InboxStore, NewMessage, Scheduled, StoreError},
};

/// How often messages are looked for whose time has come: so late they may be, and a little more.
const EVERY: Duration = Duration::from_millis(250);

/// Most messages of one claim.
const MAX_CLAIM: usize = 128;

/// For how long a claim holds: so late are those that a node had in hand when it died. The calls that finish a claim take
/// longer only when the store is in trouble; then another node does it all once more, which changes nothing.
const CLAIM: Duration = Duration::from_secs(5);

/// After how long a message is tried again that its inbox had no room for.
const FULL: Duration = Duration::from_secs(30);

/// Most look-ups at once.
const MAX_LOOKS: usize = 16;

/// Begins the dedupe keys of these appends. Back ends cannot have such a key: it holds a control character.
const KEY_PREFIX: &str = "\u{1f}scheduled/";

/// Appends what is scheduled.
pub(crate) struct Schedule {
    pub(crate) store: Arc<dyn InboxStore>,
    pub(crate) clock: SharedClock,
}

impl Schedule {
    /// Runs until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        paced(EVERY, "scheduled messages wait beyond their time", stop, || self.step()).await;
    }

    /// Appends the messages of one claim; says whether there may be more.
    async fn step(&self) -> Result<bool, StoreError> {
        let now_us = self.clock.now_us();
        let until_us = now_us + CLAIM.as_micros() as u64;
        let mut claimed = self.store.claim_scheduled(now_us, until_us, MAX_CLAIM).await?;
        let more = claimed.len() == MAX_CLAIM;
        // Of those that came due while nobody looked, or whose claim came to nothing, the earliest first.
        claimed.sort_by_key(|scheduled| scheduled.deliver_us);
        let looked: Vec<(Scheduled, Result<bool, StoreError>)> = stream::iter(claimed)
            .map(|scheduled| async move {
                let waits = self.waits(&scheduled.message).await;
                (scheduled, waits)
            })
            .buffered(MAX_LOOKS)
            .collect()
            .await;
        let (mut done, mut full, mut appends, mut failed) = (Vec::new(), Vec::new(), Vec::new(), None);
        for (scheduled, waits) in looked {
            match waits {
                Ok(true) => appends.push(self.due(scheduled)),
                Ok(false) => done.push(place(&scheduled.message)),
                Err(error) => failed = Some(error),
            }
        }
        let places: Vec<(String, Uuid)> = appends.iter().map(place).collect();
        let results = if appends.is_empty() { Vec::new() } else { self.store.append(appends).await };
        for (place, result) in places.into_iter().zip(results) {
            match result {
                Ok(_) => done.push(place),
                Err(AppendError::Store(error)) => failed = Some(error),
                // It was accepted, so it waits for room.
                Err(error) => {
                    tracing::warn!(
                        message_id = %place.1, %error,
                        "a scheduled message does not fit into its inbox; it is tried again every 30 s"
                    );
                    full.push(place);
                }
            }
        }
        if !done.is_empty() {
            self.store.unschedule(done).await?;
        }
        if !full.is_empty() {
            self.store.postpone(full, self.clock.now_us() + FULL.as_micros() as u64).await?;
        }
        failed.map_or(Ok(more), Err)
    }

    /// Whether a message is not in its inbox yet.
    async fn waits(&self, message: &NewMessage) -> Result<bool, StoreError> {
        let found = self.store.lookup(message.user.clone(), message.message_id).await?;
        Ok(found.is_none_or(|receipt| receipt.state == State::Scheduled))
    }

    /// A message as it is appended: accepted now, as far as the inbox is concerned, so that its time to live begins now.
    fn due(&self, Scheduled { message, deliver_us }: Scheduled) -> NewMessage {
        let (dedupe_key, time_us) = (format!("{KEY_PREFIX}{}", message.message_id), self.clock.now_us());
        let expires_us = match message.expires_us {
            0 => 0,
            expires_us => time_us.saturating_add(expires_us.saturating_sub(deliver_us)),
        };
        NewMessage { time_us, expires_us, dedupe_key, ..message }
    }
}

fn place(message: &NewMessage) -> (String, Uuid) {
    (message.user.clone(), message.message_id)
}
