//! The log of receipts, and lists of deliveries.

use super::*;

/// What was read of the log so far.
#[derive(Default)]
pub(super) struct LogModel {
    /// Where the next page begins; `None` before the first.
    position: Option<LogPosition>,
    read: Vec<LoggedReceipt>,
    /// What should be in it, as (user, seq).
    known: BTreeSet<(u8, u64)>,
}

/// Reads the log to its end, `limit` at a time.
pub(crate) async fn read_log(
    store: &dyn InboxStore,
    from: LogStart,
    limit: usize,
) -> (Vec<LoggedReceipt>, LogPosition) {
    let (mut receipts, mut from, mut pages) = (Vec::new(), from, 0);
    loop {
        let page = store.receipts(from, limit).await.unwrap();
        assert!(page.receipts.len() <= limit);
        receipts.extend(page.receipts);
        if page.tail {
            return (receipts, page.next);
        }
        pages += 1;
        assert!(pages < 10_000, "the log has no end");
        from = LogStart::After(page.next);
    }
}

impl<H: Harness> Pair<H> {
    /// What was settled since the last look is in the log since the last look, each once.
    pub(super) async fn audit_log(&mut self) {
        // A reader that shares its store with others is behind the clock by this.
        self.harness.clock().advance(Duration::from_micros(1));
        let mut from = self.log.position.take().map_or(LogStart::Oldest, LogStart::After);
        if matches!(self.store().receipts(from.clone(), 1).await, Err(LogError::Gone)) {
            // So much time has passed since the last look, in which nothing was settled.
            from = LogStart::Oldest;
        }
        let (mut fresh, position) = read_log(&**self.store(), from, 3).await;
        fresh.retain(|receipt| !self.log.read.contains(receipt));
        self.log.position = Some(position);
        let mut expected = Vec::new();
        for (user, inbox) in &self.model {
            for (seq, kept) in (1..).zip(&inbox.messages).filter(|(_, kept)| kept.state.is_terminal()) {
                if self.log.known.insert((*user, seq)) {
                    expected.push(logged(*user, seq, kept));
                }
            }
        }
        expected.sort_unstable_by_key(|receipt| receipt.message_id);
        let mut found: Vec<_> = fresh.iter().map(without_reason).collect();
        found.sort_unstable_by_key(|receipt| receipt.message_id);
        assert_eq!(found, expected);
        for receipt in &fresh {
            assert_eq!(receipt.reason.is_some(), receipt.receipt.state == State::Dead, "{receipt:?}");
        }
        self.log.read.extend(fresh);
    }

    /// All of the log that is kept is what was read before, in the same order.
    pub(super) async fn audit_whole_log(&mut self) {
        self.audit_log().await;
        let (all, _) = read_log(&**self.store(), LogStart::Oldest, 7).await;
        assert!(self.log.read.ends_with(&all), "another order or content: {all:?}");
        let kept_us = self.harness.clock().now_us() - RECEIPT_RETENTION.as_micros() as u64 + 60_000_000;
        let kept = self.log.read.iter().filter(|receipt| receipt.receipt.settled_us > kept_us);
        assert!(all.len() >= kept.count(), "something is missing at the beginning");
    }

    /// The lists of all users are as they should be, page by page.
    pub(super) async fn audit_deliveries(&self) {
        let filters = [
            (vec![], None),
            (vec![State::Acked, State::Scheduled], None),
            (vec![State::Accepted, State::Dead, State::Expired], Some(caller(0))),
        ];
        for user in 0..3 {
            for (states, caller) in &filters {
                let mut query = DeliveriesQuery {
                    user: name(user),
                    states: states.clone(),
                    caller: caller.clone(),
                    before: None,
                    limit: 3,
                };
                let (mut found, mut pages) = (Vec::new(), 0);
                loop {
                    let page = self.store().deliveries(query.clone()).await.unwrap();
                    assert!(page.deliveries.len() <= 3);
                    found.extend(page.deliveries);
                    query.before = page.next;
                    pages += 1;
                    if query.before.is_none() {
                        break;
                    }
                    assert!(pages < 1_000, "the list has no end");
                }
                for delivery in &mut found {
                    assert_eq!(delivery.reason.take().is_some(), delivery.receipt.state == State::Dead);
                }
                let expected = self.deliveries(user, &query);
                assert_eq!(found, expected, "{query:?}");
            }
        }
    }

    fn deliveries(&self, user: u8, query: &DeliveriesQuery) -> Vec<ListedDelivery> {
        let now_us = self.harness.clock().now_us();
        let mut all = Vec::new();
        for (seq, kept) in (1..).zip(self.model.get(&user).map_or(&[][..], |inbox| &inbox.messages)) {
            let LoggedReceipt { message_id, receipt, caller, .. } = logged(user, seq, kept);
            let old = receipt.state.is_terminal()
                && receipt.settled_us + (RECEIPT_RETENTION.as_micros() as u64) < now_us;
            if !old {
                all.push(ListedDelivery { message_id, receipt, caller, deliver_us: 0, reason: None });
            }
        }
        for waiting in self.waiting.iter().filter(|waiting| waiting.item.user == user && !waiting.appended) {
            let (message_id, accepted_us) = (waiting.message.message_id, waiting.message.time_us);
            all.push(ListedDelivery {
                message_id,
                receipt: Receipt { seq: 0, state: State::Scheduled, accepted_us, settled_us: 0 },
                caller: caller(waiting.item.caller),
                deliver_us: waiting.deliver_us(),
                reason: None,
            });
        }
        all.retain(|delivery| query.matches(delivery.receipt.state, &delivery.caller));
        all.sort_unstable_by_key(|delivery| std::cmp::Reverse(delivery.message_id));
        all
    }
}

fn without_reason(receipt: &LoggedReceipt) -> LoggedReceipt {
    LoggedReceipt { reason: None, ..receipt.clone() }
}

fn logged(user: u8, seq: u64, kept: &Kept) -> LoggedReceipt {
    let Kept { state, accepted_us, settled_us, .. } = *kept;
    LoggedReceipt {
        user: name(user),
        message_id: kept.id,
        receipt: Receipt { seq, state, accepted_us, settled_us },
        caller: caller(kept.item.caller),
        reason: None,
    }
}
