//! What every adapter must do where each device has to ack a message: fixed cases.

use super::{
    failing::{NAK, failure},
    *,
};

/// What a case goes by.
struct Case<H> {
    harness: H,
    store: Arc<dyn InboxStore>,
    clock: Arc<ManualClock>,
    heard: Arc<Heard>,
}

impl<H: Harness> Case<H> {
    async fn new(mut harness: H) -> Self {
        let heard = Arc::new(Heard::default());
        harness.set(Limits { on_commit: heard.clone(), ..Limits::default() });
        let store = harness.reopen().await;
        let clock = harness.clock().clone();
        Self { harness, store, clock, heard }
    }

    async fn reopen(self) -> Self {
        let Self { mut harness, store, clock, heard } = self;
        drop(store);
        let store = harness.reopen().await;
        Self { harness, store, clock, heard }
    }

    async fn send(&self, ids: impl IntoIterator<Item = u128>) {
        let messages = ids.into_iter().map(|id| message("bob", id, "x", "", &self.clock)).collect();
        assert!(self.store.append(messages).await.iter().all(Result::is_ok));
    }

    async fn register(&self, device: &str) -> Result<(), RegisterError> {
        self.store.register(vec![("bob".to_owned(), device.to_owned())]).await.remove(0)
    }

    async fn page(&self, device: &str) -> Page {
        let query = InboxQuery { device: Some(device.to_owned()), ..query("bob", None, 100) };
        self.store.read(vec![query]).await.remove(0).unwrap()
    }

    /// What a device lacks.
    async fn lacks(&self, device: &str) -> Vec<u64> {
        let page = self.page(device).await;
        assert_eq!(page.device, Known::Lately);
        seqs(&page)
    }

    async fn say(&self, device: &str, ranges: &[(u64, u64)], written: u64, failed: Vec<Failure>) -> Acked {
        let epoch = read_all(&*self.store, "bob").await.epoch;
        let device = Some(device.to_owned());
        let settle = Settle { device, failed, ..settle("bob", epoch, ranges, written) };
        self.store.ack(vec![settle]).await.remove(0).unwrap()
    }

    /// What an ack settles.
    async fn ack(&self, device: &str, ranges: &[(u64, u64)]) -> Vec<u64> {
        let acked = self.say(device, ranges, 0, Vec::new()).await;
        assert_eq!(acked.refused, 0);
        acked.messages.iter().map(|message| message.seq).collect()
    }

    async fn state(&self, id: u128) -> State {
        self.store.lookup("bob".to_owned(), Uuid::from_u128(id)).await.unwrap().unwrap().state
    }
}

/// Runs every fixed case, each on a store of its own.
pub(super) async fn fixed_cases<H: Harness>(make: impl Fn() -> H) {
    a_message_is_settled_when_every_device_has_acked_it(make()).await;
    a_device_is_registered_before_there_is_a_message(make()).await;
    a_device_that_is_gone_holds_nothing_back(make()).await;
    a_seventeenth_device_is_refused(make()).await;
    failures_count_together_but_not_of_who_acked(make()).await;
    what_a_device_has_not_got_stays_due(make()).await;
}

async fn a_message_is_settled_when_every_device_has_acked_it<H: Harness>(harness: H) {
    let case = Case::new(harness).await;
    case.send(1..=4).await;
    assert_eq!(case.page("phone").await.device, Known::Unknown);
    assert_eq!(case.page("phone").await.messages, []);
    // The first device gets what came before it; another begins at the head.
    case.register("phone").await.unwrap();
    case.register("laptop").await.unwrap();
    assert_eq!((case.lacks("phone").await, case.lacks("laptop").await), (vec![1, 2, 3, 4], vec![]));
    case.send(5..=6).await;
    assert_eq!(case.ack("laptop", &[(5, 6)]).await, [0; 0]);
    assert_eq!(case.ack("phone", &[(2, 2)]).await, [2]);
    let case = case.reopen().await;
    assert_eq!((case.lacks("phone").await, case.lacks("laptop").await), (vec![1, 3, 4, 5, 6], vec![]));
    assert_eq!((case.page("phone").await.mark, case.page("laptop").await.mark), (0, 6));
    assert_eq!((case.state(2).await, case.state(5).await), (State::Acked, State::Accepted));
    assert_eq!(case.ack("phone", &[(4, 90)]).await, [4, 5, 6]);
    assert_eq!(case.ack("phone", &[(4, 90)]).await, [0; 0], "again it settles nothing");
    assert_eq!(case.ack("phone", &[(1, 3)]).await, [1, 3]);
    assert_eq!(read_all(&*case.store, "bob").await.mark, 6);
    assert_eq!(case.store.stats().await.unwrap().unsettled, 0);
    assert_eq!(case.heard.take(), [], "all of this was asked for");
}

async fn a_device_is_registered_before_there_is_a_message<H: Harness>(harness: H) {
    let case = Case::new(harness).await;
    let both = ["phone", ""].map(|device| ("bob".to_owned(), device.to_owned()));
    assert_eq!(case.store.register(both.to_vec()).await, [Ok(()), Ok(())]);
    let epoch = case.page("phone").await.epoch;
    let case = case.reopen().await;
    case.send(1..=2).await;
    // A third that acks without having read is one of them from then on.
    assert_eq!(case.ack("watch", &[(1, 1)]).await, [0; 0]);
    case.send(3..=3).await;
    assert_eq!(case.lacks("phone").await, [1, 2, 3]);
    assert_eq!(case.ack("phone", &[(1, 3)]).await, [0; 0]);
    assert_eq!(case.ack("", &[(1, 3)]).await, [1, 2]);
    assert_eq!(case.lacks("watch").await, [3]);
    assert_eq!(case.page("watch").await.epoch, epoch);
}

async fn a_device_that_is_gone_holds_nothing_back<H: Harness>(harness: H) {
    let case = Case::new(harness).await;
    case.register("phone").await.unwrap();
    case.clock.advance(SEEN_EVERY);
    assert_eq!(case.page("phone").await.device, Known::LongAgo);
    case.register("laptop").await.unwrap();
    case.send(1..=3).await;
    assert_eq!(case.ack("laptop", &[(1, 2)]).await, [0; 0]);
    let until_gone = FORGET_AFTER - SEEN_EVERY;
    case.clock.advance(until_gone - Duration::from_micros(1));
    let forget = async |case: &Case<H>| case.store.forget_devices(case.clock.now_us(), 5).await.unwrap();
    assert_eq!(forget(&case).await, Forgotten::default());
    case.clock.advance(Duration::from_micros(1));
    let case = case.reopen().await;
    assert_eq!(forget(&case).await, Forgotten { devices: 1, more: false });
    let ended: Vec<_> =
        case.heard.take().into_iter().map(|(_, message, state)| (message.seq, state)).collect();
    assert_eq!(ended, [(1, State::Acked), (2, State::Acked)]);
    assert_eq!((case.state(2).await, case.state(3).await), (State::Acked, State::Accepted));
    assert_eq!(case.page("phone").await.device, Known::Unknown);
    // Without any device everything waits for the next one, which is the first.
    case.clock.advance(FORGET_AFTER);
    assert_eq!(forget(&case).await, Forgotten { devices: 1, more: false });
    assert_eq!(forget(&case).await, Forgotten::default());
    case.send(4..=4).await;
    case.register("tablet").await.unwrap();
    assert_eq!(case.lacks("tablet").await, [3, 4]);
}

async fn a_seventeenth_device_is_refused<H: Harness>(harness: H) {
    let case = Case::new(harness).await;
    case.send(1..=1).await;
    for number in 1..=MAX_DEVICES {
        case.register(&number.to_string()).await.unwrap();
    }
    assert_eq!(case.register("more").await, Err(RegisterError::TooMany));
    let again = case.ack("more", &[(1, 1)]).await;
    assert_eq!((again, case.page("more").await.device), (vec![], Known::Unknown));
    assert_eq!(case.ack("1", &[(1, 1)]).await, [1], "the others began behind it");
    case.clock.advance(FORGET_AFTER);
    // Whoever comes need not wait until somebody looks for those that are gone.
    case.register("more").await.unwrap();
    assert_eq!(case.page("1").await.device, Known::Unknown);
    assert_eq!(case.lacks("more").await, [0; 0]);
}

async fn failures_count_together_but_not_of_who_acked<H: Harness>(harness: H) {
    let case = Case::new(harness).await;
    case.register("phone").await.unwrap();
    case.register("laptop").await.unwrap();
    case.send(1..=2).await;
    let nak = |delivery| vec![failure(1, delivery, NAK, &case.clock)];
    case.ack("phone", &[(1, 1)]).await;
    assert_eq!(case.say("phone", &[], 0, nak(1)).await.failed, [], "it has acked that");
    assert_eq!(case.say("laptop", &[], 0, nak(1)).await.failed.len(), 1);
    assert_eq!(case.lacks("laptop").await, [2], "1 waits for its next attempt");
    case.clock.advance(Duration::from_secs(60));
    let now_us = case.clock.now_us();
    let claimed = case.store.claim_due(now_us, now_us + 1, 10).await.unwrap().remove(0);
    assert_eq!(claimed.retries, [(1, 2)]);
    let only = InboxQuery { only: vec![1, 2], ..query("bob", None, 10) };
    let page = case.store.read(vec![only]).await.remove(0).unwrap();
    assert_eq!(page.acked_by, [(1, vec!["phone".to_owned()]), (2, vec![])]);
    // Who gives it up does so for all.
    let term = vec![failure(2, 1, FailureKind::Term, &case.clock)];
    case.say("phone", &[], 0, term).await;
    assert_eq!(case.state(2).await, State::Dead);
    assert_eq!(case.lacks("laptop").await, [1]);
    assert_eq!(case.ack("laptop", &[(1, 1)]).await, [1]);
}

async fn what_a_device_has_not_got_stays_due<H: Harness>(harness: H) {
    let case = Case::new(harness).await;
    case.register("phone").await.unwrap();
    case.register("laptop").await.unwrap();
    case.send(1..=2).await;
    case.say("phone", &[], 1, Vec::new()).await;
    case.clock.advance(FIRST_DUE);
    let claim = async || {
        let now_us = case.clock.now_us();
        case.store.claim_due(now_us, now_us + 1, 10).await.unwrap()
    };
    let claimed = claim().await.remove(0);
    assert_eq!((claimed.after, claimed.missed), (0, false));
    case.say("laptop", &[], 2, Vec::new()).await;
    case.clock.advance(FIRST_DUE);
    let claimed = claim().await.remove(0);
    assert_eq!((claimed.after, claimed.missed), (1, true), "the phone lacks one");
    case.say("phone", &[], 2, Vec::new()).await;
    case.clock.advance(FIRST_DUE);
    assert_eq!(claim().await, []);
}
