use std::{
    cell::{Cell, RefCell},
    rc::Rc,
};

use prometheus_client::registry::Registry;
use sanjay_runtime::{Readiness, clock::ManualClock, mailbox::mailbox, random::SeededRandom};

use super::*;

/// A document with one key, which nobody signs with.
const KEYS: &str =
    r#"{"keys":[{"kty":"OKP","crv":"Ed25519","kid":"a","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;

const PACE: Pace = Pace { interval: Duration::from_secs(10), refresh: Duration::from_secs(300) };

fn document(text: &str, max_age_s: Option<u64>) -> Result<Document, FetchError> {
    let max_age = max_age_s.map(Duration::from_secs);
    Ok(Document { body: text.to_owned().into(), max_age })
}

/// The task with a server that answers what it is told to, under paused time.
struct Bench {
    answer: Rc<RefCell<Result<Document, FetchError>>>,
    fetches: Rc<Cell<u32>>,
    published: Arc<Published>,
    readiness: Readiness,
    _task: tokio::task::JoinHandle<()>,
}

impl Bench {
    fn start(answer: Result<Document, FetchError>) -> Self {
        let answer = Rc::new(RefCell::new(answer));
        let fetches = Rc::new(Cell::new(0));
        let published = Arc::new(Published::default());
        let readiness = Readiness::new();
        let (sender, _receiver) = mailbox(16);
        let parts = Parts {
            source: Source::new("http://127.0.0.1:1/keys", None).unwrap(),
            pace: PACE,
            published: Arc::clone(&published),
            shards: Replies::new(vec![sender]),
            ready: Some(readiness.register("keys")),
            clock: Arc::new(ManualClock::new(1)),
            random: Arc::new(SeededRandom::new(1)),
            metrics: TokenMetrics::register(&mut Registry::default()),
        };
        let (told, counted) = (Rc::clone(&answer), Rc::clone(&fetches));
        let task = tokio::task::spawn_local(keep(parts, move || {
            counted.set(counted.get() + 1);
            std::future::ready(told.borrow().clone())
        }));
        Self { answer, fetches, published, readiness, _task: task }
    }

    /// How often the document was fetched within so many seconds.
    async fn fetches_in(&self, seconds: u64) -> u32 {
        let before = self.fetches.get();
        sleep(Duration::from_secs(seconds)).await;
        self.fetches.get() - before
    }
}

async fn on_local(test: impl Future<Output = ()>) {
    tokio::task::LocalSet::new().run_until(test).await;
}

#[tokio::test(start_paused = true)]
async fn keys_are_fetched_again_when_they_are_old_or_the_server_says_so() {
    on_local(async {
        let bench = Bench::start(document(KEYS, None));
        assert_eq!(bench.fetches_in(1).await, 1);
        assert!(bench.readiness.is_ready());
        assert_eq!(bench.fetches_in(298).await, 0);
        *bench.answer.borrow_mut() = document(KEYS, Some(60));
        assert_eq!(bench.fetches_in(2).await, 1);
        assert_eq!(bench.fetches_in(600).await, 10);
        // Out of bounds on either side.
        *bench.answer.borrow_mut() = document(KEYS, Some(0));
        assert_eq!(bench.fetches_in(60).await, 1);
        assert_eq!(bench.fetches_in(100).await, 10);
        *bench.answer.borrow_mut() = document(KEYS, Some(86_400));
        assert_eq!(bench.fetches_in(10).await, 1);
        assert_eq!(bench.fetches_in(3_000).await, 10);
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_fails_is_asked_less_and_less_often() {
    on_local(async {
        let bench = Bench::start(Err(FetchError::Late));
        let first = bench.fetches_in(120).await;
        assert!((3..=9).contains(&first), "{first}");
        assert!(!bench.readiness.is_ready());
        let later = bench.fetches_in(3_000).await;
        assert!((10..=24).contains(&later), "{later}");
        *bench.answer.borrow_mut() = document("<html>", None);
        assert!(bench.fetches_in(600).await >= 2);
        assert!(!bench.readiness.is_ready(), "rubbish has no keys");
        *bench.answer.borrow_mut() = document(KEYS, None);
        assert!(bench.fetches_in(301).await >= 1);
        assert!(bench.readiness.is_ready());
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn however_often_it_is_asked_for_there_is_one_fetch_an_interval() {
    on_local(async {
        let bench = Bench::start(document(KEYS, None));
        let stranger = sanjay_runtime::jwt::sign_with(
            &serde_json::json!({}),
            &sanjay_runtime::jwt::SigningKey::from_secret(
                sanjay_runtime::jwt::Algorithm::Hs256,
                &sanjay_runtime::Secret::new("x".repeat(32)),
            )
            .unwrap(),
            None,
        );
        // The header says that it is of a published key; its signature is never looked at.
        let header = "eyJhbGciOiJFZERTQSIsImtpZCI6ImIifQ";
        let stranger = format!("{header}{}", &stranger[stranger.find('.').unwrap()..]);
        let metrics = TokenMetrics::register(&mut Registry::default());
        let published = Some(Arc::clone(&bench.published));
        let ring = super::super::Keyring::new(Default::default(), published, Default::default(), metrics);
        sleep(Duration::from_millis(1)).await;
        assert_eq!(bench.fetches.get(), 1);
        for _ in 0..10_000 {
            let _ = super::super::TokenVerifier::verify(&ring, &stranger, 1);
            sleep(Duration::from_millis(10)).await;
        }
        // 100 s with a token every 10 ms.
        assert!((9..=11).contains(&bench.fetches.get()), "{}", bench.fetches.get());
    })
    .await;
}
