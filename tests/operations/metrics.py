"""Which metrics there are, by docs/metrics.md, and whether an expression uses others.

PromQL is not parsed here: promtool does that. This looks at names, and at the labels in braces behind them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from report import ROOT, require

DOCUMENT = ROOT / "docs/metrics.md"
# The series of a histogram.
SUFFIXES = ("_bucket", "_count", "_sum")
# What is not ours: Prometheus's own series, and the blackbox exporter's; with the labels that are used of them.
STANDARD: dict[str, dict[str, set[str]]] = {
    "up": {},
    "ALERTS": {"alertstate": {"pending", "firing"}, "severity": {"critical", "warning"}},
    "probe_success": {},
    "probe_ssl_earliest_cert_expiry": {},
}
# Prometheus puts these on every series; `le` is on those of histograms.
TARGET = {"job", "instance", "le"}
ROW = re.compile(r"^\| `([a-z][a-z0-9_]+)` \| \w+ \| ([^|]*) \|", re.MULTILINE)
NAME = re.compile(r"(?<![\w:])([a-z]\w*(?::\w+)+|(?:sanjay|process|probe)_\w+|up(?=\{)|ALERTS(?=\{))")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')


@functools.cache
def documented() -> dict[str, dict[str, set[str]]]:
    """Each metric's labels, and the values of each where the document lists them."""
    require(DOCUMENT.is_file(), "docs/metrics.md is missing; it is generated from the code")
    found: dict[str, dict[str, set[str]]] = {}
    for name, labels in ROW.findall(DOCUMENT.read_text(encoding="utf-8")):
        found[name] = {}
        for label in labels.split(";") if labels.strip() else ():
            key, _, values = label.partition(":")
            found[name][key.strip().strip("`")] = {value.strip() for value in values.split(",") if value.strip()}
    require(len(found) > 50, f"docs/metrics.md has a table of {len(found)} metrics only; does this reader still fit?")
    return found


def labels_of(name: str) -> dict[str, set[str]] | None:
    """The labels of a series, or nothing when there is no such metric."""
    known = documented() | STANDARD
    return next((known[one] for one in (name, *map(name.removesuffix, SUFFIXES)) if one in known), None)


def problems(text: str, recorded: set[str]) -> Iterator[str]:
    """What of the names and labels in a text does not exist. Names inside of strings are left alone."""
    used = [found for found in NAME.finditer(text) if text.count('"', 0, found.start()) % 2 == 0]
    if not used:
        yield f"no metric is in {text!r}"
    for found in used:
        name = found[1]
        labels = labels_of(name)
        if labels is None and name not in recorded:
            yield f"{name} is not in docs/metrics.md"
        selector = re.match(r"\{([^}]*)\}", text[found.end() :])
        if selector and labels is not None:
            yield from selector_problems(name, labels, selector[1])


def selector_problems(name: str, labels: dict[str, set[str]], selector: str) -> Iterator[str]:
    """What of a selector's labels and values the metric does not have."""
    for key, sign, value in MATCHER.findall(selector):
        if key in TARGET:
            continue
        if key not in labels:
            yield f"{name} has no label {key}"
        elif labels[key]:
            named = value.split("|") if "~" in sign else [value]
            yield from (f"{name} has no {key} {one}" for one in named if one not in labels[key])
