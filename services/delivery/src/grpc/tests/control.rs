//! Calls about connections, to a router that says what it is told to.

use sanjay_proto::{
    delivery::v1::control_client::ControlClient,
    edge::v1::{Answer, ChannelCount, Connection, EdgeNode, question::Question},
    router::v1::{AskResponse, EdgeStart, RouterNode},
};

use super::*;

type Keyed = InterceptedService<Channel, fn(Request<()>) -> Result<Request<()>, Status>>;

fn control(node: &Node) -> ControlClient<Keyed> {
    ControlClient::with_interceptor(node.channel(), with_key)
}

fn start_of(edge_id: &str) -> EdgeStart {
    EdgeStart { edge_id: edge_id.into(), incarnation: 1 }
}

/// All edges answered.
fn whole(answer: Answer) -> AskResponse {
    AskResponse {
        answer: Some(Answer { complete: true, ..answer }),
        router: Some(RouterNode { router_id: "r1".into(), edges: 2, ..RouterNode::default() }),
        answered: vec![start_of("e1"), start_of("e2")],
        away: vec![start_of("e2")],
        settled: true,
    }
}

fn says(node: &Node, answer: Option<AskResponse>) {
    *node.router.0.answer.lock() = answer;
}

fn asked(node: &Node) -> Vec<Question> {
    let questions = std::mem::take(&mut *node.router.0.questions.lock());
    questions.into_iter().filter_map(|asked| asked.question?.question).collect()
}

#[tokio::test]
async fn bad_requests_are_refused_with_what_would_be_right() {
    let node = Node::start().await;
    says(&node, Some(whole(Answer::default())));
    let (mut api, long) = (control(&node), "x".repeat(201));
    let refused = |status: Status, says: &str| {
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert!(status.message().contains(says), "{status:?}");
    };
    let disconnect = |user: &str, session: &str, reason: &str| DisconnectRequest {
        user: user.into(),
        session: session.into(),
        reason: reason.into(),
        reconnect: false,
    };
    refused(api.disconnect(disconnect("", "", "")).await.unwrap_err(), "user is empty");
    refused(api.disconnect(disconnect("bob", "seven", "")).await.unwrap_err(), "is not a UUID");
    refused(api.disconnect(disconnect("bob", "", &long)).await.unwrap_err(), "at most 120");
    let user = long.clone();
    refused(api.list_connections(ListConnectionsRequest { user }).await.unwrap_err(), "at most 200");
    let subscribe = SubscribeRequest { user: "bob".into(), channel: "a\nb".into() };
    refused(api.subscribe(subscribe).await.unwrap_err(), "control character");
    let unsubscribe = UnsubscribeRequest { user: "bob".into(), ..UnsubscribeRequest::default() };
    refused(api.unsubscribe(unsubscribe).await.unwrap_err(), "channel is empty");
    let list = ListChannelsRequest { page_size: 1_001, ..ListChannelsRequest::default() };
    refused(api.list_channels(list).await.unwrap_err(), "give 1 to 1000");
    refused(api.broadcast(BroadcastRequest { payload: None }).await.unwrap_err(), "payload");
    assert_eq!(asked(&node).len(), 0, "nobody is asked");

    let stranger = ControlClient::new(node.channel()).list_nodes(ListNodesRequest {}).await.unwrap_err();
    assert_eq!(stranger.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn without_a_router_nothing_is_known() {
    let node = Node::start().await;
    let status = control(&node).list_nodes(ListNodesRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    let list = ListConnectionsRequest { user: "bob".into() };
    assert_eq!(control(&node).list_connections(list).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn a_session_that_is_nowhere_is_not_found_once_everybody_was_asked() {
    let node = Node::start().await;
    let session = uuid::Uuid::from_u128(7).to_string();
    let disconnect = DisconnectRequest { user: "bob".into(), session, ..DisconnectRequest::default() };
    says(&node, Some(whole(Answer::default())));
    let status = control(&node).disconnect(disconnect.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    says(&node, Some(AskResponse { settled: false, ..whole(Answer::default()) }));
    let answer = control(&node).disconnect(disconnect).await.unwrap().into_inner();
    assert_eq!((answer.disconnected, answer.complete), (0, false), "it may be at an edge that comes yet");
}

#[tokio::test]
async fn an_answer_is_complete_when_no_edge_is_missing() {
    let node = Node::start().await;
    let list = async || {
        let list = ListConnectionsRequest { user: "bob".into() };
        control(&node).list_connections(list).await.unwrap().into_inner()
    };
    let connections =
        vec![Connection { since_us: 5, channels: 3, edge_id: "e1".into(), ..Connection::default() }];
    let answer = Answer { connections, ..Answer::default() };
    says(&node, Some(whole(answer.clone())));
    let found = list().await;
    assert!(found.complete, "the edge that went has come back");
    assert_eq!((found.connections[0].edge.as_str(), found.connections[0].channels), ("e1", 3));
    says(&node, Some(AskResponse { away: vec![start_of("e3")], ..whole(answer.clone()) }));
    assert!(!list().await.complete, "an edge is away");
    says(&node, Some(whole(Answer { more: true, ..answer.clone() })));
    assert!(!list().await.complete, "there are more");
    let silent =
        AskResponse { answer: Some(Answer { complete: false, ..answer }), ..whole(Answer::default()) };
    says(&node, Some(silent));
    assert!(!list().await.complete, "an edge did not answer");
}

#[tokio::test]
async fn lists_say_what_edges_say() {
    let node = Node::start().await;
    let mut api = control(&node);
    let count = |channel: &str| ChannelCount { channel: channel.into(), subscribers: 2 };
    let channels = vec![count("a"), count("b")];
    says(&node, Some(whole(Answer { channels, more: true, ..Answer::default() })));
    let list = ListChannelsRequest { page_size: 2, prefix: "p".into(), page_token: "o".into() };
    let page = api.list_channels(list).await.unwrap().into_inner();
    assert_eq!((page.channels.len(), page.next_page_token.as_str(), page.complete), (2, "b", true));
    let Some(Question::ListChannels(list)) = asked(&node).pop() else { panic!("another question") };
    assert_eq!((list.prefix.as_str(), list.after.as_str(), list.limit), ("p", "o", 2));

    let edges = vec![EdgeNode { edge_id: "e1".into(), connections: 9, ..EdgeNode::default() }];
    says(&node, Some(whole(Answer { edges, ..Answer::default() })));
    let nodes = api.list_nodes(ListNodesRequest {}).await.unwrap().into_inner().nodes;
    let nodes: Vec<_> = nodes.iter().map(|node| (&*node.role, &*node.name, node.connections)).collect();
    assert_eq!(nodes, [("edge", "e1", 9), ("router", "r1", 2)]);

    says(&node, Some(whole(Answer { sessions: 5, changed: 4, ..Answer::default() })));
    let told = api.broadcast(BroadcastRequest { payload: text("hi") }).await.unwrap().into_inner();
    assert_eq!((told.reached, told.passed_over, told.edges), (4, 1, 2));
    assert_ne!(told.message_id, uuid::Uuid::nil().to_string());
}
