//! `sanjay bench connect`: opens connections at a rate, holds them for a while, and closes them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sanjay_client::{
    ConnectionError, RawConnection,
    protocol::{CloseCode, Event},
};
use serde::Serialize;
use tokio::{sync::watch, task::JoinSet, time::sleep};

use super::{
    LoadArgs,
    edge::{Edge, pong, stopped},
    latency::{Latency, Recorder},
    pace::{Pacer, Schedule, operations},
    parse_rate,
    problems::{Problem, Problems},
    progress,
    report::{self, Rate, Report, per_second},
    sockets,
    tally::Tally,
    target::TargetArgs,
};
use crate::signals::interrupted;

/// Longer than a connect may take: then it has failed and was counted.
const QUIET: Duration = Duration::from_secs(15);

/// Open connections at a rate, hold them, close them
///
/// Each connection is a user of its own without an inbox. A latency begins when the connection was due, and ends with
/// the edge's welcome. --duration is how long all of them are held; connections of the warm-up are closed at once and
/// not counted. What a connection costs the server cannot be seen from here: look at the edge's resident memory.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// How many connections
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u64).range(1..))]
    connections: u64,
    /// How many of them are due each second
    #[arg(long, value_name = "PER_SECOND", default_value = "200", value_parser = parse_rate)]
    rate: f64,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    target: TargetArgs,
}

/// What was measured.
#[derive(Debug, Serialize)]
struct Connected {
    bench: &'static str,
    interrupted: bool,
    connections: u64,
    held_s: f64,
    opened: u64,
    failed: u64,
    lost: u64,
    closed: u64,
    rate: Rate,
    connect_us: Latency,
    handshake_us: Latency,
    welcome_us: Latency,
    late_us: Latency,
    problems: Vec<Problem>,
}

/// What the connections share.
struct Shared {
    edge: Edge,
    /// Connections that are open or have failed.
    tried: Tally,
    opened: AtomicU64,
    failed: AtomicU64,
    lost: AtomicU64,
    closed: AtomicU64,
    connect: Recorder,
    handshake: Recorder,
    welcome: Recorder,
    late: Recorder,
    problems: Problems,
}

impl Args {
    pub(super) async fn run(self) -> anyhow::Result<()> {
        let warm_up = operations(self.rate, self.load.warm_up);
        sockets::make_room(self.connections)?;
        let shared = Arc::new(Shared::new(self.target.edge().await?));
        let (end, stop) = watch::channel(false);
        let mut tasks = JoinSet::new();
        let total = warm_up + self.connections;
        let schedule = Schedule::of(Instant::now(), self.rate, total);

        let mut interrupt = Box::pin(interrupted());
        let work = async {
            tokio::select! {
                opened = open(schedule, warm_up, &shared, &stop, &mut tasks) => opened.map(|()| false),
                () = &mut interrupt => Ok(true),
            }
        };
        let mut broken = progress::show("connecting", total, || shared.tried.count(), work).await?;
        let opening = schedule.at(warm_up).elapsed().as_secs_f64();
        let opened = shared.opened.load(Ordering::Relaxed);
        let held = Instant::now();
        if !broken {
            let seconds = self.load.duration.as_secs();
            let hold = async {
                tokio::select! {
                    () = sleep(self.load.duration) => false,
                    () = interrupt => true,
                }
            };
            broken = progress::show("holding", seconds, || held.elapsed().as_secs(), hold).await;
        }
        let held_s = held.elapsed().as_secs_f64();
        end.send_replace(true);
        while tasks.join_next().await.is_some() {}
        let rate = Rate { asked: Some(self.rate), reached: per_second(opened, opening) };
        self.load.conclude(&shared.report(broken, self.connections, held_s, rate))
    }
}

/// Opens every connection when it is due, and returns once each is open or has failed.
async fn open(
    schedule: Schedule,
    warm_up: u64,
    shared: &Arc<Shared>,
    stop: &watch::Receiver<bool>,
    tasks: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let mut pacer = Pacer::start(schedule)?;
    let mut begun = 0;
    while let Some(due) = pacer.beyond(begun).await {
        for n in begun..due {
            let (shared, stop) = (Arc::clone(shared), stop.clone());
            let due = schedule.at(n);
            shared.late.record(0, due.elapsed());
            tasks.spawn(async move {
                if n < warm_up {
                    shared.warm(n).await;
                } else {
                    shared.connect(n, due, stop).await;
                }
            });
        }
        begun = due;
    }
    shared.tried.expect(schedule.total(), QUIET).await;
    Ok(())
}

impl Shared {
    fn new(edge: Edge) -> Self {
        Self {
            edge,
            tried: Tally::new(),
            opened: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            lost: AtomicU64::new(0),
            closed: AtomicU64::new(0),
            connect: Recorder::new(),
            handshake: Recorder::new(),
            welcome: Recorder::new(),
            late: Recorder::new(),
            problems: Problems::default(),
        }
    }

    /// A connection that only warms the server up.
    async fn warm(&self, n: u64) {
        let opened = self.edge.open(&self.edge.name("user", n), Some(0)).await;
        self.tried.add();
        match opened {
            Ok(opened) => opened.connection.close(CloseCode::Done).await,
            Err(error) => self.problems.note(format!("warm-up: {error}")),
        }
    }

    /// A connection that is measured, held until `stop`, and closed.
    async fn connect(&self, n: u64, due: Instant, mut stop: watch::Receiver<bool>) {
        let opened = self.edge.open(&self.edge.name("user", n), Some(0)).await;
        let took = due.elapsed();
        let mut connection = match opened {
            Ok(opened) => {
                let who = n as usize;
                self.connect.record(who, took);
                self.handshake.record(who, opened.handshake);
                self.welcome.record(who, opened.welcome);
                self.opened.fetch_add(1, Ordering::Relaxed);
                opened.connection
            }
            Err(error) => {
                self.failed.fetch_add(1, Ordering::Relaxed);
                self.problems.note(error);
                return self.tried.add();
            }
        };
        self.tried.add();
        tokio::select! {
            error = hold(&mut connection) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                self.problems.note(error);
            }
            () = stopped(&mut stop) => {
                connection.close(CloseCode::Done).await;
                self.closed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn report(&self, interrupted: bool, connections: u64, held_s: f64, rate: Rate) -> Connected {
        Connected {
            bench: "connect",
            interrupted,
            connections,
            held_s,
            opened: self.opened.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
            closed: self.closed.load(Ordering::Relaxed),
            rate,
            connect_us: self.connect.summary(),
            handshake_us: self.handshake.summary(),
            welcome_us: self.welcome.summary(),
            late_us: self.late.summary(),
            problems: self.problems.list(),
        }
    }
}

/// Answers pings until the connection ends.
async fn hold(connection: &mut RawConnection) -> ConnectionError {
    loop {
        let answered = match connection.next().await {
            Ok(envelope) if envelope.event == Event::Ping => pong(connection).await,
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = answered {
            return error;
        }
    }
}

impl Report for Connected {
    fn lines(&self) -> Vec<String> {
        let Self { opened, connections, failed, lost, closed, .. } = self;
        let mut lines = vec![
            format!("opened     {opened} of {connections}, {failed} failed; {}", self.rate),
            format!("held       {:.1} s, {lost} lost, {closed} closed by the bench", self.held_s),
            format!("connect    {} (due to welcome)", self.connect_us),
            format!("handshake  {}", self.handshake_us),
            format!("welcome    {} (hello to welcome)", self.welcome_us),
            format!("late       {} (due to begun, by this process)", self.late_us),
        ];
        report::conclude(true, &self.problems, &mut lines);
        lines
    }

    fn verdict(&self) -> anyhow::Result<()> {
        let Self { failed, lost, .. } = self;
        anyhow::ensure!(
            failed + lost == 0,
            "{failed} connections failed and {lost} were lost; the run does not count"
        );
        Ok(())
    }
}
