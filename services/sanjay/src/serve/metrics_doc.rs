//! `docs/metrics.md` is made from the metrics that the code registers, and a test keeps it so.

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use prometheus_client::{encoding::text, registry::Registry};

use super::*;

const HOW: &str = "SANJAY_UPDATE_DOCS=1 cargo test -p sanjay metrics_doc";

const INTRODUCTION: &str = "\
# Metrics

Every process serves its metrics at `/metrics` of `admin.listen`, as OpenMetrics text. A `standalone` process has those
of all three roles. What to alert on, and what to do then, is in [runbook.md](runbook.md).

- **Counters** (`…_total`) count from the start of the process: look at their rates.
- **Histograms** have the series `…_bucket`, `…_count` and `…_sum`.
- Every value that a label can have is there from the start with 0, so that the first event shows in a rate. What depends
  on Redis or MongoDB is there when the configuration names them.
- No label ever names a user, a channel or a message.
- Latencies between processes are differences between two machines' clocks. What would be negative is 0.
";

/// One metric, as the exposition shows it.
#[derive(Debug, Default, PartialEq)]
struct Family {
    name: String,
    kind: String,
    help: String,
    /// Each label with its values.
    labels: Vec<(String, Vec<String>)>,
}

/// Reads what a registry exposes.
fn families(registry: &Registry) -> Vec<Family> {
    let mut exposed = String::new();
    text::encode(&mut exposed, registry).unwrap();
    let mut families: Vec<Family> = Vec::new();
    for line in exposed.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            families.push(Family { name: name.into(), help: help.into(), ..Family::default() });
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            let family = families.last_mut().filter(|family| family.name == name).unwrap();
            kind.clone_into(&mut family.kind);
        } else if !line.starts_with('#') {
            let family = families.last_mut().unwrap();
            assert!(line.starts_with(&family.name), "{line} is not of {}", family.name);
            for (label, value) in labels(line) {
                match family.labels.iter_mut().find(|(name, _)| *name == label) {
                    Some((_, values)) if values.contains(&value) => {}
                    Some((_, values)) => values.push(value),
                    None => family.labels.push((label, vec![value])),
                }
            }
        }
    }
    for (_, values) in families.iter_mut().flat_map(|family| &mut family.labels) {
        // They come in no order.
        values.sort_by_key(|value| (value.parse::<u64>().ok(), value.clone()));
    }
    families
}

/// The labels of a sample; those of a histogram's buckets are no labels of the metric.
fn labels(sample: &str) -> Vec<(String, String)> {
    let Some((_, rest)) = sample.split_once('{') else { return Vec::new() };
    let (inner, _) = rest.rsplit_once('}').unwrap();
    let pairs = inner.split("\",").map(|pair| pair.split_once("=\"").unwrap());
    let pairs = pairs.map(|(name, value)| (name.to_owned(), value.trim_end_matches('"').to_owned()));
    pairs.filter(|(name, _)| name != "le").collect()
}

fn section(title: &str, families: &[Family]) -> String {
    let mut text = format!("\n## {title}\n\n| metric | type | labels | meaning |\n|---|---|---|---|\n");
    for Family { name, kind, help, labels } in families {
        let suffix = if kind == "counter" { "_total" } else { "" };
        let labels: Vec<String> = labels
            .iter()
            .map(|(label, values)| match label.as_str() {
                // Changes with each release.
                "version" => format!("`{label}`"),
                _ => format!("`{label}`: {}", values.join(", ")),
            })
            .collect();
        writeln!(text, "| `{name}{suffix}` | {kind} | {} | {help} |", labels.join("; ")).unwrap();
    }
    text
}

/// The metrics of every process, and those of each role.
fn sections() -> Vec<(&'static str, Vec<Family>)> {
    let of_role = |register: fn(&mut Registry)| {
        let mut registry = Registry::default();
        register(registry.sub_registry_with_prefix(PREFIX));
        families(&registry)
    };
    let mut process = Registry::default();
    register_process(&mut process, ["edge", "router", "delivery"]);
    vec![
        ("Every process", families(&process)),
        ("Edge", of_role(sanjay_edge::register_metrics)),
        ("Router", of_role(sanjay_router::register_metrics)),
        ("Delivery", of_role(sanjay_delivery::register_metrics)),
    ]
}

fn rendered() -> String {
    let mut text = format!("<!-- Made by `{HOW}`. Do not edit. -->\n\n{INTRODUCTION}");
    for (title, families) in sections() {
        text += &section(title, &families);
    }
    text
}

#[test]
fn the_document_is_what_the_code_registers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/metrics.md");
    let rendered = rendered();
    if std::env::var_os("SANJAY_UPDATE_DOCS").is_some() {
        fs::write(&path, &rendered).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    let differs = rendered.lines().zip(written.lines()).find(|(new, old)| new != old);
    assert!(written == rendered, "docs/metrics.md is out of date, run `{HOW}`; it differs at {differs:?}");
}

#[test]
fn every_metric_has_a_unit_a_meaning_and_a_name_of_its_own() {
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    for (section, families) in sections() {
        assert!(families.len() > 5, "{section}: {families:?}");
        for family in families {
            let Family { name, help, kind, labels } = &family;
            assert_eq!(seen.insert(name.clone(), section), None, "{name} is registered twice");
            assert!(help.len() > 15 && help.ends_with('.'), "{name}: {help:?}");
            assert!(!help.contains('|') && !help.contains('\n'), "{name}: {help:?}");
            assert!(["counter", "gauge", "histogram"].contains(&kind.as_str()), "{name} is a {kind}");
            let timed =
                name.ends_with("_seconds") || !(name.contains("latency") || name.contains("duration"));
            assert!(timed, "{name} is a time without its unit");
            let values: usize = labels.iter().map(|(_, values)| values.len()).product();
            assert!(values <= 64, "{name} has {values} series: {labels:?}");
            for forbidden in ["user", "channel", "message", "message_id", "session", "node"] {
                assert!(labels.iter().all(|(label, _)| label != forbidden), "{name} has a label {forbidden}");
            }
        }
    }
}

#[test]
fn samples_are_read_with_all_their_labels() {
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(labels("x_total 5"), []);
    let sample = "x_bucket{le=\"0.1\",kind=\"a b\",peer=\"c\"} 5";
    assert_eq!(labels(sample), [pair("kind", "a b"), pair("peer", "c")]);
}
