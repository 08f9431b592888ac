//! Users, sessions and tokens that are revoked: closed on every edge within a second, and refused from then on.

use std::time::Duration;

use sanjay_client::Subject;
use sanjay_testkit::{Cluster, ClusterBuilder, End, Peer, Role, Token, backend, eventually, within};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use crate::stores::{metric, on_each_store};

/// The longest that something takes that comes at once, with much to spare.
const LONG: Duration = Duration::from_secs(20);

/// How soon whoever is revoked must be gone.
const SOON: Duration = Duration::from_secs(1);

fn hello(token: &Token) -> Value {
    json!({ "token": token.sign(), "credit": 0 })
}

async fn connect(url: &str, token: &Token) -> Result<Peer, End> {
    timeout(LONG, Peer::try_hello(url, hello(token))).await.expect("an answer comes in time")
}

/// How the client is refused.
async fn refused(url: &str, token: &Token) -> String {
    match connect(url, token).await {
        Err(End::Closed(4401, why)) => why,
        other => panic!("not refused: {other:?}"),
    }
}

async fn closed(peer: &mut Peer, why: &str) {
    let began = Instant::now();
    let (code, reason) = timeout(LONG, peer.closed()).await.expect("it is closed in time");
    assert_eq!(code, 4401, "{reason}");
    assert!(reason.contains(why), "{reason}");
    assert!(began.elapsed() < SOON, "it took {:?}", began.elapsed());
}

fn two_edges(builder: ClusterBuilder) -> ClusterBuilder {
    builder.edges(2)
}

#[tokio::test]
async fn a_revoked_user_is_closed_on_every_edge_and_comes_back_with_a_new_token_alone() {
    on_each_store(120, two_edges, async |cluster| {
        let urls = cluster.urls();
        let old = Token::of("bob").made_in_s(Some(-10));
        let undated = Token::of("bob").made_in_s(None);
        let mut peers = Vec::new();
        for url in &urls {
            peers.push(connect(url, &old).await.unwrap());
            peers.push(connect(url, &undated).await.unwrap());
        }
        let mut other = connect(&urls[1], &Token::of("ann").made_in_s(Some(-10))).await.unwrap();
        // Made a while later, as by a clock that is ahead.
        let new = Token::of("bob").made_in_s(Some(60));
        let mut early = connect(&urls[1], &new).await.unwrap();
        let api = backend(&cluster.server()).await;
        let revoked = api.revoke(&Subject::User("bob".into()), "left the company").await.unwrap();
        assert!(revoked.expires_us > revoked.revoked_us);
        for peer in &mut peers {
            closed(peer, "user").await;
        }
        for url in &urls {
            for token in [&old, &undated] {
                assert!(refused(url, token).await.contains("user"));
            }
            connect(url, &new).await.unwrap();
        }
        assert!(early.is_quiet().await && other.is_quiet().await, "others stay");
        assert_eq!(metric(&cluster, Role::Edge, "sanjay_edge_revocations").await, 1);

        let listed = api.list_revocations(0, "").await.unwrap();
        let [found] = &listed.revocations[..] else { panic!("{listed:?}") };
        assert_eq!((&*found.reason, &*found.caller), ("left the company", "tests"));
        assert!(api.unrevoke(&Subject::User("bob".into())).await.unwrap().is_some());
        assert!(api.unrevoke(&Subject::User("bob".into())).await.unwrap().is_none());
        eventually("the old token is good again", LONG, async || {
            connect(&urls[1], &old).await.ok().map(drop)
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn a_revoked_session_and_a_revoked_token_are_closed_and_nobody_else() {
    within(120, "the scenario", async {
        let cluster = Cluster::builder().edges(2).start().await;
        let urls = cluster.urls();
        let api = backend(&cluster.server()).await;
        let (one, two) = (Token::of("bob").jti("t1"), Token::of("bob").jti("t2"));
        let (mut first, mut second) =
            (connect(&urls[0], &one).await.unwrap(), connect(&urls[1], &one).await.unwrap());
        let mut third = connect(&urls[1], &two).await.unwrap();
        let session = second.welcome["session"].as_str().unwrap().to_owned();
        api.revoke(&Subject::Session(session), "").await.unwrap();
        closed(&mut second, "session").await;
        connect(&urls[1], &one).await.unwrap().bye().await;
        api.revoke(&Subject::Token("t1".into()), "").await.unwrap();
        closed(&mut first, "token").await;
        assert!(refused(&urls[0], &one).await.contains("token"));
        assert!(third.is_quiet().await);
        let wrong = api.revoke(&Subject::Session("seven".into()), "").await.unwrap_err();
        assert!(wrong.to_string().contains("UUID"), "{wrong}");
        let nobody = api.revoke(&Subject::User(String::new()), "").await.unwrap_err();
        assert!(nobody.to_string().contains("empty"), "{nobody}");
    })
    .await;
}

#[tokio::test]
async fn a_revocation_outlives_a_killed_delivery_node_and_a_killed_edge() {
    on_each_store(120, two_edges, async |mut cluster| {
        let old = Token::of("bob").made_in_s(Some(-10));
        let api = backend(&cluster.server()).await;
        api.revoke(&Subject::User("bob".into()), "").await.unwrap();
        cluster.restart(Role::Delivery).await;
        for url in &cluster.urls() {
            // The node may have died before it told the edges.
            eventually("it is refused", LONG, async || connect(url, &old).await.err().map(drop)).await;
        }
        cluster.kill(Role::Delivery);
        for url in &cluster.urls() {
            assert!(refused(url, &old).await.contains("user"), "edges keep what they know");
        }
        cluster.restart(Role::Delivery).await;
        // An edge is ready when it knows.
        cluster.restart((Role::Edge, 1)).await;
        assert!(refused(&cluster.urls()[1], &old).await.contains("user"));
        assert_eq!(api.list_revocations(0, "").await.unwrap().revocations.len(), 1);
    })
    .await;
}

#[tokio::test]
async fn a_revocation_at_one_node_is_known_at_the_edges_of_another() {
    within(180, "the scenario", async {
        let cluster = Cluster::builder().edges(4).deliveries(2).mongo().start().await;
        let old = Token::of("bob").made_in_s(Some(-10));
        for (round, server) in cluster.servers().iter().enumerate() {
            let api = backend(server).await;
            let mut peers = Vec::new();
            for url in &cluster.urls() {
                peers.push(connect(url, &old).await.unwrap());
            }
            api.revoke(&Subject::User("bob".into()), "").await.unwrap();
            for peer in &mut peers {
                closed(peer, "user").await;
            }
            api.unrevoke(&Subject::User("bob".into())).await.unwrap();
            for url in &cluster.urls() {
                let what = format!("round {round}: it is good again");
                eventually(&what, LONG, async || connect(url, &old).await.ok().map(drop)).await;
            }
        }
    })
    .await;
}
