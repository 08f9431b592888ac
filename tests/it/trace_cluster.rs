//! One trace for each message across separate processes, as a collector gets it from them.

use std::time::Duration;

use sanjay_client::{Backend, ChannelEvent, Client, InboxEvent, protocol::Payload};
use sanjay_testkit::{
    Cluster, ClusterBuilder, Peer, Role, backend, client_options,
    collector::{CollectedSpan, Collector, SpanKind},
    within,
};
use serde_json::json;

/// The span of the back end that calls.
const CALLER: &str = "00f067aa0ba902b7";

/// What a send is made of, when the client returns the trace with its ack.
const SEND: [&str; 5] = [
    "delivery process consumer below delivery send",
    "delivery send producer below the caller",
    "delivery settle consumer below edge push",
    "edge push consumer below router relay",
    "router relay producer below delivery process",
];

/// What a back end's publish is made of.
const PUBLISH: [&str; 4] = [
    "delivery publish producer below the caller",
    "edge push consumer below router relay",
    "router publish consumer below delivery publish",
    "router relay producer below router publish",
];

fn text(text: &str) -> Payload {
    Payload::Text(text.into())
}

fn trace_id(number: u32) -> String {
    format!("{number:08x}77b34da6a3ce929d0e0e4736")
}

/// The API, called under a span of this trace.
fn caller(api: &Backend, trace: &str, sampled: bool) -> Backend {
    api.traced(&format!("00-{trace}-{CALLER}-0{}", u8::from(sampled))).unwrap()
}

fn role(span: &CollectedSpan) -> &str {
    span.service.strip_prefix("sanjay-").unwrap_or(&span.service)
}

/// The spans of a trace in words, sorted: who did what, below what. A machine that is busy for two seconds has a message
/// relayed again, which is right, and is looked at in a test of its own.
fn tree(spans: &[CollectedSpan], trace: &str) -> Vec<String> {
    let spans: Vec<_> = spans.iter().filter(|span| span.trace_id == trace).collect();
    let mut tree: Vec<_> = spans
        .iter()
        .filter(|span| !span.attributes.contains_key("sanjay.redelivery.attempt"))
        .map(|span| {
            let parent = match span.parent_id.as_deref() {
                None => "nothing".to_owned(),
                Some(CALLER) => "the caller".to_owned(),
                Some(id) => spans.iter().find(|parent| parent.span_id == id).map_or_else(
                    || "what is missing".to_owned(),
                    |span| format!("{} {}", role(span), span.name),
                ),
            };
            let kind = match span.kind {
                Some(SpanKind::Producer) => "producer",
                Some(SpanKind::Consumer) => "consumer",
                _ => "another kind",
            };
            format!("{} {} {kind} below {parent}", role(span), span.name)
        })
        .collect();
    tree.sort();
    tree
}

/// Waits until a trace is exactly this, and gives its spans by their begin.
async fn expect(collector: &Collector, trace: &str, expected: &[&str]) -> Vec<CollectedSpan> {
    let mut expected: Vec<_> = expected.to_vec();
    expected.sort_unstable();
    let what = format!("trace {trace} is {expected:#?}");
    collector.wait_for(&what, |spans| (tree(spans, trace) == expected).then_some(())).await;
    collector.trace(trace)
}

fn find<'a>(spans: &'a [CollectedSpan], name: &str) -> &'a CollectedSpan {
    spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("no {name}: {spans:#?}"))
}

/// Sends to one user; gives the message's id.
async fn send(api: &Backend, user: &str) -> String {
    let results = api.send(&[user], text("secret text"), "").await.unwrap();
    results[0].result.clone().unwrap().message_id
}

/// Acknowledges with the trace that came with the message.
async fn ack_traced(peer: &mut Peer, from: u64, to: u64, trace: &serde_json::Value) {
    let answer = peer.call(json!({ "ack": { "ranges": [[from, to]], "trace": trace } })).await;
    assert!(answer["ok"].is_object(), "{answer}");
}

/// Every attribute of every span, for what must be in none of them.
fn all_text(collector: &Collector) -> String {
    format!("{:?}", collector.spans())
}

#[tokio::test]
async fn a_send_is_one_trace_of_five_spans_in_three_services() {
    within(120, "the trace of a send", async {
        let collector = Collector::start().await;
        let cluster = Cluster::builder().traces_to(&collector).start().await;
        let api = backend(&cluster.server()).await;

        // A client of ours returns the trace with its ack.
        let client = Client::connect(client_options(&cluster.url(), "ann-the-user", 1)).await.unwrap();
        client.connected().await.unwrap();
        let mut inbox = client.inbox().unwrap();
        let first = trace_id(1);
        let message_id = send(&caller(&api, &first, true), "ann-the-user").await;
        let Some(InboxEvent::Message(delivery)) = inbox.next().await else { panic!("no message") };
        let seen = delivery.message.trace.clone();
        delivery.acker.ack().await.unwrap();
        let spans = expect(&collector, &first, &SEND).await;
        let push = find(&spans, "push");
        assert_eq!(seen, format!("00-{first}-{}-01", push.span_id), "the client sees the push");
        assert_eq!(push.attribute("sanjay.push.from"), Some("hint"));
        for span in &spans {
            assert_eq!(span.attribute("messaging.system"), Some("sanjay"), "{span:?}");
            assert_eq!(span.attribute("messaging.message.id"), Some(message_id.as_str()), "{span:?}");
            assert_eq!(span.attribute("messaging.destination.template"), Some("inbox/{user}"), "{span:?}");
            assert_eq!(span.attribute("messaging.operation.name"), Some(span.name.as_str()), "{span:?}");
            assert!(span.attribute("messaging.operation.type").is_some(), "{span:?}");
            assert!(span.error.is_none() && span.links.is_empty(), "{span:?}");
        }

        // Another client does not: the settling hangs below what the inbox stored.
        let mut bob = Peer::with_inbox(&cluster.url(), "bob", 64).await;
        let second = trace_id(2);
        send(&caller(&api, &second, true), "bob").await;
        bob.event("inbox").await;
        bob.ack(1, 1).await;
        let mut below_stored = SEND;
        below_stored[2] = "delivery settle consumer below delivery process";
        expect(&collector, &second, &below_stored).await;

        // A trace that is not this message's is not believed.
        let third = trace_id(3);
        send(&caller(&api, &third, true), "bob").await;
        bob.event("inbox").await;
        ack_traced(&mut bob, 2, 2, &json!(seen)).await;
        expect(&collector, &third, &below_stored).await;
        expect(&collector, &first, &SEND).await;

        let text = all_text(&collector);
        assert!(!text.contains("secret text") && !text.contains("ann-the-user"), "{text}");
    })
    .await;
}

#[tokio::test]
async fn a_publish_is_one_trace_from_a_back_end_and_from_a_client() {
    within(120, "the trace of a publish", async {
        let collector = Collector::start().await;
        let cluster = Cluster::builder().traces_to(&collector).start().await;
        let api = backend(&cluster.server()).await;
        // Several sockets on several shards of one edge.
        let mut subscribers = Vec::new();
        for number in 0..6 {
            let mut peer = Peer::connect(&cluster.url(), &format!("user-{number}")).await;
            peer.subscribe("news").await;
            subscribers.push(peer);
        }

        let trace = trace_id(1);
        let published = caller(&api, &trace, true).publish("news", text("secret text"), "").await.unwrap();
        let spans = expect(&collector, &trace, &PUBLISH).await;
        let push = find(&spans, "push");
        assert_eq!(push.attributes["sanjay.sockets"], json!(6));
        assert_eq!(find(&spans, "relay").attributes["sanjay.edges"], json!(1));
        for span in &spans {
            assert_eq!(
                span.attribute("messaging.message.id"),
                Some(published.message_id.as_str()),
                "{span:?}"
            );
            assert_eq!(span.attribute("messaging.destination.name"), Some("news"), "{span:?}");
        }
        for peer in &mut subscribers {
            let message = peer.event("message").await;
            assert_eq!(message["trace"], format!("00-{trace}-{}-01", push.span_id));
        }

        // Everything on a stream is below the span under which it was opened.
        let trace = trace_id(2);
        let mut stream = caller(&api, &trace, true).publish_stream();
        stream.publish("news", text("secret text"), "").await.unwrap().wait().await.unwrap();
        expect(&collector, &trace, &PUBLISH).await;
        subscribers[1].event("message").await;

        subscribers[0].publish("news", "secret text").await;
        let message = subscribers[1].event("message").await;
        let trace = message["trace"].as_str().unwrap().split('-').nth(1).unwrap().to_owned();
        let from_client = [
            "edge publish producer below nothing",
            "router publish consumer below edge publish",
            "router relay producer below router publish",
            "edge push consumer below router relay",
        ];
        expect(&collector, &trace, &from_client).await;
        let text = all_text(&collector);
        assert!(!text.contains("secret text") && !text.contains("user-0"), "{text}");
    })
    .await;
}

#[tokio::test]
async fn a_trace_goes_on_through_the_death_of_an_edge() {
    within(120, "a trace through an edge's death", async {
        let collector = Collector::start().await;
        let mut cluster = Cluster::builder().traces_to(&collector).start().await;
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        let trace = trace_id(1);
        send(&caller(&api, &trace, true), "ann").await;
        ann.event("inbox").await;
        // What an edge has not exported yet dies with it.
        collector.wait_for_trace(&trace, &["send", "process", "relay", "push"]).await;
        cluster.kill(Role::Edge);
        cluster.restart(Role::Edge).await;

        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        let message = ann.event("inbox").await;
        ack_traced(&mut ann, 1, 1, &message["trace"]).await;
        let mut expected = SEND.to_vec();
        expected.push("edge push consumer below delivery process");
        let spans = expect(&collector, &trace, &expected).await;
        let again = spans.iter().find(|span| span.attribute("sanjay.push.from") == Some("read")).unwrap();
        assert_eq!(find(&spans, "settle").parent_id.as_ref(), Some(&again.span_id));
    })
    .await;
}

#[tokio::test]
async fn a_redelivery_is_in_the_same_trace_and_links_the_first_relay() {
    within(120, "the trace of a redelivery", async {
        let collector = Collector::start().await;
        let mut cluster = Cluster::builder().traces_to(&collector).start().await;
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        cluster.stop(Role::Edge);
        let trace = trace_id(1);
        send(&caller(&api, &trace, true), "ann").await;
        let relays = |spans: &[CollectedSpan]| {
            let is_relay = |span: &&CollectedSpan| span.trace_id == trace && span.name == "relay";
            let mut relays: Vec<_> = spans.iter().filter(is_relay).cloned().collect();
            relays.sort_by_key(|span| span.start_ns);
            (relays.len() >= 2).then_some(relays)
        };
        let relayed = collector.wait_for("the message is relayed again", relays).await;
        cluster.cont(Role::Edge);
        let (first, again) = (&relayed[0], &relayed[1]);
        assert_eq!(first.links, []);
        assert_eq!(again.links, [(trace.clone(), first.span_id.clone())]);
        assert_eq!(first.parent_id, again.parent_id, "both below what the inbox stored");
        assert_eq!(first.attributes.get("sanjay.redelivery.attempt"), None);
        assert_eq!(again.attributes["sanjay.redelivery.attempt"], json!(1));

        let message = ann.event("inbox").await;
        ack_traced(&mut ann, 1, 1, &message["trace"]).await;
        let spans = collector.wait_for_trace(&trace, &["push", "settle"]).await;
        let push = find(&spans, "push");
        assert_eq!(find(&spans, "settle").parent_id.as_ref(), Some(&push.span_id));
    })
    .await;
}

#[tokio::test]
async fn batches_have_traces_of_their_own_that_link_their_messages() {
    within(120, "the traces of batches", async {
        let collector = Collector::start().await;
        let cluster = Cluster::builder().traces_to(&collector).start().await;
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        let traces = [trace_id(1), trace_id(2), trace_id(3)];
        for trace in &traces {
            send(&caller(&api, trace, true), "ann").await;
            ann.event("inbox").await;
        }
        ann.ack(1, 3).await;
        let batch = collector
            .wait_for("a settled batch", |spans| {
                spans.iter().find(|span| span.name == "settle batch").cloned()
            })
            .await;
        let mut linked: Vec<_> = batch.links.iter().map(|(trace, _)| trace.clone()).collect();
        linked.sort();
        assert_eq!(linked, traces);
        assert_eq!(
            (&batch.parent_id, &batch.attributes["messaging.batch.message_count"]),
            (&None, &json!(3))
        );
        for trace in &traces {
            let spans = collector.wait_for_trace(trace, &["settle"]).await;
            let settle = find(&spans, "settle");
            assert_eq!(settle.links, [(batch.trace_id.clone(), batch.span_id.clone())]);
        }

        // The messages of one send are committed together.
        let trace = trace_id(4);
        let users = ["bob", "cid", "dan"];
        caller(&api, &trace, true).send(&users, text("t"), "").await.unwrap();
        let commit = collector
            .wait_for("a group commit", |spans| spans.iter().find(|span| span.name == "commit").cloned())
            .await;
        let process = |spans: &[CollectedSpan]| {
            let process = spans.iter().filter(|span| span.trace_id == trace && span.name == "process");
            let ids: Vec<_> = process.map(|span| (trace.clone(), span.span_id.clone())).collect();
            (ids.len() == users.len()).then_some(ids)
        };
        let mut expected = collector.wait_for("each message has its span", process).await;
        let mut links = commit.links.clone();
        expected.sort();
        links.sort();
        assert_eq!(links, expected);
        assert_ne!(commit.trace_id, trace);
    })
    .await;
}

/// Does everything once: a publish, a send and their receipt. Gives the trace of the publish as a subscriber saw it.
async fn everything(api: &Backend, peer: &mut Peer, seq: u64) -> String {
    api.publish("news", text("t"), "").await.unwrap();
    let seen = peer.event("message").await["trace"].as_str().unwrap_or_default().to_owned();
    send(api, "ann").await;
    let message = peer.event("inbox").await;
    ack_traced(peer, seq, seq, &message["trace"]).await;
    peer.publish("news", "t").await;
    peer.event("message").await;
    seen
}

#[tokio::test]
async fn what_is_not_sampled_is_not_exported() {
    within(120, "unsampled traces", async {
        let collector = Collector::start().await;
        // No trace that begins here is recorded; what callers say counts all the same.
        let builder: ClusterBuilder = Cluster::builder().traces_to(&collector);
        let cluster = builder.set("telemetry.sample_ratio", 0.0).start().await;
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        ann.subscribe("news").await;

        let (unsampled, sampled) = (trace_id(1), trace_id(2));
        let seen = everything(&caller(&api, &unsampled, false), &mut ann, 1).await;
        assert_eq!(seen, format!("00-{unsampled}-{CALLER}-00"), "it travels on as it came");
        let seen = everything(&api, &mut ann, 2).await;
        assert!(seen.starts_with("00-") && seen.ends_with("-00"), "a trace for logs, not recorded: {seen}");
        everything(&caller(&api, &sampled, true), &mut ann, 3).await;

        // Processes export in order: what came before the last spans of each would be here by then.
        expect(&collector, &sampled, &[&SEND[..], &PUBLISH[..]].concat()).await;
        let others: Vec<_> = collector.spans().into_iter().filter(|span| span.trace_id != sampled).collect();
        assert_eq!(others, []);
    })
    .await;
}

#[tokio::test]
async fn traces_cross_several_nodes_of_each_role() {
    within(180, "traces over many nodes", async {
        let collector = Collector::start().await;
        let builder = Cluster::builder().edges(2).routers(2).deliveries(2).redis().mongo();
        let cluster = builder.traces_to(&collector).start().await;
        let mut subscribers = Vec::new();
        for (number, url) in cluster.urls().iter().enumerate() {
            let client = Client::connect(client_options(url, &format!("user-{number}"), 1)).await.unwrap();
            client.connected().await.unwrap();
            let subscription = client.subscribe("news").await.unwrap();
            subscription.subscribed().await.unwrap();
            let inbox = client.inbox().unwrap();
            subscribers.push((client, subscription, inbox));
        }
        for (number, server) in cluster.servers().iter().enumerate() {
            let api = backend(server).await;
            let publish = trace_id(10 + number as u32);
            caller(&api, &publish, true).publish("news", text("t"), "").await.unwrap();
            let mut seen = Vec::new();
            for (_, subscription, _) in &mut subscribers {
                let message = loop {
                    match subscription.next().await {
                        Some(ChannelEvent::Message(message)) => break message,
                        Some(ChannelEvent::Subscribed { .. }) => {}
                        other => panic!("{other:?}"),
                    }
                };
                seen.push(message.trace);
            }
            // One relay for each router that has one of the edges, one push for each edge.
            let whole = |spans: &[CollectedSpan]| {
                let tree = tree(spans, &publish);
                let count = |line| tree.iter().filter(|text| *text == line).count();
                let relays = count("router relay producer below router publish");
                let whole = count("delivery publish producer below the caller") == 1
                    && count("router publish consumer below delivery publish") == 1
                    && (1..=2).contains(&relays)
                    && count("edge push consumer below router relay") == 2
                    && tree.len() == 4 + relays;
                whole.then_some(())
            };
            collector.wait_for("the publish is one trace", whole).await;
            let spans = collector.trace(&publish);
            for seen in seen {
                assert!(
                    spans.iter().any(|span| span.name == "push" && seen.contains(&span.span_id)),
                    "{seen}"
                );
            }

            for (to, (_, _, inbox)) in subscribers.iter_mut().enumerate() {
                let sent = trace_id(20 + 2 * number as u32 + to as u32);
                send(&caller(&api, &sent, true), &format!("user-{to}")).await;
                let Some(InboxEvent::Message(delivery)) = inbox.next().await else { panic!("no message") };
                delivery.acker.ack().await.unwrap();
                expect(&collector, &sent, &SEND).await;
            }
        }
    })
    .await;
}

/// Spans last as long as what they stand for.
#[tokio::test]
async fn spans_tell_how_long_it_took() {
    within(120, "the times of spans", async {
        let collector = Collector::start().await;
        let cluster = Cluster::builder().traces_to(&collector).start().await;
        let api = backend(&cluster.server()).await;
        let mut ann = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        let trace = trace_id(1);
        send(&caller(&api, &trace, true), "ann").await;
        let message = ann.event("inbox").await;
        ack_traced(&mut ann, 1, 1, &message["trace"]).await;
        let spans = expect(&collector, &trace, &SEND).await;
        for (name, at_least) in [("send", 1), ("process", 1), ("settle", 1), ("relay", 0), ("push", 0)] {
            let span = find(&spans, name);
            let lasted = Duration::from_nanos(span.end_ns - span.start_ns);
            let least = Duration::from_micros(at_least);
            assert!((least..Duration::from_secs(20)).contains(&lasted), "{name} lasted {lasted:?}");
        }
        let order: Vec<_> = spans.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(order, ["send", "process", "relay", "push", "settle"]);
    })
    .await;
}
