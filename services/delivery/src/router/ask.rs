//! Questions to every edge, by way of every router.

use std::collections::HashSet;

use sanjay_proto::{
    edge::v1::{Answer, Question, question},
    router::v1::{AskRequest, RouterNode, router_client::RouterClient},
};
use sanjay_runtime::{control, grpc::PeerError};

use super::{Router, TIMEOUT};

/// What the edges say.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Added up; not complete when there may be an edge that did not answer.
    pub(crate) answer: Answer,
    /// Routers that answered.
    pub(crate) routers: Vec<RouterNode>,
    /// How many edges answered.
    pub(crate) edges: u32,
}

impl Router {
    /// Asks every edge of every router. Fails when no router answers.
    pub(crate) async fn ask(&self, question: question::Question) -> Result<Asked, PeerError> {
        let question = Question { question: Some(question) };
        let ask = async |channel, request| RouterClient::new(channel).ask(request).await;
        // A name that was never resolved has no peers yet.
        let _ = tokio::time::timeout(TIMEOUT, self.0.settled()).await;
        let request = AskRequest { question: Some(question.clone()) };
        let mut answers = self.0.call_all(TIMEOUT, request, ask).await;
        let total = answers.len();
        if answers.iter().all(Result::is_err) {
            let none = PeerError::Unknown { peer: "router", problems: self.0.unresolved() };
            return Err(answers.pop().and_then(Result::err).unwrap_or(none));
        }
        let (mut answered, mut away) = (HashSet::new(), Vec::new());
        let (mut parts, mut routers, mut settled) = (Vec::with_capacity(total), Vec::new(), true);
        for answer in answers {
            match answer {
                Ok(answer) => {
                    answered.extend(answer.answered.into_iter().map(|edge| (edge.edge_id, edge.incarnation)));
                    away.extend(answer.away.into_iter().map(|edge| (edge.edge_id, edge.incarnation)));
                    routers.extend(answer.router);
                    settled &= answer.settled;
                    parts.push(answer.answer);
                }
                Err(error) => {
                    tracing::debug!(%error, "a router was not asked");
                    parts.push(None);
                }
            }
        }
        let mut answer = control::total(&question, parts);
        // An edge that went from one router is asked where it has come to, or is missing.
        answer.complete &= settled && away.iter().all(|edge| answered.contains(edge));
        let edges = u32::try_from(answered.len()).unwrap_or(u32::MAX);
        Ok(Asked { answer, routers, edges })
    }
}
