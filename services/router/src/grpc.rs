//! The router's gRPC services: validate, convert, call, map.

use std::{pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream};
use sanjay_proto::{
    edge::v1::{
        AttachRequest, AttachResponse, ConnectionEvents, EdgeEvent, EdgeHello, router_link_server::RouterLink,
    },
    router::v1::{
        AskRequest, AskResponse, EdgeStart, HistoryRequest, HistoryResponse, LocateRequest, LocateResponse,
        PublishRequest, PublishResponse, PublishResult, RelayRequest, RelayResponse, RouterNode,
        SessionLocation, TraceRequest, TraceResponse, UserLocation, WatchConnectionsRequest,
        router_server::Router,
    },
};
use sanjay_protocol::names;
use sanjay_runtime::MilestoneRing;
use tokio::{sync::oneshot, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    asks::{Asked, Asks},
    downlink::End,
    errors::link_error,
    history::Histories,
    link::{AttachError, Links},
    publish::Publisher,
    registry::{Assigned, EdgeRef, Location},
    relay::{Relay, Whereabouts},
    watchers::Watchers,
    writer::Writer,
};

/// Most publications or hints of one call: bounds how long it holds others up.
const MAX_BATCH: usize = 1_000;

/// Most users of one `Locate`.
const MAX_LOCATE: usize = 500;

/// How long a watcher hears nothing at most.
const IDLE: Duration = Duration::from_secs(10);

/// How long a stream may stay without its first message.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

/// `sanjay.edge.v1.RouterLink`.
pub(crate) struct RouterLinkService {
    pub(crate) links: Arc<Links>,
}

/// `sanjay.router.v1.Router`.
pub(crate) struct RouterService {
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) relay: Arc<Relay>,
    pub(crate) milestones: Arc<MilestoneRing>,
    pub(crate) histories: Histories,
    pub(crate) asks: Arc<Asks>,
    pub(crate) node: RouterNode,
    pub(crate) watchers: Arc<Watchers>,
    /// Ends streams on shutdown.
    pub(crate) soft: CancellationToken,
}

#[tonic::async_trait]
impl RouterLink for RouterLinkService {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<AttachResponse, Status>> + Send>>;

    async fn attach(
        &self,
        request: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut requests = request.into_inner();
        let (hello, first) = match timeout(HELLO_TIMEOUT, requests.message()).await {
            Ok(Ok(Some(AttachRequest { hello: Some(hello), events }))) => (hello, events),
            Ok(Err(status)) => return Err(status),
            Ok(Ok(_)) => return Err(Status::invalid_argument("the first message must carry hello")),
            Err(_) => {
                let text = format!("no hello within {} s; send it first", HELLO_TIMEOUT.as_secs());
                return Err(Status::deadline_exceeded(text));
            }
        };
        let writer = self.begin(hello, first, requests).await?;
        Ok(Response::new(answers(writer)))
    }
}

impl RouterLinkService {
    async fn begin(
        &self,
        hello: EdgeHello,
        first: Vec<EdgeEvent>,
        requests: Streaming<AttachRequest>,
    ) -> Result<Writer, Status> {
        let (sender, begun) = oneshot::channel();
        let links = Arc::clone(&self.links);
        // In a task of its own: a call that is given up meanwhile must not leave an attachment behind.
        self.links.lifecycle.spawn("edge link", async move {
            match links.open(hello).await {
                Ok((link, writer)) => {
                    // A writer that nobody takes is dropped, and that ends the link.
                    drop(sender.send(Ok(writer)));
                    link.run(first, requests).await;
                }
                Err(error) => drop(sender.send(Err(error))),
            }
        });
        let begun = begun.await.map_err(|_| Status::unavailable(AttachError::Shutdown.to_string()))?;
        begun.map_err(|error| match error {
            AttachError::Version { .. } => Status::failed_precondition(error.to_string()),
            AttachError::Name(_) => Status::invalid_argument(error.to_string()),
            AttachError::Registry(_) | AttachError::Shutdown => Status::unavailable(error.to_string()),
        })
    }
}

/// The writer's messages, and at the end why it ended.
fn answers(writer: Writer) -> Pin<Box<dyn Stream<Item = Result<AttachResponse, Status>> + Send>> {
    let next = |writer: Option<Writer>| async {
        let mut writer = writer?;
        match writer.next().await {
            Some(message) => Some((Ok(message), Some(writer))),
            None => writer.reason().and_then(ending).map(|status| (Err(status), None)),
        }
    };
    Box::pin(stream::unfold(Some(writer), next))
}

fn ending(end: &End) -> Option<Status> {
    match end {
        End::Edge => None,
        End::Replaced => Some(Status::aborted("a newer stream of this edge took over")),
        End::Superseded => Some(Status::aborted(
            "the registry does not know this stream any more; attach again and announce everything",
        )),
        End::Shutdown => Some(Status::unavailable("this router is shutting down; attach to another")),
        End::Protocol(text) => Some(Status::invalid_argument(text.as_str())),
    }
}

#[tonic::async_trait]
impl Router for RouterService {
    type WatchConnectionsStream = Pin<Box<dyn Stream<Item = Result<ConnectionEvents, Status>> + Send>>;

    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<PublishResponse>, Status> {
        let publications = request.into_inner().publications;
        check_count("publications", publications.len(), MAX_BATCH)?;
        let answers = self.publisher.publish(publications).await;
        let results = answers.into_iter().map(|answer| match answer {
            Ok(assigned) => publish_result(assigned),
            Err(error) => PublishResult { error: Some(link_error(&error)), ..PublishResult::default() },
        });
        Ok(Response::new(PublishResponse { results: results.collect() }))
    }

    async fn relay(&self, request: Request<RelayRequest>) -> Result<Response<RelayResponse>, Status> {
        let hints = request.into_inner().hints;
        check_count("hints", hints.len(), MAX_BATCH)?;
        for (at, hint) in hints.iter().enumerate() {
            let invalid =
                |text: &dyn std::fmt::Display| Status::invalid_argument(format!("hints[{at}]: {text}"));
            names::check("user", &hint.user).map_err(|error| invalid(&error))?;
            if hint.message.is_none() && hint.settled.is_empty() && !hint.newcomer {
                let why = "message is missing; give the committed message, or what was settled, or newcomer";
                return Err(invalid(&why));
            }
        }
        let outcomes = self.relay.relay(hints).await;
        Ok(Response::new(RelayResponse { outcomes: outcomes.into_iter().map(i32::from).collect() }))
    }

    async fn locate(&self, request: Request<LocateRequest>) -> Result<Response<LocateResponse>, Status> {
        let users = request.into_inner().users;
        check_count("users", users.len(), MAX_LOCATE)?;
        for (at, user) in users.iter().enumerate() {
            let checked = names::check("user", user);
            checked.map_err(|error| Status::invalid_argument(format!("users[{at}]: {error}")))?;
        }
        let users: Vec<Arc<str>> = users.into_iter().map(Arc::from).collect();
        let found =
            self.relay.locate(&users).await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(Response::new(LocateResponse { locations: found.into_iter().map(user_location).collect() }))
    }

    async fn history(&self, request: Request<HistoryRequest>) -> Result<Response<HistoryResponse>, Status> {
        let answer = self.histories.read(request.into_inner()).await;
        Ok(Response::new(answer.unwrap_or_else(|error| HistoryResponse {
            error: Some(link_error(&error)),
            ..HistoryResponse::default()
        })))
    }

    async fn trace(&self, request: Request<TraceRequest>) -> Result<Response<TraceResponse>, Status> {
        let id = request.into_inner().message_id;
        if id.len() != 16 {
            let text = format!("message_id has {} bytes; it needs the 16 bytes of a UUID", id.len());
            return Err(Status::invalid_argument(text));
        }
        Ok(Response::new(TraceResponse { milestones: self.milestones.of(&id) }))
    }

    async fn watch_connections(
        &self,
        _: Request<WatchConnectionsRequest>,
    ) -> Result<Response<Self::WatchConnectionsStream>, Status> {
        let watcher = self.watchers.watch().map_err(|error| Status::resource_exhausted(error.to_string()))?;
        let watching = (watcher, self.soft.clone());
        let events = stream::unfold(watching, |(mut watcher, soft)| async {
            let next = soft.run_until_cancelled(timeout(IDLE, watcher.next())).await?;
            let events = match next {
                Ok(Some(Ok(events))) => ConnectionEvents::clone(&events),
                Ok(Some(Err(missed))) => ConnectionEvents { events: Vec::new(), missed },
                Ok(None) => return None,
                Err(_) => ConnectionEvents::default(),
            };
            Some((Ok(events), (watcher, soft)))
        });
        Ok(Response::new(Box::pin(events)))
    }

    async fn ask(&self, request: Request<AskRequest>) -> Result<Response<AskResponse>, Status> {
        let question = request.into_inner().question.filter(|question| question.question.is_some());
        let question =
            question.ok_or_else(|| Status::invalid_argument("question is missing, or a newer build's"))?;
        // Before the edges are asked: who attaches after that is not away.
        let settled = self.relay.is_settled();
        let asked = self.asks.ask(question).await;
        let asked = asked.map_err(|busy| Status::unavailable(busy.to_string()))?;
        let Asked { answer, answered, away, edges } = asked;
        Ok(Response::new(AskResponse {
            answer: Some(answer),
            router: Some(RouterNode { edges: u32::try_from(edges).unwrap_or(u32::MAX), ..self.node.clone() }),
            answered: answered.into_iter().map(edge_start).collect(),
            away: away.into_iter().map(edge_start).collect(),
            settled,
        }))
    }
}

fn check_count(field: &str, count: usize, most: usize) -> Result<(), Status> {
    if count <= most {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "{field} has {count} entries; at most {most} are allowed in a call"
    )))
}

fn edge_start(edge: EdgeRef) -> EdgeStart {
    EdgeStart { edge_id: edge.id.to_string(), incarnation: edge.incarnation }
}

fn publish_result(assigned: Assigned) -> PublishResult {
    PublishResult {
        epoch: assigned.at.epoch.to_string(),
        offset: assigned.at.offset,
        message_id: assigned.message_id,
        time_us: assigned.time_us,
        error: None,
    }
}

fn user_location(found: Whereabouts) -> UserLocation {
    let session = |place: Location| SessionLocation {
        session: place.session.to_vec().into(),
        edge_id: place.edge.id.to_string(),
        router_id: place.router.to_string(),
    };
    UserLocation { sessions: found.sessions.into_iter().map(session).collect(), complete: found.complete }
}
