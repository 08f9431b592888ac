//! Users who come and go during the storm and stay when it is calm: half of them with the Rust client and its
//! checkpoint, half on a bare socket with a set of what they have processed.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use rand::{Rng, rngs::StdRng};
use sanjay_client::{Client, InboxDelivery, InboxEvent, InboxStream, MemoryCheckpoint, protocol::Payload};
use sanjay_testkit::{Peer, Token, client_options};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use crate::{
    history::Event,
    run::{Phase, Run, name, number_of},
};

/// How long a connect may take, and a connection be silent before a bare socket is given up.
const PATIENCE: Duration = Duration::from_secs(3);

/// How often a user looks at where the row is.
const LOOK: Duration = Duration::from_millis(100);

/// Runs a user until the row is over.
pub(crate) async fn run(run: Arc<Run>, user: usize) {
    if run.load.away {
        run.reached(Phase::Calm).await;
    }
    if user.is_multiple_of(2) { with_client(run, user).await } else { with_socket(run, user).await }
}

/// When a visit ends; `None` while it is calm.
struct Visit(Instant);

impl Visit {
    fn begin(random: &mut StdRng) -> Self {
        Self(Instant::now() + Duration::from_millis(random.random_range(300..5_000)))
    }

    fn is_over(&self, run: &Run) -> bool {
        match run.phase() {
            Phase::Storm => Instant::now() >= self.0,
            Phase::Calm => false,
            Phase::Over => true,
        }
    }
}

/// Stays away for a moment, which ends with the storm.
async fn stay_away(run: &Run, random: &mut StdRng) {
    let moment = Duration::from_millis(random.random_range(0..800));
    let _ = timeout(moment, run.reached(Phase::Calm)).await;
}

async fn with_client(run: Arc<Run>, user: usize) {
    let (name, mut random) = (name(user), run.random(user as u64));
    let checkpoint = Arc::new(MemoryCheckpoint::default());
    while run.phase() < Phase::Over {
        stay_away(&run, &mut random).await;
        let url = &run.urls[random.random_range(0..run.urls.len())];
        let mut options = client_options(url, &name, random.random());
        options.credit = Some([4, 64, 256][random.random_range(0..3)]);
        options.silence_grace = PATIENCE;
        options.checkpoint = Arc::clone(&checkpoint) as _;
        let client = match Client::connect(options).await {
            Ok(client) => client,
            Err(error) => return run.complain(format!("{name} does not start: {error}")),
        };
        let Some(mut inbox) = client.inbox() else { return };
        run.record(&name, Event::Connected);
        let all = visit(&run, &name, &mut inbox, &mut random).await;
        // Going without a word leaves the edge to find out.
        drop(inbox);
        if all && random.random_bool(0.5) {
            // What it acknowledges now may wait for a server that is away.
            let _ = timeout(PATIENCE, client.close()).await;
        }
    }
}

/// Whether everything that came was processed.
async fn visit(run: &Run, name: &str, inbox: &mut InboxStream, random: &mut StdRng) -> bool {
    let visit = Visit::begin(random);
    while !visit.is_over(run) {
        let delivery = match timeout(LOOK, inbox.next()).await {
            Err(_) => continue,
            Ok(Some(InboxEvent::Message(delivery))) => delivery,
            Ok(Some(InboxEvent::Discontinuity(why))) => {
                run.complain(format!("{name} was told of another inbox: {why}"));
                continue;
            }
            Ok(None) => {
                run.complain(format!("{name}'s client has ended"));
                return false;
            }
        };
        // Now and then one is left lying, and with it the visit ends: it comes again.
        if run.phase() == Phase::Storm && random.random_bool(0.01) {
            delivered(run, name, &delivery);
            return false;
        }
        process(run, name, delivery).await;
    }
    true
}

fn delivered(run: &Run, name: &str, delivery: &InboxDelivery) -> u64 {
    let message = &delivery.message;
    let number = match &message.payload {
        Payload::Text(text) => number_of(text),
        _ => 0,
    };
    let (seq, id) = (message.seq, message.message_id.clone());
    run.record(name, Event::Delivered { number, seq, delivery: message.delivery, id });
    number
}

async fn process(run: &Run, name: &str, delivery: InboxDelivery) {
    let number = delivered(run, name, &delivery);
    let seq = delivery.message.seq;
    let done = if run.gives_back(number, delivery.message.delivery.into()) {
        run.record(name, Event::Failed { seq });
        delivery.acker.nak(Duration::ZERO, "faulty").await
    } else {
        run.record(name, Event::Applied { number });
        delivery.acker.ack().await
    };
    if let Err(error) = done {
        run.complain(format!("{name} could not answer seq {seq}: {error}"));
    }
}

/// A user on a bare socket.
struct Bare<'a> {
    run: &'a Run,
    name: String,
    /// Seqs with an effect.
    processed: BTreeSet<u64>,
}

async fn with_socket(run: Arc<Run>, user: usize) {
    let mut random = run.random(user as u64);
    let mut bare = Bare { run: &run, name: name(user), processed: BTreeSet::new() };
    while run.phase() < Phase::Over {
        stay_away(&run, &mut random).await;
        let url = &run.urls[random.random_range(0..run.urls.len())];
        let credit = [4, 64, 256][random.random_range(0..3)];
        let hello = json!({ "token": Token::of(&bare.name).sign(), "credit": credit });
        let Ok(Ok(peer)) = timeout(PATIENCE, Peer::try_hello(url, hello)).await else {
            sleep(LOOK).await;
            continue;
        };
        run.record(&bare.name, Event::Connected);
        bare.visit(peer, &mut random).await;
    }
}

impl Bare<'_> {
    /// Ends with the visit, or with the connection.
    async fn visit(&mut self, mut peer: Peer, random: &mut StdRng) {
        let visit = Visit::begin(random);
        // By id of the ack: its seq.
        let mut acks = BTreeMap::new();
        let mut heard = Instant::now();
        while !visit.is_over(self.run) {
            let envelope = match timeout(LOOK, peer.next()).await {
                Ok(Ok(envelope)) => envelope,
                Ok(Err(_)) => return,
                Err(_) if heard.elapsed() < PATIENCE => continue,
                Err(_) => {
                    // Nothing to do, or nobody there.
                    let ping = async {
                        let id = peer.start(json!({})).await;
                        peer.answer(id).await
                    };
                    match timeout(PATIENCE, ping).await {
                        Ok(Ok(_)) => heard = Instant::now(),
                        _ => return,
                    }
                    continue;
                }
            };
            heard = Instant::now();
            if let Some(seq) = envelope["id"].as_u64().and_then(|id| acks.remove(&id)) {
                if envelope["ok"].is_object() {
                    self.run.record(&self.name, Event::Acked { seq });
                }
            } else if envelope["inbox"].is_object() {
                // Dropping the socket right after loses some acks on the way.
                if self.run.phase() == Phase::Storm && random.random_bool(0.01) {
                    self.delivered(&envelope["inbox"]);
                    return;
                }
                self.process(&mut peer, &envelope["inbox"], &mut acks).await;
            }
        }
        if random.random_bool(0.5) {
            let _ = timeout(PATIENCE, peer.bye()).await;
        }
    }

    /// Number, seq and attempt of a message that came.
    fn delivered(&self, message: &Value) -> (u64, u64, u64) {
        let number = message["payload"]["text"].as_str().map_or(0, number_of);
        let [seq, delivery] = ["seq", "delivery"].map(|field| message[field].as_u64().unwrap_or(0));
        let id = message["message_id"].as_str().unwrap_or_default().to_owned();
        let attempt = u32::try_from(delivery).unwrap_or(u32::MAX);
        self.run.record(&self.name, Event::Delivered { number, seq, delivery: attempt, id });
        (number, seq, delivery)
    }

    async fn process(&mut self, peer: &mut Peer, message: &Value, acks: &mut BTreeMap<u64, u64>) {
        let (number, seq, delivery) = self.delivered(message);
        if self.run.gives_back(number, delivery) {
            self.run.record(&self.name, Event::Failed { seq });
            peer.start(json!({ "nak": { "seq": seq, "delivery": delivery, "reason": "faulty" } })).await;
            return;
        }
        if self.processed.insert(seq) {
            self.run.record(&self.name, Event::Applied { number });
        }
        let id = peer.start(json!({ "ack": { "ranges": [[seq, seq]] } })).await;
        acks.insert(id, seq);
    }
}
