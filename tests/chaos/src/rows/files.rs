//! The file of a delivery node: no room for it, and a part of it that is missing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::Context as _;
use sanjay_testkit::Role;
use tempfile::TempDir;

use crate::{
    rows::stores::accepts_again,
    run::until,
    storm::{Context, Expect, Outcome, Storm},
};

/// How long it may take to fill what there is room for.
const PATIENCE: Duration = Duration::from_secs(60);

/// Room for the file, in KiB: about a thousand messages beside an empty one.
const ROOM_KIB: u64 = 8 * 1024;

/// A file system of its own, gone with this or with the process.
struct Tmpfs {
    directory: TempDir,
    /// Ends, and unmounts, when its input does.
    keeper: std::process::Child,
}

impl Tmpfs {
    /// `None` where nobody may mount.
    fn mount() -> anyhow::Result<Option<Self>> {
        let directory = tempfile::tempdir()?;
        let options = format!("size={ROOM_KIB}k,mode=700");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "sanjay-chaos"]).arg(directory.path());
        if !mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
            return Ok(None);
        }
        let mut keeper = Command::new("sh");
        keeper.args(["-c", "trap '' INT; read -r _; umount -l -- \"$0\""]).arg(directory.path());
        let keeper = keeper.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        Ok(Some(Self { directory, keeper }))
    }

    fn grow(&self) -> anyhow::Result<()> {
        let mut mount = Command::new("mount");
        let status = mount.args(["-o", "remount,size=512m"]).arg(self.directory.path()).status()?;
        anyhow::ensure!(status.success(), "the file system does not grow: {status}");
        Ok(())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
    }
}

/// Users who stay away while the file grows.
async fn filling(context: &Context, builder: sanjay_testkit::ClusterBuilder) -> anyhow::Result<Storm> {
    let mut load = context.load();
    (load.away, load.padding) = (true, 2_000);
    load.storm = load.storm.min(Duration::from_secs(20));
    Storm::begin(context, builder.start().await, load).await
}

/// Waits until sends are refused, and checks that they are told why.
async fn full(storm: &Storm) -> anyhow::Result<()> {
    let refused = async || storm.run.refusals().iter().any(|why| why.contains("not available"));
    anyhow::ensure!(until(PATIENCE, refused).await, "nothing was refused: {:?}", storm.run.refusals());
    storm.fault();
    let log = storm.cluster.log(Role::Delivery);
    if log.contains("panicked") {
        storm.run.complain("the delivery node panicked");
    }
    Ok(())
}

/// The file system is full; then there is room again, and nobody restarts anything.
pub(crate) async fn store_full(context: Context) -> anyhow::Result<Outcome> {
    let Some(tmpfs) = Tmpfs::mount()? else {
        return Ok(Outcome::skipped("mounting a file system needs root"));
    };
    let store = format!("\"redb:{}\"", tmpfs.directory.path().join("inbox.redb").display());
    let storm = filling(&context, context.cluster().set("delivery.store", store)).await?;
    full(&storm).await?;
    tmpfs.grow()?;
    accepts_again(&storm).await;
    let outcome = storm.finish(Expect { accepted: 0.2, faults: 1 }).await;
    drop(tmpfs);
    Ok(outcome)
}

/// The file may not grow, which needs no root; then the node is started without that limit.
pub(crate) async fn store_limited(context: Context) -> anyhow::Result<Outcome> {
    // Units of 512 bytes. Without the trap the first write beyond the limit would end the process.
    let launcher = format!("trap '' XFSZ; ulimit -f {}; exec \"$0\" \"$@\"", ROOM_KIB * 2);
    let builder = context.cluster().launcher(Role::Delivery, &["sh", "-c", &launcher]);
    let mut storm = filling(&context, builder).await?;
    full(&storm).await?;
    storm.cluster.forget_environment(Role::Delivery);
    storm.cluster.kill(Role::Delivery);
    storm.cluster.restart(Role::Delivery).await;
    accepts_again(&storm).await;
    Ok(storm.finish(Expect { accepted: 0.2, faults: 1 }).await)
}

/// What is done to a copy of the file that a killed node left.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Damage {
    None,
    LastPageMissing,
    HalfMissing,
    LastPageZero,
    MiddleZero,
    HeaderZero,
}

impl Damage {
    const ALL: [Self; 6] = [
        Self::None,
        Self::LastPageMissing,
        Self::HalfMissing,
        Self::LastPageZero,
        Self::MiddleZero,
        Self::HeaderZero,
    ];

    fn apply(self, bytes: &mut Vec<u8>) {
        const PAGE: usize = 4096;
        let (len, zero) = (bytes.len(), |part: &mut [u8]| part.fill(0));
        match self {
            Self::None => {}
            Self::LastPageMissing => bytes.truncate(len - PAGE),
            Self::HalfMissing => bytes.truncate(len / 2),
            Self::LastPageZero => zero(&mut bytes[len - PAGE..]),
            Self::MiddleZero => zero(&mut bytes[len / 2..(len / 2 + 16 * PAGE).min(len)]),
            Self::HeaderZero => zero(&mut bytes[..512]),
        }
    }
}

/// A node killed while it writes, and what it leaves opened with parts missing: all of it is there, or the node says
/// that it cannot read it. It never serves what was not sent.
pub(crate) async fn torn_file(context: Context) -> anyhow::Result<Outcome> {
    let mut storm = Storm::begin(&context, context.cluster().start().await, context.load()).await?;
    let times = context.pick(1, 3);
    for time in 1..=times {
        storm.at(f64::from(time) / f64::from(times + 1)).await;
        storm.cluster.kill(Role::Delivery);
        let left = fs::read(file(&storm)).context("the file that the killed node left")?;
        let answered = storm.answered();
        storm.fault();
        storm.cluster.restart(Role::Delivery).await;
        for damage in Damage::ALL {
            let mut bytes = left.clone();
            damage.apply(&mut bytes);
            super::torn::open(&storm, damage, &bytes, &answered).await?;
        }
    }
    Ok(storm.finish(Expect { accepted: 0.4, faults: times as usize }).await)
}

fn file(storm: &Storm) -> PathBuf {
    let path: &Path = storm.cluster.directory();
    path.join("inbox.redb")
}
