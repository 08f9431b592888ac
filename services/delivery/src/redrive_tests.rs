//! Redrives over a real store: their pace, their order, what they hold in memory, and being cut off.

use std::{
    collections::HashMap,
    future::ready,
    sync::atomic::{AtomicUsize, Ordering},
};

use futures::future::BoxFuture;
use sanjay_proto::client::v1::{Payload, payload::Kind};
use sanjay_runtime::{
    ManualClock, SeededRandom,
    clock::{Clock as _, SharedClock},
    milestones::MilestoneRing,
};
use tempfile::TempDir;

use super::*;
use crate::{
    metrics,
    path::Recipients,
    store::{
        Acked, AuditPage, DeadPage, DeadReason, DueInbox, Failure, FailureKind, InboxQuery, InboxStore, Page,
        Rearm, Receipt, Settle, Stats, StoreOptions, Verdict, open,
    },
};

/// How a letter is told apart: its user, and which of theirs it is.
type Name = (String, usize);

/// What a redrive has no business with.
macro_rules! asks_nothing_else {
    () => {
        fn read(&self, _: Vec<InboxQuery>) -> BoxFuture<'static, Vec<Result<Page, StoreError>>> {
            unreachable!("a redrive reads no inbox")
        }

        fn ack(&self, _: Vec<Settle>) -> BoxFuture<'static, Vec<Result<Acked, StoreError>>> {
            unreachable!("a redrive settles nothing")
        }

        fn lookup(&self, _: String, _: Uuid) -> BoxFuture<'static, Result<Option<Receipt>, StoreError>> {
            unreachable!("a redrive looks no receipt up")
        }

        fn arm(&self, _: Vec<String>) {
            unreachable!("a send arms its inbox itself")
        }

        fn claim_due(
            &self,
            _: u64,
            _: u64,
            _: usize,
        ) -> BoxFuture<'static, Result<Vec<DueInbox>, StoreError>> {
            unreachable!("a redrive claims nothing")
        }

        fn rearm(&self, _: Vec<Rearm>) -> BoxFuture<'static, Result<(), StoreError>> {
            unreachable!("a redrive claims nothing")
        }

        fn purge(&self, _: Vec<(String, Uuid)>) -> BoxFuture<'static, Result<u64, StoreError>> {
            unreachable!("a redrive removes nothing")
        }

        fn sweep(&self, _: u64, _: usize) -> BoxFuture<'static, Result<usize, StoreError>> {
            unreachable!("a redrive sweeps nothing")
        }

        fn stats(&self) -> BoxFuture<'static, Result<Stats, StoreError>> {
            unreachable!("a redrive measures nothing")
        }
    };
}

/// A store that counts what is asked of it, and can fail.
struct Watched {
    store: Arc<dyn InboxStore>,
    listed: Mutex<Vec<usize>>,
    /// The most letters with payloads that were out at once, for which one must have asked together.
    reading: AtomicUsize,
    most_reading: AtomicUsize,
    appended: Mutex<Vec<(Instant, Vec<String>)>>,
    /// So many notes of what was sent fail.
    lose_notes: AtomicUsize,
}

impl InboxStore for Watched {
    crate::store::schedules_nothing!();
    crate::store::logs_nothing!();
    crate::store::revokes_nothing!();
    crate::store::fans_out_nothing!();
    crate::store::knows_no_devices!();

    fn oldest_undelivered(&self, limit: usize) -> BoxFuture<'static, Result<Option<u64>, StoreError>> {
        self.store.oldest_undelivered(limit)
    }

    fn audit(&self, after: String, limit: usize) -> BoxFuture<'static, Result<AuditPage, StoreError>> {
        self.store.audit(after, limit)
    }

    fn append(&self, messages: Vec<NewMessage>) -> BoxFuture<'static, Vec<Result<Appended, AppendError>>> {
        self.reading.store(0, Ordering::Relaxed);
        let bodies = messages.iter().map(|message| match &message.payload.kind {
            Some(Kind::Text(body)) => body.clone(),
            other => panic!("{other:?}"),
        });
        self.appended.lock().push((Instant::now(), bodies.collect()));
        self.store.append(messages)
    }

    fn dead_letters(
        &self,
        filter: DeadFilter,
        after: Option<DeadPosition>,
        limit: usize,
    ) -> BoxFuture<'static, Result<DeadPage, StoreError>> {
        self.listed.lock().push(limit);
        self.store.dead_letters(filter, after, limit)
    }

    fn dead_letter(
        &self,
        user: String,
        id: Uuid,
    ) -> BoxFuture<'static, Result<Option<DeadLetter>, StoreError>> {
        let reading = self.reading.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_reading.fetch_max(reading, Ordering::Relaxed);
        self.store.dead_letter(user, id)
    }

    fn redriven(
        &self,
        user: String,
        id: Uuid,
        sent_as: Uuid,
    ) -> BoxFuture<'static, Result<bool, StoreError>> {
        let lose = |left: usize| left.checked_sub(1);
        if self.lose_notes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, lose).is_ok() {
            return ready(Err(StoreError::Busy)).boxed();
        }
        self.store.redriven(user, id, sent_as)
    }

    fn clock(&self) -> SharedClock {
        self.store.clock()
    }

    asks_nothing_else!();
}

/// As many dead letters of one user as one likes: made when they are asked for, so that only what was sent takes memory.
struct Planted {
    count: u64,
    sent: Mutex<Vec<bool>>,
    clock: SharedClock,
}

impl Planted {
    /// Letter number `n`; its time and its id both tell the number.
    fn letter(&self, n: u64, payload: bool) -> DeadLetter {
        DeadLetter {
            user: "bob".into(),
            message_id: Uuid::from_u128(n.into()),
            seq: n,
            epoch: 1,
            caller: "shop".into(),
            reason: DeadReason::Terminated,
            accepted_us: n,
            died_us: n,
            failures: Vec::new(),
            trace: String::new(),
            payload: payload.then(|| Arc::new(Payload { kind: Some(Kind::Text(format!("bob {}", n - 1))) })),
            payload_bytes: 8,
            redriven_as: self.sent.lock()[n as usize].then(|| Uuid::from_u128(1)),
        }
    }
}

impl InboxStore for Planted {
    crate::store::schedules_nothing!();
    crate::store::logs_nothing!();
    crate::store::revokes_nothing!();
    crate::store::fans_out_nothing!();
    crate::store::knows_no_devices!();

    fn oldest_undelivered(&self, _: usize) -> BoxFuture<'static, Result<Option<u64>, StoreError>> {
        unreachable!("a redrive does not ask for it")
    }

    fn audit(&self, _: String, _: usize) -> BoxFuture<'static, Result<AuditPage, StoreError>> {
        unreachable!("a redrive audits nothing")
    }

    fn append(&self, messages: Vec<NewMessage>) -> BoxFuture<'static, Vec<Result<Appended, AppendError>>> {
        let appended = |message: NewMessage| {
            Ok(Appended {
                seq: 1,
                message_id: message.message_id,
                epoch: 1,
                duplicate: false,
                time_us: message.time_us,
            })
        };
        ready(messages.into_iter().map(appended).collect()).boxed()
    }

    fn dead_letters(
        &self,
        _: DeadFilter,
        after: Option<DeadPosition>,
        limit: usize,
    ) -> BoxFuture<'static, Result<DeadPage, StoreError>> {
        let top = after.map_or(self.count, |after| after.died_us - 1);
        let open = (1..=top).rev().filter(|n| !self.sent.lock()[*n as usize]);
        let letters: Vec<DeadLetter> = open.take(limit).map(|n| self.letter(n, false)).collect();
        let next = letters.last().filter(|letter| letter.seq > 1).map(DeadLetter::position);
        ready(Ok(DeadPage { letters, next })).boxed()
    }

    fn dead_letter(&self, _: String, id: Uuid) -> BoxFuture<'static, Result<Option<DeadLetter>, StoreError>> {
        ready(Ok(Some(self.letter(id.as_u128() as u64, true)))).boxed()
    }

    fn redriven(&self, _: String, id: Uuid, _: Uuid) -> BoxFuture<'static, Result<bool, StoreError>> {
        self.sent.lock()[id.as_u128() as usize] = true;
        ready(Ok(true)).boxed()
    }

    fn clock(&self) -> SharedClock {
        self.clock.clone()
    }

    asks_nothing_else!();
}

/// Dead letters to send again, in a file unless the test says otherwise.
pub(crate) struct World {
    _directory: TempDir,
    clock: Arc<ManualClock>,
    watched: Arc<Watched>,
    letters: DeadLetters,
}

impl World {
    pub(crate) async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let clock = Arc::new(ManualClock::new(1_700_000_000_000_000));
        let random = Arc::new(SeededRandom::new(7));
        let options = StoreOptions {
            on_commit: Arc::new(()),
            max_unsettled: 1_000_000,
            max_unsettled_bytes: u64::MAX,
            overflow: crate::store::Overflow::Reject,
            keep_expired: false,
            max_attempts: 8,
            clock: clock.clone(),
            random: random.clone(),
            metrics: metrics::for_tests(),
        };
        let location = format!("redb:{}", directory.path().join("inbox.redb").display()).parse().unwrap();
        let store = open(&location, options).await.unwrap();
        Self::on(store, directory, clock)
    }

    fn on(store: Arc<dyn InboxStore>, directory: TempDir, clock: Arc<ManualClock>) -> Self {
        let watched = Arc::new(Watched {
            store,
            listed: Mutex::default(),
            reading: AtomicUsize::new(0),
            most_reading: AtomicUsize::new(0),
            appended: Mutex::default(),
            lose_notes: AtomicUsize::new(0),
        });
        let letters = DeadLetters {
            store: watched.clone(),
            ring: Arc::new(MilestoneRing::new(1_024, "delivery", clock.clone())),
            recipients: Arc::new(Recipients::default()),
            clock: clock.clone(),
            random: Arc::new(SeededRandom::new(8)),
            metrics: metrics::for_tests(),
        };
        Self { _directory: directory, clock, watched, letters }
    }

    /// The letters in the file, without anybody who watches.
    pub(crate) fn unwatched(&self) -> DeadLetters {
        DeadLetters { store: self.watched.store.clone(), ..self.letters.clone() }
    }

    /// Makes dead letters: `each` of each of `users`, one second apart.
    pub(crate) async fn plant(&self, users: usize, each: usize) {
        let store = &self.watched.store;
        let names: Vec<String> = (0..users).map(|user| format!("u{user}")).collect();
        for n in 0..each {
            self.clock.advance(Duration::from_secs(1));
            let messages = names.iter().map(|user| NewMessage {
                user: user.clone(),
                caller: "shop".into(),
                message_id: uuid_v7(&*self.letters.clock, &*self.letters.random),
                payload: Arc::new(Payload { kind: Some(Kind::Text(format!("{user} {n}"))) }),
                dedupe_key: String::new(),
                time_us: self.clock.now_us(),
                trace: String::new(),
                ..NewMessage::default()
            });
            let appended = store.append(messages.collect()).await;
            let settles = names.iter().zip(appended).map(|(user, appended)| {
                let Appended { seq, epoch, .. } = appended.unwrap();
                let failure = Failure {
                    seq,
                    delivery: 1,
                    kind: FailureKind::Term,
                    time_us: self.clock.now_us(),
                    edge: "edge-1".into(),
                    session: None,
                    reason: String::new(),
                };
                Settle { user: user.clone(), epoch, written: seq, failed: vec![failure], ..Settle::default() }
            });
            for acked in store.ack(settles.collect()).await {
                assert!(matches!(acked.unwrap().failed[..], [(_, Verdict::Dead(_))]));
            }
        }
    }

    async fn redrive(
        &self,
        select: Select,
        rate: u32,
        dry_run: bool,
    ) -> (Result<(), RedriveError>, Progress) {
        let progress = Shared::default();
        let redrive = Redrive { caller: "shop".into(), select, rate, dry_run };
        let result = self.letters.redrive(redrive, progress.clone()).await;
        let progress = progress.lock().clone();
        (result, progress)
    }

    /// What waits for a user.
    async fn inbox(&self, user: usize) -> Vec<String> {
        let query =
            InboxQuery { user: format!("u{user}"), after: None, limit: 256, only: Vec::new(), device: None };
        let page = self.watched.store.read(vec![query]).await.pop().unwrap().unwrap();
        let bodies = page.messages.into_iter().map(|message| match message.payload.unwrap().kind {
            Some(Kind::Text(body)) => body,
            other => panic!("{other:?}"),
        });
        bodies.collect()
    }

    /// What was sent, in order, and the least time between the first and the last.
    fn sent(&self) -> (Vec<Name>, Duration) {
        let appended = self.watched.appended.lock();
        let names = appended.iter().flat_map(|(_, bodies)| bodies).map(|body| {
            let (user, n) = body.split_once(' ').unwrap();
            (user.to_owned(), n.parse().unwrap())
        });
        let (first, last) = (appended.first().unwrap().0, appended.last().unwrap().0);
        (names.collect(), last - first)
    }
}

fn all() -> Select {
    Select::All(DeadFilter::default())
}

/// Asserts that each letter was sent once, those of a user in the order in which they died.
fn assert_each_once(sent: &[Name], users: usize, each: usize) {
    let mut next: HashMap<&str, usize> = HashMap::new();
    for (user, n) in sent {
        let next = next.entry(user).or_default();
        assert_eq!(n, next, "the next of {user}");
        *next += 1;
    }
    assert_eq!((sent.len(), next.len()), (users * each, users));
}

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_letters_go_by_pages_and_a_few_payloads_at_once() {
    const COUNT: u64 = 100_000;
    let clock = Arc::new(ManualClock::new(1_700_000_000_000_000));
    let planted =
        Planted { count: COUNT, sent: Mutex::new(vec![false; COUNT as usize + 1]), clock: clock.clone() };
    let world = World::on(Arc::new(planted), tempfile::tempdir().unwrap(), clock);
    let (result, counted) = world.redrive(all(), 1, true).await;
    assert_eq!(result, Ok(()));
    assert_eq!((counted.total, counted.examined, counted.redriven), (COUNT, COUNT, 0));
    let pages = (COUNT as usize).div_ceil(MAX_PAGE);
    assert_eq!(world.watched.listed.lock().len(), pages);
    assert_eq!(world.watched.appended.lock().len(), 0);

    let (result, progress) = world.redrive(all(), 10_000, false).await;
    assert_eq!(result, Ok(()));
    assert_eq!((progress.total, progress.redriven, progress.failed), (COUNT, COUNT, 0));
    let (sent, took) = world.sent();
    assert_each_once(&sent, 1, COUNT as usize);
    assert!(took >= Duration::from_millis(9_900) && took <= Duration::from_secs(15), "{took:?}");
    let listed = world.watched.listed.lock();
    assert_eq!((listed.len(), listed.iter().max()), (3 * pages, Some(&MAX_PAGE)));
    let payloads = world.watched.most_reading.load(Ordering::Relaxed);
    assert!((1..=MAX_CHUNK).contains(&payloads), "{payloads} payloads were in memory at once");
}

#[tokio::test]
async fn letters_are_sent_at_the_rate_and_in_the_order_in_which_they_died() {
    let world = World::new().await;
    world.plant(30, 20).await;
    // Without I/O that tokio knows of, the time that the store takes is no time: only the pace moves the clock.
    tokio::time::pause();
    let (result, progress) = world.redrive(all(), 200, false).await;
    assert_eq!(result, Ok(()));
    let expected = Progress { total: 600, examined: 600, redriven: 600, ..Progress::default() };
    assert_eq!(progress, expected);
    let (sent, took) = world.sent();
    assert_each_once(&sent, 30, 20);
    // 600 at 200 a second, of which the last have their share of time after them.
    let expected = Duration::from_secs(3);
    assert!(took >= expected.mul_f64(0.95) && took <= expected.mul_f64(1.5), "{took:?}");
    let (again, progress) = world.redrive(all(), 200, false).await;
    assert_eq!((again, progress), (Ok(()), Progress::default()));
}

#[tokio::test]
async fn a_redrive_that_was_cut_off_goes_on_and_sends_nothing_twice() {
    let world = World::new().await;
    world.plant(10, 30).await;
    // Three times cut off by whoever asked going away, in the middle of it, and then by notes that are lost: those
    // messages were sent, and nothing in the store says so.
    for round in 1..=3 {
        let before = world.watched.appended.lock().len();
        let cut = async {
            while world.watched.appended.lock().len() < before + round {
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            biased;
            () = cut => {}
            (result, _) = world.redrive(all(), 200, false) => panic!("ended before it was cut off: {result:?}"),
        }
        world.watched.lose_notes.store(usize::MAX, Ordering::Relaxed);
        tokio::time::pause();
        let (result, _) = world.redrive(all(), 200, false).await;
        tokio::time::resume();
        assert_eq!(result, Err(RedriveError::Store(StoreError::Busy)));
        world.watched.lose_notes.store(0, Ordering::Relaxed);
    }
    let (result, progress) = world.redrive(all(), 10_000, false).await;
    assert_eq!((result, progress.failed), (Ok(()), 0));
    for user in 0..10 {
        assert_eq!(world.inbox(user).await, (0..30).map(|n| format!("u{user} {n}")).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn two_at_once_send_each_letter_once() {
    let world = World::new().await;
    world.plant(5, 40).await;
    let (one, two) =
        futures::future::join(world.redrive(all(), 1_000, false), world.redrive(all(), 900, false)).await;
    assert_eq!((one.0, two.0), (Ok(()), Ok(())));
    for user in 0..5 {
        let mut bodies = world.inbox(user).await;
        // Two writers of one order do not keep it.
        bodies.sort_by_key(|body| body.split_once(' ').unwrap().1.parse::<u64>().unwrap());
        assert_eq!(bodies, (0..40).map(|n| format!("u{user} {n}")).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_store_that_refuses_for_a_moment_does_not_end_it() {
    let world = World::new().await;
    world.plant(3, 4).await;
    world.watched.lose_notes.store(3, Ordering::Relaxed);
    tokio::time::pause();
    let (result, progress) = world.redrive(all(), 10_000, false).await;
    assert_eq!(result, Ok(()));
    assert_eq!((progress.total, progress.examined, progress.redriven), (12, 12, 12));
}

#[tokio::test]
async fn what_dies_meanwhile_is_left_for_the_next() {
    let world = World::new().await;
    world.plant(1, 3).await;
    let redriving = world.redrive(all(), 2, false);
    let dying = async {
        // Between the first and the second letter, which are half a second apart.
        while world.watched.appended.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        world.plant(1, 2).await;
    };
    let ((result, progress), ()) = futures::future::join(redriving, dying).await;
    assert_eq!((result, progress.redriven), (Ok(()), 3));
    let (_, left) = world.redrive(all(), 1, true).await;
    assert_eq!(left.total, 2);
}
