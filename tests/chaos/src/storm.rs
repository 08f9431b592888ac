//! A row's course: a cluster under load while the row breaks it, then calm, then the check of everything.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::join_all;
use sanjay_client::{DeadLetter, DeadLetterFilter, protocol::limits::MAX_CREDIT};
use sanjay_testkit::{Cluster, ClusterBuilder, Node, Peer, Role, Wire, servers::MongoOptions};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use crate::{
    history::{Event, Report},
    rows::torn::Answered,
    run::{Faulty, Load, Phase, Run, bounded, name, number_of, until},
    senders::{self, SENDERS, Sender},
    users,
};

/// How long senders may take for their repeats once everything is repaired, users for what is left, and inboxes until
/// they are settled.
const REST: Duration = Duration::from_secs(90);

/// How long one thing may take that is under way already.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Users of a row.
const USERS: usize = 50;

/// Inboxes on a file or in a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    /// One delivery node.
    Redb,
    /// Two delivery nodes.
    Mongo,
}

/// How a row is run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context {
    pub(crate) seed: u64,
    pub(crate) short: bool,
    pub(crate) store: Store,
}

impl Context {
    /// One of two values, by the length of the run.
    pub(crate) fn pick<T>(&self, short: T, long: T) -> T {
        if self.short { short } else { long }
    }

    /// The usual load.
    pub(crate) fn load(&self) -> Load {
        Load {
            // Writes of one inbox by two nodes get into each other's way, so there are more.
            users: if self.short || self.store == Store::Redb { USERS } else { 8 * USERS },
            // A server for MongoDB's protocol on a small machine takes fewer.
            rate: match (self.short, self.store) {
                (true, Store::Redb) => 200,
                (true, Store::Mongo) => 60,
                (false, _) => 650,
            },
            storm: Duration::from_secs(self.pick(5, 60)),
            padding: 16,
            away: false,
            every: 1,
            faulty: Faulty::Never,
        }
    }

    /// Delivery nodes of a cluster on this store.
    pub(crate) fn deliveries(&self) -> usize {
        match self.store {
            Store::Redb => 1,
            Store::Mongo => 2,
        }
    }

    /// Two edges and a store; clients that are gone are found out soon.
    pub(crate) fn cluster(&self) -> ClusterBuilder {
        match self.store {
            Store::Redb => self.base(),
            Store::Mongo => self.base().deliveries(self.deliveries()).mongo_with(MongoOptions::default()),
        }
    }

    /// Likewise, without a store.
    pub(crate) fn base(&self) -> ClusterBuilder {
        Cluster::builder()
            .edges(2)
            .set("router.lease_ms", 2_000)
            .set("router.redis_timeout_ms", 600)
            .set("edge.heartbeat_ms", 3_000)
            .set("edge.heartbeat_grace_ms", 5_000)
    }
}

/// What came of a row.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) report: Report,
    /// Why it failed; empty when it passed.
    pub(crate) problems: Vec<String>,
    /// What else there is to say.
    pub(crate) notes: Vec<String>,
    /// Why it did not run, which neither passes nor fails.
    pub(crate) skipped: Option<&'static str>,
}

impl Outcome {
    pub(crate) fn skipped(why: &'static str) -> Self {
        Self { skipped: Some(why), ..Self::default() }
    }
}

/// What a row must have been for its result to mean something.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expect {
    /// Share of the load's messages that must have been accepted.
    pub(crate) accepted: f64,
    /// Faults that must have come while messages were accepted before and after.
    pub(crate) faults: usize,
}

/// A cluster under load.
pub(crate) struct Storm {
    pub(crate) cluster: Cluster,
    pub(crate) run: Arc<Run>,
    began: Instant,
    senders: JoinSet<()>,
    users: JoinSet<()>,
}

impl Storm {
    /// Starts back ends and users.
    pub(crate) async fn begin(context: &Context, cluster: Cluster, load: Load) -> anyhow::Result<Self> {
        let urls = cluster.urls();
        Self::begin_at(context, cluster, load, urls).await
    }

    /// Likewise, with other addresses for the users.
    pub(crate) async fn begin_at(
        context: &Context,
        cluster: Cluster,
        load: Load,
        urls: Vec<String>,
    ) -> anyhow::Result<Self> {
        let run = Run::new(load, context.seed, urls);
        let (mut senders, mut users) = (JoinSet::new(), JoinSet::new());
        for index in 0..SENDERS {
            let backend = senders::connect(&cluster.servers(), index).await?;
            senders.spawn(Sender::new(Arc::clone(&run), backend, index).run());
        }
        for user in 0..load.users {
            users.spawn(users::run(Arc::clone(&run), user));
        }
        Ok(Self { cluster, run, began: Instant::now(), senders, users })
    }

    /// Waits until a part of the storm is over, and until messages were accepted in it.
    pub(crate) async fn at(&self, part: f64) {
        let before = self.run.history().accepted();
        sleep_until(self.began + self.run.load.storm.mul_f64(part)).await;
        if !until(SOON, async || self.run.history().accepted() > before).await {
            self.run.complain(format!("nothing was accepted before {part:.2} of the storm"));
        }
    }

    /// Notes that something broke.
    pub(crate) fn fault(&self) {
        self.run.history().fault();
    }

    /// A metric of a node; 0 when it has none, or does not answer.
    pub(crate) async fn metric(&self, node: impl Into<Node>, name: &str) -> u64 {
        metric(&self.cluster, node, name).await
    }

    /// A metric of all nodes of a role, added up.
    pub(crate) async fn sum(&self, role: Role, name: &str) -> u64 {
        let mut sum = 0;
        for node in self.cluster.nodes().into_iter().filter(|node| node.role == role) {
            sum += self.metric(node, name).await;
        }
        sum
    }

    /// Waits for the end of the storm, once everything is repaired: senders have their answers then, and every message
    /// its effect. While less was accepted than `expect` says, the storm goes on for a while.
    pub(crate) async fn calm(&mut self, expect: Expect) {
        sleep_until(self.began + self.run.load.storm).await;
        // Whether it was enough is looked at in the end.
        let enough = self.enough(expect);
        until(SOON, async || self.run.history().accepted() >= enough).await;
        self.run.enter(Phase::Calm);
        let senders = std::mem::take(&mut self.senders);
        bounded(&self.run, REST, "back ends have their answers", join(&self.run, senders)).await;
        self.applied().await;
    }

    /// Waits until nothing is owed.
    pub(crate) async fn applied(&self) {
        if !until(REST, async || self.run.history().owed() == 0).await {
            let owed = self.run.history().owed();
            self.run.owed_at_end(self.run.history().owed_examples());
            self.run.complain(format!("{owed} messages had no effect {} s after the storm", REST.as_secs()));
        }
    }

    /// Settles and checks everything.
    pub(crate) async fn finish(mut self, expect: Expect) -> Outcome {
        if self.run.phase() == Phase::Storm {
            self.calm(expect).await;
        }
        self.run.enter(Phase::Over);
        let users = std::mem::take(&mut self.users);
        bounded(&self.run, REST, "users leave", join(&self.run, users)).await;
        let settling = join_all((0..self.run.load.users).map(|user| settle(&self.run, user)));
        bounded(&self.run, REST, "inboxes are settled", settling).await;
        self.record_dead().await;
        self.audit().await;
        self.conclude(expect)
    }

    fn enough(&self, expect: Expect) -> usize {
        let load = self.run.load;
        (f64::from(load.rate) * load.storm.as_secs_f64() * expect.accepted) as usize
    }

    fn conclude(self, expect: Expect) -> Outcome {
        let report = self.run.history().check();
        let mut problems = report.wrongs();
        let enough = self.enough(expect);
        if report.accepted < enough {
            problems.push(format!("accepted {} messages, of at least {enough}", report.accepted));
        }
        if report.faults < expect.faults.max(1) {
            problems.push(format!("{} faults landed, of {}", report.faults, expect.faults.max(1)));
        }
        problems.extend(self.run.complaints());
        let mut notes: Vec<String> =
            self.run.refusals().iter().map(|why| format!("senders were told: {why}")).collect();
        let mut examples = report.examples();
        examples.extend(self.run.owed_examples());
        for (user, at) in examples {
            let story = self.run.history().story(&user, at).join(", ");
            notes.push(format!("what happened to {user} {at}: {story}"));
        }
        Outcome { report, problems, notes, skipped: None }
    }

    /// Notes what is dead now.
    pub(crate) async fn record_dead(&self) {
        for letter in self.dead_letters(&DeadLetterFilter::default()).await {
            match self.number_of(&letter).await {
                Some((number, id)) => self.run.record(&letter.user, Event::Dead { number, id }),
                None => self.run.complain(format!("the letter {} cannot be read", letter.message_id)),
            }
        }
    }

    /// By user, what was answered so far.
    pub(crate) fn answered(&self) -> Answered {
        let history = self.run.history();
        (0..self.run.load.users).map(name).map(|user| (user.clone(), history.answered(&user))).collect()
    }

    /// The dead letters that match, the newest first.
    pub(crate) async fn dead_letters(&self, filter: &DeadLetterFilter) -> Vec<DeadLetter> {
        let (mut letters, mut page) = (Vec::new(), String::new());
        let Ok(api) = senders::connect(&self.cluster.servers(), 0).await else {
            self.run.complain("no delivery node answers at the end");
            return letters;
        };
        loop {
            match api.list_dead_letters(filter, 256, &page).await {
                Ok(response) => {
                    letters.extend(response.dead_letters);
                    page = response.next_page_token;
                }
                Err(error) => {
                    self.run.complain(format!("dead letters are not listed: {error}"));
                    page.clear();
                }
            }
            if page.is_empty() {
                return letters;
            }
        }
    }

    /// Number and id of the message that a letter was.
    pub(crate) async fn number_of(&self, letter: &DeadLetter) -> Option<(u64, String)> {
        let api = senders::connect(&self.cluster.servers(), 0).await.ok()?;
        let shown = api.get_dead_letter(&letter.user, &letter.message_id).await.ok()??;
        let payload: sanjay_client::protocol::Payload = shown.payload.into();
        let sanjay_client::protocol::Payload::Text(text) = payload else { return None };
        Some((number_of(&text), letter.message_id.clone()))
    }

    /// Has every inbox audited: by the nodes that run, which may not be done yet, and by nodes that just began.
    async fn audit(&mut self) {
        let deliveries: Vec<Node> =
            self.cluster.nodes().into_iter().filter(|node| node.role == Role::Delivery).collect();
        for &node in &deliveries {
            self.audited(node).await;
        }
        for &node in &deliveries {
            let status = self.cluster.process(node).terminate(SOON).await;
            if !status.success() {
                self.run.complain(format!("{node} ended with {status}"));
            }
            self.cluster.restart(node).await;
        }
        for &node in &deliveries {
            let inboxes = self.run.history().inboxes() as u64;
            let looked = until(SOON, async || self.metric(node, AUDITED).await >= inboxes).await;
            if !looked {
                self.run.complain(format!("{node} did not audit {inboxes} inboxes"));
            }
            self.audited(node).await;
        }
    }

    async fn audited(&self, node: Node) {
        let difference = self.metric(node, "sanjay_delivery_audit_difference_messages").await;
        if difference != 0 {
            self.run.complain(format!("the audit of {node} finds a difference of {difference} messages"));
        }
    }
}

const AUDITED: &str = "sanjay_delivery_audit_inboxes_total";

/// A metric of a node; 0 when it has none, or does not answer.
pub(crate) async fn metric(cluster: &Cluster, node: impl Into<Node>, name: &str) -> u64 {
    let url = format!("{}/metrics", cluster.admin(node));
    let page = timeout(Duration::from_secs(5), Wire::get(&url)).await.unwrap_or_default().body;
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|value| value.parse::<f64>().ok()).map_or(0, |value| value as u64)
}

async fn join(run: &Run, mut tasks: JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            run.complain(format!("a task of the test failed: {error}"));
        }
    }
}

/// Waits until every message of a user is settled. An ack may have got lost with its connection: its message then comes
/// again, and is known; one that had no answer may come now.
async fn settle(run: &Run, user: usize) {
    let (name, url) = (name(user), &run.urls[user % run.urls.len()]);
    let settled = until(REST, async || settle_once(run, &name, url).await.unwrap_or(false)).await;
    if !settled {
        run.complain(format!("the inbox of {name} was not settled"));
    }
}

/// Whether everything was settled.
async fn settle_once(run: &Run, name: &str, url: &str) -> Option<bool> {
    let token = sanjay_testkit::Token::of(name).sign();
    let hello = serde_json::json!({ "token": token, "credit": MAX_CREDIT });
    let mut peer = timeout(SOON, Peer::try_hello(url, hello)).await.ok()?.ok()?;
    let (mark, head) = (peer.welcome["inbox"]["mark"].as_u64()?, peer.welcome["inbox"]["head"].as_u64()?);
    if mark == head {
        peer.bye().await;
        return Some(true);
    }
    run.record(name, Event::Connected);
    // By id of the ack: its seq. None is waited for: behind slow ones, the deadlines of the others would pass.
    let mut acks = BTreeMap::new();
    loop {
        let patience = if acks.is_empty() { Duration::from_secs(2) } else { SOON };
        let mut envelope = timeout(patience, peer.next()).await.ok()?.ok()?;
        if let Some(seq) = envelope["id"].as_u64().and_then(|id| acks.remove(&id)) {
            if envelope["ok"].is_object() {
                run.record(name, Event::Acked { seq });
            }
            continue;
        }
        let message = envelope["inbox"].take();
        let Some(seq) = message["seq"].as_u64() else { continue };
        let number = message["payload"]["text"].as_str().map_or(0, number_of);
        let id = message["message_id"].as_str()?.to_owned();
        let delivery = u32::try_from(message["delivery"].as_u64()?).ok()?;
        run.record(name, Event::Delivered { number, seq, delivery, id });
        if !run.history().is_applied(name, number) {
            run.record(name, Event::Applied { number });
        }
        let ack = peer.start(serde_json::json!({ "ack": { "ranges": [[seq, seq]] } })).await;
        acks.insert(ack, seq);
    }
}
