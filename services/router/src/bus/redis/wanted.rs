//! Which channels this router wants from Redis, and which of them Redis has confirmed: the truth from which
//! subscriptions are made again, whatever became of a connection.
//!
//! Invariant: while there is a connection, a channel whose two sides differ is due or under way, so the one task that
//! talks to Redis finds it.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};

use super::metrics::BusMetrics;

/// What to tell Redis about a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Subscribe,
    Unsubscribe,
}

/// What became of a channel because of a confirmation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Confirmed {
    /// Publications arrive from now on, and none was missed.
    Begun,
    /// They arrive again, after a while in which they did not.
    Again,
}

/// Why a channel is not subscribed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum WantError {
    /// There is no connection, or no answer on it.
    #[error("Redis does not answer")]
    Away,
    /// Redis answered with an error.
    #[error("Redis refused: {0}")]
    Refused(Arc<str>),
}

/// The set of channels.
pub(super) struct Wanted {
    state: Mutex<State>,
    /// Something is due.
    work: Notify,
    /// Redis answered to what was taken.
    answered: Notify,
    /// How long a subscription may take, from the call or from the loss of the connection.
    patience: Duration,
    metrics: BusMetrics,
}

struct State {
    channels: HashMap<Arc<str>, Entry>,
    due: VecDeque<Arc<str>>,
    /// Since when there is no connection.
    away: Option<Instant>,
    /// How many channels Redis has confirmed.
    held: usize,
    /// Redis refused some since [`Wanted::retry_refused`].
    refused: bool,
}

#[derive(Default)]
struct Entry {
    /// Somebody was told that the channel is subscribed.
    promised: bool,
    /// Callers that wait for a confirmation.
    waiting: u32,
    /// Redis confirmed it on the present connection.
    held: bool,
    /// Redis is being told to end it.
    ending: bool,
    /// It stands in `due`.
    due: bool,
    /// It was confirmed once and then lost.
    lost: bool,
    refused: Option<Arc<str>>,
}

impl Entry {
    fn is_wanted(&self) -> bool {
        self.promised || self.waiting > 0
    }
}

impl Wanted {
    pub(super) fn new(patience: Duration, metrics: BusMetrics) -> Self {
        let state = State {
            channels: HashMap::new(),
            due: VecDeque::new(),
            away: Some(Instant::now()),
            held: 0,
            refused: false,
        };
        let (work, answered) = (Notify::new(), Notify::new());
        Self { state: Mutex::new(state), work, answered, patience, metrics }
    }

    /// Asks for channels and waits for their confirmations. Once the connection has been away for longer than
    /// the patience, nobody waits at all: calls that queue behind each other must not add up.
    pub(super) async fn subscribe(&self, channels: &[Arc<str>]) -> Vec<Result<(), WantError>> {
        let claim = self.claim(channels);
        let deadline = Instant::now() + self.patience;
        loop {
            let mut answered = std::pin::pin!(self.answered.notified());
            // Before the look, so that no answer falls between the two.
            answered.as_mut().enable();
            let Some(away_deadline) = self.waits_until(channels) else { break };
            if timeout_at(away_deadline.min(deadline), answered).await.is_err() {
                break;
            }
        }
        claim.answers()
    }

    /// Gives channels up. Redis is told later.
    pub(super) fn unsubscribe(&self, channels: &[Arc<str>]) {
        let mut state = self.state.lock();
        for channel in channels {
            if let Some(entry) = state.channels.get_mut(channel) {
                entry.promised = false;
                state.fall_due(channel);
            }
        }
        self.after(state);
    }

    /// Waits until something is due.
    pub(super) async fn work(&self) {
        self.work.notified().await;
    }

    /// Takes what is due, at most `limit` channels. Nothing is due any more when fewer come.
    pub(super) fn take_due(&self, limit: usize) -> Vec<(Arc<str>, Change)> {
        let mut state = self.state.lock();
        let mut changes = Vec::new();
        while changes.len() < limit {
            let Some(channel) = state.due.pop_front() else { break };
            let Some(entry) = state.channels.get_mut(&channel) else { continue };
            entry.due = false;
            match (entry.is_wanted(), entry.held) {
                (true, false) => changes.push((channel, Change::Subscribe)),
                (false, true) => {
                    entry.ending = true;
                    changes.push((channel, Change::Unsubscribe));
                }
                (false, false) => _ = state.channels.remove(&channel),
                (true, true) => {}
            }
        }
        if !state.due.is_empty() {
            self.work.notify_one();
        }
        self.metrics.wanted.set(state.channels.len() as i64);
        changes
    }

    /// A connection was made: whatever is wanted is due on it.
    pub(super) fn connected(&self) {
        let mut state = self.state.lock();
        state.away = None;
        state.all_due();
        self.after(state);
    }

    /// The connection is gone, and every confirmation with it. When it was given up after it had been `silent` for as
    /// long as anybody waits, nobody waits any longer.
    pub(super) fn disconnected(&self, silent: bool) {
        let mut state = self.state.lock();
        let now = Instant::now();
        let since = if silent { now.checked_sub(self.patience).unwrap_or(now) } else { now };
        state.away.get_or_insert(since);
        state.forget_held();
        self.after(state);
        self.answered();
    }

    /// Redis no longer has the channels that it confirmed: all of them are due again.
    pub(super) fn resubscribe(&self) {
        let mut state = self.state.lock();
        state.forget_held();
        state.all_due();
        self.after(state);
    }

    /// Makes due again what Redis refused.
    pub(super) fn retry_refused(&self) {
        let mut state = self.state.lock();
        if !std::mem::take(&mut state.refused) {
            return;
        }
        let refused: Vec<_> = state
            .channels
            .iter()
            .filter(|(_, entry)| entry.is_wanted() && !entry.held && !entry.due)
            .map(|(channel, _)| Arc::clone(channel))
            .collect();
        refused.iter().for_each(|channel| state.fall_due(channel));
        self.after(state);
    }

    /// Redis confirmed a subscription.
    pub(super) fn confirm(&self, channel: &str) -> Confirmed {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let Some((name, _)) = state.channels.get_key_value(channel) else {
            // Given up before it was confirmed: Redis must be told, so there must be an entry.
            let entry = Entry { held: true, ..Entry::default() };
            let name: Arc<str> = channel.into();
            state.channels.insert(Arc::clone(&name), entry);
            state.held += 1;
            state.fall_due(&name);
            self.after(guard);
            return Confirmed::Begun;
        };
        let name = Arc::clone(name);
        let entry = state.channels.get_mut(channel).expect("it was there a moment ago");
        state.held += usize::from(!entry.held);
        entry.held = true;
        entry.refused = None;
        let confirmed = if std::mem::take(&mut entry.lost) {
            self.metrics.resubscriptions.inc();
            Confirmed::Again
        } else {
            Confirmed::Begun
        };
        if !entry.is_wanted() {
            state.fall_due(&name);
        }
        self.after(guard);
        confirmed
    }

    /// Redis confirmed the end of a subscription, or ended it by itself; true in the latter case.
    pub(super) fn ended(&self, channel: &str) -> bool {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let Some((name, _)) = state.channels.get_key_value(channel) else { return false };
        let name = Arc::clone(name);
        let entry = state.channels.get_mut(channel).expect("it was there a moment ago");
        if !entry.held {
            return false;
        }
        state.held -= 1;
        entry.held = false;
        let unasked = !std::mem::take(&mut entry.ending);
        entry.lost = unasked;
        state.fall_due(&name);
        self.after(guard);
        unasked
    }

    /// Redis refused a subscription.
    pub(super) fn refuse(&self, channel: &str, why: &str) {
        let mut state = self.state.lock();
        if let Some(entry) = state.channels.get_mut(channel) {
            entry.refused = Some(why.into());
            state.refused = true;
        }
    }

    /// Wakes the callers that wait: what was taken last has its answers.
    pub(super) fn answered(&self) {
        self.answered.notify_waiters();
    }

    /// How many channels Redis has confirmed.
    pub(super) fn held(&self) -> usize {
        self.state.lock().held
    }

    /// Makes the books wrong, as if Redis had dropped a subscription without a word.
    #[cfg(test)]
    pub(super) fn miscount(&self) {
        self.state.lock().held += 1;
    }

    fn claim<'a>(&'a self, channels: &'a [Arc<str>]) -> Claim<'a> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        for channel in channels {
            let entry = state.channels.entry(Arc::clone(channel)).or_default();
            entry.waiting += 1;
            entry.refused = None;
            if !entry.is_subscribed() {
                state.fall_due(channel);
            }
        }
        self.after(guard);
        Claim { wanted: self, channels }
    }

    /// Until when it makes sense to wait for the channels, as things are; nothing when all have an answer.
    fn waits_until(&self, channels: &[Arc<str>]) -> Option<Instant> {
        let state = self.state.lock();
        let settled = |entry: &Entry| entry.is_subscribed() || entry.refused.is_some();
        if channels.iter().all(|channel| state.channels.get(channel).is_none_or(settled)) {
            return None;
        }
        Some(state.away.unwrap_or_else(Instant::now) + self.patience)
    }

    /// Releases the lock, and wakes the task that talks to Redis when there is something for it.
    fn after(&self, state: parking_lot::MutexGuard<'_, State>) {
        self.metrics.wanted.set(state.channels.len() as i64);
        let due = !state.due.is_empty();
        drop(state);
        if due {
            self.work.notify_one();
        }
    }
}

impl Entry {
    /// Publications arrive, and go on to.
    fn is_subscribed(&self) -> bool {
        self.held && !self.ending
    }
}

impl State {
    /// Makes a channel due. While there is no connection nothing is: all is due on the next one.
    fn fall_due(&mut self, channel: &Arc<str>) {
        let Some(entry) = self.channels.get_mut(channel) else { return };
        if self.away.is_some() {
            if !entry.is_wanted() {
                self.channels.remove(channel);
            }
        } else if !std::mem::replace(&mut entry.due, true) {
            self.due.push_back(Arc::clone(channel));
        }
    }

    fn all_due(&mut self) {
        self.due = self.channels.keys().cloned().collect();
        self.channels.values_mut().for_each(|entry| entry.due = true);
    }

    fn forget_held(&mut self) {
        self.due.clear();
        self.held = 0;
        self.channels.retain(|_, entry| entry.is_wanted());
        for entry in self.channels.values_mut() {
            entry.lost |= entry.held;
            (entry.held, entry.ending, entry.due) = (false, false, false);
        }
    }
}

/// Callers that wait for channels. What they were not promised by the end, nobody wants on their account.
struct Claim<'a> {
    wanted: &'a Wanted,
    channels: &'a [Arc<str>],
}

impl Claim<'_> {
    fn answers(self) -> Vec<Result<(), WantError>> {
        let mut state = self.wanted.state.lock();
        let answer = |channel: &Arc<str>| match state.channels.get_mut(channel) {
            Some(entry) if entry.is_subscribed() => {
                entry.promised = true;
                Ok(())
            }
            Some(Entry { refused: Some(why), .. }) => Err(WantError::Refused(Arc::clone(why))),
            _ => Err(WantError::Away),
        };
        self.channels.iter().map(answer).collect()
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut state = self.wanted.state.lock();
        for channel in self.channels {
            let Some(entry) = state.channels.get_mut(channel) else { continue };
            entry.waiting -= 1;
            if !entry.is_wanted() {
                state.fall_due(channel);
            }
        }
        self.wanted.after(state);
    }
}

#[cfg(test)]
#[path = "wanted_tests.rs"]
mod tests;
