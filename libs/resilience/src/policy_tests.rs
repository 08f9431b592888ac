//! Policies in paused time.

use std::{
    future::pending,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::time::{Instant, advance, sleep};

use crate::{Breakers, CallError, Policy, Probes, Refused, Rules, Settings, State, keep_probing};

const PAUSE: Duration = Duration::from_millis(500);
const WITHIN: Duration = Duration::from_secs(3);

const SETTINGS: Settings = Settings {
    rules: Rules { window: 10, minimum: 4, share: 0.5, fresh: Duration::from_secs(30), pause: PAUSE },
    probes: Probes::AnyCall,
    running: 2,
    waiting: 1,
};

fn policy(settings: Settings) -> (Arc<Policy>, impl Fn() -> String) {
    let mut registry = Registry::default();
    let metrics = Breakers::register(&mut registry, "role");
    let page = move || {
        let mut page = String::new();
        encode(&mut page, &registry).unwrap();
        page
    };
    (Arc::new(Policy::new("store", settings, &metrics)), page)
}

type Answer = Result<u32, CallError<&'static str>>;

async fn ask(policy: &Policy, answer: Result<u32, &'static str>) -> Answer {
    policy.call(WITHIN, async { answer }, |error| *error == "away").await
}

async fn fail(policy: &Policy) {
    for _ in 0..4 {
        assert_eq!(ask(policy, Err("away")).await, Err(CallError::Failed("away")));
    }
    assert_eq!(policy.state(), State::Open);
}

#[tokio::test(start_paused = true)]
async fn only_outages_open_it() {
    let (policy, page) = policy(SETTINGS);
    for _ in 0..100 {
        assert_eq!(ask(&policy, Err("no")).await, Err(CallError::Failed("no")));
    }
    assert_eq!(policy.state(), State::Closed);
    for _ in 0..5 {
        ask(&policy, Err("away")).await.unwrap_err();
    }
    assert_eq!(policy.state(), State::Open);
    let refused = ask(&policy, Ok(1)).await;
    assert_eq!(refused, Err(Refused::Open { retry_after: PAUSE }.into()));
    let page = page();
    for line in [
        r#"role_dependency_breaker_state{dependency="store"} 2"#,
        r#"role_dependency_breaker_opened_total{dependency="store"} 1"#,
        r#"role_dependency_calls_refused_total{dependency="store",reason="open"} 1"#,
    ] {
        assert!(page.contains(line), "no {line} in {page}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_hangs_is_given_up_and_opens_it() {
    let (policy, page) = policy(SETTINGS);
    let began = Instant::now();
    for _ in 0..4 {
        let hung: Answer = policy.call(WITHIN, pending(), |_| true).await;
        assert_eq!(hung, Err(Refused::Late(WITHIN).into()));
    }
    assert_eq!((began.elapsed(), policy.state()), (WITHIN * 4, State::Open));
    let before = Instant::now();
    assert!(matches!(ask(&policy, Ok(1)).await, Err(CallError::Refused(Refused::Open { .. }))));
    assert_eq!(before.elapsed(), Duration::ZERO);
    advance(PAUSE).await;
    assert_eq!(ask(&policy, Ok(2)).await, Ok(2), "any call probes");
    assert_eq!(policy.state(), State::Closed);
    assert!(page().contains(r#"reason="late"} 4"#), "{}", page());
}

#[tokio::test(start_paused = true)]
async fn beyond_its_bulkhead_calls_are_refused_and_the_wait_counts() {
    let (policy, _) = policy(SETTINGS);
    let hang = || {
        let policy = Arc::clone(&policy);
        tokio::spawn(async move { policy.call(WITHIN, pending::<Result<u32, &str>>(), |_| true).await })
    };
    let hung = [hang(), hang()];
    sleep(WITHIN / 2).await;
    let waiting = {
        let policy = Arc::clone(&policy);
        tokio::spawn(async move { policy.call(WITHIN / 3, async { Ok::<_, &str>(3) }, |_| true).await })
    };
    tokio::task::yield_now().await;
    let before = Instant::now();
    assert_eq!(ask(&policy, Ok(4)).await, Err(Refused::Full.into()));
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert_eq!(waiting.await.unwrap(), Err(Refused::Full.into()), "it was never made");
    for hung in hung {
        assert_eq!(hung.await.unwrap(), Err(Refused::Late(WITHIN).into()));
    }
    assert_eq!(ask(&policy, Ok(5)).await, Ok(5));
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_nobody_waits_for_makes_room_for_another() {
    let (policy, _) = policy(SETTINGS);
    fail(&policy).await;
    advance(PAUSE).await;
    let probe = {
        let policy = Arc::clone(&policy);
        tokio::spawn(async move { policy.call(WITHIN, pending::<Result<u32, &str>>(), |_| true).await })
    };
    tokio::task::yield_now().await;
    assert_eq!(policy.state(), State::HalfOpen);
    assert!(ask(&policy, Ok(1)).await.is_err(), "one probe at a time");
    assert!(policy.check().is_err());
    probe.abort();
    assert!(probe.await.is_err());
    assert_eq!(policy.state(), State::Open);
    assert!(policy.check().is_ok(), "the next call may probe");
    assert_eq!(ask(&policy, Ok(1)).await, Ok(1));
}

#[tokio::test(start_paused = true)]
async fn where_it_probes_itself_no_call_does() {
    let (policy, _) = policy(Settings { probes: Probes::Own, ..SETTINGS });
    let (away, probes) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicUsize::new(0)));
    let probing = {
        let (away, probes) = (Arc::clone(&away), Arc::clone(&probes));
        let probe = move || {
            probes.fetch_add(1, Ordering::Relaxed);
            let away = away.load(Ordering::Relaxed);
            async move { if away { Err("away") } else { Ok(()) } }
        };
        tokio::spawn(keep_probing(Arc::downgrade(&policy), WITHIN, probe, |error| *error == "away"))
    };
    sleep(PAUSE * 4).await;
    assert_eq!(probes.load(Ordering::Relaxed), 0, "nothing is wrong");
    fail(&policy).await;
    for _ in 0..20 {
        sleep(PAUSE / 2).await;
        assert!(matches!(ask(&policy, Ok(1)).await, Err(CallError::Refused(Refused::Open { .. }))));
        assert!(policy.check().is_err());
    }
    let probed = probes.load(Ordering::Relaxed);
    assert!((9..=10).contains(&probed), "one for each pause: {probed}");
    away.store(false, Ordering::Relaxed);
    sleep(PAUSE).await;
    assert_eq!(ask(&policy, Ok(1)).await, Ok(1));
    drop(policy);
    probing.await.expect("it ends with the policy");
}
