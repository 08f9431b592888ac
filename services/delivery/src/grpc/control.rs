//! `sanjay.delivery.v1.Control`: who is connected, and what is to become of them. Questions go to every router, and from
//! there to every edge; what they say is added up in `router/ask.rs`.

use std::{sync::Arc, time::Duration};

use sanjay_proto::{
    delivery::v1::{
        BroadcastRequest, BroadcastResponse, DisconnectRequest, DisconnectResponse, ListChannelsRequest,
        ListChannelsResponse, ListConnectionsRequest, ListConnectionsResponse, ListNodesRequest,
        ListNodesResponse, ListRevocationsRequest, ListRevocationsResponse, LiveChannel, LiveNode,
        RevokeRequest, RevokeResponse, SubscribeRequest, SubscribeResponse, UnrevokeRequest,
        UnrevokeResponse, UnsubscribeRequest, UnsubscribeResponse, UserConnection, WatchConnectionsRequest,
        WatchConnectionsResponse, control_server::Control,
    },
    edge::v1::{
        self as edge, Broadcast, DescribeEdge, Disconnect, ListChannels, ListConnections, SubscribeUser,
        UnsubscribeUser, question::Question,
    },
};
use sanjay_protocol::{ErrorCode, Payload, limits::MAX_REASON_BYTES, names};
use sanjay_runtime::{SharedClock, SharedRandom, control::MAX_CHANNELS, random::uuid_v7};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use super::{Refusal, backend::caller, fanout::in_time, revocations, stream::Answers, watch};
use crate::{
    metrics::Metrics,
    revocations::Revocations,
    router::{Asked, Router},
};

/// Channels of a page of a list, unless the caller says how many.
const DEFAULT_PAGE: usize = 100;

/// Most bytes of the reason of a disconnect: a close frame has room for no more.
const MAX_CLOSE_REASON_BYTES: usize = 120;

/// The back ends' API for connections.
#[derive(Clone)]
pub(crate) struct ControlApi {
    pub(crate) router: Router,
    pub(crate) metrics: Metrics,
    pub(crate) clock: SharedClock,
    pub(crate) random: SharedRandom,
    pub(crate) revocations: Revocations,
    /// How long a call that writes may take.
    pub(crate) deadline: Duration,
    /// For those who watch.
    pub(crate) room: Arc<Semaphore>,
    /// Ends streams on shutdown.
    pub(crate) stop: CancellationToken,
}

impl ControlApi {
    /// Asks every edge. Fails when no router could be asked: then nothing is known.
    async fn ask(&self, question: Question) -> Result<Asked, Refusal> {
        self.router.ask(question).await.map_err(|error| {
            let text = format!("{error}; nobody could be asked, and what was done is unknown: try again");
            Refusal::new(ErrorCode::Unavailable, text)
        })
    }

    /// Counts a call by its result.
    fn counted<T>(&self, call: &'static str, result: Result<T, Refusal>) -> Result<Response<T>, Status> {
        self.metrics.control(call, result.as_ref().map_or_else(|refusal| refusal.code.as_str(), |_| "ok"));
        result.map(Response::new).map_err(Status::from)
    }

    async fn disconnected(
        &self,
        caller: &Arc<str>,
        request: DisconnectRequest,
    ) -> Result<DisconnectResponse, Refusal> {
        let DisconnectRequest { user, session, reason, reconnect } = request;
        names::check("user", &user)?;
        names::check_text("reason", &reason, MAX_CLOSE_REASON_BYTES)?;
        let session = match session.as_str() {
            "" => Vec::new(),
            text => checked_session(text)?.as_bytes().to_vec(),
        };
        let one = !session.is_empty();
        let question = Disconnect { user, session: session.into(), reason, reconnect };
        let Asked { answer, .. } = self.ask(Question::Disconnect(question)).await?;
        let (count, complete) = (answer.changed, answer.complete);
        tracing::info!(caller = &**caller, count, complete, reconnect, "a back end closed connections");
        if one && count == 0 && complete {
            let text =
                "the user has no connection with this session; ListConnections names those that it has";
            return Err(Refusal::new(ErrorCode::NotFound, text));
        }
        Ok(DisconnectResponse { disconnected: count, complete })
    }

    async fn connections(
        &self,
        ListConnectionsRequest { user }: ListConnectionsRequest,
    ) -> Result<ListConnectionsResponse, Refusal> {
        names::check("user", &user)?;
        let Asked { answer, .. } = self.ask(Question::ListConnections(ListConnections { user })).await?;
        Ok(ListConnectionsResponse {
            complete: answer.complete && !answer.more,
            connections: answer.connections.into_iter().map(connection).collect(),
        })
    }

    async fn subscribed(&self, request: SubscribeRequest) -> Result<SubscribeResponse, Refusal> {
        let SubscribeRequest { user, channel } = request;
        names::check("user", &user)?;
        names::check("channel", &channel)?;
        let Asked { answer, .. } = self.ask(Question::Subscribe(SubscribeUser { user, channel })).await?;
        let (sessions, subscribed, refused) = (answer.sessions, answer.changed, answer.refused);
        Ok(SubscribeResponse { sessions, subscribed, refused, complete: answer.complete })
    }

    async fn unsubscribed(&self, request: UnsubscribeRequest) -> Result<UnsubscribeResponse, Refusal> {
        let UnsubscribeRequest { user, channel, reason, retryable } = request;
        names::check("user", &user)?;
        names::check("channel", &channel)?;
        names::check_text("reason", &reason, MAX_REASON_BYTES)?;
        let question = UnsubscribeUser { user, channel, reason, retryable };
        let Asked { answer, .. } = self.ask(Question::Unsubscribe(question)).await?;
        let (sessions, unsubscribed) = (answer.sessions, answer.changed);
        Ok(UnsubscribeResponse { sessions, unsubscribed, complete: answer.complete })
    }

    async fn channels(&self, request: ListChannelsRequest) -> Result<ListChannelsResponse, Refusal> {
        let ListChannelsRequest { prefix, page_size, page_token } = request;
        names::check_optional("prefix", &prefix)?;
        names::check_optional("page_token", &page_token)?;
        let limit = match usize::try_from(page_size).unwrap_or(usize::MAX) {
            0 => DEFAULT_PAGE,
            size @ 1..=MAX_CHANNELS => size,
            size => {
                return Err(Refusal::bad(format!(
                    "page_size is {size}; give 1 to {MAX_CHANNELS}, or 0 for {DEFAULT_PAGE}"
                )));
            }
        };
        // A page ends with a channel's name, and that is where the next begins.
        let question = ListChannels { prefix, after: page_token, limit: limit as u32 };
        let Asked { answer, .. } = self.ask(Question::ListChannels(question)).await?;
        let last = answer.channels.last().filter(|_| answer.more);
        Ok(ListChannelsResponse {
            next_page_token: last.map(|last| last.channel.clone()).unwrap_or_default(),
            complete: answer.complete,
            channels: answer.channels.into_iter().map(channel).collect(),
        })
    }

    async fn nodes(&self) -> Result<ListNodesResponse, Refusal> {
        let Asked { answer, routers, .. } = self.ask(Question::Describe(DescribeEdge {})).await?;
        let edge = |edge: edge::EdgeNode| LiveNode {
            role: "edge".to_owned(),
            name: edge.edge_id,
            build: edge.build,
            since_us: edge.since_us,
            connections: edge.connections,
        };
        let router = |router: sanjay_proto::router::v1::RouterNode| LiveNode {
            role: "router".to_owned(),
            name: router.router_id,
            build: router.build,
            since_us: router.since_us,
            connections: router.edges.into(),
        };
        let mut nodes: Vec<LiveNode> = answer.edges.into_iter().map(edge).collect();
        nodes.extend(routers.into_iter().map(router));
        nodes.sort_by(|a, b| (&a.role, &a.name).cmp(&(&b.role, &b.name)));
        Ok(ListNodesResponse { nodes, complete: answer.complete })
    }

    async fn broadcasted(
        &self,
        caller: &Arc<str>,
        BroadcastRequest { payload }: BroadcastRequest,
    ) -> Result<BroadcastResponse, Refusal> {
        let payload = Some(Payload::from_backend(payload)?.into());
        let id = uuid_v7(&*self.clock, &*self.random);
        let message_id = id.as_bytes().to_vec().into();
        let question = Broadcast { message_id, payload, time_us: self.clock.now_us() };
        let Asked { answer, edges, .. } = self.ask(Question::Broadcast(question)).await?;
        let (reached, complete) = (answer.changed, answer.complete);
        tracing::info!(caller = &**caller, reached, complete, "a back end told every client something");
        Ok(BroadcastResponse {
            message_id: id.to_string(),
            reached,
            passed_over: answer.sessions.saturating_sub(reached),
            edges,
            complete,
        })
    }
}

#[tonic::async_trait]
impl Control for ControlApi {
    type WatchConnectionsStream = Answers<WatchConnectionsResponse>;

    async fn disconnect(
        &self,
        request: Request<DisconnectRequest>,
    ) -> Result<Response<DisconnectResponse>, Status> {
        let caller = caller(&request)?;
        self.counted("disconnect", self.disconnected(&caller, request.into_inner()).await)
    }

    async fn list_connections(
        &self,
        request: Request<ListConnectionsRequest>,
    ) -> Result<Response<ListConnectionsResponse>, Status> {
        self.counted("list_connections", self.connections(request.into_inner()).await)
    }

    async fn subscribe(
        &self,
        request: Request<SubscribeRequest>,
    ) -> Result<Response<SubscribeResponse>, Status> {
        self.counted("subscribe", self.subscribed(request.into_inner()).await)
    }

    async fn unsubscribe(
        &self,
        request: Request<UnsubscribeRequest>,
    ) -> Result<Response<UnsubscribeResponse>, Status> {
        self.counted("unsubscribe", self.unsubscribed(request.into_inner()).await)
    }

    async fn list_channels(
        &self,
        request: Request<ListChannelsRequest>,
    ) -> Result<Response<ListChannelsResponse>, Status> {
        self.counted("list_channels", self.channels(request.into_inner()).await)
    }

    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        self.counted("list_nodes", self.nodes().await)
    }

    async fn broadcast(
        &self,
        request: Request<BroadcastRequest>,
    ) -> Result<Response<BroadcastResponse>, Status> {
        let caller = caller(&request)?;
        self.counted("broadcast", self.broadcasted(&caller, request.into_inner()).await)
    }

    async fn watch_connections(
        &self,
        request: Request<WatchConnectionsRequest>,
    ) -> Result<Response<Self::WatchConnectionsStream>, Status> {
        let watching = watch::watch(&self.router, &self.room, self.stop.clone(), request.into_inner());
        self.counted("watch_connections", watching.await)
    }

    async fn revoke(&self, request: Request<RevokeRequest>) -> Result<Response<RevokeResponse>, Status> {
        let caller = caller(&request)?;
        let revoke = revocations::revoke(&self.revocations, request.into_inner(), &caller);
        self.counted("revoke", in_time(self.deadline, revoke).await)
    }

    async fn unrevoke(
        &self,
        request: Request<UnrevokeRequest>,
    ) -> Result<Response<UnrevokeResponse>, Status> {
        let caller = caller(&request)?;
        let unrevoke = revocations::unrevoke(&self.revocations, request.into_inner(), &caller);
        self.counted("unrevoke", in_time(self.deadline, unrevoke).await)
    }

    async fn list_revocations(
        &self,
        request: Request<ListRevocationsRequest>,
    ) -> Result<Response<ListRevocationsResponse>, Status> {
        self.counted("list_revocations", revocations::list(&self.revocations, request.get_ref()))
    }
}

/// A session's id.
pub(super) fn checked_session(text: &str) -> Result<Uuid, Refusal> {
    Uuid::try_parse(text).map_err(|error| {
        let example = "01890a5d-ac96-774b-bcce-b302099a8057";
        Refusal::bad(format!("session {text:?} is not a UUID ({error}); write it like {example}"))
    })
}

fn connection(found: edge::Connection) -> UserConnection {
    UserConnection {
        session: Uuid::from_slice(&found.session).unwrap_or_default().to_string(),
        edge: found.edge_id,
        device: found.device,
        client: found.client,
        since_us: found.since_us,
        channels: found.channels,
    }
}

fn channel(found: edge::ChannelCount) -> LiveChannel {
    LiveChannel { channel: found.channel, subscribers: found.subscribers }
}
