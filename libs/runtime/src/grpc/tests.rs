use std::{net::SocketAddr, sync::Arc, time::Duration};

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use parking_lot::Mutex;
use sanjay_proto::edge::v1::{
    AckRequest, AckResponse, AttachRequest, AttachResponse, ReadInboxRequest, ReadInboxResponse,
    inbox_client::InboxClient,
    inbox_server::{Inbox, InboxServer},
    router_link_client::RouterLinkClient,
    router_link_server::{RouterLink, RouterLinkServer},
};
use tokio::net::TcpListener;
use tokio_stream::StreamExt;
use tonic::{
    Code, Request, Response, Status, Streaming,
    service::{Routes, interceptor::InterceptedService},
};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use tonic_reflection::pb::{v1, v1alpha};
use tracing::{Instrument, info_span, instrument::WithSubscriber};
use tracing_subscriber::layer::SubscriberExt;

use super::*;
use crate::{lifecycle::Lifecycle, secret::Secret, trace};

const SERVICES: &[&str] = &["sanjay.edge.v1.Inbox", "sanjay.edge.v1.RouterLink"];
const TIMEOUT: Duration = Duration::from_secs(5);

/// Notes the trace context of each call.
#[derive(Clone, Default)]
struct Noting(Arc<Mutex<Vec<String>>>);

#[tonic::async_trait]
impl Inbox for Noting {
    async fn read_inbox(
        &self,
        request: Request<ReadInboxRequest>,
    ) -> Result<Response<ReadInboxResponse>, Status> {
        self.0.lock().push(trace::extract(request.metadata()));
        Ok(Response::new(ReadInboxResponse::default()))
    }

    async fn ack(&self, _: Request<AckRequest>) -> Result<Response<AckResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }
}

/// A stream that never ends by itself.
struct Endless;

#[tonic::async_trait]
impl RouterLink for Endless {
    type AttachStream = tokio_stream::Pending<Result<AttachResponse, Status>>;

    async fn attach(
        &self,
        _: Request<Streaming<AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        Ok(Response::new(tokio_stream::pending()))
    }
}

fn key() -> Secret {
    Secret::new("cluster key of the tests")
}

async fn served(lifecycle: &Lifecycle, inbox: Noting) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let routes = Routes::new(InboxServer::with_interceptor(inbox, cluster_auth(&key())))
        .add_service(RouterLinkServer::with_interceptor(Endless, cluster_auth(&key())));
    serve("test server", listener, routes, SERVICES, lifecycle).await.unwrap();
    addr
}

fn channel(addr: SocketAddr, key: &Secret) -> PeerChannel {
    connect_lazy(&format!("http://{addr}"), key, TIMEOUT).unwrap()
}

#[tokio::test]
async fn only_the_cluster_key_opens() {
    let lifecycle = Lifecycle::new();
    let addr = served(&lifecycle, Noting::default()).await;
    let read = || ReadInboxRequest::default();
    InboxClient::new(channel(addr, &key())).read_inbox(read()).await.unwrap();

    let wrong = InboxClient::new(channel(addr, &Secret::new("wrong"))).read_inbox(read()).await.unwrap_err();
    assert_eq!(wrong.code(), Code::Unauthenticated);
    assert!(wrong.message().contains("SANJAY_CLUSTER__KEY") && !wrong.message().contains("wrong key of"));

    let plain = tonic::transport::Endpoint::from_shared(format!("http://{addr}")).unwrap().connect_lazy();
    let missing = InboxClient::new(plain.clone()).read_inbox(read()).await.unwrap_err();
    assert_eq!(missing.code(), Code::Unauthenticated);
    assert!(missing.message().contains("authorization: Bearer"), "{}", missing.message());

    let basic = |mut request: Request<()>| {
        request.metadata_mut().insert("authorization", "Basic abc".parse().unwrap());
        Ok(request)
    };
    let basic = InboxClient::new(InterceptedService::new(plain, basic)).read_inbox(read()).await.unwrap_err();
    assert_eq!(basic.code(), Code::Unauthenticated);
    assert!(lifecycle.shutdown(TIMEOUT).await.is_empty());
}

#[test]
fn an_empty_key_opens_nothing() {
    use tonic::service::Interceptor;
    let mut request = Request::new(());
    request.metadata_mut().insert("authorization", "Bearer ".parse().unwrap());
    assert_eq!(cluster_auth(&Secret::default()).call(request).unwrap_err().code(), Code::Unauthenticated);
}

#[tokio::test]
async fn unusable_endpoints_and_keys_are_explained() {
    for endpoint in ["", "router", "router:8083", "https://router:8083", "http://", "ftp://router:1"] {
        let error = connect_lazy(endpoint, &key(), TIMEOUT).unwrap_err();
        assert!(format!("{error:#}").contains("http://host:port"), "{endpoint}: {error:#}");
    }
    let error = connect_lazy("http://router:8083", &Secret::new("line\nbreak"), TIMEOUT).unwrap_err();
    assert!(error.to_string().contains("visible ASCII") && !error.to_string().contains("break"));
}

#[tokio::test]
async fn the_trace_travels_with_the_call() {
    let lifecycle = Lifecycle::new();
    let noting = Noting::default();
    let addr = served(&lifecycle, noting.clone()).await;
    let provider = SdkTracerProvider::builder().build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
    let mut client = InboxClient::new(channel(addr, &key()));
    let call = async {
        let span = info_span!("read");
        let mut request = Request::new(ReadInboxRequest::default());
        trace::inject(&mut request, &span);
        client.read_inbox(request).instrument(span.clone()).await.unwrap();
        trace::traceparent(&span)
    };
    let sent = call.with_subscriber(tracing_subscriber::registry().with(layer)).await;
    assert_eq!(sent.len(), 55, "{sent}");
    assert_eq!(*noting.0.lock(), [sent]);
    lifecycle.shutdown(TIMEOUT).await;
}

#[tokio::test]
async fn health_follows_the_lifecycle() {
    let lifecycle = Lifecycle::new();
    let addr = served(&lifecycle, Noting::default()).await;
    let endpoint = tonic::transport::Endpoint::from_shared(format!("http://{addr}")).unwrap();
    let mut health = HealthClient::new(endpoint.connect_lazy());
    let request = |service: &str| HealthCheckRequest { service: service.to_owned() };
    for service in SERVICES.iter().copied().chain([""]) {
        let status = health.check(request(service)).await.unwrap().into_inner().status();
        assert_eq!(status, ServingStatus::Serving, "{service}");
    }
    let mut watch = health.watch(request(SERVICES[0])).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    lifecycle.begin_shutdown();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    // The stream ends by the server's hand: whoever follows it does not keep the server.
    assert_eq!(watch.message().await.unwrap(), None);
    assert!(lifecycle.shutdown(TIMEOUT).await.is_empty());
    drop((watch, health));
}

#[tokio::test]
async fn both_versions_of_reflection_list_the_services() {
    let lifecycle = Lifecycle::new();
    let addr = served(&lifecycle, Noting::default()).await;
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{addr}")).unwrap().connect_lazy();

    let list = v1::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut client = v1::server_reflection_client::ServerReflectionClient::new(channel.clone());
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    let answer = answers.next().await.unwrap().unwrap().message_response.unwrap();
    let v1::server_reflection_response::MessageResponse::ListServicesResponse(list) = answer else {
        panic!("{answer:?}")
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for service in [SERVICES[0], SERVICES[1], "grpc.health.v1.Health"] {
        assert!(names.iter().any(|name| name == service), "{service} in {names:?}");
    }
    let elsewhere = "sanjay.delivery.v1.Delivery";
    assert!(names.iter().all(|name| name != elsewhere), "a server lists what it serves: {names:?}");

    let list = v1alpha::server_reflection_request::MessageRequest::ListServices(String::new());
    let request = v1alpha::ServerReflectionRequest { host: String::new(), message_request: Some(list) };
    let mut client = v1alpha::server_reflection_client::ServerReflectionClient::new(channel);
    let mut answers = client.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner();
    assert!(answers.next().await.unwrap().unwrap().message_response.is_some());
    drop(answers);
    drop(client);
    assert!(lifecycle.shutdown(TIMEOUT).await.is_empty());
}

#[tokio::test]
async fn an_open_stream_is_cut_at_the_deadline() {
    let lifecycle = Lifecycle::new();
    let addr = served(&lifecycle, Noting::default()).await;
    let mut client = RouterLinkClient::new(channel(addr, &key()));
    let mut stream = client.attach(tokio_stream::pending::<AttachRequest>()).await.unwrap().into_inner();
    assert_eq!(lifecycle.shutdown(Duration::from_millis(50)).await, ["test server"]);
    let cut = tokio::time::timeout(TIMEOUT, stream.message()).await.expect("the stream must end");
    assert!(cut.is_err(), "{cut:?}");
    assert!(tokio::net::TcpStream::connect(addr).await.is_err(), "the listener must be closed");
}
