//! Inboxes under stress: users connect, drop and acknowledge at random while sends go on, and the process dies.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use sanjay_client::{
    Accepted, Backend, BackendError, Client, InboxDelivery, InboxEvent, MemoryCheckpoint, UserResult,
    protocol::Payload,
};
use sanjay_testkit::{End, History, Peer, Standalone, Token, backend, client_options, seed, within};
use serde_json::{Value, json};
use tokio::{sync::watch, task::JoinSet};

const USERS: usize = 100;
const SENDS: usize = 10_000;
const SENDERS: usize = 4;
/// Requests of one sender that are under way.
const WINDOW: usize = 64;

/// What the tasks of a run share.
struct Run {
    url: String,
    /// Which user each send goes to.
    plan: Vec<usize>,
    seed: u64,
    history: Mutex<History>,
    accepted: watch::Sender<usize>,
    /// Sends that were accepted before, by an answer that got lost.
    repeated: AtomicUsize,
}

impl Run {
    fn new(server: &Standalone) -> Arc<Self> {
        let seed = seed();
        let mut random = StdRng::seed_from_u64(seed);
        let plan = (0..SENDS).map(|_| random.random_range(0..USERS)).collect();
        let (url, history) = (server.url().to_owned(), Mutex::default());
        let (accepted, repeated) = (watch::Sender::new(0), AtomicUsize::new(0));
        Arc::new(Self { url, plan, seed, history, accepted, repeated })
    }

    fn expected(&self, user: usize) -> usize {
        self.plan.iter().filter(|&&of| of == user).count()
    }

    fn history(&self) -> std::sync::MutexGuard<'_, History> {
        self.history.lock().unwrap()
    }

    fn note_accepted(&self, n: usize, accepted: &Accepted) {
        self.history().accepted(&name(self.plan[n]), accepted.seq, &accepted.message_id);
        self.accepted.send_modify(|count| *count += 1);
        self.repeated.fetch_add(usize::from(accepted.duplicate), Ordering::Relaxed);
    }

    /// Waits until so many sends were accepted.
    async fn progress(&self, count: usize) {
        self.accepted.subscribe().wait_for(|accepted| *accepted >= count.min(SENDS)).await.unwrap();
    }
}

fn name(user: usize) -> String {
    format!("user-{user}")
}

/// The n-th message's payload and dedupe key.
fn message(n: usize) -> (Payload, String) {
    (Payload::Text(format!("message {n}")), format!("key {n}"))
}

fn only(mut results: Vec<UserResult>) -> Result<Accepted, BackendError> {
    assert_eq!(results.len(), 1);
    results.remove(0).result.map_err(BackendError::Refused)
}

/// Sends one message until it is accepted.
async fn send_one(run: &Run, backend: &Backend, n: usize) {
    let (payload, key) = message(n);
    loop {
        let sent = backend.send(&[&name(run.plan[n])], payload.clone(), &key).await;
        match sent.and_then(only) {
            Ok(accepted) => return run.note_accepted(n, &accepted),
            Err(BackendError::Refused(error)) if !error.retryable => panic!("message {n}: {error:?}"),
            // The client has waited between its own attempts already.
            Err(_) => {}
        }
    }
}

/// Sends by single calls, a window of them at once.
async fn send_by_calls(run: Arc<Run>, backend: Backend, messages: Vec<usize>) {
    use futures::StreamExt;
    let calls = futures::stream::iter(messages).map(|n| send_one(&run, &backend, n));
    calls.buffer_unordered(WINDOW).collect::<Vec<()>>().await;
}

/// Sends over streams: a new one after each that broke.
async fn send_by_stream(run: Arc<Run>, backend: Backend, messages: Vec<usize>) {
    let mut left: VecDeque<usize> = messages.into();
    while !left.is_empty() {
        let mut stream = backend.send_stream();
        let (mut pending, mut again, mut broken) = (VecDeque::new(), Vec::new(), false);
        loop {
            while !broken
                && pending.len() < WINDOW
                && let Some(n) = left.pop_front()
            {
                let (payload, key) = message(n);
                match stream.send(&[&name(run.plan[n])], payload, &key).await {
                    Ok(reply) => pending.push_back((n, reply)),
                    Err(_) => (broken = true, again.push(n)).0,
                }
            }
            let Some((n, reply)) = pending.pop_front() else { break };
            match reply.wait().await.and_then(only) {
                Ok(accepted) => run.note_accepted(n, &accepted),
                Err(BackendError::Refused(error)) if !error.retryable => panic!("message {n}: {error:?}"),
                Err(_) => (broken = true, again.push(n)).0,
            }
        }
        // A single call waits for the server to come back.
        if let Some(n) = again.pop() {
            send_one(&run, &backend, n).await;
        }
        left.extend(again);
    }
}

async fn send_all(run: &Arc<Run>, server: &str) -> JoinSet<()> {
    let mut senders = JoinSet::new();
    for sender in 0..SENDERS {
        let messages: Vec<usize> = (0..SENDS).filter(|n| n % SENDERS == sender).collect();
        let (run, backend) = (Arc::clone(run), backend(server).await);
        if sender % 2 == 0 {
            senders.spawn(send_by_calls(run, backend, messages));
        } else {
            senders.spawn(send_by_stream(run, backend, messages));
        }
    }
    senders
}

/// What a user does at random.
struct Whims {
    random: StdRng,
    expected: usize,
}

impl Whims {
    fn new(run: &Run, user: usize) -> Self {
        Self {
            random: StdRng::seed_from_u64(run.seed ^ (user as u64 + 1) << 32),
            expected: run.expected(user),
        }
    }

    /// Stays away until some more messages of all users were accepted.
    async fn stay_away(&mut self, run: &Run) {
        let now = *run.accepted.borrow();
        run.progress(now + self.random.random_range(0..SENDS / 12)).await;
    }

    fn credit(&mut self) -> u32 {
        [1, 4, 64, 256][self.random.random_range(0..4)]
    }

    /// How many messages the next connection takes.
    fn visit(&mut self) -> usize {
        self.random.random_range(1..=self.expected / 3 + 1)
    }

    /// How many of `held` messages are processed now.
    fn process(&mut self, held: usize, credit: u32, done: usize) -> usize {
        if held as u32 >= credit || done + held >= self.expected {
            return held;
        }
        if self.random.random_bool(0.5) { self.random.random_range(0..=held) } else { 0 }
    }
}

/// A user of the Rust client, whose checkpoint outlives its connections.
async fn sdk_user(run: Arc<Run>, user: usize) {
    let (name, mut whims) = (name(user), Whims::new(&run, user));
    let checkpoint = Arc::new(MemoryCheckpoint::default());
    let mut done = 0;
    while done < whims.expected {
        whims.stay_away(&run).await;
        let mut options = client_options(&run.url, &name, run.seed ^ user as u64);
        let credit = whims.credit();
        options.credit = Some(credit);
        options.checkpoint = Arc::clone(&checkpoint) as _;
        let client = Client::connect(options).await.unwrap();
        let mut inbox = client.inbox().unwrap();
        let (visit, mut held) = (whims.visit(), Vec::<InboxDelivery>::new());
        for _ in 0..visit {
            if done >= whims.expected {
                break;
            }
            match inbox.next().await.expect("the client lasts") {
                InboxEvent::Message(delivery) => {
                    run.history().received(&name, delivery.message.seq, &delivery.message.message_id);
                    held.push(delivery);
                }
                InboxEvent::Discontinuity(why) => panic!("{name}: {why}"),
            }
            for _ in 0..whims.process(held.len(), credit, done) {
                let delivery = held.swap_remove(whims.random.random_range(0..held.len()));
                run.history().applied(&name, delivery.message.seq, &delivery.message.message_id);
                delivery.acker.ack().await.unwrap();
                done += 1;
            }
        }
        // What is held comes again.
        drop((held, inbox));
        if done >= whims.expected || whims.random.random_bool(0.5) {
            client.close().await;
        }
    }
}

/// A user of a bare socket, who keeps no more than the set of what it has processed.
async fn raw_user(run: Arc<Run>, user: usize) {
    let (name, mut whims) = (name(user), Whims::new(&run, user));
    let mut processed = BTreeSet::new();
    while processed.len() < whims.expected {
        whims.stay_away(&run).await;
        let (credit, visit) = (whims.credit(), whims.visit());
        let hello = json!({ "token": Token::of(&name).sign(), "credit": credit, "device": "phone" });
        let Ok(mut peer) = Peer::try_hello(&run.url, hello).await else { continue };
        // A kill ends the visit, like a lost network.
        let _ = raw_visit(&run, &name, &mut peer, &mut whims, &mut processed, (credit, visit)).await;
    }
}

async fn raw_visit(
    run: &Run,
    name: &str,
    peer: &mut Peer,
    whims: &mut Whims,
    processed: &mut BTreeSet<u64>,
    (credit, visit): (u32, usize),
) -> Result<(), End> {
    let mut held: Vec<(u64, String)> = Vec::new();
    for _ in 0..visit {
        if processed.len() >= whims.expected {
            return Ok(());
        }
        let event = loop {
            let mut envelope = peer.next().await?;
            if envelope["inbox"].is_object() {
                break envelope["inbox"].take();
            }
        };
        let (seq, id) = (event["seq"].as_u64().unwrap(), event["message_id"].as_str().unwrap().to_owned());
        run.history().received(name, seq, &id);
        if processed.contains(&seq) {
            peer.send(&json!({ "ack": { "ranges": [[seq, seq]] } })).await;
        } else if held.iter().all(|(other, _)| *other != seq) {
            held.push((seq, id));
        }
        for _ in 0..whims.process(held.len(), credit, processed.len()) {
            let (seq, id) = held.swap_remove(whims.random.random_range(0..held.len()));
            run.history().applied(name, seq, &id);
            processed.insert(seq);
            // Dropping the socket right after loses some of these on the way.
            peer.send(&json!({ "ack": { "ranges": [[seq, seq]] } })).await;
        }
    }
    Ok(())
}

fn start_users(run: &Arc<Run>) -> JoinSet<()> {
    let mut users = JoinSet::new();
    for user in 0..USERS {
        if user % 2 == 0 {
            users.spawn(sdk_user(Arc::clone(run), user));
        } else {
            users.spawn(raw_user(Arc::clone(run), user));
        }
    }
    users
}

/// Acknowledges what comes again since its ack was lost, until nothing is left; then the inbox is empty for good.
async fn settle(run: &Run, user: usize) {
    let name = name(user);
    let mut peer = Peer::with_inbox(&run.url, &name, 256).await;
    let inbox = peer.welcome["inbox"].clone();
    let (mark, head) = (inbox["mark"].as_u64().unwrap(), inbox["head"].as_u64().unwrap());
    assert_eq!(head, run.expected(user) as u64, "{name}: {inbox}");
    if mark < head {
        while let Some(event) = again(&mut peer).await {
            let (seq, id) =
                (event["seq"].as_u64().unwrap(), event["message_id"].as_str().unwrap().to_owned());
            run.history().received(&name, seq, &id);
            peer.ack(seq, seq).await;
        }
        peer.bye().await;
        peer = Peer::with_inbox(&run.url, &name, 256).await;
        assert_eq!(peer.welcome["inbox"]["mark"], head, "{name}");
    }
    assert!(peer.is_quiet().await, "{name} got something after everything was settled");
}

/// The next inbox message, if there is one by the time that a ping is answered.
async fn again(peer: &mut Peer) -> Option<Value> {
    if peer.is_quiet().await { None } else { Some(peer.event("inbox").await) }
}

async fn finish(run: &Run, senders: JoinSet<()>, users: JoinSet<()>) {
    senders.join_all().await;
    users.join_all().await;
    for user in 0..USERS {
        settle(run, user).await;
    }
    let report = run.history().check();
    println!("{report}, {} repeated sends", run.repeated.load(Ordering::Relaxed));
    report.assert_clean(SENDS);
    assert!(report.redelivered > 0, "nobody dropped anything: the run means nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_sends_to_users_who_come_and_go() {
    within(60, "10,000 sends to 100 users", async {
        let server = Standalone::start().await;
        let run = Run::new(&server);
        let users = start_users(&run);
        let senders = send_all(&run, server.server()).await;
        finish(&run, senders, users).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_sends_while_the_process_is_killed_five_times() {
    within(60, "10,000 sends, five kills", async {
        let mut server = Standalone::start().await;
        let run = Run::new(&server);
        let users = start_users(&run);
        let senders = send_all(&run, server.server()).await;
        for kill in 1..=5 {
            run.progress(kill * SENDS / 6).await;
            server.restart().await;
        }
        finish(&run, senders, users).await;
    })
    .await;
}
