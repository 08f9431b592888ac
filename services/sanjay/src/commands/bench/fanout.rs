//! `sanjay bench fanout`: publishes to channels at a rate, and counts and times what each subscriber gets.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use sanjay_client::{
    Backend, BackendError, ConnectionError, PendingReply, PublishStream, RawConnection,
    protocol::{CloseCode, Event, event::Published},
};
use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::timeout_at,
};

use super::{
    LoadArgs,
    edge::{Edge, pong, stopped},
    latency::{Latency, Recorder},
    pace::{Pacer, Schedule},
    parse_rate, parse_size,
    problems::{Problem, Problems},
    progress,
    report::{self, Backlog, Rate, Report, per_second},
    sockets,
    stamp::Stamp,
    tally::Tally,
    target::{ServerArgs, TargetArgs},
};
use crate::signals::interrupted;

/// Subscribers that connect at once.
const OPENING: usize = 64;

/// Publishes whose answers are waited for; as many as a stream of the client takes.
const ANSWERS: usize = 1_024;

/// After the last publish, deliveries are waited for until none came for so long.
const QUIET: Duration = Duration::from_secs(5);

/// How much later than its schedule the last publish may go out.
const GRACE: Duration = Duration::from_millis(100);

/// Publish to channels at a rate; count and time what each subscriber gets
///
/// A latency begins when the message was due and ends when a subscriber has read it, for each subscriber. The run
/// counts only when every subscriber got every message of its channel. Messages of the warm-up are counted too, but
/// not in the latencies.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How many connections, each subscribed to one channel
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    subscribers: u64,
    /// How many channels they are spread over
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    channels: u64,
    /// Publishes each second, over all channels
    #[arg(long, value_name = "PER_SECOND", default_value = "100", value_parser = parse_rate)]
    rate: f64,
    /// Bytes of a payload
    #[arg(long, value_name = "BYTES", default_value = "128", value_parser = parse_size)]
    size: usize,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    target: TargetArgs,
    #[command(flatten)]
    server: ServerArgs,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct FannedOut {
    bench: &'static str,
    interrupted: bool,
    complete: bool,
    sustained: bool,
    subscribers: u64,
    channels: u64,
    size_bytes: usize,
    measured_s: f64,
    published: u64,
    failed: u64,
    unknown: u64,
    expected: u64,
    delivered: u64,
    lost: u64,
    repeated: u64,
    gaps: u64,
    disconnected: u64,
    rate: Rate,
    backlog: Backlog,
    latency_us: Latency,
    publish_us: Latency,
    late_us: Latency,
    problems: Vec<Problem>,
}

/// What the tasks of a run share.
struct Shared {
    edge: Edge,
    /// The zero of the stamps.
    start: Instant,
    delivered: Tally,
    repeated: AtomicU64,
    gaps: AtomicU64,
    disconnected: AtomicU64,
    latency: Recorder,
    publish: Recorder,
    late: Recorder,
    problems: Problems,
}

/// What became of the publishes.
#[derive(Debug, Default)]
struct Answers {
    /// Of each channel.
    published: Vec<u64>,
    failed: u64,
    unknown: u64,
}

/// What was sent.
#[derive(Debug, Default)]
struct Sent {
    count: u64,
    measured: u64,
    backlog: Backlog,
    failed: u64,
}

impl Args {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.channels <= self.subscribers,
            "{} channels need as many subscribers, and there are {}",
            self.channels,
            self.subscribers
        );
        sockets::make_room(self.subscribers)?;
        let length = self.load.warm_up + self.load.duration;
        Schedule::new(Instant::now(), self.rate, length)?;
        let edge = self.target.edge().await?;
        let backend = self.target.backend(&self.server, &edge).await?;
        let shared = Arc::new(Shared::new(edge));
        let (end, stop) = watch::channel(false);
        let mut readers = JoinSet::new();
        self.subscribe(&shared, &stop, &mut readers).await?;

        let schedule = Schedule::new(Instant::now(), self.rate, length)?;
        let (to_answers, answers) = mpsc::channel(ANSWERS);
        let answered = tokio::spawn(collect(answers, self.channels, Arc::clone(&shared)));
        let mut sent = Sent::default();
        let mut broken = false;
        let work = async {
            let until = schedule.at(schedule.total()) + GRACE;
            let publishing = self.publish(schedule, &backend, &shared, to_answers, &mut sent);
            tokio::select! {
                done = timeout_at(until.into(), publishing) => done.unwrap_or(Ok(())),
                () = interrupted() => {
                    broken = true;
                    Ok(())
                }
            }
        };
        let (start, total) = (Instant::now(), length.as_secs());
        progress::show("publishing", total, || start.elapsed().as_secs(), work).await?;
        let measured_s =
            (schedule.start().elapsed().saturating_sub(self.load.warm_up)).min(self.load.duration);
        if !broken {
            sent.backlog.unsent = schedule.total() - sent.count;
        }
        let answers = answered.await?;
        let expected = self.expected(&answers);
        sent.backlog.undelivered = expected.saturating_sub(shared.delivered.count());
        let drain = shared.delivered.expect(expected, QUIET);
        let drain = async {
            tokio::select! {
                () = drain => {}
                () = interrupted() => broken = true,
            }
        };
        progress::show("receiving", expected, || shared.delivered.count(), drain).await;
        end.send_replace(true);
        while readers.join_next().await.is_some() {}
        self.load.conclude(&self.report(&shared, &sent, &answers, measured_s.as_secs_f64(), broken))
    }

    /// Connects every subscriber and has it read.
    async fn subscribe(
        &self,
        shared: &Arc<Shared>,
        stop: &watch::Receiver<bool>,
        readers: &mut JoinSet<()>,
    ) -> anyhow::Result<()> {
        let edge = &shared.edge;
        let open = |n: u64| async move {
            let mut connection = edge.open(&edge.name("user", n), Some(0)).await?.connection;
            edge.subscribe(&mut connection, &edge.name("channel", n % self.channels)).await?;
            anyhow::Ok((n, connection))
        };
        let opened = AtomicU64::new(0);
        let all = async {
            let mut connections = stream::iter(0..self.subscribers).map(open).buffer_unordered(OPENING);
            while let Some((n, connection)) = connections.try_next().await? {
                opened.fetch_add(1, Ordering::Relaxed);
                let (shared, stop) = (Arc::clone(shared), stop.clone());
                readers.spawn(async move { shared.receive(n as usize, connection, stop).await });
            }
            anyhow::Ok(())
        };
        let all = async {
            tokio::select! {
                all = all => all,
                () = interrupted() => anyhow::bail!("interrupted before anything was measured"),
            }
        };
        progress::show("connecting", self.subscribers, || opened.load(Ordering::Relaxed), all).await
    }

    /// Publishes each message when it is due. May be dropped at any time: `sent` says how far it came.
    async fn publish(
        &self,
        schedule: Schedule,
        backend: &Backend,
        shared: &Shared,
        answers: mpsc::Sender<(u64, Instant, bool, PendingReply<Published>)>,
        sent: &mut Sent,
    ) -> anyhow::Result<()> {
        let channels: Vec<String> = (0..self.channels).map(|n| shared.edge.name("channel", n)).collect();
        let measured_from = schedule.start() + self.load.warm_up;
        let mut pacer = Pacer::start(schedule)?;
        let mut stream: PublishStream = backend.publish_stream();
        while pacer.beyond(sent.count).await.is_some() {
            while sent.count < pacer.due() {
                sent.backlog.max_unsent = sent.backlog.max_unsent.max(pacer.due() - sent.count);
                let (index, due) = (sent.count, schedule.at(sent.count));
                // By when it is sent: a rate that cannot be kept is measured too.
                let measured = Instant::now() >= measured_from;
                let stamp = Stamp { index, due: due - shared.start, measured };
                let payload = stamp.payload(&shared.edge.run, self.size);
                let channel = index % self.channels;
                // Room for the answer first: nothing waits between a publish and its note.
                let Ok(place) = answers.reserve().await else { return Ok(()) };
                let reply = stream.publish(&channels[channel as usize], payload, "").await;
                sent.count += 1;
                sent.measured += u64::from(measured);
                shared.late.record(0, due.elapsed());
                match reply {
                    Ok(reply) => place.send((channel, due, measured, reply)),
                    Err(error) => {
                        sent.failed += 1;
                        shared.problems.note(error);
                        stream = backend.publish_stream();
                    }
                }
            }
        }
        Ok(())
    }

    fn expected(&self, answers: &Answers) -> u64 {
        let subscribers = |channel: u64| (self.subscribers - channel).div_ceil(self.channels);
        answers.published.iter().zip(0..).map(|(published, channel)| published * subscribers(channel)).sum()
    }

    fn report(
        &self,
        shared: &Shared,
        sent: &Sent,
        answers: &Answers,
        measured_s: f64,
        broken: bool,
    ) -> FannedOut {
        let (expected, delivered) = (self.expected(answers), shared.delivered.count());
        let failed = sent.failed + answers.failed;
        let lost = expected.saturating_sub(delivered);
        let disconnected = shared.disconnected.load(Ordering::Relaxed);
        FannedOut {
            bench: "fanout",
            interrupted: broken,
            complete: lost + failed + answers.unknown + disconnected == 0,
            sustained: sent.backlog.is_sustained(expected),
            subscribers: self.subscribers,
            channels: self.channels,
            size_bytes: self.size,
            measured_s,
            published: answers.published.iter().sum(),
            failed,
            unknown: answers.unknown,
            expected,
            delivered,
            lost,
            repeated: shared.repeated.load(Ordering::Relaxed),
            gaps: shared.gaps.load(Ordering::Relaxed),
            disconnected,
            rate: Rate { asked: Some(self.rate), reached: per_second(sent.measured, measured_s) },
            backlog: sent.backlog,
            latency_us: shared.latency.summary(),
            publish_us: shared.publish.summary(),
            late_us: shared.late.summary(),
            problems: shared.problems.list(),
        }
    }
}

/// Waits for the answers of publishes, in their order.
async fn collect(
    mut answers: mpsc::Receiver<(u64, Instant, bool, PendingReply<Published>)>,
    channels: u64,
    shared: Arc<Shared>,
) -> Answers {
    let mut all = Answers { published: vec![0; channels as usize], ..Answers::default() };
    while let Some((channel, due, measured, reply)) = answers.recv().await {
        let error = match reply.wait().await {
            Ok(_) => {
                all.published[channel as usize] += 1;
                if measured {
                    shared.publish.record(0, due.elapsed());
                }
                continue;
            }
            Err(error) => error,
        };
        match error {
            BackendError::Timeout(_) | BackendError::Broken(_) => all.unknown += 1,
            _ => all.failed += 1,
        }
        shared.problems.note(error);
    }
    all
}

impl Shared {
    fn new(edge: Edge) -> Self {
        Self {
            edge,
            start: Instant::now(),
            delivered: Tally::new(),
            repeated: AtomicU64::new(0),
            gaps: AtomicU64::new(0),
            disconnected: AtomicU64::new(0),
            latency: Recorder::new(),
            publish: Recorder::new(),
            late: Recorder::new(),
            problems: Problems::default(),
        }
    }

    /// Reads what subscriber `n` gets until `stop`.
    async fn receive(&self, n: usize, mut connection: RawConnection, mut stop: watch::Receiver<bool>) {
        tokio::select! {
            error = self.read(n, &mut connection) => {
                self.disconnected.fetch_add(1, Ordering::Relaxed);
                self.problems.note(error);
            }
            () = stopped(&mut stop) => connection.close(CloseCode::Done).await,
        }
    }

    async fn read(&self, n: usize, connection: &mut RawConnection) -> ConnectionError {
        // Messages of a channel are published in order, so one number tells what is new.
        let mut next = 0;
        loop {
            let envelope = match connection.next().await {
                Ok(envelope) => envelope,
                Err(error) => return error,
            };
            match envelope.event {
                Event::Message(message) => {
                    let Some(stamp) = Stamp::read(&message.payload, &self.edge.run) else { continue };
                    if stamp.index < next {
                        self.repeated.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    next = stamp.index + 1;
                    if stamp.measured {
                        self.latency.record(n, (self.start + stamp.due).elapsed());
                    }
                    self.delivered.add();
                }
                Event::Ping => {
                    if let Err(error) = pong(connection).await {
                        return error;
                    }
                }
                Event::Gap(_) => {
                    self.gaps.fetch_add(1, Ordering::Relaxed);
                }
                Event::Degraded(degraded) if !degraded.features.is_empty() => {
                    self.problems.note(format!("degraded: {}", degraded.features.join(", ")));
                }
                _ => {}
            }
        }
    }
}

impl Report for FannedOut {
    fn lines(&self) -> Vec<String> {
        let Self { subscribers, channels, published, expected, delivered, lost, repeated, gaps, .. } = self;
        let mut lines = vec![
            format!(
                "fanout     {subscribers} subscribers of {channels} channels, {} bytes, {:.1} s measured",
                self.size_bytes, self.measured_s
            ),
            format!("rate       {}, {}", self.rate, self.backlog),
            format!("published  {published}, {} failed, {} of unknown outcome", self.failed, self.unknown),
            format!(
                "delivered  {delivered} of {expected}, {lost} lost, {repeated} repeated, {gaps} gaps told"
            ),
            format!("latency    {} (due to received)", self.latency_us),
            format!("publish    {} (due to answered)", self.publish_us),
            format!("late       {} (due to sent, by this process)", self.late_us),
        ];
        report::conclude(self.sustained, &self.problems, &mut lines);
        lines
    }

    fn verdict(&self) -> anyhow::Result<()> {
        let Self { lost, expected, failed, unknown, disconnected, .. } = self;
        anyhow::ensure!(*lost == 0, "{lost} of {expected} deliveries were lost; the run does not count");
        anyhow::ensure!(
            self.complete,
            "{failed} publishes failed, {unknown} have an unknown outcome, {disconnected} subscribers were \
             disconnected; the run does not count"
        );
        Ok(())
    }
}
