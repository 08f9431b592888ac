//! What Redis is told, whatever order calls, confirmations and losses come in.

use super::*;

const PATIENCE: Duration = Duration::from_millis(1_000);

fn connected() -> Arc<Wanted> {
    let wanted = Wanted::new(PATIENCE, BusMetrics::default());
    wanted.connected();
    Arc::new(wanted)
}

fn names(names: &[&str]) -> Vec<Arc<str>> {
    names.iter().map(|name| Arc::from(*name)).collect()
}

fn due(wanted: &Wanted) -> Vec<(String, Change)> {
    let mut due: Vec<_> =
        wanted.take_due(100).into_iter().map(|(name, change)| (name.to_string(), change)).collect();
    due.sort_by(|a, b| a.0.cmp(&b.0));
    due
}

/// Does what the task that talks to Redis does, with a Redis that confirms everything.
fn serve(wanted: &Wanted) -> Vec<(String, Change)> {
    let due = due(wanted);
    for (name, change) in &due {
        match change {
            Change::Subscribe => _ = wanted.confirm(name),
            Change::Unsubscribe => assert!(!wanted.ended(name)),
        }
    }
    wanted.answered();
    due
}

/// Begins to subscribe, and returns once the channels are due.
async fn asking(
    wanted: &Arc<Wanted>,
    channels: &[&str],
) -> tokio::task::JoinHandle<Vec<Result<(), WantError>>> {
    let (channels, own) = (names(channels), Arc::clone(wanted));
    let asking = tokio::spawn(async move { own.subscribe(&channels).await });
    tokio::task::yield_now().await;
    asking
}

async fn subscribed(wanted: &Arc<Wanted>, channels: &[&str]) {
    let asking = asking(wanted, channels).await;
    serve(wanted);
    assert!(asking.await.unwrap().iter().all(Result::is_ok));
}

#[tokio::test(start_paused = true)]
async fn a_subscription_waits_for_its_confirmation() {
    let wanted = connected();
    let asking = asking(&wanted, &["a", "b"]).await;
    assert_eq!(due(&wanted), [("a".into(), Change::Subscribe), ("b".into(), Change::Subscribe)]);
    wanted.confirm("a");
    wanted.answered();
    tokio::task::yield_now().await;
    assert!(!asking.is_finished(), "b is not confirmed");
    wanted.confirm("b");
    wanted.answered();
    assert_eq!(asking.await.unwrap(), [Ok(()), Ok(())]);
    assert_eq!(wanted.held(), 2);
    assert_eq!(wanted.subscribe(&names(&["a"])).await, [Ok(())], "nothing to ask");
    assert!(due(&wanted).is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_confirmed_is_not_wanted() {
    let wanted = connected();
    let began = Instant::now();
    assert_eq!(wanted.subscribe(&names(&["a"])).await, [Err(WantError::Away)]);
    assert_eq!(began.elapsed(), PATIENCE);
    assert!(due(&wanted).is_empty());
    assert!(wanted.state.lock().channels.is_empty());
}

/// Edges that announce many channels during an outage ask batch after batch: waits must not add up.
#[tokio::test(start_paused = true)]
async fn nobody_waits_once_the_outage_has_lasted() {
    let wanted = connected();
    wanted.disconnected(false);
    let began = Instant::now();
    for _ in 0..100 {
        assert_eq!(wanted.subscribe(&names(&["a"])).await, [Err(WantError::Away)]);
    }
    assert_eq!(began.elapsed(), PATIENCE);
    assert!(wanted.state.lock().channels.is_empty() && wanted.state.lock().due.is_empty());
    wanted.connected();
    subscribed(&wanted, &["a"]).await;
}

#[tokio::test(start_paused = true)]
async fn who_waits_is_answered_when_a_silent_connection_is_given_up() {
    let wanted = connected();
    tokio::time::advance(PATIENCE).await;
    let asking = asking(&wanted, &["a"]).await;
    let began = Instant::now();
    wanted.disconnected(true);
    assert_eq!(asking.await.unwrap(), [Err(WantError::Away)]);
    assert_eq!(wanted.subscribe(&names(&["a"])).await, [Err(WantError::Away)]);
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_told_at_once_and_retried_only_for_who_was_promised() {
    let wanted = connected();
    let refused = asking(&wanted, &["a"]).await;
    due(&wanted);
    wanted.refuse("a", "no");
    wanted.answered();
    assert_eq!(refused.await.unwrap(), [Err(WantError::Refused("no".into()))]);
    assert!(due(&wanted).is_empty());
    subscribed(&wanted, &["b"]).await;
    assert!(wanted.ended("b"));
    assert_eq!(due(&wanted), [("b".into(), Change::Subscribe)]);
    wanted.refuse("b", "no");
    wanted.retry_refused();
    assert_eq!(due(&wanted), [("b".into(), Change::Subscribe)]);
    assert_eq!(wanted.confirm("b"), Confirmed::Again);
}

#[tokio::test(start_paused = true)]
async fn everything_promised_is_due_on_a_new_connection() {
    let wanted = connected();
    subscribed(&wanted, &["a", "b", "c"]).await;
    wanted.unsubscribe(&names(&["c"]));
    wanted.disconnected(false);
    assert_eq!(wanted.held(), 0);
    wanted.connected();
    assert_eq!(due(&wanted), [("a".into(), Change::Subscribe), ("b".into(), Change::Subscribe)]);
    assert_eq!(wanted.confirm("a"), Confirmed::Again);
    // The connection breaks before the second one.
    wanted.disconnected(false);
    wanted.connected();
    assert_eq!(due(&wanted).len(), 2);
    assert_eq!((wanted.confirm("a"), wanted.confirm("b")), (Confirmed::Again, Confirmed::Again));
    assert_eq!(wanted.confirm("a"), Confirmed::Begun, "it was there all the time");
}

#[tokio::test(start_paused = true)]
async fn a_channel_that_is_wanted_again_while_it_ends_waits_for_a_new_confirmation() {
    let wanted = connected();
    subscribed(&wanted, &["a"]).await;
    wanted.unsubscribe(&names(&["a"]));
    assert_eq!(due(&wanted), [("a".into(), Change::Unsubscribe)]);
    let again = asking(&wanted, &["a"]).await;
    assert!(!wanted.ended("a"), "it was asked for");
    wanted.answered();
    tokio::task::yield_now().await;
    assert!(!again.is_finished());
    assert_eq!(serve(&wanted), [("a".into(), Change::Subscribe)]);
    assert_eq!(again.await.unwrap(), [Ok(())]);
}

#[tokio::test(start_paused = true)]
async fn a_confirmation_that_nobody_waits_for_any_more_is_undone() {
    let wanted = connected();
    let asking = asking(&wanted, &["a"]).await;
    assert_eq!(due(&wanted).len(), 1);
    asking.abort();
    assert!(asking.await.unwrap_err().is_cancelled());
    assert!(due(&wanted).is_empty(), "it is not confirmed yet");
    wanted.confirm("a");
    assert_eq!(serve(&wanted), [("a".into(), Change::Unsubscribe)]);
    assert!(due(&wanted).is_empty());
    assert!(wanted.state.lock().channels.is_empty());
    assert_eq!(wanted.held(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_batch_leaves_the_rest_for_the_next_one() {
    let wanted = connected();
    let many: Vec<_> = (0..10).map(|at| format!("c{at}")).collect();
    let many: Vec<_> = many.iter().map(String::as_str).collect();
    let asking = asking(&wanted, &many).await;
    for (name, _) in wanted.take_due(7) {
        wanted.confirm(&name);
    }
    wanted.work().await;
    assert_eq!(serve(&wanted).len(), 3);
    assert!(asking.await.unwrap().iter().all(Result::is_ok));
}
