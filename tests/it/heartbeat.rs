//! Heartbeats: who answers in any way stays, who does not is closed.

use sanjay_testkit::{Opcode, Peer, Settings, Standalone, within};
use serde_json::json;

use crate::bad_input::serves_the_next;

async fn server() -> Standalone {
    let settings = Settings::default().set("edge.heartbeat_ms", 200).set("edge.heartbeat_grace_ms", 300);
    Standalone::start_with(settings).await
}

/// Heartbeats that a client must survive to count as alive.
const BEATS: usize = 5;

#[tokio::test]
async fn a_client_that_answers_nothing_is_closed() {
    within(30, "a dead client", async {
        let server = server().await;
        let mut peer = Peer::connect(server.url(), "ann").await;
        assert_eq!(peer.welcome["heartbeat_ms"], 200);
        peer.answers = (false, false);
        let (code, reason) = peer.closed().await;
        assert_eq!((code, reason.as_str()), (4408, "no answer to a heartbeat"));
        serves_the_next(server.url()).await;
    })
    .await;
}

#[tokio::test]
async fn a_client_that_answers_in_either_way_stays() {
    within(30, "living clients", async {
        let server = server().await;
        for (envelopes, frames) in [(false, true), (true, false)] {
            let mut peer = Peer::connect(server.url(), "ann").await;
            let (mut texts, mut pings) = (0, 0);
            while texts < BEATS || pings < BEATS {
                let frame = peer.wire.next().await.unwrap();
                match frame.opcode {
                    Opcode::Text => {
                        assert_eq!(frame.payload, b"{}");
                        texts += 1;
                        if envelopes {
                            peer.wire.send(Opcode::Text, b"{}").await;
                        }
                    }
                    Opcode::Ping => {
                        pings += 1;
                        if frames {
                            peer.wire.send(Opcode::Pong, &frame.payload).await;
                        }
                    }
                    other => panic!("{other:?} {:?}", frame.close()),
                }
            }
            peer.publish("still", "here").await;
            peer.bye().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_client_may_ping_as_well() {
    within(30, "pings from a client", async {
        let server = Standalone::start().await;
        let mut peer = Peer::connect(server.url(), "ann").await;
        // Without an id it is an answer, and gets none: two sides that answered answers would never end.
        peer.send(&json!({})).await;
        assert_eq!(peer.call(json!({})).await, json!({ "id": 2 }));
        peer.wire.send(Opcode::Ping, b"are you there").await;
        let pong = peer.wire.next().await.unwrap();
        assert_eq!((pong.opcode, &pong.payload[..]), (Opcode::Pong, &b"are you there"[..]));
    })
    .await;
}
