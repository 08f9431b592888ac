//! The metrics that every process has, under the names that Prometheus' own clients use, read from `/proc` at each
//! scrape.

use std::{fmt, fs, path::Path};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
    registry::{Registry, Unit},
};

/// Units in which the kernel tells CPU time: part of its interface, and 100 on every architecture that we build for.
const TICKS_A_SECOND: f64 = 100.0;

/// `process_…`: CPU time, memory, open files, start. What the system does not tell is left out.
#[derive(Debug)]
pub struct ProcessMetrics {
    /// Unix time in seconds; it does not change.
    started: Option<f64>,
}

impl ProcessMetrics {
    /// Registers them with a registry that has no prefix.
    pub fn register(registry: &mut Registry) {
        let started = started();
        registry.register_collector(Box::new(Self { started }));
    }
}

impl Collector for ProcessMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let seconds = Unit::Seconds;
        if let Some(cpu) = cpu_seconds() {
            let help = "CPU time that the process has used.";
            counter(&mut encoder, "process_cpu", help, Some(&seconds), cpu)?;
        }
        if let Some(bytes) = resident_bytes() {
            let help = "Memory of the process that is in RAM.";
            gauge(&mut encoder, "process_resident_memory", help, Some(&Unit::Bytes), bytes)?;
        }
        if let Some(open) = open_files() {
            gauge(&mut encoder, "process_open_fds", "Files and sockets that are open.", None, open)?;
        }
        if let Some(most) = max_files() {
            let help = "Files and sockets that may be open at once.";
            gauge(&mut encoder, "process_max_fds", help, None, most)?;
        }
        if let Some(started) = self.started {
            let help = "When the process was started, in Unix time.";
            gauge(&mut encoder, "process_start_time", help, Some(&seconds), started)?;
        }
        Ok(())
    }
}

/// Encodes a counter. Unlike a registry, this adds no full stop to the help text.
fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: f64,
) -> fmt::Result {
    let metric = ConstCounter::new(value);
    metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: f64,
) -> fmt::Result {
    let metric = ConstGauge::new(value);
    metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
}

/// A field of `/proc/self/stat`, counted from 1 as in its manual.
fn stat(field: usize) -> Option<f64> {
    let text = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name, which may hold blanks and parentheses.
    let (_, rest) = text.rsplit_once(") ")?;
    rest.split(' ').nth(field.checked_sub(3)?)?.trim().parse().ok()
}

fn cpu_seconds() -> Option<f64> {
    Some((stat(14)? + stat(15)?) / TICKS_A_SECOND)
}

fn started() -> Option<f64> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let booted: f64 = text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(booted + stat(22)? / TICKS_A_SECOND)
}

fn resident_bytes() -> Option<f64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024.0)
}

fn open_files() -> Option<f64> {
    let files = Path::new("/proc/self/fd");
    // Since Linux 6.2 the directory's size is how many there are. To list 100,000 takes tens of milliseconds.
    match fs::metadata(files).ok()?.len() {
        // One of those that are listed is the listing itself.
        0 => Some(fs::read_dir(files).ok()?.count().saturating_sub(1) as f64),
        count => Some(count as f64),
    }
}

fn max_files() -> Option<f64> {
    let text = fs::read_to_string("/proc/self/limits").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text;

    use super::*;
    use crate::{Clock, SystemClock};

    fn value(text: &str, name: &str) -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is missing: {text}")).parse().unwrap()
    }

    #[test]
    fn the_process_is_measured_under_the_usual_names() {
        let mut registry = Registry::default();
        ProcessMetrics::register(&mut registry);
        let scrape = || {
            let mut text = String::new();
            text::encode(&mut text, &registry).unwrap();
            text
        };
        let before = scrape();
        assert!(before.contains("# TYPE process_cpu_seconds counter"), "{before}");
        let rss = value(&before, "process_resident_memory_bytes");
        assert!((1e6..1e11).contains(&rss), "{rss}");
        let (open, most) = (value(&before, "process_open_fds"), value(&before, "process_max_fds"));
        assert!(open > 2.0 && open <= most, "{open} of {most}");
        let files: Vec<_> = (0..64).map(|_| fs::File::open("/proc/self/stat").unwrap()).collect();
        let more = value(&scrape(), "process_open_fds");
        // Other tests of this process open and close some too.
        assert!(more >= open + 32.0, "{more} after {open}");
        drop(files);
        let age = SystemClock.now_s() as f64 - value(&before, "process_start_time_seconds");
        assert!((-2.0..86_400.0).contains(&age), "{age}");
        let used = value(&before, "process_cpu_seconds_total");
        let mut sum = 0_u64;
        while value(&scrape(), "process_cpu_seconds_total") <= used {
            sum = std::hint::black_box((0..100_000_u64).fold(sum, u64::wrapping_add));
        }
    }
}
