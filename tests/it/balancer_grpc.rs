//! nginx in front of delivery nodes: back ends send through it while nodes die and while it reloads.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use futures::{StreamExt, future::join_all, stream};
use sanjay_client::{Backend, protocol::Payload};
use sanjay_proto::{
    client::v1,
    delivery::v1 as delivery,
    edge::v1::{ReadInboxRequest, inbox_client::InboxClient},
    router::v1::{LocateRequest, router_client::RouterClient},
};
use sanjay_testkit::{
    API_KEY, Cluster, Peer, Process, Role, Token, Wire, backend, eventually,
    servers::{Nginx, NginxOptions},
    within,
};
use tokio::time::Instant;
use tonic::{Code, Request, transport::Endpoint};

use crate::python::python;

const PATIENCE: Duration = Duration::from_secs(20);

fn text(text: &str) -> Payload {
    Payload::Text(text.into())
}

fn user(index: usize) -> String {
    format!("user {index}")
}

/// Sends `each` messages to each user in turn, one after the other, as a back end that repeats what it does not know.
async fn send_all(api: &Backend, users: usize, each: usize, pace: Duration) {
    for number in 0..users * each {
        let (user, key) = (user(number % users), format!("key {number}"));
        let sent = api.send(&[user.as_str()], text(&key), &key).await;
        let sent = sent.unwrap_or_else(|error| panic!("send {number} is lost: {error}"));
        let seq =
            sent[0].result.as_ref().unwrap_or_else(|error| panic!("send {number} failed: {error:?}")).seq;
        assert_eq!(seq, (number / users + 1) as u64, "sends keep their order, and none is there twice");
        tokio::time::sleep(pace).await;
    }
}

/// Reads a whole inbox on one socket: each message once, in order.
async fn receive_all(mut peer: Peer, each: usize) -> Peer {
    for seq in 1..=each as u64 {
        assert_eq!(peer.event("inbox").await["seq"], seq);
        peer.ack(seq, seq).await;
    }
    assert!(peer.is_quiet().await, "more came than was sent");
    peer
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reload_under_load_loses_nothing_and_closes_nothing() {
    const USERS: usize = 12;
    const EACH: usize = 50;
    within(120, "three reloads under load", async {
        let cluster = Cluster::builder().edges(3).start().await;
        let mut nginx = Nginx::before(&cluster).await;
        let mut receiving = Vec::new();
        for index in 0..USERS {
            let peer = Peer::with_inbox(&nginx.url(), &user(index), 8).await;
            receiving.push(tokio::spawn(receive_all(peer, EACH)));
        }
        let api = backend(&nginx.server()).await;
        let mut stream = api.publish_stream();
        let before = stream.publish("news", text("before"), "").await.unwrap();
        let before = before.wait().await.unwrap();
        let sending = tokio::spawn(async move {
            send_all(&api, USERS, EACH, Duration::from_millis(3)).await;
        });
        let (url, done) = (nginx.url(), AtomicBool::new(false));
        let coming = async {
            let mut came = 0;
            while !done.load(Ordering::Relaxed) {
                Peer::connect(&url, "guest").await.bye().await;
                came += 1;
                // No faster than one network may.
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            came
        };
        let reloading = async {
            for reload in 1..=3 {
                nginx.edit("nginx.conf", "server_tokens off;", &format!("server_tokens off; # {reload}"));
                nginx.reload().await;
            }
            assert!(!sending.is_finished(), "the load lasts longer than the reloads");
            sending.await.unwrap();
            done.store(true, Ordering::Relaxed);
        };
        let (came, ()) = tokio::join!(coming, reloading);
        println!("{came} clients came and went during three reloads, {} sends were taken", USERS * EACH);
        assert!(came > 20, "{came}");
        // A stream of before the reloads goes on where it is.
        let after = stream.publish("news", text("after"), "").await.unwrap();
        assert_eq!(after.wait().await.unwrap().offset, before.offset + 1);
        for peer in join_all(receiving).await {
            peer.unwrap().bye().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_broken_configuration_changes_nothing() {
    within(60, "a broken configuration", async {
        let cluster = Cluster::start().await;
        let mut nginx = Nginx::before(&cluster).await;
        let mut peer = Peer::connect(&nginx.url(), "ann").await;
        let workers = nginx.workers();
        nginx.edit("conf/limits.conf", "limit_req_status 429", "limit_req_status many");
        nginx.test().await.failed_with(&["limits.conf", "limit_req_status"]);
        nginx.ask_to_reload();
        let refused = async || nginx.log().contains("[emerg]").then_some(());
        eventually("nginx refuses the configuration", PATIENCE, refused).await;
        assert!(peer.is_quiet().await);
        assert_eq!(nginx.workers(), workers);
        Peer::connect(&nginx.url(), "bob").await.bye().await;
        nginx.edit("conf/limits.conf", "limit_req_status many", "limit_req_status 429");
        nginx.reload().await;
        assert!(peer.is_quiet().await);
        Peer::connect(&nginx.url(), "bob").await.bye().await;
    })
    .await;
}

/// How many sends a delivery node has taken.
async fn sends(cluster: &Cluster, node: usize) -> u64 {
    let page = Wire::get(&format!("{}/metrics", cluster.admin((Role::Delivery, node)))).await.body;
    let lines = page.lines().filter(|line| line.starts_with("sanjay_delivery_sends_total{"));
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sends_go_on_with_the_other_node_when_one_dies() {
    const USERS: usize = 4;
    const EACH: usize = 60;
    within(120, "a delivery node that dies under load", async {
        let mut cluster = Cluster::builder().deliveries(2).mongo().start().await;
        let nginx = Nginx::before(&cluster).await;
        let mut receiving = Vec::new();
        for index in 0..USERS {
            let peer = Peer::with_inbox(&nginx.url(), &user(index), 64).await;
            receiving.push(tokio::spawn(receive_all(peer, EACH)));
        }
        let api = backend(&nginx.server()).await;
        let again = api.clone();
        let sending = tokio::spawn(async move {
            send_all(&api, USERS, EACH, Duration::from_millis(5)).await;
        });
        let half = (USERS * EACH / 3) as u64;
        eventually("a third is sent, by both nodes", PATIENCE, async || {
            let (one, two) = (sends(&cluster, 0).await, sends(&cluster, 1).await);
            (one > 0 && two > 0 && one + two >= half).then_some(())
        })
        .await;
        cluster.kill((Role::Delivery, 1));
        assert!(!sending.is_finished(), "the load lasts longer than the node");
        sending.await.unwrap();
        for peer in join_all(receiving).await {
            peer.unwrap();
        }
        // Nobody is there: the caller is told so, and may ask again later.
        cluster.kill((Role::Delivery, 0));
        let mut client = delivery::delivery_client::DeliveryClient::new(channel(&nginx.server()));
        let status = client.get_trace(delivery::GetTraceRequest::default()).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::Unavailable, "no delivery node answers"));
        cluster.restart((Role::Delivery, 0)).await;
        cluster.restart((Role::Delivery, 1)).await;
        let sent = again.send(&["late"], text("late"), "late").await.unwrap();
        assert!(sent[0].result.is_ok(), "{sent:?}");
    })
    .await;
}

fn authorized<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {API_KEY}").parse().unwrap());
    request
}

fn channel(server: &str) -> tonic::transport::Channel {
    Endpoint::from_shared(server.to_owned()).unwrap().connect_lazy()
}

#[tokio::test]
async fn what_the_roles_say_to_each_other_has_no_way_through() {
    within(30, "calls that are not for back ends", async {
        let cluster = Cluster::start().await;
        let nginx = Nginx::before(&cluster).await;
        let (inner, outer) = (channel(&cluster.server()), channel(&nginx.server()));
        let request = authorized(ReadInboxRequest::default());
        let inside = InboxClient::new(inner).read_inbox(ReadInboxRequest::default()).await.unwrap_err();
        assert_eq!(inside.code(), Code::Unauthenticated, "it is there, behind the cluster key: {inside}");
        let outside = InboxClient::new(outer.clone()).read_inbox(request).await.unwrap_err();
        assert_eq!((outside.code(), outside.message()), (Code::Unimplemented, "not served here"));
        let outside = RouterClient::new(outer).locate(LocateRequest::default()).await.unwrap_err();
        assert_eq!((outside.code(), outside.message()), (Code::Unimplemented, "not served here"));
        let line = async || {
            nginx.requests().into_iter().find(|line| line["path"] == "/sanjay.router.v1.Router/Locate")
        };
        let line = eventually("its line is written", PATIENCE, line).await;
        assert_eq!((&line["kind"], &line["grpc_status"]), (&"grpc".into(), &"12".into()), "{line}");
    })
    .await;
}

#[tokio::test]
async fn only_calls_that_fail_are_logged() {
    within(30, "the log of calls", async {
        let cluster = Cluster::start().await;
        let nginx = Nginx::before(&cluster).await;
        backend(&nginx.server()).await.publish("news", text("good"), "").await.unwrap();
        let mut stranger = delivery::delivery_client::DeliveryClient::new(channel(&nginx.server()));
        let refused = stranger.get_trace(delivery::GetTraceRequest::default()).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
        let calls = async || {
            let lines: Vec<_> = nginx.requests().into_iter().filter(|line| line["kind"] == "grpc").collect();
            (!lines.is_empty()).then_some(lines)
        };
        let calls = eventually("the failed call is logged", PATIENCE, calls).await;
        assert_eq!(calls.len(), 1, "{calls:?}");
        assert_eq!((&calls[0]["grpc_status"], &calls[0]["status"]), (&"16".into(), &200.into()));
        assert_eq!(calls[0]["path"], "/sanjay.delivery.v1.Delivery/GetTrace");
    })
    .await;
}

#[tokio::test]
async fn a_stream_may_be_silent_for_its_time_and_ends_then() {
    within(60, "a silent stream", async {
        let cluster = Cluster::start().await;
        let options = NginxOptions::default().edit("conf/grpc.conf", "read_timeout 1h", "read_timeout 700ms");
        let nginx = Nginx::before_with(options, &cluster).await;
        let mut client = delivery::delivery_client::DeliveryClient::new(channel(&nginx.server()));
        let publish = || delivery::PublishRequest {
            channel: "news".to_owned(),
            payload: Some(v1::Payload { kind: Some(v1::payload::Kind::Text("hi".to_owned())) }),
            ..delivery::PublishRequest::default()
        };
        // One publish, and then nothing.
        let requests = stream::iter([publish()]).chain(stream::pending());
        let mut answers = client.publish_stream(authorized(requests)).await.unwrap().into_inner();
        assert!(answers.message().await.unwrap().is_some());
        let began = Instant::now();
        let end = answers.message().await.unwrap_err();
        println!("a silent stream ended after {:?}: {end}", began.elapsed());
        assert!((Duration::from_millis(600)..PATIENCE).contains(&began.elapsed()));
        // The back end opens another one.
        let answer = client.publish(authorized(publish())).await.unwrap().into_inner();
        assert_eq!(answer.offset, 2);
    })
    .await;
}

#[tokio::test]
async fn python_does_it_through_tls() {
    within(60, "a client and a back end in Python through TLS", async {
        let cluster = Cluster::start().await;
        let nginx = Nginx::before(&cluster).await;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/through_tls.py");
        let mut command = Command::new(python());
        command.arg("-B").arg(script).env("CERTIFICATE", nginx.certificate());
        command.env("SANJAY_URL", nginx.tls_url()).env("SANJAY_SERVER", nginx.tls_server());
        command.env("SANJAY_API_KEY", API_KEY).env("TOKEN_ANN", Token::of("ann").sign());
        let mut script = Process::spawn("through_tls", command, nginx.directory());
        let status = script.wait(PATIENCE).await;
        assert!(status.success(), "{}\n{}", script.stdout(), script.stderr());
        assert!(script.stdout().ends_with("done\n"), "{}", script.stdout());
    })
    .await;
}

#[tokio::test]
async fn a_new_certificate_counts_from_the_reload_on() {
    within(30, "a new certificate", async {
        let mut nginx = Nginx::start(&[], &[]).await;
        let address = nginx.tls_url().replace("wss://", "").replace("/v1/ws", "");
        // What a client is shown, which is the file's text.
        let shown = || {
            let mut command = Command::new("openssl");
            command.args(["s_client", "-connect", &address, "-servername", "localhost"]).stdin(Stdio::null());
            String::from_utf8(command.output().unwrap().stdout).unwrap()
        };
        let file = |nginx: &Nginx| fs::read_to_string(nginx.certificate()).unwrap();
        let old = file(&nginx);
        assert!(shown().contains(&old));
        nginx.renew_certificate();
        assert_ne!(file(&nginx), old);
        assert!(shown().contains(&old));
        nginx.reload().await;
        assert!(shown().contains(&file(&nginx)));
    })
    .await;
}
