//! What the tasks of one row share: the history, the phase, and what goes wrong beside it.

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rand::{SeedableRng, rngs::StdRng};
use sanjay_client::protocol::Payload;
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout_at},
};

use crate::history::{Event, History};

/// Complaints and texts of refusals that are kept.
const MAX_TEXTS: usize = 16;

/// Between two looks at a condition.
const LOOK: Duration = Duration::from_millis(25);

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Things break, back ends send, and users come and go.
    Storm,
    /// Everything is repaired, nothing new is sent, and every user is online.
    Calm,
    /// Everybody leaves.
    Over,
}

/// How much is sent to whom.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// Users.
    pub(crate) users: usize,
    /// Messages a second, to all users together.
    pub(crate) rate: u32,
    /// How long things break.
    pub(crate) storm: Duration,
    /// Bytes that a payload has beside its number.
    pub(crate) padding: usize,
    /// Users stay away until everything is repaired.
    pub(crate) away: bool,
    /// Of so many calls one has a payload that clients give back.
    pub(crate) every: u64,
    /// What they do then.
    pub(crate) faulty: Faulty,
}

/// What clients do with messages that they give back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Faulty {
    /// There are none.
    Never,
    /// They take the third delivery.
    Twice,
    /// They take none until they are cured.
    Poison,
}

/// What the tasks of a row share.
pub(crate) struct Run {
    pub(crate) load: Load,
    pub(crate) seed: u64,
    /// Where users connect.
    pub(crate) urls: Vec<String>,
    history: Mutex<History>,
    phase: watch::Sender<Phase>,
    /// Whether clients take what they gave back before.
    cured: watch::Sender<bool>,
    texts: Mutex<Texts>,
}

#[derive(Default)]
struct Texts {
    complaints: Vec<String>,
    /// How often each text came with a send that was not accepted.
    refusals: BTreeMap<String, usize>,
    unknown: usize,
    owed: Vec<(String, u64)>,
}

impl Run {
    pub(crate) fn new(load: Load, seed: u64, urls: Vec<String>) -> Arc<Self> {
        let (phase, cured) = (watch::Sender::new(Phase::Storm), watch::Sender::new(false));
        Arc::new(Self { load, seed, urls, history: Mutex::default(), phase, cured, texts: Mutex::default() })
    }

    /// What was recorded.
    pub(crate) fn history(&self) -> MutexGuard<'_, History> {
        // Each record is complete before anything that could panic.
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(&self, user: &str, event: Event) {
        self.history().record(user, event);
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(crate) fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Waits until a phase is reached.
    pub(crate) async fn reached(&self, phase: Phase) {
        // The sender lives in self.
        let _ = self.phase.subscribe().wait_for(|now| *now >= phase).await;
    }

    pub(crate) fn cure(&self) {
        self.cured.send_replace(true);
    }

    /// Whether clients give this delivery of a message back.
    pub(crate) fn gives_back(&self, number: u64, delivery: u64) -> bool {
        let given_back = match self.load.faulty {
            Faulty::Never => false,
            Faulty::Twice => delivery < 3,
            Faulty::Poison => !*self.cured.borrow(),
        };
        given_back && self.is_faulty(number)
    }

    /// Whether clients take a message under no circumstances.
    pub(crate) fn is_poison(&self, number: u64) -> bool {
        self.load.faulty == Faulty::Poison && self.is_faulty(number)
    }

    fn is_faulty(&self, number: u64) -> bool {
        number % self.load.every == self.load.every / 2
    }

    fn texts(&self) -> MutexGuard<'_, Texts> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something that fails the row, whatever the history says.
    pub(crate) fn complain(&self, what: impl Into<String>) {
        let mut texts = self.texts();
        if texts.complaints.len() < MAX_TEXTS {
            texts.complaints.push(what.into());
        }
    }

    pub(crate) fn complaints(&self) -> Vec<String> {
        self.texts().complaints.clone()
    }

    /// Keeps examples of what was owed when patience ended.
    pub(crate) fn owed_at_end(&self, examples: Vec<(String, u64)>) {
        self.texts().owed = examples;
    }

    pub(crate) fn owed_examples(&self) -> Vec<(String, u64)> {
        self.texts().owed.clone()
    }

    /// So many messages of a call have an outcome that is not known.
    pub(crate) fn not_answered(&self, count: usize, why: &str) {
        let mut texts = self.texts();
        texts.unknown += count;
        if texts.refusals.len() < MAX_TEXTS || texts.refusals.contains_key(why) {
            *texts.refusals.entry(why.to_owned()).or_default() += count;
        }
    }

    /// Messages that had no answer so far, or one that does not say what became of them.
    pub(crate) fn unknown(&self) -> usize {
        self.texts().unknown
    }

    /// What senders were told instead of an acceptance.
    pub(crate) fn refusals(&self) -> Vec<String> {
        self.texts().refusals.keys().cloned().collect()
    }

    pub(crate) fn random(&self, of: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed ^ ((of + 1) << 32))
    }

    /// A message's payload: its number, and padding.
    pub(crate) fn payload(&self, number: u64) -> Payload {
        Payload::Text(format!("{number} {}", "x".repeat(self.load.padding)))
    }
}

/// Who a user is.
pub(crate) fn name(user: usize) -> String {
    format!("user-{user}")
}

/// The number in a payload's text; 0, which nobody sends, when there is none.
pub(crate) fn number_of(text: &str) -> u64 {
    text.split(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

/// Looks at a condition until it holds; false when it does not within `limit`.
pub(crate) async fn until(limit: Duration, mut holds: impl AsyncFnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if timeout_at(deadline, holds()).await.unwrap_or(false) {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        sleep(LOOK).await;
    }
}

/// Waits for work, and complains when it lasts longer.
pub(crate) async fn bounded<T>(
    run: &Run,
    limit: Duration,
    what: &str,
    work: impl Future<Output = T>,
) -> Option<T> {
    let done = tokio::time::timeout(limit, work).await.ok();
    if done.is_none() {
        run.complain(format!("not within {} s: {what}", limit.as_secs()));
    }
    done
}
