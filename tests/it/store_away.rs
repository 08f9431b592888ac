//! MongoDB or Redis is stopped or killed: what needs it is refused at once with a hint, what does not goes on, and
//! everything flows again soon after it is back.

use std::time::{Duration, Instant};

use sanjay_client::{BackendError, protocol::Payload as Text};
use sanjay_proto::{
    client::v1::{Payload, payload::Kind},
    delivery::v1::{Accepted, PublishRequest, SendRequest, delivery_client::DeliveryClient, send_result},
};
use sanjay_testkit::{
    API_KEY, Cluster, Role, Wire, backend, eventually,
    servers::{Mongo, MongoOptions, Redis},
    within,
};
use tonic::{Code, Request, Status, transport::Channel};
use tonic_types::StatusExt as _;

/// A call's deadline in the server, and some for the machine.
const DEADLINE: Duration = Duration::from_secs(6);

/// What a refusal without a call may take on a busy machine: well below the deadline.
const AT_ONCE: Duration = Duration::from_millis(750);

/// Within this everything works again.
const BACK: Duration = Duration::from_secs(5);

/// Until calls that hang are so many that the breaker opens.
const OPENS: Duration = Duration::from_secs(40);

/// How something goes away.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// SIGSTOP: its connections stay.
    Stopped,
    /// SIGKILL.
    Killed,
}

/// A back end that sees what is on the wire.
struct BackEnd(DeliveryClient<Channel>);

impl BackEnd {
    async fn connect(cluster: &Cluster) -> Self {
        Self(DeliveryClient::connect(cluster.server()).await.unwrap())
    }

    /// One user's result, and how long it took. An error for the user is one as if it were the call's.
    async fn send(&self, user: &str) -> (Result<Accepted, Status>, Duration) {
        let users = vec![user.to_owned()];
        let request = SendRequest { users, payload: payload(), ..SendRequest::default() };
        let (began, mut client) = (Instant::now(), self.0.clone());
        let result = client.send(with_key(request)).await.map(|sent| {
            match sent.into_inner().results.remove(0).result.expect("a result") {
                send_result::Result::Accepted(accepted) => Ok(accepted),
                send_result::Result::Error(error) => {
                    assert!(error.retryable && error.retry_after_ms > 0, "{error:?}");
                    Err(Status::unavailable(error.message))
                }
            }
        });
        (result.and_then(|result| result), began.elapsed())
    }

    async fn publish(&self) -> (Result<u64, Status>, Duration) {
        let request =
            PublishRequest { channel: "news".into(), payload: payload(), ..PublishRequest::default() };
        let (began, mut client) = (Instant::now(), self.0.clone());
        let result = client.publish(with_key(request)).await.map(|answer| answer.into_inner().offset);
        (result, began.elapsed())
    }
}

fn payload() -> Option<Payload> {
    Some(Payload { kind: Some(Kind::Text("t".into())) })
}

fn with_key<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {API_KEY}").parse().unwrap());
    request
}

/// The hint that a refusal carries.
fn hint(status: &Status) -> Duration {
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    let info = status.get_details_retry_info().unwrap_or_else(|| panic!("no RetryInfo in {status:?}"));
    let delay = info.retry_delay.expect("it says when");
    assert!(delay > Duration::ZERO && delay <= Duration::from_secs(1), "{delay:?}");
    delay
}

async fn metric(cluster: &Cluster, role: Role, name: &str, dependency: &str) -> u64 {
    let page = Wire::get(&format!("{}/metrics", cluster.admin(role))).await.body;
    let name = format!("sanjay_{}_dependency_{name}{{dependency=\"{dependency}\"}} ", role.name());
    let line = page.lines().find_map(|line| line.strip_prefix(name.as_str()));
    line.unwrap_or_else(|| panic!("no {name} in {page}")).parse().expect("a number")
}

async fn refuses(cluster: &Cluster, role: Role, dependency: &str) -> Option<()> {
    (metric(cluster, role, "breaker_state", dependency).await > 0).then_some(())
}

/// Calls until one works; says how long that took.
async fn works<T>(call: impl AsyncFn() -> Result<T, Status>) -> (T, Duration) {
    let began = Instant::now();
    let answer = eventually("a call works", DEADLINE + BACK, async || call().await.ok()).await;
    (answer, began.elapsed())
}

async fn without_mongodb(fault: Fault) {
    let mut mongo = Mongo::start_with(MongoOptions::default().sync_on_commit()).await;
    let cluster = Cluster::builder().mongo_at(&mongo.uri("away")).start().await;
    let api = BackEnd::connect(&cluster).await;
    assert_eq!(api.send("bob").await.0.unwrap().seq, 1);
    api.publish().await.0.unwrap();

    match fault {
        Fault::Stopped => mongo.stop(),
        Fault::Killed => mongo.kill(),
    }
    let gone = Instant::now();
    eventually("sends are refused", OPENS, async || {
        let (answer, took) = api.send("lost").await;
        assert!(took < DEADLINE, "{took:?}");
        answer.expect_err("nothing is accepted");
        refuses(&cluster, Role::Delivery, "mongodb").await
    })
    .await;
    println!("{fault:?}: the breaker was open {:?} after the fault", gone.elapsed());

    let sends = async {
        for _ in 0..50 {
            let (answer, took) = api.send("bob").await;
            hint(&answer.expect_err("nothing is accepted"));
            assert!(took < AT_ONCE, "{took:?}");
        }
    };
    let publishes = async {
        let mut times = Vec::new();
        for _ in 0..100 {
            let (answer, took) = api.publish().await;
            answer.expect("channels go on");
            times.push(took);
        }
        times.sort_unstable();
        times
    };
    let ((), times) = tokio::join!(sends, publishes);
    println!("{fault:?}: publishes meanwhile took {:?} in the middle, {:?} at most", times[50], times[99]);
    assert!(times[99] < AT_ONCE, "{:?}", times[99]);

    // On a stream the hint is in the item.
    let mut stream = backend(&cluster.server()).await.send_stream();
    let refused = stream.send(&["bob"], Text::Text("t".into()), "").await.unwrap().wait().await;
    let Err(BackendError::Refused(body)) = refused else { panic!("{refused:?}") };
    assert!(body.retryable && body.retry_after_ms.is_some_and(|ms| ms > 0), "{body:?}");

    match fault {
        Fault::Stopped => mongo.cont(),
        Fault::Killed => mongo.restart().await,
    }
    let (accepted, took) = works(async || api.send("bob").await.0).await;
    println!("{fault:?}: a send was accepted {took:?} after the return");
    assert!(took <= BACK, "{took:?}");
    assert_eq!(accepted.seq, 2, "what was refused was not stored");
    assert_eq!(metric(&cluster, Role::Delivery, "breaker_state", "mongodb").await, 0);
    assert!(metric(&cluster, Role::Delivery, "breaker_opened_total", "mongodb").await >= 1);
}

#[tokio::test]
async fn a_stopped_mongodb_holds_up_nobody() {
    within(120, "a stopped MongoDB", without_mongodb(Fault::Stopped)).await;
}

#[tokio::test]
async fn a_killed_mongodb_holds_up_nobody() {
    within(120, "a killed MongoDB", without_mongodb(Fault::Killed)).await;
}

async fn without_redis(fault: Fault) {
    let mut redis = Redis::start().await;
    let cluster = Cluster::builder().redis_at(&redis.url()).start().await;
    let api = BackEnd::connect(&cluster).await;
    api.publish().await.0.unwrap();
    match fault {
        Fault::Stopped => redis.stop(),
        Fault::Killed => redis.kill(),
    }
    eventually("publishes are refused", OPENS, async || {
        let (answer, took) = api.publish().await;
        assert!(took < DEADLINE, "{took:?}");
        hint(&answer.expect_err("nothing is published"));
        refuses(&cluster, Role::Router, "redis").await
    })
    .await;
    let mut times = Vec::new();
    for n in 0..20 {
        let (answer, took) = api.publish().await;
        hint(&answer.expect_err("nothing is published"));
        times.push(took);
        let (answer, took) = api.send("bob").await;
        assert_eq!(answer.expect("sends need no Redis").seq, n + 1);
        assert!(took < AT_ONCE, "{took:?}");
    }
    times.sort_unstable();
    println!("{fault:?}: refusals took {:?} in the middle, {:?} at most", times[10], times[19]);
    // One in between may be the probe, which waits for its time-out.
    assert!(times[10] < AT_ONCE && times[19] < DEADLINE / 2, "{times:?}");

    match fault {
        Fault::Stopped => redis.cont(),
        Fault::Killed => redis.restart().await,
    }
    let (_, took) = works(async || api.publish().await.0).await;
    println!("{fault:?}: a publish worked {took:?} after the return");
    assert!(took <= BACK, "{took:?}");
    assert!(metric(&cluster, Role::Router, "breaker_opened_total", "redis").await >= 1);
}

#[tokio::test]
async fn a_stopped_redis_holds_up_nobody() {
    within(120, "a stopped Redis", without_redis(Fault::Stopped)).await;
}

#[tokio::test]
async fn a_killed_redis_holds_up_nobody() {
    within(120, "a killed Redis", without_redis(Fault::Killed)).await;
}
