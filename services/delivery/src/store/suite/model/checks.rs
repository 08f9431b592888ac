//! What must hold after every operation.

use super::*;

impl<H: Harness> Pair<H> {
    pub(super) async fn read(&mut self, user: u8, after: Option<u64>, limit: usize) {
        let now_us = self.harness.clock().now_us();
        let page = self.store().read(vec![query(&name(user), after, limit)]).await.remove(0).unwrap();
        let only = InboxQuery { only: (1..=limit as u64).collect(), ..query(&name(user), after, limit) };
        let some = self.store().read(vec![only]).await.remove(0).unwrap();
        let inbox = self.model.entry(user).or_default();
        let after = after.unwrap_or(inbox.mark());
        let above: Vec<_> = inbox.deliverable(now_us).into_iter().filter(|(seq, _)| *seq > after).collect();
        let expected: Vec<_> = above.iter().copied().take(limit).collect();
        assert_eq!(deliveries(&page), expected);
        let covers = if expected.len() == above.len() {
            inbox.head()
        } else {
            expected.last().map_or(after, |(seq, _)| *seq)
        };
        assert_eq!((page.mark, page.head, page.covers), (inbox.mark(), inbox.head(), covers));
        if limit > 0 {
            let newest = |seq| Some((seq, inbox.attempts.newest(seq)?)).filter(|_| seq <= limit as u64);
            let expected: Vec<_> = inbox.living(now_us).into_iter().filter_map(newest).collect();
            assert_eq!(deliveries(&some), expected);
        }
        for message in page.messages.into_iter().chain(some.messages) {
            let kept = inbox.get(message.seq);
            assert_eq!(message.payload, Some((*body(kept.item.body)).clone()));
            assert_eq!(
                (&message.message_id[..], message.time_us),
                (&kept.id.as_bytes()[..], kept.accepted_us)
            );
        }
    }

    /// Accepted minus settled is what the inboxes hold, and everything that can be asked for is as it should be.
    pub(super) async fn audit(&mut self) {
        let now_us = self.harness.clock().now_us();
        let mut unsettled = 0;
        for (user, inbox) in &self.model {
            let page = read_all(&**self.store(), &name(*user)).await;
            assert_eq!(deliveries(&page), inbox.deliverable(now_us));
            unsettled += inbox.unsettled().len() as u64;
        }
        for (user, id) in std::mem::take(&mut self.changed) {
            let found = self.store().lookup(name(user), id).await.unwrap();
            self.compare(user, id, found);
        }
        let mut heard = self.heard.take();
        heard.sort_unstable_by_key(|(_, message, _)| message.message_id);
        self.ended.sort_unstable_by_key(|(_, message, _)| message.message_id);
        assert_eq!(heard, std::mem::take(&mut self.ended));
        let stats = self.store().stats().await.unwrap();
        let expected = (unsettled, self.letters.len() as u64, self.waiting.len() as u64);
        assert_eq!((stats.unsettled, stats.dead_letters, stats.scheduled), expected);
        self.audit_letters().await;
        // A dedupe key may make an inbox that has no message yet.
        let with_messages = self.model.values().filter(|inbox| inbox.head() > 0).count();
        // So may a device.
        let is_made = |inbox: &&ModelInbox| inbox.head() > 0 || !inbox.keys.is_empty() || inbox.met;
        let with_keys = self.model.values().filter(is_made).count();
        let (inboxes, findings) = audit::audit_all(&**self.store()).await;
        assert!((with_messages..=with_keys).contains(&inboxes), "{inboxes}");
        assert_eq!(findings, []);
    }

    /// The record of every message ever is as it should be.
    pub(super) async fn look_all_up(&self) {
        let mut all = Vec::new();
        for (user, inbox) in &self.model {
            all.extend(inbox.messages.iter().map(|kept| (*user, kept.id)));
            all.extend(inbox.keys.values().map(|first| (*user, first.id)));
        }
        all.extend(self.waiting.iter().map(|waiting| (waiting.item.user, waiting.message.message_id)));
        let lookups = all.iter().map(|(user, id)| self.store().lookup(name(*user), *id));
        let found = futures::future::join_all(lookups).await;
        for ((user, id), found) in all.into_iter().zip(found) {
            self.compare(user, id, found.unwrap());
        }
    }

    /// Compares what was found of a message with what the model says.
    fn compare(&self, user: u8, id: Uuid, found: Option<Receipt>) {
        let now_us = self.harness.clock().now_us();
        let waiting = self.waiting.iter().find(|waiting| waiting.message.message_id == id);
        let waits = waiting.map(|waiting| Receipt {
            seq: 0,
            state: State::Scheduled,
            accepted_us: waiting.message.time_us,
            settled_us: 0,
        });
        let messages = self.model.get(&user).map_or(&[][..], |inbox| &inbox.messages);
        let Some((seq, kept)) = (1..).zip(messages).find(|(_, kept)| kept.id == id) else {
            assert_eq!(found, waits);
            return;
        };
        let expected =
            Receipt { seq, state: kept.state, accepted_us: kept.accepted_us, settled_us: kept.settled_us };
        let old =
            kept.state.is_terminal() && kept.settled_us + (RECEIPT_RETENTION.as_micros() as u64) < now_us;
        // When its receipt was swept, a message that somebody did not forget in time seems to wait again.
        assert!(
            found == Some(expected.clone()) || old && (found.is_none() || found == waits),
            "{found:?} for {expected:?}"
        );
    }

    /// The dead letters are those of the model, in their order, page by page.
    async fn audit_letters(&self) {
        let mut expected: Vec<&DeadLetter> = self.letters.iter().collect();
        expected.sort_unstable_by_key(|letter| std::cmp::Reverse(letter.position()));
        for redriven in [true, false] {
            let filter = DeadFilter { redriven, ..DeadFilter::default() };
            let (mut found, mut after) = (Vec::new(), None);
            loop {
                let page = self.store().dead_letters(filter.clone(), after, 3).await.unwrap();
                found.extend(page.letters);
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
            let expected: Vec<&DeadLetter> =
                expected.iter().copied().filter(|letter| filter.matches(letter)).collect();
            assert_eq!(found.iter().collect::<Vec<_>>(), expected);
        }
    }
}
