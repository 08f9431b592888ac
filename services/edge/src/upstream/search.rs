//! Which router to attach to: another one at once when one fails, and a pause only when nobody is left to try.

use std::{sync::Arc, time::Duration};

use sanjay_proto::edge::v1::{
    AttachRequest, AttachResponse, EdgeHello, RouterHello, router_link_client::RouterLinkClient,
};
use sanjay_runtime::{
    SharedRandom,
    grpc::{Peer, PeerChannel, PeerPool, plain},
    random::full_jitter,
};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

/// How long a router has to answer an attach.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(2);

/// Pauses between rounds: full jitter that doubles from the first to the other.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// A stream that lasted so long was a good one: what came before it does not count any more.
const GOOD_STREAM: Duration = Duration::from_secs(10);

/// A stream that ended so soon was hardly one: its router counts as tried, until everybody is.
const SHORT_STREAM: Duration = Duration::from_secs(1);

/// A stream that has begun.
pub(super) type Attached = (mpsc::Sender<AttachRequest>, Streaming<AttachResponse>, RouterHello);

/// Begins a stream, or says why that failed.
pub(super) async fn attach(channel: PeerChannel, hello: EdgeHello) -> Result<Attached, String> {
    let (outbound, stream) = mpsc::channel(4);
    let _ = outbound.try_send(AttachRequest { hello: Some(hello), events: Vec::new() });
    let mut client = RouterLinkClient::new(channel);
    let attach = async {
        let response = client.attach(ReceiverStream::new(stream)).await.map_err(|status| problem(&status))?;
        let mut inbound = response.into_inner();
        match inbound.message().await {
            Ok(Some(AttachResponse { hello: Some(hello), .. })) => Ok((inbound, hello)),
            Ok(_) => Err("the router did not say hello".to_owned()),
            Err(status) => Err(problem(&status)),
        }
    };
    match timeout(ATTACH_TIMEOUT, attach).await {
        Ok(Ok((inbound, hello))) => Ok((outbound, inbound, hello)),
        Ok(Err(why)) => Err(why),
        Err(_) => Err(format!("no answer within {ATTACH_TIMEOUT:?}")),
    }
}

/// A status for logs.
pub(super) fn problem(status: &Status) -> String {
    format!("{:?}: {}", status.code(), plain(status))
}

/// Why a stream ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// For logs.
    pub(super) why: String,
    /// The router wants the edge to attach again and to announce everything.
    pub(super) again: bool,
    /// The connection broke.
    pub(super) broken: bool,
}

impl Ended {
    pub(super) fn because(why: impl Into<String>) -> Self {
        Self { why: why.into(), again: false, broken: false }
    }
}

/// The search for a router. A round asks everybody once, the best first; the round after the end of a stream
/// leaves out the router whose stream it was.
pub(super) struct Search {
    routers: PeerPool,
    random: SharedRandom,
    /// Who did not take the edge in this round.
    refused: Vec<Arc<Peer>>,
    /// Whose streams ended: the last one, and those that were short before it.
    left: Vec<Arc<Peer>>,
    /// What they said.
    problems: Vec<String>,
    /// Nobody was left out of this round.
    whole: bool,
    /// To attach to before anybody else is looked at.
    again: Option<Arc<Peer>>,
    /// Where the edge was attached last.
    last: Option<Arc<Peer>>,
    attempt: u32,
}

/// A round in which nobody took the edge.
pub(super) struct Fruitless {
    /// What each said, when everybody was asked.
    pub(super) why: Option<String>,
    /// How long to wait before the next.
    pub(super) pause: Duration,
    /// How many rounds there were.
    pub(super) attempt: u32,
}

impl Search {
    pub(super) fn new(routers: PeerPool, random: SharedRandom) -> Self {
        Self {
            routers,
            random,
            refused: Vec::new(),
            left: Vec::new(),
            problems: Vec::new(),
            whole: true,
            again: None,
            last: None,
            attempt: 0,
        }
    }

    /// Whom to try next.
    pub(super) fn next(&mut self) -> Result<Arc<Peer>, Fruitless> {
        let tried: Vec<_> = self.refused.iter().chain(&self.left).cloned().collect();
        if let Some(router) = self.again.take().or_else(|| self.routers.choose(&tried)) {
            return Ok(router);
        }
        if self.whole {
            self.attempt += 1;
            let unresolved = self.routers.unresolved();
            self.problems.extend((!unresolved.is_empty()).then_some(unresolved));
        }
        let why = self.whole.then(|| self.problems.join("; "));
        let pause = full_jitter(&*self.random, self.attempt, FIRST_PAUSE, MAX_PAUSE);
        self.refused.clear();
        self.left.clear();
        self.problems.clear();
        self.whole = true;
        Err(Fruitless { why, pause, attempt: self.attempt })
    }

    /// A router did not take the edge.
    pub(super) fn refused(&mut self, router: Arc<Peer>, why: &str) {
        self.problems.push(format!("{router}: {why}"));
        self.refused.push(router);
    }

    /// A stream began: who refused before may take the edge when it ends.
    pub(super) fn attached(&mut self, router: &Arc<Peer>) {
        self.refused.clear();
        self.problems.clear();
        if self.last.replace(Arc::clone(router)).is_some_and(|last| !Arc::ptr_eq(&last, router)) {
            self.routers.count_failover();
        }
    }

    /// A stream ended after some time.
    pub(super) fn ended(&mut self, router: Arc<Peer>, ended: &Ended, lasted: Duration) {
        if ended.broken {
            self.routers.suspect(&router, &ended.why);
        }
        self.attempt = if lasted >= GOOD_STREAM { 0 } else { self.attempt.max(1) + 1 };
        if lasted >= SHORT_STREAM {
            self.left.clear();
            if ended.again {
                self.again = Some(router);
                return;
            }
        }
        self.left.push(router);
        self.whole = false;
    }
}

#[cfg(test)]
#[path = "search_tests.rs"]
mod tests;
