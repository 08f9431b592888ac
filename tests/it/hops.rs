//! Inboxes over many nodes: users hop between edges while back ends send through both delivery nodes, and a random
//! process of ours dies every few seconds.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures::future::join_all;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use sanjay_client::{
    Backend, BackendError, Client, InboxEvent, MemoryCheckpoint, UserResult, protocol::Payload,
};
use sanjay_testkit::{Cluster, History, Peer, backend, client_options, eventually, seed, within};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

const USERS: usize = 200;
/// Messages of each user.
const EACH: usize = 100;
const SENDS: usize = USERS * EACH;
/// Users of one call.
const BATCH: usize = 20;
/// Calls to the same users at once: the store takes them in one group.
const BURST: usize = 10;
const SENDERS: usize = 4;
/// How long processes are killed; sends are spread over it.
const STORM: Duration = Duration::from_secs(60);
/// Between two kills.
const KILLS: Duration = Duration::from_secs(5);
/// How long the rest may take once the storm is over.
const CALM: Duration = Duration::from_secs(150);

/// What the tasks of a run share.
struct Run {
    urls: Vec<String>,
    seed: u64,
    begun: Instant,
    history: Mutex<History>,
    /// Sends that had been accepted before, by an answer that got lost.
    repeated: AtomicUsize,
    /// Visits of users.
    visits: AtomicUsize,
}

impl Run {
    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap()
    }

    /// Says what has happened, and how far the run is.
    fn tell(&self, what: &str) {
        let (seconds, accepted) = (self.begun.elapsed().as_secs_f64(), self.history().accepted_count());
        println!("{seconds:5.1} s: {what}, {accepted} accepted");
    }

    fn random(&self, of: u64) -> StdRng {
        StdRng::seed_from_u64(self.seed ^ (of + 1) << 32)
    }
}

fn name(user: usize) -> String {
    format!("hopper-{user}")
}

/// Which users each burst sends to: each user as often as every other, in random groups.
fn plan(random: &mut StdRng) -> Vec<Vec<usize>> {
    let mut bursts = Vec::new();
    for _ in 0..EACH / BURST {
        let mut users: Vec<usize> = (0..USERS).collect();
        users.shuffle(random);
        bursts.extend(users.chunks(BATCH).map(<[usize]>::to_vec));
    }
    bursts
}

/// Makes one call until it is accepted for each of its users, at either node.
async fn send(run: &Run, backends: &[Backend], call: usize, mut users: Vec<usize>) {
    let (payload, key) = (Payload::Text(format!("call {call}")), format!("key {call}"));
    for attempt in call / BURST.. {
        let names: Vec<String> = users.iter().map(|&user| name(user)).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        // Another node than the last time: a key that one has seen is known to the other.
        let backend = &backends[attempt % backends.len()];
        match backend.send(&names, payload.clone(), &key).await {
            Ok(results) => users = note(run, results),
            Err(BackendError::Refused(error)) if !error.retryable => panic!("call {call}: {error:?}"),
            // The client has waited between its own attempts.
            Err(_) => {}
        }
        if users.is_empty() {
            return;
        }
    }
}

/// Records what was accepted; gives the users for whom nothing was.
fn note(run: &Run, results: Vec<UserResult>) -> Vec<usize> {
    let mut again = Vec::new();
    for UserResult { user, result } in results {
        match result {
            Ok(accepted) => {
                run.history().accepted(&user, accepted.seq, &accepted.message_id);
                run.repeated.fetch_add(usize::from(accepted.duplicate), Ordering::Relaxed);
            }
            Err(error) => {
                assert!(error.retryable, "{user}: {error:?}");
                again.push(user.trim_start_matches("hopper-").parse().unwrap());
            }
        }
    }
    again
}

/// Starts the senders; their bursts are spread over the storm.
async fn start_senders(run: &Arc<Run>, servers: &[String]) -> JoinSet<()> {
    let bursts = Arc::new(plan(&mut run.random(u64::MAX >> 33)));
    let mut senders = JoinSet::new();
    for sender in 0..SENDERS {
        let mut backends = Vec::new();
        for server in servers {
            backends.push(backend(server).await);
        }
        let (run, bursts) = (Arc::clone(run), Arc::clone(&bursts));
        senders.spawn(async move {
            for burst in (sender..bursts.len()).step_by(SENDERS) {
                let part = burst as f64 / bursts.len() as f64;
                sleep_until(run.begun + STORM.mul_f64(part)).await;
                let calls = burst * BURST..(burst + 1) * BURST;
                join_all(calls.map(|call| send(&run, &backends, call, bursts[burst].clone()))).await;
            }
        });
    }
    senders
}

/// A user with one checkpoint: at one edge for a while, then at another.
async fn hopper(run: Arc<Run>, user: usize) {
    let (name, mut random) = (name(user), run.random(user as u64));
    let checkpoint = Arc::new(MemoryCheckpoint::default());
    let mut done = 0;
    while done < EACH {
        let url = &run.urls[random.random_range(0..run.urls.len())];
        let mut options = client_options(url, &name, random.random());
        options.credit = Some([4, 64, 256][random.random_range(0..3)]);
        options.checkpoint = Arc::clone(&checkpoint) as _;
        let client = Client::connect(options).await.unwrap();
        let mut inbox = client.inbox().unwrap();
        run.visits.fetch_add(1, Ordering::Relaxed);
        let until = Instant::now() + Duration::from_millis(random.random_range(500..10_000));
        while let Ok(event) = timeout(until.saturating_duration_since(Instant::now()), inbox.next()).await {
            match event.expect("the client lasts") {
                InboxEvent::Message(delivery) => {
                    let (seq, id) = (delivery.message.seq, delivery.message.message_id.clone());
                    run.history().received(&name, seq, &id);
                    // Now and then one is left lying, and with it the visit ends: it comes again.
                    if random.random_bool(0.02) {
                        break;
                    }
                    run.history().applied(&name, seq, &id);
                    delivery.acker.ack().await.unwrap();
                    done += 1;
                }
                InboxEvent::Discontinuity(why) => panic!("{name}: {why}"),
            }
            if done >= EACH {
                break;
            }
        }
        // Going without a word leaves the edge to find out.
        drop(inbox);
        if done >= EACH || random.random_bool(0.5) {
            client.close().await;
        }
    }
}

/// Kills every process twice, in random order, one every few seconds, and starts each anew at once. Gives how often it
/// did.
async fn storm(run: &Run, cluster: &mut Cluster) -> usize {
    let mut nodes = cluster.nodes().repeat(2);
    nodes.shuffle(&mut run.random(u64::MAX >> 34));
    for (node, kill) in nodes.iter().copied().zip(1..) {
        sleep_until(run.begun + KILLS * kill).await;
        assert!(cluster.process(node).ended().is_none(), "{node} had ended by itself");
        cluster.kill(node);
        run.history().disturbed();
        cluster.restart(node).await;
        run.tell(&format!("{node} was killed and is back"));
    }
    nodes.len()
}

/// Checks that every message of a user is settled at the end. An ack may have got lost with its connection: its message
/// then comes again, and is known.
async fn settle(run: &Run, user: usize) {
    let (name, url) = (name(user), &run.urls[user % run.urls.len()]);
    eventually(&format!("everything of {name} is settled"), Duration::from_secs(60), async || {
        let mut peer = Peer::with_inbox(url, &name, 256).await;
        let inbox = peer.welcome["inbox"].clone();
        // An edge that could not read the inbox in time says so by leaving it out.
        let (mark, head) = (inbox["mark"].as_u64()?, inbox["head"].as_u64()?);
        assert_eq!(head, EACH as u64, "{name}: {inbox}");
        if mark == head {
            return Some(());
        }
        loop {
            let message = peer.event("inbox").await;
            let seq = message["seq"].as_u64().unwrap();
            run.history().received(&name, seq, message["message_id"].as_str().unwrap());
            peer.ack(seq, seq).await;
            if seq == head || peer.is_quiet().await {
                break;
            }
        }
        peer.bye().await;
        None
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_thousand_sends_while_users_hop_and_processes_die() {
    within(330, "20,000 sends to 200 users who hop, with a kill every 5 s", async {
        let seed = seed();
        let mut cluster = Cluster::builder().edges(2).routers(2).deliveries(2).redis().mongo().start().await;
        let (history, repeated, visits) = (Mutex::default(), AtomicUsize::new(0), AtomicUsize::new(0));
        let (urls, begun) = (cluster.urls(), Instant::now());
        let run = Arc::new(Run { urls, seed, begun, history, repeated, visits });
        let mut users = JoinSet::new();
        for user in 0..USERS {
            users.spawn(hopper(Arc::clone(&run), user));
        }
        let senders = start_senders(&run, &cluster.servers()).await;
        let killed = storm(&run, &mut cluster).await;
        let rest = async {
            senders.join_all().await;
            run.tell("everything is sent");
            users.join_all().await;
            run.tell("everything is applied");
        };
        if timeout(CALM, rest).await.is_err() {
            panic!("not finished {CALM:?} after the storm: {}", run.history().check());
        }
        join_all((0..USERS).map(|user| settle(&run, user))).await;
        run.tell("everything is settled");
        let report = run.history().check();
        let (repeated, visits) = (run.repeated.load(Ordering::Relaxed), run.visits.load(Ordering::Relaxed));
        println!("{report}, {repeated} repeated sends, {visits} visits, {killed} kills");
        report.assert_clean(SENDS);
        report.assert_disturbed(killed - 1);
        assert!(report.redelivered > 0 && visits > 2 * USERS, "nobody hopped: the run means nothing");
    })
    .await;
}
