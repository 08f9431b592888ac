//! What the kernel tells about a process: memory and time on the processor.

use std::{fs, time::Duration};

use anyhow::Context as _;

/// Resident memory of a process in bytes.
pub(crate) fn rss(pid: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| path.clone())?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok())
        .with_context(|| format!("{path} has no VmRSS"))?;
    Ok(kib * 1024)
}

/// Time that the living threads of a process have spent on a processor, user and system together.
pub(crate) fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let tasks = format!("/proc/{pid}/task");
    let mut total = Duration::ZERO;
    for task in fs::read_dir(&tasks).with_context(|| tasks.clone())? {
        let path = task?.path().join("schedstat");
        // A thread may end between the listing and the reading.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let nanoseconds = text
            .split_whitespace()
            .next()
            .and_then(|number| number.parse().ok())
            .with_context(|| format!("{} is not readable", path.display()))?;
        total += Duration::from_nanos(nanoseconds);
    }
    anyhow::ensure!(total > Duration::ZERO, "{tasks} tells no time; schedstat needs CONFIG_SCHED_INFO");
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_can_be_measured() {
        let me = std::process::id();
        assert!(rss(me).unwrap() > 100_000);
        assert!(cpu(me).unwrap() > Duration::ZERO);
    }
}
