use std::{collections::BTreeMap, time::Duration};

use futures::{FutureExt, poll};
use tokio::task::yield_now;

use super::*;

fn drain<T>(receiver: &mut Receiver<T>) -> Vec<T> {
    let mut buffer = Vec::new();
    while receiver.try_recv_many(&mut buffer, 3) > 0 {}
    buffer
}

#[test]
fn both_lanes_share_one_order_and_only_one_is_refused() {
    let (sender, mut receiver) = mailbox(2);
    sender.try_send(1).unwrap();
    sender.send_reserved(2).unwrap();
    assert!(matches!(sender.try_send(3), Err(TrySendError::Full(3))));
    sender.send_reserved(4).unwrap();
    assert_eq!((sender.len(), sender.capacity()), (3, 2));
    assert_eq!(drain(&mut receiver), [1, 2, 4]);
    sender.try_send(5).unwrap();
    assert_eq!(drain(&mut receiver), [5]);
}

#[tokio::test]
async fn a_dropped_receiver_gives_messages_back() {
    let (sender, receiver) = mailbox(1);
    sender.try_send("a").unwrap();
    assert!(!sender.is_closed() && sender.closed().now_or_never().is_none());
    drop(receiver);
    sender.closed().await;
    assert!(sender.is_closed() && sender.is_empty());
    assert!(matches!(sender.try_send("b"), Err(TrySendError::Closed("b"))));
    assert!(matches!(sender.send_reserved("c"), Err(Closed("c"))));
}

#[tokio::test]
async fn what_waits_is_read_before_the_end() {
    let (sender, mut receiver) = mailbox(8);
    let second = sender.clone();
    sender.try_send(1).unwrap();
    drop(sender);
    second.try_send(2).unwrap();
    drop(second);
    let mut buffer = Vec::new();
    assert_eq!(receiver.recv_many(&mut buffer, 1).await, 1);
    assert_eq!(receiver.recv_many(&mut buffer, 0).await, 1);
    assert_eq!(receiver.recv_many(&mut buffer, 1).await, 0);
    assert_eq!(buffer, [1, 2]);
}

#[tokio::test]
async fn a_waiting_reader_wakes_for_each_lane_and_for_the_end() {
    for lane in 0..3 {
        let (sender, mut receiver) = mailbox(1);
        let reader = tokio::spawn(async move {
            let mut buffer = Vec::new();
            receiver.recv_many(&mut buffer, 8).await;
            buffer
        });
        yield_now().await;
        match lane {
            0 => sender.try_send(lane).unwrap(),
            1 => sender.send_reserved(lane).unwrap(),
            _ => drop(sender),
        }
        assert_eq!(reader.await.unwrap().len(), usize::from(lane < 2));
    }
}

#[tokio::test]
async fn a_cancelled_read_loses_nothing() {
    let (sender, mut receiver) = mailbox(8);
    let mut buffer = Vec::new();
    {
        let mut read = std::pin::pin!(receiver.recv_many(&mut buffer, 8));
        assert!(poll!(read.as_mut()).is_pending());
        sender.try_send(1).unwrap();
    }
    assert!(buffer.is_empty());
    assert_eq!(receiver.recv_many(&mut buffer, 8).await, 1);
}

#[tokio::test]
async fn a_mailbox_that_is_never_empty_lets_others_run() {
    let (sender, mut receiver) = mailbox(1);
    let reader = tokio::spawn(async move {
        let mut buffer = Vec::new();
        loop {
            sender.try_send(()).unwrap();
            receiver.recv_many(&mut buffer, 1).await;
            buffer.clear();
        }
    });
    yield_now().await;
    reader.abort();
    assert!(reader.await.unwrap_err().is_cancelled());
}

/// Messages that hold a sender of their own mailbox must not deadlock it.
#[test]
fn messages_may_hold_senders() {
    let (sender, receiver) = mailbox(4);
    struct Holder(#[expect(dead_code, reason = "held for its drop")] Sender<Holder>);
    sender.try_send(Holder(sender.clone())).unwrap();
    drop(receiver);
    assert!(sender.try_send(Holder(sender.clone())).is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn under_load_every_accepted_message_arrives_once_and_in_order() {
    const SENDERS: u64 = 4;
    const EACH: u64 = 20_000;
    let (sender, mut receiver) = mailbox(64);
    let senders: Vec<_> = (0..SENDERS)
        .map(|id| {
            let sender = sender.clone();
            tokio::spawn(async move {
                let mut accepted = Vec::new();
                for n in 0..EACH {
                    // Every seventh goes through the reserved lane.
                    let taken = if n % 7 == 0 {
                        sender.send_reserved((id, n)).is_ok()
                    } else {
                        sender.try_send((id, n)).is_ok()
                    };
                    if taken {
                        accepted.push(n);
                    } else {
                        yield_now().await;
                    }
                }
                (id, accepted)
            })
        })
        .collect();
    drop(sender);
    let reading = async {
        let (mut buffer, mut seen) = (Vec::new(), BTreeMap::<u64, Vec<u64>>::new());
        while receiver.recv_many(&mut buffer, 17).await > 0 {
            for (id, n) in buffer.drain(..) {
                seen.entry(id).or_default().push(n);
            }
        }
        seen
    };
    let seen = tokio::time::timeout(Duration::from_secs(60), reading).await.expect("a wake-up was lost");
    for task in senders {
        let (id, accepted) = task.await.unwrap();
        assert!(accepted.len() as u64 > EACH / 7);
        assert_eq!(seen[&id], accepted, "sender {id}");
    }
}
