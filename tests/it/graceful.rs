//! SIGTERM: clients are told, what was accepted stays, and the process exits in time.

use std::time::{Duration, Instant};

use sanjay_client::protocol::Payload;
use sanjay_testkit::{Cluster, End, Peer, Role, Standalone, Wire, backend, within};

/// Longest that a process may take to end.
const DEADLINE: Duration = Duration::from_secs(12);

async fn expect_farewell(peer: &mut Peer) {
    let goaway = peer.event("goaway").await;
    assert_eq!(goaway["code"], 1012, "{goaway}");
    assert!(
        goaway["reason"].is_string() && goaway["reconnect_after_ms"].is_u64() && goaway["spread_ms"].is_u64()
    );
    assert_eq!(peer.closed().await.0, 1012);
}

#[tokio::test]
async fn clients_are_told_and_the_exit_is_clean() {
    within(60, "SIGTERM for standalone", async {
        let mut server = Standalone::start().await;
        let url = server.url().to_owned();
        let api = backend(server.server()).await;
        let mut peers = Vec::new();
        for n in 0..5 {
            let mut peer = Peer::with_inbox(&url, &format!("user {n}"), 64).await;
            peer.subscribe("news").await;
            peers.push(peer);
        }
        let mut silent = Peer::silent(&url).await;
        let sent = api.send(&["absent"], Payload::Text("t".into()), "").await.unwrap();
        let began = Instant::now();
        server.process.signal(libc::SIGTERM);
        for peer in &mut peers {
            expect_farewell(peer).await;
        }
        let end = loop {
            if let Err(end) = silent.next().await {
                break end;
            }
        };
        assert!(matches!(end, End::Closed(1012, _)), "{end:?}");
        let status = server.process.wait(DEADLINE).await;
        assert_eq!(status.code(), Some(0), "{status}");
        assert!(began.elapsed() < DEADLINE, "{:?}", began.elapsed());
        assert!(Wire::open(&url).await.is_err(), "nobody listens any more");
        assert!(!server.data_dir().join("ready.json").exists(), "nobody is to find what is gone");

        server.restart().await;
        let mut absent = Peer::with_inbox(&url, "absent", 64).await;
        let id = sent[0].result.clone().unwrap().message_id;
        assert_eq!(absent.event("inbox").await["message_id"], id.as_str());
    })
    .await;
}

#[tokio::test]
async fn a_client_that_does_not_let_go_does_not_hold_the_process() {
    within(60, "SIGTERM with a client that ignores it", async {
        let mut server = Standalone::start().await;
        let deaf = Peer::connect(server.url(), "deaf").await;
        let held = backend(server.server()).await.publish_stream();
        let status = server.terminate().await;
        assert_eq!(status.code(), Some(0), "{status}");
        drop((deaf, held));
    })
    .await;
}

#[tokio::test]
async fn each_role_ends_cleanly_alone() {
    within(60, "SIGTERM for each role", async {
        let mut cluster = Cluster::start().await;
        let mut peer = Peer::with_inbox(&cluster.url(), "ann", 64).await;
        for role in [Role::Router, Role::Delivery, Role::Edge] {
            cluster.process(role).signal(libc::SIGTERM);
            if role == Role::Edge {
                expect_farewell(&mut peer).await;
            }
            let status = cluster.process(role).wait(DEADLINE).await;
            assert_eq!(status.code(), Some(0), "{}: {status}", role.name());
        }
    })
    .await;
}
