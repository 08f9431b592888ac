//! A message's way: the caller's trace reaches the client, the logs name it, and milestones are remembered.

use std::collections::BTreeSet;

use sanjay_proto::{
    client::v1::{Payload, payload::Kind},
    delivery::v1::{PublishRequest, SendRequest, delivery_client::DeliveryClient, send_result},
};
use sanjay_testkit::{Peer, Settings, Standalone, eventually, within};
use serde_json::Value;
use tonic::Request;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn traced<T>(server: &Standalone, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let metadata = request.metadata_mut();
    metadata.insert("authorization", format!("Bearer {}", server.api_key()).parse().unwrap());
    metadata.insert("traceparent", format!("00-{TRACE}-00f067aa0ba902b7-01").parse().unwrap());
    request
}

fn text() -> Option<Payload> {
    Some(Payload { kind: Some(Kind::Text("t".into())) })
}

/// Checks a `traceparent` of the caller's trace with a span of the server's own.
fn assert_continues(trace: &Value) {
    let parts: Vec<_> = trace.as_str().unwrap_or_default().split('-').collect();
    let [version, id, span, flags] = parts[..] else { panic!("no traceparent: {trace}") };
    assert_eq!((version, id, flags), ("00", TRACE, "01"), "{trace}");
    assert_eq!(span.len(), 16, "{trace}");
    assert_ne!(span, "00f067aa0ba902b7", "the server's span, not the caller's: {trace}");
}

async fn stages(server: &Standalone, id: &str) -> BTreeSet<String> {
    let output = server.cli(["trace", id, "--json"]).run().await.succeeded();
    let trace: Value = serde_json::from_str(&output).unwrap();
    let milestones = trace["milestones"].as_array().unwrap();
    let times: Vec<_> = milestones.iter().map(|milestone| milestone["time_us"].as_u64().unwrap()).collect();
    assert!(times.is_sorted(), "{output}");
    let name = |m: &Value| format!("{} {}", m["service"].as_str().unwrap(), m["stage"].as_str().unwrap());
    milestones.iter().map(name).collect()
}

async fn expect_stages(server: &Standalone, id: &str, expected: &[&str]) {
    let what = format!("{expected:?} in the trace");
    eventually(&what, std::time::Duration::from_secs(10), async || {
        let stages = stages(server, id).await;
        expected.iter().all(|stage| stages.contains(*stage)).then_some(())
    })
    .await;
}

#[tokio::test]
async fn a_callers_trace_reaches_the_client_and_the_logs() {
    within(60, "traces", async {
        let settings = Settings::default().set("telemetry.log_level", "\"debug\"");
        let server = Standalone::start_with(settings).await;
        let mut client = DeliveryClient::connect(server.server().to_owned()).await.unwrap();
        let mut ann = Peer::with_inbox(server.url(), "ann", 64).await;
        ann.subscribe("news").await;

        let publish = PublishRequest { channel: "news".into(), payload: text(), ..PublishRequest::default() };
        let published = client.publish(traced(&server, publish)).await.unwrap().into_inner();
        let message = ann.event("message").await;
        assert_eq!(message["message_id"], published.message_id.as_str());
        assert_continues(&message["trace"]);
        expect_stages(
            &server,
            &published.message_id,
            &["router assigned", "router fanned_out", "edge written"],
        )
        .await;

        let send = SendRequest { users: vec!["ann".into()], payload: text(), ..SendRequest::default() };
        let sent = client.send(traced(&server, send)).await.unwrap().into_inner();
        let Some(send_result::Result::Accepted(accepted)) = &sent.results[0].result else {
            panic!("{sent:?}")
        };
        let message = ann.event("inbox").await;
        assert_continues(&message["trace"]);
        ann.ack(1, 1).await;
        let steps = ["delivery accepted", "delivery committed", "edge written", "delivery acked"];
        expect_stages(&server, &accepted.message_id, &steps).await;

        let mut named = 0;
        for line in server.process.stderr().lines() {
            let entry: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
            named += usize::from(entry["trace_id"] == TRACE && entry["span_id"].is_string());
        }
        assert!(named > 0, "no line of the log names the trace");
    })
    .await;
}

#[tokio::test]
async fn a_message_of_a_client_has_a_trace_of_its_own() {
    within(60, "a client's message", async {
        let server = Standalone::start().await;
        let mut ann = Peer::connect(server.url(), "ann").await;
        ann.subscribe("news").await;
        let published = ann.publish("news", "t").await;
        let message = ann.event("message").await;
        let trace = message["trace"].as_str().unwrap_or_default();
        assert_eq!(trace.split('-').count(), 4, "{message}");
        let id = published["message_id"].as_str().unwrap();
        expect_stages(&server, id, &["edge received", "router assigned", "edge written"]).await;
    })
    .await;
}
