//! Questions of back ends: each goes to every shard, and what they say in time goes back as one answer.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use bytes::Bytes;
use parking_lot::Mutex;
use sanjay_proto::edge::v1::{Answer, Answered, Ask, EdgeNode, Question, question};
use sanjay_runtime::{Lifecycle, control};
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, timeout_at},
};

use super::{ShardEvent, shards::Replies};
use crate::shard::Common;

/// Most questions under way: a router has no more under way itself.
const MAX_ASKS: usize = 64;

/// How long shards have to answer: shorter than a router waits.
const ANSWER_WITHIN: Duration = Duration::from_millis(1_000);

/// How many broadcasts are remembered, so that one that comes by two routers is sent once.
const REMEMBERED: usize = 64;

/// Asks the shards. Answers come in any order.
pub struct Asker {
    node: EdgeNode,
    common: Arc<Common>,
    shards: Replies,
    answers: mpsc::Sender<Answered>,
    room: Arc<Semaphore>,
    lifecycle: Lifecycle,
    broadcasts: Mutex<VecDeque<Bytes>>,
}

impl Asker {
    /// One with room for as many answers as there may be questions.
    pub fn new(
        node: EdgeNode,
        common: Arc<Common>,
        shards: Replies,
        lifecycle: Lifecycle,
    ) -> (Self, mpsc::Receiver<Answered>) {
        let (answers, answered) = mpsc::channel(2 * MAX_ASKS);
        let (room, broadcasts) = (Arc::new(Semaphore::new(MAX_ASKS)), Mutex::default());
        (Self { node, common, shards, answers, room, lifecycle, broadcasts }, answered)
    }

    /// Asks, and answers later; at once when too much is asked.
    pub fn ask(&self, Ask { request, question }: Ask) {
        let Some(question) = question else { return };
        let answers = self.answers.clone();
        let Ok(room) = Arc::clone(&self.room).try_acquire_owned() else {
            // Should it find no room either, the router's time-out says the same.
            let _full = answers.try_send(Answered { request, answer: Some(Answer::default()) });
            return;
        };
        if let Some(answer) = self.at_once(&question) {
            let _full = answers.try_send(Answered { request, answer: Some(answer) });
            return;
        }
        let (shards, edge_id) = (self.shards.clone(), self.node.edge_id.clone());
        self.lifecycle.spawn("edge question", async move {
            let _room = room;
            let mut answer = ask_all(&shards, Arc::new(question)).await;
            for connection in &mut answer.connections {
                connection.edge_id.clone_from(&edge_id);
            }
            let _ended = answers.send(Answered { request, answer: Some(answer) }).await;
        });
    }

    /// What no shard need be asked for.
    fn at_once(&self, question: &Question) -> Option<Answer> {
        match &question.question {
            Some(question::Question::Describe(_)) => {
                let connections = self.common.connections.load(std::sync::atomic::Ordering::Relaxed) as u64;
                let edges = vec![EdgeNode { connections, ..self.node.clone() }];
                Some(Answer { complete: true, edges, ..Answer::default() })
            }
            Some(question::Question::Broadcast(broadcast)) => {
                let mut known = self.broadcasts.lock();
                if known.contains(&broadcast.message_id) {
                    return Some(Answer { complete: true, ..Answer::default() });
                }
                if known.len() >= REMEMBERED {
                    known.pop_front();
                }
                known.push_back(broadcast.message_id.clone());
                None
            }
            Some(_) => None,
            // A newer build's: whoever asks is to know that it was not done.
            None => Some(Answer::default()),
        }
    }
}

/// Asks every shard, and adds up what they say in time.
async fn ask_all(shards: &Replies, question: Arc<Question>) -> Answer {
    let count = shards.count();
    let (sender, mut answers) = mpsc::channel(count);
    shards.tell_all(|| ShardEvent::Ask(Arc::clone(&question), sender.clone()));
    drop(sender);
    let deadline = Instant::now() + ANSWER_WITHIN;
    let mut parts = Vec::with_capacity(count);
    // A shard that is gone drops its sender.
    while parts.len() < count
        && let Ok(Some(answer)) = timeout_at(deadline, answers.recv()).await
    {
        parts.push(Some(answer));
    }
    parts.resize(count, None);
    control::total(&question, parts)
}
