//! Questions of back ends to the edges of this router: each edge is asked over its stream, and what comes back in time
//! is added up. Who does not answer is no zero: the answer says that it is not complete.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use parking_lot::Mutex;
use sanjay_proto::edge::v1::{Answer, Ask, Question};
use sanjay_runtime::control;
use tokio::{
    sync::{Semaphore, oneshot},
    time::{Instant, timeout},
};

use crate::{downlink::Downlink, fanout::Fanout, registry::EdgeRef};

/// Most questions under way: each may carry a payload of 64 KiB, which waits for every edge.
const MAX_ASKS: usize = 64;

/// How long edges have to answer: longer than an edge gives its shards, and shorter than a delivery node waits.
const ANSWER_WITHIN: Duration = Duration::from_millis(1_500);

/// Most edges that are remembered as gone.
const MAX_AWAY: usize = 1_024;

/// What edges are asked, and what they are expected to answer.
pub(crate) struct Asks {
    fanout: Arc<Fanout>,
    /// Begins at random, so that an answer to another router's question is none to one of this one.
    next: AtomicU64,
    waiting: Mutex<HashMap<u64, oneshot::Sender<Answer>>>,
    room: Semaphore,
    /// Edges that held sessions when their streams ended, and when that was.
    away: Mutex<HashMap<EdgeRef, Instant>>,
    lease: Duration,
}

/// What the edges say.
pub(crate) struct Asked {
    /// Added up.
    pub(crate) answer: Answer,
    /// Edges that answered.
    pub(crate) answered: Vec<EdgeRef>,
    /// Edges that went within the lease.
    pub(crate) away: Vec<EdgeRef>,
    /// How many are attached.
    pub(crate) edges: usize,
}

/// As much is asked as may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MAX_ASKS} questions to edges are under way at this router, which is its limit; ask again in a moment"
)]
pub(crate) struct Busy;

/// Forgets a question whose asker has gone.
struct Forget<'a>(&'a Asks, u64);

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.0.waiting.lock().remove(&self.1);
    }
}

impl Asks {
    pub(crate) fn new(fanout: Arc<Fanout>, first: u64, lease: Duration) -> Self {
        Self {
            fanout,
            next: AtomicU64::new(first),
            waiting: Mutex::default(),
            room: Semaphore::new(MAX_ASKS),
            away: Mutex::default(),
            lease,
        }
    }

    /// Asks every edge that is attached now.
    pub(crate) async fn ask(&self, question: Question) -> Result<Asked, Busy> {
        let _room = self.room.try_acquire().map_err(|_| Busy)?;
        let links = self.fanout.links();
        let answers = join_all(links.iter().map(|link| self.ask_one(link, question.clone()))).await;
        let heard = links.iter().zip(&answers).filter(|(_, answer)| answer.is_some());
        let answered = heard.map(|(link, _)| link.attachment.edge.clone()).collect();
        let edges = links.len();
        // Looked at last: who went meanwhile is among them.
        Ok(Asked { answer: control::total(&question, answers), answered, away: self.away(), edges })
    }

    async fn ask_one(&self, link: &Arc<Downlink>, question: Question) -> Option<Answer> {
        let request = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = oneshot::channel();
        self.waiting.lock().insert(request, sender);
        let _forget = Forget(self, request);
        link.ask(Ask { request, question: Some(question) });
        let answer = link.ended.run_until_cancelled(timeout(ANSWER_WITHIN, answer)).await;
        answer?.ok()?.ok()
    }

    /// An edge answered; too late when nobody waits for it any more.
    pub(crate) fn answered(&self, request: u64, answer: Answer) {
        if let Some(asker) = self.waiting.lock().remove(&request) {
            let _gone = asker.send(answer);
        }
    }

    /// An edge attached.
    pub(crate) fn came(&self, edge: &EdgeRef) {
        self.away.lock().retain(|gone, _| gone.id != edge.id);
    }

    /// An edge's stream ended while it held sessions, and no newer one took over.
    pub(crate) fn went(&self, edge: &EdgeRef) {
        if self.fanout.link(edge).is_none() {
            let mut away = self.away.lock();
            away.retain(|_, since| since.elapsed() < self.lease);
            if away.len() < MAX_AWAY {
                away.insert(edge.clone(), Instant::now());
            }
        }
    }

    fn away(&self) -> Vec<EdgeRef> {
        let away = self.away.lock();
        let recent = away.iter().filter(|(_, since)| since.elapsed() < self.lease);
        recent.map(|(edge, _)| edge.clone()).collect()
    }
}
