//! Devices of one user on several nodes at once.

use std::time::Duration;

use futures::future::join_all;

use super::*;
use crate::store::{
    Forgotten, InboxQuery, Known, RegisterError, Settle,
    suite::{audit::audit_all, query, read_all, settle},
};

fn device(number: usize) -> String {
    format!("device-{number}")
}

/// Nodes that register the same devices make one inbox with each of them once, and never one too many.
#[tokio::test]
async fn nodes_that_register_devices_agree() {
    let case = Case::on(Mongo::shared().await);
    let (one, two) = (case.open().await, case.open().await);
    let names = |from: usize| (from..from + 12).map(|number| ("bob".to_owned(), device(number))).collect();
    let (first, second) = tokio::join!(one.register(names(0)), two.register(names(8)));
    let results = [first, second].concat();
    // Four of the 20 found no room; of the four that both named, either both calls were taken or both were not.
    let refused = results.iter().filter(|result| **result == Err(RegisterError::TooMany)).count();
    assert!(
        results.iter().all(|result| matches!(result, Ok(()) | Err(RegisterError::TooMany))),
        "{results:?}"
    );
    assert!((4..=8).contains(&refused), "{refused}");
    let known = |number| {
        let query = InboxQuery { device: Some(device(number)), ..query("bob", None, 1) };
        let page = one.read(vec![query]);
        async { page.await.remove(0).unwrap().device }
    };
    let known = join_all((0..20).map(known)).await;
    assert_eq!(known.iter().filter(|known| **known == Known::Lately).count(), 16);
    assert_eq!(audit_all(&one).await, (0, vec![]));
}

/// Devices that ack on different nodes at once settle each message once, with the last of them.
#[tokio::test]
async fn nodes_that_ack_for_different_devices_agree() {
    const MESSAGES: u64 = 60;
    for small in [false, true] {
        let case = Case::on(Mongo::shared().await).roomy();
        let case = if small { case.small() } else { case };
        let nodes = [case.open().await, case.open().await, case.open().await];
        let all = (0..3).map(|number| ("bob".to_owned(), device(number))).collect();
        assert_eq!(nodes[0].register(all).await, [Ok(()), Ok(()), Ok(())]);
        nodes[0].append(case.messages("bob", 1..=u128::from(MESSAGES))).await;
        let epoch = read_all(&nodes[0], "bob").await.epoch;
        let by_device = async |number: usize| {
            let mut settled = Vec::new();
            // Each in an order of its own.
            for step in 0..MESSAGES {
                let seq = (step * [1, 7, 11][number]) % (MESSAGES + 1) + 1;
                let seq = if seq > MESSAGES { MESSAGES } else { seq };
                let ranges = [(seq, (seq + number as u64).min(MESSAGES))];
                let ack = Settle { device: Some(device(number)), ..settle("bob", epoch, &ranges, 0) };
                let acked = nodes[number].ack(vec![ack]).await.remove(0).unwrap();
                settled.extend(acked.messages.into_iter().map(|message| message.seq));
            }
            let rest = Settle { device: Some(device(number)), ..settle("bob", epoch, &[(1, MESSAGES)], 0) };
            let acked = nodes[number].ack(vec![rest]).await.remove(0).unwrap();
            settled.extend(acked.messages.into_iter().map(|message| message.seq));
            settled
        };
        let (first, second, third) = tokio::join!(by_device(0), by_device(1), by_device(2));
        let mut settled = [first, second, third].concat();
        settled.sort_unstable();
        assert!(settled.into_iter().eq(1..=MESSAGES), "small {small}");
        let stats = nodes[1].stats().await.unwrap();
        assert_eq!((stats.unsettled, read_all(&nodes[2], "bob").await.mark), (0, MESSAGES));
        assert_eq!(audit_all(&nodes[0]).await, (1, vec![]));
    }
}

/// Two nodes that look for devices that are gone forget each once.
#[tokio::test]
async fn nodes_that_forget_devices_agree() {
    let case = Case::on(Mongo::shared().await);
    let (one, two) = (case.open().await, case.open().await);
    let users: Vec<String> = (0..12).map(|number| format!("user-{number}")).collect();
    let both = users.iter().flat_map(|user| [(user.clone(), device(0)), (user.clone(), device(1))]);
    assert!(one.register(both.collect()).await.iter().all(Result::is_ok));
    case.clock.advance(Duration::from_secs(31 * 24 * 60 * 60));
    let forget = async |store: &MongoStore| {
        let mut count = 0;
        loop {
            let Forgotten { devices, more } = store.forget_devices(case.clock.now_us(), 5).await.unwrap();
            count += devices;
            if !more {
                return count;
            }
        }
    };
    let (first, second) = tokio::join!(forget(&one), forget(&two));
    assert_eq!(first + second, 24);
    assert_eq!(forget(&one).await, 0);
}
