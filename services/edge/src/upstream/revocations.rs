//! Hears from a delivery node what back ends have revoked: all of it, then each change. Goes to another node when one does
//! not answer. What is known stays in force meanwhile.

use std::{sync::Arc, time::Duration};

use sanjay_proto::edge::v1::{
    WatchRevocationsRequest, WatchRevocationsResponse, revocations_client::RevocationsClient,
};
use sanjay_runtime::{
    ReadinessFlag, SharedRandom,
    grpc::{Peer, PeerPool},
    random::full_jitter,
};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep, timeout};
use tonic::{Code, Streaming};

use super::{ShardEvent, search::problem, shards::Replies};
use crate::{revocations::Set, shard::Common};

/// How long a node has to begin.
const BEGIN: Duration = Duration::from_secs(2);

/// How long a node may say nothing: it says something every second, unless it does not see its store.
const SILENCE: Duration = Duration::from_secs(5);

/// Pauses after all nodes were tried: full jitter that doubles from the first to the other.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// How often the age of what is known is measured.
const MEASURE: Duration = Duration::from_secs(1);

/// What the task needs.
pub struct Watch {
    /// Name of this edge.
    pub node: String,
    /// The nodes, one of which is asked.
    pub delivery: PeerPool,
    /// Where what is known is kept.
    pub common: Arc<Common>,
    /// Those who close connections.
    pub shards: Replies,
    /// Jitter.
    pub random: SharedRandom,
    /// Set once everything was told.
    pub ready: ReadinessFlag,
}

/// The task: never ends by itself.
pub async fn run(watch: Watch) {
    let mut measure = interval(MEASURE);
    measure.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut state = State { watch, heard: Instant::now(), measure };
    let (mut tried, mut attempt, mut told) = (Vec::new(), 0, false);
    state.watch.delivery.settled().await;
    loop {
        let Some(peer) = state.watch.delivery.choose(&tried) else {
            tried.clear();
            attempt += 1;
            let pause = full_jitter(&*state.watch.random, attempt, FIRST_PAUSE, MAX_PAUSE);
            sleep(pause).await;
            state.measure();
            continue;
        };
        let (complete, why) = state.hear(&peer).await;
        if complete {
            // It was a good one: whoever failed before may be tried again.
            (attempt, told) = (0, false);
            tried.clear();
        }
        if !std::mem::replace(&mut told, true) {
            tracing::warn!(why, endpoint = %peer, "it is not heard any more what back ends revoke; asking another node");
        }
        tried.push(peer);
    }
}

struct State {
    watch: Watch,
    /// When something was last heard from a node that had told everything.
    heard: Instant,
    measure: Interval,
}

impl State {
    /// Hears one node out. Says whether it told everything, and why it ended.
    async fn hear(&mut self, peer: &Arc<Peer>) -> (bool, String) {
        let mut client = RevocationsClient::new(peer.channel(1));
        let request = WatchRevocationsRequest { edge_id: self.watch.node.clone() };
        let mut stream = match timeout(BEGIN, client.watch(request)).await {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => {
                if status.code() == Code::Unimplemented {
                    // An older build, with which nothing can be revoked.
                    self.watch.ready.set(true);
                }
                return (false, problem(&status));
            }
            Err(_) => return (false, format!("no answer within {BEGIN:?}")),
        };
        let mut telling = Some(Set::default());
        loop {
            let message = self.next(&mut stream).await;
            match message {
                Ok(message) => self.take(message, &mut telling),
                Err(why) => return (telling.is_none(), why),
            }
        }
    }

    /// The next message, measuring meanwhile.
    async fn next(
        &mut self,
        stream: &mut Streaming<WatchRevocationsResponse>,
    ) -> Result<WatchRevocationsResponse, String> {
        let silent = sleep(SILENCE);
        tokio::pin!(silent);
        loop {
            tokio::select! {
                message = stream.message() => {
                    return message.map_err(|status| problem(&status))?.ok_or_else(|| "the node ended it".to_owned());
                }
                _ = self.measure.tick() => self.measure(),
                () = &mut silent => return Err(format!("nothing was said for {SILENCE:?}")),
            }
        }
    }

    /// Takes a message in; `telling` is what was told so far of everything.
    fn take(&mut self, message: WatchRevocationsResponse, telling: &mut Option<Set>) {
        let known = &self.watch.common.revocations;
        let concerns = match telling {
            Some(set) => {
                for told in &message.revoked {
                    set.apply(told);
                }
                if !message.complete {
                    return;
                }
                let set = telling.take().unwrap_or_default();
                tracing::info!(revocations = set.len(), "it is known what back ends have revoked");
                known.replace(set);
                self.watch.ready.set(true);
                true
            }
            None => !message.revoked.is_empty() && known.apply(&message.revoked),
        };
        self.heard = Instant::now();
        self.measure();
        if concerns {
            self.watch.shards.tell_all(|| ShardEvent::Revoked);
        }
    }

    fn measure(&self) {
        let metrics = &self.watch.common.metrics;
        let known = self.watch.common.revocations.now().len();
        metrics.revocations.set(i64::try_from(known).unwrap_or(i64::MAX));
        metrics.revocations_age.set(self.heard.elapsed().as_secs_f64());
    }
}
