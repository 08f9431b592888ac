//! `sanjay bench inbox`: sends to users whose clients acknowledge, and times the durable answer and the delivery.

mod clients;
mod senders;

use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sanjay_client::Backend;
use serde::Serialize;
use tokio::{sync::watch, task::JoinSet};

use super::{
    LoadArgs,
    edge::Edge,
    latency::{Latency, Recorder},
    pace::Schedule,
    parse_rate, parse_size,
    problems::{Problem, Problems},
    progress,
    report::{self, Backlog, Rate, Report, per_second},
    sockets,
    tally::Tally,
    target::{ServerArgs, TargetArgs},
};
use crate::signals::interrupted;

/// After the last send, messages are waited for until none came for so long: longer than an edge waits before it
/// reads an inbox again, and than the first redelivery takes.
const QUIET: Duration = Duration::from_secs(10);

/// Send to users whose clients acknowledge; time the durable answer and the delivery
///
/// With --rate sends are due at fixed times, and both latencies begin then. Without it, --concurrency senders each
/// wait for their answer before the next send, so that a slow server also gets less load. The run counts only when
/// every accepted message was received. Messages of the warm-up are counted too, but not in the latencies.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How many users, each with one client
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    users: u64,
    /// Sends each second, over all users
    #[arg(long, value_name = "PER_SECOND", value_parser = parse_rate, conflicts_with = "concurrency")]
    rate: Option<f64>,
    /// Senders of the closed loop
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=1_024))]
    concurrency: u64,
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
struct Sent {
    bench: &'static str,
    interrupted: bool,
    complete: bool,
    sustained: bool,
    users: u64,
    concurrency: Option<u64>,
    size_bytes: usize,
    measured_s: f64,
    accepted: u64,
    failed: u64,
    unknown: u64,
    received: u64,
    lost: u64,
    repeated: u64,
    out_of_order: u64,
    acked: u64,
    disconnected: u64,
    rate: Rate,
    backlog: Backlog,
    send_us: Latency,
    receive_us: Latency,
    late_us: Latency,
    problems: Vec<Problem>,
}

/// What the tasks of a run share.
struct Shared {
    edge: Edge,
    backend: Backend,
    /// The zero of the stamps.
    start: Instant,
    measured_from: Mutex<Instant>,
    users: u64,
    size: usize,
    /// The senders of a closed loop are to stop.
    ending: AtomicBool,
    accepted: Mutex<HashSet<u64>>,
    sent_measured: AtomicU64,
    failed: AtomicU64,
    unknown: AtomicU64,
    received: Tally,
    repeated: AtomicU64,
    out_of_order: AtomicU64,
    acked: AtomicU64,
    disconnected: AtomicU64,
    send: Recorder,
    receive: Recorder,
    late: Recorder,
    problems: Problems,
}

impl Args {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        sockets::make_room(self.users)?;
        let length = self.load.warm_up + self.load.duration;
        if let Some(rate) = self.rate {
            Schedule::new(Instant::now(), rate, length)?;
        }
        let edge = self.target.edge().await?;
        let backend = self.target.backend(&self.server, &edge).await?;
        let shared = Arc::new(Shared::new(edge, backend, self.users, self.size));
        let (end, stop) = watch::channel(false);
        let mut receiving = JoinSet::new();
        clients::connect(&shared, &stop, &mut receiving).await?;

        let started = Instant::now();
        shared.begin(started + self.load.warm_up);
        let mut backlog = Backlog::default();
        let mut sending = JoinSet::new();
        let mut broken = false;
        let work = async {
            let work = async {
                match self.rate {
                    Some(rate) => {
                        let schedule = Schedule::new(started, rate, length)?;
                        senders::open_loop(schedule, &shared, &mut sending, &mut backlog).await
                    }
                    None => {
                        senders::closed_loop(self.concurrency, started + length, &shared, &mut sending).await;
                        Ok(())
                    }
                }
            };
            tokio::select! {
                done = work => done,
                () = interrupted() => {
                    broken = true;
                    Ok(())
                }
            }
        };
        progress::show("sending", length.as_secs(), || started.elapsed().as_secs(), work).await?;
        let measured_s = started.elapsed().saturating_sub(self.load.warm_up).min(self.load.duration);
        // What is under way gets its answer, or runs into its own deadline.
        shared.ending.store(true, Ordering::Relaxed);
        while sending.join_next().await.is_some() {}
        let expected = shared.accepted().len() as u64;
        backlog.undelivered = expected.saturating_sub(shared.received.count());
        let drain = async {
            tokio::select! {
                () = shared.received.expect(expected, QUIET) => {}
                () = interrupted() => broken = true,
            }
        };
        progress::show("receiving", expected, || shared.received.count(), drain).await;
        end.send_replace(true);
        let mut received = HashSet::new();
        while let Some(client) = receiving.join_next().await {
            received.extend(client?);
        }
        self.load.conclude(&self.report(&shared, &received, backlog, measured_s.as_secs_f64(), broken))
    }

    fn report(
        &self,
        shared: &Shared,
        received: &HashSet<u64>,
        backlog: Backlog,
        measured_s: f64,
        broken: bool,
    ) -> Sent {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let accepted = shared.accepted();
        let lost = accepted.difference(received).count() as u64;
        let (failed, unknown, disconnected) =
            (count(&shared.failed), count(&shared.unknown), count(&shared.disconnected));
        Sent {
            bench: "inbox",
            interrupted: broken,
            complete: lost + failed + unknown + disconnected == 0,
            sustained: backlog.is_sustained(accepted.len() as u64),
            users: self.users,
            concurrency: self.rate.is_none().then_some(self.concurrency),
            size_bytes: self.size,
            measured_s,
            accepted: accepted.len() as u64,
            failed,
            unknown,
            received: received.len() as u64,
            lost,
            repeated: count(&shared.repeated),
            out_of_order: count(&shared.out_of_order),
            acked: count(&shared.acked),
            disconnected,
            rate: Rate { asked: self.rate, reached: per_second(count(&shared.sent_measured), measured_s) },
            backlog,
            send_us: shared.send.summary(),
            receive_us: shared.receive.summary(),
            late_us: shared.late.summary(),
            problems: shared.problems.list(),
        }
    }
}

impl Shared {
    fn new(edge: Edge, backend: Backend, users: u64, size: usize) -> Self {
        let start = Instant::now();
        Self {
            edge,
            backend,
            start,
            measured_from: Mutex::new(start),
            users,
            size,
            ending: AtomicBool::new(false),
            accepted: Mutex::default(),
            sent_measured: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            received: Tally::new(),
            repeated: AtomicU64::new(0),
            out_of_order: AtomicU64::new(0),
            acked: AtomicU64::new(0),
            disconnected: AtomicU64::new(0),
            send: Recorder::new(),
            receive: Recorder::new(),
            late: Recorder::new(),
            problems: Problems::default(),
        }
    }

    /// Messages that are due from `measured_from` on are measured.
    fn begin(&self, measured_from: Instant) {
        *self.measured_from.lock().unwrap_or_else(PoisonError::into_inner) = measured_from;
    }

    fn accepted(&self) -> std::sync::MutexGuard<'_, HashSet<u64>> {
        self.accepted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Report for Sent {
    fn lines(&self) -> Vec<String> {
        let Self { users, accepted, received, lost, repeated, out_of_order, acked, .. } = self;
        let load = match self.concurrency {
            Some(concurrency) => format!("{concurrency} senders in a closed loop"),
            None => "an open loop".to_owned(),
        };
        let mut lines = vec![
            format!(
                "inbox      {users} users, {load}, {} bytes, {:.1} s measured",
                self.size_bytes, self.measured_s
            ),
            format!("rate       {}, {}", self.rate, self.backlog),
            format!("accepted   {accepted}, {} failed, {} of unknown outcome", self.failed, self.unknown),
            format!(
                "received   {received}, {lost} lost, {repeated} repeated, {out_of_order} out of order, {acked} acked"
            ),
            format!("send       {} (due to durable)", self.send_us),
            format!("receive    {} (due to received)", self.receive_us),
        ];
        if self.concurrency.is_none() {
            lines.push(format!("late       {} (due to sent, by this process)", self.late_us));
        }
        report::conclude(self.sustained, &self.problems, &mut lines);
        lines
    }

    fn verdict(&self) -> anyhow::Result<()> {
        let Self { lost, accepted, failed, unknown, disconnected, .. } = self;
        anyhow::ensure!(
            *lost == 0,
            "{lost} of {accepted} accepted messages were lost; the run does not count"
        );
        anyhow::ensure!(
            self.complete,
            "{failed} sends failed, {unknown} have an unknown outcome, {disconnected} clients were disconnected; \
             the run does not count"
        );
        Ok(())
    }
}
