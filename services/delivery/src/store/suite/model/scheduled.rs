//! Scheduled messages: what they should be, and what is done with them.

use super::{inbox::First, operations::Finish, *};

/// A message that waits for its time.
#[derive(Debug, Clone)]
pub(super) struct Waiting {
    pub(super) item: Item,
    pub(super) message: NewMessage,
    deliver_us: u64,
    /// When it is handed out next.
    due_us: u64,
    /// Whether it is in its inbox, too: whoever put it there came to nothing before this one was forgotten.
    pub(super) appended: bool,
}

impl Waiting {
    pub(super) fn deliver_us(&self) -> u64 {
        self.deliver_us
    }
}

impl<H: Harness> Pair<H> {
    pub(super) async fn schedule(&mut self, items: Vec<(Item, u64)>) {
        let now_us = self.harness.clock().now_us();
        let mut messages = Vec::new();
        for (item, seconds) in &items {
            let deliver_us = now_us + seconds * 1_000_000;
            messages.push(Scheduled { message: self.message(*item, deliver_us), deliver_us });
        }
        let results = self.store().schedule(messages.clone()).await;
        assert_eq!(results.len(), messages.len());
        for (((item, _), scheduled), result) in items.into_iter().zip(messages).zip(results) {
            let inbox = self.model.entry(item.user).or_default();
            let id = scheduled.message.message_id;
            match inbox.keys.get(&(item.caller, item.key)).filter(|first| holds(first, now_us)) {
                Some(first) if first.body == item.body => {
                    let answer = result.unwrap();
                    let waits = self.waiting.iter().find(|waiting| waiting.message.message_id == first.id);
                    let until = waits.map_or(0, |waiting| waiting.deliver_us);
                    let either = waits.is_some_and(|waiting| waiting.appended) && answer.deliver_us == 0;
                    assert!(answer.deliver_us == until || either, "{answer:?} for {until}");
                    let expected = ScheduledAt {
                        message_id: first.id,
                        duplicate: true,
                        time_us: first.time_us,
                        ..answer
                    };
                    assert_eq!(answer, expected);
                }
                Some(_) => assert!(matches!(result, Err(AppendError::AlreadyExists { .. })), "{result:?}"),
                None => {
                    let deliver_us = scheduled.deliver_us;
                    let answer =
                        ScheduledAt { message_id: id, deliver_us, duplicate: false, time_us: now_us };
                    assert_eq!(result, Ok(answer));
                    if item.key != 0 {
                        let first = First { body: item.body, seq: 0, id, time_us: now_us };
                        inbox.keys.insert((item.caller, item.key), first);
                    }
                    self.waiting.push(Waiting {
                        item,
                        message: scheduled.message,
                        deliver_us,
                        due_us: deliver_us,
                        appended: false,
                    });
                    self.changed.push((item.user, id));
                }
            }
        }
    }

    pub(super) async fn claim_scheduled(&mut self, limit: usize, finish: Finish) {
        let now_us = self.harness.clock().now_us();
        let until_us = now_us + 30_000_000;
        let claimed = self.store().claim_scheduled(now_us, until_us, limit).await.unwrap();
        let mut due: Vec<u64> =
            self.waiting.iter().map(|waiting| waiting.due_us).filter(|due_us| *due_us <= now_us).collect();
        due.sort_unstable();
        due.truncate(limit);
        let mut got = Vec::new();
        let (mut appends, mut done) = (Vec::new(), Vec::new());
        for Scheduled { message, deliver_us } in claimed {
            let waiting = self.waiting.iter_mut().find(|one| one.message.message_id == message.message_id);
            let waiting = waiting.expect("it waits");
            assert_eq!(deliver_us, waiting.deliver_us);
            assert_same(&message, &waiting.message);
            got.push(std::mem::replace(&mut waiting.due_us, until_us));
            if waiting.appended {
                done.push((message.user, message.message_id));
            } else {
                appends.push((waiting.item, NewMessage { time_us: now_us, ..message }));
            }
        }
        got.sort_unstable();
        assert_eq!(got, due, "those that are due first, and each once");
        if finish == Finish::Nothing {
            return;
        }
        let places: Vec<_> = appends.iter().map(|(_, message)| place(message)).collect();
        let taken = self.append_messages(appends).await;
        for (place, _) in places.into_iter().zip(taken).filter(|(_, taken)| *taken) {
            let waiting = self.waiting.iter_mut().find(|waiting| waiting.message.message_id == place.1);
            waiting.expect("it waits").appended = true;
            done.push(place);
        }
        if finish == Finish::Done {
            self.forget(done).await;
        }
    }

    pub(super) async fn unschedule(&mut self, place: usize) {
        if self.waiting.is_empty() {
            return;
        }
        let one = &self.waiting[place % self.waiting.len()];
        let place = self::place(&one.message);
        self.changed.push((one.item.user, one.message.message_id));
        self.forget(vec![place]).await;
    }

    async fn forget(&mut self, places: Vec<(String, Uuid)>) {
        let count = places.len() as u64;
        self.waiting.retain(|waiting| places.iter().all(|(_, id)| *id != waiting.message.message_id));
        let twice: Vec<_> = places.iter().chain(&places).cloned().collect();
        assert_eq!(self.store().unschedule(twice).await, Ok(count));
        assert_eq!(self.store().unschedule(places).await, Ok(0));
    }
}

fn place(message: &NewMessage) -> (String, Uuid) {
    (message.user.clone(), message.message_id)
}

/// What is handed out is what was kept, but for its dedupe key.
pub(in super::super) fn assert_same(found: &NewMessage, kept: &NewMessage) {
    assert_eq!((&found.user, &found.caller), (&kept.user, &kept.caller));
    assert_eq!((found.message_id, &found.payload), (kept.message_id, &kept.payload));
    assert_eq!((found.time_us, found.expires_us), (kept.time_us, kept.expires_us));
    assert_eq!((&found.trace, &found.collapse_key), (&kept.trace, &kept.collapse_key));
    assert_eq!(found.dedupe_key, "");
}
