//! A node whose users have devices that each have to ack.

use super::*;

#[tokio::test]
async fn what_one_device_lacks_is_relayed_a_few_times_more() {
    let mut node = Node::start().await;
    node.stop().await;
    node.devices = Devices::Every;
    let listener = TcpListener::bind(node.router_address).await.unwrap();
    node.router.serve(listener, &node.lifecycle);
    node.restart().await;
    let report = async |node: &Node, device: &str, epoch, written| {
        let ack = UserAck { user: "bob".into(), device: device.into(), epoch, written, ..UserAck::default() };
        node.inbox().ack(AckRequest { acks: vec![ack], edge: String::new() }).await.unwrap();
    };
    let epoch = node.read("bob").await.epoch;
    let query = InboxQuery { user: "bob".into(), device: "e".into(), limit: 256, ..InboxQuery::default() };
    node.inbox().read_inbox(ReadInboxRequest { queries: vec![query] }).await.unwrap();
    node.api().send(send(&["bob"], "hi", "")).await.unwrap();
    report(&node, "d", epoch, 1).await;
    let relayed = |node: &Node| node.router.seqs("bob").len();
    eventually("the other device's attempts", || {
        node.clock.advance(Duration::from_millis(500));
        relayed(&node) == 4
    })
    .await;
    // When a later message of somebody else was relayed again, the scan has passed bob once more.
    node.clock.advance(Duration::from_secs(1_000));
    node.api().send(send(&["eve"], "hi", "")).await.unwrap();
    eventually("eve's hint", || node.router.seqs("eve").len() == 1).await;
    node.clock.advance(Duration::from_secs(100));
    eventually("eve's hint again", || node.router.seqs("eve").len() == 2).await;
    assert_eq!(relayed(&node), 4, "it reads the rest when it comes");
    // A reader arms it again.
    node.read("bob").await;
    eventually("one more attempt", || {
        node.clock.advance(Duration::from_millis(500));
        relayed(&node) == 5
    })
    .await;
    node.stop().await;
}
