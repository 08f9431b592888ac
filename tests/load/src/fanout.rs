//! The second phase: one channel, thousands of sockets, beside a process that only writes.
//!
//! One message is under way at a time, so that each delivery is one write to an idle socket on both sides.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use serde::Serialize;

use crate::{
    Options,
    cluster::Cluster,
    idle::{ask, open, unexpected},
    measure,
    orders::{FromClient, FromRaw, Open, Status, ToClient, ToRaw},
    process::{Core, Part},
    publisher::Publisher,
    report,
};

/// The channel that every connection of the client shares; see `client::introduce`.
const CHANNEL: &str = "load-0";
/// The edge's heartbeat in this phase: its own default.
const HEARTBEAT: Duration = Duration::from_secs(25);
/// Messages before the first round: code, caches and socket buffers are warm, and the frame's size is known.
const WARM_UP: u32 = 3;

/// One round of a side.
#[derive(Debug, Serialize)]
pub(crate) struct Round {
    pub side: Side,
    pub deliveries: u64,
    /// CPU seconds of the writing process for a million deliveries.
    pub cpu_s_per_million: f64,
    /// From the publish to the last socket, the middle one of the round, in milliseconds.
    pub spread_ms_p50: f64,
}

/// Who writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    Raw,
    Edge,
}

/// What a delivery costs.
#[derive(Debug, Serialize)]
pub(crate) struct Fanout {
    pub subscribers: u32,
    pub payload_bytes: u32,
    pub frame_bytes: usize,
    pub rounds: Vec<Round>,
    pub raw_cpu_s_per_million: f64,
    pub edge_cpu_s_per_million: f64,
    pub edge_over_raw: f64,
}

/// Runs the rounds in the order raw, edge, edge, raw, so that drift of the machine weighs on both alike.
pub(crate) fn measure(options: &Options) -> anyhow::Result<Fanout> {
    report::progress("starting router, delivery and edge");
    let cluster = Cluster::start(options, HEARTBEAT)?;
    report::progress(&format!("opening {} subscribers of one channel", options.subscribers));
    let mut edge = EdgeSide::start(options, &cluster)?;
    for _ in 0..WARM_UP {
        edge.deliver()?;
    }
    let frame_bytes = ask(&mut edge.receiver.client, edge.receiver.limit)?.frame_bytes;
    report::progress(&format!("opening {} sockets to the raw writer", options.subscribers));
    let mut raw = RawSide::start(options, &cluster, frame_bytes)?;
    for _ in 0..WARM_UP {
        raw.deliver()?;
    }
    let mut rounds = Vec::new();
    for block in 0..options.blocks {
        for side in [Side::Raw, Side::Edge, Side::Edge, Side::Raw] {
            let round = match side {
                Side::Raw => round(side, &mut raw, options)?,
                Side::Edge => round(side, &mut edge, options)?,
            };
            report::progress(&format!(
                "block {}: {side:?} {:.2} CPU-s per million",
                block + 1,
                round.cpu_s_per_million
            ));
            rounds.push(round);
        }
    }
    let mean = |side| {
        let of_side: Vec<f64> =
            rounds.iter().filter(|round| round.side == side).map(|round| round.cpu_s_per_million).collect();
        of_side.iter().sum::<f64>() / of_side.len() as f64
    };
    let (raw_cpu_s_per_million, edge_cpu_s_per_million) = (mean(Side::Raw), mean(Side::Edge));
    Ok(Fanout {
        subscribers: options.subscribers,
        payload_bytes: options.payload,
        frame_bytes,
        raw_cpu_s_per_million,
        edge_cpu_s_per_million,
        edge_over_raw: edge_cpu_s_per_million / raw_cpu_s_per_million,
        rounds,
    })
}

/// One side of the comparison.
trait Writer {
    /// The process that is measured.
    fn pid(&self) -> u32;
    /// Sends one message and returns once every socket has it.
    fn deliver(&mut self) -> anyhow::Result<()>;
    /// What receives.
    fn receiver(&mut self) -> &mut Receiver;
}

fn round(side: Side, writer: &mut impl Writer, options: &Options) -> anyhow::Result<Round> {
    let limit = writer.receiver().limit;
    let before = ask(&mut writer.receiver().client, limit)?.messages;
    let cpu_before = measure::cpu(writer.pid())?;
    let mut times = Vec::new();
    for _ in 0..options.messages {
        let started = Instant::now();
        writer.deliver()?;
        times.push(started.elapsed());
    }
    let cpu = measure::cpu(writer.pid())? - cpu_before;
    let status = ask(&mut writer.receiver().client, limit)?;
    let deliveries = u64::from(options.messages) * u64::from(options.subscribers);
    check(side, &status, status.messages - before, deliveries)?;
    times.sort_unstable();
    Ok(Round {
        side,
        deliveries,
        cpu_s_per_million: report::ratio(1_000_000, deliveries as f64) * cpu.as_secs_f64(),
        spread_ms_p50: times[times.len() / 2].as_secs_f64() * 1e3,
    })
}

/// A round counts only when every socket got every message once.
fn check(side: Side, status: &Status, got: u64, wanted: u64) -> anyhow::Result<()> {
    anyhow::ensure!(got == wanted, "the round is void: {side:?} delivered {got} of {wanted}");
    anyhow::ensure!(status.surprises.is_empty(), "the round is void: {:?}", status.surprises);
    Ok(())
}

/// A load client and how much it is to receive.
struct Receiver {
    client: Part<FromClient>,
    sockets: u64,
    expected: u64,
    limit: Duration,
}

impl Receiver {
    fn new(options: &Options, client: Part<FromClient>) -> Self {
        let limit = Duration::from_secs(options.step_seconds);
        Self { client, sockets: u64::from(options.subscribers), expected: 0, limit }
    }

    fn expect_next(&mut self) -> anyhow::Result<()> {
        self.expected += self.sockets;
        self.client.order(&ToClient::Expect { messages: self.expected })
    }

    fn reached(&mut self) -> anyhow::Result<()> {
        match self.client.answer(self.limit)? {
            FromClient::Reached => Ok(()),
            other => Err(unexpected(other)),
        }
    }
}

struct EdgeSide {
    pid: u32,
    publisher: Publisher,
    receiver: Receiver,
    text: String,
}

impl EdgeSide {
    fn start(options: &Options, cluster: &Cluster) -> anyhow::Result<Self> {
        let client = Part::start("client", &["client"], Core::Client, &cluster.log("client"))?;
        let mut receiver = Receiver::new(options, client);
        let limit = receiver.limit;
        let sockets = options.subscribers;
        open(&mut receiver.client, cluster, sockets, sockets, options.no_inbox, limit)?;
        let text = "x".repeat(options.payload as usize);
        Ok(Self { pid: cluster.edge_pid(), publisher: cluster.publisher()?, receiver, text })
    }
}

impl Writer for EdgeSide {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn deliver(&mut self) -> anyhow::Result<()> {
        self.receiver.expect_next()?;
        self.publisher.publish(CHANNEL, self.text.clone())?;
        self.receiver.reached()
    }

    fn receiver(&mut self) -> &mut Receiver {
        &mut self.receiver
    }
}

struct RawSide {
    raw: Part<FromRaw>,
    receiver: Receiver,
    frame_bytes: usize,
}

impl RawSide {
    fn start(options: &Options, cluster: &Cluster, frame_bytes: usize) -> anyhow::Result<Self> {
        let sockets = options.subscribers.to_string();
        let client = Part::start("raw client", &["client"], Core::Client, &cluster.log("raw-client"))?;
        let mut receiver = Receiver::new(options, client);
        let mut raw: Part<FromRaw> =
            Part::start("raw writer", &["raw", "--sockets", &sockets], Core::Server, &cluster.log("raw"))?;
        let target: SocketAddr = match raw.answer(receiver.limit)? {
            FromRaw::Listening(address) => address,
            other => anyhow::bail!("the raw writer answered {other:?}"),
        };
        receiver.client.order(&ToClient::Open(Open {
            target,
            connections: options.subscribers,
            hello: None,
        }))?;
        match raw.answer(receiver.limit)? {
            FromRaw::Accepted => {}
            other => anyhow::bail!("the raw writer answered {other:?}"),
        }
        match receiver.client.answer(receiver.limit)? {
            FromClient::Opened { .. } => Ok(Self { raw, receiver, frame_bytes }),
            other => Err(unexpected(other)),
        }
    }
}

impl Writer for RawSide {
    fn pid(&self) -> u32 {
        self.raw.id()
    }

    fn deliver(&mut self) -> anyhow::Result<()> {
        self.receiver.expect_next()?;
        self.raw.order(&ToRaw::Write { frame_bytes: self.frame_bytes })?;
        match self.raw.answer(self.receiver.limit)? {
            FromRaw::Written(written) if written == self.receiver.sockets => self.receiver.reached(),
            other => anyhow::bail!("the round is void: the raw writer answered {other:?}"),
        }
    }

    fn receiver(&mut self) -> &mut Receiver {
        &mut self.receiver
    }
}
