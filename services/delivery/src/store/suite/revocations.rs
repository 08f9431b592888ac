//! Revocations: what is written last of a subject is there, after a reopen too, until it is over.

use super::*;

fn revocation(subject: Subject, clock: &ManualClock) -> Revocation {
    let now_us = clock.now_us();
    Revocation {
        subject,
        before_s: now_us / 1_000_000 + 1,
        revoked_us: now_us,
        expires_us: now_us + 60_000_000,
        reason: "stolen".to_owned(),
        caller: "shop".to_owned(),
        lifted: false,
        changed_us: now_us,
    }
}

pub(crate) async fn fixed_cases<H: Harness>(make: &impl Fn() -> H) {
    what_is_revoked_is_listed_in_order(make()).await;
    changes_are_found_by_their_time(make()).await;
    what_is_over_is_gone(make()).await;
}

async fn what_is_revoked_is_listed_in_order<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    assert_eq!(store.revocations(None, 10).await.unwrap(), []);
    let session = Subject::Session(Uuid::from_u128(7));
    let names = ["bob", "bob/x", "eve"].map(|user| Subject::User(user.to_owned()));
    let subjects: Vec<Subject> =
        [Subject::Jti("u/bob".to_owned()), session].into_iter().chain(names).collect();
    let all: Vec<Revocation> = subjects.into_iter().map(|subject| revocation(subject, &clock)).collect();
    for revocation in all.iter().rev() {
        store.revoke(revocation.clone()).await.unwrap();
    }
    assert_eq!(store.revocations(None, 10).await.unwrap(), all);
    drop(store);
    let store = harness.reopen().await;
    assert_eq!(store.revocations(None, 2).await.unwrap(), all[..2]);
    let after = |at: usize| Some(all[at].subject.clone());
    assert_eq!(store.revocations(after(1), 10).await.unwrap(), all[2..]);
    assert_eq!(store.revocations(after(4), 10).await.unwrap(), []);
}

async fn changes_are_found_by_their_time<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let first = revocation(Subject::User("bob".to_owned()), &clock);
    store.revoke(first.clone()).await.unwrap();
    clock.advance(Duration::from_secs(1));
    let second = revocation(Subject::Jti("t1".to_owned()), &clock);
    store.revoke(second.clone()).await.unwrap();
    let since = async |since_us: u64| store.revocations_changed(since_us, 10).await.unwrap();
    assert_eq!(since(0).await, [first.clone(), second.clone()]);
    assert_eq!(store.revocations_changed(0, 1).await.unwrap(), std::slice::from_ref(&first));
    assert_eq!(since(second.changed_us).await, std::slice::from_ref(&second));
    assert_eq!(since(second.changed_us + 1).await, []);
    clock.advance(Duration::from_secs(1));
    let lifted = Revocation { lifted: true, changed_us: clock.now_us(), ..first };
    store.revoke(lifted.clone()).await.unwrap();
    assert_eq!(since(second.changed_us).await, [second.clone(), lifted.clone()]);
    assert_eq!(since(0).await.len(), 2, "it takes the place of the one before");
    assert_eq!(
        store.revocations(None, 10).await.unwrap(),
        [second, lifted],
        "nodes that begin are told, too"
    );
}

async fn what_is_over_is_gone<H: Harness>(mut harness: H) {
    let store = harness.reopen().await;
    let clock = harness.clock().clone();
    let short = revocation(Subject::User("bob".to_owned()), &clock);
    let long = Revocation {
        expires_us: short.expires_us + 1,
        ..revocation(Subject::User("eve".to_owned()), &clock)
    };
    for revocation in [&short, &long] {
        store.revoke(revocation.clone()).await.unwrap();
    }
    clock.advance(Duration::from_secs(60));
    assert_eq!(store.revocations(None, 10).await.unwrap(), std::slice::from_ref(&long));
    if !H::SWEPT_BY_DATABASE {
        store.sweep(clock.now_us(), 100).await.unwrap();
        assert_eq!(store.revocations_changed(0, 10).await.unwrap(), [long]);
    }
}
