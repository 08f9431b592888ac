//! Whatever a back end calls: the named status or error, and the server serves the next one.

use futures::{StreamExt, stream};
use sanjay_client::protocol::Payload as ClientPayload;
use sanjay_proto::{
    client::v1::{Payload, payload::Kind},
    delivery::v1::{
        GetDeliveryRequest, GetTraceRequest, PublishRequest, SendRequest, delivery_client::DeliveryClient,
        publish_stream_response, send_stream_response,
    },
    edge::v1::{ReadInboxRequest, inbox_client::InboxClient},
    router::v1::{LocateRequest, router_client::RouterClient},
};
use sanjay_testkit::{API_KEY, Standalone, Wire, backend, within};
use tonic::{Code, Request, Status, transport::Channel};

async fn client(server: &Standalone) -> DeliveryClient<Channel> {
    DeliveryClient::connect(server.server().to_owned()).await.unwrap()
}

fn with_header<T>(message: T, authorization: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", authorization.parse().unwrap());
    request
}

fn with_key<T>(message: T) -> Request<T> {
    with_header(message, &format!("Bearer {API_KEY}"))
}

fn payload(kind: Kind) -> Option<Payload> {
    Some(Payload { kind: Some(kind) })
}

fn publish(channel: &str) -> PublishRequest {
    let payload = payload(Kind::Text("t".into()));
    PublishRequest { channel: channel.into(), payload, ..PublishRequest::default() }
}

fn send<U: Into<String>>(users: impl IntoIterator<Item = U>) -> SendRequest {
    let users = users.into_iter().map(Into::into).collect();
    SendRequest { users, payload: payload(Kind::Text("t".into())), ..SendRequest::default() }
}

/// Payloads that are refused, for both kinds of call.
fn wrong_payloads() -> Vec<(Option<Payload>, &'static str)> {
    vec![
        (None, "payload is missing"),
        (Some(Payload { kind: None }), "payload is missing"),
        (payload(Kind::Json("{\"a\":".into())), "payload.json"),
        (payload(Kind::Json(String::new())), "payload.json"),
        (payload(Kind::Json("1 2".into())), "payload.json"),
        (payload(Kind::Text("x".repeat(65_537))), "65537 bytes"),
        (payload(Kind::Bytes(vec![0; 65_537].into())), "65537 bytes"),
        (payload(Kind::Json("1".repeat(65_537))), "65537 bytes"),
    ]
}

fn wrong_publishes() -> Vec<(PublishRequest, &'static str)> {
    let mut cases = vec![
        (publish(""), "channel is empty"),
        (publish(&"c".repeat(201)), "201 bytes"),
        (publish("a\u{0}"), "U+0000"),
        (PublishRequest { dedupe_key: "k".repeat(201), ..publish("a") }, "dedupe_key has 201 bytes"),
        (PublishRequest { dedupe_key: "\t".into(), ..publish("a") }, "U+0009"),
    ];
    for (payload, part) in wrong_payloads() {
        cases.push((PublishRequest { payload, ..publish("a") }, part));
    }
    cases
}

fn wrong_sends() -> Vec<(SendRequest, &'static str)> {
    let mut cases = vec![
        (send::<String>([]), "0 entries"),
        (send((0..1_001).map(|n| format!("user {n}"))), "1001 entries"),
        (send(["ann", ""]), "users[1]"),
        (send(["ann", "bob", "ann"]), "users[2]"),
        (send(["u".repeat(201)]), "201 bytes"),
        (send(["a\u{1f}"]), "U+001F"),
        (SendRequest { dedupe_key: "k".repeat(201), ..send(["ann"]) }, "dedupe_key has 201 bytes"),
        (SendRequest { dedupe_key: "\u{7f}".into(), ..send(["ann"]) }, "U+007F"),
    ];
    for (payload, part) in wrong_payloads() {
        cases.push((SendRequest { payload, ..send(["ann"]) }, part));
    }
    cases
}

fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, part: &str) {
    let status = result.expect_err(part);
    assert_eq!(status.code(), code, "{part}: {status:?}");
    assert!(status.message().contains(part), "{part:?} is missing: {status:?}");
}

async fn serves_the_next(server: &Standalone) {
    let backend = backend(server.server()).await;
    backend.publish("alive", ClientPayload::Text("t".into()), "").await.unwrap();
    let sent = backend.send(&["alive"], ClientPayload::Text("t".into()), "").await.unwrap();
    assert!(sent[0].result.is_ok());
}

#[tokio::test]
async fn each_wrong_field_of_a_call_is_named() {
    within(60, "wrong calls", async {
        let server = Standalone::start().await;
        let mut client = client(&server).await;
        for (request, part) in wrong_publishes() {
            refused(client.publish(with_key(request)).await, Code::InvalidArgument, part);
        }
        for (request, part) in wrong_sends() {
            refused(client.send(with_key(request)).await, Code::InvalidArgument, part);
        }
        let absent = "01890a5d-ac96-774b-bcce-b302099a8057";
        for (user, id, code, part) in [
            ("", absent, Code::InvalidArgument, "user is empty"),
            ("ann", "", Code::InvalidArgument, "not a UUID"),
            ("ann", "1234", Code::InvalidArgument, "not a UUID"),
            ("ann", absent, Code::NotFound, absent),
        ] {
            let request = GetDeliveryRequest { user: user.into(), message_id: id.into() };
            refused(client.get_delivery(with_key(request)).await, code, part);
        }
        for (id, code, part) in
            [("x", Code::InvalidArgument, "not a UUID"), (absent, Code::NotFound, "nothing is remembered")]
        {
            refused(client.get_trace(with_key(GetTraceRequest { message_id: id.into() })).await, code, part);
        }
        serves_the_next(&server).await;
    })
    .await;
}

#[tokio::test]
async fn a_stream_answers_each_wrong_request_and_goes_on() {
    within(60, "wrong requests on streams", async {
        let server = Standalone::start().await;
        let mut client = client(&server).await;
        let wrong = wrong_publishes();
        let requests: Vec<_> = wrong.iter().flat_map(|(wrong, _)| [wrong.clone(), publish("good")]).collect();
        let answers = client.publish_stream(with_key(stream::iter(requests))).await.unwrap().into_inner();
        let answers: Vec<_> = answers.map(|answer| answer.unwrap().result.unwrap()).collect().await;
        assert_eq!(answers.len(), 2 * wrong.len());
        for (n, (pair, (_, part))) in answers.chunks(2).zip(&wrong).enumerate() {
            use publish_stream_response::Result::{Error, Published};
            let [Error(error), Published(published)] = pair else { panic!("{part}: {pair:?}") };
            assert!(error.message.contains(part) && !error.retryable, "{part}: {error:?}");
            assert_eq!(published.offset, n as u64 + 1);
        }
        let wrong = wrong_sends();
        let requests: Vec<_> = wrong.iter().flat_map(|(wrong, _)| [wrong.clone(), send(["good"])]).collect();
        let answers = client.send_stream(with_key(stream::iter(requests))).await.unwrap().into_inner();
        let answers: Vec<_> = answers.map(|answer| answer.unwrap().result.unwrap()).collect().await;
        assert_eq!(answers.len(), 2 * wrong.len());
        for (pair, (_, part)) in answers.chunks(2).zip(&wrong) {
            use send_stream_response::Result::{Error, Sent};
            let [Error(error), Sent(sent)] = pair else { panic!("{part}: {pair:?}") };
            assert!(error.message.contains(part) && !error.retryable, "{part}: {error:?}");
            assert_eq!(sent.results[0].user, "good");
        }
        serves_the_next(&server).await;
    })
    .await;
}

#[tokio::test]
async fn a_call_without_a_known_key_is_refused() {
    within(60, "wrong keys", async {
        let server = Standalone::start().await;
        let mut client = client(&server).await;
        refused(client.publish(publish("a")).await, Code::Unauthenticated, "carries no API key");
        refused(client.send(send(["ann"])).await, Code::Unauthenticated, "carries no API key");
        let stream = client.publish_stream(stream::iter([publish("a")])).await;
        refused(stream.map(|_| ()), Code::Unauthenticated, "carries no API key");
        for (header, part) in [
            ("Bearer wrong", "not known here"),
            ("Bearer ", "not known here"),
            (API_KEY, "Bearer <API key>"),
            ("Basic dTpw", "Bearer <API key>"),
        ] {
            refused(client.publish(with_header(publish("a"), header)).await, Code::Unauthenticated, part);
        }
        serves_the_next(&server).await;
    })
    .await;
}

#[tokio::test]
async fn what_roles_call_each_other_is_closed_to_back_ends() {
    within(60, "internal services", async {
        let server = Standalone::start().await;
        let mut inbox = InboxClient::connect(server.server().to_owned()).await.unwrap();
        let read = || ReadInboxRequest { queries: Vec::new() };
        refused(inbox.read_inbox(read()).await, Code::Unauthenticated, "");
        refused(inbox.read_inbox(with_key(read())).await, Code::Unauthenticated, "");
        let mut router = RouterClient::connect(server.router().to_owned()).await.unwrap();
        let locate = LocateRequest::default;
        refused(router.locate(locate()).await, Code::Unauthenticated, "");
        refused(router.locate(with_key(locate())).await, Code::Unauthenticated, "");
        serves_the_next(&server).await;
    })
    .await;
}

#[tokio::test]
async fn what_is_no_call_at_all_harms_nobody() {
    within(60, "noise", async {
        let server = Standalone::start().await;
        let noise: [&[u8]; 4] = [
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff",
            b"",
        ];
        for bytes in noise {
            for url in [server.server(), server.router(), server.admin()] {
                Wire::open(url).await.unwrap().write(bytes).await;
            }
        }
        let mut client = client(&server).await;
        // Larger than a server takes in one message.
        let huge = PublishRequest { channel: "c".repeat(5 * 1024 * 1024), ..publish("") };
        let status = client.publish(with_key(huge)).await.unwrap_err();
        assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status:?}");
        serves_the_next(&server).await;
    })
    .await;
}
